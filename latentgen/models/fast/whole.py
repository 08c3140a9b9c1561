"""Linears that multiply whole numbers, with their weights packed once. Knows held linears; knows no network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentgen.models.fast import onednn
from latentgen.models.fast.layers import Kernel
from latentgen.models.quantise.held import HeldLinear
from latentgen.models.quantise.ways import Int8Dynamic


class WholeLinear(HeldLinear):
    """A held linear whose codes are packed when they are first used, and the plain ones gone then."""

    kernel: Kernel

    def forward(self, x: Tensor) -> Tensor:
        """The product, in the dtype of x."""
        return self.way.product(x, {"codes": self.kernel.get(None, onednn.pack_whole), "scale": self.scale}, self.bias)  # type: ignore[dict-item]


def pack_whole(module: nn.Module, *, device: torch.device) -> None:
    """Turn the linears of a network that multiply whole numbers into their packed kind, in place, where it will run on a CPU that has it."""
    held = [m for m in module.modules() if type(m) is HeldLinear and isinstance(m.way, Int8Dynamic)]
    if not held or device.type != "cpu" or not onednn.whole_available():
        return
    for linear in held:
        if linear.scale.is_meta:  # streamed, or on paper
            continue
        linear.kernel = Kernel(linear._buffers.pop("codes"))  # type: ignore[arg-type]
        linear.__class__ = WholeLinear
