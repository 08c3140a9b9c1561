"""Tokenizers: text in, token ids out, laid out as an encoder reads them. Knows vocabularies; knows no encoder, model or prompt syntax.

`tokenizers` is used directly (transformers takes seconds to import). Whatever a user writes is text: a special token spelt out in a prompt is
cut into the pieces of ordinary words and never closes a chunk, ends a turn or pads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from latentgen.conditioning import vocabulary
from latentgen.conditioning.vocabulary import END, START, Vocabulary, read_vocabulary
from latentgen.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LOOKS_SPECIAL = re.compile(r"<\|\w+\|>|</?\w+>|\[/?[A-Z_]+\]")
LENGTHS = range(3, 4097)
OTHER = "it is damaged or the tokenizer of another model, so name the right one"


@dataclass(frozen=True)
class TokenizerSpec:
    """What tokenizer a family needs, for one of its encoders.

    Attributes:
        kind: "clip" (byte-level BPE, lower case, read in chunks), "t5" (one chunk, ends with </s>) or "chat" (byte-level BPE around which
            `before` and `after` are put; one chunk).
        length: ids in one chunk, everything counted; None takes the tokenizer file's own model_max_length.
        pad: the padding token where the tokenizer's own files name none, as the packaged one and a lone tokenizer.json do.
        padded: fill up to `length`; else a chunk is as long as its text. CLIP's chunks are always filled up.
        left: padding stands before the text where the tokenizer's own files do not say on which side.
        before, after: texts with special tokens that a chat encoder reads around the prompt.
        lower: the text is put in lower case and stripped first, where the tokenizer does not do it.
    """

    kind: Literal["clip", "t5", "chat"]
    length: int | None = None
    pad: str | None = None
    padded: bool = True
    left: bool = False
    before: str = ""
    after: str = ""
    lower: bool = False


class Tokens(Protocol):
    """What planning needs of a tokenizer.

    Attributes:
        several: a long text takes several chunks; else it is one chunk, whatever its length.
        length: ids in one chunk; `opening` of them stand before the words and `closing` after them.
        pad: id of the padding token; `padded`: chunks are filled up with it; `left`: before the chunk instead of after it.
        size: ids are below this.
    """

    several: bool
    length: int
    opening: int
    closing: int
    pad: int
    padded: bool
    left: bool
    size: int

    def ids(self, text: str) -> list[int]:
        """Token ids of the words alone; any length."""

    def words(self, ids: Sequence[int]) -> list[str]:
        """What each id stands for, as text."""

    def chunks(self, text: str) -> list[list[int]]:
        """The text with all that its encoder reads around it, not filled up; where there is only one chunk, it may be longer than `length`."""


@dataclass(frozen=True)
class _Read:
    """What all kinds share; `inner` is a `tokenizers.Tokenizer` without special tokens, `names` are the special ones by id."""

    inner: Tokenizer = field(repr=False)
    names: Mapping[int, str] = field(repr=False)
    length: int
    pad: int
    opening: int
    closing: int
    size: int
    padded: bool = True
    left: bool = False
    lower: bool = False

    def ids(self, text: str) -> list[int]:
        """Token ids of the words alone; any length."""
        return self.inner.encode(text.lower().strip() if self.lower else text, add_special_tokens=False).ids

    def words(self, ids: Sequence[int]) -> list[str]:
        """What each id stands for, as text; a token of half a character is shown as U+FFFD."""
        return [self.names[i] if i in self.names else self._word(self.inner.id_to_token(i) or "") for i in ids]

    def _word(self, token: str) -> str:
        body, end = (token[:-4], " ") if token.endswith("</w>") else (token, "")
        symbols = vocabulary.byte_symbols()
        return bytes(symbols[c] for c in body).decode("utf-8", "replace") + end if all(c in symbols for c in body) else body + end


@dataclass(frozen=True)
class ClipTokens(_Read):
    """CLIP's tokenizer (lower case, byte-level BPE).

    Attributes:
        start, end: ids that open and close every chunk.
    """

    start: int = 0
    end: int = 0
    several: ClassVar[bool] = True

    @classmethod
    def packaged(cls, *, pad: str | None = None, length: int = 77) -> ClipTokens:
        """CLIP's own vocabulary, with no file at all.

        Raises:
            ModelError: a padding token that is no token, or a length outside 3 to 4096.
        """
        spec = TokenizerSpec("clip", length, pad)
        return cls._of(vocabulary.packaged_clip(), spec, "tokenizer", pad=pad or END, inner=vocabulary.packaged_rules())

    @classmethod
    def read(cls, place: Path, *, spec: TokenizerSpec = TokenizerSpec("clip"), name: str = "tokenizer") -> ClipTokens:
        """Read vocab.json, merges.txt and tokenizer_config.json from a folder, or tokenizer.json.

        Raises:
            ModelError: a file is missing or damaged.
        """
        found = _of_kind(read_vocabulary(place, name=name), "BPE", name, place)
        return cls._of(found, spec, _named(name, place), pad=found.named("pad_token") or spec.pad or END)

    @classmethod
    def _of(cls, found: Vocabulary, spec: TokenizerSpec, name: str, *, pad: str, inner: Tokenizer | None = None) -> ClipTokens:
        start, end = (_required(found, token, name) for token in (START, END))
        return cls(inner=inner or vocabulary.clip_rules(found, name=name), names={start: START, end: END}, length=_length(found, spec, name, 2),
                   opening=1, closing=1, pad=_required(found, pad, name), size=found.size, lower=spec.lower, start=start, end=end)

    def chunks(self, text: str) -> list[list[int]]:
        """As many chunks as the text needs, at least one, each opened and closed."""
        ids, room = self.ids(text), self.length - 2
        return [[self.start, *ids[at:at + room], self.end] for at in range(0, max(1, len(ids)), room)]


@dataclass(frozen=True)
class T5Tokens(_Read):
    """T5's tokenizer (SentencePiece Unigram): one chunk that ends with </s>."""

    end: int = 1
    several: ClassVar[bool] = False

    @classmethod
    def read(cls, place: Path, *, spec: TokenizerSpec, name: str = "tokenizer") -> T5Tokens:
        """Read tokenizer.json or spiece.model, from its folder or by its own name.

        Raises:
            ModelError: missing, damaged, or of another kind.
        """
        found = _of_kind(read_vocabulary(place, name=name), "Unigram", name, place)
        name = _named(name, place)
        pieces = {piece: i for i, (piece, _) in enumerate(found.vocab)} | dict(found.special)
        pad = found.named("pad_token") or spec.pad or "<pad>"
        for token in ("</s>", pad):
            if token not in pieces:
                raise ModelError(f"{name} has no token {token!r}, which this model reads: {OTHER}")
        return cls(inner=vocabulary.own_rules(found, name=name), names={i: token for token, i in found.special.items()},
                   length=_length(found, spec, name, 1), opening=0, closing=1, pad=pieces[pad], size=found.size, padded=spec.padded,
                   left=_left(found, spec), lower=spec.lower, end=pieces["</s>"])

    def chunks(self, text: str) -> list[list[int]]:
        """One chunk: the words and </s>."""
        return [[*self.ids(text), self.end]]

    def _word(self, token: str) -> str:
        return token.replace("\u2581", " ")


@dataclass(frozen=True)
class ChatTokens(_Read):
    """A language model's tokenizer (byte-level BPE) with a fixed turn of conversation around the prompt; one chunk.

    Attributes:
        before, after: ids of the template up to its last special token before the prompt, and from its first one after it.
        lead, tail: template text between those tokens and the prompt; it is cut into tokens together with the prompt, as it would be in one text.
    """

    before: tuple[int, ...] = ()
    lead: str = ""
    tail: str = ""
    after: tuple[int, ...] = ()
    several: ClassVar[bool] = False

    @classmethod
    def read(cls, place: Path, *, spec: TokenizerSpec, name: str = "tokenizer") -> ChatTokens:
        """Read tokenizer.json, or a folder with vocab.json and merges.txt (Qwen).

        Raises:
            ModelError: missing, damaged, of another kind, or without a special token that the template has.
        """
        found = _of_kind(read_vocabulary(place, name=name), "BPE", name, place)
        name = _named(name, place)
        inner = vocabulary.own_rules(found, name=name)
        *before, lead = _pieces(spec.before, found, name)
        tail, *after = _pieces(spec.after, found, name)
        around = [tuple(i for piece in side for i in ([piece] if isinstance(piece, int) else inner.encode(piece, add_special_tokens=False).ids))
                  for side in (before, after)]
        opening, closing = (len(ids) + len(inner.encode(text).ids) for ids, text in zip(around, (lead, tail), strict=True))
        pad = found.named("pad_token") or spec.pad or END
        return cls(inner=inner, names={i: token for token, i in found.special.items()}, length=_length(found, spec, name, opening + closing),
                   opening=opening, closing=closing, pad=_required(found, pad, name) if spec.padded else found.id(pad) or 0, size=found.size,
                   padded=spec.padded, left=_left(found, spec), lower=spec.lower, before=around[0], lead=str(lead), tail=str(tail), after=around[1])

    def chunks(self, text: str) -> list[list[int]]:
        """One chunk: the prompt within its template."""
        said = text.lower().strip() if self.lower else text
        return [[*self.before, *self.inner.encode(self.lead + said + self.tail, add_special_tokens=False).ids, *self.after]]


def read_tokens(spec: TokenizerSpec, place: Path | None, *, name: str = "tokenizer") -> Tokens:
    """The tokenizer that a family asks for, from a folder or file; None takes the packaged one where there is one.

    Args:
        name: how the user calls it, "tokenizer_2".

    Raises:
        ModelError: a file is missing, damaged or of another kind, or there is none where one is needed.
    """
    if place is None and spec.kind != "clip":
        files = "tokenizer.json or spiece.model" if spec.kind == "t5" else "tokenizer.json"
        raise ModelError(f"no {name} is given, and this model needs a tokenizer of its own ({files}): name it with {name}=PATH")
    if place is None:
        return ClipTokens._of(vocabulary.packaged_clip(), spec, name, pad=spec.pad or END, inner=vocabulary.packaged_rules())
    kinds: dict[str, type[ClipTokens] | type[T5Tokens] | type[ChatTokens]] = {"clip": ClipTokens, "t5": T5Tokens, "chat": ChatTokens}
    return kinds[spec.kind].read(place, spec=spec, name=name)


def _pieces(text: str, found: Vocabulary, name: str) -> list[int | str]:
    """A template cut at its special tokens, the longest first: text, id, text, id, ... text.

    Raises:
        ModelError: it spells out a special token that the tokenizer lacks, or one that swallows spaces, which is not read.
    """
    tokens = sorted(found.special, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, tokens))})", text) if tokens else [text]
    unknown = [match[0] for part in parts[::2] if (match := LOOKS_SPECIAL.search(part))] + [part for part in parts[1::2] if part in found.glued]
    if unknown:
        raise ModelError(f"{name} has no plain special token {unknown[0]!r}, which this model reads around a prompt: {OTHER}")
    return [found.special[part] if at % 2 else part for at, part in enumerate(parts)]


def _of_kind(found: Vocabulary, kind: str, name: str, place: Path) -> Vocabulary:
    if found.kind != kind:
        raise ModelError(f"{_named(name, place)} is of kind {found.kind}, and this model reads {kind}: {OTHER}")
    return found


def _required(found: Vocabulary, token: str, name: str) -> int:
    number = found.id(token)
    if number is None:
        raise ModelError(f"{name} has no token {token!r}, which this model reads: {OTHER}")
    return number


def _length(found: Vocabulary, spec: TokenizerSpec, name: str, around: int) -> int:
    """Ids in a chunk, with room for a word."""
    length = found.settings.get("model_max_length") if spec.length is None else spec.length
    if length is None:
        raise ModelError(f"{name} does not say how many tokens its encoder reads (model_max_length): copy its tokenizer_config.json beside it")
    if isinstance(length, bool) or length not in LENGTHS:
        raise ModelError(f"{name} cannot be used: its model_max_length is {length!r:.40}, expected a whole number from {LENGTHS[0]} to {LENGTHS[-1]}")
    if length <= around:
        raise ModelError(f"{name} reads {length} tokens and {around} of them stand around a prompt: no word has room, so name a longer length")
    return int(length)


def _left(found: Vocabulary, spec: TokenizerSpec) -> bool:
    side = found.settings.get("padding_side")
    return spec.left if side is None else side == "left"


def _named(name: str, place: Path) -> str:
    return f"{name} in {place.name!r}"
