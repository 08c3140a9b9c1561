"""What a network is asked at this moment of one run: by which modules of its view tell one call from another.
Knows levels and conditionings; runs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentgen.diffusion.level import Level
    from latentgen.models.family import Conditioning


@dataclass
class Asked:
    """The call under way. One belongs to each run; who calls the network tells it first, and the modules of the run's views read it.

    Attributes:
        level: the noise level.
        rows: of each row of the batch, the conditioning of batch 1 that it hears and the number of the picture that it shows.
            Empty where nobody tells.
        turn: how often the level has changed.
    """

    level: Level | None = None
    rows: tuple[tuple[Conditioning, int], ...] = ()
    turn: int = 0

    def tell(self, level: Level, conditioning: Conditioning) -> None:
        """What the next call will be."""
        self.turn += level != self.level
        self.level, self.rows = level, conditioning.rows

    @property
    def heard(self) -> tuple[Conditioning, ...]:
        """What the batch hears, each once, in order: one for each side of guidance."""
        return tuple(dict.fromkeys(words for words, _ in self.rows))

    @property
    def sides(self) -> int:
        """How often the batch has the same pictures one after the other: 2 for the pair of guidance in one call."""
        count = len(self.heard)
        if count < 2 or len(self.rows) % count:
            return 1
        each = len(self.rows) // count
        pictures = [picture for _, picture in self.rows]
        return count if pictures == pictures[:each] * count else 1
