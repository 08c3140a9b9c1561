"""The fastest approximations that hold a quality, found by trying: on this machine, on this model, against its exact pictures.

Knows the pipeline, the clock and the picture tower of the shipped model; prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentgen.diffusion.table import in_words
from latentgen.errors import RequestError
from latentgen.models.approximate.table import Kind, kind_of
from latentgen.run.request import Request
from latentgen.run.tuned import Tuned, keep_tuned, tuned_key

if TYPE_CHECKING:
    from PIL import Image

    from latentgen.run.pipeline import Pipeline
    from latentgen.run.result import Result

    Embed = Callable[[Sequence[Image.Image]], np.ndarray]  # n pictures -> (n, d), unit rows
    Approximate = Mapping[str, Mapping[str, Any]]

PROMPTS = ("a red heart", "a green tree beside a house, soft shaded", "portrait of a cat, crisp flat")
EXACT = "exact"
TOWERS = "glyph"  # the model that ships a picture tower


def candidates(kind: Kind) -> list[Approximate]:
    """What is tried on a kind of network, without the exact run."""
    if kind == "transformer":
        return [*({"first_block": {"threshold": t}} for t in (0.04, 0.08, 0.12, 0.2)), *({"tea_cache": {"threshold": t}} for t in (0.1, 0.2, 0.4)),
                *({"taylor": {"interval": n, "order": order}} for n, order in ((2, 1), (3, 1), (4, 1), (3, 2)))]
    merging: tuple[Approximate, ...] = ({}, {"token_merging": {"ratio": 0.25}}, {"token_merging": {"ratio": 0.5}})
    deep: tuple[Approximate, ...] = ({},
                                     *({"deep_cache": {"interval": n, "layers": layers}} for n, layers in ((2, 1), (2, 2), (3, 1), (3, 2), (5, 2))))
    return [{**d, **m} for d in deep for m in merging if d or m]


def tune(model: str | Path = "glyph", *, quality: float = 0.98, prompts: Sequence[str] = PROMPTS, tower: str | Path | None = None, save: bool = True,
         device: str = "auto", dtype: str = "auto", ways: Sequence[str] = (),
         on_picture: Callable[[int, int], None] | None = None, **said_too: Any) -> dict[str, Any]:
    """Measure what a model's approximations cost and save, and keep the fastest that holds the quality for `load(..., tuned=True)`.

    Args:
        quality: least cosine of the picture tower between a picture and the exact one of the same words and seed, 0 to 1; of all prompts, the worst
            counts.
        prompts: one picture is made of each, by every candidate, in turns with the exact run.
        tower: a model folder with `vision_tower`, by whose picture tower pictures are compared; None for that of the shipped model.
        save: keep what was found.
        ways: of holding weights in fewer bits (see `latentgen.models.quantise.ways.WAYS`), each measured beside, with nothing left out; they are
            shown and not chosen, for they are asked for when a model is loaded.
        on_picture: (pictures made, pictures in all) after each.
        said_too: further fields of a `Request`: steps, width, height, sampler ...

    Returns:
        Plain numbers: "rows" (name, approximate, quality, psnr in dB, both of the worst prompt, seconds of sampling, the least, speedup, holds),
            "chosen", "asked".

    Raises:
        RequestError: a value out of range, or no prompt. ModelError: no such model or tower.
    """
    from latentgen.run.pipeline import load

    if isinstance(quality, bool) or not isinstance(quality, (int, float)) or not 0 <= quality <= 1:
        raise RequestError(f"quality is {quality!r}: expected a number from 0 to 1")
    if not prompts:
        raise RequestError("prompts is empty: give at least one")
    embed = _embedder(tower)
    pipe = load(model, device=device, dtype=dtype, progress=False)
    kind = kind_of(next(part.cls for part in pipe.family.parts if "denoiser" in part.stages))
    tried: dict[str, Approximate] = {EXACT: {}} | {in_words(each): each for each in candidates(kind)}
    requests = [Request(**{"prompt": prompt, "seed": n, **said_too}) for n, prompt in enumerate(prompts)]
    for each in tried.values():
        pipe.plan(requests[0].replace(approximate=each))  # what cannot be is known before the first picture
    made = _made(pipe, tried, requests, on_picture)
    held = {f"quantise {way}": load(model, device=device, dtype=dtype, progress=False, quantise=way) for way in ways}
    for name, other in held.items():
        made |= {name: _made(other, {name: {}}, requests, None)[name]}
        other.residency.clear()  # its weights need not wait for the next one's
    rows = _rows(tried | dict.fromkeys(held, {}), made, embed, quality)
    best = min((row for row in rows if row["holds"] and row["name"] in tried), key=lambda row: row["seconds"])
    found = Tuned(tried[best["name"]], float(quality), best["speedup"])
    machine = pipe.plan(requests[0])
    if save:
        keep_tuned(tuned_key(pipe.checkpoint.digest, machine.device, machine.dtype), found)
    asked = {"model": machine.model, "width": machine.width, "height": machine.height, "steps": machine.steps, "sampler": machine.sampler,
             "prompts": list(prompts), "quality": quality, "dtype": machine.dtype, "device": machine.device.split(":")[0]}
    return {"rows": rows, "chosen": {"name": best["name"], "approximate": dict(found.approximate), "speedup": best["speedup"], "saved": save},
            "asked": asked}


def _made(pipe: Pipeline, tried: Mapping[str, Approximate], requests: Sequence[Request],
          on_picture: Callable[[int, int], None] | None) -> dict[str, list[Result]]:
    """Every request by every candidate; each round begins with another, so that a machine that slows down slows all of them."""
    pipe.stream(requests[0].replace(steps=1)).result  # noqa: B018 - the weights load, and kernels are chosen
    made: dict[str, list[Result]] = {name: [] for name in tried}
    count = 0
    for n, request in enumerate(requests):
        for name in list(tried)[:: -1 if n % 2 else 1]:
            made[name].append(pipe.stream(request.replace(approximate=tried[name])).result)
            count += 1
            if on_picture is not None:
                on_picture(count, len(tried) * len(requests))
    return made


def _rows(tried: Mapping[str, Approximate], made: Mapping[str, Sequence[Result]], embed: Embed, quality: float) -> list[dict[str, Any]]:
    """What came of each candidate, the fastest first."""
    exact = [result.image for result in made[EXACT]]
    seen = embed(exact)
    whole = min(result.timings["sample"] for result in made[EXACT])  # the least: what else runs here only ever adds
    rows = []
    for name in tried:
        pictures = [result.image for result in made[name]]
        alike = 1.0 if name == EXACT else float((embed(pictures) * seen).sum(axis=1).min())
        seconds = min(result.timings["sample"] for result in made[name])
        rows.append({"name": name, "approximate": {key: dict(options) for key, options in tried[name].items()}, "quality": round(alike, 5),
                     "psnr": round(min(map(psnr, pictures, exact)), 2), "seconds": round(seconds, 4), "speedup": round(whole / seconds, 3),
                     "holds": alike >= quality})
    return sorted(rows, key=lambda row: row["seconds"])


def psnr(picture: Image.Image, exact: Image.Image) -> float:
    """Peak signal to noise in dB; 99 for the same bytes."""
    difference = np.asarray(picture, np.float64) - np.asarray(exact, np.float64)
    return min(99.0, float(10 * np.log10(255**2 / max(float((difference**2).mean()), 1e-9))))


def _embedder(tower: str | Path | None) -> Embed:
    """The picture tower that judges.

    Raises:
        ModelError: it is missing or damaged. RequestError: no model with one is shipped, and none was given.
    """
    from latentgen.evaluate.towers import Towers
    from latentgen.models.card import cards

    if tower is None and TOWERS not in cards():
        raise RequestError("no model with a picture tower is here: give one as tower")
    return Towers.read(Path(tower) if tower is not None else cards()[TOWERS].folder).pictures
