"""A small cache of conditioning and image latents, keyed by value and bounded in bytes. Knows tensors' sizes and nothing else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class Memo:
    """Least recently used values up to `limit` bytes. Safe for many threads; a value may be computed twice at once, never wrongly."""

    def __init__(self, limit: int = 256 * 2**20) -> None:
        self.limit = limit
        self._kept: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], T], tensors: Callable[[T], list[Tensor]]) -> T:
        """The value of `key`, made now if it is not here.

        Args:
            tensors: value -> the tensors it holds, to count its bytes.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]  # type: ignore[return-value]
        value = make()
        size = sum(t.numel() * t.element_size() for t in tensors(value))
        with self._lock:
            if size <= self.limit and key not in self._kept:
                self._kept[key] = (value, size)
                self._bytes += size
                while self._bytes > self.limit:
                    self._bytes -= self._kept.popitem(last=False)[1][1]
        return value

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0
