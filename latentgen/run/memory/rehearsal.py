"""A plan run on paper: the code of a real run on tensors without numbers, to know its memory and arithmetic. Reads headers and configs, no weights.

Knows a run's stages. Knows no family: what a network allocates is seen while its own code runs (on the meta device), not written down here.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from latentgen.models.family import Family, Part, Stage
from latentgen.models.paper import packed_bytes, paper_part, unused
from latentgen.pixels.upscale import UPSCALERS
from latentgen.run.memo import Memo
from latentgen.run.memory.ledger import KINDS, Ledger
from latentgen.run.memory.workspace import on_cpu, on_gpu
from latentgen.run.residency import QUANTISED, STREAMED, STREAMING
from latentgen.run.work import Work

if TYPE_CHECKING:
    from torch import nn

    from latentgen.models.checkpoint import Checkpoint
    from latentgen.run.passes import Pass
    from latentgen.run.plan import Plan

STAGES: tuple[Stage, ...] = ("text", "encoder", "denoiser", "decoder")
KEPT = 64  # rehearsals that a process remembers
KEPT_PARTS = 4  # checkpoints whose parts on paper it keeps
SAID = ("vae_tile", "prompt", "negative_prompt", "prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3", "seed", "image", "mask",
        "reference", "latents", "steps", "guidance_scale", "strict")  # what of a request changes no shape, or shows in the plan


@dataclass(frozen=True)
class Rehearsed:
    """What a run will need beside its weights.

    Attributes:
        activations: stage -> the most bytes of tensors alive in it beside its weights; absent where the run has no such stage.
        work: stage -> kind -> how much of it the whole run does, see `latentgen.run.memory.ledger.KINDS`.
        kept: bytes that are still alive when the last picture is decoded.
        packed: part -> layer -> bytes of its weight, packed; of those that the run calls.
    """

    activations: Mapping[Stage, int]
    work: Mapping[Stage, Mapping[str, float]]
    kept: int = 0
    packed: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


class PaperResidency:
    """Stands for `Residency` in a rehearsal: parts with shapes only, and the ledger read at the end of each stage."""

    def __init__(self, parts: Mapping[Part, nn.Module], ledger: Ledger, dtype: torch.dtype) -> None:
        self.parts = {part: unused(module) for part, module in parts.items()}
        self.ledger, self.dtype = ledger, dtype
        self.device = torch.device("cpu")  # where inputs are made, in numbers; what meets a weight is paper from there on
        self.peaks: dict[Stage, int] = {}
        self.work: dict[Stage, dict[str, float]] = {}

    def check(self) -> None:
        """There is nothing to read."""

    @contextmanager
    def use(self, stage: Stage, *, dtype: torch.dtype | None = None, policy: str | None = None,
            quantise: str | None = None) -> Iterator[dict[str, nn.Module]]:
        """As `Residency.use`."""
        before = dict(self.ledger.work)
        self.ledger.restart()
        try:
            yield {part.name: module for part, module in self.parts.items() if stage in part.stages}
        finally:
            self.peaks[stage] = max(self.peaks.get(stage, 0), self.ledger.peak - self.weights())
            done = self.work.setdefault(stage, dict.fromkeys(KINDS, 0.0))
            for kind in KINDS:
                done[kind] += self.ledger.work[kind] - before[kind]

    def packed(self) -> dict[str, dict[str, int]]:
        """Part -> layer -> bytes of its packed weight, as far as they were called."""
        return {part.name: packed_bytes(module) for part, module in self.parts.items()}

    def weights(self) -> int:
        """Bytes of packed weights, which the ledger counts like every tensor that is made."""
        return sum(sum(layers.values()) for layers in self.packed().values())


class _Kept:
    """Values by key, the latest `limit` of them. Safe for many threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._lock = Lock()

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = make()
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > self.limit:
                self._kept.popitem(last=False)
        return made


_rehearsals, _decodings, _parts = _Kept(KEPT), _Kept(KEPT), _Kept(KEPT_PARTS)


def paper_parts(checkpoint: Checkpoint, plan: Plan) -> Mapping[Part, nn.Module]:
    """Every part on paper as a plan holds it, or those made before."""
    def one(part: Part) -> nn.Module:
        streamed = plan.residency in STREAMING and set(STREAMED) & {*part.stages}
        return paper_part(checkpoint.sources[part.name], part, getattr(torch, plan.dtype),
                          quantise=plan.quantise if QUANTISED & {*part.stages} else None,
                          speed="plain" if streamed else plan.speed, device=torch.device(plan.device))

    return _parts.get(_digest([_configs(checkpoint), _held(plan)]), lambda: {part: one(part) for part in checkpoint.family.parts})


def _held(plan: Plan) -> tuple[Any, ...]:
    """What the modules of a plan hang on beside their configs."""
    return plan.dtype, plan.quantise, plan.speed, plan.device, plan.residency in STREAMING


def rehearse(checkpoint: Checkpoint, family: Family, plan: Plan) -> Rehearsed:
    """Run a plan on paper, or remember how a plan of the same shapes went.

    Raises:
        What the run itself would raise that hangs on no numbers.
    """
    key, one = _key(checkpoint, plan), plan.passes[-1]
    made = _rehearsals.get(key, lambda: _sampled(checkpoint, family, plan))
    size = [_configs(checkpoint), _held(plan), one.width, one.height, one.tile]
    last = _decodings.get(_digest(size), lambda: _decoded(checkpoint, family, plan))
    pictures = len(plan.seeds)
    # on a CPU, finished pictures lie beside it as they are decoded, and once more when they are joined
    beside = (pictures - 1) * 2 * 3 * 4 * one.width * one.height if plan.device.startswith("cpu") else 0
    earlier = made.activations.get("decoder", 0)  # of a picture that was decoded between two passes
    decoder = {kind: value * pictures + made.work.get("decoder", {}).get(kind, 0.0) for kind, value in last.work["decoder"].items()}
    packed = {part: {**layers, **last.packed[part]} for part, layers in made.packed.items()}
    return Rehearsed({**made.activations, "decoder": max(last.activations["decoder"] + made.kept + beside, earlier)},
                     {**made.work, "decoder": decoder}, made.kept, packed)


def _ledger(plan: Plan) -> Ledger:
    return Ledger(paper=True, alike=plan.batching != "triple", workspace=on_cpu if plan.device.startswith("cpu") else on_gpu)


def _sampled(checkpoint: Checkpoint, family: Family, plan: Plan) -> Rehearsed:
    """Everything before the last picture is decoded."""
    count, pictures = min(len(plan.seeds), plan.rows), len(plan.seeds)
    shown = replace(plan, noise=replace(plan.noise, own=plan.noise.own[:count], variations=plan.noise.variations[:count]))
    seen, sampling, x, ledger = [0], dict.fromkeys(KINDS, 0.0), None, _ledger(plan)
    parts = paper_parts(checkpoint, plan)
    with torch.no_grad(), ledger:
        residency = PaperResidency(parts, ledger, getattr(torch, plan.dtype))
        work = _PaperWork(replace(family, predict=_counted(family, seen)), checkpoint, residency, Memo(), shown)  # type: ignore[arg-type]
        readied = [(work.scripts(one), work.source_latents(one)) for one in plan.passes]
        for n, (one, (scripts, z0)) in enumerate(zip(plan.passes, readied, strict=True)):
            eps = torch.zeros(count, *family.latent.shape(one.width, one.height))
            x = work.start(one, z0, eps, None if x is None else _larger(work, plan.passes[n - 1], one, x))
            stages = [dict(ledger.work)]
            with residency.use("denoiser") as modules:
                denoise = work.denoiser(one, modules, scripts, z0, eps)
                level = max(one.levels[:-1], key=lambda level: _guided_at(plan, family, level))
                seen[0], x0 = 0, None
                for _ in range(1 if plan.approximate else 2):  # in the first weights are packed and words read; some caches leave the next one out
                    stages.append(dict(ledger.work))
                    x0 = None
                    x0 = denoise(x, level)
                stages.append(dict(ledger.work))
            each = seen[0] / (len(stages) - 2)
            for kind in KINDS:
                before, begun, *further = (stage[kind] for stage in stages)
                last = further[-1] - (further[-2] if further[1:] else begun)
                sampling[kind] += further[0] - before + last * (one.evaluations * pictures / max(each, 1) - 1)
            x = x0
            del modules, denoise, x0
        kept = ledger.live - residency.weights()
    return Rehearsed(dict(residency.peaks), {stage: dict(kinds) for stage, kinds in residency.work.items()} | {"denoiser": sampling}, kept,
                     residency.packed())


def _decoded(checkpoint: Checkpoint, family: Family, plan: Plan) -> Rehearsed:
    """One picture's decoding."""
    ledger, last = _ledger(plan), plan.passes[-1]
    parts = paper_parts(checkpoint, plan)
    z = torch.zeros(1, *family.latent.shape(last.width, last.height))
    with torch.no_grad(), ledger:
        residency = PaperResidency(parts, ledger, getattr(torch, plan.dtype))
        _PaperWork(family, checkpoint, residency, Memo(), plan).pixels(last, z)  # type: ignore[arg-type]
    return Rehearsed(residency.peaks, residency.work, 0, residency.packed())


class _PaperWork(Work):
    """A run whose pictures nobody looks at, for they have no colours."""

    def seen(self, one: Pass, z: torch.Tensor, pixels: torch.Tensor, again: Callable[[], torch.Tensor]) -> torch.Tensor:
        return pixels


def _larger(work: Work, before: Pass, one: Pass, z: torch.Tensor) -> torch.Tensor:
    """`Work.larger` of every picture, of which the first is run: a picture without numbers can be decoded and encoded, not resized."""
    if not UPSCALERS[one.upscaler].pixels:
        return work.larger(before, one, z)
    work.pixels(before, z[:1])
    return work.latents(one, torch.zeros(1, 3, one.height, one.width), wrap=one.grid.wrap).expand(len(z), -1, -1, -1)


def _counted(family: Family, seen: list[int]) -> Any:
    def predict(modules: Any, x: Any, level: Any, conditioning: Any) -> Any:
        seen[0] += len(x)
        return family.predict(modules, x, level, conditioning)

    return predict


def _guided_at(plan: Plan, family: Family, level: Any) -> bool:
    low, high = plan.guidance_interval
    return low <= family.path.find(level.half_log_snr) <= high


def _key(checkpoint: Checkpoint, plan: Plan) -> str:
    """What the shapes of a run hang on."""
    said = plan.request.model_dump(exclude=set(SAID), mode="python")
    texts = [[{name: (len(c.ids), len(c.ids[0]), c.weighted) for name, c in one.chunks.items()} for span in text.spans for one in span.conjuncts]
             for text in (plan.prompt, plan.negative)]
    edits = any(one.source is not None or one.upscaler for one in plan.passes) or bool(plan.references)
    passes = [(one.width, one.height, one.tile if edits else None, one.evaluations, None if one.source is None else one.source.mask is None)
              for one in plan.passes]
    return _digest([_configs(checkpoint), said, texts, passes, [picture.size for picture in plan.references], plan.task, len(plan.seeds), plan.rows,
                    plan.batching, _held(plan), plan.guidance_interval, plan.weighting, plan.sampler, dict(plan.approximate)])


def _configs(checkpoint: Checkpoint) -> dict[str, Any]:
    sources = checkpoint.sources
    return {part.name: (part.cls, dict(sources[part.name].config), sources[part.name].packing) for part in checkpoint.family.parts}


def _digest(whole: Any) -> str:
    return sha256(json.dumps(whole, default=repr, sort_keys=True).encode()).hexdigest()
