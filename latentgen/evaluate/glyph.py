"""glyph judged in numbers and sheets: autoencoder, concepts, colours, memorisation, guidance, time. Knows the pipeline, the set and the towers.

Every picture is made by the public pipeline with the checkpoint's defaults, so the numbers are those of what ships.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from latentgen.errors import OutputError, RequestError, TrainingError
from latentgen.evaluate import choose, scores
from latentgen.evaluate.colour import NAMES, colour_scores, dominant_colour, named_colour
from latentgen.evaluate.made import Made, bar, make
from latentgen.evaluate.towers import Towers, small
from latentgen.pixels.sheet import sheet

if TYPE_CHECKING:
    from latentgen.run.pipeline import Pipeline
    from latentgen.train.data import PictureSetReader

Cell = tuple[Image.Image, str]
SIDE = 64  # pixels at which pictures are compared with the training set
CHUNK = 64  # pictures of the set in memory at a time
RECOLOURS = 120
SCALES = (1.0, 2.0, 4.0, 6.0, 8.0)
PROMPTS = ("red heart, 3d render", "cat face, flat", "blue banana", "house, soft shaded", "smiling face with sunglasses, cartoon",
           "purple fish, crisp flat")
NEGATIVES = (("flower, flat", "red"), ("cat, soft shaded", "orange"), ("hat", "blue"), ("face, cartoon", "yellow"))


@dataclass(frozen=True)
class Task:
    """What every section of the evaluation is given."""

    pipe: Pipeline
    reader: PictureSetReader
    out: Path
    pictures: int
    seed: int
    progress: bool | None

    def make(self, split: str, prompts: Sequence[str], **options: Any) -> list[Made]:
        """One picture per prompt, seeds counted from the evaluation's own."""
        wanted = [{"prompt": prompt, "seed": self.seed + n, **options} for n, prompt in enumerate(prompts)]
        return make(self.pipe, self.out / "made" / split, wanted, progress=self.progress)

    def save(self, name: str, cells: Sequence[Cell], *, columns: int, side: int = 128) -> None:
        """Write a contact sheet of pictures with their labels."""
        from latentgen.pixels.save import save_image

        pictures, labels = zip(*cells, strict=True)
        save_image(sheet(pictures, labels, columns=columns, tile=side), self.out / f"{name}.png")


def evaluate(model: str | Path, data: Path, out: Path, *, pictures: int = 200, seed: int = 0, progress: bool | None = None) -> dict[str, Any]:
    """Measure a glyph checkpoint; write `report.json` and sheets into `out`.

    A run that was stopped, or a second one with the same weights, takes the pictures in `out/made` instead of making them again.

    Args:
        model: a card's name or a model folder; it needs `vision_tower/` and `held-out.json`.
        data: the training set that `latentgen train data` built.
        pictures: training concepts to draw, held-out pictures per split to reconstruct, and at most 120 unseen recolours; all there are where fewer.
        seed: decides what is chosen and the noise.
        progress: bars on stderr; None shows them in a terminal or notebook only.

    Returns:
        The report: plain numbers, no paths.

    Raises:
        RequestError: pictures or seed out of range. ModelError: a file of the model is missing. TrainingError: no training set.
        OutputError: `out` cannot be written.
    """
    import torch

    from latentgen.run.pipeline import load
    from latentgen.train.data import PictureSetReader

    if not 1 <= pictures <= 10_000 or not 0 <= seed < 2**31:
        raise RequestError(f"pictures is {pictures!r} and seed {seed!r}: expected 1 to 10000 pictures and a seed from 0 to 2**31 - 1")
    pipe = load(model, progress=False)
    held_out, towers = choose.read_held_out(pipe.card.folder), Towers.read(pipe.card.folder)
    task = Task(pipe, PictureSetReader(Path(data)), Path(out), pictures, seed, progress)
    try:
        task.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {task.out.name!r} cannot be made ({error.strerror}): choose a writable one") from error
    plan = pipe.plan("a heart", seed=seed)
    report: dict[str, Any] = {
        "model": {"name": pipe.card.name, "weights": pipe.checkpoint.digest, "dtype": plan.dtype,
                  "device": plan.device.split(":")[0], "size": [plan.width, plan.height], "steps": plan.steps, "sampler": plan.sampler,
                  "guidance_scale": plan.guidance_scale},
        "torch": torch.__version__, "asked": {"pictures": pictures, "seed": seed}}
    rows = choose.held_out_rows(task.reader.icons, pictures, seed)
    seconds: dict[str, float] = {}
    kept: dict[str, list[Made]] = {}

    def section(name: str, work: Callable[[], dict[str, Any]]) -> None:
        began = time.perf_counter()
        report[name] = work()
        seconds[name] = round(time.perf_counter() - began, 1)

    section("vae", lambda: autoencoder(task, rows))
    section("concepts", lambda: concept_retrieval(task, towers, kept))
    section("colour", lambda: colours(task, held_out, kept))
    section("memory", lambda: memorisation(task, kept, rows))
    section("sheets", lambda: guidance_sheets(task))
    report["timings"] = {"section_seconds": seconds, "seconds_per_picture": _stage_times([m for made in kept.values() for m in made])}
    _write(task.out / "report.json", report)
    return report


def autoencoder(task: Task, rows: dict[str, list[int]]) -> dict[str, Any]:
    """PSNR in dB of held-out pictures after encoding and decoding, and a sheet of originals beside what came back."""
    from latentgen.pixels.image import to_images, to_tensor
    from latentgen.pixels.latent import decode, encode
    from latentgen.train.vae import psnr

    spec, found, took, cells = task.pipe.family.latent, {split: [] for split in rows}, [], []
    listed = [(split, row) for split, some in rows.items() for row in some]
    shown = set(listed[:: max(1, len(listed) // 16)][:16])
    with task.pipe.residency.use("encoder") as encoder, task.pipe.residency.use("decoder") as decoder:
        for split, row in bar(listed, "autoencoder", task.progress):
            original = task.reader.on_white([row])[0]
            began = time.perf_counter()
            pixels = decode(decoder["vae"], encode(encoder["vae"], to_tensor(Image.fromarray(original)), spec), spec)
            took.append(time.perf_counter() - began)
            back = to_images(pixels.cpu())[0]
            found[split].append(psnr(original, np.asarray(back)))
            if (split, row) in shown:
                cells += [(Image.fromarray(original), f"{split}: {task.reader.icons[row].name}"), (back, f"{found[split][-1]:.1f} dB")]
    task.save("vae", cells, columns=8, side=task.reader.pixels.shape[1])
    every = [value for values in found.values() for value in values]
    return {"psnr_db": scores.spread(every, digits=2), "by_split": {split: scores.spread(values, digits=2) for split, values in found.items()},
            "side": task.reader.pixels.shape[1], "seconds_per_picture": round(float(np.median(took)), 4) if took else None}


def concept_retrieval(task: Task, towers: Towers, kept: dict[str, list[Made]]) -> dict[str, Any]:
    """Is a picture of a training concept nearest to that concept, among all names with three or more drawings?

    Read twice: against the text tower's caption embeddings, and against each concept's mean picture embedding, from which the drawing that the
    prompt names is left out. "real" is that drawing itself (a ceiling), "shuffled" judges each picture by another picture's name (a floor).
    """
    reader = task.reader
    chosen = choose.concepts(reader.icons, task.pictures, task.seed)
    if not chosen:
        raise TrainingError("the training set has no name with four or more training drawings: build the whole set with `latentgen train data`")
    made = kept["concepts"] = task.make("concepts", [choose.prompt_of(reader.icons[row]) for row in chosen])
    classes = choose.candidates(reader.icons)
    at = {name: n for n, name in enumerate(classes)}
    rows = [row for members in classes.values() for row in members]
    vectors = np.concatenate([towers.pictures(list(pictures)) for _, pictures in _chunks(task, rows, "embed the set")])
    place = {row: n for n, row in enumerate(rows)}
    labels = np.repeat(np.arange(len(classes)), [len(members) for members in classes.values()])
    sums, _ = scores.prototypes(vectors, labels, len(classes))
    means, words = scores.unit(sums), towers.captions([reader.icons[members[0]].name for members in classes.values()])
    own = np.array([at[reader.icons[row].name.lower()] for row in chosen])
    real = vectors[[place[row] for row in chosen]]
    drawn = np.concatenate([towers.pictures([m.image]) for m in made])
    shift = np.roll(np.arange(len(own)), 1)
    report: dict[str, Any] = {"pictures": len(chosen), "candidates": len(classes), "drawings": len(rows),
                              "chance_top5": round(min(1.0, 5 / len(classes)), 4)}
    for label, pictures, order in (("generated", drawn, slice(None)), ("real", real, slice(None)), ("shuffled", drawn, shift)):
        report[label] = {
            "by_caption": scores.shares(scores.ranks(pictures, words, own[order])),
            "by_drawings": scores.shares(scores.ranks(pictures, means, own[order], scores.without(sums, own[order], real[order])))}
    placed = scores.ranks(drawn, means, own, scores.without(sums, own, real))
    task.save("concepts", [(m.image, f"{m.prompt} (place {r + 1})") for m, r in list(zip(made, placed, strict=True))[:48]], columns=8)
    return report


def colours(task: Task, held_out: dict[str, Any], kept: dict[str, list[Made]]) -> dict[str, Any]:
    """Do the pixels have the colour that the caption says, in combinations that training never saw?

    "real" rows apply the same measure to drawings whose name says their colour: they say how far the measure can be trusted, with the caution that
    its thresholds were set on such drawings. "shuffled" judges each picture by another one's word.
    """
    icons = task.reader.icons
    names = choose.coloured_names(held_out, min(RECOLOURS, task.pictures), task.seed)
    drawings = choose.coloured_drawings(icons)
    kept["recolour"] = task.make("recolour", names)
    kept["comp"] = task.make("comp", [choose.prompt_of(icons[row]) for row in drawings])
    known = choose.training_recolours(icons, max(RECOLOURS, task.pictures), task.seed)
    report: dict[str, Any] = {"names": list(NAMES)}
    cells: list[Cell] = []
    for split, reference in (("recolour", known), ("comp", drawings)):
        wanted = [named_colour(m.prompt) or "" for m in kept[split]]
        found = [dominant_colour(np.asarray(m.image)) for m in kept[split]]
        real = [dominant_colour(task.reader.on_white([row])[0]) for row in reference]
        report[split] = {"generated": colour_scores(wanted, found), "shuffled": colour_scores(list(np.roll(wanted, len(wanted) // 3 + 1)), found),
                         "real": colour_scores([named_colour(icons[row].name) or "" for row in reference], real)}
        cells += [(m.image, f"{m.prompt}: {f}") for m, f in list(zip(kept[split], found, strict=True))[:40]]
    task.save("colour", cells, columns=10, side=96)
    return report


def memorisation(task: Task, kept: dict[str, list[Made]], held_out: dict[str, list[int]]) -> dict[str, Any]:
    """Distance (RMSE at 64 px on white, 0 to 1) of each picture to the nearest of all training pictures; held-out real pictures for reference."""
    made = [(split, m) for split, pictures in kept.items() for m in pictures]
    real = [(split, row) for split, rows in held_out.items() for row in rows]
    whole = [small(m.image, SIDE) for _, m in made] + [small(task.reader.on_white([row])[0], SIDE) for _, row in real]
    chunks = ((rows, _flat([small(p, SIDE) for p in pictures])) for rows, pictures in _chunks(task, task.reader.rows("train"), "nearest pictures"))
    distance, row = scores.nearest(_flat(whole), chunks)
    ours, theirs = distance[:len(made)], distance[len(made):]
    cells: list[Cell] = []
    for n in [i for i in np.argsort(ours) if made[i][0] == "concepts"][:24]:
        name = choose.prompt_of(task.reader.icons[row[n]])
        cells += [(made[n][1].image, made[n][1].prompt), (Image.fromarray(task.reader.on_white([row[n]])[0]), f"{ours[n]:.3f} {name}")]
    task.save("nearest", cells, columns=8)
    splits, sources = np.array([split for split, _ in made]), np.array([split for split, _ in real])
    return {"side": SIDE, "training_pictures": len(task.reader.rows("train")),
            "generated": {split: scores.closeness(ours[splits == split]) for split in kept},
            "held_out": {"all": scores.closeness(theirs)} | {split: scores.closeness(theirs[sources == split]) for split in held_out}}


def guidance_sheets(task: Task) -> dict[str, Any]:
    """The same noise at several guidance scales, and with and without a negative prompt."""
    columns = [task.make(f"guidance-{scale:g}", PROMPTS, guidance_scale=scale) for scale in SCALES]
    cells = [(m.image, f"{m.prompt} | guidance {scale:g}") for row in zip(*columns, strict=True) for m, scale in zip(row, SCALES, strict=True)]
    task.save("guidance", cells, columns=len(SCALES), side=160)
    without = task.make("negative-off", [prompt for prompt, _ in NEGATIVES])
    wanted = [{"prompt": prompt, "seed": task.seed + n, "negative_prompt": words} for n, (prompt, words) in enumerate(NEGATIVES)]
    avoided = make(task.pipe, task.out / "made" / "negative-on", wanted, progress=task.progress)
    cells = []
    for off, on, (prompt, words) in zip(without, avoided, NEGATIVES, strict=True):
        cells += [(off.image, prompt), (on.image, f"{prompt} | not: {words}")]
    task.save("negative", cells, columns=4, side=160)
    return {"files": ["vae.png", "concepts.png", "colour.png", "nearest.png", "guidance.png", "negative.png"]}


def _chunks(task: Task, rows: Sequence[int], label: str) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    """(row numbers, (n, H, W, 3) uint8 on white), a few at a time from the memory-mapped set."""
    for start in bar(range(0, len(rows), CHUNK), label, task.progress):
        part = rows[start:start + CHUNK]
        yield part, task.reader.on_white(part)


def _flat(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """n uint8 pictures -> (n, pixels) float32; ink counts from 0 (white) to 1, which keeps the products of `nearest` small and exact."""
    return 1 - np.stack(pictures).reshape(len(pictures), -1).astype(np.float32) / 255


def _stage_times(made: Sequence[Made]) -> dict[str, float]:
    stages = made[0].timings if made else {}
    return {stage: round(float(np.median([m.timings[stage] for m in made])), 4) for stage in stages}


def _write(path: Path, report: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"{path.name} cannot be written ({error.strerror}): make room, or choose a writable folder") from error
