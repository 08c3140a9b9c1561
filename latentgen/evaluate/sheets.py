"""Contact sheets: pictures with a line of words under each. Knows PIL; no model and no measure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Cell = tuple[Image.Image, str]
GAP, LINE = 4, 13


def sheet(cells: Sequence[Cell], *, columns: int, side: int = 128, lines: int = 2) -> Image.Image:
    """Pictures in rows of `columns`, each `side` pixels square, with up to `lines` lines of label below.

    Args:
        cells: (picture, label) in reading order; the label is wrapped at words and cut at the picture's width.
    """
    width, height = side + GAP, side + GAP + LINE * lines
    rows = max(1, -(-len(cells) // columns))
    page = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    for n, (picture, label) in enumerate(cells):
        left, top = GAP + n % columns * width, GAP + n // columns * height
        page.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (left, top))
        for at, text in enumerate(wrapped(label, draw, font, side)[:lines]):
            draw.text((left, top + side + at * LINE), text, fill="black", font=font)
    return page


def wrapped(label: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The label in lines of at most `width` pixels. Letters that PIL's default font may lack become "?"."""
    lines = [""]
    for word in label.encode("ascii", "replace").decode().split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    while any(draw.textlength(line, font=font) > width for line in lines):
        lines = [line[:-1] if draw.textlength(line, font=font) > width else line for line in lines]
    return lines


def small(picture: np.ndarray | Image.Image, side: int) -> np.ndarray:
    """A picture ((H, W, 3) uint8 or PIL) as (side, side, 3) uint8, each pixel the mean of its area."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture.convert("RGB")
    return np.asarray(image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BOX))
