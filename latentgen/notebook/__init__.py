"""Notebooks: a live preview that can be stopped, a form for a request, labelled sheets. Thin: all the work is in `run/`.

Where there are no widgets (`pip install 'latentgen[notebook]'` brings them) `live` shows the same preview and the notebook's own interrupt stops it;
outside a notebook it is a progress bar.
"""

from latentgen.notebook.forms import Form, form
from latentgen.notebook.watch import Live, live
from latentgen.pixels.sheet import sheet

__all__ = ["Form", "Live", "form", "live", "sheet"]
