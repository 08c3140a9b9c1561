"""Imports of whole libraries, without Python's collector of cycles between them. Knows nothing of what is imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """The collector waits while the block runs. Modules are hundreds of thousands of objects that stay, and going through them again and again takes
    a quarter of the time in which torch, transformers and diffusers are imported."""
    if not gc.isenabled():  # by another thread, which turns it on again, or by the program
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # there and back: all that is there counts as old, without being gone through
            gc.freeze()
            gc.unfreeze()
        gc.enable()
