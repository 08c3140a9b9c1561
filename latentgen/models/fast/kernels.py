"""Which of PyTorch's attention kernels a GPU runs, told by a table. Knows tensors, modules with processors, and torch's private names of its kernels.

PyTorch chooses by an order of its own, and lets only the whole process choose otherwise; a run of one pipeline must not change what another
thread computes, so the kernels are called by their names, which nothing outside this file may use. A table is looked up by shapes alone, never by a
clock: the same request makes the same bytes again wherever the table is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentgen.models.fast.attention import Way

if TYPE_CHECKING:
    from torch import nn

Table = Mapping[str, str]  # kind of shapes -> kernel
HEADS = (64, 128, 256)  # channels of a head, up to which a kind goes
LONG = 512  # keys, from which on they are taken for those of a picture and not of words
HALF = (torch.float16, torch.bfloat16)
aten = torch.ops.aten


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """FlashAttention 2 (Dao 2023): q (B, H, n, d); k, v (B, H, m, d) -> (B, H, n, d)."""
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[0]


def cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """cuDNN's fused attention, likewise."""
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, False, False, scale=scale)[0]


def efficient(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Memory-efficient attention (Rabe and Staats 2021), likewise."""
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, False, 0.0, False, scale=scale)[0]


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """All scores at once, by matrix products; likewise."""
    return aten._scaled_dot_product_attention_math(q, k, v, None, 0.0, False, None, scale=scale)[0]


KERNELS: Mapping[str, Way] = {"flash": flash, "cudnn": cudnn, "efficient": efficient, "math": plain}


def kinds() -> tuple[str, ...]:
    """Every kind of shapes that a table may tell about: "64 short" is heads of up to 64 channels that look at words."""
    return tuple(f"{width} {length}" for width in HEADS for length in ("short", "long"))


def kind_of(q: Tensor, k: Tensor) -> str | None:
    """The kind of q (B, H, n, d) and k (B, H, m, d); None for heads that are too wide for any table."""
    width = next((most for most in HEADS if q.shape[-1] <= most), None)
    return None if width is None else f"{width} {'short' if k.shape[-2] < LONG else 'long'}"


def takes(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a kernel is for such tensors; told by shapes, layout and dtype."""
    alike = q.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[-1] == k.shape[-1] == v.shape[-1] and q.dtype == k.dtype == v.dtype
    if kernel == "math":
        return alike
    whole = all(t.stride(-1) == 1 and not any(s % 8 for s in t.stride()[:-1]) for t in (q, k, v)) and q.shape[-1] % 8 == 0
    widest = {"flash": 256, "cudnn": 128, "efficient": 256}[kernel]
    return alike and whole and q.shape[-1] <= widest and min(q.shape[-2], k.shape[-2]) > 1 and (q.dtype in HALF or kernel == "efficient")


def by_table(table: Table, q: Tensor, k: Tensor, v: Tensor) -> Way | None:
    """The kernel that a table tells for these tensors; None for PyTorch's own choice."""
    kernel = table.get(kind_of(q, k) or "")
    return KERNELS[kernel] if kernel is not None and takes(kernel, q, k, v) else None


def attend_by(module: nn.Module, table: Table) -> nn.Module:
    """The network itself, each of whose attentions runs the kernel that the table tells, where that can take it."""
    from latentgen.models.fast.blocks import attending

    for child in module.modules():
        if hasattr(child, "processor") and hasattr(child, "set_processor"):
            child.set_processor(attending(child.processor, choose=partial(by_table, table)))
    return module
