"""From one request to the next, frame by frame: in noise, in words and in numbers. Knows requests, plans and recipes; every frame is an ordinary run.

A frame between two keyframes is itself a request: `variation_seed` turns its noise, `blend_prompt` its words, and numbers that both keyframes say go
along the straight line. So each has an ordinary recipe, and a keyframe is exactly the picture that it is alone.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from PIL import Image
from torch import Tensor

from latentgen.errors import OutputError, RequestError
from latentgen.pixels.film import check_film, write_film
from latentgen.pixels.save import save_image
from latentgen.run.many.series import OnStep, check_room, kept_picture, run_all
from latentgen.run.recipe import Recipe, joined_recipe, make_recipe, metadata, picture_hash
from latentgen.run.request import Request

if TYPE_CHECKING:
    from latentgen.run.pipeline import Pipeline

MAX_FRAMES = 2400
FPS = 12.0
NUMBERS = tuple(name for name, known in Request.model_fields.items() if float in get_args(known.annotation)
                and name not in ("blend", "variation_strength", "denoising_start", "denoising_end", "upscale"))  # frames have one size


@dataclass(frozen=True)
class Film:
    """Frames, planned: nothing can be wrong with any of them any more. Iterate for the pictures one by one, or `save`; both run it.

    Attributes:
        requests: one for each frame.
        recipes: likewise, but for the pixels' hashes, which come with the pictures.
        loop: after the last frame comes the first.
        steps: of all frames.
        folder: where every frame is kept as a PNG and found again by the next run; None keeps none.
        made: the pictures, where they are there already.
    """

    pipe: Pipeline = field(repr=False)
    requests: tuple[Request, ...] = field(repr=False)
    recipes: tuple[Mapping[str, Any], ...] = field(repr=False)
    loop: bool
    steps: int
    folder: Path | None = None
    on_step: OnStep | None = field(default=None, repr=False)
    made: tuple[Image.Image, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Image.Image]:
        """The pictures; those that the folder has already are not made again. Leave the loop, or raise in `on_step`, to stop within a step."""
        if self.made:
            yield from self.made
            return
        old = [name is not None and name.is_file() for name in self._files()]
        results = run_all(self.pipe, [request for request, there in zip(self.requests, old, strict=True) if not there], total=self.steps,
                          on_step=self.on_step)
        for name, recipe, there in zip(self._files(), self.recipes, old, strict=True):
            image = _kept(name, recipe) if there and name else next(results).image
            if name is not None and not there:
                save_image(image, name, metadata=metadata(recipe, image=image))
            yield image

    def save(self, path: str | Path, *, fps: float = FPS) -> list[Path]:
        """Make the frames and write them as .gif, .webp, .png (animated) or .mp4, whole or not at all, with one recipe for all inside.

        Args:
            fps: frames a second, 0.1 to 100.

        Raises:
            RequestError: another suffix or rate, or an .mp4 without the package av. OutputError: the folder cannot be written.
        """
        path = check_film(path, fps)
        if not path.parent.is_dir():
            raise OutputError(f"the folder {str(path.parent)!r} does not exist: make it first, or choose another")
        hashes: list[str] = []

        def frames() -> Iterator[Image.Image]:
            for image in self:
                hashes.append(picture_hash(image))
                yield image

        def text() -> dict[str, str]:
            known = [{**recipe, "pixels_sha256": told} for recipe, told in zip(self.recipes, hashes, strict=True)]
            return metadata(joined_recipe(known, film=self.about))

        return [write_film(path, frames(), fps=fps, loop=self.loop, metadata=text)]

    @property
    def about(self) -> dict[str, Any]:
        """What the recipe says of the film."""
        return {"frames": len(self), "loop": self.loop}

    def __str__(self) -> str:
        return f"{len(self)} frames, {self.steps} steps" + (", a loop" if self.loop else "")

    def _files(self) -> list[Path | None]:
        return [None if self.folder is None else self.folder / f"frame-{n:04}.png" for n in range(1, len(self) + 1)]


def plan_film(pipe: Pipeline, keys: Sequence[Request | str], *, frames: int = 24, loop: bool = False, folder: str | Path | None = None,
              on_step: OnStep | None = None, **options: Any) -> Film:
    """A way through keyframes. Everything is planned before any frame runs.

    Args:
        keys: two or more requests or prompts; the first frame is the first of them, the last frame the last.
        frames: of the whole film, 2 to 2400 and as many as there are keyframes, at least. A keyframe between the ends is hit exactly where
            (frames - 1) is a multiple of (keys - 1).
        loop: go on from the last keyframe to the first, so that the film can run round.
        folder: keep every frame there; a film that was broken off goes on where it stopped.
        on_step: called after each step, counted over the whole; raise in it to stop.
        options: fields of `Request` for all keyframes. seed: one for all, or a list with one for each.

    Raises:
        RequestError: keyframes with no way between them, or a frame that cannot be honoured. OutputError: the folder cannot be made.
    """
    if isinstance(keys, (str, Request)) or not isinstance(keys, Sequence) or len(keys) < 2:
        raise RequestError("interpolate needs two or more keyframes: pass a list of prompts or requests")
    if type(frames) is not int or not max(2, len(keys)) <= frames <= MAX_FRAMES:
        raise RequestError(f"frames is {frames!r}: expected a whole number from {max(2, len(keys))} (the keyframes) to {MAX_FRAMES}")
    whole = [_finished(pipe, key, n) for n, key in enumerate(_keyframes(keys, options), 1)]
    requests = tuple(_frame(whole, place) for place in places(len(whole), frames, loop=loop))
    recipes, steps = [], []
    for n, request in enumerate(requests, 1):
        try:
            plan = pipe.plan(request)
        except RequestError as error:
            raise type(error)(f"in frame {n}: {error}") from None
        recipes.append({name: value for name, value in make_recipe(plan, pipe.checkpoint.digest, plan.notes).items() if name != "batch"})
        steps.append(plan.steps)
    film = Film(pipe, requests, tuple(recipes), bool(loop), sum(steps), None if folder is None else Path(folder), on_step)
    check_room(joined_recipe(recipes, film=film.about), "the film")
    return film if film.folder is None else _resumed(film, steps)


def places(keys: int, frames: int, *, loop: bool) -> list[tuple[int, float]]:
    """(keyframe, share of the way to the next) of each frame."""
    ways = [Fraction(n * keys, frames) if loop else Fraction(n * (keys - 1), frames - 1) for n in range(frames)]
    return [(math.floor(way), float(way - math.floor(way))) for way in ways]


def between(a: Request, b: Request, share: float) -> Request:
    """The request of a frame on the way from a (share 0) to b (share 1).

    Raises:
        RequestError: they differ in what has no way between.
    """
    changes: dict[str, Any] = {}
    for name in Request.model_fields:
        one, other = getattr(a, name), getattr(b, name)
        if _same(one, other):
            continue
        if name == "prompt":
            _check_free(a, b, "blend_prompt", "blend", name)
            changes |= {"blend_prompt": other, "blend": share}
        elif name == "seed":
            _check_free(a, b, "variation_seed", "variation_strength", name)
            changes |= {"variation_seed": other, "variation_strength": share}
        elif name in NUMBERS and one is not None and other is not None:
            changes[name] = one + (other - one) * share
        else:
            cure = "say it in both" if name in NUMBERS else "say the same in both"
            raise RequestError(f"{name} differs between two keyframes and has no way between: only prompt, "
                               "seed and numbers with a point that both say "
                               f"({', '.join(NUMBERS[:4])} ...) have one, so {cure}")
    return a.replace(**changes)


def _frame(keys: Sequence[Request], place: tuple[int, float]) -> Request:
    n, share = place
    a, b = keys[n], keys[(n + 1) % len(keys)]
    mid = between(a, b, share or 0.5)  # also for a keyframe, so that keyframes without a way between are found
    return mid if share else a


def _keyframes(keys: Sequence[Request | str], options: dict[str, Any]) -> list[Request]:
    """The keyframes as requests, each with a seed that is said."""
    seeds = options.pop("seed", None)
    if isinstance(seeds, (list, tuple, range)) and len(seeds) != len(keys):
        raise RequestError(f"seed holds {len(seeds)} seeds for {len(keys)} keyframes: give one for each, or one for all")
    drawn = secrets.randbits(32) if seeds is None else seeds
    made = []
    for n, key in enumerate(keys):
        own = {"seed": drawn[n] if isinstance(drawn, (list, tuple, range)) else drawn}
        if isinstance(key, Request):
            own = {} if key.seed is not None and seeds is None else own
            made.append(key.replace(**options, **own))
        else:
            made.append(Request(prompt=key, **options, **own))
    return made


def _finished(pipe: Pipeline, key: Request, n: int) -> Request:
    """A keyframe as it is planned: its wildcards are drawn for its own seed, and not again in each frame for another's."""
    try:
        plan = pipe.plan(key)
    except RequestError as error:
        raise type(error)(f"in keyframe {n}: {error}") from None
    if len(plan.seeds) > 1:
        raise RequestError(f"keyframe {n} makes {len(plan.seeds)} pictures and a film has one in each frame: leave batch out")
    return plan.request


def _check_free(a: Request, b: Request, first: str, second: str, name: str) -> None:
    if any(getattr(key, field) is not None for key in (a, b) for field in (first, second)):
        raise RequestError(f"{name} differs between two keyframes and one of them says {first} or {second}, "
                           "which frames between them need: leave those out")


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, (Tensor, np.ndarray)) or isinstance(other, (Tensor, np.ndarray)):
        return isinstance(one, type(other)) and one.shape == other.shape and bool((one == other).all())
    return type(one) is type(other) and one == other or (isinstance(one, (int, float)) and isinstance(other, (int, float)) and one == other)


def _resumed(film: Film, steps: Sequence[int]) -> Film:
    """The film with the steps of those frames that its folder does not have; a file that is of another film is found now."""
    folder = film.folder
    assert folder is not None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {str(folder)!r} cannot be made ({error.strerror}): choose another") from error
    missing = 0
    for name, recipe, count in zip(film._files(), film.recipes, steps, strict=True):
        if name is not None and name.is_file():
            _kept(name, recipe)
        else:
            missing += count
    return Film(film.pipe, film.requests, film.recipes, film.loop, missing, folder, film.on_step)


def _kept(name: Path, recipe: Mapping[str, Any]) -> Image.Image:
    image = kept_picture(name, recipe)
    if image is None:
        raise RequestError(f"{name.name!r} in the folder is no frame of this film: choose an empty folder, or take that file away")
    return image


def remade(pipe: Pipeline, recipe: Recipe, requests: Sequence[Request], images: Sequence[Image.Image]) -> Film:
    """A film from its recipe, with the pictures that its frames came to."""
    about = recipe.data.get("film")
    loop = bool(isinstance(about, Mapping) and about.get("loop"))
    return Film(pipe, tuple(requests), tuple(cell.data for cell in recipe.cells), loop, 0, made=tuple(images))
