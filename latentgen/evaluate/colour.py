"""The dominant colour of a picture on white, by name, from its pixels alone. Knows arrays and colour words; no model.

Names are those of `latentgen.train.recolour.HUES` (each hue there lies inside its own sector here) with brown, black, grey and white.
"""

from __future__ import annotations

import re

import numpy as np

from latentgen.train.recolour import HUES, rgb_to_hsv

RING = tuple(HUES)  # red to pink, in the order of the hue circle; the last is a neighbour of the first
NAMES = (*RING, "brown", "black", "grey", "white")
BESIDE = {"brown": ("red", "orange"), "black": ("grey",), "grey": ("black", "white"), "white": ("grey",)}
_WORD = re.compile(rf"^(?:a |an |the )?({'|'.join(NAMES)}|gray)\b", re.IGNORECASE)

WHITE = 235  # a pixel whose darkest channel is above this is paper
EDGES = (0.034, 0.101, 0.185, 0.445, 0.535, 0.68, 0.835, 0.945)  # where each name of RING ends; words are not evenly spread over hue
CHROMA = 0.12  # least saturation x value of a pixel that has a hue
HUED_SHARE = 0.3  # of the drawn pixels: with fewer coloured ones the picture is black, grey or white
DARK, LIGHT = 0.42, 0.8  # values that part black from grey and grey from white
BROWN_VALUE, BROWN_CHROMA = 0.8, 0.48  # brown is a dark, dull orange or red
PINK_SATURATION, PINK_VALUE = 0.5, 0.8  # pink is also a light red on the purple side


def dominant_colour(picture: np.ndarray) -> str:
    """One of `NAMES`: the colour that most of the drawn (not white) area has.

    Each coloured pixel votes for the name of its hue with weight saturation x value; then lightness tells brown from orange and red, and pink
    from red. Checked on drawings whose own name says their colour (see the tests for plain cases, and the report's "real" rows).

    Args:
        picture: (H, W, 3) uint8, on white.
    """
    drawn = picture[picture.min(-1) < WHITE]
    if len(drawn) < 0.01 * picture.shape[0] * picture.shape[1]:
        return "white"
    hue, saturation, value = np.moveaxis(rgb_to_hsv(drawn.astype(np.float32) / 255), -1, 0)
    weight = saturation * value
    coloured = weight > CHROMA
    if coloured.mean() < HUED_SHARE:
        level = float(np.median(value[~coloured]))
        return "black" if level < DARK else "grey" if level < LIGHT else "white"
    hue, saturation, value, weight = hue[coloured], saturation[coloured], value[coloured], weight[coloured]
    sector = hue_sector(hue)
    best = int(np.argmax(np.bincount(sector, weight, minlength=len(RING))))
    own = sector == best
    turned = (hue[own] + 0.5) % 1  # red lies at both ends of the scale: its median is taken across the seam
    return _by_lightness(RING[best], (float(np.median(turned)) + 0.5) % 1, float(np.median(saturation[own])), float(np.median(value[own])))


def _by_lightness(name: str, hue: float, saturation: float, value: float) -> str:
    if name in ("red", "orange") and value < BROWN_VALUE and saturation * value < BROWN_CHROMA:
        return "brown"
    if name == "red" and hue > 0.5 and value > PINK_VALUE and saturation < PINK_SATURATION:
        return "pink"
    return name


def hue_sector(hue: np.ndarray) -> np.ndarray:
    """Hues (n,) in [0, 1) -> index into `RING` of the name that a person would say."""
    return np.searchsorted(np.array(EDGES), hue, side="right") % len(RING)


def neighbours(name: str) -> frozenset[str]:
    """The names beside one: the two next to it on the hue circle, or the nearest in lightness.

    >>> sorted(neighbours("red"))
    ['brown', 'orange', 'pink']
    """
    beside = set(BESIDE.get(name, ()))
    if name in RING:
        at = RING.index(name)
        beside |= {RING[at - 1], RING[(at + 1) % len(RING)]} | {other for other, near in BESIDE.items() if name in near}
    return frozenset(beside | {other for other, near in BESIDE.items() if name in near})


def named_colour(text: str) -> str | None:
    """The colour word that a caption opens with ("blue heart" -> "blue"), or None."""
    found = _WORD.match(text)
    return None if found is None else found.group(1).lower().replace("gray", "grey")


def colour_scores(wanted: list[str], found: list[str]) -> dict[str, float | int | None]:
    """How often the found colour is the wanted one, or that or a neighbour; shares from 0 to 1."""
    pairs = list(zip(wanted, found, strict=True))
    exact = [w == f for w, f in pairs]
    near = [w == f or f in neighbours(w) for w, f in pairs]
    return {"pictures": len(pairs), "exact": _share(exact), "within_one": _share(near)}


def _share(hits: list[bool]) -> float | None:
    return round(sum(hits) / len(hits), 4) if hits else None
