"""Pictures as they are given (file, bytes, PIL, array, tensor) to loaded, checked pixels. Knows formats and EXIF; no RGB, mask or model.

A picture from outside is untrusted: its size is read from the header and checked before anything is decoded, only formats that
Pillow decodes by itself are opened (no PostScript), and whatever a damaged file makes a decoder raise becomes one ImageError.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from latentgen.errors import ImageError

Picture = Image.Image | str | Path | bytes | np.ndarray | torch.Tensor
MAX_PIXELS = 64 * 2**20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")  # JPEG opens MPO too
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_HALF_BYTE = 0.5 / 255  # floats this far outside 0..1 still round to the same byte: resampling leaves such values


def read_source(source: Picture, *, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image | np.ndarray:
    """Load a picture from wherever it is.

    Args:
        source: PIL image of any mode; path; encoded bytes; numpy array (H, W), (H, W, C); torch tensor (H, W), (C, H, W), (1, C, H, W).
            C is 1, 3 or 4. Arrays and tensors are uint8 (0..255), bool, or float (0..1). Of an animation, the current (first) frame.
        name: the argument's name, for messages.
        max_pixels: most pixels accepted; checked before decoding. Pillow's own limit (PIL.Image.MAX_IMAGE_PIXELS) holds as well.

    Returns:
        A loaded PIL image of any mode, turned as EXIF says (never the caller's own object), or an array (H, W, C), uint8 in 0..255 or float32
        in 0..1.

    Raises:
        ImageError: not a picture, damaged, too big, empty, or of a wrong shape, type or range.
    """
    if isinstance(source, torch.Tensor):
        return _checked_array(_channels_last(source, name), name, max_pixels)
    if isinstance(source, np.ndarray):
        return _checked_array(source, name, max_pixels)
    if isinstance(source, Image.Image):
        return _loaded(source, name, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decoded(io.BytesIO(source), "bytes", name, max_pixels)
    if isinstance(source, (str, Path)):
        return _read_file(source, name, max_pixels)
    raise ImageError(f"{name} is a {type(source).__name__}: expected a PIL image, a path, encoded bytes, a numpy array or a torch tensor")


def deep_grey(image: Image.Image, name: str) -> np.ndarray:
    """Brightness (H, W), float32 in 0..1, of a picture with more than 8 bits per pixel (scaled, where Pillow's convert would clip).

    I;16 is 0..65535. The other two modes do not say what white is, so the range decides. I: 0..255 if no value is above 255, else 0..65535.
    F: 0..1 if every value is within that, else 0..255.

    Raises:
        ImageError: a value is NaN, infinite, negative or above the range.
    """
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        white = 65535.0
    elif image.mode == "I":
        white = 255.0 if high <= 255 else 65535.0
    else:
        white = 1.0 if high <= 1 + _HALF_BYTE else 255.0
    if not (np.isfinite(values).all() and low >= -_HALF_BYTE * white and high <= (1 + _HALF_BYTE) * white):
        expected = "0..1 or 0..255" if image.mode == "F" else "0..255 or 0..65535"
        raise ImageError(f"{name} has mode {image.mode} and values from {low:g} to {high:g}: expected {expected}, so scale it first")
    return np.clip(values / white, 0, 1).astype(np.float32)


@cache
def known_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow has (AVIF came late); Pillow's `open` fails on a name it does not know."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def check_size(width: int, height: int, *, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse an empty or an oversized picture.

    Raises:
        ImageError: a side is zero, or width * height is above max_pixels.
    """
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height}, which has no pixels: expected at least 1x1")
    if width * height > max_pixels:
        raise ImageError(f"{name} is {width}x{height}, over the limit of {max_pixels} pixels: make it smaller")


def _read_file(source: str | Path, name: str, max_pixels: int) -> Image.Image:
    shown = repr(str(source))
    if str(source).startswith(("http://", "https://", "data:")):
        raise ImageError(f"{name} is the web address {shown[:80]}: expected a path or bytes, so download it first")
    try:
        if not Path(source).is_file():  # a folder, a device and a pipe have no picture to read to the end
            raise ImageError(f"{name} is the path {shown}, where there is no file: check the path")
        with Path(source).open("rb") as file:
            return _decoded(file, f"file {shown}", name, max_pixels)
    except OSError as error:
        raise ImageError(f"{name} is the path {shown}, which cannot be read ({error.strerror or error}): check the path") from error


def _decoded(file: io.BufferedIOBase, shown: str, name: str, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(file, formats=known_formats())
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} ({shown}) is not a picture that can be read: expected {', '.join(known_formats())}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} ({shown}) is over Pillow's limit for pixels ({error}): make it smaller") from error
    except Exception as error:  # a decoder fed damaged bytes raises nearly anything (struct.error, SyntaxError, IndexError ...)
        raise _damaged(name, shown, error) from error
    with image:
        return _loaded(image, name, max_pixels, shown)


def _loaded(image: Image.Image, name: str, max_pixels: int, shown: str = "PIL image") -> Image.Image:
    check_size(*image.size, name=name, max_pixels=max_pixels)
    try:
        image.load()
    except Exception as error:  # as in _decoded: the decoder runs here
        raise _damaged(name, shown, error) from error
    check_size(*image.size, name=name, max_pixels=max_pixels)
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF: the pixels are sound and nothing says how to turn them
        return image.copy()


def _damaged(name: str, shown: str, error: Exception) -> ImageError:
    return ImageError(f"{name} ({shown}) is damaged or cut short ({error}): expected a whole picture, so save or fetch it again")


def _channels_last(tensor: torch.Tensor, name: str) -> np.ndarray:
    """(H, W), (C, H, W) or (1, C, H, W) -> array (H, W, C), on the CPU."""
    shape = tuple(tensor.shape)
    if tensor.ndim == 4 and shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        raise ImageError(f"{name} is a torch tensor of shape {shape}: expected (3, H, W), channels first, with 1, 3 or 4 channels and one picture")
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()  # numpy has no bfloat16
    return tensor.permute(1, 2, 0).numpy()


def _checked_array(array: np.ndarray, name: str, max_pixels: int) -> np.ndarray:
    """An array (H, W) or (H, W, C) -> (H, W, C), uint8, or float32 in 0..1."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ImageError(f"{name} is an array of shape {array.shape}: expected (H, W, 3), channels last, with 1, 3 or 4 channels and one picture")
    check_size(array.shape[1], array.shape[0], name=name, max_pixels=max_pixels)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind != "f":
        raise ImageError(f"{name} holds {array.dtype} values: expected uint8 in 0..255 or floats in 0..1, so convert it")
    if not np.isfinite(array).all():
        raise ImageError(f"{name} holds NaN or infinity: expected floats in 0..1")
    low, high = float(array.min()), float(array.max())
    if low < -_HALF_BYTE or high > 1 + _HALF_BYTE:
        raise ImageError(f"{name} holds {array.dtype} values from {low:g} to {high:g}: expected 0..1, so scale them, or pass uint8 in 0..255")
    return np.clip(array, 0, 1).astype(np.float32)
