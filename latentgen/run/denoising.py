"""From a planned request to a denoiser: the network with its words, guided. Knows a family's contract, plans and scripts; moves nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from latentgen.diffusion.compose import composed
from latentgen.diffusion.guidance.combine import combination, standing
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
    Side = tuple[Estimate, Conditioning]

    class Evaluate(Protocol):
        """See `evaluated`."""

        def __call__(self, x: Tensor, level: Level, sides: Sequence[Side], together: bool, first: int = 0) -> tuple[Tensor, ...]: ...


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


def evaluated(rows: int, *, apart: bool = False) -> Evaluate:
    """(x, level, sides, together, first) -> x0 of each side, (B, c, h, w); a side is a network and what it hears.

    Args:
        rows: pictures per network call.  apart: one side a call, whatever is asked. `together` puts all sides of one network into one call; `first`
            is the number of x's first picture.
    """

    def evaluate(x: Tensor, level: Level, sides: Sequence[Side], together: bool, first: int = 0) -> tuple[Tensor, ...]:
        made: list[Tensor] = []
        for ask, some in groupby(sides, itemgetter(0)):
            said, parts = [c for _, c in some], []
            for n, part in enumerate(x.split(rows)):
                each = [repeated(c, len(part), first=first + n * rows) for c in said]
                if together and each[1:] and not apart:
                    parts.append(ask(torch.cat([part] * len(each)), level, joined(each)).chunk(len(each)))
                else:  # encoders without padding give the texts different lengths
                    parts.append(tuple(ask(part, level, c) for c in each))
            made += [torch.cat(x0s) if x0s[1:] else x0s[0] for x0s in zip(*parts, strict=True)]
        return tuple(made)

    return evaluate


def worded(family: Family, estimate: Estimate, plan: Plan, script: Script, *, progress: Progress, evaluate: Evaluate,
           weaker: Mapping[str, Estimate] | None = None) -> Denoiser:
    """(x, level) -> x0 with the words, guided where the plan says so.

    Args:
        progress: of the levels that this denoiser will see.
        evaluate: see `evaluated`.
        weaker: guider -> the network that it leaves behind.
    """

    def told(x: Tensor, level: Level, acting: Sequence[str] = ()) -> Estimates:
        """What the networks say; acting: the guiders whose weaker network is asked, too."""
        said = script.at(level)
        count, heard = len(said.prompts), len(said.every)
        sides = [(estimate, c) for c in said.every] + [(weak, c) for weak in ((weaker or {})[name] for name in acting) for c in said.prompts]
        x0s = evaluate(x, level, sides, said.together)
        others, empty = (x0s[count:heard - 1], x0s[heard - 1]) if plan.empty is not None else (x0s[count:heard], None)
        made = Estimates(x0s[0], others, empty)

        def one(x0s: Sequence[Tensor]) -> Tensor:
            return x0s[0] if count == 1 else composed(x0s, _base(made), said.weights)

        weak = {name: one(x0s[heard + n * count:][:count]) for n, name in enumerate(acting)}
        return replace(made, positive=one(x0s[:count]), weak=weak)

    def every(x: Tensor, level: Level) -> Estimates:
        return told(x, level, [name for name in weaker or () if progress.within(level, plan.guiders[name]["start"], plan.guiders[name]["end"])])

    def with_words(x: Tensor, level: Level) -> Tensor:
        said = script.at(level)
        return told(x, level).positive if len(said.prompts) > 1 else evaluate(x, level, [(estimate, said.prompts[0])], said.together)[0]

    if plan.batching == "off" and not weaker:
        return with_words
    rule, row, (low, high) = _rule(family, plan), partial(prediction_row, family.prediction), plan.guidance_interval
    if any(GUIDERS[name].needs_cfg for name in plan.guiders) or weaker:
        rule = combination(plan.guiders, scale=plan.cfg_scale, progress=progress, row=row, plain=rule)

    def position(level: Level) -> float:
        return family.path.find(level.half_log_snr)

    made = guided(with_words, every, scale=plan.cfg_scale, rescale=plan.guidance_rescale, interval=(low, high), combine=rule, position=position)
    return standing(made, plan.guiders, progress=progress, row=row, inside=lambda level: low <= position(level) <= high)


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
