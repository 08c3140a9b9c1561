"""oneDNN's packed weights and fused epilogues, behind names of our own. Knows tensors; knows no module.

torch.compile's CPU backend calls the same operators; their names are private, so nothing outside this file may use them, and `available` tries
every one of them: where one fails, networks stay as they were loaded. Results are those of the plain operators up to the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Act = Literal["none", "relu", "gelu", "gelu_tanh", "silu"]
ACTS = {"none": ("none", ""), "relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}


class Window(NamedTuple):
    """How a kernel moves over an image: entries along height and width."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


@lru_cache
def available() -> bool:
    """Whether this torch and this processor have packed bf16 products."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        x, y = torch.zeros(1, 2, dtype=torch.bfloat16), torch.zeros(1, 4, dtype=torch.bfloat16)
        packed = pack_linear(torch.zeros(4, 2, dtype=torch.bfloat16))
        linear(x, packed, None, act="gelu"), linear_with(x, y, packed, None, "mul")
        image = torch.zeros(1, 2, 3, 3, dtype=torch.bfloat16)
        kernel = pack_convolution(torch.zeros(4, 2, 1, 1, dtype=torch.bfloat16), Window(), image.shape)
        order(kernel), unpacked(kernel)
        convolution(image, kernel, None, Window(), act="silu")
        convolution_plus(image, torch.zeros(1, 4, 3, 3, dtype=torch.bfloat16), kernel, None, Window(), act="relu")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


def pack_linear(weight: Tensor) -> Tensor:
    """(out, in) weights in the order in which this processor reads them for many rows; opaque, of the same bytes."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, *, act: Act = "none") -> Tensor:
    """act(x W^T + b): x (..., in) -> (..., out), contiguous."""
    name, rule = ACTS[act]
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], rule)


def linear_with(x: Tensor, other: Tensor, packed: Tensor, bias: Tensor | None, how: Literal["add", "mul"]) -> Tensor:
    """x W^T + b, plus or times `other` (..., out)."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, bias, how)


def pack_convolution(weight: Tensor, at: Window, size: Sequence[int]) -> Tensor:
    """(out, in, h, w) weights of one group in the order in which this processor reads them for pictures of `size` (B, in, H, W); opaque.

    In the order of another size a convolution may be reordered in each call, and run a hundred times slower.
    """
    return torch.ops.mkldnn._reorder_convolution_weight(weight.contiguous(memory_format=torch.channels_last), at.padding, at.stride, at.dilation, 1,
                                                        list(size))


def order(packed: Tensor) -> bytes:
    """What tells one order of a packed weight from another."""
    return torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes()


def unpacked(packed: Tensor) -> Tensor:
    """The plain weight."""
    return packed.to_dense()


def convolution(x: Tensor, packed: Tensor, bias: Tensor | None, at: Window, *, act: Act = "none") -> Tensor:
    """act(x * W + b) of images x (B, in, H, W), channels-last where x is."""
    name, rule = ACTS[act]
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, at.padding, at.stride, at.dilation, 1, name, [], rule)


def convolution_plus(x: Tensor, other: Tensor, packed: Tensor, bias: Tensor | None, at: Window, *, act: Literal["none", "relu"] = "none") -> Tensor:
    """act(x * W + b + other), `other` of the result's shape."""
    then = None if act == "none" else act
    return torch.ops.mkldnn._convolution_pointwise.binary(x, other, packed, bias, at.padding, at.stride, at.dilation, 1, "add", None, then, [], None)


def on_paper() -> Mapping[Any, Callable[..., Tensor]]:
    """What these operators give for tensors with shapes and no numbers: operator -> a function of its arguments. {} where there are none."""
    if not available():
        return {}
    ops = torch.ops.mkldnn
    return {ops._reorder_linear_weight.default: _packed_on_paper, ops._reorder_convolution_weight.default: _packed_on_paper,
            ops._get_mkldnn_serialized_md.default: lambda packed: _order(*packed.how),
            ops._linear_pointwise.binary: lambda x, other, *_: other.new_empty(other.shape),
            ops._convolution_pointwise.binary: lambda x, other, *_: torch.empty_like(other, memory_format=torch.channels_last)}


@lru_cache
def products() -> Mapping[Any, tuple[str, int]]:
    """Those that multiply: operator -> "linear" or "convolution", and the place of the weight among its arguments."""
    if not available():
        return {}
    ops = torch.ops.mkldnn
    return {ops._linear_pointwise.default: ("linear", 1), ops._linear_pointwise.binary: ("linear", 2),
            ops._convolution_pointwise.default: ("convolution", 1), ops._convolution_pointwise.binary: ("convolution", 2)}


def packings() -> frozenset[Any]:
    """Those that pack a weight."""
    ops = torch.ops.mkldnn
    return frozenset((ops._reorder_linear_weight.default, ops._reorder_convolution_weight.default)) if available() else frozenset()


def _packed_on_paper(weight: Tensor, *how: Any) -> Tensor:
    made = torch.empty_like(weight, memory_format=torch.contiguous_format)
    made.how = (len(how) > 1, weight.shape, weight.dtype,  # type: ignore[attr-defined]
                *(tuple(each) if isinstance(each, (list, tuple)) else each for each in how))
    return made


@lru_cache(256)
def _order(image: bool, shape: tuple[int, ...], dtype: torch.dtype, *how: Any) -> Tensor:
    """Asked of oneDNN itself, with weights of that shape: what it takes hangs on the processor."""
    ops, weight = torch.ops.mkldnn, torch.empty(shape, dtype=dtype)
    if not image:
        return ops._get_mkldnn_serialized_md(ops._reorder_linear_weight(weight, *how))
    return ops._get_mkldnn_serialized_md(ops._reorder_convolution_weight(weight.contiguous(memory_format=torch.channels_last), *how))


@lru_cache
def whole_available() -> bool:
    """Whether this torch and this processor have products of whole numbers with exact sums (some processors clip pairs of products at 16 bits)."""
    codes, tokens = torch.full((4, 64), 127, dtype=torch.int8), torch.full((3, 64), 255, dtype=torch.uint8)
    try:
        return bool((whole_linear(tokens, pack_whole(codes), torch.ones(4)) == 64 * 127 * 127).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


def pack_whole(codes: Tensor) -> Tensor:
    """(out, in) int8 in the order in which this processor reads them; opaque, of the same bytes."""
    return torch.ops.onednn.qlinear_prepack(codes, None)


def whole_linear(tokens: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Whole numbers (n, in), each 128 more than it stands for, as uint8, by packed ones and the scale (out,) of their rows: (n, out) float32."""
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(tokens, 1.0, 128, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")
