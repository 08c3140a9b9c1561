"""A module whose weights stay in their memory-mapped file: they are read when it is called, and their pages leave memory after.

For what a run calls once. Knows tensors and modules; knows no family and no device but that of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from latentgen.models.streamed import filled


class Elsewhere(nn.Module):
    """Stands for a module that is on the meta device. It has no parameters, so nothing moves or counts them.

    Args:
        shell: the module without numbers.
        stored: its tensors as they stand in the file, by the module's own names.
        ready: (name, stored tensor) -> what the module computes with, by name, checked: of a packed one its parts.
        release: told of each stored tensor after use.
    """

    def __init__(self, shell: nn.Module, stored: Mapping[str, Tensor], *, ready: Callable[[str, Tensor], Mapping[str, Tensor]],
                 release: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.shell = (shell,)  # in a tuple, or it would be a child
        self.stored, self.ready, self.release = dict(stored), ready, release

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's answer, computed where its first argument is."""
        places = dict(self.shell[0].named_parameters()) | dict(self.shell[0].named_buffers())
        weights = {id(places[own]): t.to(args[0].device) for name, tensor in self.stored.items() for own, t in self.ready(name, tensor).items()}
        answer = filled(self.shell[0], weights)(*args, **kwargs)  # a copy of its own: another thread may ask at the same time
        for tensor in self.stored.values():
            self.release(tensor)
        return answer
