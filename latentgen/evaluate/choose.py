"""What to draw and what to measure on: a seeded, repeatable choice from a training set's index. Knows icons and names; no pixels, no model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentgen.errors import ModelError
from latentgen.evaluate.colour import named_colour
from latentgen.train.captions import Icon

HELD_OUT = ("comp", "style", "concept", "tone")


def read_held_out(folder: Path) -> dict[str, Any]:
    """The splits that the model's training left out.

    Raises:
        ModelError: the model folder has no readable held-out.json.
    """
    try:
        return json.loads((folder / "held-out.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        why = f"{folder.name}/held-out.json cannot be read ({type(error).__name__})"
        raise ModelError(f"{why}: it names the pictures that training left out and comes with the model, so get the folder again") from error


def is_base(icon: Icon) -> bool:
    """A drawing under its own name: no recolour and no skin tone."""
    return not icon.id.startswith("recolour/") and "skin tone" not in icon.name


def concepts(icons: Sequence[Icon], count: int, seed: int) -> list[int]:
    """Rows of `count` training drawings, each of another name that has four or more training drawings; all of them where there are fewer."""
    by_name: dict[str, list[int]] = {}
    for row, icon in enumerate(icons):
        if icon.split == "train" and is_base(icon):
            by_name.setdefault(icon.name.lower(), []).append(row)
    dice = random.Random(f"concepts {seed}")
    names = sorted(name for name, rows in by_name.items() if len(rows) >= 4)
    return [dice.choice(by_name[name]) for name in dice.sample(names, min(count, len(names)))]


def candidates(icons: Sequence[Icon], *, at_least: int = 3) -> dict[str, list[int]]:
    """Lower-case base name -> its rows, of every split: what a picture of one concept may be taken for."""
    by_name: dict[str, list[int]] = {}
    for row, icon in enumerate(icons):
        if is_base(icon):
            by_name.setdefault(icon.name.lower(), []).append(row)
    return {name: rows for name, rows in sorted(by_name.items()) if len(rows) >= at_least}


def held_out_rows(icons: Sequence[Icon], count: int, seed: int) -> dict[str, list[int]]:
    """Up to `count` rows of each held-out split."""
    dice = random.Random(f"held out {seed}")
    rows = {split: [row for row, icon in enumerate(icons) if icon.split == split and not icon.id.startswith("recolour/")] for split in HELD_OUT}
    return {split: sorted(dice.sample(found, min(count, len(found)))) for split, found in rows.items()}


def coloured_names(held_out: dict[str, Any], count: int, seed: int) -> list[str]:
    """`count` captions such as "blue anchor" that no training recolour has."""
    names = [name for name in held_out["recolor_heldout"] if named_colour(name)]
    return random.Random(f"recolour {seed}").sample(names, min(count, len(names)))


def coloured_drawings(icons: Sequence[Icon], *, each: int = 4) -> list[int]:
    """Rows of held-out compositions that open with a colour ("blue heart"), up to `each` styles a name, in the set's order."""
    taken: dict[str, set[str]] = {}
    rows = []
    for row, icon in enumerate(icons):
        styles = taken.setdefault(icon.name.lower(), set())
        if icon.split == "comp" and is_base(icon) and named_colour(icon.name) and icon.style not in styles and len(styles) < each:
            styles.add(icon.style)
            rows.append(row)
    return rows


def training_recolours(icons: Sequence[Icon], count: int, seed: int) -> list[int]:
    """Rows of recolours that training saw: what the colour measure says of pictures known to have the colour."""
    rows = [row for row, icon in enumerate(icons) if icon.id.startswith("recolour/") and icon.split == "train"]
    return random.Random(f"training recolours {seed}").sample(rows, min(count, len(rows)))


def prompt_of(icon: Icon) -> str:
    """The caption with its style, as in training."""
    return f"{icon.name}, {icon.style}"
