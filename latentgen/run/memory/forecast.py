"""What a plan will need: memory by stage and time, predicted from shapes. Knows policies of residency, rehearsals and measured speeds; loads
nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latentgen.models.modulation import modulation_names
from latentgen.models.streamed import blocks, weight_bytes
from latentgen.run.memory.ledger import ARITHMETIC
from latentgen.run.memory.rehearsal import paper_parts, rehearse
from latentgen.run.residency import STREAMED, STREAMING

if TYPE_CHECKING:
    from torch import nn

    from latentgen.models.checkpoint import Checkpoint
    from latentgen.models.family import Family, Stage
    from latentgen.run.plan import Plan

GB = 10**9
NAMES = {"text": "text", "encoder": "encode", "denoiser": "denoise", "decoder": "decode"}


@dataclass(frozen=True)
class Need:
    """Bytes on the device in one stage: of the weights held there, and of the activations at their peak."""

    weights: int
    activations: int

    @property
    def peak(self) -> int:
        """Both."""
        return self.weights + self.activations


@dataclass(frozen=True)
class Forecast:
    """What a plan will need.

    Attributes:
        stages: stage -> what it needs at most.
        seconds: stage -> how long it computes, by the speeds measured here; {} where these were not asked for.
        flops: floating-point operations of the whole run.
        budget: bytes that it was made to fit; None without one.
    """

    stages: Mapping[Stage, Need]
    seconds: Mapping[Stage, float]
    flops: float
    budget: int | None = None

    @property
    def peak(self) -> int:
        """Bytes that it needs at most."""
        return max(need.peak for need in self.stages.values())

    @property
    def time(self) -> str:
        """"about 41 s (text 0.1, denoise 38, decode 3), 80 TFLOP"."""
        if not self.seconds:
            return f"{self.flops / 1e12:.3g} TFLOP"
        by = ", ".join(f"{NAMES[stage]} {seconds:.2g}" for stage, seconds in self.seconds.items())
        return f"about {sum(self.seconds.values()):.2g} s ({by}), {self.flops / 1e12:.3g} TFLOP"

    def __str__(self) -> str:
        by = ", ".join(f"{NAMES[stage]} {need.peak / GB:.3g} ({need.weights / GB:.3g} weights)" for stage, need in self.stages.items())
        return f"{self.peak / GB:.3g}" + ("" if self.budget is None else f" of {self.budget / GB:.3g}") + f" GB at most: {by}"

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return {"peak": self.peak, "budget": self.budget, "flops": self.flops, "seconds": dict(self.seconds),
                "stages": {stage: {"weights": need.weights, "activations": need.activations} for stage, need in self.stages.items()}}


def forecast(checkpoint: Checkpoint, family: Family, plan: Plan, *, speeds: Mapping[str, float] | None = None, budget: int | None = None) -> Forecast:
    """Predict what a plan needs.

    Args:
        speeds: kind of work -> how much a second, and "copy" -> bytes a second that come to the device; None leaves time out.
    """
    rehearsed = rehearse(checkpoint, family, plan)
    held = {stage: held_bytes(checkpoint, stage, plan, rehearsed.packed) for stage in rehearsed.activations}
    stages = {stage: Need(held[stage], activations) for stage, activations in rehearsed.activations.items()}
    seconds: dict[Stage, float] = {}
    if speeds:
        brought = _brought(checkpoint, plan) / speeds["copy"]
        seconds = {stage: sum(number / speeds[kind] for kind, number in kinds.items()) + (brought if stage == "denoiser" else 0.0)
                   for stage, kinds in rehearsed.work.items()}
    return Forecast(stages, seconds, sum(kinds[kind] for kinds in rehearsed.work.values() for kind in ARITHMETIC), budget)


def held_bytes(checkpoint: Checkpoint, stage: Stage, plan: Plan, packed: Mapping[str, Mapping[str, int]]) -> int:
    """Bytes of weights on the device in a stage, once every stage has been.

    Args:
        packed: part -> layer -> bytes of those that are packed, as far as the run calls them.
    """
    parts, policy = paper_parts(checkpoint, plan), plan.residency
    if policy == "resident":
        return sum(weight_bytes(module) + sum(packed[part.name].values()) for part, module in parts.items())
    weights = [_weights(module, packed[part.name], once=plan.speed == "exact") for part, module in parts.items() if stage in part.stages]
    if policy not in STREAMING or stage not in STREAMED:
        return sum(outside + sum(sizes) for outside, sizes in weights)
    ahead = 1 if plan.device.startswith("cpu") else 2  # the next one comes while one computes
    return sum(outside for outside, _ in weights) + ahead * max((size for _, sizes in weights for size in sizes), default=0)


def _weights(module: nn.Module, packed: Mapping[str, int], *, once: bool) -> tuple[int, tuple[int, ...]]:
    """Bytes outside of blocks, and of each block; without the modulations where these are asked `once`, before the first step."""
    def size(name: str) -> int:
        return weight_bytes(module.get_submodule(name)) + sum(count for layer, count in packed.items() if f"{layer}.".startswith(f"{name}."))

    left = {name: size(name) for name in (modulation_names(module) if once else ())}
    sizes = {name: size(name) - sum(count for head, count in left.items() if head.startswith(f"{name}.")) for name in blocks(module)}
    return weight_bytes(module) + sum(packed.values()) - sum(left.values()) - sum(sizes.values()), tuple(sizes.values())


def _brought(checkpoint: Checkpoint, plan: Plan) -> float:
    """Bytes of blocks that come to the device while a run samples, where they are streamed."""
    if plan.residency not in STREAMING:
        return 0.0
    networks = [module for part, module in paper_parts(checkpoint, plan).items() if "denoiser" in part.stages]
    whole = sum(sum(_weights(module, {}, once=plan.speed == "exact")[1]) for module in networks)
    calls = plan.evaluations * len(plan.seeds) / (plan.rows * (1 if plan.request.split_guidance or plan.batching == "off" else 2))
    return whole * calls
