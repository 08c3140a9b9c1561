"""Notebooks: a live preview and labelled sheets. Thin: all the work is in `run/`. Outside a notebook `live` runs quietly."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from PIL import Image

from latentgen.errors import RequestError
from latentgen.pixels.sheet import sheet
from latentgen.run.pipeline import Pipeline
from latentgen.run.request import Request
from latentgen.run.result import Result


def live(pipe: Pipeline, request: Request | str, *, every: int = 1, size: int = 256, **options: Any) -> Result | None:
    """Run a request with a picture that sharpens as it goes. Interrupting the cell (the stop button of the notebook) stops within one step.

    Args:
        request: a `Request`, or a prompt with the options of `Request`.
        every: steps between two previews.
        size: side of the preview in screen pixels.

    Returns:
        The result, or None where it was interrupted.

    Raises:
        RequestError: input that cannot be honoured, or `every` below 1.
    """
    if every < 1:
        raise RequestError(f"every is {every!r}: expected a whole number of steps, 1 or more")
    run, screen = pipe.stream(request, **options), _Screen()
    drawable = pipe.family.latent.rgb is not None  # without a preview matrix only the finished picture is shown
    try:
        for step in run:
            if drawable and step.index % every == 0:
                screen.show(_captioned(run.preview(step), f"step {step.index + 1} of {step.total}", size, smooth=True))
        result = run.result
    except KeyboardInterrupt:
        run.close()
        return None
    screen.show(_captioned(list(result.images), f"{result.timings['total']:.1f} s, seeds {', '.join(map(str, result.seeds))}", size))
    return result


def _captioned(images: list[Image.Image], text: str, size: int, *, smooth: bool = False) -> Image.Image:
    return sheet(images, [text, *[""] * (len(images) - 1)], tile=size, smooth=smooth)


class _Screen:
    """One output area that is updated in place in a notebook; elsewhere nothing."""

    def __init__(self) -> None:
        self._handle: Any = None
        with suppress(ImportError):
            from IPython import get_ipython
            from IPython.display import display

            if get_ipython() is not None:
                self._handle = display(display_id=True)

    def show(self, image: Image.Image) -> None:
        if self._handle is not None:
            self._handle.update(image)
