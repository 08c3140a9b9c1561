"""One request in many versions on a labelled sheet. Knows requests, plans and recipes; every picture is an ordinary run of the pipeline."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from latentgen.conditioning.prompt import shown
from latentgen.errors import RequestError
from latentgen.pixels.save import save_image
from latentgen.pixels.sheet import sheet
from latentgen.run.many.series import OnStep, check_room, run_all
from latentgen.run.recipe import ALWAYS, PICTURES, joined_recipe, make_recipe, metadata, picture_hash
from latentgen.run.request import Request, suggestion
from latentgen.run.result import Result, shown_html

if TYPE_CHECKING:
    from latentgen.run.pipeline import Pipeline
    from latentgen.run.plan import Plan

Axis = Mapping[str, Sequence[Any]]
MAX_CELLS = 1024
MAX_SIDE = 12_000  # pixels of a sheet, which larger pictures are made smaller for: WebP ends at 16,383


@dataclass(frozen=True)
class Grid:
    """A sheet and its pictures.

    Attributes:
        image: the sheet, RGB.
        rows: the result of each cell, row by row.
        recipe: of the whole: what all cells have alike, the axes under "grid", and the rest cell by cell.
    """

    image: Image.Image
    rows: tuple[tuple[Result, ...], ...]
    recipe: Mapping[str, Any]

    @classmethod
    def of(cls, about: Mapping[str, Any], results: Sequence[Result]) -> Grid:
        """The results of the cells, laid out as a recipe's "grid" says (see `check_about`)."""
        names = [[label(str(name), value) for value in values] for name, values in about["axes"]]
        columns = len(names[0])
        image = sheet([result.image for result in results], columns=columns, tile=about.get("cell"), column_names=names[0],
                      row_names=names[1] if len(names) > 1 else None, title=about["title"])
        recipes = [{name: value for name, value in {**result.recipe, "pixels_sha256": picture_hash(result.image)}.items() if name != "batch"}
                   for result in results]
        rows = tuple(tuple(results[at:at + columns]) for at in range(0, len(results), columns))
        return cls(image, rows, joined_recipe(recipes, grid=dict(about)))

    @property
    def results(self) -> tuple[Result, ...]:
        """Every cell in reading order."""
        return tuple(result for row in self.rows for result in row)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was adjusted in any cell, each note once."""
        return tuple(dict.fromkeys(note for result in self.results for note in result.notes))

    def save(self, path: str | Path, *, quality: int = 95) -> list[Path]:
        """Write the sheet as .png, .jpg or .webp, whole or not at all, with the recipe inside.

        Raises:
            RequestError: another suffix or quality. OutputError: the folder cannot be written; nothing partial stays.
        """
        return [save_image(self.image, path, metadata=metadata(self.recipe, image=self.image), quality=quality)]

    def _repr_html_(self) -> str:
        return shown_html([self.image], [""], str(self), self.recipe)

    def __str__(self) -> str:
        seconds = sum(result.timings["total"] for result in self.results)
        axes = " by ".join(f"{len(values)} {name}" for name, values in self.recipe["grid"]["axes"])
        return f"{axes}, {self.image.width}x{self.image.height}, {seconds:.1f} s" + "".join(f"\nnote: {note}" for note in self.notes)

    def __repr__(self) -> str:
        return f"<Grid: {self}>".replace("\n", "; ")


@dataclass(frozen=True)
class GridPlan:
    """A sheet, planned: nothing can be wrong with any cell any more.

    Attributes:
        axes: name and values, of x, and of y where there is one.
        plans: one for each cell, row by row.
        cell: side that every picture is scaled to on the sheet, or None.
        title: what stands above.
    """

    axes: tuple[tuple[str, tuple[Any, ...]], ...]
    plans: tuple[Plan, ...]
    cell: int | None
    title: str

    @property
    def steps(self) -> int:
        """Of all cells."""
        return sum(plan.steps for plan in self.plans)

    def run(self, pipe: Pipeline, *, on_step: OnStep | None = None) -> Grid:
        """Make every cell, then the sheet. Raise in `on_step` to stop within a step."""
        return Grid.of(self.about, list(run_all(pipe, self.plans, total=self.steps, on_step=on_step)))

    @property
    def about(self) -> dict[str, Any]:
        """What the recipe says of the sheet."""
        return {"axes": [[name, [list(value) if isinstance(value, tuple) else value for value in values]] for name, values in self.axes],
                "cell": self.cell, "title": self.title}


def check_about(about: Any, count: int) -> None:
    """RequestError unless a recipe's "grid", which came from a file and may say anything, is a sheet of so many pictures."""
    axes, title = (about.get(name) if isinstance(about, Mapping) else None for name in ("axes", "title"))
    sound = isinstance(axes, list) and len(axes) in (1, 2) and all(
        isinstance(axis, list) and len(axis) == 2 and isinstance(axis[1], list) for axis in axes)
    if not sound or math.prod(len(values) for _, values in axes) != count or not 0 < count <= MAX_CELLS or not isinstance(title, str):
        raise RequestError("the recipe of the sheet was altered and tells of no sheet: take the file as it was saved")
    check_cell(about.get("cell"))


def check_cell(cell: object) -> None:
    """RequestError for what is no side of a cell."""
    if cell is not None and (type(cell) is not int or not 16 <= cell <= 4096):
        raise RequestError(f"cell is {cell!r}: expected a whole number of pixels from 16 to 4096, or nothing")


def make_grid(pipe: Pipeline, request: Request, *, x: Axis, y: Axis | None = None, cell: int | None = None, on_step: OnStep | None = None) -> Grid:
    """A sheet with a picture for every value of one or two fields of a request.

    All cells have one seed, unless seed is an axis. All are planned before any runs; a text that several say is encoded once.

    Args:
        x: the columns: one field of `Request` and its values, as {"guidance_scale": [1, 4, 8]}.
        y: the rows, likewise.
        cell: pixels that every picture is scaled to on the sheet; None keeps their size where the sheet does not grow too large.
        on_step: called after each step, counted over the whole; raise in it to stop.

    Raises:
        RequestError: an axis that is none, or a cell that cannot be honoured (the message names it).
    """
    return plan_grid(pipe, request, x=x, y=y, cell=cell).run(pipe, on_step=on_step)


def plan_grid(pipe: Pipeline, request: Request, *, x: Axis, y: Axis | None = None, cell: int | None = None) -> GridPlan:
    """See `make_grid`: everything but the pictures."""
    check_cell(cell)
    axes = [_axis("x", x, request), *([_axis("y", y, request)] if y is not None else [])]
    if len(axes) > 1 and axes[0][0] == axes[1][0]:
        raise RequestError(f"x and y are both {axes[0][0]}: give each its own field")
    count = math.prod(len(values) for _, values in axes)
    if count > MAX_CELLS:
        raise RequestError(f"the sheet would have {count:,} cells: expected at most {MAX_CELLS:,}, so give fewer values")
    names = [name for name, _ in axes]
    request = request if "seed" in names or request.seed is not None else request.replace(seed=secrets.randbits(32))
    values = product(*(values for _, values in reversed(axes)))
    plans = [_cell(pipe, request, dict(zip(reversed(names), cell, strict=True))) for cell in values]
    title = ", ".join(text for text in (request.prompt, "" if "seed" in names else f"seed {plans[0].seeds[0]}", plans[0].model) if text)
    most = MAX_SIDE // max(len(values) for _, values in axes)
    largest = max(max(plan.crop) for plan in plans)
    planned = GridPlan(tuple(axes), tuple(plans), cell or (most if largest > most else None), title)
    check_room(joined_recipe([make_recipe(plan, "", plan.notes) for plan in plans], grid=planned.about), "the sheet")
    return planned


def label(name: str, value: Any) -> str:
    """What stands beside a row or above a column."""
    text = _words(value)
    return text if name in ALWAYS and isinstance(value, str) else f"{name} {text}"


def _words(value: Any) -> str:
    """A value as one reads it: {"apg": {"eta": 0.5}} is "apg eta 0.5"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_options(said)}".rstrip() for name, said in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _options(said: Any) -> str:
    """What one entry of a table says: of a table within it, its names and values."""
    return " ".join(f"{name} {_words(value)}" for name, value in said.items()) if isinstance(said, Mapping) else _words(said)


def _axis(where: str, said: Any, request: Request) -> tuple[str, tuple[Any, ...]]:
    """Name and values of an axis."""
    if not isinstance(said, Mapping) or len(said) != 1:
        raise RequestError(f"{where} is {shown(said)}: expected one field and its values, as {where}={{'guidance_scale': [1, 4, 8]}}")
    (name, values), = said.items()
    if name not in Request.model_fields:
        raise RequestError(f"{where} is over {name!r}, which is not a known option: {suggestion(str(name))}")
    if name in (*PICTURES, "batch", "strict", "styles_file", "wildcards"):
        raise RequestError(f"{where} is over {name}, which no cell can have of its own: "
                           "give it for the whole sheet" + (", or make seed an axis" if name == "batch" else ""))
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
        raise RequestError(f"{where} has the values {shown(values)}: expected a list of one or more")
    try:
        json.dumps(values := list(values))
    except TypeError:
        raise RequestError(f"{where} has the values {shown(values)}: expected plain data (numbers, words, lists, tables), "
                           "which the sheet's file can keep") from None
    if name in request.model_fields_set and not (name == "prompt" and not request.prompt):
        raise RequestError(f"{name} is the axis {where} and given beside it, too: leave one of the two out")
    return name, tuple(values)


def _cell(pipe: Pipeline, request: Request, said: Mapping[str, Any]) -> Plan:
    """The plan of one cell; what is wrong with it says which cell it is."""
    try:
        plan = pipe.plan(request.replace(**said))
    except RequestError as error:
        cell = ", ".join(f"{name} {shown(value)}" for name, value in reversed(said.items()))
        raise type(error)(f"in the cell with {cell}: {error}") from None
    if len(plan.seeds) > 1:
        raise RequestError(f"the request makes {len(plan.seeds)} pictures and a sheet shows one in each cell: leave batch out, or make seed an axis")
    return plan
