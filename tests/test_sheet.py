"""Sheets: where pictures and words lie, and that no word is lost or leaves its place."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from latentgen.errors import RequestError
from latentgen.pixels.sheet import MAX_LINES, sheet, wrapped

RED = Image.new("RGB", (32, 16), (255, 0, 0))


def reds(page: Image.Image) -> int:
    return int((np.asarray(page) == (255, 0, 0)).all(-1).sum())


def test_pictures_alone_touch_each_other() -> None:
    page = sheet([RED] * 5, columns=3, tile=None)
    assert page.size == (96, 32) and reds(page) == 5 * 32 * 16
    assert page.getpixel((70, 20)) == (255, 255, 255)  # the sixth place


def test_a_tile_keeps_the_shape_of_its_picture() -> None:
    page = sheet([RED, Image.new("RGBA", (10, 40), (0, 0, 255, 255))], tile=64)
    assert page.size == (128, 64) and reds(page) == 64 * 32
    assert page.getpixel((64 + 32, 5)) == (0, 0, 255) and page.getpixel((64 + 5, 5)) == (255, 255, 255)


def test_words_stand_in_the_white_around() -> None:
    bare = reds(sheet([RED] * 4, columns=2, tile=64))
    page = sheet([RED] * 4, list("abcd"), tile=64, column_names=["one", "two"], row_names=["up", "down"], title="all of them")
    assert reds(page) == bare  # nothing is drawn over a picture
    dark = np.asarray(page.convert("L")) < 60
    assert dark[:16].any() and dark[:, :60].any() and dark[-18:].any()
    assert not dark[:, -1].any() and not dark[-1].any()


@pytest.mark.parametrize("text", ["a red heart, soft shaded, on a table in the evening", "x" * 80, "", "ein Wort Donaudampfschifffahrtsgesellschaft hier"])
def test_wrapped_lines_fit_and_lose_nothing(text: str) -> None:
    font = ImageFont.load_default(13)
    lines = wrapped(text, font, 90)
    assert all(font.getlength(line) <= 90 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_a_label_that_would_bury_the_picture_ends_in_dots() -> None:
    font = ImageFont.load_default(13)
    lines = wrapped("word " * 500, font, 90)
    assert len(lines) == MAX_LINES and lines[-1].endswith("...") and font.getlength(lines[-1]) <= 90


def test_letters_that_the_font_lacks_are_shown_as_such() -> None:
    assert wrapped("猫 cat\u0007", ImageFont.load_default(13), 90) == ["? cat?"]


@pytest.mark.parametrize("options, message", [
    ({"labels": ["a", "b"]}, "2 labels for 1 pictures"), ({"columns": 0}, "columns is 0"), ({"columns": True}, "columns is True"),
    ({"column_names": ["a", "b"], "columns": 1}, "2 column names for 1 columns"), ({"row_names": ["a", "b"]}, "2 row names for 1 rows"),
])
def test_what_does_not_fit_is_refused(options: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        sheet([RED], **options)


def test_no_pictures_are_refused() -> None:
    with pytest.raises(RequestError, match="at least one"):
        sheet([])
