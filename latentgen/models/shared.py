"""The first layers of a network, evaluated once for both sides of guidance: until the words are heard, both compute the same.

Knows modules by their names in U-Nets and transformers, and looks, once in each run, whether the two halves of a batch really are the same.
Knows no family.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from latentgen.models.asked import Asked
from latentgen.models.view import StandIn, replaced

FIRST = ("conv_in", "x_embedder", "img_in", "pos_embed")


class Once(StandIn):
    """Stands for a module that is given the same rows several times: computes them once and repeats the answer.

    Whether they are the same is looked at for each set of conditionings when they are first heard; later calls of the run differ in level and picture
    alone, and those are the same on all sides.
    """

    def __init__(self, inner: nn.Module, asked: Asked) -> None:
        super().__init__(inner)
        self.asked = asked
        self.same: dict[tuple[Any, ...], bool] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sides, whole = self.asked.sides, len(self.asked.rows)
        each = whole // sides
        batched = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim > 1 and len(t) == whole]
        if sides == 1 or not batched:
            return self.inner(*args, **kwargs)
        if (heard := self.asked.heard) not in self.same:
            self.same[heard] = all(torch.equal(t[:each], t[n:n + each]) for t in batched for n in range(each, whole, each))
        if not self.same[heard]:
            return self.inner(*args, **kwargs)

        def one(value: Any) -> Any:
            return value[:each] if isinstance(value, Tensor) and value.ndim > 1 and len(value) == whole else value

        return _repeated(self.inner(*map(one, args), **{name: one(value) for name, value in kwargs.items()}), sides)


def _repeated(answer: Any, sides: int) -> Any:
    if isinstance(answer, tuple):
        return tuple(_repeated(each, sides) for each in answer)
    return torch.cat([answer] * sides)


def before_words(net: nn.Module) -> Iterator[str]:
    """Names of the modules that run before the network hears any words."""
    yield from (name for name in FIRST if isinstance(getattr(net, name, None), (nn.Conv2d, nn.Linear)) or hasattr(getattr(net, name, None), "proj"))
    if isinstance(blocks := getattr(net, "transformer_blocks", None), nn.ModuleList) and len(blocks) and hasattr(blocks[0], "attn1"):
        yield "transformer_blocks.0.attn1"
    for number, block in enumerate(getattr(net, "down_blocks", ())):
        attentions = getattr(block, "attentions", None)
        for layer, _ in enumerate(getattr(block, "resnets", ())):
            yield f"down_blocks.{number}.resnets.{layer}"
            if attentions is not None:
                stem = f"down_blocks.{number}.attentions.{layer}"
                yield from (f"{stem}.{name}" for name in ("norm", "proj_in", "transformer_blocks.0.norm1", "transformer_blocks.0.attn1"))
                return
        yield from (f"down_blocks.{number}.downsamplers.{n}" for n, _ in enumerate(getattr(block, "downsamplers", None) or ()))


def shared(net: nn.Module, asked: Asked) -> nn.Module:
    """A view of a network that computes what comes before the words once for all sides of guidance."""
    names = frozenset(before_words(net))
    return replaced(net, names, lambda name, module: Once(module, asked)) if names else net
