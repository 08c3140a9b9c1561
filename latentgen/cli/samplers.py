"""samplers: the tables of samplers and spacings, and what other programs call them. Knows how they are shown; runs nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from latentgen.diffusion.names import Ours

EXAMPLES = {"samplers": 'Examples:  latentgen samplers   and   latentgen samplers "DPM++ 2M Karras"'}
Name = Annotated[str | None, typer.Argument(help="A sampler or spacing, as it is called here or in another program. Default: list all.", metavar="NAME",
                                            show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]


def samplers(name: Name = None, as_json: AsJson = False) -> None:
    """List the samplers and spacings, or tell all about one; with the names that other programs have for them.

    A request takes the names of the first table only; a name from elsewhere is answered with ours.
    """
    found = _all() if name is None else _one(name)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, indent=1))
    elif name is None:
        _print_all(found)
    else:
        typer.echo("\n".join(f"{key:<21} {text}" for key, text in _lines(found)))


def _all() -> dict[str, Any]:
    from latentgen.diffusion.names import SAMPLER_NAMES, SPACING_NAMES
    from latentgen.diffusion.sample import SAMPLERS
    from latentgen.diffusion.schedule import SPACINGS

    foreign = [{"program": program, "kind": kind, "name": name, **_said(ours)} for kind, table in (("sampler", SAMPLER_NAMES), ("spacing", SPACING_NAMES))
               for program, names in table.items() for name, ours in names.items()]
    return {"samplers": [_sampler(name) for name in SAMPLERS], "spacings": list(SPACINGS), "foreign": foreign}


def _one(name: str) -> dict[str, Any]:
    """All about one name; RequestError, with the nearest, where nobody calls anything so."""
    from latentgen.diffusion.names import foreign
    from latentgen.diffusion.sample import SAMPLERS, sampler
    from latentgen.diffusion.schedule import SPACINGS

    if name in SAMPLERS:
        others = [f"{row['name']} ({row['program']})" for row in _all()["foreign"] if row["sampler"] == name]
        return _sampler(name) | {"elsewhere": others}
    if name in SPACINGS:
        others = [f"{row['name']} ({row['program']})" for row in _all()["foreign"] if row["kind"] == "spacing" and row["spacing"] == name]
        return {"spacing": name, "elsewhere": others}
    found = foreign(name)
    if found is None:
        sampler(name)  # raises, with what it knows
    assert found is not None
    return {"name": name, **_said(found)}


def _sampler(name: str) -> dict[str, Any]:
    from latentgen.diffusion.sample import SAMPLERS

    info = SAMPLERS[name]
    options = {key: {"default": None if info.defaults[key] == float("inf") else info.defaults[key], "takes": option.takes, "about": option.about}
               for key, option in info.options.items()}
    return {"sampler": name, "about": info.about, "order": info.order, "evaluations_per_step": info.evaluations_per_step, "stochastic": info.stochastic,
            "options": options, "paper": info.paper}


def _said(ours: Ours) -> dict[str, Any]:
    return {"sampler": ours.sampler, "spacing": ours.spacing, "options": dict(ours.options), "automatic_spacing": ours.automatic, "note": ours.note}


def _lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in found.items():
        if key == "options" and value and isinstance(next(iter(value.values())), dict):
            for option, said in value.items():
                default = "no bound" if said["default"] is None else said["default"]
                yield f"  {option}", f"{said['takes']}, {default} unless given: {said['about']}"
        elif isinstance(value, dict):
            yield key, ", ".join(f"{k} {v}" for k, v in value.items()) or "-"
        elif isinstance(value, list):
            yield key, ", ".join(value) or "-"
        else:
            yield key.replace("_", " "), "-" if value in (None, "") else "yes" if value is True else "no" if value is False else str(value)


def _print_all(found: dict[str, Any]) -> None:
    from latentgen.cli.reports import _table

    _table(("sampler", "what it does", "order", "evaluations", "noise", "options", "paper"),
           [(row["sampler"], row["about"], str(row["order"]), str(row["evaluations_per_step"]), "yes" if row["stochastic"] else "-",
             " ".join(row["options"]) or "-", row["paper"]) for row in found["samplers"]])
    typer.echo(f"\nspacings: {', '.join(found['spacings'])}\n")
    _table(("elsewhere", "called", "here", "note"),
           [(row["program"], row["name"], _ours(row), _note(row) or "-") for row in found["foreign"]])


def _ours(row: dict[str, Any]) -> str:
    said = [row["sampler"] or "", f"spacing {row['spacing']}" if row["spacing"] else "", *(f"{key} {value}" for key, value in row["options"].items())]
    return ", ".join(part for part in said if part) or "-"


def _note(row: dict[str, Any]) -> str:
    usual = f"its Automatic schedule: {row['automatic_spacing']}" if row["automatic_spacing"] else ""
    return "; ".join(part for part in (usual, row["note"]) if part)
