"""Headers of GGUF files, checked before any tensor is read. Knows the layout of versions 2 and 3 and the block sizes of ggml; dequantises nothing.

Written because reading a hostile header must be bounded: every count and length is compared with what is left of the file first.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, BinaryIO, NoReturn

from latentgen.errors import ModelError
from latentgen.models.header import MAX_SIDE, TensorInfo

MAX_GGUF_HEADER = 32 * 2**20  # bytes; a vocabulary of 256,000 words with merges has 16 MB
MAX_TENSORS, MAX_KEYS, MAX_TEXT, MAX_STRINGS = 65_536, 65_536, 2**20, 1_000_000
MAX_KEPT = 64  # values of an array that is kept as text
TYPES = {  # ggml's number -> name, values in a block, bytes of a block
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
}
_SCALES = {  # of packings that are unpacked here, where in a block its scales lie, each a float16
    "Q4_0": (0, 2), "Q4_1": (0, 4), "Q5_0": (0, 2), "Q5_1": (0, 4), "Q8_0": (0, 2), "Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4),
           "Q5_K": (0, 4),
    "Q6_K": (208, 210), "IQ4_NL": (0, 2), "IQ4_XS": (0, 2),
}
BLOCKS = {name: (values, size, _SCALES[name]) for name, values, size in TYPES.values() if name in _SCALES}
LOADABLE = ("F32", "F16", "BF16", *BLOCKS)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_SHAPE_KEY = "comfy.gguf.orig_shape."  # where a writer folded a convolution to fit the format, its true shape


@dataclass
class _Reader:
    """A cursor that never reads past the file or past what a header may have."""

    file: BinaryIO
    size: int
    name: str
    at: int = 0
    strings: int = field(default=0)

    def bad(self, what: str, at: int | None = None) -> NoReturn:
        raise ModelError(f"{self.name} has a damaged header: at byte {self.at if at is None else at:,} {what}: get it again")

    def room(self, count: int, what: str) -> None:
        if self.at + count > self.size:
            raise ModelError(f"{self.name} is cut short or damaged: at byte {self.at:,} {what} of {count:,} bytes does not fit in the "
                             f"{self.size:,} bytes of the file: get it again")
        if self.at + count > MAX_GGUF_HEADER:
            self.bad(f"{what} makes the header longer than the {MAX_GGUF_HEADER:,} bytes that are accepted")

    def take(self, count: int, what: str) -> bytes:
        self.room(count, what)
        data = self.file.read(count)
        if len(data) < count:
            raise ModelError(f"{self.name} is cut short at byte {self.at + len(data):,}: get it again")
        self.at += count
        return data

    def number(self, layout: str, what: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def text(self, what: str) -> str:
        start, length = self.at, self.number("<Q", what)
        self.strings += 1
        if length > MAX_TEXT or self.strings > MAX_STRINGS:
            self.bad(f"{what} has {length:,} bytes and is text {self.strings:,}: at most {MAX_TEXT:,} and {MAX_STRINGS:,} are accepted", start)
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            self.bad(f"{what} is not UTF-8", start)

    def value(self, kind: int) -> Any:
        """A scalar, a text, or an array: a list where it is short, else a word about it."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], "a value")
        if kind == _STRING:
            return self.text("a text")
        if kind != _ARRAY:
            self.bad(f"is the unknown value type {kind}")
        inner, count = self.number("<I", "an array"), self.number("<Q", "an array")
        if inner in _SCALARS:
            width = struct.calcsize(_SCALARS[inner])
            data = self.take(count * width, "an array")
            return [v[0] for v in struct.iter_unpack(_SCALARS[inner], data)] if count <= MAX_KEPT else f"{count} values"
        if inner != _STRING:
            self.bad(f"is an array of the type {inner}, where numbers or texts were expected")
        self.room(8 * count, "an array of texts")
        if count <= MAX_KEPT:
            return [self.text("a text") for _ in range(count)]
        self.skip_texts(count)
        return f"{count} texts"

    def skip_texts(self, count: int) -> None:
        """Past the texts of a vocabulary, which are not kept (so they are not decoded, either)."""
        self.strings += count
        if self.strings > MAX_STRINGS:
            self.bad(f"an array makes {self.strings:,} texts: at most {MAX_STRINGS:,} are accepted")
        read, at, end = self.file.read, self.at, min(self.size, MAX_GGUF_HEADER)
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            at += 8 + length
            if at > end:
                break
            read(length)
        if at > end:
            self.bad("a text of an array does not fit in the file or in what a header may have", at)
        self.at = at


def read_gguf(file: BinaryIO, size: int, name: str, *, any_type: bool = False) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (shapes in torch's order, absolute offsets) and metadata (as texts) of a GGUF file.

    Args:
        name: of the file, for messages.
        any_type: accept quantisations that cannot be loaded, too.

    Raises:
        ModelError: a version, count, length, type, shape or offset that is not acceptable or does not fit the file.
    """
    file.seek(0)
    reader = _Reader(file, size, name)
    reader.take(4, "the magic")
    version = reader.number("<I", "the version")
    if version not in (2, 3):
        order = " (big-endian)" if version in (2 << 24, 3 << 24) else ""
        raise ModelError(f"{name} is GGUF version {version}{order}: expected 2 or 3, little-endian: get a newer conversion")
    count, keys = reader.number("<Q", "the counts"), reader.number("<Q", "the counts")
    if count > MAX_TENSORS or keys > MAX_KEYS:
        reader.bad(f"it says {count:,} tensors and {keys:,} keys: at most {MAX_TENSORS:,} and {MAX_KEYS:,} are accepted", 8)
    values: dict[str, Any] = {}
    for _ in range(keys):
        start, key = reader.at, reader.text("a key")
        if key in values:
            reader.bad(f"the key {key!r:.100} is there twice", start)
        values[key] = reader.value(reader.number("<I", "a value type"))
    tensors = _tensors(reader, count, values)
    if not any_type:
        _check_loadable(tensors, name)
    return tensors, {key: ", ".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in values.items()}


def _tensors(reader: _Reader, count: int, values: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """The table of tensors, compared with the file: they lie one after another, each at the next multiple of the alignment."""
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 65_536 or alignment % 8:
        reader.bad(f"the alignment is {alignment!r:.40}, where a multiple of 8 up to 65,536 was expected")
    rows: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(count):
        start, key = reader.at, reader.text("a tensor name")
        if key in rows:
            reader.bad(f"the tensor {key!r:.100} is there twice", start)
        rows[key] = _row(reader, key, values)
    data = -(-reader.at // alignment) * alignment
    expected = 0
    tensors: dict[str, TensorInfo] = {}
    for key, (dtype, shape, offset, length) in sorted(rows.items(), key=lambda item: (item[1][2], item[1][3])):
        if offset != expected:
            word = "overlaps the one before" if offset < expected else "leaves a gap or is not aligned"
            reader.bad(f"tensor {key!r:.100} {word}: it begins {offset:,} bytes into the data, {expected:,} were expected", data + offset)
        if data + offset + length > reader.size:
            raise ModelError(f"{reader.name} is cut short: {reader.size:,} bytes are there of {data + offset + length:,} or more "
                             f"(tensor {key!r:.100} is not whole): get it again")
        tensors[key] = TensorInfo(dtype, shape, data + offset, data + offset + length)
        expected = -(-(offset + length) // alignment) * alignment
    return {key: tensors[key] for key in rows}


def _row(reader: _Reader, key: str, values: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape in torch's order, offset in the data, bytes."""
    start, dims = reader.at, reader.number("<I", "a tensor")
    if dims > 4:
        reader.bad(f"tensor {key!r:.100} has {dims} dimensions: at most 4 are accepted", start)
    sides = struct.unpack(f"<{dims}Q", reader.take(8 * dims, "a shape"))
    kind, offset = reader.number("<I", "a tensor type"), reader.number("<Q", "an offset")
    if kind not in TYPES:
        reader.bad(f"tensor {key!r:.100} has the unknown type {kind}", start)
    dtype, block, width = TYPES[kind]
    if not all(1 <= side <= MAX_SIDE for side in sides):
        reader.bad(f"tensor {key!r:.100} has the shape {sides[::-1]}, where sizes from 1 to {MAX_SIDE:,} were expected", start)
    if (sides[0] if sides else 1) % block:
        reader.bad(f"tensor {key!r:.100} of type {dtype} has rows of {sides[0] if sides else 1} values, not a multiple of {block}", start)
    shape = tuple(reversed(sides))
    kept = values.get(_SHAPE_KEY + key)
    if isinstance(kept, list) and len(kept) <= 8 and all(type(side) is int and side >= 1 for side in kept) and prod(kept) == prod(shape):
        shape = tuple(kept)
    return dtype, shape, offset, prod(sides) // block * width


def _check_loadable(tensors: Mapping[str, TensorInfo], name: str) -> None:
    """
    Raises:
        ModelError: a tensor is of a type that cannot be loaded; the first one is named.
    """
    for key, info in tensors.items():
        if info.dtype not in LOADABLE:
            raise ModelError(f"{name} has tensors of the type {info.dtype} (first {key!r:.100}): expected {', '.join(LOADABLE)}: "
                             "get another quantisation of it")
