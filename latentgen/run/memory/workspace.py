"""What operators need for a moment beside their arguments and results. Knows the kernels of devices by measurement; no model and no plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentgen.models.fast import onednn
from latentgen.models.fast.attention import working_bytes
from latentgen.run.memory.ledger import ATTENTION, BLOCKED

aten = torch.ops.aten


def on_cpu(operator: Any, args: tuple[Any, ...]) -> int:
    """oneDNN lays out anew what it convolves if that is not channels-last, and its weights; attention wants numbers in the place of a yes-or-no mask.

    Measured with torch 2.15: a convolution of a contiguous picture took one more copy of it, one of a channels-last
    picture 1 to 9 MB; fused attention took nothing, and with a mask of booleans the mask in the dtype of the queries. Packed weights are in order,
    and what is multiplied by them is copied where it is not.
    """
    if (found := onednn.products().get(operator)) is not None:
        return _in_order(args[0], found[0])
    if operator is BLOCKED:
        return working_bytes(*args[:3])
    if operator is aten.convolution:
        return _convolution(args[0], args[1])
    if operator is ATTENTION:
        return _mask(args)
    return 0


def on_gpu(operator: Any, args: tuple[Any, ...]) -> int:
    """cuDNN is given what its heuristics ask for, bounded here by a copy of the picture; attention as on the CPU."""
    if operator is aten.convolution:
        return _convolution(args[0], args[1])
    return _mask(args) if operator is ATTENTION else 0


def _convolution(x: Tensor, weight: Tensor) -> int:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return _bytes(weight) + (0 if last else _bytes(x))


def _in_order(x: Tensor, kind: str) -> int:
    return 0 if x.is_contiguous(memory_format=torch.contiguous_format if kind == "linear" else torch.channels_last) else _bytes(x)


def _mask(args: tuple[Any, ...]) -> int:
    query, mask = args[0], args[3] if len(args) > 3 else None
    return mask.numel() * query.element_size() if isinstance(mask, Tensor) and mask.dtype == torch.bool else 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
