"""The levels that a request visits: spacing, shift, and the share that an edit runs. Knows requests, families' defaults and samplers; runs no
network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from latentgen.diffusion.level import Level
from latentgen.diffusion.sample import sampler as find_sampler
from latentgen.diffusion.schedule import UNSHIFTED
from latentgen.diffusion.schedule import spacing as make_spacing
from latentgen.errors import RequestError

if TYPE_CHECKING:
    from latentgen.models.family import Family
    from latentgen.run.request import Request


def levels_of(request: Request, family: Family, size: tuple[int, int], refuse: Callable[[str], None],
              notes: list[str]) -> tuple[tuple[Level, ...], tuple[Level, ...], float, dict[str, float]]:
    """The levels of the whole run, those to run, strength and the sampler's options."""
    defaults, task = family.defaults, request.task
    steps = request.steps or defaults.steps
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
            refuse(f"{option} is given but the sampler {request.sampler or defaults.sampler!r} has no {option} ({takes}): "
                   "leave it out, or use another sampler")
    if request.shift is not None and request.shift != 1 and family.prediction != "flow":
        refuse(f"shift is {request.shift:g} but {family.name} does not run on a rectified flow: leave shift out")
    levels = full = path_of(request, family, size, steps)
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


def path_of(request: Request, family: Family, size: tuple[int, int], steps: int) -> tuple[Level, ...]:
    """The levels of a whole run of so many steps, noise to clean; size: (width, height) of the picture, by which some models shift them."""
    defaults, spacing = family.defaults, request.spacing or family.defaults.spacing
    shift = defaults.shift if family.shift is None else family.shift(*size, steps)
    shift = 1.0 if family.prediction != "flow" else request.shift if request.shift is not None else 1.0 if spacing in UNSHIFTED else shift
    return make_spacing(spacing, family.path, steps, shift=shift, offset=defaults.offset if spacing == "leading" else 0, terminal=family.terminal)


def _share(request: Request, family: Family, levels: tuple[Level, ...]) -> tuple[Level, ...]:
    """The levels between denoising_start and denoising_end, counted on the training steps as diffusers does."""
    if (request.latents is None) != (request.denoising_start is None):
        raise RequestError("latents and denoising_start belong together: "
                           "pass another run's `.latents` and the denoising_end that it had as denoising_start")
    if request.latents is not None and (request.image is not None or len(request.latents) != request.batch):
        raise RequestError(f"latents hold {len(request.latents)} pictures, batch is {request.batch}: expected as many, and no image beside them")
    ends = [1.0 if end is None else end for end in (request.denoising_start or 0.0, request.denoising_end)]
    if ends[0] >= ends[1]:
        raise RequestError(f"denoising_start is {ends[0]:g} and denoising_end is {ends[1]:g}: expected the start before the end")
    first, last = (sum(level.time >= round(family.path.train_steps * (1 - end)) for level in levels[:-1]) for end in ends)
    first, last = first if ends[0] else 0, last if ends[1] < 1 else len(levels) - 1
    if first >= last:
        raise RequestError(f"no step lies between denoising_start {ends[0]:g} and denoising_end {ends[1]:g} of "
                           f"{len(levels) - 1} steps: use more steps")
    return levels[first:last + 1]
