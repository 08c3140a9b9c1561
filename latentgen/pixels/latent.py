"""Pixels to latents and back, whole or in tiles. Knows an autoencoder's call and a LatentSpec; no prompt, family, device policy or request.

Raw latents are what the autoencoder gives and takes; native latents (z0, x0) are what the denoiser sees: z0 = (raw - shift) * scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from latentgen.diffusion.tiles import Span, Window, spans
from latentgen.errors import ModelError, NotFiniteError, RequestError
from latentgen.pixels.image import to_images

WRAPPED = 8  # latents beyond each edge that an autoencoder is shown of a picture whose edges meet


class Autoencoder(Protocol):
    """What diffusers' AutoencoderKL and AutoencoderTiny have in common."""

    def encode(self, x: Tensor) -> Any: ...

    def decode(self, z: Tensor) -> Any: ...


@dataclass(frozen=True)
class LatentSpec:
    """How a family's latents are laid out.

    Attributes:
        channels: latent channels.
        factor: pixels per latent along each side.
        scale, shift: native = (raw - shift) * scale (Rombach et al. 2022, section 4.3.2 for the scale).
        multiple: the picture's sides must be multiples of this (at least `factor`; more where the denoiser cuts patches).
        rgb: `channels` rows of (R, G, B): native latent to RGB in [-1, 1], for previews; None if not known.
        rgb_bias: added after `rgb`.
    """

    channels: int = 4
    factor: int = 8
    scale: float = 1.0
    shift: float = 0.0
    multiple: int = 8
    rgb: tuple[tuple[float, float, float], ...] | None = None
    rgb_bias: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if self.scale == 0 or not math.isfinite(self.scale) or min(self.channels, self.factor, self.multiple) < 1:
            raise ModelError(f"{self}: expected a scale that is not 0 and channels, factor and multiple of 1 or more")
        if self.rgb is not None and (len(self.rgb) != self.channels or any(len(row) != 3 for row in self.rgb)):
            raise ModelError(f"the latent's preview matrix has {len(self.rgb)} rows: expected {self.channels} rows of 3")

    def shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, h, w) of the latent of a picture of width x height pixels.

        Raises:
            RequestError: a side is not a positive multiple of what the family needs.
        """
        step = math.lcm(self.multiple, self.factor)
        for name, side in (("width", width), ("height", height)):
            if side < 1 or side % step:
                below = side // step * step
                cure = f"use {below} or {below + step}" if below >= step else f"use {step}"
                raise RequestError(f"{name} is {side}: expected a multiple of {step}, so {cure}")
        return self.channels, height // self.factor, width // self.factor

    def to_model(self, raw: Tensor) -> Tensor:
        """Raw latents of the autoencoder -> native latents of the denoiser; any shape."""
        return (raw - self.shift) * self.scale

    def to_raw(self, z: Tensor) -> Tensor:
        """Native latents of the denoiser -> raw latents of the autoencoder; any shape."""
        return z / self.scale + self.shift


@torch.no_grad()
def encode(vae: Autoencoder, pixels: Tensor, spec: LatentSpec, *, tile: int | None = None, overlap: int | None = None,
           wrap: tuple[int, ...] = (), call: Callable[[Any, Tensor], Tensor] | None = None) -> Tensor:
    """Pixels to native latents. Of a variational autoencoder, the mean: a picture has one latent, without a draw.

    Args:
        vae: AutoencoderKL, AutoencoderTiny or alike; runs in its own dtype and on its own device.
        pixels: (B, 3, H, W) in [-1, 1], sides multiples of `spec.factor`.
        tile: side of a tile in pixels, None for the whole picture at once.
        overlap: pixels that neighbouring tiles share at least; None for a quarter of a tile.
        wrap: the axes (2 rows, 3 columns) along which opposite edges meet; exact as far as the encoder reaches no further than 8 latents.
        call: (vae, pixels) -> raw latents, where a family packs them or takes them from elsewhere than the plain call gives them.

    Returns:
        z0 (B, c, H/factor, W/factor), float32, on the module's device.

    Raises:
        RequestError: a bad shape, tile or overlap.
        ModelError: the module's latents are not as the spec says.
        NotFiniteError: NaN or infinity; in float32 it may succeed.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % spec.factor or pixels.shape[3] % spec.factor or not pixels.numel():
        raise RequestError(f"pixels have shape {tuple(pixels.shape)}: expected (B, 3, H, W) with H and W multiples of {spec.factor}")
    module = getattr(vae, "encoder", vae)

    def whole(x: Tensor) -> Tensor:
        raw = _raw_latents(vae, _cast(x, module)) if call is None else call(vae, _cast(x, module))
        _check_shape(raw, (len(x), spec.channels, x.shape[2] // spec.factor, x.shape[3] // spec.factor), "encoder")
        return raw.float()

    tiled = partial(_tiled, whole, unit=spec.factor, scale=1, tiles=_tiles(tile, overlap, spec))
    raw = _wrapped(tiled, pixels, unit=spec.factor, scale=1, axes=wrap)
    _check_finite(raw, pixels, module, what="encoder", given="picture")
    return spec.to_model(raw)


def _raw_latents(vae: Autoencoder, pixels: Tensor) -> Tensor:
    out = vae.encode(pixels)
    return out.latent_dist.mean if hasattr(out, "latent_dist") else out.latents


@torch.no_grad()
def decode(vae: Autoencoder, z: Tensor, spec: LatentSpec, *, tile: int | None = None, overlap: int | None = None,
           wrap: tuple[int, ...] = (), call: Callable[[Any, Tensor], Tensor] | None = None) -> Tensor:
    """Native latents to pixels.

    Args:
        vae: as for `encode`.
        z: (B, c, h, w), native latents.
        tile: side of a tile in pixels, None for the whole picture at once.
        overlap: pixels that neighbouring tiles share at least; None for a quarter of a tile. The outer quarters of it are dropped, so what a
            tile's cut edge spoils is never seen when the decoder reaches no further than that; across the middle half the tiles are blended.
        wrap: the axes (2 rows, 3 columns) along which opposite edges meet; exact as far as the decoder reaches no further than 8 latents.
        call: (vae, raw latents) -> pixels, the way back of `encode`'s.

    Returns:
        Pixels (B, 3, h*factor, w*factor), float32 in about [-1, 1] (not clamped), on the module's device.

    Raises:
        RequestError: a bad shape, tile or overlap.
        ModelError: the module's pixels are not as the spec says.
        NotFiniteError: NaN or infinity (half precision overflows in some autoencoders); the caller decodes again in float32.
    """
    if z.ndim != 4 or z.shape[1] != spec.channels or not z.numel():
        raise RequestError(f"the latent has shape {tuple(z.shape)}: expected (B, {spec.channels}, h, w)")
    module = getattr(vae, "decoder", vae)

    def whole(raw: Tensor) -> Tensor:
        return _decoded(vae, raw, spec, call)

    raw = spec.to_raw(z.float())
    tiled = partial(_tiled, whole, unit=1, scale=spec.factor, tiles=_tiles(tile, overlap, spec))
    pixels = _wrapped(tiled, raw, unit=1, scale=spec.factor, axes=wrap)
    _check_finite(pixels, z, module, what="decoder", given="latent")
    return pixels


def rendered(vae: Autoencoder, z: Tensor, spec: LatentSpec, *, call: Callable[[Any, Tensor], Tensor] | None = None) -> Tensor:
    """As `decode`, of the whole picture at once and with gradients, for what judges pixels: native latents (B, c, h, w) to (B, 3, H, W)."""
    return _decoded(vae, spec.to_raw(z.float()), spec, call)


def _decoded(vae: Autoencoder, raw: Tensor, spec: LatentSpec, call: Callable[[Any, Tensor], Tensor] | None) -> Tensor:
    module = getattr(vae, "decoder", vae)
    pixels = vae.decode(_cast(raw, module)).sample if call is None else call(vae, _cast(raw, module))
    _check_shape(pixels, (len(raw), 3, raw.shape[2] * spec.factor, raw.shape[3] * spec.factor), "decoder")
    return pixels.float()


def coloured(x0: Tensor, spec: LatentSpec) -> Tensor:
    """What `preview` shows as a tensor (B, 3, h, w) in about [-1, 1], with gradients; the spec must have a preview matrix."""
    return torch.einsum("bchw,cr->brhw", x0, torch.tensor(spec.rgb).to(x0)) + torch.tensor(spec.rgb_bias).to(x0)[:, None, None]


def preview(x0: Tensor, spec: LatentSpec) -> list[Image.Image]:
    """What a clean-latent estimate looks like, by one matrix: B RGB images, one pixel per latent. Not-finite latents show as black or white.

    Args:
        x0: (B, c, h, w), native latents.

    Raises:
        RequestError: the spec has no preview matrix, or another shape.
    """
    if spec.rgb is None:
        raise RequestError("this family has no preview matrix (rgb is None): decode the latent instead")
    if x0.ndim != 4 or x0.shape[1] != spec.channels:
        raise RequestError(f"the latent has shape {tuple(x0.shape)}: expected (B, {spec.channels}, h, w)")
    return to_images(coloured(x0.detach().float().cpu(), spec).nan_to_num(nan=-1.0).clamp(-1, 1))


def _cast(x: Tensor, module: Any) -> Tensor:
    """x on the device and in the dtype of the module's first parameter.

    In bf16 on a CPU the result is channels last, which oneDNN's convolutions read without reordering.
    """
    weight = next(module.parameters())
    x = x.to(device=weight.device, dtype=weight.dtype)
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
        x = x.contiguous(memory_format=torch.channels_last)
    return x


def _tiles(tile: int | None, overlap: int | None, spec: LatentSpec) -> tuple[int, int] | None:
    """Tile side and overlap from pixels to latents, checked."""
    if tile is None:
        return None
    if not isinstance(tile, int) or tile < spec.factor or tile % spec.factor:
        raise RequestError(f"tile is {tile!r}: expected a number of pixels that is a multiple of {spec.factor}")
    if overlap is None:
        return tile // spec.factor, tile // spec.factor // 4
    if not isinstance(overlap, int) or overlap % spec.factor or not 0 <= overlap < tile:
        raise RequestError(f"overlap is {overlap!r}: expected a multiple of {spec.factor} from 0 to less than the tile ({tile})")
    return tile // spec.factor, overlap // spec.factor


def _tiled(function: Callable[[Tensor], Tensor], x: Tensor, *, unit: int, scale: int, tiles: tuple[int, int] | None) -> Tensor:
    """function(x), computed tile by tile.

    Args:
        x: (B, C, H, W), with H and W multiples of `unit`.
        unit: entries of x per latent along a side; scale: entries of the result per latent.
        tiles: (side, overlap) in latents; None for one call.
    """
    height, width = x.shape[2] // unit, x.shape[3] // unit
    if tiles is None or (height <= tiles[0] and width <= tiles[0]):
        return function(x)
    out: Tensor | None = None
    for rows, down in spans(height, *tiles, scale=scale):
        for columns, across in spans(width, *tiles, scale=scale):
            part = function(Window(rows, columns).of(x, unit=unit))
            if out is None:
                out = part.new_zeros((*part.shape[:2], height * scale, width * scale))
            weighed = part * (down[:, None] * across).to(part.device)
            Window(Span(rows.start * scale, rows.length * scale), Span(columns.start * scale, columns.length * scale)).add(weighed, to=out)
    assert out is not None
    return out


def _wrapped(function: Callable[[Tensor], Tensor], x: Tensor, *, unit: int, scale: int, axes: tuple[int, ...]) -> Tensor:
    """function(x) of a picture whose opposite edges meet along `axes`: filled up from beyond each edge, and what comes of that cut off again."""
    size = {axis: x.shape[axis] // unit for axis in axes}
    margin = {axis: min(WRAPPED, size[axis]) for axis in axes}
    for axis in axes:
        side, more = x.shape[axis], margin[axis] * unit
        x = torch.cat([x.narrow(axis, side - more, more), x, x.narrow(axis, 0, more)], axis)
    out = function(x)
    for axis in axes:
        out = out.narrow(axis, margin[axis] * scale, size[axis] * scale)
    return out


def _check_shape(got: Tensor, expected: tuple[int, ...], what: str) -> None:
    if tuple(got.shape) != expected:
        raise ModelError(f"the {what} gave shape {tuple(got.shape)}: expected {expected}, so its latent spec (channels, factor) is not the right one")


def _check_finite(result: Tensor, source: Tensor, module: Any, *, what: str, given: str) -> None:
    if bool(torch.isfinite(result).all()):
        return
    if not bool(torch.isfinite(source).all()):
        raise NotFiniteError(f"the {given} holds NaN or infinity before the {what} sees it: the fault lies earlier")
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    raise NotFiniteError(f"the {what} gave NaN or infinity in {dtype}: expected finite numbers, so run it in float32")
