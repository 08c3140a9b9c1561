"""Pictures on one sheet with words around them: the one layout of all grids. Knows PIL and its font; no request, model or file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from latentgen.errors import RequestError

GAP = 4  # pixels around a picture where there are words
MAX_LINES = 12  # of a label; what is longer ends in "..."
SIZES = (12, 32)  # of the letters, which grow with the pictures


def sheet(images: Sequence[Image.Image], labels: Sequence[str] | None = None, *, columns: int | None = None, tile: int | None = 192,
          smooth: bool = False,
          column_names: Sequence[str] | None = None, row_names: Sequence[str] | None = None, title: str = "") -> Image.Image:
    """Pictures in rows on white, each fitted into a tile, with words that wrap: under each, above the columns, beside the rows, and over all.

    Args:
        images: in reading order.
        labels: one for each picture, which stands under it.
        columns: pictures in a row; by default up to 6, or as many as there are column_names.
        tile: side in pixels that every picture is scaled to; None leaves them as they are, centred in tiles as large as the largest.
        smooth: enlarge previews softly.
        column_names, row_names: one for each column and row.

    Returns:
        An RGB picture.

    Raises:
        RequestError: no pictures, or another number of labels, columns or names.
    """
    if not images:
        raise RequestError("there are no pictures to lay out: pass at least one")
    if labels is not None and len(labels) != len(images):
        raise RequestError(f"there are {len(labels)} labels for {len(images)} pictures: pass one each")
    if columns is not None and (not isinstance(columns, int) or isinstance(columns, bool) or columns < 1):
        raise RequestError(f"columns is {columns!r}: expected a whole number of 1 or more")
    columns = columns or (len(column_names) if column_names else min(len(images), 6))
    rows = -(-len(images) // columns)
    for name, names, count in (("column", column_names, columns), ("row", row_names, rows)):
        if names is not None and len(names) != count:
            raise RequestError(f"there are {len(names)} {name} names for {count} {name}s: pass one each")
    width, height = (tile, tile) if tile else (max(image.width for image in images), max(image.height for image in images))
    font = ImageFont.load_default(min(SIZES[1], max(SIZES[0], min(width, height) // 14)))
    gap = GAP if labels or column_names or row_names or title else 0
    beside = 0 if not row_names else min(width, max(64, round(max(font.getlength(_drawn(name)) for name in row_names)) + 1))
    names = [wrapped(text, font, width) for text in column_names or ()]
    sides = [wrapped(text, font, beside) for text in row_names or ()]
    under = [wrapped(text, font, width) for text in labels or ()]
    over = wrapped(title, font, columns * (width + 2 * gap) + beside) if title else []
    line = round(font.size * 1.4)
    head, above, below = (line * most + gap * bool(most) for most in (len(over), max(map(len, names), default=0), max(map(len, under), default=0)))
    heights = [max(height, line * max(map(len, sides[row:row + 1]), default=0)) + below + 2 * gap for row in range(rows)]
    left = beside + (gap if beside else 0)
    page = Image.new("RGB", (left + columns * (width + 2 * gap), head + above + sum(heights)), "white")
    pen = _Pen(page, font, line)
    pen.lines(over, gap, gap // 2, anchor="la")
    for column, text in enumerate(names):
        pen.lines(text, left + column * (width + 2 * gap) + gap + width // 2, head + above - gap // 2 - line * len(text))
    top = head + above
    for row in range(rows):
        if sides:
            pen.lines(sides[row], gap + beside // 2,
                      top + gap + (height - line * len(sides[row])) // 2 if line * len(sides[row]) < height else top + gap)
        for column, image in enumerate(images[row * columns:(row + 1) * columns]):
            at = left + column * (width + 2 * gap) + gap
            small = _fitted(image, tile, smooth)
            page.paste(small, (at + (width - small.width) // 2, top + gap + (height - small.height) // 2))
            if under:
                pen.lines(under[row * columns + column], at + width // 2, top + gap + height + gap // 2)
        top += heights[row]
    return page


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A text in lines of at most `width` pixels, broken at spaces where it can; of more than MAX_LINES the last ends in "...".

    Letters that the font lacks become "?".
    """
    lines: list[str] = []
    for word in _drawn(text).split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:  # a word that is wider than a line goes on in the next
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
        if len(lines) > MAX_LINES:
            break
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines = [*lines[:MAX_LINES - 1], f"{last}..."]
    return lines


class _Pen:
    """Lines of one font on a page."""

    def __init__(self, page: Image.Image, font: ImageFont.FreeTypeFont, line: int) -> None:
        self._draw, self._font, self._line = ImageDraw.Draw(page), font, line

    def lines(self, lines: Sequence[str], x: int, y: int, anchor: str = "ma") -> None:
        for n, text in enumerate(lines):
            self._draw.text((x, y + n * self._line), text, fill="black", font=self._font, anchor=anchor)


def _fitted(image: Image.Image, tile: int | None, smooth: bool) -> Image.Image:
    image = image.convert("RGB")
    if tile is None or max(image.size) == tile:
        return image
    scale = tile / max(image.size)
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.LANCZOS
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), how)


def _drawn(text: str) -> str:
    return "".join(letter if letter.isspace() or _has(letter) else "?" for letter in text)


@cache
def _has(letter: str) -> bool:
    """Whether PIL's own font has a letter: one that it lacks is drawn as its box for none."""
    font = ImageFont.load_default(16)
    shape, none = (font.getmask(one) for one in (letter, "\uffff"))
    return letter.isprintable() and (shape.size, bytes(shape)) != (none.size, bytes(none))
