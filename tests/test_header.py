"""Headers: every broken file is one sentence that names the trouble and the cure, quickly; a good one is read without touching a tensor."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import bytes_read, lines_run
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from latentgen.errors import ModelError
from latentgen.models import header as header_module
from latentgen.models.gguf_header import MAX_GGUF_HEADER
from latentgen.models.header import MAX_HEADER, Header, TensorInfo, read_header


def entry(dtype: str = "F32", shape: Any = (2,), start: int = 0, end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def packed(header: Any, data: int = 8) -> bytes:
    """A file of this header (JSON text, or what is to become JSON) and so many bytes of data."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + bytes(data)


def refused(path: Path, *words: str) -> str:
    """The one sentence with which the file is refused, after little work and without any folder but its own in it."""
    errors: list[str] = []

    def attempt() -> None:
        with pytest.raises(ModelError) as caught:
            read_header(path)
        errors.append(str(caught.value))

    with bytes_read(header_module) as seen:
        lines = lines_run(attempt)
    assert lines < 1000 and sum(seen) < 200_000
    (message,) = errors
    assert all(word in message for word in words), message
    assert "\n" not in message and str(path.parent) not in message and len(message) < 700
    return message


def test_a_good_file(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b.c": torch.zeros(4, dtype=torch.float16), "none": torch.zeros(0, 5),
               "one": torch.tensor(1, dtype=torch.int64), "b16": torch.zeros(1, 2, 3, dtype=torch.bfloat16),
               "f8": torch.zeros(8).to(torch.float8_e4m3fn), "flag": torch.zeros(3, dtype=torch.bool)}
    save_file(tensors, tmp_path / "good.safetensors", metadata={"format": "pt"})
    header = read_header(str(tmp_path / "good.safetensors"))
    assert header.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
    assert header.metadata == {"format": "pt"} and header.format == "safetensors" and header.size == (tmp_path / "good.safetensors").stat().st_size
    assert header.bytes == sum(t.nbytes for t in tensors.values()) and max(t.end for t in header.tensors.values()) == header.size
    assert header.tensors["b16"].dtype == "BF16" and header.tensors["f8"].dtype == "F8_E4M3"


def test_offsets_are_absolute(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4.0)}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors").tensors["a"]
    data = (tmp_path / "x.safetensors").read_bytes()[info.start:info.end]
    assert struct.unpack("<4f", data) == (0, 1, 2, 3) and info == TensorInfo("F32", (4,), info.start, info.start + 16)


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """12 GB of nothing, 2,500 tensors: what is read is about as long as the header."""
    each = 2_400_000  # float16 values
    rows = {f"model.diffusion_model.block.{n}.weight": entry("F16", (each,), 2 * each * n, 2 * each * (n + 1)) for n in range(2500)}
    path = tmp_path / "large.safetensors"
    start = packed(rows, 0)
    path.write_bytes(start)
    os.truncate(path, len(start) + 2 * each * 2500)
    with bytes_read(header_module) as seen:
        header = read_header(path)
    assert len(header.tensors) == 2500 and header.size > 12e9
    assert len(start) <= sum(seen) < len(start) + 100_000


# What is no safetensors file at all

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"


def as_zip() -> bytes:
    made = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, made)
    assert zipfile.is_zipfile(made)
    return made.getvalue()


@pytest.mark.parametrize("data, words", [
    (b"", ("is empty", "0 bytes", "get it again")),
    (b"12345678", ("8 bytes",)), (struct.pack("<Q", 0), ("8 bytes",)), (b"\x07", ("1 bytes", "cut short")),
    (bytes(4000), ("8 zero bytes", "never filled by its download")),
    (struct.pack("<Q", 2**62) + b"{}" + bytes(100), ("damaged at byte 0", "4,611,686,018,427,387,904 bytes", "the file has 110")),
    (struct.pack("<Q", 5000) + b'{"a":' + bytes(100), ("cut short", "113 bytes are there of 5,008 or more")),
    (struct.pack("<Q", 1) + bytes(100), ("byte 8",)),
    (b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>", ("a web page", "instead of the file", "get it again")),
    (b"\n  <html><body>404</body></html>", ("a web page",)), (b"\xef\xbb\xbf<?xml version='1.0'?><Error>AccessDenied</Error>", ("a web page",)),
    (LFS, ("a git LFS pointer", "git lfs pull")),
    (as_zip(), ("not a safetensors file", "a zip", "can run code", "refused")),
    (pickle.dumps({"a": [1, 2, 3] * 30}), ("a pickle", "can run code", "refused")), (pickle.dumps({"a": 1}, protocol=2) + bytes(99), ("a pickle",)),
    (b'{"error": "Repository not found", "status": 404}', ("text that begins with", "Repository not found", "get it again")),
    (b"Invalid credentials in Authorization header", ("text that begins with 'Invalid credentials",)),
    (b"\x93NUMPY\x01\x00" + bytes(200), ("damaged at byte 0", "get it again")),
], ids=lambda value: None if isinstance(value, tuple) else repr(value[:12]))
def test_other_files_under_the_name(tmp_path: Path, data: bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / "models" / "x.safetensors"
    path.parent.mkdir()
    path.write_bytes(data)
    assert refused(path, *words).startswith("models/x.safetensors ")


def test_a_header_of_100_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_000) + b'{"a":')
    os.truncate(path, 100_000_008)
    refused(path, "100,000,000 bytes", f"at most {MAX_HEADER:,}")


@pytest.mark.parametrize("name", ["missing.safetensors", "folder.safetensors", "a\x00b", "x" * 300, "pipe.safetensors"])
def test_nothing_that_can_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    words = {"missing.safetensors": "there is no file", "folder.safetensors": "is a directory", "pipe.safetensors": "a device or a pipe"}
    refused(tmp_path / name, words.get(name, "there is no file"))


def test_a_path_of_another_type() -> None:
    with pytest.raises(ModelError, match="the file is a int: expected its path"):
        read_header(3)  # type: ignore[arg-type]


def test_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.safetensors").write_bytes(packed({}))

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(header_module, "open", denied, raising=False)
    refused(tmp_path / "x.safetensors", "cannot be read (Permission denied)")


# Damaged headers

NINE = {"a": entry(), "b": entry(start=8, end=16)}


@pytest.mark.parametrize("header, data, words", [
    ("{]", 8, ("not JSON", "at byte 9")), ('{"a": {"b":1', 8, ("not JSON", "byte 20")), ('{"ä": }', 8, ("not JSON", "at byte 15")),
    ('{"a": 1}', 8, ("'a' is not an object",)), ('{"a": NaN}', 0, ("NaN is no JSON",)), ('{"a": ' + "9" * 5000 + "}", 0, ("damaged header",)),
    ('{"a":' + "[" * 100_000 + "}", 0, ("damaged header",)), (b'{"a\xff":1}'.decode("latin1"), 0, ("damaged header",)),
    ('{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, ("'a' is there twice",)),
    ('{"a": {"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', 8, ("'dtype' is there twice",)),
    ({"a": entry(), "b": entry(start=4, end=12)}, 12, ("'b' overlaps 'a' at byte",)), ({"a": entry(), "b": entry()}, 8, ("overlaps",)),
    ({"a": entry(start=8, end=16)}, 16, ("bytes 70 to 78, before tensor 'a', belong to no tensor",)),
    ({"a": entry(), "b": entry(start=800, end=808)}, 16, ("'b' lies outside the file", "bytes 934 to 942 of 150")),
    ({"a": entry()}, 20, ("12 bytes after the last tensor, from byte 77",)),
    (NINE, 10, ("cut short", "141 bytes are there of 147", "'b'")), (NINE, 0, ("cut short", "'a'")),
    ({"a": entry(shape=(3,))}, 8, ("'a' of shape (3,) and dtype F32 needs 12 bytes but has 8",)),
    ({"a": entry("F16")}, 8, ("needs 4 bytes but has 8",)),
    ({"a": entry(shape=(-2,))}, 8, ("shape [-2]",)), ({"a": entry(shape=(2**62, 0))}, 8, ("shape",)),
    ({"a": entry(shape=[2.0])}, 8, ("shape [2.0]",)),
    ({"a": entry(shape=[True])}, 8, ("shape [True]",)), ({"a": entry(shape=[1] * 50)}, 8, ("shape",)),
    ({"a": entry(shape=(2**40, 2**40))}, 8, ("needs",)),
    ({"a": entry() | {"shape": 2}}, 8, ("shape 2",)), ({"a": entry() | {"shape": None}}, 8, ("shape None",)),
    ({"a": entry(dtype="F128")}, 8, ("unknown dtype 'F128'", "known: F64, F32")), ({"a": entry() | {"dtype": 3}}, 8, ("unknown dtype 3",)),
    ({"a": entry() | {"dtype": ["F32"]}}, 8, ("unknown dtype",)),
    ({"a": entry(start=-8, end=0)}, 8, ("offsets [-8, 0]",)), ({"a": entry(start=8, end=0)}, 8, ("offsets [8, 0]",)),
    ({"a": entry() | {"data_offsets": [0]}}, 8, ("offsets [0]",)), ({"a": entry() | {"data_offsets": [0, "8"]}}, 8, ("offsets",)),
    ({"a": entry() | {"data_offsets": [0, 2**64]}}, 8, ("offsets",)), ({"a": {"dtype": "F32", "shape": [2]}}, 8, ("dtype, shape and data_offsets",)),
    ({"__metadata__": {"a": 1}}, 0, ("__metadata__",)), ({"__metadata__": []}, 0, ("__metadata__",)),
    ({"__metadata__": {"a": "\ud800"}}, 0, ("Unicode",)),
    ('{"\\ud800": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, ("'\\ud800'",)),
], ids=lambda value: str(value)[:40])
def test_damaged_headers(tmp_path: Path, header: Any, data: int, words: tuple[str, ...]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed(header, data))
    refused(path, *words)


def test_what_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 8) + b'{"a\xff":1}')
    refused(tmp_path / "x.safetensors", "byte 11 is not UTF-8")


def test_a_file_without_tensors_is_whole(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(packed({}, 0))
    assert read_header(tmp_path / "x.safetensors").tensors == {}


def test_a_large_lawful_header_is_linear_work(tmp_path: Path) -> None:
    def work(count: int) -> int:
        rows = {f"{n:06}": entry("U8", (1,), n, n + 1) for n in range(count)}
        (tmp_path / "x.safetensors").write_bytes(packed(rows, count))
        assert len(read_header(tmp_path / "x.safetensors").tensors) == count
        return lines_run(lambda: read_header(tmp_path / "x.safetensors"))

    assert work(8_000) < 8.1 * work(1_000)


def survives(path: Path, data: bytes) -> None:
    """Nothing but a Header that fits the file, or a ModelError, whatever the bytes are."""
    path.write_bytes(data)
    try:
        found = read_header(path, any_type=True)
    except ModelError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert isinstance(found, Header) and found.size == len(data)
    assert all(0 <= t.start <= t.end <= len(data) for t in found.tensors.values())
    json.dumps([found.shapes, dict(found.metadata)], ensure_ascii=False).encode()


fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
fields = st.sampled_from(["dtype", "shape", "data_offsets", "x"])
values = st.recursive(st.none() | st.booleans() | st.integers(-5, 2**65) | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "BF16"]),
                      lambda inner: st.lists(inner, max_size=4) | st.dictionaries(fields, inner), max_leaves=8)
entries = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "F16", "U8", "X"]), "shape": st.lists(st.integers(-1, 4), max_size=3),
                                 "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2)})


@fuzz
@given(st.binary(max_size=200))
@example(b"GGUF")
@example(b"\x80\x02")
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    survives(tmp_path / "x.safetensors", data)
    survives(tmp_path / "x.safetensors", b"GGUF\x03\0\0\0" + data)
    survives(tmp_path / "x.safetensors", struct.pack("<Q", max(len(data), 2)) + data)


@fuzz
@given(st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), entries | values, max_size=4), st.integers(0, 60))
def test_any_header(tmp_path: Path, header: dict[str, Any], data: int) -> None:
    survives(tmp_path / "x.safetensors", packed(header, data))


@fuzz
@given(st.data())
def test_any_change_of_a_good_file(tmp_path: Path, data: st.DataObject) -> None:
    files = (packed({"__metadata__": {"k": "v"}, **NINE}, 16), gguf({"w": ((32, 4), 2)}, {"general.name": "x", "n": [1, 2]}))
    good = data.draw(st.sampled_from(files))
    at, cut = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, len(good)))
    survives(tmp_path / "x.safetensors", good[:at] + data.draw(st.binary(min_size=1, max_size=9)) + good[at + 1:])
    survives(tmp_path / "x.safetensors", good[:cut])


# GGUF

SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 14: (256, 210), 16: (256, 66), 30: (1, 2)}  # type -> values and bytes of a block


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(found: Any) -> bytes:
    if isinstance(found, str):
        return struct.pack("<I", 8) + text(found)
    if isinstance(found, list):
        kind = 8 if isinstance(found[0], str) else 5
        return struct.pack("<IIQ", 9, kind, len(found)) + b"".join(text(v) if kind == 8 else struct.pack("<i", v) for v in found)
    return struct.pack("<II", 4, found)


def gguf(tensors: dict[str, tuple[tuple[int, ...], int]], keys: dict[str, Any] | None = None, *, version: int = 3,
         offsets: dict[str, int] | None = None, counts: tuple[int, int] | None = None, data: int | None = None) -> bytes:
    """A GGUF file: name -> (ggml's dims, type), with zeros for data."""
    keys, rows, at = keys or {}, [], 0
    for name, (dims, kind) in tensors.items():
        block, width = SIZES.get(kind, (1, 4))
        offset = (offsets or {}).get(name, at)
        rows.append(text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset))
        count = 1
        for side in dims:
            count *= side
        at += -(-(count // block * width) // 32) * 32
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(text(k) + value(v) for k, v in keys.items()) + b"".join(rows)
    return head + bytes(-len(head) % 32) + bytes(at if data is None else data)


def test_a_gguf_file(tmp_path: Path) -> None:
    """Shapes are in torch's order, types by name, offsets absolute; a convolution that its writer folded has its own shape again."""
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf({"a": ((256, 3), 12), "b": ((7,), 0), "c": ((32, 2), 8), "conv": ((9, 8), 1), "d": ((4, 1), 30)},
                          {"general.architecture": "net", "comfy.gguf.orig_shape.conv": [2, 4, 3, 3], "many": list(range(500)),
                           "words": ["one", "two"]}))
    header = read_header(path)
    assert header.shapes == {"a": (3, 256), "b": (7,), "c": (2, 32), "conv": (2, 4, 3, 3), "d": (1, 4)} and header.format == "gguf"
    assert [t.dtype for t in header.tensors.values()] == ["Q4_K", "F32", "Q8_0", "F16", "BF16"]
    assert [t.end - t.start for t in header.tensors.values()] == [3 * 144, 28, 68, 144, 8] and all(t.start % 32 == 0 for t in header.tensors.values())
    assert header.metadata["general.architecture"] == "net" and header.metadata["words"] == "one, two" and header.metadata["many"] == "500 values"


def test_gguf_agrees_with_its_own_writer(tmp_path: Path) -> None:
    writers = pytest.importorskip("gguf")
    import numpy as np

    writer = writers.GGUFWriter(tmp_path / "x.gguf", "net")
    writer.add_string("general.name", "x")
    writer.add_tensor("a", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("b", np.ones((2, 5), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header, theirs = read_header(tmp_path / "x.gguf"), writers.GGUFReader(tmp_path / "x.gguf")
    assert header.shapes == {"a": (3, 4), "b": (2, 5)}
    assert {t.name: int(t.data_offset) for t in theirs.tensors} == {name: t.start for name, t in header.tensors.items()}


def test_types_that_cannot_be_loaded_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf({"a": ((256,), 16)}))
    refused(tmp_path / "x.gguf", "type IQ2_XXS", "first 'a'", "expected F32, F16, BF16, Q4_0, Q4_1, Q5_0")
    assert read_header(tmp_path / "x.gguf", any_type=True).tensors["a"].dtype == "IQ2_XXS"


ONE = {"a": ((4,), 0)}


@pytest.mark.parametrize("data, words", [
    (b"GGUF", ("cut short",)), (gguf(ONE)[:40], ("cut short",)), (gguf(ONE, data=10), ("cut short", "74 bytes are there of 80", "'a'")),
    (gguf(ONE, version=1), ("version 1",)), (gguf(ONE, version=3 << 24), ("big-endian",)), (gguf(ONE, version=4), ("version 4", "expected 2 or 3")),
    (gguf(ONE, counts=(2**40, 0)), ("1,099,511,627,776 tensors",)), (gguf(ONE, counts=(1, 2**63)), ("keys",)),
    (gguf(ONE, counts=(500, 0)), ("damaged",)),
    (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 2**60) + bytes(200), ("at byte 24",)),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<I", 99) + bytes(99), ("unknown value type 99",)),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 2**61) + bytes(99), ("does not fit",)),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(99), ("array of the type 9",)),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (text("k") + value("v")) + bytes(99), ("'k' is there twice",)),
    (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 2) + b"\xff\xfe" + bytes(99), ("not UTF-8",)),
    (gguf({"a": ((4,), 77)}), ("unknown type 77",)), (gguf({"a": ((0,), 0)}), ("shape (0,)",)), (gguf({"a": ((2**63, 2), 0)}, data=0), ("shape",)),
    (gguf({"a": ((1,) * 5, 0)}), ("5 dimensions",)), (gguf({"a": ((33,), 2)}), ("not a multiple of 32",)),
    (gguf({"a": ((4,), 0), "b": ((4,), 0)}, offsets={"b": 0}), ("overlaps",)), (gguf({"a": ((4,), 0), "b": ((4,), 0)}, offsets={"b": 96}), ("gap",)),
    (gguf(ONE, offsets={"a": 2**60}), ("gap",)), (gguf(ONE, {"general.alignment": 7}), ("alignment is 7",)),
], ids=lambda value: None if isinstance(value, tuple) else repr(value[:30]))
def test_damaged_gguf(tmp_path: Path, data: bytes, words: tuple[str, ...]) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    refused(tmp_path / "x.gguf", *words)


def test_two_gguf_tensors_of_one_name(tmp_path: Path) -> None:
    row = text("a") + struct.pack("<IQIQ", 1, 4, 0, 0)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + row + row + bytes(99))
    refused(tmp_path / "x.gguf", "tensor 'a' is there twice")


def test_a_gguf_header_longer_than_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 0, 2 * MAX_GGUF_HEADER))
    os.truncate(path, 3 * MAX_GGUF_HEADER)
    refused(path, "longer than the", "accepted")


def test_a_gguf_header_of_empty_texts(tmp_path: Path) -> None:
    """Many empty texts: too many are refused, and of those that are accepted each is little work."""
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 2**22 - 100))
    os.truncate(path, MAX_GGUF_HEADER)
    refused(path, "4,194,205 texts: at most 1,000,000")

    def work(count: int) -> int:
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + text("k") + struct.pack("<IIQ", 9, 8, count))
        os.truncate(path, MAX_GGUF_HEADER)
        assert read_header(path).metadata["k"] == f"{count} texts"  # the second key is empty, as is its value
        return lines_run(lambda: read_header(path)) if count < 10_000 else 0

    work(999_998)
    assert work(8_000) < 8 * work(1_000)
