"""Every choice about a request, made before weights are touched. Knows families, tokenizers, pictures and levels; runs no network.

All errors about input are raised here.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from latentgen.conditioning.prompt import PromptChunks, chunked
from latentgen.diffusion.level import Level
from latentgen.diffusion.sample import sampler as find_sampler
from latentgen.diffusion.schedule import spacing as make_spacing
from latentgen.errors import ImageError, RequestError
from latentgen.models.family import Family
from latentgen.pixels.image import extended, fit_to, open_image, to_tensor
from latentgen.pixels.mask import canvas, open_mask

if TYPE_CHECKING:
    from latentgen.conditioning.encoders import ClipTokens
    from latentgen.pixels.latent import LatentSpec
    from latentgen.run.request import Request

MAX_AREA = 4096 * 4096
TILE_ABOVE = 1024 * 1024  # pixels of a picture from which the autoencoder works in tiles
TILE = 768


@dataclass(frozen=True)
class Source:
    """The picture that an edit starts from, at the planned size.

    Attributes:
        image: RGB, width x height of the plan.
        mask: (1, 1, H, W) in [0, 1], 1 = repaint; None for img2img.
    """

    image: Image.Image
    mask: Tensor | None


@dataclass(frozen=True)
class Plan:
    """What will be done, in full. Print it.

    Attributes:
        width, height: the size that is denoised; `crop` is the size of the finished picture (an edit keeps its picture's size).
        levels: the levels visited, the clean one last; `steps` of them are evaluated.
        prompt, negative: token chunks, as many of one as of the other where both are used.
        asked_steps: steps of the whole run, of which an edit runs the share `strength`.
        batching: how a guided evaluation runs: "pair" (both in one call) or "off" (no guidance).
        evaluations: how often the network sees one picture, exactly: two for each guided level that a sampler asks about, else one.
        rows: pictures per network call. On a CPU 1, so that a picture never depends on its batch.
        tile: side of an autoencoder tile in pixels, or None.
        weights: bytes of weights per stage, from the files' headers.
    """

    request: Request
    model: str
    task: str
    width: int
    height: int
    crop: tuple[int, int]
    seeds: tuple[int, ...]
    asked_steps: int
    levels: tuple[Level, ...]
    sampler: str
    spacing: str
    options: Mapping[str, float]
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[float, float]
    strength: float
    prompt: PromptChunks
    negative: PromptChunks
    batching: str
    rows: int
    dtype: str
    device: str
    residency: str
    tile: int | None
    weights: Mapping[str, int]
    evaluations: int
    notes: tuple[str, ...]
    source: Source | None = field(default=None, repr=False, compare=False)

    @property
    def steps(self) -> int:
        """Levels that the denoiser visits, after strength."""
        return len(self.levels) - 1

    def __str__(self) -> str:
        size = f"{self.width}x{self.height}" + (f", cropped to {self.crop[0]}x{self.crop[1]}" if self.crop != (self.width, self.height) else "")
        first, last = self.levels[0], self.levels[-2]
        guidance = f"{self.guidance_scale:g} ({self.batching})" if self.batching != "off" else "off"
        rows = {
            "model": self.model, "task": self.task, "size": size, "seeds": ", ".join(map(str, self.seeds)),
            "steps": f"{self.steps}, {self.sampler}, {self.spacing}, time {first.time:g} to {last.time:g}" + "".join(f", {k} {v:g}" for k, v in self.options.items()),
            "guidance": guidance, "prompt": f"{self.prompt.tokens} tokens in {len(self.prompt.ids)} chunk(s)",
            "negative": f"{self.negative.tokens} tokens" if self.negative.text else "none",
            "compute": f"{self.dtype} on {self.device}, {self.residency}, {self.evaluations} network evaluations a picture",
            "weights": ", ".join(f"{stage} {count / 1e6:.0f} MB" for stage, count in self.weights.items()),
        }
        if self.task != "txt2img":
            rows["strength"] = f"{self.strength:g}"
        return "\n".join(f"{name:<9} {text}" for name, text in rows.items()) + "".join(f"\nnote      {n}" for n in self.notes)


@dataclass(frozen=True)
class Machine:
    """What the pipeline was loaded with, as far as planning needs it."""

    model: str
    device: str
    dtype: str
    residency: str
    weights: Mapping[str, int]


def make_plan(request: Request, family: Family, tokenizer: ClipTokens, machine: Machine) -> Plan:
    """Decide everything about a request.

    Raises:
        RequestError, ImageError: input that cannot be honoured; with strict=False contradictions become notes instead.
    """
    notes: list[str] = []
    defaults = family.defaults
    scale, levels, strength, options = _numbers(request, family, notes)
    source, width, height, crop = _size(request, family)
    native = defaults.width * defaults.height
    if not native / 5 < width * height < native * 5:
        notes.append(f"{width}x{height} is far from this model's own {defaults.width}x{defaults.height}: expect a weaker picture")
    prompt = chunked(request.prompt, tokenizer)
    negative = chunked(request.negative_prompt, tokenizer, name="negative_prompt", at_least=len(prompt.ids))
    if scale != 1:
        prompt = chunked(request.prompt, tokenizer, at_least=len(negative.ids))
    if not request.prompt.strip():
        notes.append("the prompt is empty: the picture is unconditional")
    if len(prompt.ids) > 1:
        notes.append(f"the prompt has {prompt.tokens} tokens and is read in {len(prompt.ids)} chunks of {tokenizer.length - 2}")
    if source is not None and source.mask is not None and not source.mask.any():
        notes.append("the mask is all black: the picture comes back as it was")
    guided = scale != 1
    low, high = (request.guidance_interval if guided else None) or (0.0, 1.0)
    rescale = defaults.guidance_rescale if request.guidance_rescale is None else request.guidance_rescale
    per_step = find_sampler(request.sampler or defaults.sampler).evaluations_per_step
    asked = [level for pair in pairwise(levels) for level in pair[:per_step] if level.sigma > 0]
    evaluations = sum(2 if guided and low <= family.path.find(level.half_log_snr) <= high else 1 for level in asked)
    return Plan(
        request=request, model=machine.model, task=request.task, width=width, height=height, crop=crop, seeds=_seeds(request),
        asked_steps=request.steps or defaults.steps, levels=levels, sampler=request.sampler or defaults.sampler,
        spacing=request.spacing or defaults.spacing, options=options, guidance_scale=scale, guidance_rescale=rescale if guided else 0.0,
        guidance_interval=(low, high), strength=strength, prompt=prompt, negative=negative, batching="pair" if guided else "off",
        rows=1 if machine.device == "cpu" else request.batch, dtype=machine.dtype, device=machine.device, residency=machine.residency,
        tile=TILE if width * height > TILE_ABOVE else None, weights=machine.weights, evaluations=evaluations,
        notes=tuple(notes), source=source)


def _numbers(request: Request, family: Family, notes: list[str]) -> tuple[float, tuple[Level, ...], float, dict[str, float]]:
    """Guidance scale, the levels to run, strength and the sampler's options, with contradictions found."""
    defaults, task = family.defaults, request.task

    def refuse(problem: str) -> None:
        if request.strict:
            raise RequestError(problem)
        notes.append(f"ignored: {problem}")

    scale = defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
    if family.guidance != "cfg" and scale != 1:
        if request.guidance_scale is not None:
            refuse(f"guidance_scale is {scale:g} but {family.name} has no classifier-free guidance: leave it out")
        scale = 1.0
    if scale == 1 and request.negative_prompt:
        refuse("negative_prompt is given but guidance_scale is 1, which turns guidance off: raise guidance_scale or leave the negative prompt out")
    if scale == 1 and (request.guidance_rescale or request.guidance_interval not in (None, (0.0, 1.0))):
        refuse("guidance_rescale or guidance_interval is given but guidance_scale is 1, which turns guidance off: raise guidance_scale or leave them out")
    info = find_sampler(request.sampler or defaults.sampler)
    options: dict[str, float] = {}
    if request.eta is not None:
        if "eta" in info.options:
            options["eta"] = request.eta
        else:
            refuse(f"eta is given but the sampler {request.sampler or defaults.sampler!r} has no eta: use sampler='ddim' or leave eta out")
    shift = defaults.shift if request.shift is None else request.shift
    if shift != 1 and family.prediction != "flow":
        refuse(f"shift is {shift:g} but {family.name} does not run on a rectified flow: leave shift out")
        shift = 1.0
    levels = make_spacing(request.spacing or defaults.spacing, family.path, request.steps or defaults.steps, shift=shift)
    strength = 1.0
    if task in ("img2img", "inpaint"):
        strength = request.strength if request.strength is not None else (defaults.strength if task == "img2img" else 1.0)
        share = (len(levels) - 1) * strength
        if share < 1:
            notes.append(f"strength {strength:g} of {len(levels) - 1} steps is less than one step: one is run")
        levels = levels[-(max(1, int(share + 1e-9)) + 1):]
    elif request.strength is not None:
        refuse(f"strength is given but {task} has nothing to keep by strength: leave it out")
    if request.feather and task != "outpaint":
        refuse(f"feather is given but this is {task}: it softens the rim of an outpainted area")
    return scale, levels, strength, options


def _size(request: Request, family: Family) -> tuple[Source | None, int, int, tuple[int, int]]:
    """The source picture at its planned size, that size, and the size of the finished picture."""
    spec, defaults = family.latent, family.defaults
    if request.task == "txt2img":
        width, height = request.width or defaults.width, request.height or defaults.height
        spec.shape(width, height)
        _check_area(width, height)
        return None, width, height, (width, height)
    if request.image is None:
        raise RequestError(f"{request.task} needs an image: pass image=")
    image = open_image(request.image, max_pixels=MAX_AREA)
    if request.task == "outpaint":
        if request.width or request.height or request.mask is not None:
            raise RequestError("outpaint takes its size from the image and left/right/top/bottom: leave width, height and mask out")
        _check_area(image.width + request.left + request.right, image.height + request.top + request.bottom)
        image, drawn = canvas(image, left=request.left, right=request.right, top=request.top, bottom=request.bottom, multiple=1, feather=request.feather)
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
    return Source(image, mask), image.width, image.height, crop


def _resized(image: Image.Image, request: Request, spec: LatentSpec) -> Image.Image:
    """The picture at the size that was said, if one was."""
    wanted = (request.width or image.width, request.height or image.height)
    _check_area(*wanted)
    if request.width or request.height:
        spec.shape(*wanted)
    if wanted != image.size and request.fit != "resize":
        raise ImageError(f"image is {image.width}x{image.height} but {wanted[0]}x{wanted[1]} is asked for: resize the image, or pass fit='resize'")
    return fit_to(image, *wanted, how="resize")


def _seeds(request: Request) -> tuple[int, ...]:
    """One seed per picture, counted up from the one said or drawn."""
    seed = secrets.randbits(32) if request.seed is None else request.seed
    if seed + request.batch > 2**63:
        raise RequestError(f"seed is {seed} with a batch of {request.batch}: picture i has seed + i, which may not pass 2**63 - 1, so give a smaller seed")
    return tuple(range(seed, seed + request.batch))


def _check_area(width: int, height: int) -> None:
    if width * height > MAX_AREA:
        raise RequestError(f"{width}x{height} is {width * height / 1e6:.0f} megapixels: at most {MAX_AREA / 1e6:.0f} can be made, so make it smaller")


def source_pixels(source: Source) -> Tensor:
    """The source picture as (1, 3, H, W) in [-1, 1]."""
    return to_tensor(source.image)
