"""Headers of weight files, checked before any tensor is read. Knows the safetensors layout byte by byte; knows no model and imports no torch.

A file is outside data: every length, offset and shape that it states is compared with the file itself first. GGUF files go to `gguf_header`.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

from latentgen.errors import ModelError

MAX_HEADER = 16 * 2**20  # bytes; a file of 2,500 tensors has 0.3 MB
MAX_DIMS, MAX_SIDE = 8, 2**40
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
         "U8": 1, "BOOL": 1}
_RUNS = "which can run code when they are opened: refused; get the safetensors version"
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: its dtype as the file names it, its shape in torch's order, and where its bytes are (absolute, end excluded)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a weight file says of itself, checked.

    Attributes:
        path: the file.
        size: its length in bytes.
        tensors: name -> where and what.
        metadata: texts that its maker left; nothing in them is trusted.
        format: "safetensors" or "gguf".
    """

    path: Path
    size: int
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    format: Literal["safetensors", "gguf"]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.end - info.start for info in self.tensors.values())


def where(path: Path) -> str:
    """How messages name a file: with its folder, never more."""
    return f"{path.parent.name}/{path.name}".lstrip("/")


def read_header(path: str | Path, *, any_type: bool = False) -> Header:
    """The checked header of a .safetensors or .gguf file; no tensor is read.

    Args:
        any_type: accept GGUF tensors of quantisations that cannot be loaded, too (to tell what a file is).

    Raises:
        ModelError: missing, no file, another kind of file, cut short, or a header that does not fit the file.
    """
    path = regular_file(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(512)
            if start[:4] == b"GGUF":
                from latentgen.models.gguf_header import read_gguf

                tensors, metadata = read_gguf(file, size, where(path), any_type=any_type)
                return Header(path, size, tensors, metadata, "gguf")
            tensors, metadata = _read_safetensors(file, size, start, where(path))
            return Header(path, size, tensors, metadata, "safetensors")
    except OSError as error:
        said = error.strerror or type(error).__name__
        raise ModelError(f"{where(path)} cannot be read ({said}): check the disk and the file's permissions") from error


def regular_file(path: str | Path) -> Path:
    """The path, if a plain file is there.

    Raises:
        ModelError: nothing there, a directory or a device.
    """
    if not isinstance(path, (str, Path)):
        raise ModelError(f"the file is a {type(path).__name__}: expected its path")
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise ModelError(f"there is no file {where(path)!r} that can be opened ({said}): check its name") from None
    if stat.S_ISDIR(mode):
        raise ModelError(f"{where(path)} is a directory: name a file in it")
    if not stat.S_ISREG(mode):
        raise ModelError(f"{where(path)} is a device or a pipe: expected a plain file")
    return path


def _read_safetensors(file: BinaryIO, size: int, start: bytes, name: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    length = _header_length(size, start, name)
    file.seek(8)
    data = file.read(length)
    if len(data) < length:
        raise ModelError(f"{name} is cut short: {8 + len(data):,} bytes could be read of the {8 + length:,} of its header: get it again")
    raw = _parse(data, name)
    metadata = _metadata(raw.pop("__metadata__", None), name)
    tensors: dict[str, TensorInfo] = {}
    for key, value in raw.items():
        tensors[key] = _tensor(key, value, 8 + length, name)
    _check_layout(tensors, 8 + length, size, name)
    return tensors, metadata


def _header_length(size: int, start: bytes, name: str) -> int:
    """Bytes of the JSON header, once it is plausible that there is one."""
    length = int.from_bytes(start[:8], "little")
    if size >= 10 and 2 <= length <= min(MAX_HEADER, size - 8) and start[8:9] == b"{":
        return length
    if size == 0:
        raise ModelError(f"{name} is empty (0 bytes), not a safetensors file: get it again")
    if size < 10:
        raise ModelError(f"{name} is not a safetensors file or is cut short: it has {size} bytes, less than the smallest header: get it again")
    if other := _other_kind(start, Path(name).suffix.lower()):
        raise ModelError(f"{name} is not a safetensors file but {other}")
    if length == 0:
        raise ModelError(f"{name} is not a safetensors file or was never filled by its download: it begins with 8 zero bytes: get it again")
    if length > MAX_HEADER:
        raise ModelError(f"{name} is not a safetensors file or is damaged at byte 0: it says that its header has {length:,} bytes, "
                         f"the file has {size:,} and at most {MAX_HEADER:,} are accepted: get it again")
    if length > size - 8:
        raise ModelError(f"{name} is cut short: {size:,} bytes are there of {8 + length:,} or more, not even its header is whole: get it again")
    _damaged(name, f"at byte 8 is {start[8:9]!r} where '{{' was expected")


def _other_kind(start: bytes, suffix: str) -> str:
    """What the file is instead, with the cure; "" where the first bytes do not tell."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        return "a web page: the download gave a page (a login, a licence, an error) instead of the file: get it again, signed in where that is asked"
    if start.startswith(b"version https://git-lfs"):
        return "a git LFS pointer, which stands for the file: run `git lfs pull` in its folder, or download the file itself"
    if start.startswith(b"PK\x03\x04"):
        return f"a zip, as torch.save writes its pickles, {_RUNS}"
    if len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5:
        return f"a pickle, {_RUNS}"
    if suffix in PICKLES:
        return f"named {suffix}, which stands for pickles, {_RUNS}"
    if text.startswith((b"{", b"[")) or (len(start) > 7 and all(9 <= byte < 127 for byte in start)):
        said = start[:40].decode("ascii", "replace")
        return f"text that begins with {said!r}: perhaps the answer of a server that refused the download: get it again"
    return ""


def _damaged(name: str, what: str) -> NoReturn:
    raise ModelError(f"{name} has a damaged header: {what}: get it again")


class _Refused(ValueError):
    """What our hooks find while JSON is parsed."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the name {twice!r:.100} is there twice")
    return found


def _constant(text: str) -> NoReturn:
    raise _Refused(f"{text} is no JSON")


def _parse(data: bytes, name: str) -> dict[str, Any]:
    """The header as a plain object without duplicate keys, down to the innermost."""
    try:
        text = data.decode("utf-8")
        raw = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except UnicodeDecodeError as error:
        _damaged(name, f"byte {8 + error.start} is not UTF-8")
    except json.JSONDecodeError as error:
        _damaged(name, f"at byte {8 + len(text[:error.pos].encode())} it is not JSON ({error.msg})")
    except (RecursionError, MemoryError):
        _damaged(name, "it is nested too deep")
    except ValueError as error:  # ours, or an integer of thousands of digits
        _damaged(name, str(error)[:200])
    if not isinstance(raw, dict):
        _damaged(name, f"it is a {type(raw).__name__} where an object was expected")
    return raw


def _metadata(raw: Any, name: str) -> dict[str, str]:
    if raw is None:
        return {}
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        _damaged(name, "__metadata__ is not an object of texts")
    for text in (*raw, *raw.values()):
        if not _is_text(text):
            _damaged(name, f"__metadata__ has a text that is no Unicode: {text!r:.60}")
    return raw


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8 (JSON's escapes can spell half a character)."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _natural(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most  # not bool, which is an int too


def _tensor(key: str, value: Any, data: int, name: str) -> TensorInfo:
    """One entry; `data` is the byte where tensors begin."""
    label = f"tensor {key!r:.100}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys() or not _is_text(key):
        _damaged(name, f"{label} is not an object with dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        _damaged(name, f"{label} has the unknown dtype {dtype!r:.40} (known: {', '.join(BYTES)})")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_natural(side, MAX_SIDE) for side in shape):
        _damaged(name, f"{label} has the shape {shape!r:.80} where up to {MAX_DIMS} sizes from 0 to {MAX_SIDE:,} were expected")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(side, 2**62) for side in offsets) or offsets[0] > offsets[1]:
        _damaged(name, f"{label} has the offsets {offsets!r:.80} where two rising numbers were expected")
    start, end = offsets
    if end - start != (needed := prod(shape) * BYTES[dtype]):
        _damaged(name, f"{label} of shape {tuple(shape)} and dtype {dtype} needs {needed:,} bytes but has {end - start:,} from byte {data + start:,}")
    return TensorInfo(dtype, tuple(shape), data + start, data + end)


def _check_layout(tensors: Mapping[str, TensorInfo], data: int, size: int, name: str) -> None:
    """Tensors lie end to end from `data` to the end of the file, as the format demands: a gap could hide anything, an overlap is never meant."""
    end, before = data, ""
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start < end:
            _damaged(name, f"tensor {key!r:.100} overlaps {before!r:.100} at byte {info.start:,}")
        if info.start > end:
            if info.end > size:
                _damaged(name, f"tensor {key!r:.100} lies outside the file: bytes {info.start:,} to {info.end:,} of {size:,}")
            _damaged(name, f"bytes {end:,} to {info.start:,}, before tensor {key!r:.100}, belong to no tensor")
        end, before = info.end, key
    if end > size:
        first = min((info.start, key) for key, info in tensors.items() if info.end > size)[1]
        raise ModelError(f"{name} is cut short: {size:,} bytes are there of {end:,} (the first tensor that is not whole is {first!r:.100}): "
                         "get it again")
    if end < size:
        _damaged(name, f"{size - end:,} bytes after the last tensor, from byte {end:,}, belong to no tensor")
