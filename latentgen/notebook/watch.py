"""A request that is watched while it runs and can be stopped. Knows steps, previews and threads; all the work is in `run/`.

A kernel hears no button while a cell runs. So where there are widgets the cell only starts the run, which goes on in a thread of its own:
the kernel is
idle, and Stop is heard at once. `result` waits for the end; so does `await`, during which kernels from ipykernel 7.4 on hear the button, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import closing
from threading import Event, Thread
from typing import Any

from PIL import Image

from latentgen.errors import RequestError
from latentgen.notebook.screen import Nowhere, Output, Screen, in_notebook, widgets
from latentgen.pixels.sheet import sheet
from latentgen.run.pipeline import Pipeline
from latentgen.run.plan import Plan
from latentgen.run.progress import Bar
from latentgen.run.request import Request
from latentgen.run.result import Result


def live(pipe: Pipeline, request: Request | str, *, every: int = 1, size: int = 256, background: bool | None = None, **options: Any) -> Live:
    """Run a request with a picture that sharpens as it goes, and a Stop button where there are widgets.

    Args:
        request: a `Request`, or a prompt with the options of `Request`.
        every: steps between two previews.
        size: side of the preview in screen pixels.
        background: go on in a thread while the notebook is free; None does so where there are widgets. Else this returns when the run has ended, and
            interrupting the cell stops it.

    Returns:
        The run: `result` waits for the pictures, `stop()` ends it within one step.

    Raises:
        RequestError: input that cannot be honoured, or `every` below 1.
    """
    if every < 1:
        raise RequestError(f"every is {every!r}: expected a whole number of steps, 1 or more")
    plan, notebook = pipe.plan(request, **options), in_notebook()
    kit = widgets() if notebook else None
    run = Live(pipe, plan, Output() if notebook else Nowhere(), every=every, size=size)
    background = kit is not None if background is None else background
    if background and kit is not None:
        run.stop_button(kit)
    run.start(background=background)
    return run


class Live:
    """A request under way, shown on a screen."""

    def __init__(self, pipe: Pipeline, plan: Plan, screen: Screen, *, every: int = 1, size: int = 256) -> None:
        self.plan = plan
        self._pipe, self._screen, self._every, self._size = pipe, screen, every, size
        self._stop, self._done = Event(), Event()
        self._result: Result | None = None
        self._error: BaseException | None = None
        self.on_end: Callable[[], object] = lambda: None  # called once, in the run's own thread

    def start(self, *, background: bool) -> None:
        """Begin; with background=False this returns when the run has ended."""
        if background:
            Thread(target=self._work, name="latentgen live", daemon=True).start()
        else:
            self._work()
            self._raise()

    def stop(self, *_: Any) -> None:
        """End the run within one step; `result` is then None. After its end this does nothing."""
        self._stop.set()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return not self._done.is_set()

    @property
    def result(self) -> Result | None:
        """The finished pictures, waited for; None where the run was stopped. Interrupting the cell that waits stops it.

        Raises:
            LatentgenError: what went wrong in the run.
        """
        try:
            self._done.wait()
        except KeyboardInterrupt:
            self.stop()
            self._done.wait()
        self._raise()
        return self._result

    def __await__(self) -> Generator[Any, None, Result | None]:
        return self._awaited().__await__()

    async def _awaited(self) -> Result | None:
        while self.running:
            await asyncio.sleep(0.05)
        return self.result

    def stop_button(self, kit: Any) -> None:
        """Show a Stop button in the running cell."""
        from IPython.display import display

        button = kit.Button(description="Stop", icon="stop")
        button.on_click(self.stop)
        self.on_end = button.close
        display(button)

    def _work(self) -> None:
        try:
            run = self._pipe.stream(self.plan)
            drawable = self._pipe.family.latent.rgb is not None  # without a preview matrix only the finished picture is shown
            shown = self._pipe.progress if isinstance(self._screen, Nowhere) else False
            with closing(run), Bar(self.plan, shown) as bar:
                for step in run:
                    bar.step(step)
                    words = f"step {step.index + 1} of {step.total}"
                    if self._stop.is_set():
                        self._screen.show(f"stopped after {words}")
                        return
                    if drawable and step.index % self._every == 0:
                        self._screen.show(self._captioned(run.preview(step), words))
                self._result = run.result
            self._screen.show(self._result)
        except KeyboardInterrupt:
            self._screen.show("stopped")
        except Exception as error:  # of a thread: told on the screen, and raised where the result is asked for
            self._error = error
            self._screen.show(f"{type(error).__name__}: {error}")
        finally:
            self._done.set()
            self.on_end()

    def _captioned(self, images: list[Image.Image], text: str) -> Image.Image:
        return sheet(images, [text, *[""] * (len(images) - 1)], tile=self._size, smooth=True)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
