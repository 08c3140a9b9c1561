"""Masks: which pixels are repainted. Knows pictures of equal size; no latent, model or request.

White (1) is repainted, black (0) is kept, greys blend. A mask that is all black or all white is valid: what to do with it is the caller's choice.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from latentgen.errors import ImageError, RequestError
from latentgen.pixels.image import extended, open_image
from latentgen.pixels.source import DEEP_MODES, MAX_PIXELS, Picture, check_size, deep_grey, read_source

_GREY_TOLERANCE = 8  # how far apart R, G and B may be in what still counts as grey (lossy files)


def open_mask(source: Picture, size: tuple[int, int], *, name: str = "mask", fit: str | None = None, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Any picture as a mask for an image of `size`.

    Colours count by their brightness. Float arrays keep their precision. Transparency that does not vary is ignored; where it varies, the mask is
    what one sees over black (white paint on a clear layer repaints what is painted). Dark or coloured paint on a clear layer is refused:
    there alone the alpha would speak, and programs disagree on whether clear means keep or repaint.

    Args:
        source: see `read_source`; tensors may be (H, W), (1, H, W) or (1, 1, H, W).
        size: (width, height) of the image that the mask belongs to.
        fit: None refuses another size; "resize" stretches the mask (nearest for a mask of pure 0 and 1, else bilinear).

    Returns:
        Tensor (1, 1, H, W), float32 in [0, 1]; 1 = repaint.

    Raises:
        ImageError: it cannot be read, has another size, or does not say clearly what is to be repainted.
        RequestError: an unknown `fit`.
    """
    if fit not in (None, "resize"):
        raise RequestError(f"fit is {fit!r}: expected None or 'resize'")
    pixels = read_source(source, name=name, max_pixels=max_pixels)
    if isinstance(pixels, np.ndarray) and pixels.dtype == np.float32 and pixels.shape[2] == 1:
        values = pixels[..., 0]
    elif isinstance(pixels, Image.Image) and pixels.mode in DEEP_MODES:
        values = deep_grey(pixels, name)
    else:
        values = _brightness(pixels, name)
    if 0 < values.max() <= 1.001 / 255:
        raise ImageError(f"{name} is nearly black (its brightest value is 1 of 255): expected white where to repaint, so multiply a 0/1 mask by 255")
    height, width = values.shape
    if (width, height) != tuple(size):
        if fit is None:
            raise ImageError(f"{name} is {width}x{height} but the image is {size[0]}x{size[1]}: resize the {name}, or pass fit='resize'")
        hard = bool(((values == 0) | (values == 1)).all())
        method = Image.Resampling.NEAREST if hard else Image.Resampling.BILINEAR
        values = np.clip(np.asarray(Image.fromarray(values).resize(tuple(size), method)), 0, 1)
    return torch.from_numpy(np.array(values, dtype=np.float32))[None, None]


def canvas(image: Image.Image, *, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0, multiple: int = 8,
           feather: int = 0) -> tuple[Image.Image, Image.Image]:
    """A larger canvas to paint on around an image (outpainting).

    Both sides are rounded up to `multiple`, with what that takes added at the right and the bottom as more new area, so
    `crop((0, 0, image.width + left + right, image.height + top + bottom))` of the result is exactly what was asked.

    Args:
        image: the picture to keep.
        left, right, top, bottom: pixels to add, 0 or more.
        multiple: the canvas' sides become multiples of this (`LatentSpec.multiple`).
        feather: pixels inside the old picture, next to a side that grew, over which the mask falls linearly from white to black.

    Returns:
        (the canvas, RGB, new area filled by repeating the edge; the mask, L, 255 where new, 0 where kept).

    Raises:
        ImageError: an argument is not a whole number of its range, or the canvas is past the pixel limit.
    """
    for key, value in {"left": left, "right": right, "top": top, "bottom": bottom, "feather": feather, "multiple": multiple}.items():
        least = 1 if key == "multiple" else 0
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ImageError(f"{key} is {value!r}: expected a whole number of pixels, {least} or more")
    image = _as_rgb(image, "image")
    right += -(image.width + left + right) % multiple
    bottom += -(image.height + top + bottom) % multiple
    check_size(image.width + left + right, image.height + top + bottom, name="the canvas")
    across, down = _new_area(image.width, left, right, feather), _new_area(image.height, top, bottom, feather)
    mask = np.maximum(across[None, :], down[:, None])
    return extended(image, left=left, right=right, top=top, bottom=bottom), Image.fromarray(np.rint(mask * 255).astype(np.uint8))


def paste_back(original: Image.Image, made: Image.Image, mask: Picture) -> Image.Image:
    """The made picture where the mask is 1, the original byte for byte where it is 0, a linear blend between.

    Args:
        original, made: pictures of one size; `original` is what `open_image` or `canvas` gave.
        mask: as for `open_mask`, of the same size.

    Raises:
        ImageError: the sizes differ.
    """
    if original.size != made.size:
        raise ImageError(f"the made picture is {made.width}x{made.height} but the original is {original.width}x{original.height}: resize one of them")
    weight = open_mask(mask, original.size)[0, 0, :, :, None].numpy()
    kept, new = (np.asarray(_as_rgb(picture, key), dtype=np.float32) for picture, key in ((original, "original"), (made, "made")))
    return Image.fromarray(np.rint(kept + weight * (new - kept)).astype(np.uint8))


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    return image if isinstance(image, Image.Image) and image.mode == "RGB" else open_image(image, name=name)


def _new_area(inner: int, before: int, after: int, feather: int) -> np.ndarray:
    """One axis of the canvas' mask: 1 in the `before` and `after` new pixels, and the ramp down into the inner ones. Float (before+inner+after,)."""
    distance = np.arange(inner, dtype=np.float64)
    ramps = [np.zeros(inner)]
    if before:
        ramps.append(1 - (distance + 1) / (feather + 1))
    if after:
        ramps.append(1 - (inner - distance) / (feather + 1))
    return np.concatenate([np.ones(before), np.clip(np.max(ramps, axis=0), 0, 1), np.ones(after)])


def _brightness(pixels: Image.Image | np.ndarray, name: str) -> np.ndarray:
    """Brightness (H, W), float32 in 0..1, of 8-bit pictures and of float colour arrays, seen over black where transparency varies."""
    if isinstance(pixels, np.ndarray):
        values = pixels if pixels.dtype == np.uint8 else np.rint(pixels * 255).astype(np.uint8)
        pixels = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
    if pixels.has_transparency_data:
        rgba = np.asarray((pixels.convert("LA") if pixels.mode == "La" else pixels).convert("RGBA"))
        colours, alpha = rgba[..., :3], rgba[..., 3]
        if alpha.min() != alpha.max():
            return _over_black(colours, alpha, name)
        pixels = Image.fromarray(np.ascontiguousarray(colours))
    grey = pixels if pixels.mode in ("1", "L") else pixels.convert("RGB")
    return np.asarray(grey.convert("L"), dtype=np.float32) / 255


def _over_black(colours: np.ndarray, alpha: np.ndarray, name: str) -> np.ndarray:
    """Grey (H, W), float32 in 0..1, of colours (H, W, 3) with alpha (H, W), both uint8, as seen over black."""
    visible = colours[alpha > 0].astype(np.int16)
    if visible.max() < 128 or int(np.ptp(visible, axis=1).max()) > _GREY_TOLERANCE:
        raise ImageError(f"{name} has dark or coloured paint on a transparent layer, which does not say what to repaint: "
                         "expected white where to repaint and black elsewhere, so save it without transparency")
    return (colours.mean(axis=2) * alpha / 65025).astype(np.float32)
