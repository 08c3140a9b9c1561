"""Which files of a repository make up a diffusers layout. Knows file names; reads no file but the index that it is given, and asks nobody."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from latentgen.errors import ModelError
from latentgen.models.transfer import File

INDEX = "model_index.json"
UNUSED = ("safety_checker", "feature_extractor")  # parts that other programs use and this one never loads
_SMALL = frozenset(("config.json", "scheduler_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
                    "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model", "tokenizer.model"))
_REFUSED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5", ".onnx")
_STEM = r"(?P<stem>diffusion_pytorch_model|model)"
_WEIGHTS = re.compile(rf"{_STEM}(?:\.(?P<a>\w+))?(?:-(?P<shard>\d{{5}})-of-(?P<count>\d{{5}}))?(?:\.(?P<b>\w+))?\.safetensors")
_SHARDS = re.compile(rf"{_STEM}(?:\.(?P<a>\w+))?\.safetensors(?:\.(?P<b>\w+))?\.index(?:\.(?P<c>\w+))?\.json")


@dataclass
class _Weights:
    """The files of one part in one variant."""

    whole: str = ""
    index: str = ""
    shards: dict[int, str] = field(default_factory=dict)
    count: int = 0

    def names(self, where: str) -> list[str]:
        """The one file, or the index and its shards. Raises ModelError where one of these is absent."""
        if self.whole:
            return [self.whole]
        if absent := sorted(set(range(1, self.count + 1)) - set(self.shards)):
            raise ModelError(f"{where} lacks shard {absent[0]} of {self.count}: take another revision")
        if not self.index or not self.shards:
            raise ModelError(f"{where} has {'an index but no shards' if self.index else 'shards but no index'}: take another revision")
        return [self.index, *(self.shards[number] for number in sorted(self.shards))]


def pick(listing: Iterable[File], *, parts: Collection[str] | None = None, variant: str | None = None) -> list[str]:
    """Names of the files that a diffusers layout needs: the index, and of each part its config, tokenizer files and safetensors (with their index).

    Args:
        parts: folders, "" for a repository that is itself one part; None takes every folder that looks like a part.
        variant: "fp16" takes model.fp16.safetensors where a part has it; None prefers the plain files.

    Raises:
        ModelError: no index, an absent part, shards that are not all there, only pickles or other formats, or a variant that no part has.
    """
    names = {file.name for file in listing}
    if INDEX not in names and (parts is None or "" not in parts):
        single = sorted(name for name in names if "/" not in name and name.endswith((".safetensors", ".gguf")))
        cure = f"name one of its files, as in 'org/name:{single[0]}'" if single else "take one in a diffusers layout, or one with a .safetensors file"
        raise ModelError(f"the repository has no {INDEX}, so it is not in a diffusers layout: {cure}")
    inside: dict[str, set[str]] = {}
    for name in names:
        folder, _, base = name.rpartition("/")
        inside.setdefault(folder, set()).add(base)
    looks = [folder for folder in sorted(inside) if folder and "/" not in folder and folder not in UNUSED and inside[folder] & _SMALL]
    wanted = looks if parts is None else parts
    taken, variants, met = [INDEX] if INDEX in names else [], set(), variant is None
    for part in wanted:
        if part not in inside:
            raise ModelError(f"the repository has no folder {part!r}: its index names it as a part, so the repository is incomplete")
        found = _weights(inside[part])
        _refuse_pickles(part, inside[part], found, chosen=parts is not None)
        weights = _choose(part, found, variant)
        met, variants = met or variant in found, variants | {v for v in found if v}
        taken += [f"{part}/{base}" if part else base for base in [*sorted(inside[part] & _SMALL), *weights]]
    if not met:
        cure = f"there are {', '.join(sorted(variants))}" if variants else "leave variant out"
        raise ModelError(f"no part has weights of the variant {variant!r}: {cure}")
    return taken


def index_parts(index: bytes, repo: str) -> list[str]:
    """The parts that a model_index.json names, those that are never loaded left out.

    Raises:
        ModelError: not an index.
    """
    try:
        entries = json.loads(index).items()
    except (ValueError, AttributeError, RecursionError):
        raise ModelError(f"{INDEX} of {repo} is not a JSON object: take another revision") from None
    named = [key for key, value in entries if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)]
    parts = [name for name in named if not name.startswith("_") and name not in UNUSED]
    if not parts or not all(re.fullmatch(r"\w+", part) for part in parts):
        raise ModelError(f"{INDEX} of {repo} names {'no parts' if not parts else 'a part that is no plain name'}: it is not a diffusers layout")
    return parts


def _weights(names: Iterable[str]) -> dict[str, _Weights]:
    """Variant ("" for plain) -> its files."""
    found: dict[str, _Weights] = {}
    for name in names:
        if match := _WEIGHTS.fullmatch(name):
            entry = found.setdefault(match["a"] or match["b"] or "", _Weights())
            if match["shard"]:
                entry.shards[int(match["shard"])] = name
                entry.count = max(entry.count, int(match["count"]))
            else:
                entry.whole = min(entry.whole or name, name)
        elif match := _SHARDS.fullmatch(name):
            found.setdefault(match["a"] or match["b"] or match["c"] or "", _Weights()).index = name
    return found


def _choose(part: str, found: dict[str, _Weights], variant: str | None) -> list[str]:
    """The weights of the named variant, else the plain ones, else the only ones (halves before others); none where a part has none."""
    for choice in (variant, "", "fp16", "bf16", *(found if len(found) == 1 else ())):
        if choice in found:
            return found[choice].names(part or "the repository")
    if found:
        raise ModelError(f"the part {part!r} has weights only in the variants {', '.join(sorted(found))}: name one with variant=")
    return []


def _refuse_pickles(part: str, names: Collection[str], found: dict[str, _Weights], *, chosen: bool) -> None:
    """Raises ModelError for weights in refused formats alone. A folder that nobody chose, with another program's format (ONNX), is passed over."""
    refused = sorted(name for name in names if name.endswith(_REFUSED if chosen else _REFUSED[:5]))
    if refused and not found:
        raise ModelError(f"{part or 'the repository'} has only {refused[0]} and no safetensors: pickles can run code and other formats are not read, "
                         "so take a repository or revision with .safetensors files")
