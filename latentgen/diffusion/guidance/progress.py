"""Where in a run a level lies. Knows planned levels; knows no sampler, network or guider."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property

from latentgen.diffusion.level import Level


class Progress:
    """The planned levels of a run, and how many steps of it lie before them.

    levels: those that run, the clean one last.
    first: how many steps of the whole run come before (of an edit, or the second part of a run in two).
    total: steps of the whole run; None where these are all.
    """

    def __init__(self, levels: Sequence[Level], *, first: int = 0, total: int | None = None) -> None:
        self.levels, self.first = tuple(levels), first
        self.total = first + len(levels) - 1 if total is None else total

    @cached_property
    def _marks(self) -> tuple[float, ...]:
        return tuple(level.half_log_snr for level in self.levels[:-1])

    def step(self, level: Level) -> int:
        """The step of the whole run that this level is asked in, counted from 0; between two levels that of the noisier."""
        return self.first + max(0, bisect_right(self._marks, level.half_log_snr) - 1)

    def within(self, level: Level, start: float, end: float) -> bool:
        """Whether the level's step is one of the share from `start` to `end` of the whole run: start * total <= step < end * total, counted from
        0."""
        return start * self.total <= self.step(level) < end * self.total

    def following(self, level: Level) -> Level:
        """The level that a step from here goes to: the one after the planned level that is nearest in log(alpha / sigma)."""
        if level.half_log_snr == math.inf:
            return level
        here = level.half_log_snr
        gaps = [0.0 if mark == here else abs(mark - here) for mark in self._marks]
        return self.levels[gaps.index(min(gaps)) + 1]
