"""Sizes: of the picture that is denoised, of its source, and of what comes back. Knows pictures, a LatentSpec and a family's own size; runs
nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from latentgen.errors import ImageError, RequestError
from latentgen.pixels.image import extended, fit_to, open_image, to_tensor
from latentgen.pixels.mask import canvas, open_mask

if TYPE_CHECKING:
    from latentgen.models.family import Family
    from latentgen.pixels.latent import LatentSpec
    from latentgen.run.request import Request

MAX_AREA = 4096 * 4096


@dataclass(frozen=True)
class Source:
    """The picture that an edit starts from, at the planned size.

    Attributes:
        image: RGB, width x height of the plan.
        mask: (1, 1, H, W) in [0, 1], 1 = repaint; None for img2img.
    """

    image: Image.Image
    mask: Tensor | None


def open_references(request: Request, family: Family) -> tuple[Image.Image, ...]:
    """The pictures given as `reference`, opened."""
    given = request.references
    if request.reference is not None and not given:
        raise RequestError("reference holds no picture: pass one, or leave it out")
    if given and not family.references:
        raise RequestError(f"reference is given but {family.name} does not look at pictures: redraw it with img2img (image=), "
                           "or load a model for editing by instruction")
    if len(given) > family.references:
        raise RequestError(f"reference holds {len(given)} pictures but {family.name} looks at {family.references} at most: give fewer")
    if family.task == "edit" and not given:
        raise RequestError(f"{family.name} here is a checkpoint that edits a picture by instruction, and no reference is given: pass reference=")
    return tuple(open_image(picture, name="reference", max_pixels=MAX_AREA) for picture in given)


def check_references(references: Sequence[Image.Image], family: Family, sizes: Iterable[tuple[int, int]]) -> None:
    """RequestError for a reference that the model cannot look at while it makes pictures of these sizes, (width, height)."""
    for problem in (family.fits(picture.size, size) for size in sizes for picture in references):
        if problem:
            raise RequestError(problem)


def sized(request: Request, family: Family, references: tuple[Image.Image, ...]) -> tuple[Source | None, int, int, tuple[int, int]]:
    """The source picture at its planned size, that size, and the size of the finished picture."""
    spec = family.latent
    if request.task in ("txt2img", "edit"):
        width, height = _own_size(family, references)
        if request.latents is not None:
            width, height = (side * spec.factor for side in (request.latents.shape[3], request.latents.shape[2]))
        width, height = request.width or width, request.height or height
        if request.latents is not None and tuple(request.latents.shape[1:]) != spec.shape(width, height):
            raise RequestError(f"latents have shape {tuple(request.latents.shape)}: expected (batch, "
                               f"{', '.join(map(str, spec.shape(width, height)))}) "
                               f"for {width}x{height} pixels of this model")
        spec.shape(width, height)
        check_area(width, height)
        return None, width, height, (width, height)
    if request.image is None:
        raise RequestError(f"{request.task} needs an image: pass image=")
    image = open_image(request.image, max_pixels=MAX_AREA)
    if request.task == "outpaint":
        if request.width or request.height or request.mask is not None:
            raise RequestError("outpaint takes its size from the image and left/right/top/bottom: leave width, height and mask out")
        check_area(image.width + request.left + request.right, image.height + request.top + request.bottom)
        image, drawn = canvas(image, left=request.left, right=request.right, top=request.top, bottom=request.bottom, multiple=1,
                              feather=request.feather)
        mask: Tensor | None = open_mask(drawn, image.size)
    else:
        image = _resized(image, request, spec)
        mask = None if request.mask is None else open_mask(request.mask, image.size, fit=request.fit)
        mask = None if mask is None else open_mask(mask, image.size)  # again, as the end will: a mask that resizing made too faint is refused now
    right, bottom = -image.width % spec.multiple, -image.height % spec.multiple  # an odd size is filled up by its edge and cropped at the end
    crop = image.size
    if right or bottom:
        image = extended(image, left=0, right=right, top=0, bottom=bottom)
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, right, 0, bottom), mode="replicate")
    spec.shape(*image.size)
    return Source(image, mask), image.width, image.height, crop


def _own_size(family: Family, references: tuple[Image.Image, ...]) -> tuple[int, int]:
    """The size of a picture where none was said: the model's own; with a reference, its shape, and its very size where the network wants it so."""
    defaults, step = family.defaults, family.latent.multiple
    if not references:
        return defaults.width, defaults.height
    width, height = references[0].size
    share = 1.0 if family.guidance == "image" else math.sqrt(defaults.width * defaults.height / (width * height))
    return max(step, int(width * share) // step * step), max(step, int(height * share) // step * step)


def _resized(image: Image.Image, request: Request, spec: LatentSpec) -> Image.Image:
    """The picture at the size that was said, if one was."""
    wanted = (request.width or image.width, request.height or image.height)
    check_area(*wanted)
    if request.width or request.height:
        spec.shape(*wanted)
    if wanted != image.size and request.fit != "resize":
        raise ImageError(f"image is {image.width}x{image.height} but {wanted[0]}x{wanted[1]} is asked for: resize the image, or pass fit='resize'")
    return fit_to(image, *wanted, how="resize")


def check_area(width: int, height: int) -> None:
    if width * height > MAX_AREA:
        raise RequestError(f"{width}x{height} is {width * height / 1e6:.0f} megapixels: at most {MAX_AREA / 1e6:.0f} can be made, so make it smaller")


def source_pixels(source: Source) -> Tensor:
    """The source picture as (1, 3, H, W) in [-1, 1]."""
    return to_tensor(source.image)
