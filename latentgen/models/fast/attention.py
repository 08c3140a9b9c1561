"""Attention by plain matrix products in bf16 on a CPU, in blocks of rows where it is large. Knows tensors; knows no module and no network.

PyTorch's fused kernel for CPUs multiplies at a fifth of what oneDNN's products reach, so one head's block of scores that stays in the cache is
faster: scores, exponentials, values. Which way is taken depends on shapes alone, never on a clock: the same request must make the same bytes again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

CACHED = 2**20  # scores of a block for each thread: two megabytes, what a core keeps near
BATCHED, BLOCKS = 2**11, 2**15  # scores of a head from which all heads in one product pay, and from which blocks do
THREADS = 16  # above, PyTorch's kernel, which gives each thread heads of its own, was not measured against this
CALM = 100.0  # powers of two that neither overflow nor vanish when 2**20 of them are added up
VECTOR, WIDE = 16, 64  # sums that a product makes at once; channels of a head of which a pass over the scores is a small part
NAMES = ("query", "key", "value")
LOG2_E = math.log2(math.e)
Way = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]  # (q, k, v, scale) -> what they attend to


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v, by the faster of two ways; equal up to the rounding of q's dtype.

    Args:
        q: (B, H, n, d); k, v: (B, H, m, d).
        scale: None for 1 / sqrt(d).

    Returns:
        (B, H, n, d), laid out as (B, n, H, d), so that joining the heads costs no copy.
    """
    if has_torch_function((q, k, v)):  # a mode listens, as to torch's own functions
        return handle_torch_function(attend, (q, k, v), q, k, v, scale=scale)
    way = ways(q, k, v)
    if way is None:
        return scaled_dot_product_attention(q, k, v, scale=scale)
    return way(q, k, v, scale)


def ways(q: Tensor, k: Tensor, v: Tensor) -> Way | None:
    """What is faster than PyTorch's kernel for these shapes, if anything is.

    Measured on a CPU with AVX512-BF16 and no AMX, one thread: blocks take 0.24 to 0.5 of the kernel's time from 256 x 77 scores and 40 channels of a
    head to 4096 x 4096 and 512; one product for all heads takes 0.5 to 0.8 from 64 x 64 to 128 x 128.
    """
    if q.dtype != torch.bfloat16 or q.device.type not in ("cpu", "meta") or torch.get_num_threads() > THREADS:
        return None
    if q.ndim != 4 or q.shape[1] != k.shape[1]:
        return None
    scores = q.shape[2] * k.shape[2]
    return None if scores < BATCHED else all_heads if scores < BLOCKS else in_blocks


def all_heads(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """As `attend`, all scores at once."""
    scores = torch.matmul(q * (q.shape[-1]**-0.5 if scale is None else scale), k.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2).contiguous().transpose(1, 2)


def in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """As `attend`, block by block.

    A softmax is its exponentials over their sum; the largest score is taken off before only where it could overflow. |q| |k| bounds every score
    (Cauchy and Schwarz), and mostly tells that none can.
    """
    batch, heads, rows, channels = q.shape
    scale = channels**-0.5 if scale is None else scale
    out = torch.empty(batch, rows, heads, channels, dtype=q.dtype, device=q.device).transpose(1, 2)
    bounds = (_longest(q) * _longest(k) * (abs(scale) * LOG2_E)).tolist()
    step = _step(rows, k.shape[2])
    scores = torch.empty(step, k.shape[2], dtype=q.dtype, device=q.device)
    for n in range(batch):
        for h in range(heads):
            one, values = (_calm, _counting(v[n, h])) if bounds[n][h] <= CALM else (_plain, v[n, h])
            for first in range(0, rows, step):
                block = q[n, h, first:first + step]
                one(block, k[n, h].t(), values, scores[:len(block)], scale, out[n, h, first:first + step])
    return out


def _step(rows: int, keys: int) -> int:
    """Rows of a block."""
    return min(rows, max(32, CACHED * torch.get_num_threads() // keys // 32 * 32))


def working_bytes(q: Tensor, k: Tensor, v: Tensor) -> int:
    """What the way that these shapes go takes beside its arguments and its answer."""
    way, size = ways(q, k, v), q.element_size()
    if way is None:
        return 0
    if way is all_heads:  # two of the scores, the answer once more before it is laid out, and of several pictures the values in another order
        return size * (2 * q.shape[:3].numel() * k.shape[2] + q.numel() + (k.numel() if len(q) > 1 else 0))
    step = _step(q.shape[2], k.shape[2])
    return size * step * (2 * k.shape[2] + q.shape[3])  # where scores may be large, softmax writes them once more


def _longest(x: Tensor) -> Tensor:
    """(B, H, n, d) -> (B, H): the longest of the n vectors, float32."""
    return torch.linalg.vector_norm(x, dim=-1).amax(-1).float()


def _calm(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, scale: float, out: Tensor) -> None:
    """One block whose scores are known to be small: no maximum is looked for. v: see `_counting`."""
    torch.addmm(scores, q, k, beta=0, alpha=scale * LOG2_E, out=scores)
    torch.exp2(scores, out=scores)
    made, channels = scores @ v, out.shape[1]
    total = made[:, channels:channels + 1] if made.shape[1] > channels else scores.sum(-1, keepdim=True)
    torch.div(made[:, :channels], total, out=out)


def _counting(v: Tensor) -> Tensor:
    """(m, d) values with columns of ones after them, as many as the processor's vectors have room for: the product then adds up the scores, too.

    Measured: 40 channels take 0.88 to 0.94 of the time without; where there is no room, and from 64 channels on, it does not pay.
    """
    room = -v.shape[1] % VECTOR if v.shape[1] < WIDE else 0
    return torch.cat([v, v.new_ones(len(v), room)], 1) if room else v


def _plain(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, scale: float, out: Tensor) -> None:
    """One block of any scores."""
    torch.addmm(scores, q, k, beta=0, alpha=scale, out=scores)
    torch.mm(torch.softmax(scores, -1), v, out=out)


class Attending(TorchFunctionMode):
    """While it is entered, this thread's calls of `scaled_dot_product_attention` go to another way where that can take them.

    Args:
        choose: (q, k, v) -> the way, None for PyTorch's.
    """

    def __init__(self, choose: Callable[[Tensor, Tensor, Tensor], Way | None] = ways) -> None:
        super().__init__()
        self.choose = choose

    def __torch_function__(self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is scaled_dot_product_attention and not any(value is not None and value is not False and value != 0.0
                                                            for value in _rest(args, kwargs)):
            q, k, v = (*args[:3], *(kwargs[name] for name in NAMES[len(args):]))
            if (way := self.choose(q, k, v)) is not None:
                return attend(q, k, v, scale=kwargs.get("scale")) if self.choose is ways else way(q, k, v, kwargs.get("scale"))
        return func(*args, **kwargs)


def _rest(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call asks for beside the three tensors and the scale."""
    return [*(value is not None for value in args[3:]),
            *(value is not None if isinstance(value, Tensor) else value for name, value in kwargs.items() if name not in (*NAMES, "scale"))]
