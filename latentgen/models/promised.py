"""A weight that is made when it is first used. Knows tensors; knows no file, no module and no dtype but its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Promised(nn.Parameter):
    """A weight that is still in its file: a parameter on the meta device, with the shape and dtype that it will have, which knows how it is made.

    Attributes:
        stored: as it stands in the file.
        ready: what is stored -> the weight, checked.
        release: told of what is stored when the weight was read.
    """

    stored: Tensor
    ready: Callable[[Tensor], Tensor]
    release: Callable[[Tensor], None]

    def __new__(cls, like: Tensor, stored: Tensor, *, ready: Callable[[Tensor], Tensor], release: Callable[[Tensor], None]) -> Promised:
        """Args: like: a tensor on the meta device, of the weight's shape and dtype."""
        own = torch.Tensor._make_subclass(cls, like, False)
        own.stored, own.ready, own.release = stored, ready, release
        return own

    def made(self) -> Tensor:
        """The weight in memory; where nothing has to change, as it lies in the file."""
        return self.ready(self.stored)

    def done(self) -> None:
        """The weight was read, and the file's pages may leave memory."""
        self.release(self.stored)

    def rows(self, rows: slice) -> Promised:
        """Some rows, of which alone the file is read."""
        return Promised(self.data[rows], self.stored[rows], ready=self.ready, release=self.release)

    def then(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Promised:
        """What `change` makes of the weight, of that shape."""
        ready = self.ready
        return Promised(self.data.new_empty(shape), self.stored, ready=lambda stored: change(ready(stored)), release=self.release)
