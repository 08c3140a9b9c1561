"""What a model's folder holds: configs with bounds, the weight files of a part, their headers and digest. Knows files; builds no module.

Nothing that a folder brings is executed, no config may ask for much memory, and no link may lead outside the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from latentgen.conditioning.prompt import shown
from latentgen.errors import ModelError
from latentgen.models.family import Config
from latentgen.models.header import Header, read_header
from latentgen.models.pickles import is_pickle, pickle_header, refuse_pickle

MAX_NUMBER, MAX_ITEMS, MAX_LAYERS = 2**20, 4096, 512  # of a config: no published checkpoint comes near
WHOLE = 256 * 2**20  # files up to this size are hashed in full, larger ones by samples
NAMES = ("diffusion_pytorch_model", "model")


def check_config(config: Config, label: str) -> None:
    """Bounds on what a config may say, so that a hostile one costs no memory and no time.

    Raises:
        ModelError: a scaling factor that is no number, a whole number below -1 or above 2**20, more than 512 layers, or a list of more than 4,096.
    """
    for name in ("scaling_factor", "shift_factor"):
        value = config.get(name) or 0.0
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e6:
            raise ModelError(f"the config of {label} sets {name} to {shown(value)}: expected a number")
    for name, value in _numbers(config):
        limit = MAX_LAYERS if "layers" in name or "blocks" in name else MAX_NUMBER
        if not -1 <= value <= limit:
            raise ModelError(f"the config of {label} sets {name} to {shown(value)}: expected at most {limit:,}, "
                             "so it is damaged or not of a real checkpoint")


def _numbers(value: Any, name: str = "it") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping) or isinstance(value, (list, tuple)):
        if len(value) > MAX_ITEMS:
            yield name, float(len(value)) * MAX_NUMBER
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _numbers(item, str(key) if isinstance(value, Mapping) else name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def part_config(place: Path, name: str = "config.json") -> dict[str, Any]:
    """A config file of a part, numbers and names only.

    Raises:
        ModelError: missing, not a JSON object, or one that names code.
    """
    try:
        config = json.loads((place / name).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ModelError(f"{place.parent.name}/{place.name}/{name} cannot be read ({type(error).__name__}): "
                         "the folder needs a diffusers layout") from error
    if not isinstance(config, dict) or "auto_map" in config:
        raise ModelError(f"{place.parent.name}/{place.name}/{name} is refused: expected a plain object that names no code")
    return config


def weights_files(place: Path, *, root: Path | None = None, allow_pickle: bool = False) -> tuple[Path, ...]:
    """The safetensors of a part's folder: one file, or the shards that its index names.

    Args:
        root: the folder that no file may lie outside of, links followed; None for `place` itself.
        allow_pickle: take a pickle where there is nothing else.

    Raises:
        ModelError: none there, a pickle in its place, an absent shard, or one outside the folder.
    """
    root = (root or place).resolve()
    for variant, name in [(v, n) for v in ("", ".fp16", ".bf16") for n in NAMES]:
        one = place / f"{name}{variant}.safetensors"
        if one.is_file():
            return (_inside(one, root),)
        for index in (f"{name}.safetensors.index{variant}.json", f"{name}{variant}.safetensors.index.json"):  # both spellings are written
            if (place / index).is_file():
                return _shards(place / index, root)
    where = f"{place.parent.name}/{place.name}"
    pickles = [p for p in sorted(place.glob("*")) if is_pickle(p)]
    if pickles and not allow_pickle:
        refuse_pickle(pickles[0])
    if pickles:
        return (_inside(pickles[0], root),)
    raise ModelError(f"{where} has no weights: expected diffusion_pytorch_model.safetensors or model.safetensors")


def _shards(index: Path, root: Path) -> tuple[Path, ...]:
    where = f"{index.parent.name}/{index.name}"
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        paths = [index.parent / name for name in names]
        if not names:
            raise LookupError("an empty weight_map")
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{where} cannot be read ({type(error).__name__}): expected a weight_map of shards, so get it again") from error
    for name, path in zip(names, paths, strict=True):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{where} names the shard {name!r:.100}: expected a .safetensors file in the same folder")
        if not path.is_file():
            raise ModelError(f"{where} names the shard {name}, which is not there: get it ({len(paths)} shards are expected)".replace("\x00", "?"))
    return tuple(_inside(path, root) for path in paths)


def _inside(path: Path, root: Path) -> Path:
    if not path.resolve().is_relative_to(root):
        raise ModelError(f"{path.parent.name}/{path.name} links to a file outside the model's folder: put the file itself there")
    return path


@lru_cache(maxsize=64)
def header_of(path: str, size: int, changed: int) -> Header:
    """The checked header of one version of a file."""
    return pickle_header(Path(path)) if is_pickle(Path(path)) else read_header(Path(path))


@lru_cache(maxsize=64)
def _digest(path: str, size: int, changed: int) -> str:
    """sha256 of a file; of one above 256 MB, of its size and of 64 pieces of 1 MB spread over it, the header among them."""
    with open(path, "rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        whole = hashlib.sha256(str(size).encode())
        for n in range(64):
            file.seek(n * (size - 2**20) // 63)
            whole.update(file.read(2**20))
        return whole.hexdigest()


def digest(files: tuple[Path, ...]) -> str:
    """One short hash over weight files (sha256, 16 hex digits), computed once per file version.

    Raises:
        ModelError: a file is gone or cannot be read.
    """
    whole = hashlib.sha256()
    for path in files:
        try:
            stat = path.stat()
            whole.update(_digest(str(path), stat.st_size, stat.st_mtime_ns).encode())
        except OSError as error:
            raise ModelError(f"{path.parent.name}/{path.name} cannot be read any more ({type(error).__name__}): "
                             "put it back, or load the model again") from None
    return whole.hexdigest()[:16]
