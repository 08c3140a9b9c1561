"""The passes of a run: each denoises the picture at one size, the first from noise or an edit's source, a later one from what the one before made.

Knows requests, families, sizes and levels; runs no network.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from latentgen.diffusion.level import Level
from latentgen.run.sizing import Source

TILE_ABOVE = 1024 * 1024  # pixels of a picture from which the autoencoder works in tiles
TILE = 768


@dataclass(frozen=True)
class Pass:
    """One way through the levels at one size.

    Attributes:
        width, height: the size that is denoised; `crop` is the part of it that is the picture (an edit keeps its picture's size).
        asked_steps: steps of the whole path, of which the last ones are run, the share `strength`; `first_step` is the first of them, counted from 1.
        levels: the levels visited, the clean one last; `steps` of them are evaluated.
        evaluations: how often the network sees one picture, exactly: two or more for each guided level that a sampler asks about, else one.
        source: the picture that an edit starts from, at this size.
    """

    width: int
    height: int
    crop: tuple[int, int]
    asked_steps: int
    first_step: int
    levels: tuple[Level, ...]
    strength: float
    evaluations: int
    source: Source | None = field(default=None, repr=False, compare=False)

    @property
    def steps(self) -> int:
        """Levels that the denoiser visits, after strength."""
        return len(self.levels) - 1

    @property
    def tile(self) -> int | None:
        """Side of an autoencoder's tile in pixels, None where it sees the picture whole."""
        return TILE if self.width * self.height > TILE_ABOVE else None
