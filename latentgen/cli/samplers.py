"""samplers: the tables of samplers and spacings, and what other programs call them. Knows how they are shown; runs nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentgen.errors import RequestError

if TYPE_CHECKING:
    from latentgen.diffusion.names import Ours

EXAMPLES = {"samplers": 'Examples:  latentgen samplers   and   latentgen samplers "DPM++ 2M Karras"'}
Name = Annotated[str | None,
                 typer.Argument(help="A sampler or spacing, as it is called here or in another program. Default: list all.", metavar="NAME",
                                            show_default=False)]
Names = Annotated[bool, typer.Option("--names", help="List what A1111, ComfyUI, diffusers, InvokeAI and stable-diffusion.cpp call them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts: all of it.")]


def samplers(name: Name = None, names: Names = False, as_json: AsJson = False) -> None:
    """List the samplers and spacings, or tell all about one, under whatever name a program has for it.

    A request takes the names of the first table only; a name from elsewhere is answered with ours.
    """
    if names and name is not None:
        raise RequestError("--names is given with a name: leave one of them out")
    found = _all() if name is None else _one(name)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, indent=1))
    elif name is not None:
        typer.echo("\n".join(f"{key:<21} {text}" for key, text in _lines(found)))
    elif names:
        _print_names(found)
    else:
        _print_own(found)


def _all() -> dict[str, Any]:
    from latentgen.diffusion.names import SAMPLER_NAMES, SPACING_NAMES
    from latentgen.diffusion.sample import SAMPLERS
    from latentgen.diffusion.schedule import SPACINGS

    foreign = [{"program": program, "kind": kind, "name": name, **_said(ours)}
               for kind, table in (("sampler", SAMPLER_NAMES), ("spacing", SPACING_NAMES))
               for program, names in table.items() for name, ours in names.items()]
    return {"samplers": [_sampler(name) for name in SAMPLERS], "spacings": list(SPACINGS), "foreign": foreign}


def _one(name: str) -> dict[str, Any]:
    """All about one name, under another program's name what that is here; RequestError, with the nearest, where nobody calls anything so."""
    from latentgen.diffusion.names import SAMPLER_NAMES, SPACING_NAMES, foreign, own
    from latentgen.diffusion.sample import SAMPLERS, sampler
    from latentgen.diffusion.schedule import SPACINGS

    ours = own(name, SAMPLERS, SAMPLER_NAMES) or own(name, SPACINGS, SPACING_NAMES)
    if ours is not None:
        return _own(ours)
    found = foreign(name)
    if found is None:
        sampler(name)  # raises, with what it knows
    assert found is not None
    about = _own(found.sampler or found.spacing or "")
    spacing = {"spacing": found.spacing} if found.spacing else {}
    return {"name": name, "here": _ours(_said(found)), "note": found.note, "automatic_spacing": found.automatic} | spacing | about


def _own(name: str) -> dict[str, Any]:
    """A sampler or a spacing of ours with its names elsewhere; {} for none."""
    from latentgen.diffusion.sample import SAMPLERS
    from latentgen.diffusion.schedule import SPACINGS

    if name in SAMPLERS:
        others = [f"{row['name']} ({row['program']})" for row in _all()["foreign"] if row["sampler"] == name]
        return _sampler(name) | {"elsewhere": others}
    if name in SPACINGS:
        others = [f"{row['name']} ({row['program']})" for row in _all()["foreign"] if row["kind"] == "spacing" and row["spacing"] == name]
        return {"spacing": name, "elsewhere": others}
    return {}


def _sampler(name: str) -> dict[str, Any]:
    from latentgen.diffusion.sample import SAMPLERS

    info = SAMPLERS[name]
    options = {key: {"default": None if info.defaults[key] == float("inf") else info.defaults[key], "takes": option.takes, "about": option.about}
               for key, option in info.options.items()}
    return {"sampler": name, "about": info.about, "order": info.order, "evaluations_per_step": info.evaluations_per_step,
            "stochastic": info.stochastic,
            "options": options, "paper": info.paper}


def _said(ours: Ours) -> dict[str, Any]:
    return {"sampler": ours.sampler, "spacing": ours.spacing, "options": dict(ours.options), "automatic_spacing": ours.automatic, "note": ours.note}


def _lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What there is to say, a row each; what there is not is left out."""
    for key, value in found.items():
        if key == "options" and value:
            for option, said in value.items():
                default = "no bound" if said["default"] is None else said["default"]
                yield f"  {option}", f"{said['takes']}, {default} unless given: {said['about']}"
        elif isinstance(value, bool):
            yield key.replace("_", " "), "yes" if value else "no"
        elif value not in (None, "", [], {}):
            yield key.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value)


def _print_own(found: dict[str, Any]) -> None:
    from latentgen.cli.reports import _table

    _table(("sampler", "what it does", "order", "evaluations", "noise", "options", "paper"),
           [(row["sampler"], row["about"], str(row["order"]), str(row["evaluations_per_step"]), "yes" if row["stochastic"] else "-",
             " ".join(row["options"]) or "-", row["paper"]) for row in found["samplers"]])
    typer.echo(f"\nspacings: {', '.join(found['spacings'])}\n\n"
               "`latentgen samplers NAME` tells all about one, `latentgen samplers --names` what other programs call them.")


def _print_names(found: dict[str, Any]) -> None:
    from latentgen.cli.reports import _table

    _table(("elsewhere", "called", "here", "note"),
           [(row["program"], row["name"], _ours(row), _note(row) or "-") for row in found["foreign"]])


def _ours(row: dict[str, Any]) -> str:
    said = [row["sampler"] or "", f"spacing {row['spacing']}" if row["spacing"] else "", *(f"{key} {value}" for key, value in row["options"].items())]
    return ", ".join(part for part in said if part) or "-"


def _note(row: dict[str, Any]) -> str:
    usual = f"its Automatic schedule: {row['automatic_spacing']}" if row["automatic_spacing"] else ""
    return "; ".join(part for part in (usual, row["note"]) if part)
