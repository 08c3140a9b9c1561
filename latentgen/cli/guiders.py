"""guiders: the table of what acts beside plain guidance. Knows how it is shown; runs nothing."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLES = {"guiders": "Examples:  latentgen guiders   and   latentgen guiders apg"}
Name = Annotated[str | None, typer.Argument(help="A guider. Default: list all.", metavar="NAME", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]


def guiders(name: Name = None, as_json: AsJson = False) -> None:
    """List what can act beside plain guidance, in the order in which it acts, or tell all about one.

    Used as --guider NAME or --guider NAME:OPTION=VALUE,OPTION=VALUE; several layers are joined by "+".
    """
    from latentgen.cli.listing import show
    from latentgen.diffusion.guidance.table import GUIDERS

    show(GUIDERS, name, lambda info: {"needs_cfg": info.needs_cfg, "evaluations": info.evaluations}, column="evaluations", as_json=as_json)
