"""Pictures to files: whole or not at all, with their words in them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentgen.errors import ImageError, OutputError, RequestError
from latentgen.pixels.image import open_image
from latentgen.pixels.save import read_metadata, save_image


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    """A smooth picture whose every pixel and side differs."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 3], axis=-1).astype(np.uint8))


def same(image: Image.Image, expected: object, tolerance: int = 0) -> bool:
    return image.mode == "RGB" and int(np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).max()) <= tolerance


WORDS = {"parameters": "a café, 漢字 🎨\nSteps: 20", "latin": "é", "recipe": json.dumps({"seed": 1}), "empty": "", "nul": "a\0b"}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
@pytest.mark.parametrize("words", [None, {}, {"a": "plain"}, WORDS, {"clé": "x"}, {"long": "long " * 4000}])
def test_metadata_round_trip(tmp_path: Path, suffix: str, words: dict[str, str] | None) -> None:
    path = save_image(gradient(), tmp_path / f"out{suffix}", metadata=words)
    assert read_metadata(path) == (words or {})
    assert same(open_image(path), gradient(), 0 if suffix == ".png" else 40)
    assert [file.name for file in tmp_path.iterdir()] == [f"out{suffix}"]


def test_comments_of_other_programs(tmp_path: Path) -> None:
    for number, comment in enumerate([b"UNICODE\0" + "a cät".encode("utf-16-le"), b"UNICODE\0" + "a cät".encode("utf-16-be"),
                                      bytes(8) + "a cät".encode(), b"ASCII\0\0\0a c\xc3\xa4t"]):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = comment
        path = tmp_path / f"{number}.jpg"
        gradient().save(path, exif=exif)
        assert read_metadata(path) == {"parameters": "a cät"}


def test_read_metadata_of_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("words")
    for path in (tmp_path / "a.png", tmp_path / "none.png", tmp_path):
        with pytest.raises(ImageError, match="cannot be read"):
            read_metadata(path)


@pytest.mark.parametrize("metadata", [{"seed": 1}, {1: "a"}, {"": "a"}, {"k" * 80: "a"}, {"漢": "a"}, {"a\nb": "a"}, {"a": "\ud800"}])
def test_bad_metadata(tmp_path: Path, metadata: dict) -> None:
    with pytest.raises(RequestError, match="metadata"):
        save_image(gradient(), tmp_path / "a.png", metadata=metadata)
    assert not list(tmp_path.iterdir())


def test_bad_names_and_qualities(tmp_path: Path) -> None:
    for name in ("a.gif", "a", "a.png.txt"):
        with pytest.raises(RequestError, match=r"expected \.png, \.jpg \(\.jpeg\) or \.webp"):
            save_image(gradient(), tmp_path / name)
    for quality in (0, 101, 9.5, True):
        with pytest.raises(RequestError, match="quality"):
            save_image(gradient(), tmp_path / "a.jpg", quality=quality)  # type: ignore[arg-type]


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    for image, name, metadata in ((gradient().convert("RGBA"), "a.jpg", None), (Image.new("RGB", (16500, 1)), "a.webp", None),
                                  (gradient(), "a.jpg", {"a": "x" * 70000})):
        with pytest.raises(OutputError, match="save it as PNG"):
            save_image(image, tmp_path / name, metadata=metadata)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = save_image(gradient(), tmp_path / "out.png", metadata={"a": "old"})
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OutputError, match="out.png' cannot be written .No space left"):
        save_image(Image.new("RGB", (50, 50)), path, metadata={"a": "new"})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(os, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_image(gradient(), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "missing" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(OutputError, match="cannot be written"):
            save_image(gradient(), path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder.png"] and not list((tmp_path / "folder.png").iterdir())


def test_a_picture_that_is_not_there_is_told_in_words() -> None:
    with pytest.raises(ImageError, match=r"^the picture 'no.png' cannot be read \(No such file or directory\): check the path, or save it again$"):
        read_metadata("no.png")
