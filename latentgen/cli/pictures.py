"""txt2img, img2img, inpaint, outpaint, edit, plan and explain: what was typed -> Request -> files. Knows file names and what is printed; the work is
in run/."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, fields
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentgen.cli.meter import Meter
from latentgen.cli.options import (
    DIALECT,
    JSON,
    KEEP,
    MACHINE,
    OTHERS,
    OUTPUT,
    PARALLEL,
    SAMPLING,
    SEED,
    SIDES,
    SIZE,
    SOURCE,
    STEPS,
    STRENGTH,
    TOLD,
    WORDS,
    opened,
    takes,
)
from latentgen.cli.together import speaks
from latentgen.errors import OutputError, RequestError
from latentgen.importing import uncollected

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from latentgen.run.pipeline import Run
    from latentgen.run.plan import Plan
    from latentgen.run.result import Result

EXAMPLES = {
    "txt2img": 'Example:  latentgen txt2img "a red heart" --seed 1234 -o heart.png',
    "img2img": 'Example:  latentgen img2img "a green apple" red-apple.png --strength 0.6',
    "inpaint": 'Example:  latentgen inpaint "a blue hat" cat.png --mask where.png',
    "outpaint": 'Example:  latentgen outpaint "a tree on a hill" tree.png --left 64 --right 64',
    "edit": 'Example:  latentgen edit "make it winter" park.png --model timbrooks/instruct-pix2pix',
    "explain": 'Example:  latentgen explain "a (red:1.3) heart, \\[flat:shaded:0.5]" --steps 20',
    "plan": 'Example:  latentgen plan "a red heart" --steps 30 --batch 4',
}
Prompt = Annotated[str, typer.Argument(help="What to draw; any length, nothing is cut.", metavar="PROMPT", show_default=False)]
Image = Annotated[Path, typer.Argument(help="The picture to start from.", metavar="IMAGE", show_default=False)]
References = Annotated[list[Path],
                       typer.Argument(help="The picture, or several where the model looks at several.", metavar="REFERENCE...", show_default=False)]
Mask = Annotated[Path, typer.Option("--mask", help="A picture as large as IMAGE, white where it is to be repainted.", rich_help_panel="The edit",
                                    metavar="FILE")]


@takes(WORDS, SIZE, SAMPLING, TOLD, MACHINE, PARALLEL, OUTPUT, KEEP)
def txt2img(prompt: Prompt, **said: Any) -> None:
    """Make a picture from words."""
    _make("txt2img", prompt=prompt, **said)


@takes(STRENGTH, WORDS, SIZE, SAMPLING, TOLD, MACHINE, PARALLEL, OUTPUT, KEEP)
def img2img(prompt: Prompt, image: Image, **said: Any) -> None:
    """Redraw a picture towards the words."""
    _check_order(prompt, image)
    _make("img2img", prompt=prompt, image=image, **said)


@takes(STRENGTH, WORDS, SIZE, SAMPLING, TOLD, MACHINE, PARALLEL, OUTPUT, KEEP)
def inpaint(prompt: Prompt, image: Image, mask: Mask, **said: Any) -> None:
    """Repaint the white part of a mask; every other pixel stays as it is."""
    _check_order(prompt, image)
    _make("inpaint", prompt=prompt, image=image, mask=mask, **said)


@takes(SIDES, WORDS, SAMPLING, TOLD, MACHINE, PARALLEL, OUTPUT, KEEP)
def outpaint(prompt: Prompt, image: Image, **said: Any) -> None:
    """Continue a picture beyond its edges; the old pixels stay as they are."""
    _check_order(prompt, image)
    if not any(said[side] for side in ("left", "right", "top", "bottom")):
        raise RequestError("outpaint was given no side to grow: pass at least one of --left, --right, --top and --bottom, in pixels")
    _make("outpaint", prompt=prompt, image=image, **said)


@takes(WORDS, SIZE, SAMPLING, MACHINE, PARALLEL, OUTPUT, KEEP)
def edit(prompt: Prompt, reference: References, **said: Any) -> None:
    """Change a picture as the words instruct, with a model made for that (InstructPix2Pix, FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit)."""
    _check_order(prompt, reference[0])
    _make("edit", prompt=prompt, reference=reference, **said)


@takes(SOURCE, STRENGTH, SIDES, WORDS, SIZE, SAMPLING, TOLD, MACHINE, JSON)
def plan(prompt: Prompt, *, as_json: bool, **said: Any) -> None:
    """Print what would be done, and find any error, without loading weights.

    Takes the options of all picture commands: with --image it plans img2img, with --mask inpaint, with --left and so on outpaint.
    """
    from latentgen.run.request import Request

    words = {name: value for name, value in said.items() if name in Request.model_fields}
    request = Request(prompt=prompt, **given(words))
    made = opened({name: value for name, value in said.items() if name not in words}, progress=None).plan(request)
    typer.echo(json.dumps(_plan_data(made), ensure_ascii=False, indent=1) if as_json else str(made))


@takes(DIALECT, OTHERS, SEED, MACHINE, STEPS, JSON)
def explain(prompt: Prompt, *, as_json: bool, **said: Any) -> None:
    """Print how a prompt is read: its tokens with their weights, chunks, what is said in which step, and what is not heard. Loads no weights."""
    words = {name: said.pop(name) for name in ("dialect", "styles", "styles_file", "wildcards", "prompt_2", "prompt_3", "steps", "seed")}
    made = opened(said, progress=None).explain(prompt, **given(words))
    typer.echo(json.dumps(asdict(made), ensure_ascii=False, indent=1) if as_json else str(made))


def _make(task: str, *, quality: int | None, save_state: Path | None, save_every: int | None, **said: Any) -> None:
    """The whole of a picture command. What can be wrong is found before the first step."""
    shown = {name: said.pop(name) for name in ("output", "show", "quiet", "as_json")}
    quality = check_output(shown["output"], quality, strict=said["strict"])
    from latentgen.run.request import Request

    words = {name: value for name, value in said.items() if name in Request.model_fields}
    request, model = Request(**given(words)), said["model"]
    rest = {name: value for name, value in said.items() if name not in words}

    def begin() -> Run:
        pipe = opened(rest, progress=False if shown["quiet"] else None)  # has a bar where it downloads
        return pipe.stream(request, save_state=save_state, save_every=save_every)

    make(begin, loading=model, quality=quality, state=save_state, **shown)


def make(begin: Callable[[], Run], *, loading: str, output: Path | None, quality: int, show: bool, quiet: bool, as_json: bool,
         state: Path | None) -> None:
    """A run from its loading to its files, watched. state: the file that keeps it, which is named where it is stopped."""
    if show and as_json:
        raise RequestError("--show draws on stdout, where --json writes: use one of the two")
    try:
        with Meter(shown=not quiet and speaks()) as meter:
            with closing(begin()) as run:  # bad input is refused here, before anything is announced
                meter.phase(f"loading {loading}")
                for step in run:
                    meter.step(step)
                    if step.index + 1 == step.total:
                        meter.phase("decoding")
                result = run.result
            if not speaks():
                return
            files = _save(result, output, quality)
    except KeyboardInterrupt:
        if state is not None and state.is_file():
            typer.echo(f"the run is kept: go on with `latentgen resume {shlex.quote(str(state))}`", err=True)
        raise
    if not quiet:
        for note in result.notes:
            typer.echo(f"note: {note}", err=True)
    _report(result, files, quiet=quiet, as_json=as_json)
    if show:
        show_in_terminal(result.image if len(result) == 1 else result.grid())


def show_in_terminal(image: Picture) -> None:
    """Draw a picture where the cursor is, or say why not."""
    from latentgen.terminal import show as show_picture

    if not show_picture(image):
        typer.echo("note: this terminal shows no pictures (it needs kitty's or iTerm2's protocol, or COLORTERM=truecolor)", err=True)


def _check_order(prompt: str, image: Path) -> None:
    if os.path.isfile(prompt) and not os.path.exists(image):
        raise RequestError(f"the prompt {prompt!r} is a file, and the image {str(image)!r} is not there: give the words first, then the picture")


def given(said: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in said.items() if value is not None and value != []}
    given |= {name: _seeds(name, given[name]) for name in ("seed", "variation_seed") if name in given}
    if "sampler_options" in given:
        given["sampler_options"] = dict(_valued(text, f"--sampler-option is {text!r}: expected NAME=VALUE, as s_churn=10")
                                        for text in given["sampler_options"])
    if "guiders" in given:
        given["guiders"] = [_guider(text) for text in given["guiders"]]
    if "approximate" in given:
        given["approximate"] = {} if given["approximate"] == ["none"] else [_approximation(text) for text in given["approximate"]]
    return given


def _approximation(text: str) -> dict[str, dict[str, Any]]:
    """"first_block:threshold=0.1" as Python has it."""
    name, _, said = text.partition(":")
    return {name: dict(_valued(one, f"--approximate is {text!r}: expected NAME or NAME:OPTION=VALUE,OPTION=VALUE, as first_block:threshold=0.1")
                       for one in said.split(",") if said)}


def _seeds(name: str, said: list[str]) -> int | list[int]:
    """`--seed 3`, `--seed 3,7,11`, or `--seed 3 --seed 7`."""
    texts = [text.strip() for one in said for text in one.split(",")]
    if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in texts):
        raise RequestError(f"--{name.replace('_', '-')} is {','.join(said)!r:.60}: expected a whole number from 0 to 2**63 - 1, or several as 3,7,11")
    return int(texts[0]) if len(texts) == 1 else [int(text) for text in texts]


def _guider(text: str) -> dict[str, dict[str, Any]]:
    """"apg:eta=0.2" as Python has it; several layers are joined by "+"."""
    name, _, said = text.partition(":")
    options = dict(_valued(one, f"--guider is {text!r}: expected NAME or NAME:OPTION=VALUE,OPTION=VALUE, as apg:eta=0.2")
                   for one in said.split(",") if said)
    if "layers" in options:
        options["layers"] = [_number(layer) for layer in str(options["layers"]).split("+")]
    return {name: options}


def _valued(text: str, problem: str) -> tuple[str, float | int | str]:
    name, _, value = text.partition("=")
    if not (name.isidentifier() and value):
        raise RequestError(problem)
    return name, _number(value)


def _number(value: str) -> float | int | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    return value


def check_output(output: Path | None, quality: int | None, *, strict: bool) -> int:
    """The quality to save with.

    Raises:
        RequestError: a suffix or quality that cannot be honoured. OutputError: a folder that is missing or cannot be written.
    """
    with uncollected():
        from latentgen.pixels.save import SUFFIXES, ending

    into_folder = output is None or os.path.isdir(output)
    if not into_folder and output.suffix.lower() not in SUFFIXES:
        raise RequestError(f"the file name {output.name!r} {ending(output)}: expected .png, .jpg (.jpeg) or .webp, or a folder that exists")
    if quality is not None and not 1 <= quality <= 100:
        raise RequestError(f"quality is {quality}: expected a whole number from 1 to 100")
    if quality is not None and strict and (into_folder or output.suffix.lower() == ".png"):
        raise RequestError("quality is given but the file is a PNG, which is always exact: name a .jpg or .webp with -o, or leave quality out")
    folder = Path() if output is None else output if into_folder else output.parent
    if not os.path.isdir(folder):
        raise OutputError(f"the folder {str(folder)!r} does not exist: make it first, or choose another")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"the folder {str(folder.resolve())!r} cannot be written: choose another with -o")
    return 95 if quality is None else quality


def _save(result: Result, output: Path | None, quality: int) -> list[Path]:
    """Write the pictures: where -o says, or under names of their own, one per seed, that no file has yet."""
    if output is not None and not os.path.isdir(output):
        return result.save(output, quality=quality)
    from latentgen.pixels.save import save_image

    words = [slug(plan.prompt.text) for plan in result.plan.pictures or (result.plan,) * len(result)]
    return [save_image(image, free_name(output or Path(), f"{words[n]}-{seed}"), metadata=result.metadata(n))
            for n, (image, seed) in enumerate(zip(result.images, result.seeds, strict=True))]


def slug(prompt: str) -> str:
    """A prompt as a file name: its letters and digits in lower case, joined by "-", whole words up to 48 letters; "picture" where there are none."""
    whole = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    short = whole if len(whole) <= 48 else whole[:49].rpartition("-")[0] or whole[:48]
    return short or "picture"


def free_name(folder: Path, stem: str) -> Path:
    """`stem.png` in the folder, or `stem-2.png`, `stem-3.png` ... where that is taken."""
    names = (folder / (f"{stem}.png" if n == 1 else f"{stem}-{n}.png") for n in count(1))
    return next(name for name in names if not os.path.lexists(name))


def _report(result: Result, files: list[Path], *, quiet: bool, as_json: bool) -> None:
    seconds = result.timings["total"]
    if as_json:
        data = {"files": [str(f) for f in files], "seeds": list(result.seeds), "timings": dict(result.timings), "recipe": dict(result.recipe)}
        typer.echo(json.dumps(data, ensure_ascii=False, indent=1))
        return
    for file, image, seed in zip(files, result.images, result.seeds, strict=True):
        typer.echo(str(file) if quiet else f"{file}  {image.width}x{image.height}, seed {seed}" + (f", {seconds:.1f} s" if len(files) == 1 else ""))
    if len(files) > 1 and not quiet:
        typer.echo(f"{len(files)} pictures in {seconds:.1f} s")


def _plan_data(made: Plan) -> dict[str, Any]:
    """A plan as plain data: every field but the request and the pictures, prompts as their counts, levels as numbers."""
    pictures = ("request", "source", "references", "pictures", "foresee", "forecast")
    data = {f.name: getattr(made, f.name) for f in fields(made) if f.name not in (*pictures, "passes", "prompt", "negative", "noise")}
    data |= {"steps": made.steps, "evaluations": made.evaluations, "seeds": made.seeds, "noise": asdict(made.noise),
             "options": dict(made.options), "weights": dict(made.weights)}
    data |= {} if made.forecast is None else {"memory": made.forecast.data()}
    for name, text in (("prompt", made.prompt), ("negative", made.negative)):
        data[name] = {"text": text.text, "tokens": text.tokens, "chunks": len(text.ids)}
        data[name] |= {"texts": [getattr(one, name).text for one in made.pictures]} if made.pictures else {}
        data[name] |= {"said": str(text)} if len(text.spans) > 1 or text.composed > 1 else {}
    passes = []
    for one in made.passes:
        numbers = {"steps": one.steps, "tile": one.tile, "levels": [asdict(level) for level in one.levels], "grid": asdict(one.grid)}
        passes.append({f.name: getattr(one, f.name) for f in fields(one) if f.name not in pictures} | numbers)
    return passes[0] | data | {"crop": made.crop} | ({"passes": passes} if passes[1:] else {})
