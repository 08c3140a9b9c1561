"""Linear and convolution with their weights packed once. Knows torch's modules; knows no network.

A module is turned into one of these in place, by its class, so that whatever holds it goes on holding it. Once it was called, its plain weight is
gone: `weight` is then a packed tensor, which tells dtype, device and shape and refuses every other operator.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from latentgen.models.fast import onednn
from latentgen.models.fast.onednn import Act, Window
from latentgen.models.promised import Promised


class Kernel:
    """One weight in the orders in which it is read: packed when it is first used, and the plain one gone then. One that is promised is made only
    then.

    The views of a module share its kernel. Mostly there is one order; where another size of pictures needs another one, both are kept.
    """

    def __init__(self, plain: Tensor) -> None:
        self.plain: Tensor | None = plain
        self.packed: dict[Any, Tensor] = {}
        self.shape, self.dtype = plain.shape, plain.dtype
        self._lock = Lock()

    def get(self, key: Any, pack: Callable[[Tensor], Tensor]) -> Tensor:
        """The weight as `pack` orders it; the same answer for the same key."""
        found = self.packed.get(key)
        if found is not None:
            return found
        with self._lock:
            if key not in self.packed:
                made = pack(self._plain())
                self.packed[key] = next((p for p in self.packed.values() if onednn.order(p) == onednn.order(made)), made)
                if isinstance(self.plain, Promised):
                    self.plain.done()
                self.plain = None
        return self.packed[key]

    def _plain(self) -> Tensor:
        if self.plain is None:
            return onednn.unpacked(next(iter(self.packed.values())))
        return self.plain.made() if isinstance(self.plain, Promised) else self.plain

    @property
    def any(self) -> Tensor:
        """The weight in one of its orders: plain before its first use, then opaque. It tells dtype, device and shape."""
        with self._lock:
            if isinstance(self.plain, Promised):
                self.plain = self.plain.made()
            return next(iter(self.packed.values())) if self.plain is None else self.plain

    @property
    def bytes(self) -> int:
        """Of all orders; none as long as it is promised."""
        with self._lock:
            copies = max(1, len({id(p) for p in self.packed.values()}))
            return 0 if isinstance(self.plain, Promised) else self.shape.numel() * self.dtype.itemsize * copies


class PackedLinear(nn.Linear):
    """nn.Linear on a packed weight, with an activation, a sum or a product at no extra pass over memory."""

    kernel: Kernel
    act: Act = "none"

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """See `Kernel.any`."""
        return self.kernel.any

    @property
    def _packed(self) -> Tensor:
        return self.kernel.get(None, onednn.pack_linear)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return onednn.linear(x, self._packed, self.bias, act=self.act)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The same plus `other`, of the result's shape."""
        return onednn.linear_with(x, other, self._packed, self.bias, "add")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The same times `other`, of the result's shape."""
        return onednn.linear_with(x, other, self._packed, self.bias, "mul")


class PackedConv2d(nn.Conv2d):
    """nn.Conv2d of one group on a packed weight, with an activation or a sum at no extra pass over memory. Follows its `padding_mode`."""

    kernel: Kernel
    act: Act = "none"

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """See `Kernel.any`."""
        return self.kernel.any

    def _given(self, x: Tensor) -> tuple[Tensor, Tensor, Window]:
        """x, padded where oneDNN would pad with something else, the weight in the order for its size, and how the kernel moves."""
        at = Window(self.stride, self.padding, self.dilation)  # type: ignore[arg-type]
        if self.padding_mode != "zeros":
            x, at = nn.functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), at._replace(padding=(0, 0))
        return x, self.kernel.get(x.shape, lambda plain: onednn.pack_convolution(plain, at, x.shape)), at

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W')."""
        x, packed, at = self._given(x)
        return onednn.convolution(x, packed, self.bias, at, act=self.act)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The same plus `other`, of the result's shape, before a ReLU if the module has one."""
        x, packed, at = self._given(x)
        return onednn.convolution_plus(x, other, packed, self.bias, at, act="relu" if self.act == "relu" else "none")

    def shifted(self, x: Tensor, row: Tensor) -> Tensor:
        """The same, before the activation plus row (1, out) everywhere."""
        x, packed, at = self._given(x)
        return onednn.convolution(x, packed, row[0] if self.bias is None else self.bias + row[0], at, act=self.act)


def packable(module: nn.Module) -> bool:
    """Whether it is of a kind that can be packed: a plain linear, or a convolution of one group."""
    return type(module) is nn.Linear or type(module) is nn.Conv2d and module.groups == 1 and isinstance(module.padding, tuple)


def packs(module: nn.Module) -> bool:
    """Whether `pack` takes it: of such a kind, and its weight in memory or promised."""
    return packable(module) and (not module.weight.is_meta or isinstance(module.weight, Promised))  # type: ignore[union-attr]


def pack(module: nn.Module) -> None:
    """Turn a linear or a convolution into its packed kind, in place. Its weight is packed when it is first used."""
    kernel = Kernel(module._parameters.pop("weight"))  # type: ignore[arg-type]
    module.__class__ = PackedLinear if isinstance(module, nn.Linear) else PackedConv2d
    module.kernel = kernel


def halves(linear: nn.Linear) -> tuple[nn.Linear, nn.Linear]:
    """A linear cut in two: what makes the first half of its answer, and what makes the second."""
    inner, weight = linear.out_features // 2, linear.weight
    made = []
    for rows in (slice(0, inner), slice(inner, None)):
        half = nn.Linear(linear.in_features, inner, bias=False, device="meta")
        half.weight = weight.rows(rows) if isinstance(weight, Promised) else nn.Parameter(weight[rows], requires_grad=False)
        half.bias = None if linear.bias is None else nn.Parameter(linear.bias[rows].clone(), requires_grad=False)
        made.append(half)
    return made[0], made[1]


def plus(module: nn.Module, x: Tensor, other: Tensor) -> Tensor:
    """module(x) + other, in one pass where the module can."""
    return module.plus(x, other) if isinstance(module, (PackedLinear, PackedConv2d)) else torch.add(module(x), other)


def shifted(module: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """module(x) + rows (B, c) at every place; in the convolution's own pass where it is one row."""
    if len(rows) == 1 and type(module) is PackedConv2d:
        return module.shifted(x, rows)
    return module(x).add_(rows[:, :, None, None])


class DoublingConv2d(PackedConv2d):
    """Nearest-neighbour doubling and the 3x3 convolution after it, as four 2x2 convolutions of the small picture: 4 products for each output, not 9.

    Each of the four kinds of output (even or odd row, even or odd column) sees only 2x2 different inputs, so the taps that fall on one input are
    added up beforehand. Exact but for the rounding of those sums.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, 2H, 2W), channels-last."""
        x, packed, at = self._given(x)
        small = onednn.convolution(x, packed, None if self.bias is None else self.bias.repeat(4), at, act=self.act)
        height, width = small.shape[2] - 1, small.shape[3] - 1
        out = torch.empty(len(x), self.out_channels, 2 * height, 2 * width, dtype=small.dtype, device=small.device, memory_format=torch.channels_last)
        for n, part in enumerate(small.split(self.out_channels, 1)):
            row, column = divmod(n, 2)
            out[:, :, row::2, column::2] = part[:, :, row:row + height, column:column + width]
        return out


def doubles(conv: nn.Module) -> bool:
    """Whether `doubling` takes it: a plain 3x3 that was not packed yet."""
    return packs(conv) and (conv.kernel_size, conv.padding, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))


def doubling(conv: nn.Conv2d) -> DoublingConv2d:
    """What computes `conv` of a doubled picture from the picture itself."""
    made = DoublingConv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False, padding_mode=conv.padding_mode, device="meta")
    del made._parameters["weight"]
    made.bias, weight = conv.bias, conv.weight
    made.kernel = Kernel(weight.then(_summed, (4 * len(weight), weight.shape[1], 2, 2)) if isinstance(weight, Promised) else _summed(weight))
    return made.eval()


def _summed(weight: Tensor) -> Tensor:
    """(out, in, 3, 3) -> (4 out, in, 2, 2), channels-last: for each kind of output its own 2x2 kernel."""
    first, middle, last = ([weight[:, :, row, column].float() for column in range(3)] for row in range(3))
    below, above = ([a + b for a, b in zip(*pair, strict=True)] for pair in ((middle, last), (first, middle)))
    made = torch.empty(4 * len(weight), weight.shape[1], 2, 2, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last)
    kinds = made.split(len(weight))
    for row, pair in enumerate(((first, below), (above, last))):  # the two taps of even and of odd rows, then of columns
        for tap, (left, centre, right) in enumerate(pair):
            for column, two in enumerate(((left, centre + right), (left + centre, right))):
                for place, value in enumerate(two):
                    kinds[2 * row + column][:, :, tap, place] = value
    return made
