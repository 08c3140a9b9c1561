"""Where a notebook shows something: an output that is updated in place, or the HTML area of a form. Knows IPython and ipywidgets, if they are
there."""

from __future__ import annotations

import base64
import html
import io
from typing import Any, Protocol

from PIL import Image

from latentgen.run.result import Result


class Screen(Protocol):
    """What shows a picture, a result with its recipe, or a sentence, in the place of what it showed before."""

    def show(self, thing: Image.Image | Result | str) -> None: ...


class Output:
    """An output of the running cell. It may be updated from any thread, and after the cell has ended."""

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self._html, self._handle = HTML, display(HTML(""), display_id=True)

    def show(self, thing: Image.Image | Result | str) -> None:
        self._handle.update(self._html(as_html(thing)))


class Area:
    """A widget of HTML."""

    def __init__(self, widget: Any) -> None:
        self._widget = widget

    def show(self, thing: Image.Image | Result | str) -> None:
        self._widget.value = as_html(thing)


class Nowhere:
    """Outside a notebook: nothing is shown."""

    def show(self, thing: Image.Image | Result | str) -> None:
        return


def in_notebook() -> bool:
    """Whether this runs in a notebook's kernel."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None


def widgets() -> Any:
    """The module ipywidgets, None where it is not installed."""
    try:
        import ipywidgets
    except ImportError:
        return None
    return ipywidgets


def as_html(thing: Image.Image | Result | str) -> str:
    """A result with its plan and recipe, a picture, or a sentence."""
    if isinstance(thing, str):
        return f"<p>{html.escape(thing)}</p>"
    if isinstance(thing, Result):
        return thing._repr_html_()
    packed = io.BytesIO()
    thing.save(packed, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}">'
