"""glyph's training set on disk: built by `build`, read by `PictureSetReader`. Knows icons and files; no model.

A set is a folder: `pictures-<size>.npy` (uint8, (N, size, size, 4), premultiplied RGBA, memory-mapped) and `index.jsonl`, one line per row.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from latentgen.errors import TrainingError
from latentgen.train.captions import HeldOut, Icon, icons
from latentgen.train.draw import draw
from latentgen.train.recolour import COLOUR_WORDS, HUES, main_hue, recolour
from latentgen.train.sources import fetch

RECOLOUR_SETS = ("fluent-emoji-flat", "twemoji", "noto", "fluent-emoji", "fluent-3d")
RECOLOUR_GROUPS = ("animal", "plant", "food", "drink", "dishware", "transport-ground", "transport-water", "transport-air", "sport", "game",
                   "clothing", "music", "phone", "computer", "light-video", "book-paper", "mail", "writing", "office", "lock", "tool",
                   "science", "medical", "household", "other-object", "place-building", "heart", "sound", "time", "place-other")


def build(folder: Path, *, held_out: Path, size: int = 256, processes: int = 2, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """Fetch the packages, draw every icon and make the recolours. Picks up where a stopped run ended; returns `folder`.

    Args:
        folder: where the set goes (about 10 GB at 256 px, sparse where transparent).
        held_out: the model's held-out.json; its pictures are drawn (for evaluation) but never marked "train".
        progress: called with (phase, rows finished now, rows in all).
    """
    tell = progress or (lambda phase, now, total: None)
    tell("fetch", 0, 1)
    modules = fetch(folder / "packages")
    splits = HeldOut.read(held_out)
    listed, bodies = icons(modules, splits)
    out = folder / f"pictures-{size}.npy"
    pixels = draw([bodies[i.id] for i in listed], folder / f"drawn-{size}.npy", size=size, modules=modules, processes=processes,
                  progress=lambda n: tell("draw", n, len(listed)))
    kept, rows = _without_faults(listed, pixels)
    made = list(_recolours(kept, rows, pixels, splits, tell))
    part = out.with_suffix(".part.npy")
    final = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(len(kept) + len(made), size, size, 4))
    for at, row in enumerate(rows):
        final[at] = pixels[row]
    for at, (_, picture) in enumerate(made, start=len(kept)):
        final[at] = picture
    final.flush()
    index = folder / "index.part"
    index.write_text("".join(i.to_json() + "\n" for i in [*kept, *(icon for icon, _ in made)]), "utf-8")
    part.replace(out)
    index.replace(folder / "index.jsonl")
    return folder


def _without_faults(listed: list[Icon], pixels: np.ndarray) -> tuple[list[Icon], list[int]]:
    """Drop blank pictures, white-on-white ones and exact doubles within a set (their names go to the first as keywords)."""
    first: dict[tuple[str, bytes], Icon] = {}
    kept, rows = [], []
    for row, icon in enumerate(listed):
        rgba = np.asarray(pixels[row])
        ink = (255 - rgba[..., 3:].astype(int) + rgba[..., :3]).min(-1) < 235
        if ink.mean() < 0.01:
            continue
        key = (icon.set, rgba[::4, ::4].tobytes())
        if key in first:
            twin = first[key]
            twin.split = icon.split if twin.split == "train" else twin.split  # a held-out double keeps its twin out of training
            twin.keywords = sorted({*twin.keywords, icon.name}) if icon.split == "train" else twin.keywords
            continue
        first[key] = icon
        kept.append(icon)
        rows.append(row)
    return kept, rows


def _recolours(kept: list[Icon], rows: list[int], pixels: np.ndarray, held_out: HeldOut,
               tell: Callable[[str, int, int], None]) -> Iterator[tuple[Icon, np.ndarray]]:
    """Every colour of every plain object that has one hue, each in one style. Held-out pairs are never made."""
    by_name: dict[str, list[tuple[Icon, int]]] = {}
    for icon, row in zip(kept, rows, strict=True):
        if icon.set in RECOLOUR_SETS and icon.split == "train" and icon.subgroup.startswith(RECOLOUR_GROUPS) and not COLOUR_WORDS.search(icon.name):
            by_name.setdefault(icon.name, []).append((icon, row))
    for name, drawings in sorted(by_name.items()):
        tell("recolour", 1, len(by_name))
        hued = [(icon, row, hue) for icon, row in drawings if (hue := main_hue(np.asarray(pixels[row][::2, ::2]))) is not None]
        dice = random.Random(name)
        for colour in HUES if hued else ():
            caption = f"{colour} {name}"
            icon, row, hue = dice.choice(hued)
            unchanged = abs((hue - HUES[colour] + 0.5) % 1 - 0.5) < 0.05
            if unchanged or caption.lower() in held_out.recolours or caption.lower() in held_out.names:
                continue
            new = Icon(f"recolour/{colour}/{icon.id}", icon.set, icon.id, caption, icon.style, subgroup=icon.subgroup)
            yield new, recolour(np.asarray(pixels[row]), hue, colour)


class PictureSetReader:
    """A built set, read row by row.

    Attributes:
        icons: what each row shows.
        pixels: (N, size, size, 4) uint8, premultiplied RGBA, memory-mapped.
    """

    def __init__(self, folder: Path, *, size: int | None = None) -> None:
        """`size`: the one to read where the folder has several; by default the largest."""
        sizes = [int(path.stem[9:]) for path in folder.glob("pictures-*.npy") if path.stem[9:].isdigit()]
        path = folder / f"pictures-{size or max(sizes, default=0)}.npy"
        if not path.exists():
            raise TrainingError(f"no training set in {folder.name!r}: run `latentgen train data --out {folder.name}` first")
        self.pixels: np.ndarray = np.load(path, mmap_mode="r")
        self.icons = [Icon(**json.loads(line)) for line in (folder / "index.jsonl").read_text("utf-8").splitlines()]
        if len(self.icons) != len(self.pixels):
            raise TrainingError(f"the index has {len(self.icons)} lines for {len(self.pixels)} pictures: delete the folder and build it again")

    def rows(self, *splits: str) -> list[int]:
        """Row numbers of the named splits."""
        return [r for r, icon in enumerate(self.icons) if icon.split in splits]

    def on_white(self, rows: Iterable[int], *, background: np.ndarray | None = None) -> np.ndarray:
        """(n, size, size, 3) uint8: the pictures composited on white, or on `background` ((n, 3) uint8)."""
        rgba = self.pixels[np.asarray(list(rows))]
        rest = 255 - rgba[..., 3:].astype(np.uint16)
        under = rest if background is None else rest * background[:, None, None, :].astype(np.uint16) // 255
        return np.minimum(rgba[..., :3] + under, 255).astype(np.uint8)


def caption(icon: Icon, dice: random.Random, *, style_share: float = 0.7, keyword_share: float = 0.15) -> str:
    """A training caption: the name (or, rarely, a keyword with it), then ", style" in `style_share` of the cases."""
    text = icon.name
    if icon.keywords and dice.random() < keyword_share:
        word = dice.choice(icon.keywords)
        text = word if dice.random() < 0.5 else f"{icon.name}, {word}"
    return f"{text}, {icon.style}" if dice.random() < style_share else text
