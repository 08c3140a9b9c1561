"""Pictures to RGB, tensors and sizes. Knows colour modes and shapes; no mask, latent, model or request.

A picture is a PIL RGB image outside the networks and a float32 tensor (B, 3, H, W) in [-1, 1] beside them.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps

from latentgen.errors import ImageError, NotFiniteError, RequestError
from latentgen.pixels.source import DEEP_MODES, MAX_PIXELS, Picture, check_size, deep_grey, read_source

FITS = ("exact", "resize", "crop", "pad")


def open_image(source: Picture, *, name: str = "image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Any picture as an RGB image, looking as a viewer shows it on a white page.

    EXIF turns are applied, transparency (alpha channel, palette or colour key) is composited on white, more than 8 bits are scaled (see
    `deep_grey` for I and F), an embedded colour profile is converted to sRGB, and metadata is dropped.

    Args:
        source: see `Picture` and `read_source`: PIL image, path, encoded bytes, array (H, W, C) uint8 or 0..1, tensor (C, H, W) 0..1.
        name: the argument's name, for messages.
        max_pixels: most pixels accepted; checked before decoding.

    Returns:
        PIL image of mode RGB, never the caller's own object.

    Raises:
        ImageError: it cannot be read or is not one picture; the message names the argument and the cure.
    """
    pixels = read_source(source, name=name, max_pixels=max_pixels)
    if isinstance(pixels, np.ndarray):
        values = pixels if pixels.dtype == np.uint8 else np.rint(pixels * 255).astype(np.uint8)
        pixels = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
    try:
        image = _rgb(pixels, name)
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name} has mode {pixels.mode}, which cannot be converted ({error}): expected RGB, so convert it first") from error
    image.info = {}
    return image


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as a tensor (1, 3, H, W), float32 in [-1, 1]."""
    values = torch.from_numpy(np.array(image.convert("RGB")))
    return (values.permute(2, 0, 1)[None].float() / 127.5 - 1).contiguous()


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Pixels (B, 3, H, W) in [-1, 1] as B RGB images: rounded to the nearest byte, clamped.

    Raises:
        ImageError: another shape.
        NotFiniteError: NaN or infinity among the pixels, which no byte stands for.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ImageError(f"pixels have shape {tuple(pixels.shape)}: expected (B, 3, H, W)")
    if not bool(torch.isfinite(pixels).all()):
        raise NotFiniteError("pixels hold NaN or infinity: expected values in [-1, 1], so decode again in float32")
    values = ((pixels.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(picture) for picture in values.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def fit_to(image: Image.Image, width: int, height: int, *, how: str, name: str = "image") -> Image.Image:
    """Bring an image (RGB or L) to width x height pixels.

    Args:
        how: "exact" refuses another size; "resize" stretches; "crop" scales to cover and cuts the rest off evenly; "pad" scales to fit inside
            and repeats the edge pixels around it. Scaling is Lanczos. An image of the right size comes back as it is.

    Raises:
        ImageError: how is "exact" and the size differs, or a side is below 1.
        RequestError: an unknown `how`.
    """
    if how not in FITS:
        raise RequestError(f"how is {how!r}: expected one of {', '.join(FITS)}")
    check_size(width, height, name=f"the size asked for {name}")
    if image.size == (width, height):
        return image
    if how == "exact":
        raise ImageError(f"{name} is {image.width}x{image.height} but {width}x{height} is needed: resize it, or fit it by resize, crop or pad")
    if how == "resize":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    if how == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    scale = min(width / image.width, height / image.height)
    inner = (min(width, max(1, round(image.width * scale))), min(height, max(1, round(image.height * scale))))
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    small = image.resize(inner, Image.Resampling.LANCZOS)
    return extended(small, left=left, right=width - inner[0] - left, top=top, bottom=height - inner[1] - top)


def extended(image: Image.Image, *, left: int, right: int, top: int, bottom: int) -> Image.Image:
    """The image (RGB or L) with that many pixels more on each side, each a repeat of the nearest edge pixel."""
    values = np.asarray(image)
    sides = ((top, bottom), (left, right)) + ((0, 0),) * (values.ndim - 2)
    return Image.fromarray(np.pad(values, sides, mode="edge"))


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in DEEP_MODES:
        grey = Image.fromarray(np.rint(deep_grey(image, name) * 255).astype(np.uint8))
        key = image.info.get("transparency")
        if isinstance(key, int):
            grey.paste(255, mask=Image.fromarray(np.asarray(image) == key))
        return grey.convert("RGB")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = _to_srgb(image, profile, "RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode in ("P", "RGBX"):
        image = image.convert("RGB")
    return _to_srgb(image, profile, "RGB").convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None, mode: str) -> Image.Image:
    """Convert by the embedded profile (a phone's Display P3, a printer's CMYK); as it is when there is none, it is sRGB, or it is unusable."""
    if not profile:
        return image
    from PIL import ImageCms  # imported here: few pictures carry a profile, and Pillow can be built without it

    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in (ImageCms.getProfileDescription(given) or "").lower():
            return image
        return ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode=mode) or image
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError):
        return image
