"""Tables of what a request may name together with options: guiders, approximations. Knows names and options; knows nothing of what they do."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from latentgen.diffusion.option import Option, check_options
from latentgen.errors import RequestError

Chosen = Mapping[str, Mapping[str, Any]]  # name -> its options


class Info(Protocol):
    """A row: the options that it takes, and their values when they are left alone."""

    @property
    def options(self) -> Mapping[str, Option]: ...
    @property
    def defaults(self) -> Mapping[str, Any]: ...


Row = TypeVar("Row", bound=Info)


class Table(dict[str, Row]):
    """Name -> row, in the order in which they act.

    Attributes:
        kind: what a row is, in a word: "guider".
        elsewhere: what other programs call them -> the name here, or the field of a request that does it. "-", "_" and capitals do not count.
    """

    def __init__(self, kind: str, rows: Mapping[str, Row], *, elsewhere: Mapping[str, str]) -> None:
        super().__init__(rows)
        self.kind, self.elsewhere = kind, {_plain(name): meant for name, meant in elsewhere.items()}

    def find(self, name: str) -> Row:
        """The row of this exact name; otherwise RequestError, which knows what other programs call it."""
        if name in self:
            return self[name]
        meant = self.elsewhere.get(_plain(str(name)))
        if meant is not None and meant not in self:
            raise RequestError(f"unknown {self.kind} {name!r}: that is an option of its own here, {meant}.")
        near = [meant] if meant else difflib.get_close_matches(str(name).lower(), self, n=1, cutoff=0.5)
        raise RequestError(f"unknown {self.kind} {name!r:.60}: {f'did you mean {near[0]!r}? ' if near else ''}the {self.kind}s are "
                           f"{', '.join(self)}.")

    def check(self, said: Chosen) -> None:
        """RequestError for an unknown name, an option that it does not have or a value that the option does not take."""
        for name, options in said.items():
            check_options(f"the {self.kind} {name!r}", self.find(name).options, options, whose=f"{name}'s ")

    def filled(self, said: Chosen) -> dict[str, dict[str, Any]]:
        """What was said, in the order of the table, with every option. Raises as `check` does."""
        self.check(said)
        return {name: {**row.defaults, **said[name]} for name, row in self.items() if name in said}


def spread(said: Any) -> dict[str, dict[str, Any]]:
    """What was said, in any of its forms, as name -> options: "apg", ["apg", "slg"], {"apg": {"eta": 0.5}}, {"apg": None}.

    Raises:
        ValueError: another form, or a name twice.
    """
    several: Sequence[Any] = [said] if isinstance(said, (str, Mapping)) else said if isinstance(said, (list, tuple)) else ()
    made: dict[str, dict[str, Any]] = {}
    for one in several:
        for name, options in {one: None}.items() if isinstance(one, str) else one.items() if isinstance(one, Mapping) else ((None, None),):
            if not isinstance(name, str) or name in made or not (options is None or isinstance(options, Mapping)):
                raise ValueError("not names with options")
            made[name] = dict(options or {})
    if not made:
        raise ValueError("no name")
    return made


def in_words(chosen: Chosen) -> str:
    """What was chosen, with its options: "taylor interval 3 order 1, ..."."""
    return ", ".join(" ".join([name, *(f"{option} {value}" for option, value in options.items())]) for name, options in chosen.items())


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")
