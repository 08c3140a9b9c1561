"""How a part keeps its tensors: in which dtype and order of memory, and that they are finite. Knows tensors and messages; knows no file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from latentgen.errors import ModelError
from latentgen.models.cast import NotFinite, check_finite, recast
from latentgen.models.quantise.packed import Packed
from latentgen.models.quantise.ways import Packing, Parts, Way

ALIGNED = 64  # bytes, as torch allocates


@dataclass(frozen=True)
class Form:
    """How a part keeps its tensors.

    Attributes:
        label: of the part, for messages.
        precise: names of modules that stay in float32.
        images: its convolutions are in channels-last.
        floating: names of what must be floating-point numbers.
        held: names of weights of linears that are packed, and how (see `models.quantise.held`).
    """

    label: str
    dtype: torch.dtype
    precise: tuple[str, ...]
    images: bool
    floating: frozenset[str] = frozenset()
    held: Mapping[str, Way] = field(default_factory=dict)

    def dtype_of(self, name: str) -> torch.dtype:
        """In which a tensor of that name is."""
        return torch.float32 if any(k in name.split(".") for k in self.precise) else self.dtype

    def kept(self, name: str, tensor: Tensor, *, check: bool = True) -> Tensor:
        """A tensor as the part keeps it. Raises ModelError for whole numbers in the place of others, NotFinite."""
        if name in self.floating and not tensor.is_floating_point():
            raise ModelError(f"the tensor {name!r} of {self.label} is stored as {tensor.dtype}: expected floating-point numbers, "
                             "so get the file in another precision")
        return as_kept(tensor, self.dtype_of(name), images=self.images, check=check)

    def numbers(self, name: str, tensor: Tensor, *, check: bool = True) -> dict[str, Tensor]:
        """What the part has of a tensor: most times itself by its name; of one that is held packed, its parts. Raises as `kept` does."""
        if (way := self.held.get(name)) is None:
            return {name: self.kept(name, tensor, check=check)}
        if isinstance(tensor, Packed) and tensor.way == way:
            parts: Parts = tensor.checked(check).parts
        else:
            assert isinstance(way, Packing), f"{name} is to be held in {way.name}, which only files have"
            parts = way.pack(self.kept(name, tensor, check=check))
        return {f"{name.removesuffix('weight')}{key}": part for key, part in parts.items()}

    def checked(self, name: str, tensor: Tensor) -> Tensor:
        """`kept` of one tensor alone. Raises ModelError also where it is not finite."""
        try:
            return self.kept(name, tensor)
        except NotFinite:
            raise self.refused([name]) from None

    def within(self, place: str) -> Callable[[str, Tensor], dict[str, Tensor]]:
        """`numbers` of one tensor alone, by names within a child of the part; whether it is finite, which raises ModelError, is looked at once."""
        seen: set[str] = set()

        def ready(name: str, tensor: Tensor) -> dict[str, Tensor]:
            try:
                made = self.numbers(f"{place}.{name}", tensor, check=name not in seen)
            except NotFinite:
                raise self.refused([f"{place}.{name}"]) from None
            seen.add(name)
            return {own.removeprefix(f"{place}."): t for own, t in made.items()}

        return ready

    def alike(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The same without its numbers."""
        return self.numbers(name,
                            tensor.without_numbers() if isinstance(tensor, Packed) else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))

    def refused(self, names: list[str]) -> ModelError:
        """That these are not finite."""
        cure = ", or load it with dtype='float32', for float16 holds no number above 65504" if self.dtype == torch.float16 else ""
        return ModelError(f"{len(names)} tensors of {self.label} have NaN or infinite weights (first {names[0]!r}): get the file again{cure}")


def as_kept(tensor: Tensor, dtype: torch.dtype, *, images: bool, check: bool = True) -> Tensor:
    """A tensor as the module keeps it: in its dtype, convolution weights in channels-last; itself where nothing changes (it stays memory-mapped,
    unless it is misaligned).

    Raises:
        NotFinite: it has NaN or infinity; where `check` is False, that is not looked for.
    """
    if not tensor.is_floating_point():
        return tensor
    if isinstance(tensor, Packed):
        return tensor.checked(check).unpacked(dtype)
    layout = torch.channels_last if images and tensor.ndim == 4 else torch.preserve_format
    if tensor.is_meta:
        return tensor.to(dtype=dtype, memory_format=layout)
    if tensor.dtype != dtype or torch.empty_like(tensor, device="meta", memory_format=layout).stride() != tensor.stride():
        return recast(tensor, dtype, layout=layout, check=check)
    if check:
        check_finite(tensor)
    if dtype == torch.float32 and tensor.data_ptr() % ALIGNED:
        return tensor.clone()  # float32 products round by where a tensor begins: the same weights in another file must give the same picture
    return tensor


def kept_precise(module: nn.Module, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of modules that stay in float32 beside float16."""
    return tuple(getattr(module, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
