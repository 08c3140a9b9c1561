"""guiders: the table of what acts beside plain guidance. Knows how it is shown; runs nothing."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

EXAMPLES = {"guiders": "Examples:  latentgen guiders   and   latentgen guiders apg"}
Name = Annotated[str | None, typer.Argument(help="A guider. Default: list all.", metavar="NAME", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]


def guiders(name: Name = None, as_json: AsJson = False) -> None:
    """List what can act beside plain guidance, in the order in which it acts, or tell all about one.

    Used as --guider NAME or --guider NAME:OPTION=VALUE,OPTION=VALUE; several layers are joined by "+".
    """
    from latentgen.diffusion.guidance.table import GUIDERS, guider

    if name is not None:
        guider(name)  # raises, with the nearest
    rows = [_row(key) for key in (GUIDERS if name is None else (name,))]
    if as_json:
        typer.echo(json.dumps(rows if name is None else rows[0], ensure_ascii=False, indent=1))
    elif name is None:
        from latentgen.cli.reports import _table

        _table(("guider", "what it does", "evaluations", "options", "paper"),
               [(row["guider"], row["about"], str(row["evaluations"]),
                 " ".join(f"{key}={said['default']:g}" if isinstance(said["default"], (int, float)) else
                                                                              f"{key}={said['default']}" for key, said in row["options"].items()),
                                                                              row["paper"])
                for row in rows])
    else:
        row = rows[0]
        typer.echo("\n".join(f"{key:<21} {row[key]}"
                             for key in ("guider", "about", "needs_cfg", "evaluations", "paper")).replace("needs_cfg", "needs cfg"))
        for key, said in row["options"].items():
            typer.echo(f"  {key:<19} {said['takes']}, {said['default']} unless given: {said['about']}")


def _row(name: str) -> dict[str, Any]:
    from latentgen.diffusion.guidance.table import GUIDERS

    info = GUIDERS[name]
    options = {key: {"default": info.defaults[key], "takes": option.takes, "about": option.about} for key, option in info.options.items()}
    return {"guider": name, "about": info.about, "needs_cfg": info.needs_cfg, "evaluations": info.evaluations, "options": options,
            "paper": info.paper}
