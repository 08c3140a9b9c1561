"""From a planned request to a denoiser: the network with its words, guided and masked. Knows a family's contract, plans and scripts; moves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentgen.diffusion.compose import composed
from latentgen.diffusion.guide import guided, image_guidance
from latentgen.diffusion.level import Denoiser, Level, prediction_row
from latentgen.models.asked import Asked
from latentgen.models.family import Conditioning, Family, Modules
from latentgen.run.batch import joined, repeated
from latentgen.run.plan import Plan
from latentgen.run.words import Script

if TYPE_CHECKING:
    Estimate = Callable[[Tensor, Level, Conditioning], Tensor]


def network(family: Family, modules: Modules, asked: Asked) -> Estimate:
    """(x, level, conditioning of x's batch) -> x0: one evaluation of the network, the innermost of all that a run computes.

    Args:
        asked: is told of each call before it is made.
    """

    def estimate(x: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
        asked.tell(level, conditioning)
        a, b = prediction_row(family.prediction, level)
        with torch.no_grad():
            return a * x + b * family.predict(modules, x, level, conditioning)

    return estimate


def worded(family: Family, estimate: Estimate, plan: Plan, script: Script) -> Denoiser:
    """(x, level) -> x0 with the words, guided where the plan says so; `plan.rows` pictures per network call."""

    def with_words(x: Tensor, level: Level) -> Tensor:
        said = script.at(level)
        if len(said.prompts) > 1:
            return every(x, level)[0]
        parts = [estimate(part, level, repeated(said.prompts[0], len(part), first=n * plan.rows)) for n, part in enumerate(x.split(plan.rows))]
        return torch.cat(parts) if parts[1:] else parts[0]

    def every(x: Tensor, level: Level) -> tuple[Tensor, ...]:
        said, rows = script.at(level), []
        for n, part in enumerate(x.split(plan.rows)):
            each = [repeated(c, len(part), first=n * plan.rows) for c in said.every]
            if said.together:
                rows.append(estimate(torch.cat([part] * len(each)), level, joined(each)).chunk(len(each)))
            else:  # encoders without padding give the texts different lengths
                rows.append(tuple(estimate(part, level, c) for c in each))
        x0s = tuple(torch.cat(sides) if sides[1:] else sides[0] for sides in zip(*rows, strict=True))
        count = len(said.prompts)
        return x0s if count == 1 else (composed(x0s[:count], x0s[count], said.weights), *x0s[count:])

    if plan.batching == "off":
        return with_words
    return guided(with_words, every, scale=plan.cfg_scale, rescale=plan.guidance_rescale, interval=plan.guidance_interval, combine=_rule(family, plan),
                  position=lambda level: family.path.find(level.half_log_snr))


def _rule(family: Family, plan: Plan) -> Callable[[Tensor, Level, tuple[Tensor, ...]], Tensor] | None:
    """How the estimates are combined where it is not plain guidance."""
    if family.guidance == "image" and plan.references:
        return lambda x, level, x0s: image_guidance(*x0s, scale=plan.cfg_scale, image_scale=plan.image_guidance_scale)
    if (own := family.combine) is not None:
        return lambda x, level, x0s: own(x, level, *x0s, plan.cfg_scale)
    return None
