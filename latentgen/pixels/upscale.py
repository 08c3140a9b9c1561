"""Latents and pictures made larger. Knows tensors, PIL pictures and ways of resizing them; no model, request or plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from latentgen.pixels.image import to_images, to_tensor


@dataclass(frozen=True)
class Upscaler:
    """A way to make a picture larger between two passes.

    Attributes:
        about: one line.
        mode: of `torch.nn.functional.interpolate` for latents; of PIL where `pixels`.
        pixels: it works on the decoded picture, which is then encoded again, and not on latents.
        strength: share of the levels that the second pass runs where nothing else was said: what is made of latents needs more to be sharp.
    """

    about: str
    mode: str
    pixels: bool = False
    strength: float = 0.6


UPSCALERS = {
    "latent": Upscaler("latents, linearly between neighbours (ComfyUI's bilinear, A1111's Latent)", "bilinear"),
    "latent_bicubic": Upscaler("latents, by cubic curves through neighbours", "bicubic"),
    "latent_nearest": Upscaler("latents, each repeated", "nearest-exact"),
    "lanczos": Upscaler("the decoded picture, by Lanczos' filter, encoded again", "LANCZOS", True, 0.45),
    "nearest": Upscaler("the decoded picture, each pixel repeated, encoded again", "NEAREST", True, 0.45),
}


def larger_latents(z: Tensor, size: tuple[int, int], *, mode: str, wrap: Sequence[int] = ()) -> Tensor:
    """Latents z (B, c, h, w) of size (h', w').

    Args:
        mode: see `Upscaler`.
        wrap: the axes (2 rows, 3 columns) along which opposite edges meet.
    """
    times = [3 if axis in wrap else 1 for axis in (2, 3)]
    wide = [side * n for side, n in zip(size, times, strict=True)]
    corners = {} if mode.startswith("nearest") else {"align_corners": False}
    out = torch.nn.functional.interpolate(z.tile(1, 1, *times), size=wide, mode=mode, **corners)
    down, across = (side if n == 3 else 0 for side, n in zip(size, times, strict=True))
    return out[..., down:down + size[0], across:across + size[1]].contiguous()


def larger_pixels(pixels: Tensor, size: tuple[int, int], *, mode: str, wrap: Sequence[int] = ()) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] of size (H', W'), by way of 8-bit pictures, as if each had been saved and opened.

    Args:
        mode: see `Upscaler`.
        wrap: the axes (2 rows, 3 columns) along which opposite edges meet.
    """
    times = [3 if axis in wrap else 1 for axis in (2, 3)]
    height, width = size
    box = ((times[1] // 2) * width, (times[0] // 2) * height)
    made = []
    for image in to_images(pixels.tile(1, 1, *times)):
        wide = image.resize((width * times[1], height * times[0]), Image.Resampling[mode])
        made.append(to_tensor(wide.crop((*box, box[0] + width, box[1] + height))))
    return torch.cat(made)
