"""What came out: pictures with everything that made them. Knows PIL and files; runs nothing."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from latentgen.pixels.save import save_image
from latentgen.pixels.sheet import sheet
from latentgen.run.recipe import Recipe, metadata

if TYPE_CHECKING:
    from torch import Tensor

    from latentgen.run.plan import Plan


@dataclass(frozen=True)
class Result:
    """The finished pictures.

    Attributes:
        images: RGB pictures, one per seed.
        plan: every choice that was made.
        notes: what was adjusted, and why; empty when all was done as said.
        timings: seconds by stage ("text", "encode", "sample", "decode", "total").
        recipe: what reproduces the pictures, as plain data (see `latentgen.run.recipe`).
        latents: (batch, c, h, w) float32 on the CPU: the state that was decoded, for another model to go on from (`denoising_end`).
    """

    images: tuple[Image.Image, ...]
    plan: Plan
    notes: tuple[str, ...]
    timings: Mapping[str, float]
    recipe: Mapping[str, Any]
    latents: Tensor = field(repr=False, compare=False)

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.images[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each picture."""
        return self.plan.seeds

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self.images)

    def save(self, path: str | Path, *, quality: int = 95) -> list[Path]:
        """Write the pictures, each whole or not at all, with the recipe inside.

        Args:
            path: ends in .png, .jpg, .jpeg or .webp. For several pictures `-1`, `-2` ... goes before the suffix.
            quality: JPEG and WebP, 1 to 100.

        Returns:
            The files written.

        Raises:
            RequestError: another suffix or quality. OutputError: the folder cannot be written; nothing partial stays.
        """
        target = Path(path)
        several = len(self.images) > 1
        names = [target.parent / f"{target.stem}-{n}{target.suffix}" if several else target for n in range(1, len(self.images) + 1)]
        return [save_image(image, name, metadata=self.metadata(n), quality=quality)
                for n, (image, name) in enumerate(zip(self.images, names, strict=True))]

    def metadata(self, n: int) -> dict[str, str]:
        """What the file of picture n (from 0) says of how it was made."""
        variations = self.plan.noise.variations
        cells = Recipe(self.recipe).cells
        return metadata(cells[n].data if cells else self.recipe, self.seeds[n], self.images[n], variation_seed=variations[n] if variations else None)

    def grid(self, columns: int | None = None) -> Image.Image:
        """All pictures on one white sheet, `columns` wide (by default near a square).

        Raises:
            RequestError: columns is not a whole number of 1 or more.
        """
        columns = max(1, round(len(self.images) ** 0.5)) if columns is None else columns
        return sheet(self.images, columns=columns, tile=None)

    def _repr_html_(self) -> str:
        seconds = ", ".join(f"{stage} {took:.2f} s" for stage, took in self.timings.items())
        details = f"{self.plan}\ntimings   {seconds}" + "".join(f"\nnote      {n}" for n in self.notes if n not in self.plan.notes)
        return shown_html(self.images, [f"seed {seed}" for seed in self.seeds], f"{self.plan.request.prompt}\n{details}", self.recipe)

    def __repr__(self) -> str:
        width, height = self.image.size
        return f"<Result: {len(self.images)} picture(s) {width}x{height}, seeds {list(self.seeds)}, {self.timings.get('total', 0):.2f} s>"


def shown_html(images: Sequence[Image.Image], titles: Sequence[str], about: str, recipe: Mapping[str, Any]) -> str:
    """Pictures for a notebook, under them what they are (the first line is seen, the rest unfolds) and their recipe.

    Args:
        titles: of each picture, seen when the mouse rests on it.
    """
    pictures = "".join(f'<img src="data:image/png;base64,{_png(image)}" title="{html.escape(title)}" style="margin:2px;max-width:100%">'
                       for image, title in zip(images, titles, strict=True))
    first, _, rest = about.partition("\n")
    text = json.dumps(dict(recipe), ensure_ascii=False, indent=1, default=str)
    return (f"{pictures}<details><summary>{html.escape(first)}</summary><pre>{html.escape(rest)}</pre></details>"
            f"<details><summary>recipe</summary><pre>{html.escape(text)}</pre></details>")


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
