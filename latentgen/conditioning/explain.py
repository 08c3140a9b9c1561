"""What a prompt says to each encoder, as a table: tokens, chunks, weights, the schedule by step, and what is not heard. Knows prompts and tokenizers;
knows no model, and draws nothing.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass

from latentgen.conditioning.dialect import Dialect, Parsed, parse
from latentgen.conditioning.prompt import LaidSpan, PromptChunks, laid_spans
from latentgen.conditioning.tokens import Tokens

MOST = 40  # stretches of steps that a table shows in full: an alternation has one a step
UNKNOWN = ("<unk>", "[UNK]")


@dataclass(frozen=True)
class Word:
    """One token.

    Attributes:
        text: what it stands for, as the tokenizer has it.
        kind: "word"; "frame" at start, end and template; "unknown" where the vocabulary has nothing for what was written.
    """

    id: int
    text: str
    weight: float
    kind: str


@dataclass(frozen=True)
class Heard:
    """What one encoder reads of one prompt.

    Attributes:
        reader: the tokenizer's name.
        chunks: its tokens, padding left out.
        room: tokens that a chunk has for words; `padding` ids are filled up.
        cut: words that fall outside the encoder, "" for none.
    """

    reader: str
    chunks: tuple[tuple[Word, ...], ...]
    room: int
    padding: int
    cut: str = ""

    @property
    def words(self) -> int:
        """How many tokens are words."""
        return sum(word.kind != "frame" for chunk in self.chunks for word in chunk)


@dataclass(frozen=True)
class Prompt:
    """One distinct prompt: those that AND joins and those that a schedule turns to are listed once each, whenever they are said."""

    text: str
    heard: tuple[Heard, ...]


@dataclass(frozen=True)
class Explanation:
    """A prompt explained. Print it, or let a notebook show it.

    Attributes:
        schedule: (first step, last step, ((weight, number of the prompt from 1), ...)), steps counted from 1 and both included.
        prompts: the distinct prompts, in the order in which they are first said.
        notes: what was not read as it may have been meant, and what is not heard.
        drawn: what wildcards came to in `text`, as "{red|green} -> red".
    """

    text: str
    dialect: Dialect
    steps: int
    schedule: tuple[tuple[int, int, tuple[tuple[float, int], ...]], ...]
    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"dialect   {self.dialect}", *(f"drawn     {draw}" for draw in self.drawn)]
        if len(self.schedule) > 1 or len(self.schedule[0][2]) > 1:
            lines += [f"steps     {said}" for said in self._schedule()]
        for number, prompt in enumerate(self.prompts, 1):
            lines += [f"prompt {number}  {_line(prompt.text)}"]
            for heard in prompt.heard:
                lines += [f"  {_counted(heard)}"]
                for at, chunk in enumerate(heard.chunks, 1):
                    lines += [f"    chunk {at}  position       id  weight  token"]
                    lines += [f"{place:>21} {word.id:>8} {_weight(word):>7}  {_line(word.text)}{_aside(word)}" for place, word in enumerate(chunk)]
                lines += [f"    cut off  {_line(heard.cut)}"] if heard.cut else []
        return "\n".join([*lines, *(f"note      {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        def cells(values: list[object], tag: str = "td") -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values) + "</tr>"

        parts = [f"<p>dialect <b>{html.escape(self.dialect)}</b></p>", *(f"<p>drawn {html.escape(draw)}</p>" for draw in self.drawn)]
        if len(self.schedule) > 1 or len(self.schedule[0][2]) > 1:
            parts += ["<ul>", *(f"<li>steps {html.escape(said)}</li>" for said in self._schedule()), "</ul>"]
        for number, prompt in enumerate(self.prompts, 1):
            parts.append(f"<p><b>prompt {number}</b> {html.escape(_line(prompt.text))}</p>")
            for heard in prompt.heard:
                rows = [cells([at, place, word.id, _weight(word), _line(word.text) + _aside(word)])
                        for at, chunk in enumerate(heard.chunks, 1) for place, word in enumerate(chunk)]
                head = cells(["chunk", "position", "id", "weight", "token"], "th")
                parts.append(f"<table><caption>{html.escape(_counted(heard))}</caption><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>")
                parts += [f"<p>cut off: {html.escape(_line(heard.cut))}</p>"] if heard.cut else []
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return "<div>" + "".join(parts) + (f"<ul>{notes}</ul>" if notes else "") + "</div>"

    def _schedule(self) -> list[str]:
        """Each stretch of steps in words."""
        said = []
        for first, last, conjuncts in self.schedule[:MOST]:
            numbers = [f"prompt {number}" + (f" (weight {weight:g})" if weight != 1 else "") for weight, number in conjuncts]
            said.append((f"{first}: " if first == last else f"{first} to {last}: ") + " AND ".join(numbers))
        return said + ([f"... and {len(self.schedule) - MOST} stretches more"] if len(self.schedule) > MOST else [])


def explain(prompt: Parsed | str, tokenizers: Mapping[str, Tokens], *, steps: int = 20, texts: Mapping[str, Parsed] | None = None,
            name: str = "prompt") -> Explanation:
    """What a prompt says to each encoder. Nothing is refused for its length: what would be cut is shown.

    Args:
        prompt: as read, or a text in the a1111 dialect.
        texts: by tokenizer's name, what an encoder hears instead.

    Raises:
        RequestError: more text than any request may have, less than one step, or texts that do not fit to each other.
    """
    said = parse(prompt, name=name) if isinstance(prompt, str) else prompt
    notes = list(said.notes) + [note for own in (texts or {}).values() for note in own.notes]
    spans = laid_spans(said, tokenizers, steps=steps, name=name, texts=texts, strict=False, notes=notes)
    prompts, numbers = _distinct(spans, tokenizers)
    for reader in tokenizers:
        odd = sum(word.kind == "unknown" for p in prompts for heard in p.heard if heard.reader == reader for chunk in heard.chunks for word in chunk)
        if odd:
            notes.append(f"{name}: {odd} token{'s' if odd > 1 else ''} of what is written {'are' if odd > 1 else 'is'} unknown to {reader}")
    schedule = tuple((span.first, span.last, tuple((one.weight, numbers[at]) for at, one in enumerate(span.conjuncts, start)))
                     for span, start in zip(spans, _starts(spans), strict=True))
    return Explanation(said.text, said.dialect, steps, schedule, tuple(prompts), tuple(dict.fromkeys(notes)))


def _distinct(spans: tuple[LaidSpan, ...], tokenizers: Mapping[str, Tokens]) -> tuple[list[Prompt], list[int]]:
    """The distinct prompts, and the number of each conjunct of all spans in turn, counted from 1."""
    prompts: list[Prompt] = []
    known: dict[object, int] = {}
    numbers = []
    for one in (one for span in spans for one in span.conjuncts):
        key = tuple((chunks.ids, chunks.weights) for chunks in one.chunks.values())
        if key not in known:
            known[key] = len(prompts) + 1
            first = next(iter(one.chunks.values()))
            prompts.append(Prompt(first.text, tuple(_heard(reader, chunks, tokenizers[reader]) for reader, chunks in one.chunks.items())))
        numbers.append(known[key])
    return prompts, numbers


def _starts(spans: tuple[LaidSpan, ...]) -> list[int]:
    """Where each span's conjuncts begin among all."""
    starts, at = [], 0
    for span in spans:
        starts.append(at)
        at += len(span.conjuncts)
    return starts


def _heard(reader: str, chunks: PromptChunks, tokenizer: Tokens) -> Heard:
    """The chunks' tokens as text, frame and padding told apart."""
    rows = []
    for ids, weights, used in zip(chunks.ids, chunks.weights, chunks.used, strict=True):
        here = slice(len(ids) - used, None) if chunks.left else slice(used)
        words = zip(ids[here], tokenizer.words(ids[here]), weights[here], strict=True)
        frame = set(range(used)) - set(range(tokenizer.opening, used - tokenizer.closing))
        rows.append(tuple(Word(i, text, weight, "frame" if at in frame else "unknown" if text.strip() in UNKNOWN else "word")
                          for at, (i, text, weight) in enumerate(words)))
    padding = sum(len(ids) - used for ids, used in zip(chunks.ids, chunks.used, strict=True))
    return Heard(reader, tuple(rows), tokenizer.length - tokenizer.opening - tokenizer.closing, padding, _cut(chunks, tokenizer))


def _cut(chunks: PromptChunks, tokenizer: Tokens) -> str:
    """The words behind the encoder's last place."""
    if not chunks.note:
        return ""
    return "".join(tokenizer.words(tokenizer.ids(chunks.text)[chunks.tokens:])).strip()


def _counted(heard: Heard) -> str:
    chunks = f"{len(heard.chunks)} chunk{'s' if len(heard.chunks) > 1 else ''}"
    return f"{heard.reader}: {heard.words} tokens in {chunks} of at most {heard.room}, {heard.padding} of padding"


def _line(text: str) -> str:
    """A text on one line, in quotes so that blanks show."""
    return "'" + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + "'"


def _weight(word: Word) -> str:
    return "" if word.kind == "frame" else f"{word.weight:g}"


def _aside(word: Word) -> str:
    return "" if word.kind == "word" else f"  ({word.kind})"
