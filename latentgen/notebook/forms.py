"""A small form for a request, in a notebook with widgets. Knows names of options and ipywidgets; the Request and the Plan check what is typed."""

from __future__ import annotations

from typing import Any

from latentgen.diffusion.sample import SAMPLERS
from latentgen.diffusion.schedule import SPACINGS
from latentgen.errors import RequestError
from latentgen.notebook.watch import Live
from latentgen.notebook.screen import Area, Screen, widgets
from latentgen.run.pipeline import Pipeline
from latentgen.run.request import Request
from latentgen.run.result import Result

OWN = "(the model's own)"


def form(pipe: Pipeline, *, every: int = 1, size: int = 256) -> Form:
    """A form for the usual options of a request, with the picture and its recipe under it. Show it as the last line of a cell.

    Args:
        every: steps between two previews; size: their side in screen pixels.

    Raises:
        RequestError: ipywidgets is not installed.
    """
    kit = widgets()
    if kit is None:
        raise RequestError("a form needs the package ipywidgets, which is not installed: pip install 'latentgen[notebook]', or use live()")
    return Form(pipe, kit, every=every, size=size)


class Form:
    """The form: its `fields` by the names of `Request`, `make()` and `stop()` as its buttons do, and `result` of the last run."""

    def __init__(self, pipe: Pipeline, kit: Any, *, every: int, size: int) -> None:
        self._pipe, self._every, self._size, self._live = pipe, every, size, None
        own, wide = pipe.family.defaults, {"layout": kit.Layout(width="99%")}
        choices = {"sampler": sorted(SAMPLERS), "spacing": sorted(SPACINGS)}
        self.fields: dict[str, Any] = {
            "prompt": kit.Textarea(description="prompt", rows=2, **wide), "negative_prompt": kit.Text(description="negative", **wide),
            "steps": kit.BoundedIntText(value=own.steps, min=1, max=1000, description="steps"),
            "guidance_scale": kit.BoundedFloatText(value=own.guidance_scale, min=0, max=100, step=0.5, description="guidance"),
            "width": kit.BoundedIntText(value=own.width, min=8, max=8192, step=pipe.family.latent.multiple, description="width"),
            "height": kit.BoundedIntText(value=own.height, min=8, max=8192, step=pipe.family.latent.multiple, description="height"),
            "seed": kit.Text(placeholder="a new one", description="seed"),
            **{name: kit.Dropdown(options=[OWN, *names], description=name) for name, names in choices.items()},
        }
        self._begin, self._end = kit.Button(description="Make", button_style="primary",
                                            icon="play"), kit.Button(description="Stop", icon="stop", disabled=True)
        self._begin.on_click(self.make)
        self._end.on_click(self.stop)
        area = kit.HTML()
        self._screen: Screen = Area(area)
        small = [self.fields[name] for name in ("steps", "guidance_scale", "seed", "width", "height", "sampler", "spacing")]
        rows = [kit.HBox(small[:3]), kit.HBox(small[3:5]), kit.HBox(small[5:]), kit.HBox([self._begin, self._end])]
        self.box = kit.VBox([self.fields["prompt"], self.fields["negative_prompt"], *rows, area])

    @property
    def request(self) -> Request:
        """What the form says; fields that stand as the model has them say nothing.

        Raises:
            RequestError: what no request can say.
        """
        own = self._pipe.family.defaults
        said = {name: field.value for name, field in self.fields.items() if field.value not in ("", OWN, getattr(own, name, None))}
        if "seed" in said:
            text = said["seed"].strip()
            said["seed"] = int(text) if text.isdecimal() else text  # what is no number, the Request refuses in words
        return Request(**{"prompt": "", **said})

    @property
    def result(self) -> Result | None:
        """Of the last run, waited for; None where there was none, or it was stopped."""
        return None if self._live is None else self._live.result

    def make(self, *_: Any) -> None:
        """Run what the form says, in a thread; what cannot be honoured is told under the form."""
        if self._live is not None and self._live.running:
            return
        try:
            run = Live(self._pipe, self._pipe.plan(self.request), self._screen, every=self._every, size=self._size)
        except RequestError as error:
            self._screen.show(str(error))
            return
        self._live = run
        self._begin.disabled, self._end.disabled = True, False
        run.on_end = self._ended
        run.start(background=True)

    def stop(self, *_: Any) -> None:
        """End the run within one step."""
        if self._live is not None:
            self._live.stop()

    def _ended(self) -> None:
        self._begin.disabled, self._end.disabled = False, True

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.box)
