"""Synthetic recolours: a single-hue object, its hue turned to another colour ("blue apple"). Knows arrays; trains nothing.

Hue arithmetic follows `colorsys` (checked in the tests): hue in [0, 1), 0 red, 1/3 green, 2/3 blue.
"""

from __future__ import annotations

import re

import numpy as np

HUES: dict[str, float] = {"red": 0.0, "orange": 0.075, "yellow": 0.14, "green": 0.34, "teal": 0.49, "blue": 0.6, "purple": 0.76, "pink": 0.91}
COLOUR_WORDS = re.compile(r"\b(red|orange|yellow|green|teal|blue|purple|pink|brown|black|white|gr[ae]y|gold(en)?|silver|rainbow|colou?r\w*)\b")


def rgb_to_hsv(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) floats in [0, 1] -> hue, saturation, value in [0, 1]."""
    top, low = rgb.max(-1), rgb.min(-1)
    spread = top - low
    safe = np.where(spread > 0, spread, 1)
    r, g, b = np.moveaxis(rgb, -1, 0)
    hue = np.where(top == r, (g - b) / safe, np.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe)) / 6
    return np.stack([np.where(spread > 0, hue % 1, 0), np.where(top > 0, spread / np.where(top > 0, top, 1), 0), top], -1)


def hsv_to_rgb(hsv: np.ndarray) -> np.ndarray:
    """The inverse of `rgb_to_hsv`."""
    h, s, v = np.moveaxis(hsv, -1, 0)
    sector = (h * 6)[..., None] + np.array([5.0, 3.0, 1.0])
    k = sector % 6
    return v[..., None] - (v * s)[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1)


def main_hue(rgba: np.ndarray) -> float | None:
    """The one hue of a picture ((H, W, 4) premultiplied uint8), or None where it has none or several.

    "One hue" means: of all coloured weight (alpha x saturation x value), 85 % lies within 1/12 of a turn of the mean hue, and coloured pixels
    are at least 40 % of the drawn ones.
    """
    alpha = rgba[..., 3].astype(np.float32) / 255
    drawn = alpha > 0.5
    if drawn.sum() < 200:
        return None
    hsv = rgb_to_hsv(np.clip(rgba[drawn][:, :3] / rgba[drawn][:, 3:], 0, 1).astype(np.float32))
    coloured = (hsv[:, 1] > 0.25) & (hsv[:, 2] > 0.2)
    if coloured.mean() < 0.4:
        return None
    weight = hsv[coloured, 1] * hsv[coloured, 2]
    angle = hsv[coloured, 0] * 2 * np.pi
    mean = np.arctan2((weight * np.sin(angle)).sum(), (weight * np.cos(angle)).sum()) / (2 * np.pi) % 1
    near = np.abs((hsv[coloured, 0] - mean + 0.5) % 1 - 0.5) < 1 / 12
    return float(mean) if weight[near].sum() > 0.85 * weight.sum() else None


def recolour(rgba: np.ndarray, source_hue: float, colour: str) -> np.ndarray:
    """Turn the hue of a premultiplied picture from `source_hue` to the named colour; greys stay grey.

    Light colours (orange, yellow) are also brought to a light value, pink to a softer saturation, since the words mean that too.
    """
    alpha = rgba[..., 3:].astype(np.float32) / 255
    hsv = rgb_to_hsv(np.clip(rgba[..., :3] / np.maximum(rgba[..., 3:], 1), 0, 1).astype(np.float32))
    hue, saturation, value = np.moveaxis(hsv, -1, 0)
    inked = (alpha[..., 0] > 0.5) & (saturation > 0.25)
    level = float(np.median(value[inked])) if inked.any() else 1.0
    coloured = np.clip(saturation / 0.2, 0, 1)
    wanted = {"yellow": 0.96, "orange": 0.95, "pink": 0.95, "red": 0.85}.get(colour)
    lift = max(1.0, wanted / max(level, 0.2)) if wanted else 1.0
    value = np.clip(value * (1 + (lift - 1) * coloured), 0, 1)
    if colour == "pink":
        saturation = saturation * 0.62
    elif colour in ("red", "orange", "yellow"):
        saturation = np.clip(saturation * (1 + 0.25 * coloured), 0, 1)
    rgb = hsv_to_rgb(np.stack([(hue - source_hue + HUES[colour]) % 1, saturation, value], -1))
    return np.concatenate([np.rint(np.clip(rgb, 0, 1) * alpha * 255), rgba[..., 3:]], -1).astype(np.uint8)
