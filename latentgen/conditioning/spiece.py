"""SentencePiece model files (spiece.model) of T5's kind, read within bounds into what a tokenizer.json says. Knows bytes; knows no folder or prompt.

The file is one protobuf message, ModelProto of sentencepiece_model.proto: 1 pieces (1 piece, 2 score, 3 type), 2 trainer_spec (3 model_type,
24 treat_whitespace_as_suffix, 35 byte_fallback), 3 normalizer_spec (2 precompiled_charsmap, 3 add_dummy_prefix,
4 remove_extra_whitespaces, 5 escape_whitespaces). The rules around the pieces are those that transformers gives a T5 tokenizer.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

MOST_PIECES, MOST_FIELDS, MOST_LETTERS = 2**18, 16, 1024  # the largest published model of this kind has 250,000 pieces of three fields
MOST_MAP = 2**22  # bytes of a character map; the published ones have about 2**18
MOST_SENTINELS = 4096
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
UNIGRAM, NORMAL, UNKNOWN, CONTROL = 1, 1, 2, 3
SPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
SPLIT = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, SPACE]}

Value = int | memoryview


def read_spiece(data: bytes, *, sentinels: int = 100) -> dict[str, Any]:
    """A tokenizer.json's content (model, normalizer, pre_tokenizer, added_tokens) of a Unigram model.

    Args:
        data: the whole file.
        sentinels: how many tokens <extra_id_...> stand after the pieces, counted down; the file does not say.

    Raises:
        ValueError: damaged, past a bound, or a model that T5's rules do not read.
    """
    if type(sentinels) is not int or not 0 <= sentinels <= MOST_SENTINELS:
        raise ValueError(f"extra_ids is {sentinels!r:.40}, expected a whole number from 0 to {MOST_SENTINELS}")
    vocab: list[list[Any]] = []
    special: list[int] = []
    unknown: list[int] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for number, value in _fields(memoryview(data), most=MOST_PIECES + MOST_FIELDS):
        if number == 1:
            piece, score, kind = _piece(value, len(vocab))
            if kind != NORMAL:
                special.append(len(vocab))
            if kind == UNKNOWN:
                unknown.append(len(vocab))
            vocab.append([piece, score])
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(_fields(_whole(value, number), most=MOST_PIECES))
    if not vocab:
        raise ValueError("it has no pieces, so it is damaged or no SentencePiece model")
    _check_rules(trainer, normalizer)
    if len(unknown) != 1:  # its trainer_spec names one too, which SentencePiece does not read: in files that were edited it is another
        raise ValueError(f"it has {len(unknown)} unknown tokens, expected one")
    for count in reversed(range(sentinels)):
        special.append(len(vocab))
        vocab.append([f"<extra_id_{count}>", 0.0])
    if len({piece for piece, _ in vocab}) < len(vocab):
        raise ValueError("it has the same piece twice")
    charsmap = bytes(_whole(normalizer.get(2, memoryview(b"")), 2))
    if charsmap:
        _check_charsmap(charsmap)
    return {
        "version": "1.0", "added_tokens": [{"id": i, "content": vocab[i][0], "special": True} for i in special],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode("ascii")} if charsmap else None,
        "pre_tokenizer": SPLIT, "model": {"type": "Unigram", "unk_id": unknown[0], "vocab": vocab, "byte_fallback": False}}


def _piece(value: Value, index: int) -> tuple[str, float, int]:
    """Text, log probability and type of one piece."""
    said = dict(_fields(_whole(value, 1), most=MOST_FIELDS))
    text, score, kind = said.get(1), said.get(2, memoryview(bytes(4))), said.get(3, NORMAL)
    if (not isinstance(text, memoryview) or not isinstance(score, memoryview) or len(score) != 4
            or not 0 < len(text) <= MOST_LETTERS or 0 in bytes(text)):
        raise ValueError(f"piece {index} is no text of 1 to {MOST_LETTERS} bytes with a score of 4")
    if kind not in (NORMAL, UNKNOWN, CONTROL):
        raise ValueError(f"piece {index} is of type {kind!r:.40}, where T5's are normal, unknown or control (1 to 3)")
    number = float(struct.unpack("<f", score)[0])
    if not math.isfinite(number):
        raise ValueError(f"the score of piece {index} is not finite")
    return bytes(text).decode("utf-8"), number, int(kind)


def _check_rules(trainer: Mapping[int, Value], normalizer: Mapping[int, Value]) -> None:
    """The file asks for what T5's tokenizer does and for nothing else."""
    rules = ((trainer, 3, "model_type", UNIGRAM), (trainer, 24, "treat_whitespace_as_suffix", 0), (trainer, 35, "byte_fallback", 0),
             (normalizer, 3, "add_dummy_prefix", 1), (normalizer, 4, "remove_extra_whitespaces", 1), (normalizer, 5, "escape_whitespaces", 1))
    for said, number, name, wanted in rules:
        if (value := said.get(number, wanted)) != wanted:
            raise ValueError(f"its {name} is {value if isinstance(value, int) else 'damaged'}, where a tokenizer of T5's kind has {wanted}")


def _check_charsmap(charsmap: bytes) -> None:
    """A double array (darts-clone) of characters and the texts they become: no walk through it leaves the array or the texts.

    `tokenizers` follows the array unchecked, while it reads a prompt, so a damaged one must be found here. A unit at place i has its label in
    bits 0-7, "a value follows" in bit 8 and the way to its children in bits 10-30 (shifted by 8 more where bit 9 is set); bit 31 marks a value.
    """
    size = int.from_bytes(charsmap[:4], "little")
    if not 1024 <= size <= min(len(charsmap) - 4, MOST_MAP) or size % 1024 or len(charsmap) > 2 * MOST_MAP:
        raise ValueError(f"its character map is damaged: {size} bytes of an array in {len(charsmap)}")
    texts = charsmap[4 + size:]
    texts.decode("utf-8")
    units = struct.unpack(f"<{size // 4}I", charsmap[4:4 + size])
    for place, unit in enumerate(units):
        if unit >> 31:
            start = unit & 0x7FFFFFFF
            fits = start < len(texts) and (start == 0 or texts[start - 1] == 0)
        else:
            child = place ^ ((unit >> 10) << ((unit & 512) >> 6))
            fits = child | 255 < len(units) and (not unit & 256 or bool(units[child] >> 31))
        if not fits:
            raise ValueError(f"its character map is damaged: unit {place} of {len(units)} points outside")


def _fields(data: memoryview, *, most: int) -> Iterator[tuple[int, Value]]:
    """(number, value) of each field of a message: an int of a varint, else its bytes.

    Raises:
        ValueError: cut short, a wire type that proto2 without groups does not have, or more than `most` fields.
    """
    at = count = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        count += 1
        if number == 0 or wire not in (VARINT, FIXED64, BYTES, FIXED32):
            raise ValueError(f"it is no SentencePiece model: a field {number} of wire type {wire}")
        if count > most:
            raise ValueError(f"a message in it has more than {most:,} fields")
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        size, at = _varint(data, at) if wire == BYTES else ({FIXED64: 8, FIXED32: 4}[wire], at)
        if size > len(data) - at:
            raise ValueError(f"it is cut short: a field of {size:,} bytes where {len(data) - at:,} are left")
        yield number, data[at:at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, the lowest first, and the place after it."""
    value = 0
    for n, byte in enumerate(data[at:at + 10]):
        value |= (byte & 127) << 7 * n
        if byte < 128:
            return value, at + n + 1
    raise ValueError("it is cut short or damaged in the middle of a number")


def _whole(value: Value, number: int) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError(f"it is no SentencePiece model: field {number} is a plain number")
    return value
