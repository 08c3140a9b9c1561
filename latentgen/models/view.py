"""Views of a network: the same parameters with some modules replaced, for one run, while the network itself stays as it is for every other.

Knows modules. Knows no family, request or device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def view(module: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """A copy of the tree of modules that shares every parameter, buffer and untouched attribute with it: no weight is copied, nothing of the original changes.

    Where the original is moved or released, so is the view: make one for each run, inside the block that holds the original.

    Args:
        replace: (dotted name, module) -> what stands there in the view, or None for the same module (of which the children are then asked).
            It may change the shallow copy it is given, for that belongs to the view alone, and return it.
    """
    made: dict[int, nn.Module] = {}  # a module that stands in two places stands in both places of the view

    def of(name: str, old: nn.Module) -> nn.Module:
        if id(old) in made:
            return made[id(old)]
        own = copy.copy(old)
        for table in ("_parameters", "_buffers", "_modules"):
            setattr(own, table, dict(getattr(old, table)))
        new = replace(name, own)
        if new is None:
            new = own
            for key, child in own._modules.items():
                if child is not None:
                    own._modules[key] = of(f"{name}.{key}" if name else key, child)
        made[id(old)] = new
        return new

    return of("", module)
