"""Films: what is written is what other readers find: frames, times, loops, text; whole or not at all."""

from __future__ import annotations

import builtins
import io
import json
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from latentgen.errors import OutputError, RequestError
from latentgen.pixels.film import WRITERS, check_film, write_film
from latentgen.pixels.mp4 import is_mp4, read_comment, write_comment
from latentgen.pixels.save import read_metadata

TEXT = {"latentgen": '{"prompt": "caf\u00e9 \u732b"}', "parameters": "a red heart\nSteps: 3, Seed: 1, Size: 40x24"}


def frames(count: int = 5, size: tuple[int, int] = (40, 24)) -> list[Image.Image]:
    made = []
    for n in range(count):
        image = Image.new("RGB", size, (255, 250 - 20 * n, 240))
        ImageDraw.Draw(image).rectangle((4 * n, 4, 4 * n + 8, 18), fill=(20, 40 * n, 200))
        made.append(image)
    return made


def read(path: Path) -> tuple[list[Image.Image], list[float]]:
    with Image.open(path) as film:
        seen, times = [], []
        for n in range(film.n_frames):
            film.seek(n)
            film.load()
            seen.append(film.convert("RGB"))
            times.append(film.info["duration"])
        return seen, times


def far(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())


@pytest.mark.parametrize("suffix, most, fps, times", [(".png", 0, 8, [125] * 5), (".gif", 1, 8, [120, 130, 120, 130, 130]), (".webp", 6, 8, [125] * 5),
                                                     (".webp", 6, 30, [33, 34, 33, 33, 34])])
def test_other_readers_find_every_frame_its_time_and_the_text(tmp_path: Path, suffix: str, most: float, fps: float, times: list[int]) -> None:
    path = write_film(tmp_path / f"a{suffix}", iter(frames()), fps=fps, loop=True, metadata=lambda: TEXT)
    seen, found = read(path)
    assert len(seen) == 5 and max(far(a, b) for a, b in zip(seen, frames(), strict=True)) <= most
    assert sum(found) == pytest.approx(sum(times), abs=10) and found == pytest.approx(times, abs=1 if suffix != ".gif" else 10)
    assert read_metadata(path) == TEXT
    with Image.open(path) as film:
        assert film.info.get("loop") == 0
        film.verify() if suffix == ".png" else film.load()
    once = write_film(tmp_path / f"b{suffix}", frames(), fps=fps, loop=False, metadata=dict)
    with Image.open(once) as film:
        assert film.info.get("loop", 1) == 1 and film.n_frames == 5


def test_an_mp4_has_its_frames(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = write_film(tmp_path / "a.mp4", frames(7, (41, 23)), fps=12.5, loop=False, metadata=lambda: TEXT)
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        seen = [frame.to_image() for frame in film.decode(stream)]
        assert stream.average_rate == Fraction(25, 2) and seen[0].size == (42, 24) and len(seen) == 7
        assert json.loads(film.metadata["comment"]) == TEXT == read_metadata(path) == read_metadata(path.read_bytes())
    assert max(far(a.crop((0, 0, 41, 23)), b) for a, b in zip(seen, frames(7, (41, 23)), strict=True)) < 12


def boxes(*nested: bytes, text: bytes, after: bytes = b"") -> bytes:
    """A file with nothing but a comment, by the definition of its boxes."""
    made = struct.pack(">I4sII", 16 + len(text), b"data", 1, 0) + text
    for kind in reversed(nested):
        made = (b"\0\0\0\0" if kind == b"meta" else b"") + made
        made = struct.pack(">I4s", 8 + len(made), kind) + made
    return struct.pack(">I4s", 8, b"ftyp") + struct.pack(">I4sQ", 1, b"mdat", 20) + b"1234" + made + after


NESTED = (b"moov", b"udta", b"meta", b"ilst", b"\xa9cmt")


@pytest.mark.parametrize("new", ["", "{}", "caf\u00e9 " * 100])
@pytest.mark.parametrize("after", [b"", struct.pack(">I4s", 12, b"free") + b"rest"])
def test_the_comment_of_an_mp4_is_written_anew(new: str, after: bytes) -> None:
    file = io.BytesIO(boxes(*NESTED, text=b"old", after=after))
    assert is_mp4(file) and read_comment(file, most=99) == "old" and read_comment(file, most=2) == ""
    write_comment(file, new)
    assert file.getvalue() == boxes(*NESTED, text=new.encode(), after=after) and read_comment(file, most=9999) == new


def test_a_damaged_mp4_has_no_comment() -> None:
    whole = boxes(*NESTED, text=b'{"a": "b"}')
    assert read_metadata(whole) == {"a": "b"}
    for n in range(8, len(whole)):
        assert read_metadata(whole[:n]) == {}
    for at in range(8, len(whole) - 20):
        read_metadata(whole[:at] + b"\xff" + whole[at + 1:])  # whatever it says, it is looked through and that is all
    assert read_metadata(whole[:8] + struct.pack(">I4s", 8, b"free") * 2000 + whole[8:]) == {}
    with pytest.raises(ValueError, match="no comment"):
        write_comment(io.BytesIO(boxes(*NESTED[:3], text=b"old")), "new")


def test_without_av_an_mp4_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *a, **k: (_ for _ in ()).throw(ImportError(name)) if name == "av" else real(name, *a, **k))
    with pytest.raises(RequestError, match=r"latentgen\[video\]"):
        check_film(tmp_path / "a.mp4", 12)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_film_that_breaks_off_leaves_nothing_and_the_old_one(tmp_path: Path, suffix: str) -> None:
    if suffix == ".mp4":
        pytest.importorskip("av")
    path = write_film(tmp_path / f"a{suffix}", frames(2), fps=5, loop=True, metadata=dict)
    old = path.read_bytes()

    def breaking():  # noqa: ANN202
        yield from frames(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_film(path, breaking(), fps=5, loop=True, metadata=dict)
    with pytest.raises(RequestError, match="frame 2 is 8x8 and the first is 40x24"):
        write_film(path, [frames(1)[0], Image.new("RGB", (8, 8))], fps=5, loop=True, metadata=dict)
    with pytest.raises(RequestError, match="no frames"):
        write_film(path, [], fps=5, loop=True, metadata=dict)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_only_one_frame_is_held(tmp_path: Path) -> None:
    """A frame is let go before the next one comes."""
    import weakref

    alive: list[weakref.ref] = []

    def coming():  # noqa: ANN202
        for image in map(Image.Image.copy, frames(6)):
            alive.append(weakref.ref(image))
            assert sum(ref() is not None for ref in alive) <= 3  # this one, the one before, and this loop's own
            yield image
            del image

    for suffix in (".gif", ".webp", ".png"):
        alive.clear()
        write_film(tmp_path / f"a{suffix}", coming(), fps=5, loop=True, metadata=dict)
        assert len(alive) == 6


@pytest.mark.parametrize("name, fps, message", [("a.avi", 5, "ends in '.avi'"), ("a.gif", 0, "fps is 0"), ("a.gif", True, "fps is True"), ("a.gif", 1e6, "fps is 1000000")])
def test_what_is_no_film_is_refused(name: str, fps: float, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_film(name, fps)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_film(tmp_path / "no" / "a.gif", frames(), fps=5, loop=True, metadata=dict)
