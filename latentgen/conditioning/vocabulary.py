"""Tokenizer files: vocabulary, merges, special tokens and settings, read within bounds, and the rules that cut a text by them.

Knows the files' layouts; knows no chunks, templates or prompts.

Three layouts are read: tokenizer.json (as `tokenizers` writes it), vocab.json with merges.txt, or spiece.model. Beside each, tokenizer_config.json,
special_tokens_map.json and added_tokens.json say what the special tokens are; where they disagree, transformers' order is kept.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentgen.conditioning.spiece import read_spiece
from latentgen.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_BYTES = 64 * 2**20  # the largest published tokenizer.json has about 20 MB
MOST_IDS = 2**21
CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# how Qwen's tokenizers split a text, for those that come as vocab.json and merges.txt; a tokenizer.json says it itself
CHAT_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = Path(__file__).parent / "clip" / "merges.txt.gz"


@dataclass(frozen=True)
class Vocabulary:
    """What tokenizer files say, before anything is built of it.

    Attributes:
        kind: "BPE" or "Unigram".
        vocab: token -> id of a BPE; [token, score] in the order of ids of a Unigram.
        merges: pairs of a BPE, the first learnt first.
        special: tokens that are set apart from text -> id, whether or not `vocab` has them.
        glued: those of them that take spaces around them or want whole words.
        settings: tokenizer_config.json with the other files' special tokens laid over it.
        whole: tokenizer.json, {} where the files were vocab.json and merges.txt.
    """

    kind: str
    vocab: Any
    merges: tuple[tuple[str, str], ...] = ()
    special: Mapping[str, int] = field(default_factory=dict)
    glued: frozenset[str] = frozenset()
    settings: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Any] = field(default_factory=dict)

    def id(self, token: str) -> int | None:
        """The id of a token, special or not; None where there is none."""
        return self.special.get(token, self.vocab.get(token) if self.kind == "BPE" else None)

    def named(self, role: str) -> str | None:
        """The token that the settings name for a role such as "pad_token": a string, or an object with a "content"."""
        value = self.settings.get(role)
        return str(value["content"]) if isinstance(value, dict) else value

    @property
    def size(self) -> int:
        """One more than the highest id: as many rows as an encoder's embedding has to have."""
        highest = len(self.vocab) - 1 if self.kind == "Unigram" else max(self.vocab.values())
        return max(highest, *self.special.values(), 0) + 1


@lru_cache
def byte_symbols() -> dict[str, int]:
    """The visible character that stands for each byte in a byte-level BPE -> that byte, in the order of CLIP's ids."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


@lru_cache
def packaged_clip() -> Vocabulary:
    """CLIP's own vocabulary (49,408 tokens), which is part of the package."""
    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    merges = tuple((a, b) for a, b in (line.split(" ") for line in lines))
    symbols = list(byte_symbols())
    words = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), START, END]
    special = {START: len(words) - 2, END: len(words) - 1}
    return Vocabulary("BPE", {word: i for i, word in enumerate(words)}, merges, special, settings={"pad_token": END, "model_max_length": 77})


def read_vocabulary(place: Path, *, name: str = "tokenizer") -> Vocabulary:
    """Read a tokenizer's folder, or its tokenizer.json or spiece.model.

    Args:
        place: a folder, or a file laid out as tokenizer.json, whatever its name, or a SentencePiece file NAME.model.
        name: how messages call the tokenizer.

    Raises:
        ModelError: nothing there, larger than 64 MB, damaged, or a layout that is not read.
    """
    if not place.exists():
        raise ModelError(f"{name} is {place.name!r}, which does not exist: name a folder with tokenizer.json, or that file")
    folder = place if place.is_dir() else place.parent
    try:
        whole_file = folder / "tokenizer.json" if place.is_dir() else place
        pair = place.is_dir() and not whole_file.exists() and _has(folder, "vocab.json")
        if place.is_dir() and not pair and not whole_file.exists() and _has(folder, "spiece.model"):
            whole_file = folder / "spiece.model"
        beside = place.is_dir() or place.name in ("tokenizer.json", "spiece.model")  # a file of another name may lie among strangers
        settings = _settings(folder) if beside else {}
        extra = _added(folder, settings) if beside else {}
        if pair:
            whole: dict[str, Any] = {}
        elif whole_file.suffix == ".model":
            whole = read_spiece(_bytes(whole_file), sentinels=settings.get("extra_ids", 100))
        else:
            whole = _json(whole_file)
        model = whole.get("model")
        if pair:
            merges = [line for line in _text(folder / "merges.txt").split("\n") if line.strip() and not line.startswith("#version")]
            model = {"type": "BPE", "vocab": _json(folder / "vocab.json"), "merges": merges}
        return _checked(model, whole, extra, settings)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ModelError(f"{name} in {place.name!r} cannot be read ({why:.200}): it needs tokenizer.json, spiece.model, or vocab.json and merges.txt "
                         "with tokenizer_config.json, so copy them again") from error


@lru_cache
def packaged_rules() -> Tokenizer:
    """`clip_rules` of the packaged vocabulary; made once, and never changed by its users."""
    return clip_rules(packaged_clip(), name="the packaged tokenizer")


def clip_rules(found: Vocabulary, *, name: str) -> Tokenizer:
    """CLIP's rules around a vocabulary; without special tokens, so none is found in a text.

    Raises:
        ModelError: merges that the vocabulary lacks.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    with _as_model_error(name):
        inner = Tokenizer(models.BPE(found.vocab, list(found.merges), unk_token=END, end_of_word_suffix="</w>"))
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True),
                                                   pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return inner


def own_rules(found: Vocabulary, *, name: str) -> Tokenizer:
    """The file's own rules, or Qwen's where there are only vocab.json and merges.txt; without special tokens, so none is found in a text.

    Raises:
        ModelError: merges that the vocabulary lacks, unknown rules, and whatever else `tokenizers` finds wrong.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    if found.whole:
        # a special token may be an entry of the vocabulary too, where a text that spells it out would still find it: no text has a NUL
        made = {a + b for a, b in found.merges}
        hidden = {token: "\0" + token for token in found.special if token not in made}
        vocab: Any = ({hidden.get(token, token): i for token, i in found.vocab.items()} if found.kind == "BPE"
                      else [[hidden.get(piece, piece), score] for piece, score in found.vocab])
        off = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
        plain = {**off, "added_tokens": [], "model": {**found.whole["model"], "vocab": vocab}}
        with _as_model_error(name):
            return Tokenizer.from_str(json.dumps({**found.whole, **plain}, ensure_ascii=False))
    with _as_model_error(name):
        inner = Tokenizer(models.BPE(found.vocab, list(found.merges)))
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CHAT_SPLIT), behavior="isolated"),
                                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return inner


@contextmanager
def _as_model_error(name: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:  # `tokenizers` raises Exception itself, and where its Rust code panics a BaseException that has no public name
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{name} cannot be read ({str(error):.200}): its files do not belong together or are damaged, so copy them again") from error


def _checked(model: Any, whole: Mapping[str, Any], extra: Mapping[str, int], settings: Mapping[str, Any]) -> Vocabulary:
    """A vocabulary whose ids and merges have the types that they need.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: something else than a tokenizer.
    """
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise ValueError("it has no 'model' with a 'vocab'")
    kind, vocab = model.get("type") or ("BPE" if "merges" in model else "Unigram"), model["vocab"]
    if (kind, type(vocab)) not in (("BPE", dict), ("Unigram", list)):
        raise ValueError(f"its model is {kind!r:.40}, where BPE and Unigram are known")
    added = whole.get("added_tokens") or []
    special = {str(token["content"]): token["id"] for token in added} | dict(extra)
    ids = [*special.values(), *(vocab.values() if kind == "BPE" else ())]
    if not vocab or any(type(i) is not int or not 0 <= i < MOST_IDS for i in ids):
        raise ValueError(f"its ids are not whole numbers from 0 to {MOST_IDS - 1}")
    merges = tuple((a, b) for a, b in (m.split(" ") if isinstance(m, str) else m for m in model.get("merges", ())))
    glued = frozenset(str(token["content"]) for token in added if token.get("lstrip") or token.get("rstrip") or token.get("single_word"))
    padding = whole.get("padding") or {}
    side = padding.get("direction")
    said = {"pad_token": padding.get("pad_token"), "padding_side": None if side is None else str(side).lower()}
    return Vocabulary(kind, vocab, merges, special, glued, said | {key: value for key, value in settings.items() if value is not None}, whole)


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; special_tokens_map.json laid over it where it is of the older form, without added_tokens_decoder."""
    settings = _json(folder / "tokenizer_config.json") if _has(folder, "tokenizer_config.json") else {}
    if "added_tokens_decoder" not in settings and _has(folder, "special_tokens_map.json"):
        settings |= {role: token for role, token in _json(folder / "special_tokens_map.json").items() if token is not None}
    return settings


def _added(folder: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """Special tokens that stand outside tokenizer.json."""
    if "added_tokens_decoder" in settings:
        return {str(token["content"]): int(i) for i, token in settings["added_tokens_decoder"].items()}
    return _json(folder / "added_tokens.json") if _has(folder, "added_tokens.json") else {}


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _text(path: Path) -> str:
    return _bytes(path).decode("utf-8").replace("\r\n", "\n")


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path.name} has {size / 2**20:.0f} MB, and at most {MOST_BYTES // 2**20} are read")
    return path.read_bytes()


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return value
