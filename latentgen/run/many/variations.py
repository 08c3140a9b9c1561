"""Variations of a picture: by the recipe in its file with the noise turned a little, or where it has none, redrawn at a low strength.

Knows recipes and the public face of a pipeline; no stage of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from latentgen.errors import ImageError, RequestError
from latentgen.run.recipe import Foreign, Recipe, make_recipe, read_recipe
from latentgen.run.request import Request
from latentgen.run.result import Result

if TYPE_CHECKING:
    from latentgen.run.pipeline import Pipeline
    from latentgen.run.plan import Plan

COUNT, AMOUNT = 4, 0.2


def plan_variations(pipe: Pipeline, made: Any, /, *, count: int = COUNT, amount: float = AMOUNT, **options: Any) -> Plan:
    """The plan of `count` variations of a picture.

    With a recipe in the file: the same request, its noise turned by `amount` towards that of other seeds (`variation_seed`). Without one: the picture
    redrawn at the strength `amount`, with or without words.

    Args:
        made: a picture's file, its bytes, an image or array; or a result of one picture, or a recipe. What needs a picture that no file holds is
            given it by name, as image=.
        count: how many, 1 to 64.
        amount: above 0, the same, to 1, another picture.
        options: whatever is to be different: fields of `Request`.

    Raises:
        ImageError: no picture, or its text is damaged. RequestError: a number out of range, a source picture is missing or another one, the picture
            is a sheet or film of many, or the request cannot be honoured.
    """
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 64:
        raise RequestError(f"count is {count!r}: expected a whole number from 1 to 64")
    if not isinstance(amount, (int, float)) or isinstance(amount, bool) or not 0 < amount <= 1:
        raise RequestError(f"amount is {amount!r}: expected a number above 0 and up to 1")
    if "batch" in options:
        raise RequestError("batch is given beside count: say with count alone how many variations there are to be")
    if isinstance(made, Result):
        if len(made) > 1:
            raise RequestError(f"the result has {len(made)} pictures: save them and give one of the files")
        made = Recipe(made.recipe)
    recipe = made if isinstance(made, (Recipe, Foreign)) else found_in(made)
    if recipe is not None and "variation_strength" in options:
        raise RequestError("variation_strength is given beside amount: say with amount alone how far they are to be from the picture")
    if recipe is None or (isinstance(recipe, Foreign) and "seed" not in recipe.fields):
        why = "the picture says nothing of how it was made" if recipe is None else f"{recipe.tool} does not tell the picture's seed"
        if isinstance(made, Foreign):
            raise RequestError(f"{why}: give the picture itself, which is then redrawn")
        request = Request(**({"prompt": "", "strength": float(amount)} | options | {"image": options.get("image", made), "batch": count}))
        return _noted(pipe.plan(request), f"{why}, so it was redrawn at strength {request.strength:g}")
    return _turned(pipe, recipe, count, float(amount), options)


def found_in(made: Any) -> Recipe | Foreign | None:
    """What a picture says of how it was made; None of pixels, and of a picture that keeps no text."""
    if not isinstance(made, (str, Path, bytes, Image.Image)):
        return None
    try:
        return read_recipe(made)
    except ImageError as error:
        if "cannot be read" in str(error):  # another format, such as BMP: whether it is a picture at all the plan finds
            return None
        raise


def _turned(pipe: Pipeline, recipe: Recipe | Foreign, count: int, amount: float, options: Mapping[str, Any]) -> Plan:
    """The request of a recipe, with its noise turned towards other seeds."""
    if isinstance(recipe, Recipe) and recipe.cells:
        raise RequestError("the picture is a sheet or film of many: give one of the pictures in it")
    missing = [name for name in recipe.needs if options.get(name) is None]
    if missing:
        raise RequestError(f"{missing[0]} is missing: give the {missing[0]} that the picture was made from")
    notes = [*recipe.notes] if isinstance(recipe, Foreign) else []
    if recipe.fields.get("variation_strength"):
        notes.append(f"the picture is a variation itself: these are variations of what seed {recipe.fields.get('seed')} makes")
    said = {"variation_strength": amount, "variation_seed": None, "batch": count} | ({"strict": False} if isinstance(recipe, Foreign) else {})
    plan = pipe.plan(recipe.request(**said | dict(options)))
    if isinstance(recipe, Recipe):
        now = make_recipe(plan, pipe.checkpoint.digest, ())
        if now["weights"] != recipe.data.get("weights"):
            notes.append(f"the picture was made with the model {recipe.model[:80]!r} of other weights than these")
        for name in recipe.needs:
            if now.get(f"{name}_sha256") != recipe.data[f"{name}_sha256"] and not {"width", "height"} & {*options}:
                raise RequestError(f"{name} is not the picture that it was made from: give that one")
    return _noted(plan, *notes)


def _noted(plan: Plan, *notes: str) -> Plan:
    return replace(plan, notes=(*notes, *plan.notes))
