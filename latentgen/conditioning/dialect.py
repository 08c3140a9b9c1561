"""Prompt dialects: text to weighted fragments, by step. Knows the syntax of prompts; knows no tokenizer, encoder or sampler.

Three dialects. "a1111" as AUTOMATIC1111's web UI reads prompts, "comfy" as ComfyUI does, "plain" where nothing is syntax:

    a1111   (word:1.3)  (word) 1.1 times, ((word)) 1.21 times  [word] a 1.1th  escapes \\( \\) \\[ \\] \\\\  BREAK a new chunk
            a cat AND a dog :0.8  several prompts, each with its weight
            [from:to:0.4]  [to:0.4]  [from::0.4]  another text after a share of the steps (a number with a point) or after a step (one without)
            [a|b|c]  one after the other, by step
    comfy   (word:1.3), which holds whatever stands around it  (word) 1.1 times  escapes \\( \\)

In a1111 the order is: AND first, wherever it stands; then schedules and alternation, which must be well-formed within; what they leave is read for
weights. Differences, all said in `Parsed.notes` where they matter: a bracket without a partner is text (there, an open one would weigh all that
follows); the number behind a prompt's last colon counts only where there is an AND ("at 12:30" has no weight of 30); a bar that stands in no [...] is
text and leaves other schedules alone; BREAK within brackets is a break. Everything is linear in the text's length, and nothing recurses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from latentgen.errors import RequestError

Dialect = Literal["a1111", "comfy", "plain"]
DIALECTS: tuple[Dialect, ...] = ("a1111", "comfy", "plain")
LIMIT = 1000.0  # weights beyond it, either way, are brought back to it
STEP = 1.1  # what a bracket without a number does

_NUMBER = r"[+-]?(?>[0-9]++\.?+[0-9]*+|\.[0-9]++)"
_AND = re.compile(r"\bAND\b")
_BREAK = re.compile(r"\bBREAK\b")
_SHARE = re.compile(rf"\s*+({_NUMBER}(?:[eE][+-]?[0-9]++)?)\s*+")
_WEIGHT = re.compile(rf"\s*+({_NUMBER})\s*+")
_SCHEDULE = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]++|\\", re.DOTALL)
_EMPHASIS = re.compile(rf"\\[()\[\]\\]?|[()\[\]]|:\s*+{_NUMBER}\s*+\)|[^\\()\[\]:]++|:")
_PARENTHESES = re.compile(rf"\\[()]|[()]|:\s*+{_NUMBER}(?:[eE][+-]?[0-9]++)?\s*+\)|[^\\():]++|[\\:]")


@dataclass(frozen=True)
class Fragment:
    """Words of one weight.

    Attributes:
        breaks: BREAK stands before it: where an encoder reads chunks, it starts a new one.
    """

    text: str
    weight: float = 1.0
    breaks: bool = False


@dataclass(frozen=True)
class Conjunct:
    """One of the prompts that AND joins; most prompts are one alone, of weight 1."""

    weight: float
    fragments: tuple[Fragment, ...]

    @property
    def text(self) -> str:
        """The words, without their weights."""
        return "".join(" " + f.text if f.breaks else f.text for f in self.fragments)


@dataclass(frozen=True)
class Span:
    """What is said in steps `first` to `last`, both included, counted from 1. Equal prompts give equal spans, however they are written."""

    first: int
    last: int
    conjuncts: tuple[Conjunct, ...]


class Fork(NamedTuple):
    """A choice by step between branches, in a flat sequence of items.

    Attributes:
        branches: (first item, item after the last) of each.
        end: the item that follows the fork.
        when: the last step of the first branch, as it is written; "" takes one branch after the other.
    """

    branches: tuple[tuple[int, int], ...]
    end: int
    when: str = ""

    def until(self, steps: int) -> int:
        """The last of `steps` steps in which the first of two branches is said; 0 or less for none. A share of the steps is rounded down."""
        said = float(self.when) * (steps if "." in self.when else 1)
        return int(max(-1.0, min(said, float(steps))))

    def chosen(self, step: int, steps: int) -> tuple[int, int]:
        """The branch of a step, counted from 1."""
        if self.when:
            return self.branches[step > self.until(steps)]
        return self.branches[(step - 1) % len(self.branches)]


@dataclass(frozen=True)
class Part:
    """One prompt of those that AND joins, before steps are known: texts and forks in a flat sequence."""

    weight: float
    items: tuple[str | Fork, ...]

    def at(self, step: int, steps: int) -> str:
        """Its text in a step, weights still written out."""
        said, stack, at, stop = [], [], 0, len(self.items)
        while at < stop or stack:
            if at == stop:
                at, stop = stack.pop()
                continue
            item = self.items[at]
            at += 1
            if isinstance(item, Fork):
                stack.append((item.end, stop))
                at, stop = item.chosen(step, steps)
            else:
                said.append(item)
        return "".join(said)


@dataclass(frozen=True)
class Parsed:
    """A prompt, read.

    Attributes:
        text: as written.
        parts: those that AND joins.
        notes: what was not read as it may have been meant, each a sentence.
    """

    text: str
    dialect: Dialect
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()

    @property
    def scheduled(self) -> bool:
        """Whether the text depends on the step."""
        return any(isinstance(item, Fork) for part in self.parts for item in part.items)

    @property
    def breaks(self) -> bool:
        """Whether BREAK stands in it."""
        return self.dialect == "a1111" and _BREAK.search(self.text) is not None

    def spans(self, steps: int) -> tuple[Span, ...]:
        """What is said by step, steps 1 to `steps`, neighbours that say the same joined.

        Raises:
            RequestError: less than one step.
        """
        if steps < 1:
            raise RequestError(f"steps is {steps}: a prompt is read for 1 or more")
        read: dict[str, tuple[Fragment, ...]] = {}
        found: list[Span] = []
        for first, last in self._stretches(steps):
            conjuncts = []
            for part in self.parts:
                text = part.at(first, steps)
                if text not in read:
                    read[text] = _fragments(text, self.dialect)
                conjuncts.append(Conjunct(part.weight, read[text]))
            if found and found[-1].conjuncts == tuple(conjuncts):
                first = found.pop().first
            found.append(Span(first, last, tuple(conjuncts)))
        return tuple(found)

    def _stretches(self, steps: int) -> Iterator[tuple[int, int]]:
        """(first, last) of steps within which no fork turns."""
        forks = [item for part in self.parts for item in part.items if isinstance(item, Fork)]
        if any(not fork.when for fork in forks):
            ends = set(range(1, steps + 1))
        else:
            ends = {end for fork in forks if 1 <= (end := fork.until(steps))} | {steps}
        first = 1
        for end in sorted(ends):
            yield first, end
            first = end + 1


def parse(text: str, dialect: Dialect = "a1111", *, name: str = "prompt", composed: bool = True) -> Parsed:
    """Read a prompt. Any text has a reading.

    Args:
        name: what notes call the text.
        composed: AND joins prompts; False reads it as a word, as A1111 does in a negative prompt.

    Raises:
        RequestError: a dialect that is not known.
    """
    if dialect not in DIALECTS:
        raise RequestError(f"dialect is {dialect!r:.40}: expected one of {', '.join(map(repr, DIALECTS))}")
    notes: list[str] = []
    if dialect == "plain":
        return Parsed(text, dialect, (Part(1.0, (text,)),))
    parts = _parts(text, name, composed, notes) if dialect == "a1111" else [Part(1.0, (text,))]
    tokens = _tokens(text, dialect)
    _, alone = _partners(tokens, dialect)
    if alone:
        at = sum(map(len, tokens[:min(alone) + 1]))
        few = "1 bracket has no partner and stands" if len(alone) == 1 else f"{len(alone)} brackets have no partner and stand"
        notes.append(f"{name}: {few} as text, the first at character {at}: close it, or write \\( \\) for one that is meant")
    if any(abs(float(token[1:-1])) > LIMIT for token in tokens if token[0] == ":" and len(token) > 2 and token[-1] == ")"):
        notes.append(f"{name}: a weight beyond {LIMIT:g} is read as {LIMIT:g}: weights between 0 and 2 are usual")
    return Parsed(text, dialect, tuple(parts), tuple(notes))


def _parts(text: str, name: str, composed: bool, notes: list[str]) -> list[Part]:
    """The prompts that AND joins, each with its weight and its schedules."""
    said = _AND.split(text)
    if not composed or len(said) == 1:
        if len(said) > 1:
            notes.append(f"{name}: AND is read as a word here: only the prompt itself is composed of several")
        head, colon, tail = text.rpartition(":")
        if colon and head and _WEIGHT.fullmatch(tail):
            notes.append(f"{name}: ':{tail.strip()}' at its end is text: a weight there belongs to prompts joined by AND, "
                         f"so write (words:{tail.strip()}) to weigh words")
        return [Part(1.0, _items(text))]
    parts = []
    for one in said:
        head, colon, tail = one.rpartition(":")
        number = _WEIGHT.fullmatch(tail) if colon else None
        weight = _kept(float(number[1])) if number else 1.0
        if number and weight != float(number[1]):
            notes.append(f"{name}: a weight of {number[1]:.20} is read as {weight:g}")
        parts.append(Part(weight, _items((head if number else one).strip())))
    return parts


def _items(text: str) -> tuple[str | Fork, ...]:
    """Texts and forks. A group counts where it is well-formed all through: its brackets have partners, and its colons and bars make sense."""
    if "]" not in text or (":" not in text and "|" not in text):
        return (text,)
    items: list[str | Fork] = list(_SCHEDULE.findall(text))
    opened: list[int] = []  # brackets not closed yet
    before: list[int] = []  # how many marks stood open when each was
    marks: list[int] = []  # colons and bars directly within those brackets
    odd: set[int] = set()  # brackets with something within that makes no sense
    found = False
    for at, token in enumerate(items):
        if token == "[" or token == "(":
            opened.append(at)
            before.append(len(marks))
        elif not opened:
            continue
        elif token == ":" or token == "|":
            marks.append(at)
        elif token == "]" or token == ")":
            if items[opened[-1]] != ("[" if token == "]" else "("):
                odd.add(opened[-1])
                continue
            start, first = opened.pop(), before.pop()
            within = marks[first:]
            del marks[first:]
            fork = _fork(items, start, within, at) if within and token == "]" and start not in odd else None
            if fork:
                items[start], found = fork, True
            elif opened and (start in odd or len(within) > (token == ")") or (within and items[within[0]] == "|")):
                odd.add(opened[-1])
    return tuple(items) if found else (text,)


def _fork(items: list[str | Fork], start: int, marks: list[int], close: int) -> Fork | None:
    """[a|b], [from:to:when] or [to:when], if the group from items[start] to items[close] is one of them, with colons and bars at `marks`."""
    bars = sum(items[mark] == "|" for mark in marks)
    if bars == len(marks):
        edges = [start, *marks, close]
        return Fork(tuple((first + 1, last) for first, last in pairwise(edges)), close + 1)
    if bars or len(marks) > 2 or close - marks[-1] != 2:
        return None
    number = items[close - 1]
    when = _SHARE.fullmatch(number) if isinstance(number, str) else None
    if when is None:
        return None
    middle = marks[0] if len(marks) == 2 else start
    return Fork(((start + 1, max(middle, start + 1)), (middle + 1, marks[-1])), close + 1, when[1])


def _tokens(text: str, dialect: Dialect) -> list[str]:
    return (_EMPHASIS if dialect == "a1111" else _PARENTHESES).findall(text)


def _partners(tokens: list[str], dialect: Dialect) -> tuple[dict[int, int], list[int]]:
    """Opening token -> the one that closes it, and the brackets without a partner. Round and square ones do not see each other."""
    pairs: dict[int, int] = {}
    alone: list[int] = []
    opened: dict[str, list[int]] = {")": [], "]": []}
    for at, token in enumerate(tokens):
        if token == "(":
            opened[")"].append(at)
        elif token == "[" and dialect == "a1111":
            opened["]"].append(at)
        elif token[-1] == ")" and token[0] != "\\" or token == "]" and dialect == "a1111":
            waiting = opened[token[-1]]
            if waiting:
                pairs[waiting.pop()] = at
            else:
                alone.append(at)
    return pairs, alone + opened[")"] + opened["]"]


def _fragments(text: str, dialect: Dialect) -> tuple[Fragment, ...]:
    """Words with their weights: those of brackets in brackets multiplied (a1111), or replaced by a number within (comfy)."""
    made = _Fragments()
    if dialect == "plain":
        made.say(text)
        return made.done()
    tokens = _tokens(text, dialect)
    pairs, _ = _partners(tokens, dialect)
    closing = {close: opened for opened, close in pairs.items()}
    weights, square = [1.0], [1.0]
    for at, token in enumerate(tokens):
        if at in pairs:
            number = _number(tokens, at, pairs[at], dialect)
            if token == "[":
                square.append(_kept(square[-1] / STEP))
            elif number is None:
                weights.append(_kept(weights[-1] * STEP))
            else:
                weights.append(_kept(number if dialect == "comfy" else weights[-1] * number))
            made.weigh(weights[-1] * square[-1])
        elif at in closing:
            if len(token) > 1 and _number(tokens, closing[at], at, dialect) is None:
                made.say(token[:-1])
            (square if token == "]" else weights).pop()
            made.weigh(weights[-1] * square[-1])
        elif token[0] == "\\":
            made.say(token[1:] if dialect == "a1111" or len(token) > 1 else token)
        elif dialect == "a1111" and "BREAK" in token:
            made.say_with_breaks(token)
        else:
            made.say(token)
    return made.done()


class _Fragments:
    """Fragments under way: neighbours of one weight joined, nothing empty but between two breaks."""

    def __init__(self) -> None:
        self.made: list[tuple[list[str], float, bool]] = []
        self.words: list[str] = []
        self.weight = 1.0
        self.breaks = 0  # that no words have followed yet
        self.say = self.words.append  # BREAK apart, all that is ever done with words

    def weigh(self, weight: float) -> None:
        """What follows has another weight, kept to seven digits as encoders' states are."""
        if weight != self.weight:
            self._close()
            self.weight = weight if weight == 1 else float(f"{_kept(weight):.7g}")

    def say_with_breaks(self, text: str) -> None:
        """Words among which BREAK stands; the blanks around it go."""
        words = _BREAK.split(text)
        for at, word in enumerate(words):
            if at:
                self._close()
                self.breaks += 1
            word = word.lstrip() if at else word
            self.say(word.rstrip() if at < len(words) - 1 else word)

    def done(self) -> tuple[Fragment, ...]:
        """All of them; one at least."""
        self._close()
        self.made += [([], 1.0, True)] * self.breaks
        return tuple(Fragment("".join(words), weight, breaks) for words, weight, breaks in self.made) or (Fragment(""),)

    def _close(self) -> None:
        if not any(self.words):
            self.words.clear()
            return
        if self.made and not self.breaks and self.made[-1][1] == self.weight:
            self.made[-1][0].extend(self.words)
        else:
            self.made += [([], 1.0, True)] * (self.breaks - 1)
            self.made.append((self.words.copy(), self.weight, self.breaks > 0))
            self.breaks = 0
        self.words.clear()


def _number(tokens: list[str], opened: int, close: int, dialect: Dialect) -> float | None:
    """The number before a closing bracket. ComfyUI needs words before it: "(:3)" is a face."""
    token = tokens[close]
    if len(token) == 1 or (dialect == "comfy" and close == opened + 1):
        return None
    return float(token[1:-1])


def _kept(weight: float) -> float:
    return max(-LIMIT, min(LIMIT, weight))
