"""Several requests, one after the other, as one: their steps counted together, and one recipe for all. Knows the public face of a pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from latentgen.diffusion.sample import Step
from latentgen.errors import ImageError, RequestError
from latentgen.pixels.image import open_image
from latentgen.pixels.save import MAX_TEXT
from latentgen.run.progress import Bar
from latentgen.run.recipe import Recipe, picture_hash, read_recipe

if TYPE_CHECKING:
    from latentgen.run.pipeline import Pipeline
    from latentgen.run.plan import Plan
    from latentgen.run.request import Request
    from latentgen.run.result import Result

OnStep = Callable[[Step], None]
FREE = ("versions", "notes", "batch", "pixels_sha256")  # of a recipe: they do not decide the picture
ROOM = 400  # letters that a recipe grows by for each picture once it is made: its hash, and some notes


def run_all(pipe: Pipeline, requests: Iterable[Plan | Request], *, total: int, on_step: OnStep | None = None) -> Iterator[Result]:
    """The results, each made when it is asked for, with one bar over all. Close it, or raise in `on_step`, to stop within a step.

    Args:
        total: steps of all requests.
        on_step: called after each step, whose `index` and `total` are those of the whole.
    """
    done, bar = 0, None
    try:
        for request in requests:
            run = pipe.stream(request)
            bar = bar or Bar(run.plan, pipe.progress, total=total)
            with closing(run):  # or a traceback would keep the run and its modules alive
                count = 0
                for step in run:
                    bar.step(step)
                    count = step.total
                    if on_step is not None:
                        on_step(replace(step, index=done + step.index, total=total))
                yield run.result
            done += count
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)


def check_room(recipe: Mapping[str, Any], what: str) -> None:
    """RequestError where a joined recipe will not fit into a file."""
    letters = len(json.dumps(recipe, ensure_ascii=False)) + ROOM * len(recipe["cells"])
    if letters > MAX_TEXT:
        raise RequestError(f"the recipe of {what} would have {letters:,} letters and a file keeps {MAX_TEXT:,}: "
                           "make fewer pictures at once, or shorten the prompts")


def kept_picture(path: Path, recipe: Mapping[str, Any]) -> Image.Image | None:
    """The picture of a file that an earlier run made from this recipe, None where it is not there, changed, or another's. Versions may differ."""
    try:
        found = read_recipe(path)
        if not isinstance(found, Recipe) or _deciding(found.data) != _deciding(json.loads(json.dumps(dict(recipe)))):
            return None
        image = open_image(path)
    except ImageError:
        return None
    return image if picture_hash(image) == found.data.get("pixels_sha256") else None


def _deciding(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name not in FREE}
