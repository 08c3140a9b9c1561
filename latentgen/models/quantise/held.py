"""Linears of a network whose weights are held packed. Knows modules and ways; knows no family and no policy.

Only the linears of blocks are packed, which are nearly all of a transformer; embeddings, norms, convolutions and the first and last layers stay as
they are. What a file has packed stays so wherever it is the weight of a linear. Each product makes its weights anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from latentgen.models.quantise.packed import Packed
from latentgen.models.quantise.ways import STORED, WAYS, Fp8, Packing, Parts, Way, fits

LEAST = 2**12  # weights of a linear that is worth it


class HeldLinear(nn.Module):
    """x (..., in) -> x W^T + b, with W as its way makes it of buffers, each (out, ...).

    Args:
        linear: what it stands for, without numbers.
        parts: likewise.
        dtype: of the network.
    """

    def __init__(self, linear: nn.Linear, way: Way, parts: Parts, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.way, self.dtype, self.bias = way, dtype, linear.bias
        for name, part in parts.items():
            self.register_buffer(name, part)

    @property
    def weight(self) -> Tensor:
        """Tells shape, dtype and device; its numbers mean nothing."""
        return torch.empty((), dtype=self.dtype, device=next(self.buffers()).device).expand(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """The product, in the dtype of x."""
        return self.way.product(x, self._buffers, self.bias)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """As of a linear, with its way."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.way.name}"


def hold(module: nn.Module, wanted: str | None, tensors: Mapping[str, Tensor], dtype_of: Callable[[str], torch.dtype]) -> dict[str, Way]:
    """Put `HeldLinear` in the place of linears of a module without numbers.

    Args:
        wanted: a name of `WAYS`, "stored" for what the file has packed, or None for nothing.
        tensors: the part's tensors by the module's names, for what the file has packed.
        dtype_of: name of a weight -> in which it computes.

    Returns:
        Name of a weight -> how it is held.
    """
    found = dict(_chosen(module, wanted, tensors)) if wanted is not None else {}
    for name, way in found.items():
        linear, tensor = module.get_submodule(name), tensors.get(f"{name}.weight")
        if isinstance(tensor, Packed) and tensor.way == way:
            parts: Parts = tensor.without_numbers().parts
        else:
            outline = _outline(way, linear.weight.shape)  # type: ignore[arg-type]
            parts = {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape, dtype in outline}
        module.set_submodule(name, HeldLinear(linear, way, parts, dtype_of(f"{name}.weight")))  # type: ignore[arg-type]
    return {f"{name}.weight": way for name, way in found.items()}


@lru_cache
def _outline(way: Packing, shape: torch.Size) -> tuple[tuple[str, torch.Size, torch.dtype], ...]:
    """Name, shape and dtype of what a weight of that shape is packed into."""
    return tuple((key, part.shape, part.dtype) for key, part in way.pack(torch.empty(shape, device="meta")).items())


def _chosen(module: nn.Module, wanted: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Way]]:
    keys = getattr(module, "_tied_weights_keys", None)
    tied = {name.removesuffix(".weight") for pair in (keys.items() if isinstance(keys, Mapping) else ()) for name in pair}
    for name, child in module.named_modules():
        if type(child) is not nn.Linear or name in tied:
            continue
        tensor = tensors.get(f"{name}.weight")
        own = tensor.way if isinstance(tensor, Packed) else None
        in_block = any(part.isdigit() for part in name.split("."))
        if own is not None and (wanted == STORED or wanted == own.name and isinstance(own, Fp8)):
            yield name, own
        elif wanted != STORED and in_block and child.weight.numel() >= LEAST and fits(WAYS[wanted], child.in_features):
            yield name, WAYS[wanted]

