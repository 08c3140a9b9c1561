"""How much work a call is: the lines of Python that it runs, and the bytes that a module reads, the same on every machine. Knows nothing of latentgen."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any
from unittest.mock import patch


def lines_run(call: Callable[[], Any]) -> int:
    """Lines that the call runs, those of what it calls too."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@contextmanager
def bytes_read(module: ModuleType) -> Iterator[list[int]]:
    """The lengths of all that is read, within the block, from files that this module opens by `open`; what reads a file to its end is an error."""
    seen: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            seen.append(count := super().readinto(buffer))
            return count

        def readall(self) -> bytes:
            raise AssertionError("the whole file was asked for")

    replaced = vars(module).get("open")  # where a test has one of its own
    with patch.object(module, "open", replaced or (lambda path, mode: io.BufferedReader(Counted(path, "rb"))), create=True):
        yield seen
