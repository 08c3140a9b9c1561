"""Prompts: text to chunks of token ids. Knows a tokenizer's lengths; knows no encoder, model or guidance.

A text of any length is kept whole: it is laid out over as many chunks as it needs, each opened, closed and padded as the encoder expects,
and the encoder's states of the chunks are joined end to end.
"""

from __future__ import annotations

from dataclasses import dataclass

from latentgen.conditioning.encoders import ClipTokens
from latentgen.errors import RequestError

MAX_CHARACTERS = 20_000
MAX_CHUNKS = 16


@dataclass(frozen=True)
class PromptChunks:
    """A prompt as the encoder reads it.

    Attributes:
        text: what was said.
        ids: one tuple of token ids per chunk, all of the tokenizer's chunk length.
        tokens: how many ids are words (start, end and padding not counted).
    """

    text: str
    ids: tuple[tuple[int, ...], ...]
    tokens: int


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


def chunked(text: str, tokenizer: ClipTokens, *, name: str = "prompt", at_least: int = 1) -> PromptChunks:
    """Lay a text out over chunks, padded with empty ones up to `at_least`.

    Raises:
        RequestError: more than 16 chunks.
    """
    ids, room = tokenizer.ids(text), tokenizer.length - 2
    count = max(1, -(-len(ids) // room))
    if count > MAX_CHUNKS:
        raise RequestError(f"{name} has {len(ids):,} tokens: at most {MAX_CHUNKS * room} ({MAX_CHUNKS} chunks of {room}) are read, so shorten it")
    chunks = []
    for n in range(max(count, at_least)):
        words = ids[n * room:(n + 1) * room]
        chunks.append((tokenizer.start, *words, *[tokenizer.end] * (tokenizer.length - 1 - len(words))))
    return PromptChunks(text, tuple(chunks), len(ids))


def shown(value: object) -> str:
    """A value as a message shows it: its repr on one line, cut at 60 characters."""
    if isinstance(value, (list, tuple)) and not value:
        return "empty"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python refuses to write out an int of more than 4,300 digits
        return f"a {type(value).__name__} too long to show"
    return f"a {type(value).__name__} object" if " at 0x" in text else f"{text:.60}"
