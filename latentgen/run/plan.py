"""Every choice about a request, made before weights are touched. Knows families, tokenizers, pictures and levels; runs no network.

All errors about input are raised here.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from latentgen.diffusion.level import Level
from latentgen.diffusion.sample import asked as levels_asked
from latentgen.diffusion.sample import sampler as find_sampler
from latentgen.diffusion.schedule import UNSHIFTED
from latentgen.diffusion.schedule import spacing as make_spacing
from latentgen.errors import ImageError, RequestError
from latentgen.models.family import Family
from latentgen.pixels.image import extended, fit_to, open_image, to_tensor
from latentgen.pixels.mask import canvas, open_mask
from latentgen.run.texts import PlannedText, plan_texts, resolved

if TYPE_CHECKING:
    from latentgen.conditioning.tokens import Tokens
    from latentgen.pixels.latent import LatentSpec
    from latentgen.run.request import Request

OPTIONS = ("original_size", "crop_top_left", "target_size", "negative_original_size", "negative_crop_top_left", "negative_target_size", "aesthetic_score",
           "negative_aesthetic_score")
SIDES = {"cfg": 2, "image": 3}  # how often a guided evaluation sees a picture
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
        prompt, negative: what is said when, as token chunks, as many of one as of the other where both are used.
        weighting: the rule by which weights in them are read.
        asked_steps: steps of the whole run, of which an edit runs the share `strength`; `first_step` is the first of them, counted from 1.
        cfg_scale: weight of the evaluations against each other: guidance_scale, or true_cfg_scale where the model has guidance built in; 1 is off.
        batching: how a guided evaluation runs: "pair", "triple" or, where AND joins prompts, "several" (in one call), or "off" (no guidance).
        evaluations: how often the network sees one picture, exactly: two or more for each guided level that a sampler asks about, else one.
        references: pictures for editing by instruction, as given.
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
    first_step: int
    levels: tuple[Level, ...]
    sampler: str
    spacing: str
    options: Mapping[str, float | str]
    guidance_scale: float
    cfg_scale: float
    image_guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[float, float]
    strength: float
    prompt: PlannedText
    negative: PlannedText
    weighting: str
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
    references: tuple[Image.Image, ...] = field(default=(), repr=False, compare=False)

    @property
    def steps(self) -> int:
        """Levels that the denoiser visits, after strength."""
        return len(self.levels) - 1

    def __str__(self) -> str:
        size = f"{self.width}x{self.height}" + (f", cropped to {self.crop[0]}x{self.crop[1]}" if self.crop != (self.width, self.height) else "")
        first, last = self.levels[0], self.levels[-2]
        guidance = f"{self.guidance_scale:g} ({self.batching})" if self.batching != "off" else "off" if self.guidance_scale == 1 else f"{self.guidance_scale:g} (built in)"
        rows = {
            "model": self.model, "task": self.task, "size": size, "seeds": ", ".join(map(str, self.seeds)),
            "steps": f"{self.steps}, {self.sampler}, {self.spacing}, time {first.time:g} to {last.time:g}" + "".join(f", {k} {v}" for k, v in self.options.items()),
            "guidance": guidance, "prompt": str(self.prompt) + (f", weights as {self.weighting}" if self.prompt.weighted else ""),
            "negative": "none" if not self.negative.text else str(self.negative) if len(self.negative.spans) > 1 else f"{self.negative.tokens} tokens",
            "compute": f"{self.dtype} on {self.device}, {self.residency}, {self.evaluations} network evaluations a picture",
            "weights": ", ".join(f"{stage} {count / 1e6:.0f} MB" for stage, count in self.weights.items()),
        }
        if self.task != "txt2img":
            rows["strength"] = f"{self.strength:g}"
        return "\n".join(f"{name:<9} {text}" for name, text in rows.items()) + "".join(f"\nnote      {n}" for n in self.notes)


@dataclass(frozen=True)
class Machine:
    """What the pipeline was loaded with, as far as planning needs it; `notes` are what its files did not tell."""

    model: str
    device: str
    dtype: str
    residency: str
    weights: Mapping[str, int]
    notes: tuple[str, ...] = ()


def make_plan(request: Request, family: Family, tokenizers: Mapping[str, Tokens], machine: Machine) -> Plan:
    """Decide everything about a request.

    Raises:
        RequestError, ImageError: input that cannot be honoured; with strict=False contradictions become notes instead.
    """
    notes = list(machine.notes)
    defaults = family.defaults

    def refuse(problem: str) -> None:
        if request.strict:
            raise RequestError(problem)
        notes.append(f"ignored: {problem}")

    references = _references(request, family)
    source, width, height, crop = _size(request, family, references)
    native = defaults.width * defaults.height
    if not native / 5 < width * height < native * 5:
        notes.append(f"{width}x{height} is far from this model's own {defaults.width}x{defaults.height}: expect a weaker picture")
    scale, cfg = _guidance(request, family, refuse)
    guided = cfg != 1 or (family.guidance == "image" and bool(references))
    full, levels, strength, options = _levels(request, family, (width, height), refuse, notes)
    prompt, negative = plan_texts(request, family, tokenizers, steps=len(full) - 1, guided=guided, refuse=refuse, notes=notes)
    if source is not None and source.mask is not None and not source.mask.any():
        notes.append("the mask is all black: the picture comes back as it was")
    low, high = (request.guidance_interval if guided else None) or (0.0, 1.0)
    rescale = defaults.guidance_rescale if request.guidance_rescale is None else request.guidance_rescale
    asked = levels_asked(request.sampler or defaults.sampler, levels, options)
    sides = SIDES["image"] if family.guidance == "image" and references else SIDES["cfg"]
    several = prompt.composed > 1  # which is composed outside the interval, too
    sides += prompt.composed - 1
    evaluations = sum(sides if several or (guided and low <= family.path.find(level.half_log_snr) <= high) else 1 for level in asked)
    image_scale = defaults.image_guidance_scale if request.image_guidance_scale is None else request.image_guidance_scale
    return Plan(
        request=request, model=machine.model, task=request.task, width=width, height=height, crop=crop, seeds=_seeds(request),
        asked_steps=request.steps or defaults.steps, first_step=full.index(levels[0]) + 1, levels=levels, sampler=request.sampler or defaults.sampler,
        spacing=request.spacing or defaults.spacing, options=options, guidance_scale=scale, cfg_scale=cfg, image_guidance_scale=image_scale,
        guidance_rescale=rescale if guided else 0.0, guidance_interval=(low, high), strength=strength, prompt=prompt, negative=negative,
        weighting=resolved(request), batching="off" if not guided else "several" if several else {2: "pair", 3: "triple"}[sides],
        rows=1 if machine.device == "cpu" else request.batch, dtype=machine.dtype, device=machine.device, residency=machine.residency, tile=TILE if width * height > TILE_ABOVE else None, weights=machine.weights,
        evaluations=evaluations, notes=tuple(notes), source=source, references=references)


def _references(request: Request, family: Family) -> tuple[Image.Image, ...]:
    """The pictures given as `reference`, opened."""
    given = request.references
    if request.reference is not None and not given:
        raise RequestError("reference holds no picture: pass one, or leave it out")
    if given and not family.references:
        raise RequestError(f"reference is given but {family.name} does not look at pictures: use image= to redraw one, or a model for editing by instruction")
    if len(given) > family.references:
        raise RequestError(f"reference holds {len(given)} pictures but {family.name} looks at {family.references} at most: give fewer")
    if family.task == "edit" and not given:
        raise RequestError(f"{family.name} here is a checkpoint that edits a picture by instruction, and no reference is given: pass reference=")
    return tuple(open_image(picture, name="reference", max_pixels=MAX_AREA) for picture in given)


def _guidance(request: Request, family: Family, refuse: Callable[[str], None]) -> tuple[float, float]:
    """The guidance scale as the model takes it, and the weight of classifier-free guidance, with contradictions found."""
    scale = family.defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
    said = request.guidance_scale is not None
    if family.guidance in ("cfg", "image"):
        cfg, off = scale, "guidance_scale is 1, which turns guidance off: raise guidance_scale"
        if request.true_cfg_scale is not None:
            refuse(f"true_cfg_scale is given but {family.name} has no guidance built in: use guidance_scale")
    else:
        cfg, off = request.true_cfg_scale or 1.0, f"{family.name} here is distilled, and without true_cfg_scale runs no classifier-free guidance: pass true_cfg_scale above 1"
        if family.guidance == "none" and scale != 1:
            if said:
                refuse(f"guidance_scale is {scale:g} but {family.name} here has no guidance to scale: leave it out")
            scale = 1.0
    off_too = cfg == 1 and family.guidance != "image"  # where a picture guides, the negative words count at 1, too
    if off_too and any((request.negative_prompt, request.negative_prompt_2, request.negative_prompt_3)):
        refuse(f"negative_prompt is given but {off}, or leave the negative prompt out")
    if off_too and (request.guidance_rescale or request.guidance_interval not in (None, (0.0, 1.0))):
        refuse(f"guidance_rescale or guidance_interval is given but {off}, or leave them out")
    if request.image_guidance_scale is not None and family.guidance != "image":
        refuse(f"image_guidance_scale is given but {family.name} here weighs no picture against the words: leave it out")
    for name in OPTIONS:
        if getattr(request, name) is not None and name not in family.options:
            refuse(f"{name} is given but {family.name} here is not told it: leave it out")
        elif getattr(request, name) is not None and name.startswith("negative_") and off_too:
            refuse(f"{name} is given but {off}, or leave it out")
    return scale, cfg


def _levels(request: Request, family: Family, size: tuple[int, int], refuse: Callable[[str], None],
            notes: list[str]) -> tuple[tuple[Level, ...], tuple[Level, ...], float, dict[str, float]]:
    """The levels of the whole run, those to run, strength and the sampler's options."""
    defaults, task = family.defaults, request.task
    steps, spacing = request.steps or defaults.steps, request.spacing or defaults.spacing
    info = find_sampler(request.sampler or defaults.sampler)
    options: dict[str, float | str] = {}
    if request.eta is not None and "eta" in (request.sampler_options or {}):
        refuse("eta is given twice, once in sampler_options: leave one of them out")
    for option, value in {**({} if request.eta is None else {"eta": request.eta}), **(request.sampler_options or {})}.items():
        if option in info.options:
            info.options[option].check(option, value)
            options[option] = value
        else:
            takes = f"it takes {', '.join(info.options)}" if info.options else "it takes none"
            refuse(f"{option} is given but the sampler {request.sampler or defaults.sampler!r} has no {option} ({takes}): leave it out, or use another sampler")
    if request.shift is not None and request.shift != 1 and family.prediction != "flow":
        refuse(f"shift is {request.shift:g} but {family.name} does not run on a rectified flow: leave shift out")
    shift = defaults.shift if family.shift is None else family.shift(*size, steps)
    shift = 1.0 if family.prediction != "flow" else request.shift if request.shift is not None else 1.0 if spacing in UNSHIFTED else shift
    levels = full = make_spacing(spacing, family.path, steps, shift=shift, offset=defaults.offset if spacing == "leading" else 0,
                                terminal=family.terminal)
    strength = 1.0
    if task in ("img2img", "inpaint"):
        strength = request.strength if request.strength is not None else (defaults.strength if task == "img2img" else 1.0)
        share = (len(levels) - 1) * strength
        if share < 1:
            notes.append(f"strength {strength:g} of {len(levels) - 1} steps is less than one step: one is run")
        levels = levels[-(max(1, int(share + 1e-9)) + 1):]
    elif request.strength is not None:
        refuse(f"strength is given but {task} has nothing to keep by strength: leave it out")
    if request.fit and task not in ("img2img", "inpaint"):
        refuse(f"fit is given but this is {task}, which has no picture or mask to resize: leave it out")
    if request.feather and task != "outpaint":
        refuse(f"feather is given but this is {task}: it softens the rim of an outpainted area")
    return full, _share(request, family, levels), strength, options


def _share(request: Request, family: Family, levels: tuple[Level, ...]) -> tuple[Level, ...]:
    """The levels between denoising_start and denoising_end, counted on the training steps as diffusers does."""
    if (request.latents is None) != (request.denoising_start is None):
        raise RequestError("latents and denoising_start belong together: pass another run's `.latents` and the denoising_end that it had as denoising_start")
    if request.latents is not None and (request.image is not None or len(request.latents) != request.batch):
        raise RequestError(f"latents hold {len(request.latents)} pictures, batch is {request.batch}: expected as many, and no image beside them")
    ends = [1.0 if end is None else end for end in (request.denoising_start or 0.0, request.denoising_end)]
    if ends[0] >= ends[1]:
        raise RequestError(f"denoising_start is {ends[0]:g} and denoising_end is {ends[1]:g}: expected the start before the end")
    first, last = (sum(level.time >= round(family.path.train_steps * (1 - end)) for level in levels[:-1]) for end in ends)
    first, last = first if ends[0] else 0, last if ends[1] < 1 else len(levels) - 1
    if first >= last:
        raise RequestError(f"no step lies between denoising_start {ends[0]:g} and denoising_end {ends[1]:g} of {len(levels) - 1} steps: use more steps")
    return levels[first:last + 1]


def _size(request: Request, family: Family, references: tuple[Image.Image, ...]) -> tuple[Source | None, int, int, tuple[int, int]]:
    """The source picture at its planned size, that size, and the size of the finished picture."""
    spec = family.latent
    if request.task in ("txt2img", "edit"):
        width, height = _own_size(family, references)
        if request.latents is not None:
            width, height = (side * spec.factor for side in (request.latents.shape[3], request.latents.shape[2]))
        width, height = request.width or width, request.height or height
        if request.latents is not None and tuple(request.latents.shape[1:]) != spec.shape(width, height):
            raise RequestError(f"latents have shape {tuple(request.latents.shape)}: expected (batch, {', '.join(map(str, spec.shape(width, height)))}) "
                               f"for {width}x{height} pixels of this model")
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
