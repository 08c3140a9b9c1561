"""What an approximation keeps from call to call of one run, apart for every side of guidance and every picture.
Knows what is asked; knows no module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from latentgen.models.asked import Asked

S = TypeVar("S")


class Memory(Generic[S]):
    """One state for each set of rows that the network is called with, dropped when those rows were not asked about at the level before.

    So the pair of guidance, the words alone outside its interval, another picture of the batch and words that changed on the way never share a state.
    """

    def __init__(self, asked: Asked, make: Callable[[], S]) -> None:
        self.asked, self.make = asked, make
        self.states: dict[object, tuple[int, S]] = {}

    def now(self) -> S:
        """The state of the call under way, a new one where there is none."""
        turn, rows = self.asked.turn, self.asked.rows
        self.states = {key: kept for key, kept in self.states.items() if turn - kept[0] <= 1}
        state = self.states[rows][1] if rows in self.states else self.make()
        self.states[rows] = (turn, state)
        return state


class Tally:
    """How often something was asked for, and how often it was done."""

    def __init__(self) -> None:
        self.asked, self.saved = 0, 0

    def count(self, saved: bool, number: int = 1) -> None:
        """`number` more, saved or not."""
        self.asked += number
        self.saved += number if saved else 0
