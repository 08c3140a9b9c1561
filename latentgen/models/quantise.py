"""Weights held in 8 bits: a whole number from -127 to 127 for each, and a scale for each row of a linear. Half the memory of 16 bits, not faster.

Only the linears of blocks are held so, which are nearly all of a transformer; embeddings, norms, convolutions and the first and last layers stay as
they are. Each product makes its weights anew from the 8 bits. Knows modules and tensors; knows no family and no policy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

WAYS = ("int8",)
LEAST = 2**12  # weights of a linear that is worth it


class Int8Linear(nn.Module):
    """x (..., in) -> x W^T + b, with W = scale * weight.

    Attributes:
        weight: (out, in) int8.  scale: (out, 1) float32.  bias: (out,) or None, in the network's dtype.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", torch.empty(linear.weight.shape, dtype=torch.int8, device="meta"))
        self.register_buffer("scale", torch.empty(linear.out_features, 1, device="meta"))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """The product, in the dtype of x."""
        if x.dtype == torch.float16:  # whose sums would pass its largest number before they are scaled
            return nn.functional.linear(x, (self.weight * self.scale).to(x.dtype), self.bias)
        made = nn.functional.linear(x, self.weight.to(x.dtype)).mul_(self.scale.squeeze(1).to(x.dtype))
        return made if self.bias is None else made.add_(self.bias)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) weights -> the nearest int8 ones, (out, in), and their scales (out, 1) float32: the largest of each row is 127 of them."""
    scale = weight.abs().amax(dim=1, keepdim=True).float() / 127
    whole = torch.where(scale > 0, weight.float() / scale, 0.0)
    return whole.round().clamp(-127, 127).to(torch.int8), scale


def hold(module: nn.Module) -> frozenset[str]:
    """Put `Int8Linear` in the place of the linears of a module without numbers; the names of their weights."""
    names = list(_linears(module))
    for name in names:
        module.set_submodule(name, Int8Linear(module.get_submodule(name)))
    return frozenset(f"{name}.weight" for name in names)


def _linears(module: nn.Module) -> Iterator[str]:
    tied = {name.removesuffix(".weight") for pair in (getattr(module, "_tied_weights_keys", None) or {}).items() for name in pair} \
        if isinstance(getattr(module, "_tied_weights_keys", None), dict) else set()
    for name, child in module.named_modules():
        in_block = any(part.isdigit() for part in name.split("."))
        if type(child) is nn.Linear and in_block and child.weight.numel() >= LEAST and name not in tied:
            yield name
