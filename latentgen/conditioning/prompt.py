"""Prompts: text to chunks of token ids. Knows a tokenizer's lengths; knows no encoder, model or guidance.

A text of any length is kept whole. CLIP reads it over as many chunks as it needs, each opened, closed and padded as the encoder expects, and the
encoder's states of the chunks are joined end to end. Where an encoder has one chunk, a longer text is refused, or cut in words that say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from latentgen.conditioning.tokens import Tokens
from latentgen.errors import RequestError

MAX_CHARACTERS = 20_000
MAX_CHUNKS = 16


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
    """

    text: str
    ids: tuple[tuple[int, ...], ...]
    tokens: int
    used: tuple[int, ...]
    left: bool = False
    note: str = ""

    @property
    def mask(self) -> tuple[tuple[int, ...], ...]:
        """Shaped like `ids`: 1 at start, words, template and end, 0 at padding."""
        rows = [((1,) * used, (0,) * (len(chunk) - used)) for chunk, used in zip(self.ids, self.used, strict=True)]
        return tuple(pad + said if self.left else said + pad for said, pad in rows)

    def grown(self, count: int, tokenizer: Tokens) -> PromptChunks:
        """With empty chunks of its tokenizer up to `count`; unchanged where a text is always one chunk."""
        more = max(0, count - len(self.ids)) if tokenizer.several else 0
        empty = tokenizer.chunks("")[0]
        return replace(self, ids=self.ids + (_filled(empty, tokenizer),) * more, used=self.used + (len(empty),) * more)


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


def chunked(text: str, tokenizer: Tokens, *, name: str = "prompt", at_least: int = 1, strict: bool = True, reader: str = "") -> PromptChunks:
    """Lay a text out for one tokenizer.

    Args:
        name: how messages call the text; `reader`: how they call the tokenizer.
        at_least: chunks, filled up with empty ones, where a text may take several.
        strict: refuse a text that does not fit in an encoder's only chunk; False cuts it, and `note` says so.

    Raises:
        RequestError: more than 16 chunks, or a text too long for its one chunk.
    """
    chunks = tokenizer.chunks(text)
    around = tokenizer.opening + tokenizer.closing
    room = tokenizer.length - around
    count, note = sum(max(0, len(chunk) - around) for chunk in chunks), ""
    if len(chunks) > MAX_CHUNKS:
        raise RequestError(f"{name} has {count:,} tokens: at most {MAX_CHUNKS * room} ({MAX_CHUNKS} chunks of {room}) are read, so shorten it")
    if any(len(chunk) > tokenizer.length for chunk in chunks):
        problem = f"{name} has {count} tokens" + (f" for {reader}, which reads at most {room}" if reader else f", of which at most {room} are read")
        if strict:
            raise RequestError(f"{problem}: shorten it, or pass strict=False to have it cut")
        note = f"{problem}: the last {count - room} are cut off"
        chunks = [[*chunk[:tokenizer.length - tokenizer.closing], *chunk[len(chunk) - tokenizer.closing:]] for chunk in chunks]
        count = room
    filled = tuple(_filled(chunk, tokenizer) for chunk in chunks)
    return PromptChunks(text, filled, count, tuple(map(len, chunks)), tokenizer.left, note).grown(at_least, tokenizer)


def laid_out(text: str, tokenizers: Mapping[str, Tokens], *, name: str = "prompt", texts: Mapping[str, str] | None = None, strict: bool = True,
             notes: list[str] | None = None) -> dict[str, PromptChunks]:
    """One prompt for every encoder, those that take several chunks with as many as the longest needs.

    Args:
        tokenizers: by name, "tokenizer", "tokenizer_2".
        texts: by tokenizer's name, what an encoder hears instead of `text`; messages call the text of "tokenizer_2" `name` + "_2".
        strict: refuse a text that does not fit in an encoder's only chunk; False cuts it.
        notes: what was cut is appended here.

    Raises:
        RequestError: a text too long for an encoder, or one for an encoder that is not there.
    """
    own = texts or {}
    for reader in own:
        if reader not in tokenizers:
            raise RequestError(f"{_called(name, reader)} is given but this model has no {reader}: leave it out")
    laid = {reader: chunked(own.get(reader, text), tokens, name=_called(name, reader) if reader in own else name, strict=strict, reader=reader)
            for reader, tokens in tokenizers.items()}
    if notes is not None:
        notes += [chunks.note for chunks in laid.values() if chunks.note]
    return levelled(laid, {}, tokenizers)[0]


def levelled(a: Mapping[str, PromptChunks], b: Mapping[str, PromptChunks],
             tokenizers: Mapping[str, Tokens]) -> tuple[dict[str, PromptChunks], dict[str, PromptChunks]]:
    """Two prompts with empty chunks added until all that may have several chunks have as many, in both; the rest as it is.

    A batch of both needs that, and so do encoders whose states are joined side by side.
    """
    count = max((len(chunks.ids) for chunks in (*a.values(), *b.values())), default=1)  # 1 where a text is always one chunk
    first, second = ({reader: chunks.grown(count, tokenizers[reader]) for reader, chunks in laid.items()} for laid in (a, b))
    return first, second


def _filled(chunk: list[int], tokenizer: Tokens) -> tuple[int, ...]:
    padding = [tokenizer.pad] * (tokenizer.length - len(chunk)) if tokenizer.padded else []
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
