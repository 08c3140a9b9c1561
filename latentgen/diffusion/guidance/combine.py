"""Several guiders as one: the order in which they act, and what each is given. Knows estimates, levels and the table; makes no estimate itself.

    0             cfg_zero: the first steps of a flow stand still, and no estimate is made
    1  away       cfg_zero: the negative estimate is scaled · perp_neg: what guides is seen from the empty prompt
    2  direction  apg: momentum, length, projection
    3  scale      guidance_scale, or cfg_pp's, which changes with the level:    x0 = x0_pos + (scale - 1) * direction
    4  range      mimic
    5  weak       pag, slg:                                                     x0 + scale * (x0_pos - x0_weak)
    6             guidance_rescale (in `latentgen.diffusion.guide.guided`, as is the interval outside which 0 to 6 are left out)
    7  slope      classifier (outside the interval neither)
    8  threshold  static_threshold, dynamic_threshold, at every level
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from latentgen.diffusion.guidance.progress import Progress
from latentgen.diffusion.guidance.rules import Momentum, Row, manifold_scale, mimicked, optimised_negative, perpendicular, projected, shortened
from latentgen.diffusion.guidance.table import still
from latentgen.diffusion.guidance.thresholds import dynamic_threshold, static_threshold
from latentgen.diffusion.guide import Estimates, Rule
from latentgen.diffusion.level import Denoiser, Level

Guiders = Mapping[str, Mapping[str, Any]]  # as `table.filled` gives them


def combination(guiders: Guiders, *, scale: float, progress: Progress, row: Row, plain: Rule | None = None) -> Rule:
    """(x, level, estimates) -> x0 by the guiders of kind 1 to 5. Make a new one for each run: apg remembers.

    scale: guidance_scale; 1 with estimates of the prompt alone.
    row: level -> (a, b) of the family's prediction.
    plain: the rule of 1 to 4 where a family or a picture has its own; no guider of those kinds may then be asked for.
    """
    apg, zero, perp, pp, mimic = (guiders.get(name) for name in ("apg", "cfg_zero", "perp_neg", "cfg_pp", "mimic"))
    momentum = Momentum(apg["momentum"]) if apg else None
    scale_at = manifold_scale(pp["scale"], progress) if pp else lambda level: scale

    def words(x: Tensor, level: Level, said: Estimates) -> Tensor:
        """1 to 4."""
        anchor = said.positive
        if zero:
            direction = said.positive - optimised_negative(x, said.positive, said.others[0], row=row(level))
        elif perp and said.empty is not None:
            direction = perpendicular(said.positive, said.others[0], said.empty, weight=perp["weight"])
            anchor = said.empty + direction
        else:
            direction = said.positive - said.others[0]
        if apg and momentum is not None:
            direction = projected(shortened(momentum(direction), apg["norm_threshold"]), said.positive, eta=apg["eta"])
        x0 = anchor + (scale_at(level) - 1) * direction
        return mimicked(x0, anchor + (mimic["scale"] - 1) * direction, percentile=mimic["percentile"]) if mimic else x0

    def combine(x: Tensor, level: Level, said: Estimates) -> Tensor:
        rule = plain or (words if said.others else lambda x, level, said: said.positive)
        x0 = rule(x, level, said)
        for name, weak in said.weak.items():
            x0 = x0 + guiders[name]["scale"] * (said.positive - weak)
        return x0

    return combine


def standing(denoise: Denoiser, guiders: Guiders, *, progress: Progress, row: Row, inside: Callable[[Level], bool]) -> Denoiser:
    """The denoiser, which is not asked where cfg_zero lets nothing move.

    inside: whether a level lies in the guidance interval.
    """
    if not guiders.get("cfg_zero", {}).get("zero_steps"):
        return denoise

    def stand(x: Tensor, level: Level) -> Tensor:
        if inside(level) and still(guiders, progress, level):
            return row(level)[0] * x  # an output of 0: on a flow the velocity, so x stays where it is
        return denoise(x, level)

    return stand


def thresholded(denoise: Denoiser, guiders: Guiders) -> Denoiser:
    """The denoiser with the thresholds that are asked for, at every level."""
    static, dynamic = guiders.get("static_threshold"), guiders.get("dynamic_threshold")
    if static:
        return lambda x, level: static_threshold(denoise(x, level), limit=static["limit"])
    if dynamic:
        return lambda x, level: dynamic_threshold(denoise(x, level), limit=dynamic["limit"], percentile=dynamic["percentile"])
    return denoise
