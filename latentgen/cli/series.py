"""grid and interpolate: many pictures for one file. Knows what is typed and printed; the work is in run/."""

from __future__ import annotations

import csv
import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from latentgen.cli.meter import Meter
from latentgen.cli.options import MACHINE, OUTPUT, SAMPLING, SIDES, SIZE, SOURCE, STRENGTH, TOLD, WORDS, opened, takes
from latentgen.cli.pictures import Prompt, check_output, free_name, given, show_in_terminal, slug
from latentgen.errors import OutputError, RequestError

EXAMPLES = {"grid": 'Example:  latentgen grid "a red heart" --x guidance_scale=1,4,8 --y sampler=euler,dpmpp_2m -o sheet.png',
            "interpolate": 'Example:  latentgen interpolate "a red heart" "a green apple" --frames 24 --loop -o morph.gif'}
_ABOUT = "One field and its values, as guidance_scale=1,4,8 or 'prompt=\"a cat, flat\",a dog'."
X = Annotated[str, typer.Option("--x", help=f"The columns. {_ABOUT}", metavar="NAME=VALUE,...", show_default=False)]
Y = Annotated[str | None, typer.Option("--y", help="The rows, likewise.", metavar="NAME=VALUE,...")]
Cell = Annotated[int | None, typer.Option("--cell", help="Pixels that every picture is scaled to, 16 to 4096. Default: as they are.")]

Keys = Annotated[list[str], typer.Argument(help="Two or more; the film goes from one to the next.", metavar="PROMPT...", show_default=False)]
Frames = Annotated[int, typer.Option("--frames", help="Of the whole film, 2 to 2400.")]
Loop = Annotated[bool, typer.Option("--loop", help="Go on from the last prompt to the first, so that the film runs round.")]
Fps = Annotated[float, typer.Option("--fps", help="Frames a second, 0.1 to 100.")]
Folder = Annotated[Path | None, typer.Option("--folder", help="Keep every frame there; a film that was broken off goes on.", metavar="FOLDER")]
FilmFile = Annotated[Path,
                     typer.Option("--output", "-o", help="The file: .gif, .webp, .png (animated) or .mp4 (needs latentgen\\[video]).",
                                  metavar="FILE")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; print only the file's name.")]


@takes(SOURCE, STRENGTH, SIDES, WORDS, SIZE, SAMPLING, TOLD, MACHINE, OUTPUT)
def grid(prompt: Prompt, x: X, y: Y = None, cell: Cell = None, **said: Any) -> None:
    """Make a labelled sheet: one request with every value of one or two of its fields.

    Takes the options of all picture commands: with --image it redraws one, with --mask it paints. All cells have one seed.
    """
    output, quality, show, quiet, as_json = (said.pop(name) for name in ("output", "quality", "show", "quiet", "as_json"))
    if show and as_json:
        raise RequestError("--show draws on stdout, where --json writes: use one of the two")
    quality = check_output(output, quality, strict=said["strict"])
    from latentgen.run.many.grid import plan_grid
    from latentgen.run.request import Request

    words = {name: value for name, value in said.items() if name in Request.model_fields}
    axes = [axis(text, option) for text, option in ((x, "--x"), (y, "--y")) if text is not None]
    named = {name for one in axes for name in one}  # of which no option was typed where it is as it would be anyway
    typed = {name: value for name, value in given(words).items() if name not in named or value != Request.model_fields[name].default}
    request = Request(prompt=prompt, **typed)
    pipe = opened({name: value for name, value in said.items() if name not in words}, progress=False)
    with Meter(shown=not quiet) as meter:
        planned = plan_grid(pipe, request, x=axes[0], y=axes[1] if axes[1:] else None, cell=cell)
        meter.phase(f"loading {said['model']}")
        done = planned.run(pipe, on_step=meter.step)
    into_folder = output is None or output.is_dir()
    path = free_name(output or Path(), f"{slug(prompt)}-grid") if into_folder else output
    files = done.save(path, quality=quality)
    if as_json:
        typer.echo(json.dumps({"files": [str(path) for path in files], "recipe": dict(done.recipe)}, ensure_ascii=False, indent=1))
        return
    if not quiet:
        for note in done.notes:
            typer.echo(f"note: {note}", err=True)
    typer.echo(str(path) if quiet else f"{path}  {str(done).splitlines()[0]}")
    if show:
        show_in_terminal(done.image)


@takes(SOURCE, STRENGTH, SIDES, WORDS, SIZE, SAMPLING, TOLD, MACHINE)
def interpolate(prompts: Keys, output: FilmFile, frames: Frames = 24, loop: Loop = False, fps: Fps = 12.0, folder: Folder = None,
                quiet: Quiet = False,
                **said: Any) -> None:
    """Make a film from one prompt to the next: words and noise go along the sphere, frame by frame.

    --seed 3,7 gives each prompt its own seed; one seed, or none, holds for all.
    """
    from latentgen.pixels.film import check_film
    from latentgen.run.request import Request

    check_film(output, fps)
    if not output.parent.is_dir():
        raise OutputError(f"the folder {str(output.parent)!r} does not exist: make it first, or choose another")
    words = {name: value for name, value in said.items() if name in Request.model_fields}
    pipe = opened({name: value for name, value in said.items() if name not in words}, progress=False)
    with Meter(shown=not quiet) as meter:
        film = pipe.interpolate(prompts, frames=frames, loop=loop, folder=folder, on_step=meter.step, **given(words))
        meter.phase(f"loading {said['model']}")
        path, = film.save(output, fps=fps)
    typer.echo(str(path) if quiet else f"{path}  {film}")


def axis(text: str, option: str) -> dict[str, list[Any]]:
    """NAME=VALUE,VALUE as one field with its values, which are numbers where the field takes some.

    Raises:
        RequestError: no name or no values.
    """
    from latentgen.run.request import Request

    name, _, rest = text.partition("=")
    name = name.strip().replace("-", "_")
    values = next(csv.reader([rest], skipinitialspace=True), [])
    if not name or not values:
        raise RequestError(f"{option} is {text!r}: expected a field and its values, as guidance_scale=1,4,8")
    field = Request.model_fields.get(name)
    kinds = (field.annotation, *get_args(field.annotation)) if field is not None else ()
    return {name: [value if str in kinds else _number(value) for value in values]}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
