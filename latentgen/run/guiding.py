"""Guidance as a request asks for it: scales, and what contradicts them. Knows requests and the contract of families; runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latentgen.diffusion.guidance.table import GUIDERS, filled, still
from latentgen.errors import RequestError
from latentgen.run.steering import SHOWN, seen_by

if TYPE_CHECKING:
    from latentgen.diffusion.guidance.progress import Progress
    from latentgen.diffusion.level import Level
    from latentgen.models.family import Family
    from latentgen.run.request import Request

OPTIONS = ("original_size", "crop_top_left", "target_size", "negative_original_size", "negative_crop_top_left", "negative_target_size",
           "aesthetic_score", "negative_aesthetic_score")


@dataclass(frozen=True)
class Guiding:
    """How a run is guided.

    Attributes:
        scale: guidance_scale as the model takes it; cfg: the weight of classifier-free guidance, 1 where it is off or cfg_pp has its own.
        pair: there are evaluations without the prompt; guiders: name -> its options, all of them, in the order in which they act.
    """

    scale: float
    cfg: float
    pair: bool
    guiders: dict[str, dict[str, Any]]

    @property
    def any(self) -> bool:
        """Whether anything but the prompt's own estimate counts, so that an interval has a meaning."""
        return self.pair or any(GUIDERS[name].acts != "threshold" for name in self.guiders)


def guidance_of(request: Request, family: Family, refuse: Callable[[str], None], *, layers: Callable[[str, Any], tuple[list[str], str]] | None,
                notes: list[str]) -> Guiding:
    """The guidance scale as the model takes it, the weight of classifier-free guidance, and guiders, with contradictions found.

    layers: (guider, layers as they were asked for) -> their names in the denoiser, and a note on them, "" for most.
    """
    scale, cfg, off = _scales(request, family, refuse)
    pictured = family.guidance == "image" and bool(request.references)  # then the negative words count at 1, too
    guiders = filled(({} if request.classifier is None else {"classifier": {}}) | (request.guiders or {}))
    if "cfg_pp" in guiders:
        own = "guidance_scale" if family.guidance in ("cfg", "image") else "true_cfg_scale"
        if getattr(request, own) is not None:
            refuse(f"{own} is given but the guider cfg_pp has a scale of its own, from 0 to 1: leave {own} out, or cfg_pp")
        cfg, scale = 1.0, 1.0 if own == "guidance_scale" else scale
    pair = cfg != 1 or pictured or ("cfg_pp" in guiders and family.combine is None)
    guiders = _guiders(request, family, guiders, pair=pair, pictured=pictured, off=off, refuse=refuse)
    for name, options in list(guiders.items()):
        if layers is not None and "layers" in options:
            try:
                options["layers"], note = layers(name, options["layers"])
                notes += [note] if note else []
            except RequestError as error:  # not a network that it could weaken so
                refuse(str(error))
                del guiders[name]
    made = Guiding(scale, cfg, pair, guiders)
    if not made.pair and family.guidance != "image" and any((request.negative_prompt, request.negative_prompt_2, request.negative_prompt_3)):
        refuse(f"negative_prompt is given but {off}, or leave the negative prompt out")
    if not made.any and family.guidance != "image" and (request.guidance_rescale or request.guidance_interval not in (None, (0.0, 1.0))):
        given = "guidance_rescale" if request.guidance_rescale else "guidance_interval"
        refuse(f"{given} is given but {off}, or leave {given} out")
    if request.image_guidance_scale is not None and family.guidance != "image":
        refuse(f"image_guidance_scale is given but {family.name} here weighs no picture against the words: leave it out")
    for name in OPTIONS:
        if getattr(request, name) is not None and name not in family.options:
            refuse(f"{name} is given but {family.name} here is not told it: leave it out")
        elif getattr(request, name) is not None and name.startswith("negative_") and not made.pair and family.guidance != "image":
            refuse(f"{name} is given but {off}, or leave it out")
    return made


def _scales(request: Request, family: Family, refuse: Callable[[str], None]) -> tuple[float, float, str]:
    """The guidance scale as the model takes it, the weight of classifier-free guidance, and why that is off, where it is."""
    scale = family.defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
    if family.guidance in ("cfg", "image"):
        if request.true_cfg_scale is not None:
            refuse(f"true_cfg_scale is given but {family.name} has no guidance built in: use guidance_scale")
        return scale, scale, "guidance_scale is 1, which turns guidance off: raise guidance_scale"
    if family.guidance == "none" and scale != 1:
        if request.guidance_scale is not None:
            refuse(f"guidance_scale is {scale:g} but {family.name} here has no guidance to scale: leave it out")
        scale = 1.0
    return scale, request.true_cfg_scale or 1.0, (
        f"{family.name} here is distilled, and without true_cfg_scale runs no classifier-free guidance: pass true_cfg_scale above 1")


def _guiders(request: Request, family: Family, guiders: dict[str, dict[str, Any]], *, pair: bool, pictured: bool, off: str,
             refuse: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Those that act in this run; the others are refused."""
    said = request.guiders or {}
    if "cfg_zero" in guiders and family.prediction != "flow":  # an output of 0 stands still on a flow alone
        if said["cfg_zero"].get("zero_steps"):
            refuse(f"cfg_zero's zero_steps is given but {family.name} does not run on a rectified flow, where alone the first steps can stand still: "
                   "leave it out")
        guiders["cfg_zero"]["zero_steps"] = 0
    own = "" if family.combine is None else "combines its two estimates by a rule of its own"
    own = "weighs words and picture against each other" if pictured else own
    silent = not any((request.negative_prompt, request.negative_prompt_2, request.negative_prompt_3))
    if "classifier" in guiders and (problem := _classifier_problem(request, family, guiders["classifier"])):
        refuse(problem)
        del guiders["classifier"]
    problems = {
        name: f"{name} is given but {family.name} here {own}: leave {name} out" if own else
              f"{name} is given but {off}, or leave {name} out" if not pair else
              "perp_neg is given but there is no negative prompt for it to weigh: give one, or leave perp_neg out"
              if name == "perp_neg" and silent else ""
        for name in guiders if GUIDERS[name].needs_cfg}
    for problem in filter(None, problems.values()):
        refuse(problem)
    return {name: options for name, options in guiders.items() if not problems.get(name)}


def _classifier_problem(request: Request, family: Family, options: dict[str, Any]) -> str:
    """What keeps the classifier from acting, "" where nothing does."""
    judge, said = request.classifier, (request.guiders or {}).get("classifier", {}).get("through")
    if judge is None:
        return "classifier is given as a guider but none is there: pass it, as in classifier=latentgen.clip_guidance(...), or leave the guider out"
    if seen_by(judge) not in SHOWN:
        return f"the classifier says that it is of {seen_by(judge)!r:.40}: expected {', '.join(SHOWN[:-1])} or {SHOWN[-1]}"
    if seen_by(judge) != "pixels" and said is not None:
        return f"classifier's through is {said!r} but this classifier is shown latents, not pixels: leave through out"
    if seen_by(judge) == "pixels" and family.latent.rgb is None:
        if said == "preview":
            return f"classifier's through is 'preview' but {family.name} here has no preview matrix: use through='decoder'"
        options["through"] = "decoder"
    if seen_by(judge) != "pixels":
        del options["through"]
    return ""


def check_moves(guiders: Mapping[str, Mapping[str, Any]], passes: Sequence[Progress], inside: Callable[[Level], bool]) -> None:
    """RequestError where cfg_zero leaves the network no step of a pass, so that noise would stay noise; inside: see `idle`."""
    for progress in passes:
        levels = progress.levels[:-1]
        if all(inside(level) and still(guiders, progress, level) for level in levels):
            raise RequestError(f"cfg_zero's zero_steps is {guiders['cfg_zero']['zero_steps']}, which leaves the network none of the {len(levels)} "
                               "step(s): give fewer zero_steps, or more steps")


def idle(guiders: Mapping[str, Mapping[str, Any]], passes: Sequence[Progress], inside: Callable[[Level], bool]) -> list[str]:
    """A note on each guider that acts in none of the steps of any pass.

    inside: whether a level lies in the guidance interval.
    """
    asked = {name: (options["start"], options["end"]) for name, options in guiders.items() if "start" in options}
    steps = [(progress, level) for progress in passes for level in progress.levels[:-1]]
    return [f"{name} acts in none of the {len(steps)} steps: its start {start:g} and end {end:g} leave no step between them"
            for name, (start, end) in asked.items() if not any(inside(level) and progress.within(level, start, end) for progress, level in steps)]
