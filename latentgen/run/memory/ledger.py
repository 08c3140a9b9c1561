"""The bytes of the tensors that are alive while code runs, their peak, and the work done. Knows torch's operators and those of packed layers; no
model, plan or device.

On paper, code runs on the meta device: every shape is computed and no number, so that what a network will need is known before its weights are read.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from latentgen.models.fast import onednn
from latentgen.models.fast.attention import all_heads, attend, ways

aten = torch.ops.aten
META = torch.device("meta")
ARITHMETIC = ("matmul", "conv", "attention", "packed matmul", "packed conv", "blocked attention")  # floating-point operations
ATTENTIONS = ("attention", "blocked attention")  # beside which scores, that each have an exponential, and heads are counted
BYTES = ("weights", "near", "far")  # of products; and what all other operators read and write, in tensors that a cache holds and in larger ones
CALLS = ("products", "packed products", "operators")  # operators of each sort, the last all that are no products
KINDS = (*ARITHMETIC, *(f"{name} {what}" for name in ATTENTIONS for what in ("scores", "heads")), *BYTES, *CALLS)
NEAR = 2**25  # bytes of an operator's tensors that stay in a cache
Workspace = Callable[[Any, tuple[Any, ...]], int]  # (operator, its arguments) -> bytes that it needs for as long as it runs


def no_workspace(operator: Any, args: tuple[Any, ...]) -> int:
    """Of operators that need nothing beside their result."""
    return 0


class Ledger(TorchDispatchMode):
    """Counts storages made while it is entered, of this thread; those from before are not its own.

    Attributes:
        live, peak: bytes now, and the most there were since `restart`.
        alike: what is said on paper to code that asks whether two tensors are equal, to spare itself the same work twice.
        work: of matrix products, convolutions and attention, by kind, floating-point operations (a multiplication and an addition are two), and
            what `KINDS` has beside.
    """

    def __init__(self, *, paper: bool = False, alike: bool = True, workspace: Workspace = no_workspace) -> None:
        super().__init__()
        self.alike = alike
        self.live = self.peak = 0
        self.work: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self.paper, self.workspace = paper, workspace
        self._multiplies = {operator: _packed(at, kind) for operator, (kind, at) in onednn.products().items()}
        self._on_paper: Mapping[Any, Callable[..., Any]] = onednn.on_paper() if paper else {}
        self._known: dict[int, weakref.ref[Any]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Ledger:
        if self.paper:
            self._stack.enter_context(_Attention(self))
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
        made = func
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
                made = self._on_paper.get(func, func)
        out = made(*args, **kwargs)
        if self.paper and func is aten.convolution.default:
            out = _laid_out(out, args[1])
        self.note(func if func.namespace == "mkldnn" else func.overloadpacket, given, args, out)
        return out

    def note(self, operator: Any, given: list[Tensor], args: tuple[Any, ...], out: Any) -> None:
        """Write an operator's result down: new storages, work, and what it needed for a moment.

        Args:
            given: the tensors that it was called with, whose storages are not new.
        """
        workspace, given = self.workspace(operator, args), [t for t in given if t.layout == torch.strided]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.layout == torch.strided]  # what is packed in numbers is opaque
        if (count := FLOPS.get(operator) or self._multiplies.get(operator)) is not None:
            self._multiplied(*count(args, out), args)
        elif operator not in IDLE:
            moved = 0 if all(_is_view(t, given) for t in made) else sum(t.numel() * t.element_size() for t in (*given, *made))
            self.work["near" if moved < NEAR else "far"] += moved
            self.work["operators"] += 1
        for tensor in made:
            self._add(tensor.untyped_storage(), given)
        self.peak = max(self.peak, self.live + workspace)

    def _multiplied(self, kind: str, number: float, args: tuple[Any, ...]) -> None:
        self.work[kind] += number
        self.work["packed products" if kind.startswith("packed") else "products"] += 1
        if kind in ATTENTIONS:
            self.work[f"{kind} scores"] += args[0].shape[:-1].numel() * args[1].shape[-2]
            self.work[f"{kind} heads"] += 1 if kind != "attention" and ways(*args[:3]) is all_heads else args[0].shape[:-2].numel()
        else:
            self.work["weights"] += min(t.numel() * t.element_size() for t in args[:3] if isinstance(t, Tensor) and t.ndim > 1)

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


def _is_view(tensor: Tensor, given: list[Tensor]) -> bool:
    """Whether nothing was computed: other strides of a tensor that was there. What is changed in place has the same ones."""
    return any(tensor is not t and tensor.untyped_storage()._cdata == t.untyped_storage()._cdata for t in given)


class _Attention(TorchFunctionMode):
    """Attention as fused kernels do it: on the meta device, torch would write out the scores that no kernel keeps. And as `attend` does."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (scaled_dot_product_attention, attend):
            return func(*args, **kwargs)
        query, key, value = args[:3] if len(args) >= 3 else (kwargs["query"], kwargs["key"], kwargs["value"])
        if query.device != META:
            return func(*args, **kwargs)
        *batch, heads, length, _ = query.shape
        out = query.new_empty(*batch, length, heads, value.shape[-1]).transpose(-3, -2)  # as the kernels lay it out
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        self.ledger.note(BLOCKED if func is attend and ways(query, key, value) is not None else ATTENTION, [], (query, key, value, mask), out)
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


def _blocked(args: tuple[Any, ...], out: Any) -> tuple[str, float]:
    return "blocked attention", _sdpa(args, out)[1]


def _packed(at: int, kind: str) -> Callable[[tuple[Any, ...], Tensor], tuple[str, float]]:
    """Of a packed product whose weight is argument `at`."""
    def linear(args: tuple[Any, ...], out: Tensor) -> tuple[str, float]:
        return "packed matmul", 2.0 * out.numel() * args[at].shape[1]

    def convolution(args: tuple[Any, ...], out: Tensor) -> tuple[str, float]:
        return "packed conv", 2.0 * out.numel() * args[at].shape[1:].numel()

    return linear if kind == "linear" else convolution


ATTENTION, BLOCKED = aten.scaled_dot_product_attention, attend
IDLE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,  # nothing is computed
        *onednn.packings()}  # once for all runs
FLOPS: dict[Any, Callable[[tuple[Any, ...], Any], tuple[str, float]]] = {
    aten.mm: _matmul, aten.bmm: _matmul, aten.linear: _matmul, aten.addmm: _added, aten.baddbmm: _added, aten.convolution: _conv,
    ATTENTION: _sdpa, BLOCKED: _blocked, aten._scaled_dot_product_flash_attention_for_cpu: _sdpa, aten._scaled_dot_product_flash_attention: _sdpa,
    aten._scaled_dot_product_efficient_attention: _sdpa, aten._scaled_dot_product_cudnn_attention: _sdpa,
}
