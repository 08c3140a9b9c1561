"""spiece.model: files written here field by field, read by us, against transformers' T5 tokenizer of the same pieces."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_t5 import _pieces

from latentgen.conditioning.prompt import chunked
from latentgen.conditioning.tokens import TokenizerSpec, read_tokens
from latentgen.errors import ModelError

T5 = TokenizerSpec("t5", 64)
PIECES = [piece for piece in _pieces() if not piece[0].startswith("<extra_id_")]
KINDS = {"<pad>": 3, "</s>": 3, "<unk>": 2}
REWRITTEN = {"½": "1/2", "ﬁ": "fi", "É": "E", "㎏": "kg", "\u00a0": " ", "e\u0301": "é", "\u200b": ""}
TEXTS = ("a red heart, flat", "", "  the   CAT\n\tsat ", "naïve café, 日本語, 2024's best! 🙂", "½ of a ﬁne㎏ É\u00a0e\u0301l\u200bl", "word " * 12,
         "▁▁ a▁b")
TRAINER = {1: b"text.txt", 3: 1, 4: 32000, 10: 0.9995, 40: 2, 41: 2**64 - 1, 42: 1, 43: 0}  # bos_id is -1


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def message(fields: Iterable[tuple[int, Any]]) -> bytes:
    """A protobuf message: ints as varints, floats in 32 bits, texts and bytes with their length."""
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            raw = value.encode("utf-8") if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(raw)) + raw
    return out


def piece(text: str, score: float = 0.0, kind: int | None = None) -> bytes:
    kind = KINDS.get(text, 1) if kind is None else kind
    return message([(1, text), (2, score), *([(3, kind)] if kind != 1 else [])])


def charsmap(rules: dict[str, str]) -> bytes:
    """SentencePiece's precompiled map: a double array in which every node has 256 places of its own for its children, then the texts."""
    nodes: dict[bytes, int] = {b"": 0}
    for text in rules:
        raw = text.encode("utf-8")
        for n in range(1, len(raw) + 1):
            nodes.setdefault(raw[:n], len(nodes))
    units = [place % 256 ^ 1 for place in range(256 * (len(nodes) + 1))]  # an empty place: its label is not the character that leads there
    texts = b""
    for prefix, block in nodes.items():
        base = 256 * (block + 1)
        place = 0 if not prefix else 256 * (nodes[prefix[:-1]] + 1) ^ prefix[-1]
        rule = next((made for text, made in rules.items() if text.encode("utf-8") == prefix), None)
        if rule is not None:
            units[base] = 1 << 31 | len(texts)
            texts += rule.encode("utf-8") + b"\0"
        units[place] = (place ^ base) << 10 | (rule is not None) << 8 | (prefix[-1] if prefix else 0)
    return struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + texts


def model(pieces: Iterable[bytes] = (), *, trainer: dict[int, Any] | None = None, normalizer: dict[int, Any] | None = None,
          rules: bytes | None = None) -> bytes:
    every = list(pieces) or [piece(*p) for p in PIECES]
    rules = charsmap(REWRITTEN) if rules is None else rules
    spec = {1: "nmt_nfkc", **({2: rules} if rules else {}), 3: 1, 4: 1, 5: 1, **(normalizer or {})}
    return message([*((1, p) for p in every), (2, message((TRAINER | (trainer or {})).items())), (3, message(spec.items())), (5, message([(3, 0)]))])


def folder(place: Path, data: bytes, **config: Any) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    (place / "spiece.model").write_bytes(data)
    if config:
        (place / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return place


def theirs(rules: bytes | None) -> Any:
    """transformers' tokenizer of the same pieces, as it makes one of a spiece.model (which itself needs a library that is not here)."""
    from transformers import T5TokenizerFast

    vocab = [(text, struct.unpack("<f", struct.pack("<f", score))[0]) for text, score in PIECES]
    return T5TokenizerFast(vocab=[*vocab, *((f"<extra_id_{n}>", 0.0) for n in reversed(range(100)))], _spm_precompiled_charsmap=rules)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return read_tokens(T5, folder(tmp_path_factory.mktemp("t5") / "tokenizer", model()))


@pytest.mark.parametrize("rules", [b"", charsmap(REWRITTEN)], ids=["plain", "rewritten"])
def test_ids_are_transformers_own(rules: bytes, tmp_path: Path) -> None:
    reference = theirs(rules or None)
    place = folder(tmp_path / "tokenizer", model(rules=rules), extra_ids=100, model_max_length=512, pad_token="<pad>")
    for tokens in (read_tokens(T5, place), read_tokens(T5, place / "spiece.model")):
        assert (tokens.size, tokens.pad, tokens.length) == (len(reference), 0, 64)
        for text in TEXTS:
            laid = chunked(text, tokens)
            made = reference(text, padding="max_length", max_length=64)
            assert (laid.ids[0], laid.mask[0]) == (tuple(made.input_ids), tuple(made.attention_mask)), text
    assert read_tokens(TokenizerSpec("t5"), place).length == 512  # the settings beside it count


def test_the_map_of_characters_is_followed(ours: Any) -> None:
    said = {text: "".join(ours.words(ours.ids(text))).strip() for text in ("ﬁ", "e\u0301", "a\u00a0b", "a\u200bb")}
    assert said == {"ﬁ": "fi", "e\u0301": "é", "a\u00a0b": "a b", "a\u200bb": "ab"}


@settings(max_examples=100, deadline=None)
@given(st.text(st.one_of(st.sampled_from("".join(REWRITTEN) + " \t\n▁<>/_"), st.characters(codec="utf-8", exclude_characters="\0")), max_size=40))
def test_ids_are_transformers_own_on_any_text(ours: Any, text: str) -> None:
    assert ours.ids(text) == _reference().encode(text, add_special_tokens=False)


@lru_cache
def _reference() -> Any:
    return theirs(charsmap(REWRITTEN))


def test_special_tokens_are_text(ours: Any) -> None:
    assert not {0, 1, ours.size - 1} & set(ours.ids("a </s> b<pad> <extra_id_0>")) and ours.ids("<unk>") != [2]
    assert chunked("a cat", ours).ids[0].count(1) == 1


def test_where_both_lie_the_json_counts(tmp_path: Path) -> None:
    from tiny_t5 import tiny_t5_tokenizer

    place = tiny_t5_tokenizer(folder(tmp_path / "tokenizer", b"damaged"))
    assert read_tokens(T5, place).ids("a red heart")
    with pytest.raises(ModelError, match="spiece.model"):
        read_tokens(T5, place / "spiece.model")


@pytest.mark.parametrize("said", [{"extra_ids": 0}, {"extra_ids": 3}, {}])
def test_sentinels_are_as_many_as_the_settings_say(said: dict[str, int], tmp_path: Path) -> None:
    assert read_tokens(T5, folder(tmp_path / "tokenizer", model(), **said)).size == len(PIECES) + said.get("extra_ids", 100)


def test_a_field_that_is_not_known_is_passed_over(ours: Any, tmp_path: Path) -> None:
    more = model() + message([(200, "later"), (201, 7), (202, 1.5)]) + varint(203 << 3 | 1) + bytes(8)
    assert read_tokens(T5, folder(tmp_path / "tokenizer", more)).ids(TEXTS[0]) == ours.ids(TEXTS[0])


def spoilt(place: int, unit: int) -> bytes:
    """A map of characters in which one unit of the array is another."""
    rules = bytearray(charsmap(REWRITTEN))
    rules[4 + 4 * place:8 + 4 * place] = struct.pack("<I", unit)
    return bytes(rules)


CHARS = [piece(c) for c in ("<unk>", "a")]
DAMAGE = {
    "empty": (b"", "has no pieces"), "html": (b"<!DOCTYPE html><html>", "no SentencePiece model"),
    "zip": (b"PK\x03\x04" + bytes(40), "cannot be read"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "no SentencePiece model"),
    "cut": (model()[:-3], "cut short"), "cut in a piece": (model()[:20], "cut short"), "half a number": (b"\x0a\xff\xff", "cut short or damaged"),
    "a long number": (b"\x0a" + b"\xff" * 12, "in the middle of a number"), "huge length": (b"\x0a" + varint(2**62) + b"x", "a field of 4,611"),
    "group": (b"\x0b", "wire type 3"), "field 0": (b"\x02\x00", "field 0"), "pieces as numbers": (b"\x08\x01", "plain number"),
    "no text": (model([message([(2, 0.0)])]), "piece 0"), "empty text": (model([piece("")]), "piece 0"), "NUL": (model([piece("a\0")]), "piece 0"),
    "long text": (model([piece("x" * 1025)]), "piece 0"), "not UTF-8": (model([message([(1, b"\xff\xfe"), (2, 0.0)])]), "utf-8"),
    "NaN": (model([*CHARS, piece("b", math.nan)]), "score of piece 2"), "score as number": (model([message([(1, "a"), (2, 3)])]), "piece 0"),
    "fields": (model([message([(1, "a")] * 17)]), "more than 16 fields"),
    "many fields": (message([(5, 0)]) * (2**18 + 17), "more than 262,160 fields"),
    "twice": (model([*CHARS, piece("a")]), "same piece twice"), "no unknown": (model([piece("a")]), "0 unknown tokens"),
    "two unknown": (model([*CHARS, piece("b", kind=2)]), "2 unknown tokens"),
    "user defined": (model([*CHARS, piece("b", kind=4)]), "piece 2 is of type 4"),
    "bytes": (model([*CHARS, piece("<0x00>", kind=6)]), "piece 2 is of type 6"), "BPE": (model(trainer={3: 2}), "model_type is 2"),
    "byte fallback": (model(trainer={35: 1}), "byte_fallback is 1"), "suffix": (model(trainer={24: 1}), "treat_whitespace_as_suffix is 1"),
    "spaces kept": (model(normalizer={4: 0}), "remove_extra_whitespaces is 0"), "no prefix": (model(normalizer={3: 0}), "add_dummy_prefix is 0"),
    "prefix as text": (model(normalizer={3: b"x"}), "add_dummy_prefix is damaged"), "map as number": (model(normalizer={2: 1}), "plain number"),
    "map cut": (model(rules=charsmap(REWRITTEN)[:500]), "character map is damaged"), "map of 3 bytes": (model(rules=b"abc"), "character map"),
    "map out of its array": (model(rules=spoilt(0, 0x1FFFFF << 10)), "unit 0 of"),
    "map out of its texts": (model(rules=spoilt(256, 1 << 31 | 10**6)), "unit 256"),
    "map into a text": (model(rules=spoilt(256, 1 << 31 | 1)), "unit 256"),
    "map without value": (model(rules=spoilt(300, 300 % 256 | 256)), "unit 300"),
    "map not UTF-8": (model(rules=charsmap(REWRITTEN) + b"\xff"), "utf-8"),
    "no </s>": (model(CHARS), "no token '</s>'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_each_damage_is_one_error(name: str, tmp_path: Path) -> None:
    data, words = DAMAGE[name]
    with pytest.raises(ModelError) as caught:
        read_tokens(T5, folder(tmp_path / "tokenizer_2", data), name="tokenizer_2")
    message = str(caught.value)
    assert message.startswith("tokenizer_2") and words in message and "\n" not in message and str(tmp_path) not in message


@pytest.mark.parametrize("extra", ["100", -1, 4097, True, 1.0])
def test_a_number_of_sentinels_out_of_range(extra: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="extra_ids is"):
        read_tokens(T5, folder(tmp_path / "tokenizer", model(), extra_ids=extra))


def test_a_file_past_64_mb_is_not_read(tmp_path: Path) -> None:
    place = folder(tmp_path / "tokenizer", model())
    os.truncate(place / "spiece.model", 65 * 2**20)
    with pytest.raises(ModelError, match="spiece.model has 65 MB, and at most 64 are read"):
        read_tokens(T5, place)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_is_an_error_or_a_tokenizer_that_works(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes changed, cut out or put in anywhere: a ModelError, or a tokenizer that reads every text without one."""
    whole = bytearray(model([piece(*p) for p in PIECES[:40]]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at:at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    place = folder(tmp_path_factory.getbasetemp() / "any", bytes(whole))
    try:
        tokens = read_tokens(T5, place)
    except ModelError:
        return
    for text in TEXTS:
        assert all(0 <= i < tokens.size for i in tokens.ids(text))
