"""A table of things with options, listed or one of them told in full. Knows tables and how they are shown; knows nothing of what they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from latentgen.diffusion.table import Table


def show(table: Table[Any], name: str | None, facts: Callable[[Any], dict[str, Any]], *, column: str, as_json: bool) -> None:
    """Print all rows, or that of one name.

    Args:
        facts: row -> what else there is to say of it.
        column: the one of these that the list has room for.

    Raises:
        RequestError: there is none of that name.
    """
    from latentgen.cli.reports import _table

    found = table if name is None else {name: table.find(name)}
    rows = [{table.kind: key, "about": info.about, **facts(info), "options": _options(info), "paper": info.paper} for key, info in found.items()]
    if as_json:
        typer.echo(json.dumps(rows if name is None else rows[0], ensure_ascii=False, indent=1))
    elif name is None:
        _table((table.kind, "what it does", column.replace("_", " "), "options", "paper"),
               [(row[table.kind], row["about"], str(row[column]), " ".join(f"{key}={said['default']}" for key, said in row["options"].items()),
                 row["paper"]) for row in rows])
    else:
        row = dict(rows[0])
        options = row.pop("options")
        typer.echo("\n".join(f"{key.replace('_', ' '):<21} {value}" for key, value in row.items()))
        for key, said in options.items():
            typer.echo(f"  {key:<19} {said['takes']}, {said['default']} unless given: {said['about']}")


def _options(info: Any) -> dict[str, dict[str, Any]]:
    return {key: {"default": info.defaults[key], "takes": option.takes, "about": option.about} for key, option in info.options.items()}
