"""Pictures made once and kept: a list of prompts to numbered files, where a second run of the same requests finds them. Knows the pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from latentgen.errors import ImageError
from latentgen.pixels.save import read_metadata, save_image
from latentgen.run.progress import watched

if TYPE_CHECKING:
    from latentgen.run.pipeline import Pipeline

T = TypeVar("T")
TIMINGS = "latentgen-timings"


@dataclass(frozen=True)
class Made:
    """One picture with its prompt and the seconds that each stage took when it was made."""

    image: Image.Image
    prompt: str
    timings: Mapping[str, float]


def make(pipe: Pipeline, folder: Path, wanted: Sequence[Mapping[str, Any]], *, progress: bool | None = None) -> list[Made]:
    """One picture for each set of options (with "prompt" and "seed"), kept as folder/NNN.png with its recipe.

    A file whose recipe says the same request, weights, dtype and device is taken as it is; any other is made again.

    Raises:
        RequestError: options that cannot be honoured. OutputError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_one(pipe, folder / f"{n:03}.png", dict(options)) for n, options in enumerate(bar(wanted, f"draw {folder.name}", progress))]


def _one(pipe: Pipeline, path: Path, options: dict[str, Any]) -> Made:
    from latentgen.run.many.series import kept_picture
    from latentgen.run.recipe import make_recipe, metadata

    prompt = options.pop("prompt")
    plan = pipe.plan(prompt, **options)
    image, timings = kept_picture(path, make_recipe(plan, pipe.checkpoint.digest, plan.notes)), _timings(path)
    if image is not None and timings is not None:
        return Made(image, prompt, timings)
    result = pipe.stream(plan).result
    words = {**metadata(result.recipe, plan.seeds[0], result.image), TIMINGS: json.dumps(dict(result.timings))}
    save_image(result.image, path, metadata=words)
    return Made(result.image, prompt, result.timings)


def _timings(path: Path) -> dict[str, float] | None:
    """Of a file from an earlier run, None if there are none that can be read."""
    try:
        timings = json.loads(read_metadata(path)[TIMINGS])
    except (ImageError, KeyError, ValueError):
        return None
    return timings if isinstance(timings, dict) else None


def bar(things: Iterable[T], label: str, shown: bool | None) -> Iterable[T]:
    """The things one by one, with a progress bar on stderr; `shown` None means: only where a person watches."""
    from tqdm.auto import tqdm

    return tqdm(things, desc=label, disable=not (watched() if shown is None else shown))
