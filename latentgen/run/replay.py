"""Replay: a picture made again from its own recipe, and what differs. Knows recipes and the public face of a pipeline; no stage of it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from latentgen.errors import RequestError
from latentgen.pixels.image import open_image
from latentgen.run.many.grid import Grid, check_about
from latentgen.run.many.interpolate import MAX_FRAMES, Film, remade
from latentgen.run.many.series import run_all
from latentgen.run.memory.ladder import holding
from latentgen.run.recipe import PICTURES, Foreign, Recipe, as_recipe, make_recipe, picture_hash

if TYPE_CHECKING:
    from latentgen.run.pipeline import Pipeline
    from latentgen.run.plan import Plan
    from latentgen.run.result import Result

_PASSED = ("notes", "versions", "pixels_sha256", "batch", "model", "template", "styled_with", "drawn",
           *(f"{name}_sha256" for name in PICTURES))  # compared one by one, or of no weight
_UNSAID = {"rows": None, "quantise": None, "attention": None, "residency": None, "speed": "plain"}  # what it means that a recipe does not tell them
_NAMES = {"weights": "the weights", "levels_sha256": "the noise levels", "rows": "pictures per network call", "kernels": "the processor's kernels"}


@dataclass(frozen=True)
class Replayed:
    """A picture made again.

    Attributes:
        result: the picture, the sheet or the film, None where it could not be run because a source picture is missing or another one.
        identical: whether every pixel is as it was when the picture was made: compared with the file where it is exact, else with the hash in the
            recipe.
        differences: each factor that is not as it was, and how far the pixels are apart; also where they came out the same.
    """

    result: Result | Grid | Film | None
    identical: bool
    differences: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(["identical" if self.identical else "different", *(f"  {difference}" for difference in self.differences)])


def replay(pipe: Pipeline, made: Image.Image | str | Path | bytes | Recipe | Foreign, /, *, anyway: bool = False, **pictures: Any) -> Replayed:
    """Make a picture again from the recipe in its file, and compare.

    Source pictures are compared with the recipe's hashes before anything runs.

    Args:
        made: the file, its bytes, or an image opened from it; or its recipe, which can tell about the pixels by their hash alone.
        anyway: run the nearest request of a picture that another program made, too; it is never identical, and its notes are the differences.
        pictures: what it was made from: image, mask, reference, latents, as they were given then.

    Raises:
        ImageError: no picture, or none that says how it was made. RequestError: another program made it and `anyway` is off, a picture is given
            that it was not made from, or the recipe was altered and cannot be honoured.
    """
    recipe = as_recipe(made)
    for name in pictures:
        if name not in PICTURES:
            raise RequestError(f"{name!r} is given to replay: expected only the pictures that it was made from "
                               f"({', '.join(PICTURES)}); to change it make a new one")
    given = {name: picture for name, picture in pictures.items() if picture is not None}
    if isinstance(recipe, Foreign):
        return _anyway(pipe, recipe, anyway, given)
    if extra := [name for name in given if name not in recipe.needs]:
        raise RequestError(f"{extra[0]} is given but the picture was made without one: leave it out")
    missing = tuple(f"{name} is missing: give the {name} that it was made from" for name in recipe.needs if name not in given)
    if missing:
        return Replayed(None, False, missing)
    cells = _cells(recipe)
    plans = [holding(pipe.plan(cell.request(**given)), cell.data.get("quantise")) for cell in cells]
    nows = [make_recipe(plan, pipe.checkpoint.digest, plan.notes) for plan in plans]
    sources = tuple(f"{name} is not the {'one' if name == 'classifier' else 'picture'} that it was made from" for name in recipe.needs
                    if nows[0].get(f"{name}_sha256") != recipe.data[f"{name}_sha256"])
    if sources:
        return Replayed(None, False, sources)
    factors = tuple(dict.fromkeys(factor for cell, now in zip(cells, nows, strict=True) for factor in _factors(cell.data, now)))
    results, file = run_all(pipe, plans, total=sum(plan.steps for plan in plans)), None if isinstance(made, Recipe) else made
    whole, pixels = _several(pipe, recipe, plans, results, file) if recipe.cells else _single(recipe, next(results), file)
    return Replayed(whole, not pixels, (*factors, *pixels))


def _cells(recipe: Recipe) -> tuple[Recipe, ...]:
    """The recipe of each picture, and RequestError for a sheet or film that was altered into none."""
    if recipe.cells and "film" not in recipe.data:
        check_about(recipe.data.get("grid"), len(recipe.cells))
    if len(recipe.cells) > MAX_FRAMES:
        raise RequestError(f"the recipe tells of {len(recipe.cells):,} pictures: expected at most {MAX_FRAMES:,}, so it was altered")
    return recipe.cells or (recipe,)


def _single(recipe: Recipe, result: Result, file: Any) -> tuple[Result, tuple[str, ...]]:
    """A picture, and how it differs from the one that was made."""
    return result, _pixels(recipe, result.image, file)


def _several(pipe: Pipeline, recipe: Recipe, plans: Sequence[Plan], results: Iterator[Result], file: Any) -> tuple[Grid | Film, tuple[str, ...]]:
    """A sheet or a film, and how its pictures, and the sheet itself, differ from those that were made."""
    if "film" in recipe.data:
        images = [result.image for result in results]
        whole: Grid | Film = remade(pipe, recipe, [plan.request for plan in plans], images)
        ours: tuple[str, ...] = ()
    else:
        whole = Grid.of(recipe.data["grid"], list(results))
        images, ours = [result.image for result in whole.results], _pixels(recipe, whole.image, file)
    each = (f"picture {n}: {far}" for n, (cell, image) in enumerate(zip(recipe.cells, images, strict=True), 1) for far in _pixels(cell, image, None))
    return whole, (*each, *ours)


def _anyway(pipe: Pipeline, recipe: Foreign, anyway: bool, given: Mapping[str, Any]) -> Replayed:
    if not anyway:
        raise RequestError(f"{recipe.tool} made this picture, and what another program made cannot be made again exactly: "
                           "pass anyway=True for the nearest request")
    missing = tuple(f"{name} is missing: give the {name} that it was made from" for name in recipe.needs if name not in given)
    if missing:
        return Replayed(None, False, missing)
    plan = pipe.plan(recipe.request(strict=False, **given))
    result = next(run_all(pipe, [plan], total=plan.steps))
    return Replayed(result, False, (f"{recipe.tool} made it", *recipe.notes, *result.notes))


def _factors(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """What is not as it was, of all that a recipe tells."""
    found = []
    versions = [recipe.get("versions") if isinstance(recipe.get("versions"), dict) else {} for recipe in (then, now)]
    for old, new in ((then, now), versions):
        for name in sorted({*old, *new} - {*_PASSED}):
            if name not in old and name not in _UNSAID:
                continue  # an older version did not write it down
            was, is_now = (recipe.get(name, _UNSAID.get(name)) for recipe in (old, new))
            if was != is_now:
                said = f"{_NAMES.get(name, name)}: {_shown(was)} then, {_shown(is_now)} now"
                found.append(said + (f" (the model {then.get('model')!r} then, {now.get('model')!r} now)" if name == "weights" else ""))
    return tuple(found)


def _pixels(recipe: Recipe, image: Image.Image, made: Any) -> tuple[str, ...]:
    """How the new picture differs from the one that was made; () where it does not."""
    hashed = recipe.data.get("pixels_sha256")
    told = picture_hash(image) == hashed if isinstance(hashed, str) else None
    if made is None:
        return () if told else ("the pixels are others" if told is False else "the recipe does not tell what the pixels were",)
    kind = made.format if isinstance(made, Image.Image) else _format(made)
    if kind != "PNG":
        return () if told else (f"the pixels are others ({_apart(made, image)}, some of it from the file, which is not exact)" if told is False else
                                f"the file is not exact and its recipe does not tell what the pixels were ({_apart(made, image)}): keep a PNG",)
    far = _apart(made, image)
    if not far:
        return ()
    return (f"the file was changed after it was made ({far}): its recipe gives the picture that it tells of" if told else far,)


def _apart(made: Any, image: Image.Image) -> str:
    """How far a file's pixels are from the new ones, "" where they are the same."""
    old = open_image(made, name="the picture")
    if old.size != image.size:
        return f"the file is {old.width}x{old.height}, the new picture {image.width}x{image.height}"
    far = np.abs(np.asarray(old).astype(np.int16) - np.asarray(image).astype(np.int16))
    many = int((far.max(axis=2) > 0).sum())
    return f"{many} of {far.shape[0] * far.shape[1]} pixels differ, by {int(far.max())} of 255 at most" if many else ""


def _format(made: str | Path | bytes) -> str | None:
    with Image.open(io.BytesIO(made) if isinstance(made, bytes) else made, formats=("PNG", "JPEG", "WEBP")) as image:
        return image.format


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
