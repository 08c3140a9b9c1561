"""The rungs by which a plan comes to need less memory, and a run that goes down them where memory runs out. Knows plans and runs; measures nothing.

One fixed order: fewer rows in a call of the network, guidance split, smaller tiles of the autoencoder, then the next policy of residency, and at
last weights in fewer bits, where that is allowed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from latentgen.errors import OutOfMemoryError
from latentgen.run.residency import POLICIES

if TYPE_CHECKING:
    from torch import Tensor

    from latentgen.diffusion.sample import Step
    from latentgen.run.plan import Plan
    from latentgen.run.result import Result
    from latentgen.run.work import Work

TILES = (512, 384, 256)  # sides of the autoencoder's tiles, in pixels, from the fastest to the smallest
WHILE = {"text": "encoding words", "encoder": "encoding a picture", "denoiser": "denoising", "decoder": "decoding"}
SAID = ("can't allocate memory", "not enough memory", "out of memory")  # by errors that have no class of their own


def placed(plan: Plan, **changes: Any) -> Plan:
    """A plan, and those of its pictures, with other fields of where and how it runs."""
    return replace(plan, **changes, pictures=tuple(replace(one, **changes) for one in plan.pictures))


def asked(plan: Plan, **said: Any) -> Plan:
    """A plan, and those of its pictures, whose request says split_guidance or vae_tile."""
    passes = tuple(replace(one, vae_tile=said.get("vae_tile", one.vae_tile)) for one in plan.passes)
    return replace(plan, request=plan.request.replace(**said), passes=passes, pictures=tuple(asked(one, **said) for one in plan.pictures))


def fewer_rows(plan: Plan) -> Iterator[Plan]:
    """Ever fewer rows in a call of the network."""
    while plan.rows > 1:
        plan = placed(plan, rows=(plan.rows + 1) // 2)
        yield plan
    if plan.batching != "off" and not plan.request.split_guidance:
        yield asked(plan, split_guidance=True)


def smaller_tiles(plan: Plan) -> Iterator[Plan]:
    """Ever smaller tiles of the autoencoder."""
    for side in TILES:
        if side < (plan.tile or max(plan.passes[-1].width, plan.passes[-1].height)):
            yield asked(plan, vae_tile=side)


def policies(plan: Plan) -> Iterator[str]:
    """Those of residency after the plan's own."""
    yield from POLICIES[POLICIES.index(plan.residency) + 1:]


def ways(plan: Plan) -> tuple[str | None, ...]:
    """In which weights may be held in fewer bits yet."""
    return plan.ways[plan.ways.index(plan.quantise) + 1:]


def holding(plan: Plan, way: str | None) -> Plan:
    """A plan with weights held so, where it may; else as it is."""
    return placed(plan, quantise=way) if way in plan.ways else plan


def lower(plan: Plan, stage: str | None) -> tuple[Plan, str] | None:
    """The plan one rung below, and what is different in words; None at the bottom.

    Args:
        stage: where memory ran out: rungs that change nothing there are left out. None where that is not known.
    """
    if stage in ("denoiser", None) and (step := next(fewer_rows(plan), None)) is not None:
        split = step.request.split_guidance and not plan.request.split_guidance
        return step, "guidance split" if split else f"{step.rows} pictures in a call of the network"
    if stage in ("encoder", "decoder", None) and (step := next(smaller_tiles(plan), None)) is not None:
        return step, f"the autoencoder in tiles of {step.tile} pixels"
    for policy in policies(plan):
        return placed(plan, residency=policy), f"residency {policy!r}"
    for way in ways(plan) if stage not in ("encoder", "decoder") else ():
        return placed(plan, quantise=way), f"weights in {way!r}"
    return None


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no more memory, on any device."""
    worded = isinstance(error, RuntimeError) and any(said in str(error).lower() for said in SAID)
    return worded or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def enduring(work: Work, *, again: Callable[[bool], None] = lambda same: None) -> Generator[Step, None, Result]:
    """The steps of a run; where memory runs out, what is held is freed and the run done again one rung below, without the steps that were told
    already.

    What was sampled is not sampled again where decoding failed. Each rung is noted.

    Args:
        again: called before the run is done again, with whether its network will answer the very same.

    Raises:
        OutOfMemoryError: at the bottom of the ladder.
    """
    told = 0
    while True:
        try:
            with closing(work.guarded()) as steps:
                for _ in range(told):
                    if (result := _next(steps)[1]) is not None:  # what was sampled is not told again
                        return result
                while True:
                    step, result = _next(steps)
                    if result is not None:
                        return result
                    told += 1
                    yield step
        except Exception as error:
            if not ran_out(error):
                raise
            stage, sampled = getattr(error, "stage", None), getattr(error, "latents", None)
            work, same = _below(work, stage, sampled, error)
        gc.collect()  # of the failed attempt nothing may stay
        work.residency.clear()
        again(same)


def _next(steps: Generator[Step, None, Result]) -> tuple[Any, Result | None]:
    try:
        return next(steps), None
    except StopIteration as done:
        return None, done.value


def _below(work: Work, stage: str | None, sampled: Tensor | None, error: Exception) -> tuple[Work, bool]:
    """The run one rung below, and whether its network answers the same."""
    where = WHILE.get(stage or "", "running")
    step = lower(work.plan, stage)
    if step is None:
        raise OutOfMemoryError(f"memory ran out while {where} {work.plan.width}x{work.plan.height} with residency {work.plan.residency!r} and "
                               "nothing left to save: "
                               "make the picture smaller, free memory, or use a smaller model") from error
    plan, what = step
    note = f"memory ran out while {where}: done again with {what}"
    before = work.plan
    same = (plan.rows, plan.request.split_guidance, plan.quantise) == (before.rows, before.request.split_guidance, before.quantise)
    return replace(work, plan=placed(plan, notes=(*plan.notes, note)), sampled=sampled, savings={} if sampled is None else work.savings), same
