"""Prompts: text to chunks of token ids with weights. Knows a tokenizer's lengths; knows no encoder, model or guidance.

A text of any length is kept whole. CLIP reads it over as many chunks as it needs, each opened, closed and padded as the encoder expects, and the
encoder's states of the chunks are joined end to end. Where an encoder has one chunk, a longer text is refused, or cut in words that say so.
Fragments of different weight are cut into tokens one by one, as A1111 and ComfyUI do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from latentgen.conditioning.dialect import Conjunct, Fragment, Parsed
from latentgen.conditioning.tokens import Tokens
from latentgen.errors import RequestError

Item = TypeVar("Item")
MAX_CHARACTERS = 20_000
MAX_CHUNKS = 16
BACKTRACK = 20  # of 75 tokens: how near to a chunk's end a comma must be for a1111 prompts to go on behind it in the next chunk


@dataclass(frozen=True)
class PromptChunks:
    """A prompt as one encoder reads it.

    Attributes:
        text: what was said.
        ids: one tuple of token ids per chunk, all of the tokenizer's chunk length (as long as the text where a tokenizer does not pad).
        tokens: how many ids are words (start, end, template and padding not counted).
        used: per chunk, how many ids are not padding.
        left: padding stands before them instead of after them.
        note: what was cut, if anything.
        weights: shaped like `ids`: how much each counts; 1 at start, end, template and padding.
    """

    text: str
    ids: tuple[tuple[int, ...], ...]
    tokens: int
    used: tuple[int, ...]
    left: bool = False
    note: str = ""
    weights: tuple[tuple[float, ...], ...] = ()

    @property
    def weighted(self) -> bool:
        """Whether any weight is not 1."""
        return any(weight != 1 for row in self.weights for weight in row)

    @property
    def mask(self) -> tuple[tuple[int, ...], ...]:
        """Shaped like `ids`: 1 at start, words, template and end, 0 at padding."""
        rows = [((1,) * used, (0,) * (len(chunk) - used)) for chunk, used in zip(self.ids, self.used, strict=True)]
        return tuple(pad + said if self.left else said + pad for said, pad in rows)

    def grown(self, count: int, tokenizer: Tokens) -> PromptChunks:
        """With empty chunks of its tokenizer up to `count`; unchanged where a text is always one chunk."""
        more = max(0, count - len(self.ids)) if tokenizer.several else 0
        empty = tokenizer.chunks("")[0]
        return replace(self, ids=self.ids + (_filled(empty, tokenizer, tokenizer.pad),) * more, used=self.used + (len(empty),) * more,
                       weights=self.weights + ((1.0,) * tokenizer.length,) * more)


@dataclass(frozen=True)
class LaidConjunct:
    """One of the prompts that AND joins, for every encoder: its weight, and its chunks by the tokenizer's name."""

    weight: float
    chunks: Mapping[str, PromptChunks]


@dataclass(frozen=True)
class LaidSpan:
    """What every encoder reads for steps `first` to `last`, both included, counted from 1."""

    first: int
    last: int
    conjuncts: tuple[LaidConjunct, ...]


def check_text(text: object, *, name: str = "prompt") -> str:
    """The text itself, if it is one that can be encoded and stored.

    Raises:
        RequestError: not a string, longer than 20,000 characters, or with NUL or unpaired surrogates.
    """
    if not isinstance(text, str):
        raise RequestError(f"{name} is {shown(text)}: expected one string; for several pictures call once per prompt or use batch=")
    if len(text) > MAX_CHARACTERS:
        raise RequestError(f"{name} has {len(text):,} characters: at most {MAX_CHARACTERS:,} are read, so shorten it")
    if "\x00" in text:
        raise RequestError(f"{name} has a NUL character at position {text.index(chr(0))}: remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} has half a surrogate pair at position {error.start}: it is not valid Unicode, so retype that character") from None
    return text


def chunked(text: str | Conjunct, tokenizer: Tokens, *, name: str = "prompt", at_least: int = 1, strict: bool = True, reader: str = "",
            backtrack: int = 0) -> PromptChunks:
    """Lay a text out for one tokenizer.

    Args:
        text: words, or fragments of them with weights. BREAK starts a new chunk where there may be several.
        name: how messages call the text; `reader`: how they call the tokenizer.
        at_least: chunks, filled up with empty ones, where a text may take several.
        strict: refuse a text that does not fit in an encoder's only chunk; False cuts it, and `note` says so.
        backtrack: of 75 tokens. A chunk that is full and has a comma among so many of its last ones ends behind it (A1111's "increase coherency by
            padding from the last comma"; 20 there). 0 fills every chunk to its end.

    Raises:
        RequestError: more than 16 chunks, or a text too long for its one chunk.
    """
    fragments = text.fragments if isinstance(text, Conjunct) else (Fragment(text),)
    around = tokenizer.opening + tokenizer.closing
    room = tokenizer.length - around
    rows = _several(fragments, tokenizer, backtrack * room // 75) if tokenizer.several else [_one(fragments, tokenizer)]
    count, note = sum(max(0, len(row) - around) for row in rows), ""
    if len(rows) > MAX_CHUNKS:
        fewer = " or write BREAK less often" if any(fragment.breaks for fragment in fragments) else ""
        raise RequestError(f"{name} has {count:,} tokens in {len(rows)} chunks: at most {MAX_CHUNKS * room} ({MAX_CHUNKS} chunks of {room}) "
                           f"are read, so shorten it{fewer}")
    if any(len(row) > tokenizer.length for row in rows):
        problem = f"{name} has {count} tokens" + (f" for {reader}, which reads at most {room}" if reader else f", of which at most {room} are read")
        if strict:
            raise RequestError(f"{problem}: shorten it, or pass strict=False to have it cut")
        note = f"{problem}: the last {count - room} are cut off"
        rows = [[*row[:tokenizer.length - tokenizer.closing], *row[len(row) - tokenizer.closing:]] for row in rows]
        count = room
    said = text.text if isinstance(text, Conjunct) else text
    ids = tuple(_filled([i for i, _ in row], tokenizer, tokenizer.pad) for row in rows)
    weights = tuple(_filled([weight for _, weight in row], tokenizer, 1.0) for row in rows)
    return PromptChunks(said, ids, count, tuple(map(len, rows)), tokenizer.left, note, weights).grown(at_least, tokenizer)


def laid_out(text: str | Conjunct, tokenizers: Mapping[str, Tokens], *, name: str = "prompt", texts: Mapping[str, str | Conjunct] | None = None,
             strict: bool = True, notes: list[str] | None = None, backtrack: int = 0) -> dict[str, PromptChunks]:
    """One prompt for every encoder, those that take several chunks with as many as the longest needs.

    Args:
        tokenizers: by name, "tokenizer", "tokenizer_2".
        texts: by tokenizer's name, what an encoder hears instead of `text`; messages call the text of "tokenizer_2" `name` + "_2".
        strict: refuse a text that does not fit in an encoder's only chunk; False cuts it.
        notes: what was cut is appended here.
        backtrack: see `chunked`.

    Raises:
        RequestError: a text too long for an encoder, or one for an encoder that is not there.
    """
    own = texts or {}
    for reader in own:
        if reader not in tokenizers:
            raise RequestError(f"{_called(name, reader)} is given but this model has no {reader}: leave it out")
    laid = {reader: chunked(own.get(reader, text), tokens, name=_called(name, reader) if reader in own else name, strict=strict, reader=reader,
                            backtrack=backtrack)
            for reader, tokens in tokenizers.items()}
    if notes is not None:
        notes += [chunks.note for chunks in laid.values() if chunks.note]
    return levelled(laid, {}, tokenizers)[0]


def laid_spans(prompt: Parsed, tokenizers: Mapping[str, Tokens], *, steps: int, name: str = "prompt", texts: Mapping[str, Parsed] | None = None,
               strict: bool = True, notes: list[str] | None = None, backtrack: int | None = None) -> tuple[LaidSpan, ...]:
    """A prompt that was read, by step, for every encoder; all chunks levelled, so that one stands for another in a batch.

    Args:
        texts: by tokenizer's name, what an encoder hears instead. It has as many prompts joined by AND as `prompt`, or one that
            goes with all of them.
        backtrack: see `chunked`; None is 20 for a1111 prompts and 0 for others.

    Raises:
        RequestError: as `laid_out`; or another text has another number of prompts joined by AND.
    """
    said: list[str] = []
    for reader, own in (texts or {}).items():
        if len(own.parts) not in (1, len(prompt.parts)):
            raise RequestError(f"{name} has {len(prompt.parts)} prompts joined by AND and {_called(name, reader)} has {len(own.parts)}: "
                               "write as many, or one")
        if len(own.parts) > 1 and [part.weight for part in own.parts] != [part.weight for part in prompt.parts]:
            said.append(f"{_called(name, reader)}: the weights of its prompts joined by AND are those of {name}")
    if any(parsed.breaks for parsed in (prompt, *(texts or {}).values())):
        whole = [reader for reader, tokens in tokenizers.items() if not tokens.several]
        said += [f"{name}: BREAK says nothing to {reader}, which reads all in one chunk" for reader in whole]
    reach = backtrack if backtrack is not None else BACKTRACK if prompt.dialect == "a1111" else 0
    spans = {"": prompt.spans(steps), **{reader: own.spans(steps) for reader, own in (texts or {}).items()}}
    made, first = [], 1
    for last in sorted({span.last for several in spans.values() for span in several}):
        now = {reader: next(span for span in several if last <= span.last).conjuncts for reader, several in spans.items()}
        others = {reader: own for reader, own in now.items() if reader}
        laid = [laid_out(one, tokenizers, name=name, texts={reader: own[min(at, len(own) - 1)] for reader, own in others.items()}, strict=strict,
                         notes=said, backtrack=reach) for at, one in enumerate(now[""])]
        made.append(LaidSpan(first, last, tuple(LaidConjunct(one.weight, chunks) for one, chunks in zip(now[""], laid, strict=True))))
        first = last + 1
    if notes is not None:
        notes += dict.fromkeys(said)
    return level_spans([tuple(made)], tokenizers)[0]


def level_spans(several: Sequence[tuple[LaidSpan, ...]], tokenizers: Mapping[str, Tokens]) -> list[tuple[LaidSpan, ...]]:
    """Prompts by step (a positive and a negative one) with empty chunks added until all that may have several chunks have as many."""
    chunks = [laid for spans in several for span in spans for one in span.conjuncts for laid in one.chunks.values()]
    count = max((len(laid.ids) for laid in chunks), default=1)

    def grown(one: LaidConjunct) -> LaidConjunct:
        return LaidConjunct(one.weight, {reader: laid.grown(count, tokenizers[reader]) for reader, laid in one.chunks.items()})

    return [tuple(replace(span, conjuncts=tuple(map(grown, span.conjuncts))) for span in spans) for spans in several]


def silent(chunks: PromptChunks, tokenizer: Tokens) -> PromptChunks:
    """The empty prompt in one chunk as long as those of another, padded where its tokenizer would not pad."""
    empty = tokenizer.chunks("")[0]
    padding = (tokenizer.pad,) * (len(chunks.ids[0]) - len(empty))
    ids = (*padding, *empty) if tokenizer.left else (*empty, *padding)
    return PromptChunks("", (ids,), 0, (len(empty),), tokenizer.left, "", ((1.0,) * len(ids),))


def levelled(a: Mapping[str, PromptChunks], b: Mapping[str, PromptChunks],
             tokenizers: Mapping[str, Tokens]) -> tuple[dict[str, PromptChunks], dict[str, PromptChunks]]:
    """Two prompts with empty chunks added until all that may have several chunks have as many, in both; the rest as it is.

    A batch of both needs that, and so do encoders whose states are joined side by side.
    """
    count = max((len(chunks.ids) for chunks in (*a.values(), *b.values())), default=1)  # 1 where a text is always one chunk
    first, second = ({reader: chunks.grown(count, tokenizers[reader]) for reader, chunks in laid.items()} for laid in (a, b))
    return first, second


def _several(fragments: Sequence[Fragment], tokenizer: Tokens, backtrack: int) -> list[list[tuple[int, float]]]:
    """(id, weight) of each chunk, opened and closed. A full chunk ends behind its last comma if that is among its last `backtrack` tokens."""
    empty = tokenizer.chunks("")[0]
    start, end = ([(i, 1.0) for i in side] for side in (empty[:tokenizer.opening], empty[tokenizer.opening:]))
    room = tokenizer.length - len(empty)
    comma = tokenizer.ids(",") if backtrack else []
    rows: list[list[tuple[int, float]]] = []
    row: list[tuple[int, float]] = []
    behind = 0  # the place after the last comma, 0 for none
    for fragment in fragments:
        if fragment.breaks:
            rows.append(row)
            row, behind = [], 0
        for i in tokenizer.ids(fragment.text):
            if [i] == comma and len(row) < room:
                behind = len(row) + 1
            elif len(row) == room:
                kept = behind if [i] != comma and behind and room - behind < backtrack else room
                rows.append(row[:kept])
                row, behind = row[kept:], 0
            row.append((i, fragment.weight))
    if row or not rows:
        rows.append(row)
    return [[*start, *row, *end] for row in rows]


def _one(fragments: Sequence[Fragment], tokenizer: Tokens) -> list[tuple[int, float]]:
    """(id, weight) of the only chunk with all that stands around it; the words of several fragments are cut into tokens one by one."""
    empty = tokenizer.chunks("")[0]
    opening, closing = tokenizer.opening, tokenizer.closing
    if len(fragments) == 1:
        whole, weight = tokenizer.chunks(fragments[0].text)[0], fragments[0].weight
        return [(i, weight if opening <= at < len(whole) - closing else 1.0) for at, i in enumerate(whole)]
    said = [(i, f.weight) for at, f in enumerate(fragments) for i in tokenizer.ids(" " + f.text if f.breaks and at else f.text)]
    return [*((i, 1.0) for i in empty[:opening]), *said, *((i, 1.0) for i in empty[len(empty) - closing:])]


def _filled(chunk: list[Item], tokenizer: Tokens, with_: Item) -> tuple[Item, ...]:
    padding = [with_] * (tokenizer.length - len(chunk)) if tokenizer.padded else []
    return tuple(padding + chunk if tokenizer.left else chunk + padding)


def _called(name: str, reader: str) -> str:
    """"tokenizer_2" reads what a request calls prompt_2."""
    return name + reader.removeprefix("tokenizer")


def shown(value: object) -> str:
    """A value as a message shows it: its repr on one line, cut at 60 characters."""
    if isinstance(value, (list, tuple)) and not value:
        return "empty"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python refuses to write out an int of more than 4,300 digits
        return f"a {type(value).__name__} too long to show"
    return f"a {type(value).__name__} object" if " at 0x" in text else f"{text:.60}"
