"""The blocks of a transformer as one stack, of which a call may leave some out: first-block cache, a cache like TeaCache, and TaylorSeer.

What is left out is replaced by the change that the blocks made before: x + (what the stack gave - x), as it was, or as a polynomial in time
foretells.
Knows blocks by the names of their streams; knows no family, prompt or sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from latentgen.models.approximate.memory import Memory, Tally
from latentgen.models.asked import Asked
from latentgen.models.view import Ended, StandIn, ending, view

LISTS = ("transformer_blocks", "single_transformer_blocks", "layers")  # lists of blocks, in the order in which a network runs them
ATTENTION = ("attn", "attn1", "attention")
Streams = tuple[Tensor, Tensor | None]  # the picture's tokens, and the words' where they are a stream beside it


class Rule(Protocol):
    """When a call leaves blocks out. One for each set of rows; it may keep what it likes.

    Attributes:
        keeps_first: the first block runs in every call, and changes are counted from what it gives.
    """

    keeps_first: bool

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether all blocks are left out; asked with the first block and its arguments."""

    def after(self, change: Tensor) -> bool:
        """Whether all blocks but the first are left out; a rule that keeps it is asked with what it changed."""

    def learn(self, change: Tensor) -> None:
        """What the blocks that may be left out changed, when they were all run."""

    def tell(self) -> Tensor:
        """What they would have changed now."""


@dataclass
class _Call:
    """The call under way: whether blocks are left out, and what the stack's answer is counted from."""

    rule: Rule
    skipping: bool = False
    base: Streams = field(default_factory=lambda: (torch.empty(0), None))


def block_names(net: nn.Module) -> list[str]:
    """Names of a transformer's blocks in the order in which they run; empty for another network."""
    return [f"{name}.{n}" for name in LISTS if isinstance(getattr(net, name, None), nn.ModuleList) for n, _ in enumerate(getattr(net, name))]


def skipping(net: nn.Module, asked: Asked, rule: Callable[[], Rule], tally: Tally) -> nn.Module:
    """A view of a transformer whose blocks are run as a rule says.

    Args:
        rule: makes the rule of one set of rows.
        tally: counts the blocks.
    """
    names = block_names(net)
    links = {name: n for n, name in enumerate(names)}
    stack = _Stack(Memory(asked, rule), len(names) - 1, tally)
    return view(net, lambda name, module: _Link(module, stack, links[name]) if name in links else None)


class _Stack:
    """What the links of one view share."""

    def __init__(self, memory: Memory[Rule], last: int, tally: Tally) -> None:
        self.memory, self.last, self.tally = memory, last, tally
        self.call: _Call | None = None


class _Link(StandIn):
    """Stands for one block."""

    def __init__(self, inner: nn.Module, stack: _Stack, number: int) -> None:
        super().__init__(inner)
        self.stack, self.number = stack, number
        self.joint = False  # whether the block answers with both streams

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stack, came = self.stack, _streams(args, kwargs)
        if self.number == 0:
            stack.call = _Call(stack.memory.now(), base=came)
            stack.call.skipping = stack.call.rule.before(self.inner, args, kwargs)
        call = stack.call
        assert call is not None
        stack.tally.count(call.skipping)
        if call.skipping:
            hidden, words = came
        else:
            answer = self.inner(*args, **kwargs)
            self.joint = isinstance(answer, tuple)
            words, hidden = answer if self.joint else (came[1], answer)
        if self.number == 0 and not call.skipping:
            if call.rule.keeps_first:
                call.skipping, call.base = call.rule.after(hidden - came[0]), (hidden, words)
        if self.number == stack.last:
            hidden = self.finished(call, hidden)
        return (words, hidden) if self.joint else hidden

    def finished(self, call: _Call, hidden: Tensor) -> Tensor:
        """What the stack gives: counted from its base where blocks were left out, else as it is, and learnt from."""
        if call.skipping:
            return hidden + call.rule.tell()
        base, words = call.base
        if hidden.shape != base.shape and words is not None:  # the two streams became one on the way
            base = torch.cat([words, base], dim=1)
        call.rule.learn(hidden - base)
        return hidden


def _streams(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
    return (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]), kwargs.get("encoder_hidden_states")


class _Last:
    """Of rules that tell again what the blocks changed when they last ran."""

    change: Tensor | None = None

    def learn(self, change: Tensor) -> None:
        self.change = change

    def tell(self) -> Tensor:
        assert self.change is not None
        return self.change


@dataclass
class Steady(_Last):
    """First-block cache: where the first block changes its input nearly as it did when all blocks last ran, the others are taken to do so, too.

    Attributes:
        threshold: mean absolute difference of the two changes, over the mean size of the older one, under which the rest is left out.
    """

    threshold: float
    keeps_first = True
    seen: Tensor | None = None

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return False

    def after(self, change: Tensor) -> bool:
        if self.change is not None and self.seen is not None and distance(change, self.seen) < self.threshold:
            return True
        self.seen = change
        return False


@dataclass
class Drifting(_Last):
    """Like TeaCache (Liu et al. 2024): the stack is left out until what the first block's attention reads has drifted far enough, step by step.

    Attributes:
        threshold: sum of the relative differences from call to call at which the blocks are run again.
    """

    threshold: float
    keeps_first = False
    seen: Tensor | None = None
    drift: float = 0.0

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        read = read_by_attention(block, args, kwargs)
        self.drift += distance(read, self.seen) if self.seen is not None else 0.0
        self.seen = read
        if self.change is not None and self.drift < self.threshold:
            return True
        self.drift = 0.0
        return False

    def after(self, change: Tensor) -> bool:
        return False


@dataclass
class Foretold:
    """TaylorSeer (Liu et al. 2025, eq. 4 to 6): the blocks run in every `interval`-th call, and between them a Taylor polynomial in time foretells.

    Attributes:
        asked: tells the time of the call.
        interval: 1 leaves nothing out. order: of the polynomial, 0 for what was. warmup: first calls that all run.
    """

    asked: Asked
    interval: int
    order: int
    warmup: int
    keeps_first = False
    calls: int = 0
    time: float = 0.0
    terms: tuple[Tensor, ...] = ()  # the change and its derivatives by time, as differences tell them

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        self.calls += 1
        return self.calls > self.warmup and (self.calls - max(self.warmup, 1)) % self.interval != 0 and bool(self.terms)

    def after(self, change: Tensor) -> bool:
        return False

    def learn(self, change: Tensor) -> None:
        step = self._time() - self.time
        terms = [change]
        if step:  # at the same time once more, the slopes stay
            for old in self.terms[:self.order]:
                terms.append((terms[-1] - old) / step)
        else:
            terms += self.terms[1:]
        self.terms, self.time = tuple(terms), self._time()

    def tell(self) -> Tensor:
        step, made, factor = self._time() - self.time, self.terms[0], 1.0
        for n, term in enumerate(self.terms[1:], start=1):
            factor *= step / n
            made = made + factor * term
        return made

    def _time(self) -> float:
        return self.asked.level.time if self.asked.level is not None else float(self.calls)


def distance(new: Tensor, old: Tensor) -> float:
    """Mean absolute difference over the mean size of the old, by rows, the largest of them. Infinite where that has no meaning."""
    def mean(t: Tensor) -> Tensor:
        return t.abs().flatten(1).float().mean(dim=1)

    found = float((mean(new - old) / mean(old)).max()) if new.shape == old.shape else float("inf")
    return found if found == found else float("inf")


def read_by_attention(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a block's attention would read, normed and modulated by the level: the block is run up to there."""
    name = next(name for name, _ in block.named_modules() if name.rpartition(".")[2] in ATTENTION)
    try:
        ending(block, name, lambda attention, *args, **kwargs: _streams(args, kwargs)[0])(*args, **kwargs)
    except Ended as ended:
        return ended.answer
    raise AssertionError("a block that never calls its attention")
