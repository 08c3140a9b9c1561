"""Networks for a world without edges: a view in which every convolution sees, past a side of the picture, what lies at the opposite one.

Knows convolutions. Knows no family, request or device, and changes nothing of the network itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latentgen.models.view import StandIn, view


class Around(StandIn):
    """Stands for a convolution that fills up its input: fills it up with what lies at the opposite sides, and cuts off what comes of it beyond them.

    The convolution runs as it is, whatever its kind: what it fills up itself is cut off again.
    """

    def __init__(self, inner: nn.Conv2d, axes: Sequence[int]) -> None:
        super().__init__(inner)
        self.axes = tuple(axes)
        self.margins = [_margin(inner, axis) for axis in self.axes]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, c, h, w) -> what the convolution makes of the torus, of the size that it makes of x."""
        sizes = [x.shape[axis] for axis in self.axes]
        for axis, size, margin in zip(self.axes, sizes, self.margins, strict=True):
            turns = x if margin <= size else torch.cat([x] * -(-margin // size), axis)
            x = torch.cat([turns.narrow(axis, turns.shape[axis] - margin, margin), x, turns.narrow(axis, 0, margin)], axis)
        out = self.inner(x, *args, **kwargs)
        for axis, size, margin in zip(self.axes, sizes, self.margins, strict=True):
            halves = round(2 * out.shape[axis] / x.shape[axis])  # 1 where it strides by 2, 2 where it keeps the size, 4 where it doubles
            out = out.narrow(axis, margin * halves // 2, -(-size * halves // 2))
        return out


def around(network: nn.Module, axes: Sequence[int]) -> nn.Module | None:
    """A view of a network for pictures whose ends meet along `axes` (2 rows, 3 columns), None where it has no convolution that could be told so.

    What it has beside convolutions must not know places: attention of U-Nets does not, position embeddings of transformers do.
    """
    if not any(_fills_up(module) for module in network.modules()):
        return None
    return view(network, lambda name, own: Around(own, axes) if _fills_up(own) else None)


def _fills_up(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.padding not in ((0, 0), "valid")


def _margin(conv: nn.Conv2d, axis: int) -> int:
    """How far it reaches, in whole strides."""
    reach = conv.dilation[axis - 2] * (conv.kernel_size[axis - 2] // 2)
    return -(-reach // conv.stride[axis - 2]) * conv.stride[axis - 2]
