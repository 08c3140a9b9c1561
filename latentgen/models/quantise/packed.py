"""Weights as a file has them packed: tensors whose rows can be cut and joined as they are, and which are unpacked for everything else.

So what renames and splits the weights of a file need not know that they are packed. Knows tensors and the blocks of ggml; opens no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from latentgen.models.cast import NotFinite
from latentgen.models.gguf_header import BLOCKS
from latentgen.models.quantise.ways import Parts, Way

aten = torch.ops.aten
CUTS = (aten.split.Tensor, aten.split_with_sizes.default)
SAME = (aten.detach.default, aten.alias.default, aten.clone.default)


@dataclass(frozen=True)
class Ggml(Way):
    """Blocks of ggml along each row, unpacked by the functions of diffusers, in float32.

    Attributes:
        kind: "Q4_K", ... as in `latentgen.models.gguf_header.TYPES`.
    """

    kind: str

    @property
    def name(self) -> str:  # type: ignore[override]
        """As the file calls it."""
        return self.kind

    def some(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        import gguf
        from diffusers.quantizers.gguf.utils import dequantize_functions

        codes, (numbers, width, _) = parts["codes"], BLOCKS[self.kind]
        unpack = dequantize_functions[gguf.GGMLQuantizationType[self.kind]]
        return unpack(codes.reshape(-1, width), numbers, width, torch.float32).to(dtype).reshape(len(codes), -1)

    def check(self, parts: Parts) -> None:
        _, width, scales = BLOCKS[self.kind]
        if not bool(torch.isfinite(parts["codes"].reshape(-1, width)[:, slice(*scales)].contiguous().view(torch.float16)).all()):
            raise NotFinite


class Packed(Tensor):
    """Stands for a weight (out, in) in float32 and holds its parts.

    Attributes:
        way: how they are to be read.
        parts: name -> (out, ...).
    """

    way: Way
    parts: Parts

    @staticmethod
    def __new__(cls, way: Way, parts: Parts, shape: Sequence[int]) -> Packed:
        # type: ignore[attr-defined]
        made = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=torch.float32, device=next(iter(parts.values())).device)
        made.way, made.parts = way, dict(parts)
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __repr__(self, **_: Any) -> str:
        return f"Packed({self.way.name}, {tuple(self.shape)})"

    def checked(self, check: bool = True) -> Packed:
        """Itself. Raises NotFinite for numbers that are none, where `check` has it look."""
        if check and not self.is_meta:
            self.way.check(self.parts)
        return self

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight in plain numbers."""
        return self.way.unpack(self.parts, dtype)

    def without_numbers(self) -> Packed:
        """The same on the meta device."""
        return Packed(self.way, {name: torch.empty(part.shape, dtype=part.dtype, device="meta") for name, part in self.parts.items()}, self.shape)

    def data_ptr(self) -> int:
        """Where its first part begins."""
        return next(iter(self.parts.values())).data_ptr()

    def _with(self, parts: Parts) -> Packed:
        return Packed(self.way, parts, (len(next(iter(parts.values()))), *self.shape[1:]))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first, rest = args[0], args[1:]
        if func in SAME:
            return first._with(first.parts)
        if func in CUTS and isinstance(first, Packed) and _by_rows(args, kwargs, 2):
            cut = {name: func(part, *rest) for name, part in first.parts.items()}
            return [first._with(dict(zip(cut, each, strict=True))) for each in zip(*cut.values(), strict=True)]
        if func is aten.slice.Tensor and _by_rows(args, kwargs, 1) and (len(args) < 5 or args[4] == 1):
            return first._with({name: func(part, *rest) for name, part in first.parts.items()})
        if func is aten.cat.default and _by_rows(args, kwargs, 1) and all(isinstance(each, Packed) and each.way == first[0].way for each in first):
            return first[0]._with({name: torch.cat([each.parts[name] for each in first]) for name in first[0].parts})
        args, kwargs = tree_map_only(Packed, lambda each: each.unpacked(torch.float32), (args, kwargs or {}))
        return func(*args, **kwargs)


def _by_rows(args: Sequence[Any], kwargs: Mapping[str, Any] | None, at: int) -> bool:
    """Whether the axis, argument `at` of an operator, is the first."""
    return not kwargs and (len(args) <= at or args[at] == 0)


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that a tensor consists of."""
    return tuple(tensor.parts.values()) if isinstance(tensor, Packed) else (tensor,)
