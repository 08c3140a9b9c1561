"""Views of a network: the same parameters with some modules replaced, for one run, while the network itself stays as it is for every other.

Knows modules. Knows no family, request or device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

from torch import nn


def view(module: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """A copy of the tree of modules that shares every parameter, buffer and untouched attribute with it: no weight is copied, nothing of the original
    changes.

    Where the original is moved or released, so is the view: make one for each run, inside the block that holds the original.

    Args:
        replace: (dotted name, module) -> what stands there in the view, or None for the same module (of which the children are then asked).
            It may change the shallow copy it is given, for that belongs to the view alone, and return it.
    """
    return _viewed("", module, replace, {}, None)


def replaced(module: nn.Module, names: Collection[str], make: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """A view in which other modules stand in some places. What has none of them below it stands in the view itself: so it costs next to nothing.

    Args:
        names: dotted names of the places.
        make: (dotted name, shallow copy of the module there) -> what stands there in the view.
    """
    above = {name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1)}
    return _viewed("", module, lambda name, own: make(name, own) if name in names else None, {}, above | {"", *names})


def _viewed(name: str, old: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None], made: dict[int, nn.Module],
            asked: Collection[str] | None) -> nn.Module:
    """A function of the file, for one inside `view` would call itself by a name that holds all it made: a view would not go with its last user.

    Args:
        made: id of a module -> what stands for it: a module that stands in two places stands in both places of the view.
        asked: names of the modules that are copied, None for all.
    """
    if id(old) in made:
        return made[id(old)]
    if asked is not None and name not in asked:
        return old
    own = copy.copy(old)
    for table in ("_parameters", "_buffers", "_modules"):
        setattr(own, table, dict(getattr(old, table)))
    if getattr(own, "_compiled_call_impl", None) is not None:
        own._compiled_call_impl = None  # it would call the original
    new = replace(name, own)
    if new is None:
        new = own
        for key, child in own._modules.items():
            if child is not None:
                own._modules[key] = _viewed(f"{name}.{key}" if name else key, child, replace, made, asked)
    made[id(old)] = new
    return new


class StandIn(nn.Module):
    """Stands in a view for a module; what it does not have itself, it has of that module, so that a network may go on looking at it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own answer."""
        return self.inner(*args, **kwargs)


class Ended(Exception):
    """Leaves a network that was asked for one module's sake.

    Attributes:
        answer: what was wanted.
    """

    def __init__(self, answer: Any) -> None:
        super().__init__("the network was asked for one of its modules only")
        self.answer = answer


class _End(StandIn):
    def __init__(self, inner: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__(inner)
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise Ended(self.answer(self.inner, *args, **kwargs))


def ending(module: nn.Module, at: str, answer: Callable[..., Any]) -> nn.Module:
    """A view whose every call ends where the child `at` is called: it raises `Ended(answer(that child, its arguments))`."""
    return replaced(module, {at}, lambda name, child: _End(child, answer))
