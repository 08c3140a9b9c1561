"""Token merging (Bolya and Hoffman 2023, ToMe for SD): self-attention of a U-Net reads the tokens that are alike as one.

Of every 2x2 tokens the first stays; of the others the share that is most like one of those is averaged into it, and given its answer back. The paper
compares tokens before their norm, this compares what attention reads. Knows U-Nets by the names of their attentions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from latentgen.models.approximate.memory import Tally
from latentgen.models.view import StandIn, view


class _Merged(StandIn):
    """Stands for a self-attention over a grid of tokens."""

    def __init__(self, inner: nn.Module, shape: tuple[int, int], ratio: float, deepest: int, tally: Tally) -> None:
        super().__init__(inner)
        self.shape, self.ratio, self.deepest, self.tally = shape, ratio, deepest, tally

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        count = hidden_states.shape[1]
        side = math.isqrt(max(1, self.shape[0] * self.shape[1] // count))  # how much smaller than the latent this grid is
        rows, columns = (-(-length // side) for length in self.shape)
        few = int(count * self.ratio)
        if rows * columns != count or rows % 2 or columns % 2 or side > self.deepest or not few:
            self.tally.count(False, count)
            return self.inner(hidden_states, *args, **kwargs)
        merge, spread = matching(hidden_states, rows, columns, few)
        merged = merge(hidden_states)
        self.tally.count(False, merged.shape[1])
        self.tally.count(True, count - merged.shape[1])
        return spread(self.inner(merged, *args, **kwargs))


def matching(tokens: Tensor, rows: int, columns: int, few: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """How `few` of (B, rows * columns, width) tokens are merged into others, and how answers are given back to all.

    Bipartite soft matching: the first of each 2x2 tokens can take others in; the rest are ranked by their largest cosine to one of those.
    """
    index = torch.arange(rows * columns, device=tokens.device).reshape(rows, columns)
    takers = index[::2, ::2].flatten()
    others = torch.cat([index[::2, 1::2].flatten(), index[1::2].flatten()])
    few = min(few, len(others))
    unit = tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    best, into = (unit[:, others] @ unit[:, takers].transpose(1, 2)).max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)[..., None]
    merged, kept = order[:, :few], order[:, few:]
    into = into[..., None].gather(1, merged)

    def picked(t: Tensor, which: Tensor) -> Tensor:
        return t.gather(1, which.expand(-1, -1, t.shape[-1]))

    def merge(t: Tensor) -> Tensor:
        source = t[:, others]
        target = t[:, takers].scatter_reduce(1, into.expand(-1, -1, t.shape[-1]), picked(source, merged), reduce="mean")
        return torch.cat([picked(source, kept), target], dim=1)

    def spread(t: Tensor) -> Tensor:
        own, target = t[:, :kept.shape[1]], t[:, kept.shape[1]:]
        made = t.new_empty(len(t), rows * columns, t.shape[-1])
        made[:, takers] = target
        source = t.new_empty(len(t), len(others), t.shape[-1])
        source.scatter_(1, kept.expand(-1, -1, t.shape[-1]), own)
        source.scatter_(1, merged.expand(-1, -1, t.shape[-1]), picked(target, into))
        made[:, others] = source
        return made

    return merge, spread


def merged(net: nn.Module, tally: Tally, *, shape: tuple[int, int], ratio: float, deepest: int) -> nn.Module:
    """A view of a U-Net whose self-attentions merge tokens.

    Args:
        shape: (h, w) of the latent.
        ratio: share of the tokens that is merged, 0 to 0.75.
        deepest: merge where the grid is at most this much smaller than the largest that has attention: 1, 2, 4 or 8.
        tally: counts tokens that self-attention reads, and those that it does not.
    """
    first = next((n for n, block in enumerate(net.down_blocks) if getattr(block, "attentions", None) is not None), 0)
    deepest *= 2**first  # each block before it halves the grid
    return view(net, lambda name, module: _Merged(module, shape, ratio, deepest, tally) if name.endswith(".attn1") else None)
