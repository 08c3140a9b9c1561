"""inspect: what a weight file or model folder is, before anything is loaded. Knows how a report is shown and its exit code; finds out nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = {"inspect": "Examples:  latentgen inspect model.safetensors   and   latentgen inspect my-folder --json"}
File = Annotated[Path, typer.Argument(help="A .safetensors or .gguf file, a shard index, or a model folder.", metavar="FILE", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]


def inspect(file: File, as_json: AsJson = False) -> None:
    """Tell what a file is and what it needs: its kind, family, parts, and damage, if any.

    Reads names and shapes only, so it is quick however large the file is, and nothing in the file is run.
    Exit code 0: known and sound. 1: damaged or unknown. 3: nothing is there.
    """
    from latentgen.models.inspect import inspect as look

    report = look(file)
    typer.echo(json.dumps(report.to_dict(), ensure_ascii=False, indent=1) if as_json else str(report))
    if not report.sound:
        raise typer.Exit(1)
