"""models, eval and bench: what there is and how well it does, as tables or JSON. Knows cards and named numbers; measures nothing itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = {
    "models": "Examples:  latentgen models   and   latentgen models glyph",
    "eval": "Example:  latentgen eval glyph --data glyph-data --out report --pictures 200",
    "bench": "Examples:  latentgen bench --steps 20 --rounds 5 --threads 2   and   latentgen bench --case all --steps 3 --rounds 3 --output "
             "speed.json",
    "convergence": "Example:  latentgen convergence -o convergence.png",
}
ABOUT_MODEL = "A model's name, a folder, a .safetensors file or a hub name."
Name = Annotated[str | None, typer.Argument(help=f"{ABOUT_MODEL} Default: list all.", metavar="NAME", show_default=False)]
Threads = Annotated[int | None, typer.Option(help="CPU threads, 1 or more. Default: torch's choice.", min=1, show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]


def models(name: Name = None, as_json: AsJson = False) -> None:
    """List the models that are here, or tell all about one."""
    from latentgen.models.card import cards

    if name is not None:
        about = _details(name)
        typer.echo(json.dumps(about, ensure_ascii=False, indent=1) if as_json else "\n".join(_lines(about)))
        return
    rows = [{"name": c.name, "family": c.family, "summary": c.summary, "licence": c.licence, "repo": c.repo,
             "bytes": None if c.repo else _bytes(c.folder)} for c in cards().values()]
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=1))
    elif not rows:
        typer.echo("no models are packaged with this version: pass a folder with a card.toml as --model", err=True)
    else:
        head = ("name", "family", "summary", "licence")
        _table((*head, "size"), [(*(str(row[key]) or "-" for key in head), "on the hub" if row["repo"] else _size(row["bytes"])) for row in rows])


def evaluate(model: Annotated[str, typer.Argument(help=ABOUT_MODEL, metavar="NAME")],
             data: Annotated[Path, typer.Option(help="The set that `latentgen train data` made.", metavar="DIR", exists=True, file_okay=False,
                                                show_default=False)],
             out: Annotated[Path, typer.Option(help="Where the report goes.", metavar="DIR", file_okay=False, show_default=False)],
             pictures: Annotated[int, typer.Option(help="How many pictures are made and judged, 1 or more.", min=1)] = 200,
             seed: Annotated[int, typer.Option(help="Seed of the first picture, 0 or more.", min=0)] = 0, as_json: AsJson = False) -> None:
    """Judge a model: make pictures of words it was not trained on and measure how well they fit."""
    from latentgen.evaluate.glyph import evaluate as judge

    _numbers(judge(model, data, out, pictures=pictures, seed=seed), as_json=as_json)
    typer.echo(f"written to {out}", err=True)


def bench(model: Annotated[str, typer.Option("--model", "-m", help=ABOUT_MODEL, metavar="NAME")] = "glyph",
          size: Annotated[int, typer.Option(help="Side of the picture in pixels, 8 to 8192.", min=8, max=8192)] = 256,
          steps: Annotated[int, typer.Option(help="Steps per picture, 1 to 1000.", min=1, max=1000)] = 20,
          rounds: Annotated[int, typer.Option(help="How often each side is timed, in turns, 1 or more.", min=1)] = 5,
          against: Annotated[str, typer.Option(help="diffusers (its own pipeline on the same files), or none.", metavar="NAME")] = "diffusers",
          cold: Annotated[bool, typer.Option(help="Whether the start of new processes is timed, too.")] = True,
          case: Annotated[list[str] | None, typer.Option(help="A case of the speed table instead: sd15, glyph, sdxl, sd3, load, or all "
                                                              "of these; gpu for those of a CUDA device; may be said several times. "
                                                              "Makes checkpoints with random weights; minutes for each.", metavar="NAME")] = None,
          depth: Annotated[float, typer.Option(help="Of cases on a GPU: the share of each model's layers, above 0 and at most 1.")] = 1.0,
          work: Annotated[Path, typer.Option(help="Of cases: a folder for their checkpoints, up to 8 GB, used again.", metavar="DIR",
                                             file_okay=False)] = Path("bench-checkpoints"),
          output: Annotated[Path | None,
                            typer.Option("--output", "-o", help="Of cases: a .json for the numbers; a plot goes beside it.", metavar="FILE")] = None,
          threads: Threads = None, as_json: AsJson = False) -> None:
    """Time this engine against another on the same model, and print the ratios: above 1 means that this one is faster."""
    if case:
        from latentgen.bench import cases, report

        found = cases.measure(case, work=work, steps=steps, rounds=rounds, threads=threads, depth=depth)
        if output is not None:
            typer.echo(f"written to {', '.join(map(str, report.written(found, output)))}", err=True)
        _numbers(found, as_json=as_json)
        return
    from latentgen.bench.run import bench as measure

    _numbers(measure(model, width=size, height=size, steps=steps, rounds=rounds, against=against, threads=threads, cold=cold), as_json=as_json)


def convergence(out: Annotated[Path, typer.Option("--output", "-o", help="The figure, a .png.", metavar="FILE")] = Path("convergence.png"),
                as_json: AsJson = False) -> None:
    """Measure how fast samplers come to the exact answer, on a mixture of Gaussians whose denoiser is a formula, and draw it. Needs matplotlib."""
    from latentgen.bench.convergence import as_data, figure, measure

    curves = measure()
    typer.echo(f"written to {figure(curves, out)}", err=True)
    if as_json:
        typer.echo(json.dumps(as_data(curves), indent=1))
        return
    for curve in curves:
        typer.echo(f"{curve.name:<14} order {curve.order:.1f}   " + "  ".join(f"{n}: {error:.1e}"
                                                                              for n, error in zip(curve.steps, curve.errors, strict=True)))


def _details(name: str) -> dict[str, Any]:
    """All about one model; of one that is on the hub, its card alone: this command fetches nothing."""
    from latentgen.models.card import cards, published
    from latentgen.models.checkpoint import describe, open_checkpoint

    card = cards().get(name)
    if card is not None and card.repo:
        defaults = published(card.variant)["defaults"] | card.defaults if card.variant else card.defaults
        return {"name": card.name, "family": card.family, "variant": card.variant, "summary": card.summary, "licence": card.licence,
                "repo": card.repo,
                "defaults": defaults}
    return describe(open_checkpoint(name))


def _lines(about: Mapping[str, Any]) -> Iterator[str]:
    for name, value in about.items():
        if name == "defaults":
            text = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
        elif name == "parts":
            text = ", ".join(f"{part} ({said['class']}, {_size(said['bytes'])})" for part, said in value.items())
        else:
            text = _size(value) if name == "bytes" else str(value) or "-"
        yield f"{'size' if name == 'bytes' else name:<10} {text}"


def _bytes(folder: Path) -> int:
    """What the model's weights take, as `_details` tells too."""
    from latentgen.models.checkpoint import open_checkpoint

    return open_checkpoint(folder).weight_bytes()


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _numbers(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print named numbers, nested or not; what has "ratio" in its name comes last, where the eye lands."""
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, indent=1, default=str))
        return
    rows = sorted(_flat(found), key=lambda row: "ratio" in row[0])
    _table(("what", "value"), rows)


def _flat(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{name}", ", ".join(map(_shown, value))
        else:
            yield f"{prefix}{name}", _shown(value)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    _console().print(table)


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)  # a pipe is not 80 letters wide
