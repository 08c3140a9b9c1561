"""Blocks of a network whose weights come when they are called and go after: what runs a network that is larger than the memory.

A block stays in its place, with its class, children and shapes; only its numbers are elsewhere (its parameters are on the meta device). A call fills
a copy of the block's tree for itself, so that threads may call the same block. Knows modules and tensors; knows no family and no policy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from latentgen.models.view import view

log = logging.getLogger(__name__)
LARGEST = 2**29  # bytes of a block that is read in one piece; larger ones are read by their children


def blocks(module: nn.Module, *, largest: int = LARGEST) -> tuple[str, ...]:
    """Names of the children that are worth reading one by one: members of lists, and where one of them is larger than `largest` bytes, its children.

    What lies outside of lists (embeddings, the last norm and projection) is small or needed at once, and stays.
    """
    return tuple(_blocks(module, "", largest, within=False))


def _blocks(module: nn.Module, name: str, largest: int, *, within: bool) -> Iterator[str]:
    for key, child in module.named_children():
        full, size = f"{name}.{key}" if name else key, weight_bytes(child)
        if not size:
            continue
        callable_ = not isinstance(child, (nn.ModuleList, nn.ModuleDict))
        member = within or isinstance(module, nn.ModuleList)
        if callable_ and member and (size <= largest or not any(weight_bytes(each) for each in child.children())):
            yield full
        else:
            yield from _blocks(child, full, largest, within=member)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, on whatever device."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@dataclass
class Stored:
    """The tensors of one block as they stand in their file or in main memory.

    Attributes:
        name: of the block.
        tensors: its own names -> tensors as stored.
        ready: (name, stored tensor) -> what the block computes with, by name: most times the one tensor, of a packed one its parts.
        release: told of each stored tensor after use.
        pinned: keep what `ready` made in page-locked memory, from where a GPU reads it while it computes.
    """

    name: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    ready: Callable[[str, Tensor], Mapping[str, Tensor]] = field(repr=False)
    release: Callable[[Tensor], None] = field(repr=False)
    pinned: bool = False
    _kept: dict[str, Tensor] | None = field(default=None, repr=False)
    _lock: Any = field(default_factory=Lock, repr=False)

    def numbers(self) -> dict[str, Tensor]:
        """What the block computes with, in main memory (memory-mapped where nothing of it had to be changed)."""
        if self.pinned and (kept := self._locked()) is not None:
            return kept
        return self._made()

    def _locked(self) -> dict[str, Tensor] | None:
        """The numbers in page-locked memory, made once; None where the system gives no more of it."""
        with self._lock:
            if self._kept is None and self.pinned:
                made = self._made()
                try:
                    self._kept = {name: tensor.pin_memory() for name, tensor in made.items()}
                except RuntimeError as error:
                    log.info("no page-locked memory for %s, which is read from its file each time: %s", self.name, str(error).splitlines()[0])
                    self.pinned = False
                self.done()
            return self._kept

    def _made(self) -> dict[str, Tensor]:
        numbers: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            made = self.ready(name, tensor)
            if all(t.data_ptr() != tensor.data_ptr() for t in made.values()):
                self.release(tensor)  # what was copied need not be there twice
            numbers |= made
        return numbers

    def done(self) -> None:
        """The numbers are not needed for now."""
        for tensor in self.tensors.values():
            self.release(tensor)


class Side:
    """A second stream of a GPU, on which weights come while the first one computes.

    Its memory is filled by itself alone, and only after all that was asked of the first stream until then: so what a block held may be given up as
    soon as the block was asked to run, long before it has, and two blocks are there at most, however far the host is ahead of the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def bring(self, numbers: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Copies of tensors, and what tells that they are there."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            made = {name: torch.empty_like(t, device=self.device).copy_(t, non_blocking=t.is_pinned()) for name, t in numbers.items()}
            return made, self.stream.record_event()

    def arrived(self, sent: Any) -> None:
        """Let the first stream wait for them."""
        torch.cuda.current_stream(self.device).wait_event(sent)


class Lane:
    """The way of one run's blocks to a device, one after the other; on a GPU the next one comes while this one computes, from page-locked memory
    (what lies in a file the host has to read itself). Which block follows which is learnt in the first evaluation of the network.

    Args:
        side: of a GPU, its second stream; None makes one.
    """

    def __init__(self, device: torch.device, *, side: Side | None = None) -> None:
        self.device = device
        self.side = Side(device) if side is None and device.type == "cuda" else side
        self._after: dict[int, Stored] = {}
        self._last: Stored | None = None
        self._ahead: tuple[Stored, dict[str, Tensor], Any] | None = None

    def take(self, stored: Stored) -> dict[str, Tensor]:
        """A block's tensors on the device, by the block's own names."""
        if self.side is None:
            return {name: tensor.to(self.device) for name, tensor in stored.numbers().items()}
        if self._last is not None:
            self._after[id(self._last)] = stored
        self._last, ahead, self._ahead = stored, self._ahead, None
        if ahead is None or ahead[0] is not stored:
            del ahead  # or three blocks would be there
            ahead = (stored, *self.side.bring(stored.numbers()))
        _, tensors, sent = ahead
        self.side.arrived(sent)
        if (following := self._after.get(id(stored))) is not None and following is not stored and following.pinned:
            self._ahead = (following, *self.side.bring(following.numbers()))
        return tensors

    def give(self, stored: Stored) -> None:
        """The block has run."""
        if not stored.pinned:
            stored.done()


class Streamed(nn.Module):
    """What a block becomes, together with its own class: a call brings its weights."""

    stored: Stored
    lane: Lane
    places: Mapping[int, str]  # id of a parameter or buffer without numbers -> its name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's answer, bit for bit."""
        tensors = self.lane.take(self.stored)
        body = filled(self, {key: tensors[name] for key, name in self.places.items()})
        body.__class__ = own = type(self).__mro__[2]  # of (the made class, Streamed, the block's own, ...)
        answer = own.forward(body, *args, **kwargs)  # not by a call: whoever listens to this block hears it once
        self.lane.give(self.stored)
        return answer

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """There is nothing here that could be moved."""
        return self


def filled(module: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """A copy of the tree of modules with some tensors replaced: id of a parameter or buffer -> what stands there. Nothing of the original changes."""

    def fill(_: str, own: nn.Module) -> None:
        own._parameters = {key: _parameter(tensors[id(p)]) if id(p) in tensors else p for key, p in own._parameters.items()}
        own._buffers = {key: tensors.get(id(b), b) for key, b in own._buffers.items()}

    return view(module, fill)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def stream(module: nn.Module, stored: Stored, lane: Lane) -> None:
    """Turn the child that `stored` names into a streamed block, in place; its parameters stay on the meta device."""
    block = module.get_submodule(stored.name)
    block.places = {id(t): name for name, t in (*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False))
                    if t.is_meta}
    block.stored, block.lane = stored, lane
    block.__class__ = streamed_class(type(block))


@lru_cache
def streamed_class(own: type) -> type:
    """What a block of this class becomes."""
    return type(f"Streamed{own.__name__}", (Streamed, own), {})


def on_lane(module: nn.Module, lane: Lane) -> nn.Module:
    """A view of a network with streamed blocks whose weights come by this lane: for one run."""

    def moved(_: str, own: nn.Module) -> None:
        if isinstance(own, Streamed):
            own.lane = lane

    return view(module, moved)
