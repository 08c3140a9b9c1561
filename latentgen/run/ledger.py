"""The bytes of the tensors that are alive while code runs, their peak, and the arithmetic done. Knows torch's operators; no model, plan or device.

On paper, code runs on the meta device: every shape is computed and no number, so that what a network will need is known before its weights are read.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
META = torch.device("meta")
KINDS = ("matmul", "conv", "attention")
Workspace = Callable[[Any, tuple[Any, ...]], int]  # (operator, its arguments) -> bytes that it needs for as long as it runs


def no_workspace(operator: Any, args: tuple[Any, ...]) -> int:
    """Of operators that need nothing beside their result."""
    return 0


class Ledger(TorchDispatchMode):
    """Counts storages made while it is entered, of this thread; those from before are not its own.

    Attributes:
        live, peak: bytes now, and the most there were since `restart`.
        alike: what is said on paper to code that asks whether two tensors are equal, to spare itself the same work twice.
        flops: floating-point operations (a multiplication and an addition are two) of matrix products, convolutions and attention, by kind.
    """

    def __init__(self, *, paper: bool = False, alike: bool = True, workspace: Workspace = no_workspace) -> None:
        super().__init__()
        self.alike = alike
        self.live = self.peak = 0
        self.flops: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self.paper, self.workspace = paper, workspace
        self._known: dict[int, weakref.ref[Any]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Ledger:
        if self.paper:
            self._stack.enter_context(_FusedAttention(self))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def restart(self) -> None:
        """Count the peak from here."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if self.paper:
            if func is aten._to_copy.default and args[0].device != META and kwargs.get("device") == META:
                if kwargs.get("dtype", args[0].dtype) == args[0].dtype:
                    return args[0]
                kwargs.pop("device")  # what has numbers keeps them: masks and positions decide what is computed
            elif any(t.device == META for t in given):
                if func is aten._local_scalar_dense.default:
                    return _assumed(args[0].dtype)
                if func is aten.equal.default:
                    return self.alike
                if kwargs.get("device") is not None:
                    kwargs["device"] = META
                if any(t.device != META for t in given):
                    args, kwargs = tree_map_only(Tensor, _paper, (args, kwargs))
        out = func(*args, **kwargs)
        if self.paper and func is aten.convolution.default:
            out = _laid_out(out, args[1])
        self.note(func.overloadpacket, given, args, out)
        return out

    def note(self, operator: Any, given: list[Tensor], args: tuple[Any, ...], out: Any) -> None:
        """Write an operator's result down: new storages, arithmetic, and what it needed for a moment.

        Args:
            given: the tensors that it was called with, whose storages are not new.
        """
        if (count := FLOPS.get(operator)) is not None:
            kind, number = count(args, out)
            self.flops[kind] += number
        workspace = self.workspace(operator, args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), given)
        self.peak = max(self.peak, self.live + workspace)

    def _add(self, storage: Any, given: list[Tensor]) -> None:
        key = storage._cdata
        if key in self._known and self._known[key]() is storage:
            return
        if any(t.untyped_storage()._cdata == key for t in given):
            return  # a view of something from before
        size = storage.nbytes()

        def freed(reference: object) -> None:
            self.live -= size
            if self._known.get(key) is reference:
                del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.live += size


def _paper(t: Tensor) -> Tensor:
    return t if t.device == META else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=META)


def _laid_out(out: Tensor, weight: Tensor) -> Tensor:
    """A convolution's result as kernels lay it out: channels-last where the weights are, too, not only where the picture is."""
    last = out.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return out.contiguous(memory_format=torch.channels_last) if last and out.device == META else out


def _assumed(dtype: torch.dtype) -> bool | float | int:
    """A number where there is none: all is finite, every mask is full."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels do it: on the meta device, torch would write out the scores that no kernel keeps."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3] if len(args) >= 3 else (kwargs["query"], kwargs["key"], kwargs["value"])
        if query.device != META:
            return func(*args, **kwargs)
        *batch, heads, length, _ = query.shape
        out = query.new_empty(*batch, length, heads, value.shape[-1]).transpose(-3, -2)  # as the kernels lay it out
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        self.ledger.note(ATTENTION, [], (query, key, value, mask), out)
        return out


def _matmul(args: tuple[Any, ...], out: Tensor) -> tuple[str, float]:
    return "matmul", 2.0 * out.numel() * args[0].shape[-1]


def _added(args: tuple[Any, ...], out: Tensor) -> tuple[str, float]:
    return "matmul", 2.0 * out.numel() * args[1].shape[-1]


def _conv(args: tuple[Any, ...], out: Tensor) -> tuple[str, float]:
    weight, transposed = args[1], args[6] if len(args) > 6 else False
    spots = args[0] if transposed else out
    return "conv", 2.0 * spots.shape[0] * math.prod(spots.shape[2:]) * weight.numel()


def _sdpa(args: tuple[Any, ...], out: Any) -> tuple[str, float]:
    query, key, value = args[:3]
    return "attention", 2.0 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


ATTENTION = aten.scaled_dot_product_attention
FLOPS: dict[Any, Callable[[tuple[Any, ...], Any], tuple[str, float]]] = {
    aten.mm: _matmul, aten.bmm: _matmul, aten.linear: _matmul, aten.addmm: _added, aten.baddbmm: _added, aten.convolution: _conv,
    ATTENTION: _sdpa, aten._scaled_dot_product_flash_attention_for_cpu: _sdpa, aten._scaled_dot_product_flash_attention: _sdpa,
    aten._scaled_dot_product_efficient_attention: _sdpa, aten._scaled_dot_product_cudnn_attention: _sdpa,
}
