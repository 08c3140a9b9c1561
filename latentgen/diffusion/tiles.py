"""Windows over a latent, and wrappers that denoise it window by window, or turned around its edges so that they meet.

Knows tensors, levels and denoisers. Does not know prompts, families, pixels, seeds or devices.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentgen.diffusion.level import Denoiser, Level

ROWS, COLUMNS = 2, 3  # the axes of a latent (B, C, h, w)
TURNS = {ROWS: 0.7548776662466927, COLUMNS: 0.5698402909980532}  # shares of a side: powers of the plastic number's inverse fill the plane most evenly


@dataclass(frozen=True)
class Span:
    """A stretch of one side: `length` entries from `start` on, past the end of the side from its beginning."""

    start: int
    length: int

    def pieces(self, size: int) -> list[tuple[slice, slice]]:
        """Where it lies on a side of `size`, and which of its own entries lie there: one piece, or two where it runs past the end."""
        over = max(0, self.start + self.length - size)
        first = (slice(self.start, self.start + self.length - over), slice(0, self.length - over))
        return [first, (slice(0, over), slice(self.length - over, self.length))] if over else [first]


@dataclass(frozen=True)
class Window:
    """A part of a latent as large as a span of its rows and one of its columns."""

    rows: Span
    columns: Span

    def of(self, x: Tensor, *, unit: int = 1) -> Tensor:
        """This part of x (B, C, h * unit, w * unit), (B, C, rows * unit, columns * unit)."""
        for axis, span in ((ROWS, self.rows), (COLUMNS, self.columns)):
            wide = Span(span.start * unit, span.length * unit)
            parts = [x.narrow(axis, there.start, there.stop - there.start) for there, _ in wide.pieces(x.shape[axis])]
            x = torch.cat(parts, axis) if parts[1:] else parts[0]
        return x

    def add(self, part: Tensor, *, to: Tensor) -> None:
        """Add (B, C, rows, columns) to this part of (B, C, h, w), in place."""
        for down, own_down in self.rows.pieces(to.shape[ROWS]):
            for across, own_across in self.columns.pieces(to.shape[COLUMNS]):
                to[..., down, across] += part[..., own_down, own_across]


def spans(size: int, tile: int, overlap: int, *, scale: int = 1, wrap: bool = False) -> Iterator[tuple[Span, Tensor]]:
    """Spans of equal length that cover one side, evenly spaced, and their weights, which add up to 1 everywhere.

    Where two share entries, the first hands over to the second across the middle half of these.

    Args:
        size: of the side; if it is no longer than `tile`, one span is all of it.
        overlap: entries that neighbours share at least, fewer than `tile`.
        scale: weights for each entry.
        wrap: the side's end meets its beginning, where spans run on.
    """
    if size <= tile:
        yield Span(0, size), torch.ones(size * scale)
        return
    count = math.ceil((size if wrap else size - overlap) / (tile - overlap))
    starts = [round(k * size / count if wrap else k * (size - tile) / (count - 1)) for k in range(count)]
    centres = (torch.arange(tile * scale, dtype=torch.float64) + 0.5) / scale

    def share_of(other: int, *, begins: int) -> Tensor:
        """How far the one of two spans that begins later, `begins` entries into this one, has taken over; its neighbour begins `other` before it."""
        shared = tile - other
        return ((centres - (begins + shared / 4)) / max(shared / 2, 1e-9)).clamp(0, 1)

    for k, start in enumerate(starts):
        before, after = (start - starts[k - 1]) % size, (starts[(k + 1) % count] - start) % size
        rise = share_of(before, begins=0) if wrap or k > 0 else torch.ones_like(centres)
        fall = share_of(after, begins=after) if wrap or k < count - 1 else torch.zeros_like(centres)
        yield Span(start, tile), (rise - fall).float()


@dataclass(frozen=True)
class Grid:
    """Overlapping windows that cover a latent.

    Attributes:
        height, width: of the latent.
        tile, overlap: side of a window, and what neighbours share at least; in latents.
        wrap: the axes, of ROWS and COLUMNS, along which the end meets the beginning.
    """

    height: int
    width: int
    tile: int
    overlap: int
    wrap: tuple[int, ...] = ()

    @property
    def windows(self) -> tuple[Window, ...]:
        """Row by row from the top left; one, where the latent is no larger than a window."""
        return tuple(window for window, _ in self._weighed())

    @property
    def edgeless(self) -> tuple[int, ...]:
        """The wrapped axes of which a window sees all, so that no window runs across their edge and only the network can make it fit."""
        return tuple(axis for axis in self.wrap if (self.height, self.width)[axis - ROWS] <= self.tile)

    def _weighed(self) -> Iterator[tuple[Window, Tensor]]:
        """Each with its weights, (rows, columns)."""
        columns = list(spans(self.width, self.tile, self.overlap, wrap=COLUMNS in self.wrap))
        for rows, down in spans(self.height, self.tile, self.overlap, wrap=ROWS in self.wrap):
            for span, across in columns:
                yield Window(rows, span), down[:, None] * across

    def tiled(self, denoisers: Sequence[Denoiser], *, device: torch.device | None = None) -> Denoiser:
        """The whole latent's denoiser from one for each window: x0 is the weighted mean of theirs (Bar-Tal et al. 2023, MultiDiffusion, eq. 5).

        Args:
            denoisers: in the order of `windows`; each sees its window of x as a picture of its own. A single one is the denoiser itself.
            device: of the latents.
        """
        if len(denoisers) == 1 == len(self.windows):
            return denoisers[0]
        parts = [(window, weights.to(device), denoiser) for (window, weights), denoiser in zip(self._weighed(), denoisers, strict=True)]

        def denoise(x: Tensor, level: Level) -> Tensor:
            x0 = torch.zeros_like(x)
            for window, weights, one in parts:
                window.add(weights * one(window.of(x), level), to=x0)
            return x0

        return denoise


def turned(estimate: Callable[..., Tensor], *, axes: Sequence[int], levels: Sequence[Level], unit: int = 1) -> Callable[..., Tensor]:
    """(x, level, ...) -> x0 that sees the latent rolled around its edges, by another share of each side at each level, and answers it rolled back.

    No edge stays an edge, so what the network makes of edges is spread and the picture's own sides come to fit: for networks that cannot be given
    a world without edges. A level between two planned ones turns as the noisier of them. It belongs around the network itself: what is wrapped
    around it, such as guidance that remembers earlier steps, knows the picture in its place.

    Args:
        estimate: one evaluation; what it is given beside x and level is handed on.
        axes: those, of ROWS and COLUMNS, whose ends are to meet.
        levels: as planned, falling noise.
        unit: rolls are multiples of it, such as the patch of a transformer.
    """
    marks = [level.half_log_snr for level in levels]

    def estimate_turned(x: Tensor, level: Level, *said: Any) -> Tensor:
        n = max(0, bisect_right(marks, level.half_log_snr) - 1)
        by = [round((n * TURNS[axis]) % 1 * (x.shape[axis] // unit)) * unit for axis in axes]
        x0 = estimate(torch.roll(x, by, tuple(axes)), level, *said)
        return torch.roll(x0, [-count for count in by], tuple(axes))

    return estimate_turned
