"""approximations and tune: the table of what may be left out for speed, and which of it pays here. Knows how they are shown; measures nothing
itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

EXAMPLES = {"approximations": 'Example:  latentgen txt2img "a red heart" --approximate deep_cache:interval=3',
            "tune": 'Example:  latentgen tune glyph --quality 0.95, and then  latentgen txt2img "a red heart" --tuned'}
Name = Annotated[str | None, typer.Argument(help="An approximation. Default: list all.", metavar="NAME", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts: all of it.")]


def approximations(name: Name = None, as_json: AsJson = False) -> None:
    """List what a run may leave out for speed, with options and papers, or tell all about one. None is ever used without being asked for."""
    from latentgen.cli.listing import show
    from latentgen.models.approximate.table import APPROXIMATIONS, KINDS

    show(APPROXIMATIONS, name, lambda info: {"works_on": KINDS[info.kind]}, column="works_on", as_json=as_json)


def tune(model: Annotated[str, typer.Argument(help="A model's name, a folder, a .safetensors file or a hub name.", metavar="NAME")] = "glyph",
         quality: Annotated[float, typer.Option(help="How like the exact pictures they must be, by the cosine of a picture tower, 0 to 1.")] = 0.98,
         prompt: Annotated[list[str] | None,
                           typer.Option("--prompt", help="Words to try it with; may be said several times. Default: three of its own.",
                                                          metavar="WORDS", show_default=False)] = None,
         tower: Annotated[Path | None,
                          typer.Option(help="A model folder whose vision_tower judges. Default: glyph's.", metavar="DIR", show_default=False)] = None,
         steps: Annotated[int | None, typer.Option(help="Steps of each picture. Default: the model's own.", show_default=False)] = None,
         width: Annotated[int | None, typer.Option(help="Pixels. Default: the model's own.", show_default=False)] = None,
         height: Annotated[int | None, typer.Option(help="Pixels. Default: the model's own.", show_default=False)] = None,
         device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.", metavar="NAME")] = "auto",
         dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", metavar="NAME")] = "auto",
         quantise: Annotated[bool, typer.Option(help="Show weights in fewer bits beside, each way of --quantise.")] = True,
         save: Annotated[bool, typer.Option(help="Keep what was found, for --tuned and load(..., tuned=True).")] = True,
         as_json: AsJson = False) -> None:
    """Try all approximations that fit a model against its exact pictures, and keep the fastest that holds the quality.

    What is kept is used only where --tuned asks for it, and plans, results and recipes then say so.
    """
    from latentgen.bench.tune import PROMPTS
    from latentgen.bench.tune import tune as measure
    from latentgen.models.quantise.ways import WAYS

    said = {name: value for name, value in (("steps", steps), ("width", width), ("height", height)) if value is not None}
    found = measure(model, quality=quality, prompts=prompt or PROMPTS, tower=tower, save=save, device=device, dtype=dtype,
                    ways=tuple(WAYS) if quantise else (), **said)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, indent=1))
        return
    from latentgen.cli.reports import _table

    _table(("approximations", "quality", "PSNR", "seconds", "speed", "holds"), [_row(row) for row in found["rows"]])
    chosen = found["chosen"]
    kept = ": kept for --tuned" if save else ", not kept"
    typer.echo(f"\nfastest that holds {quality:g}: {chosen['name']}, {chosen['speedup']:.2f} times as fast{kept}")


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    return (row["name"], f"{row['quality']:.4f}", f"{row['psnr']:.1f}", f"{row['seconds']:.3f}", f"{row['speedup']:.2f}x",
            "yes" if row["holds"] else "-")
