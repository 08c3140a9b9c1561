"""How weights are held in fewer bits: packed and made again, with the error that this costs. Knows tensors; knows no module, file or policy.

A way turns a weight (out, in) into named parts whose first axis is still that of the rows, so that rows can be cut and joined as they are packed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from latentgen.models.cast import NotFinite
from latentgen.models.fast import onednn

Parts = Mapping[str, Tensor]  # each (out, ...)
PIECE = 2**18  # numbers that are made at once on a CPU, whose caches hold them
BLOCK = 32  # numbers of a row that share a scale in 4 bits
FP8 = 448.0  # the largest number of float8_e4m3fn


class Way(ABC):
    """One of them, as it is read.

    Attributes:
        name: as it is asked for or as its file calls it.
    """

    name: str

    def check(self, parts: Parts) -> None:
        """Look for NaN and infinity in parts that a file has; what `pack` made has none.

        Raises:
            NotFinite: there are some.
        """

    @abstractmethod
    def some(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """Parts of some rows -> (rows, in)."""

    def unpack(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """Parts -> (out, in): the numbers that the parts stand for, rounded once to the dtype."""
        first = next(iter(parts.values()))
        rows = max(1, PIECE // max(1, first[:1].numel()))
        if first.device.type == "cuda" or len(first) <= rows:
            return self.some(parts, dtype)
        made: Tensor | None = None
        for start in range(0, len(first), rows):
            piece = self.some({name: part[start:start + rows] for name, part in parts.items()}, dtype)
            made = piece.new_empty(len(first), piece.shape[1]) if made is None else made
            if first.is_meta:
                break  # on paper, one piece is as good as all of them
            made[start:start + rows] = piece
        assert made is not None
        return made

    def product(self, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
        """x (..., in) -> x W^T + b (..., out), in the dtype of x."""
        return linear(x, self.unpack(parts, x.dtype), bias)


class Packing(Way):
    """One in which weights can be packed, too; its name is in recipes."""

    @abstractmethod
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """(out, in) finite numbers -> parts."""


class Int8(Packing):
    """A whole number from -127 to 127 for each weight, and a scale for each row: the largest of a row is 127 of it."""

    name = "int8"

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().amax(dim=1, keepdim=True).float() / 127
        whole = torch.where(scale > 0, weight.float() / scale, 0.0)
        return {"codes": whole.round_().clamp_(-127, 127).to(torch.int8), "scale": scale}

    def some(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return (parts["codes"] * parts["scale"]).to(dtype)

    def product(self, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
        if x.dtype == torch.float16:  # whose sums would pass its largest number before they are scaled
            return super().product(x, parts, bias)
        made = linear(x, parts["codes"].to(x.dtype)).mul_(parts["scale"].squeeze(1).to(x.dtype))
        return made if bias is None else made.add_(bias)


class Int8Dynamic(Int8):
    """The same weights, and what they are multiplied with rounded to whole numbers, too: with a scale for each token, found as it comes."""

    name = "int8_dynamic"

    def product(self, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
        """`parts["codes"]` may be in the order of `onednn.pack_whole`."""
        if x.is_meta:
            return super().product(x, parts, bias)
        codes, each = parts["codes"], parts["scale"].squeeze(1)
        tokens, scale = _rounded(x.reshape(-1, x.shape[-1]))
        if codes.device.type == "cpu" and onednn.whole_available():
            made = onednn.whole_linear(tokens, codes if codes.is_mkldnn else onednn.pack_whole(codes), each)
        else:
            made = _whole_product(tokens, codes) * each
        made.mul_(scale)
        return (made if bias is None else made.add_(bias)).to(x.dtype).unflatten(0, x.shape[:-1])


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, in) -> whole numbers from -127 to 127, kept as uint8 with 128 added, and the scale (n, 1) float32 of each row."""
    tokens, scale = torch.empty_like(x, dtype=torch.uint8), torch.empty(len(x), 1, device=x.device)
    rows = max(1, PIECE // x.shape[1]) if x.device.type == "cpu" else max(1, len(x))
    for start in range(0, len(x), rows):
        piece = x[start:start + rows].float()
        scale[start:start + rows] = own = piece.abs().amax(dim=1, keepdim=True).div_(127).clamp_(min=1e-30)
        tokens[start:start + rows] = piece.div(own).round_().add_(128)
    return tokens, scale


def _whole_product(tokens: Tensor, codes: Tensor) -> Tensor:
    """`_rounded` tokens (n, in), codes (out, in) int8 -> (n, out) float32, exact sums. CUDA takes more than 16 rows, and eights of the rest."""
    rows, columns = len(tokens), len(codes)
    whole = pad((tokens.to(torch.int16) - 128).to(torch.int8), (0, -tokens.shape[1] % 8, 0, max(0, 17 - rows)))
    return torch._int_mm(whole, pad(codes, (0, -codes.shape[1] % 8, 0, -columns % 8)).t())[:rows, :columns].float()


class Fp8(Packing):
    """A float8_e4m3fn for each weight, and a scale for each row: the largest of a row is 448 of it. Files may have it without scales."""

    name = "fp8"

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().amax(dim=1, keepdim=True).float() / FP8
        return {"codes": torch.where(scale > 0, weight.float() / scale, 0.0).clamp_(-FP8, FP8).to(torch.float8_e4m3fn), "scale": scale}

    def check(self, parts: Parts) -> None:
        largest = 0x7E if parts["codes"].dtype == torch.float8_e4m3fn else 0x7B
        if int(parts["codes"].view(torch.uint8).bitwise_and(0x7F).amax()) > largest or not bool(torch.isfinite(parts.get("scale",
                                                                                                                         torch.zeros(1))).all()):
            raise NotFinite

    def some(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        codes, scale = parts["codes"], parts.get("scale")
        wide = _widened(codes) if codes.device.type == "cpu" and codes.dtype == torch.float8_e4m3fn else codes.to(torch.float32)
        return (wide if scale is None else wide.mul_(scale)).to(dtype)


def _widened(codes: Tensor) -> Tensor:
    """float8_e4m3fn -> float32, four times as fast as `Tensor.to` on a CPU: as a float16 its bits stand for a 256th of it. NaN becomes 480."""
    bits = codes.view(torch.int8).to(torch.int16)
    return bits.bitwise_and(0x7F).mul_(128).bitwise_or_(bits.bitwise_and_(-0x8000)).view(torch.float16).to(torch.float32).mul_(256)


class Int4(Packing):
    """A whole number from -8 to 7 for each weight, and a scale for each 32 of a row: what is largest in size there is -8 of it (as GGUF's Q4_0)."""

    name = "int4"

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        groups = weight.float().unflatten(1, (-1, gcd(weight.shape[1], BLOCK)))
        largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
        scale = (largest / -8).to(torch.bfloat16)
        whole = torch.where(scale != 0, groups / scale.float(), 0.0).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
        half = whole.shape[2] // 2
        return {"codes": whole[..., :half].bitwise_or(whole[..., half:] << 4).flatten(1), "scale": scale.squeeze(2)}

    def some(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        codes, scale = parts["codes"], parts["scale"].unsqueeze(2)
        groups = codes.unflatten(1, (scale.shape[1], -1))
        whole = torch.cat((groups & 15, groups >> 4), dim=2).view(torch.int8).sub_(8)
        return (whole * scale.to(dtype)).flatten(1)


WAYS: Mapping[str, Packing] = {way.name: way for way in (Int8(), Int8Dynamic(), Fp8(), Int4())}
STORED = "stored"  # packed weights of a file, as they are there
AUTO = "auto"  # what a memory makes necessary
CHOICES = (*WAYS, STORED, AUTO)
RUNGS = ("int8", "int4")  # down which AUTO goes, from the nearest numbers to the fewest bits


def allowed(said: str | None, *, packed: bool) -> tuple[str | None, ...]:
    """The ways in which a plan may hold weights, the first the one that it does where memory suffices.

    Args:
        said: one of `CHOICES`, or None: no approximation, so that only what files have packed may stay so.
        packed: whether they have something packed.
    """
    if said not in (None, AUTO):
        return (said,)
    return (None, *((STORED,) if packed else ()), *(RUNGS if said == AUTO else ()))


def fits(way: Way, width: int) -> bool:
    """Whether rows of so many weights can be held so: 4 bits go by pairs."""
    return not isinstance(way, Int4) or gcd(width, BLOCK) > 1
