"""Wildcards and styles: what is put into a prompt before it is read. Knows text, one folder of word lists and a seed; knows no dialect or tokenizer.

    {red|green|2::blue}   one of them, "2::" twice as likely as the rest; options may hold further wildcards
    __animal__            a line of animal.txt in the folder, __colours/warm__ of colours/warm.txt; lines may hold wildcards, # opens a comment
    \\{ \\}                 braces that are meant

Braces without a bar, or without a partner, are text. What is drawn depends on the seed and the text's name alone: picture i of a batch with seed s is
drawn like a picture of its own with seed s + i.
"""

from __future__ import annotations

import difflib
import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from latentgen.conditioning.prompt import MAX_CHARACTERS
from latentgen.errors import RequestError

MAX_BYTES = 2**20  # of a file
MAX_DRAWS = 1000
MARKS = ("{", "__")  # without one of them a text has no wildcard
MAX_DEPTH = 16  # of files that name files
_TOKENS = re.compile(r"\\.|__(?:[^\W_]|[./-]|_(?!_)){1,100}+__|[{}|]|[^\\{}|_]++|_++|\\", re.DOTALL)
_WEIGHT = re.compile(r"\s*+([0-9]++(?:\.[0-9]++)?)::")
_OTHER = re.compile(r"([0-9]{0,4}+(?:-[0-9]{0,4}+)?\$\$|[^\s:()<>\[\]]{1,20}+::)")  # how another program counts options, or no weight


@dataclass(frozen=True)
class Expansion:
    """A text with its wildcards drawn.

    Attributes:
        drawn: what was drawn, in order, as "{red|green} -> red" or "__animal__ -> cat".
        notes: what looks like a wildcard and is read as text.
    """

    text: str
    drawn: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Style:
    """A saved prompt template: "{prompt}" in it is where the prompt goes; without, it goes before it."""

    name: str
    prompt: str = ""
    negative: str = ""


def expand(text: str, *, seed: int, folder: Path | None = None, name: str = "prompt") -> Expansion:
    """Draw every wildcard of a text.

    Args:
        seed: of the picture.
        folder: where the word lists are; without one, __name__ is text and a note says so.
        name: which text of the request it is; each draws on its own.

    Raises:
        RequestError: a list that is missing, empty, not text or outside the folder, lists that name each other, options that all have weight 0,
            or too much text.
    """
    return _Draw(random.Random(f"{name} {seed}"), folder, name).all(text)


class _Draw:
    """One text's drawing: of a seeded generator only `random()` is used, the one that every version of Python keeps."""

    def __init__(self, chance: random.Random, folder: Path | None, name: str) -> None:
        self.chance, self.folder, self.name = chance, folder, name
        self.lists: dict[str, list[str]] = {}
        self.drawn: list[str] = []
        self.notes: list[str] = []

    def all(self, text: str) -> Expansion:
        """The text with everything drawn, without recursion: a stack of ranges of tokens that are still to be said."""
        said: list[str] = []
        length = 0
        stack: list[tuple[list[str], dict[int, _Group], int, int, int]] = [(*_read(text), 0, -1, 0)]
        while stack:
            tokens, groups, at, stop, depth = stack.pop()
            stop = len(tokens) if stop < 0 else stop
            while at < stop:
                token = tokens[at]
                if at in groups:
                    first, last = self._option(tokens, groups[at])
                    stack += [(tokens, groups, groups[at].marks[-1] + 1, stop, depth), (tokens, groups, first, last, depth)]
                    break
                if len(token) > 4 and token.startswith("__") and (line := self._line(token, depth)) is not None:
                    stack += [(tokens, groups, at + 1, stop, depth), (*_read(line), 0, -1, depth + 1)]
                    break
                said.append(token[1:] if token in ("\\{", "\\}") else token)
                length += len(said[-1])
                if length > MAX_CHARACTERS:
                    raise RequestError(f"{self.name} has more than {MAX_CHARACTERS:,} characters with its wildcards drawn: shorten it or its lists")
                at += 1
        return Expansion("".join(said), tuple(self.drawn), tuple(dict.fromkeys(self.notes)))

    def _option(self, tokens: list[str], group: _Group) -> tuple[int, int]:
        """The range of tokens of the option drawn."""
        if not sum(group.weights):
            raise RequestError(f"{self.name} has a wildcard whose options all have weight 0: give one of them more")
        whole = "".join(tokens[group.marks[0]:group.marks[-1] + 1])
        for odd in filter(None, (_OTHER.match(tokens[first]) for first, last in group.options if first < last)):
            cure = "one option is drawn, never several" if odd[1].endswith("$$") else "a weight is a number of 0 or more"
            self.notes.append(f"{self.name}: {odd[1]!r} in {whole:.60} is read as text: {cure}")
        first, last = group.options[self._pick(group.weights)]
        self._count(whole, "".join(tokens[first:last]))
        return first, last

    def _line(self, token: str, depth: int) -> str | None:
        """A line of the list that is named, None where it is text."""
        if self.folder is None:
            self.notes.append(f"{self.name}: {token:.60} is read as text: give a folder of word lists to draw from")
            return None
        if depth >= MAX_DEPTH:
            raise RequestError(f"{self.name} names word lists that name each other, {token:.60} among them: break the circle")
        if token not in self.lists:
            self.lists[token] = _lines(self.folder, token[2:-2])
        lines = self.lists[token]
        line = lines[self._pick([1.0] * len(lines))]
        self._count(token, line)
        return line

    def _pick(self, weights: list[float]) -> int:
        """An index, each as likely as its weight says."""
        left = self.chance.random() * sum(weights)
        for at, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return at
        return max(at for at, weight in enumerate(weights) if weight)

    def _count(self, what: str, drawn: str) -> None:
        if len(self.drawn) >= MAX_DRAWS:
            raise RequestError(f"{self.name} draws more than {MAX_DRAWS:,} wildcards: use fewer")
        self.drawn.append(f"{what:.60} -> {drawn.strip():.60}")


class _Group(NamedTuple):
    """A choice among tokens: places of its braces and bars, ranges of its options, and how likely each is."""

    marks: list[int]
    options: list[tuple[int, int]]
    weights: list[float]


def _read(text: str) -> tuple[list[str], dict[int, _Group]]:
    """Tokens, and the choices by the place of their opening brace. Weights and the blanks around options are cut from the tokens."""
    tokens = _TOKENS.findall(text)
    opened: list[list[int]] = []
    groups: dict[int, _Group] = {}
    for at, token in enumerate(tokens):
        if token == "{":
            opened.append([at])
        elif token == "|" and opened:
            opened[-1].append(at)
        elif token == "}" and opened and len(marks := [*opened.pop(), at]) > 2:
            options = [(first + 1, last) for first, last in pairwise(marks)]
            found = [_WEIGHT.match(tokens[first]) if first < last else None for first, last in options]
            groups[marks[0]] = _Group(marks, options, [float(weight[1]) if weight else 1.0 for weight in found])
            for (first, last), weight in zip(options, found, strict=True):
                if first < last:
                    tokens[first] = tokens[first][weight.end() if weight else 0:].lstrip()
                    tokens[last - 1] = tokens[last - 1].rstrip()
    return tokens, groups


def _lines(folder: Path, name: str) -> list[str]:
    """The lines of a list, comments and empty ones left out.

    Raises:
        RequestError: it is missing, outside the folder, too large, not UTF-8 or empty.
    """
    root = folder.resolve()
    if not root.is_dir():
        raise RequestError(f"wildcards is {folder.name!r}, which is no folder: give one with word lists such as {name}.txt")
    path = (root / f"{name}.txt").resolve()
    if ".." in name.split("/") or not path.is_relative_to(root):
        raise RequestError(f"the wildcard __{name}__ lies outside the folder {folder.name!r}: word lists are read from that folder alone")
    if not path.is_file():
        near = difflib.get_close_matches(name, [p.relative_to(root).with_suffix("").as_posix() for p in sorted(root.rglob("*.txt"))[:5000]], n=1)
        raise RequestError(f"the wildcard __{name}__ has no list {name}.txt in {folder.name!r}" + (f": did you mean __{near[0]}__?" if near else ""))
    lines = [line for raw in _text(path, f"the word list {name}.txt").splitlines() if (line := raw.strip()) and not line.startswith("#")]
    if not lines:
        raise RequestError(f"the word list {name}.txt is empty: write one option a line")
    return lines


def read_styles(path: Path) -> dict[str, Style]:
    """Styles by name from a TOML file: a table for each, with `prompt`, `negative` or both.

        [cinematic]
        prompt = "cinematic still, {prompt}, film grain"
        negative = "cartoon, drawing"

    Raises:
        RequestError: no such file, no TOML, or something in it that is no style.
    """
    what = f"the styles {path.name or str(path)!r}"
    if not path.is_file():
        raise RequestError(f"{what} are not there: give a TOML file with a table for each style")
    try:
        tables = tomllib.loads(_text(path, what))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RequestError(f"{what} are no TOML: {' '.join(str(error).split()):.120}") from None
    made = {}
    for name, table in tables.items():
        texts = table if isinstance(table, dict) else {}
        if not texts or set(texts) - {"prompt", "negative"} or not all(isinstance(text, str) for text in texts.values()):
            raise RequestError(f"{what} have {name!r:.60}, which is no style: expected a table with the texts prompt, negative or both")
        made[name] = Style(name, **table)
    return made


def chosen_styles(names: Sequence[str], known: Mapping[str, Style]) -> tuple[Style, ...]:
    """The styles of these names.

    Raises:
        RequestError: one is not known.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            there = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(map(repr, sorted(known)))}" if known else "there are none"
            raise RequestError(f"style {name!r:.60} is not known: {there}")
    return tuple(known[name] for name in names)


def styled(prompt: str, negative: str, styles: Sequence[Style]) -> tuple[str, str]:
    """Prompt and negative prompt with styles laid over them in order, as A1111 does: into "{prompt}", or else after a comma.

    Raises:
        RequestError: too much text.
    """
    for style in styles:
        prompt, negative = _merged(style.prompt, prompt, style.name), _merged(style.negative, negative, style.name)
    return prompt, negative


def _merged(template: str, text: str, name: str) -> str:
    places = template.count("{prompt}")
    if len(template) + max(1, places) * len(text) > 2 * MAX_CHARACTERS:
        raise RequestError(f"the style {name!r} makes a prompt of more than {MAX_CHARACTERS:,} characters: shorten it")
    return template.replace("{prompt}", text) if places else ", ".join(filter(None, (text.strip(), template.strip())))


def _text(path: Path, what: str) -> str:
    """A small UTF-8 file's text.

    Raises:
        RequestError: it is more than a megabyte, cannot be read, or is not UTF-8.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RequestError(f"{what} has more than {MAX_BYTES // 2**20} MB: shorten it")
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise RequestError(f"{what} cannot be read as UTF-8 text: save it as such") from None
