"""What an option takes. Knows values and words for them; knows nothing of what has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from latentgen.errors import RequestError


@dataclass(frozen=True)
class Option:
    """A keyword argument: the values that it takes, ends included.

    low, high: of a number.  whole: whole numbers only.  choices: of a word, instead.  layers: names or numbers of a network's layers, one or a list.
    """

    about: str
    low: float = 0.0
    high: float = math.inf
    whole: bool = False
    choices: tuple[str, ...] = ()
    layers: bool = False

    def check(self, name: str, value: object) -> None:
        """RequestError unless value is one that this option takes."""
        if self.layers:
            several = list(value) if isinstance(value, (list, tuple)) else [value]
            fits = 0 < len(several) <= 200 and all(isinstance(one, str) and 0 < len(one) <= 200 or type(one) is int and 0 <= one < 1000
                                                   for one in several)
        elif self.choices:
            fits = isinstance(value, str) and value in self.choices
        else:
            fits = isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high
        if not fits:
            raise RequestError(f"{name} is {value!r:.80}: give {self.takes} ({self.about}).")

    @property
    def takes(self) -> str:
        """The values that it takes, in words."""
        if self.layers:
            return "a layer's name or number, or a list of them"
        if self.choices:
            return " or ".join(repr(choice) for choice in self.choices)
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} of at least {self.low:g}" if self.high == math.inf else f"{kind} from {self.low:g} to {self.high:g}"


def check_options(what: str, takes: Mapping[str, Option], said: Mapping[str, object], *, whose: str = "") -> None:
    """RequestError for an option that is not there, or a value that the option does not take.

    what: whose options they are, as "the sampler 'ddim'"; whose: the same before an option's name, as "apg's ".
    """
    for name, value in said.items():
        if name not in takes:
            has = f"its options are {', '.join(takes)}" if takes else "it has none"
            raise RequestError(f"{name} is given but {what} has no such option: {has}.")
        takes[name].check(f"{whose}{name}", value)
