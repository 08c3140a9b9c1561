"""The passes of a run: each denoises the picture at one size, the first from noise or an edit's source, a second from what the first made, enlarged.

Knows requests, families, sizes and levels; runs no network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from latentgen.diffusion.guidance.progress import Progress
from latentgen.diffusion.level import Level
from latentgen.diffusion.tiles import COLUMNS, ROWS, Grid
from latentgen.errors import RequestError
from latentgen.models.approximate.table import kind_of
from latentgen.pixels.image import to_images, to_tensor
from latentgen.pixels.upscale import UPSCALERS, larger_pixels
from latentgen.run.levels import path_of
from latentgen.run.sizing import Source, check_area

if TYPE_CHECKING:
    from latentgen.models.family import Family
    from latentgen.run.request import Request

TILE_ABOVE = 1024 * 1024  # pixels of a picture from which the autoencoder works in tiles
TILE = 768
WINDOWED_ABOVE = 4  # times the model's own area, from which a second pass is denoised in windows
WRAPS = {None: (), "y": (ROWS,), "x": (COLUMNS,), "both": (ROWS, COLUMNS)}
SHARED = 4  # neighbouring windows share a side's fourth part


@dataclass(frozen=True)
class Pass:
    """One way through the levels at one size.

    Attributes:
        width, height: the size that is denoised; `crop` is the part of it that is the picture (an edit keeps its picture's size).
        asked_steps: steps of the whole path, of which the last ones are run, the share `strength`; `first_step` is the first of them, counted from 1.
        levels: the levels visited, the clean one last; `steps` of them are evaluated.
        evaluations: how often the network sees one picture, exactly: two or more for each guided level that a sampler asks about, else one; so often
            for each window.
        grid: the windows through which the network sees the latent; most times one, which is all of it.
        upscaler: how what the pass before made was brought to this size, "" for the first pass.
        source: the picture that an edit starts from, at this size.
        vae_tile: side of the autoencoder's tiles in pixels, None where it was not said.
    """

    width: int
    height: int
    crop: tuple[int, int]
    asked_steps: int
    first_step: int
    levels: tuple[Level, ...]
    strength: float
    evaluations: int
    grid: Grid
    upscaler: str = ""
    source: Source | None = field(default=None, repr=False, compare=False)
    vae_tile: int | None = None

    @property
    def steps(self) -> int:
        """Levels that the denoiser visits, after strength."""
        return len(self.levels) - 1

    @property
    def progress(self) -> Progress:
        """How far its levels are on the whole path."""
        return Progress(self.levels, first=self.first_step - 1, total=self.asked_steps)

    @property
    def tile(self) -> int | None:
        """Side of an autoencoder's tile in pixels, None where it sees the picture whole."""
        side = self.vae_tile or (TILE if self.width * self.height > TILE_ABOVE else None)
        return None if side is None or side >= max(self.width, self.height) else side

    @property
    def seen(self) -> tuple[int, int]:
        """(h, w) of the latents that the network sees at once."""
        window = self.grid.windows[0]
        return window.rows.length, window.columns.length

    @property
    def size(self) -> str:
        """"520x304, cropped to 515x300", as far as there is something to say."""
        return f"{self.width}x{self.height}" + (f", cropped to {self.crop[0]}x{self.crop[1]}" if self.crop != (self.width, self.height) else "")

    @property
    def way(self) -> str:
        """"time 599 to 99, 9 windows of 256 pixels", as far as there is something to say."""
        many = len(self.grid.windows)
        windows = f", {many} windows of {self.grid.tile * self.width // self.grid.width} pixels" if many > 1 else ""
        meeting = {(): "", (ROWS,): ", edges meet top to bottom", (COLUMNS,): ", edges meet left to right"}
        return f"time {self.levels[0].time:g} to {self.levels[-2].time:g}{windows}{meeting.get(self.grid.wrap, ', edges meet all around')}"

    def __str__(self) -> str:
        """A second pass, in one line."""
        steps = f"{self.steps} of {self.asked_steps} steps (strength {self.strength:g})"
        return f"{self.size} by {self.upscaler}, {steps}, {self.way}, {self.evaluations} evaluations"


def grid_of(request: Request, family: Family, size: tuple[int, int], *, wrap: tuple[int, ...], later: bool, refuse: Callable[[str], None],
            notes: list[str]) -> Grid:
    """The windows through which a picture of (width, height) pixels is denoised.

    Args:
        wrap: the axes along which the picture's edges meet.
        later: it is a second pass, which is denoised in windows also unasked where it is far larger than the model's own size.
    """
    (width, height), spec, defaults = size, family.latent, family.defaults
    step, tile = math.lcm(spec.multiple, spec.factor), request.tile
    if tile is not None and tile % step:
        below = tile // step * step
        raise RequestError(f"tile is {tile}: expected a multiple of {step}, so use {f'{below} or ' * (below > 0)}{below + step}")
    if tile is not None and request.reference is not None:
        if not later:
            refuse("tile is given but this edit looks at its reference as a whole: leave tile out")
        tile = None
    native = defaults.width * defaults.height
    if tile is None and later and request.reference is None and width * height > WINDOWED_ABOVE * native:
        tile = max(step, round(math.sqrt(native) / step) * step)
        notes.append(f"{width}x{height} is {width * height / native:.2g} times this model's own area: it is denoised in windows of {tile} pixels")
    side = (tile or max(width, height)) // spec.factor
    return Grid(height // spec.factor, width // spec.factor, side, side // SHARED, wrap)


def whole(request: Request, passes: Sequence[Pass]) -> list[str]:
    """Notes where windows or an autoencoder's tiles were asked for and are as large as all that there is. (With `vae_tile` at a size that has tiles
    unasked that is what it was said for.)"""
    notes, size = [], f"({passes[-1].width}x{passes[-1].height})"
    if request.tile is not None and request.reference is None and all(len(one.grid.windows) == 1 for one in passes):
        notes.append(f"tile is {request.tile}, and nothing larger is denoised {size}: the network sees it whole")
    if request.vae_tile is not None and all((one.tile, replace(one, vae_tile=None).tile) == (None, None) for one in passes):
        notes.append(f"vae_tile is {request.vae_tile}, and nothing larger is decoded {size}: the autoencoder sees it whole")
    return notes


def wrap_of(request: Request, family: Family, size: tuple[int, int], crop: tuple[int, int], refuse: Callable[[str], None]) -> tuple[int, ...]:
    """The axes along which the edges of the picture shall meet.

    Args:
        size, crop: what is denoised and what of it is the picture, (width, height) in pixels.
    """
    transformers = [part for part in family.parts if "denoiser" in part.stages and kind_of(part.cls) != "unet"]
    if request.seamless is not None and transformers and (family.task == "inpaint" or request.reference is not None):
        refuse(f"seamless is given but {family.name} here is shown another picture place by place, whose edges do not meet: leave seamless out")
        return ()
    if request.seamless is not None and crop != size:
        refuse(f"seamless is given but {crop[0]}x{crop[1]} is cut out of {size[0]}x{size[1]}: give a picture whose sides are "
               f"multiples of {math.lcm(family.latent.multiple, family.latent.factor)}, or leave seamless out")
        return ()
    return WRAPS[request.seamless]


def second_pass(request: Request, family: Family, first: Pass, *, count: Callable[[tuple[Level, ...], int, int], int], refuse: Callable[[str], None],
                notes: list[str]) -> Pass | None:
    """The pass that makes the first one's picture larger, None where none is asked for.

    Args:
        count: (levels, how many of the whole run come before them, steps of the whole run) -> evaluations of one picture.

    Raises:
        RequestError: a size that cannot be made, or an unknown upscaler.
    """
    said = [name for name in ("upscaler", "upscale_strength", "upscale_steps") if getattr(request, name) is not None]
    if request.upscale is None:
        if said:
            refuse(f"{said[0]} is given but upscale is not: pass upscale=2, or leave {said[0]} out")
        return None
    if request.denoising_end is not None:
        refuse("upscale is given but denoising_end leaves the picture unfinished: leave one of them out")
        return None
    name = request.upscaler or next(iter(UPSCALERS))
    if name not in UPSCALERS:
        raise RequestError(f"upscaler is {name!r}: expected one of {', '.join(map(repr, UPSCALERS))}")
    width, height, crop = _larger(request.upscale, family, first, notes)
    grid = grid_of(request, family, (width, height), wrap=first.grid.wrap, later=True, refuse=refuse, notes=notes)
    strength = UPSCALERS[name].strength if request.upscale_strength is None else request.upscale_strength
    whole = request.steps or family.defaults.steps
    steps = request.upscale_steps or upscale_steps(whole, strength)
    whole = whole if request.upscale_steps is None else max(steps, int(steps / strength + 1e-9))  # A1111's count
    if request.upscale_steps is None and whole * strength < 1:
        notes.append(f"upscale_strength {strength:g} of {whole} steps is less than one step: one is run")
    spec, source = family.latent, None
    full = path_of(request, family, (min(width, grid.tile * spec.factor), min(height, grid.tile * spec.factor)), whole)
    levels = full[-(steps + 1):]
    if first.source is not None:
        mask = first.source.mask
        pixels = larger_pixels(to_tensor(first.source.image), (height, width), mode="LANCZOS", wrap=grid.wrap)
        wide = partial(torch.nn.functional.interpolate, size=(height, width), mode="bilinear", align_corners=False)
        source = Source(to_images(pixels)[0], None if mask is None else wide(mask))
    skipped = full.index(levels[0])
    evaluations = count(levels, skipped, whole) * len(grid.windows)
    return Pass(width, height, crop, whole, skipped + 1, levels, strength, evaluations, grid, name, source, request.vae_tile)


def upscale_steps(steps: int, strength: float) -> int:
    """How many levels a second pass visits where its number of steps is not said: the share `strength` of the first one's, one at least."""
    return max(1, int(steps * strength + 1e-9))


def _larger(factor: float, family: Family, first: Pass, notes: list[str]) -> tuple[int, int, tuple[int, int]]:
    """Width and height of the second pass, and of the picture in it."""
    step = math.lcm(family.latent.multiple, family.latent.factor)
    exact = [side * factor for side in (first.width, first.height)]
    width, height = (max(step, int(side / step + 0.5) * step) for side in exact)
    if (width, height) == (first.width, first.height):
        raise RequestError(f"upscale is {factor:g}, which leaves {width}x{height} as it is, for sides are multiples of {step}: "
                           f"give {math.ceil(100 + 50 * step / max(width, height)) / 100:g} or more, or leave it out")
    check_area(width, height)
    crop = round(first.crop[0] * width / first.width), round(first.crop[1] * height / first.height)
    wanted = [side * factor for side in first.crop]
    if any(abs(got - side) >= 1 for got, side in zip(crop, wanted, strict=True)):
        notes.append(f"{factor:g} times {first.crop[0]}x{first.crop[1]} is {wanted[0]:g}x{wanted[1]:g}: {crop[0]}x{crop[1]} is made, "
                     f"for sides are multiples of {step}")
    return width, height, crop
