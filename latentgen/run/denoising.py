"""From a planned request to a denoiser: the network with its words, guided. Knows a family's contract, plans and scripts; moves nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentgen.diffusion.compose import composed
from latentgen.diffusion.guidance.combine import combination
from latentgen.diffusion.guidance.progress import Progress
from latentgen.diffusion.guidance.table import GUIDERS
from latentgen.diffusion.guide import Estimates, Rule, guided, image_guidance
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


def worded(family: Family, estimate: Estimate, plan: Plan, script: Script, *, progress: Progress,
           weaker: Mapping[str, Estimate] | None = None) -> Denoiser:
    """(x, level) -> x0 with the words, guided where the plan says so; `plan.rows` pictures per network call.

    Args:
        progress: of the levels that this denoiser will see.
        weaker: guider -> the network that it leaves behind.
    """

    def shown(ask: Estimate, x: Tensor, level: Level, said: Sequence[Conditioning], together: bool) -> tuple[Tensor, ...]:
        """x0 with each conditioning, by this process or by several."""
        if plan.split is None or len(said) == 1:
            return computed(ask, x, level, said, together)
        return plan.split.shared(lambda own: computed(ask, x, level, [said[n] for n in own], together), len(said), like=x)

    def computed(ask: Estimate, x: Tensor, level: Level, said: Sequence[Conditioning], together: bool) -> tuple[Tensor, ...]:
        """x0 with each conditioning."""
        rows = []
        for n, part in enumerate(x.split(plan.rows)):
            each = [repeated(c, len(part), first=n * plan.rows) for c in said]
            if together and each[1:] and not plan.request.split_guidance:
                rows.append(ask(torch.cat([part] * len(each)), level, joined(each)).chunk(len(each)))
            else:  # encoders without padding give the texts different lengths
                rows.append(tuple(ask(part, level, c) for c in each))
        return tuple(torch.cat(sides) if sides[1:] else sides[0] for sides in zip(*rows, strict=True))

    def told(x: Tensor, level: Level) -> Estimates:
        said, count = script.at(level), len(script.at(level).prompts)
        x0s = shown(estimate, x, level, said.every, said.together)
        others, empty = (x0s[count:-1], x0s[-1]) if plan.empty is not None else (x0s[count:], None)
        made = Estimates(x0s[0], others, empty)
        return made if count == 1 else replace(made, positive=composed(x0s[:count], _base(made), said.weights))

    def every(x: Tensor, level: Level) -> Estimates:
        made, said = told(x, level), script.at(level)
        for name, ask in (weaker or {}).items():
            if progress.within(level, plan.guiders[name]["start"], plan.guiders[name]["end"]):
                x0s = shown(ask, x, level, said.prompts, said.together)
                made = replace(made, weak={**made.weak, name: x0s[0] if len(x0s) == 1 else composed(x0s, _base(made), said.weights)})
        return made

    def with_words(x: Tensor, level: Level) -> Tensor:
        said = script.at(level)
        return told(x, level).positive if len(said.prompts) > 1 else shown(estimate, x, level, said.prompts, said.together)[0]

    if plan.batching == "off" and not weaker:
        return with_words
    rule = _rule(family, plan)
    if any(GUIDERS[name].needs_cfg for name in plan.guiders) or weaker:
        rule = combination(plan.guiders, scale=plan.cfg_scale, progress=progress, row=partial(prediction_row, family.prediction), plain=rule)
    return guided(with_words, every, scale=plan.cfg_scale, rescale=plan.guidance_rescale, interval=plan.guidance_interval, combine=rule,
                  position=lambda level: family.path.find(level.half_log_snr))


def _base(said: Estimates) -> Tensor:
    """What the prompts that AND joins are weighed against."""
    return said.others[0] if said.empty is None else said.empty


def _rule(family: Family, plan: Plan) -> Rule | None:
    """How the estimates are combined where it is not plain guidance."""
    if family.guidance == "image" and plan.references:
        return lambda x, level, said: image_guidance(said.positive, *said.others, scale=plan.cfg_scale, image_scale=plan.image_guidance_scale)
    if (own := family.combine) is not None and plan.batching != "off":
        return lambda x, level, said: own(x, level, said.positive, *said.others, plan.cfg_scale)
    return None
