"""A CUDA device without one: tensors that know their shape, dtype and device "cuda" and hold no numbers, and a record of all that would make the host wait.

Knows torch and, to run a plan on it, a pipeline. The host waits for a GPU where it asks for a number (`.item()`, `bool(tensor)`, `torch.equal`, an index by a
mask), and where memory that is not page-locked is copied, either way.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from latentgen.diffusion.sample import sampler
from latentgen.models.family import Conditioning
from latentgen.run.guard import Watch
from latentgen.run.words import Script
from latentgen.run.work import Work

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
ASKS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default, aten.is_nonzero.default}
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class Waits(TorchDispatchMode):
    """Records what waits: (operation, the lines of code that asked for it). Numbers that are asked for are 1 and True."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in args if isinstance(t, torch.Tensor)]
        if func in MOVES:
            to = torch.device(kwargs.get("device") or tensors[0].device)
            if len({to.type, *(t.device.type for t in tensors)}) > 1 and not kwargs.get("non_blocking"):
                self.waits(func)
        if any(t.device == GPU for t in tensors) or func in ASKS:
            if func in ASKS:
                if tensors[0].device == GPU:
                    self.waits(func)
                return True if func is not aten._local_scalar_dense.default else 1.0 if tensors[0].dtype.is_floating_point else 1
            masks = [t for t in args[1] if t is not None and t.dtype == torch.bool] if func in INDEXES else []
            if masks and (func is aten.index.Tensor or args[2].numel() > 1):  # one number is filled in without counting the mask's
                self.waits(func)
        return func(*args, **kwargs)

    def waits(self, func: Any) -> None:
        frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_stack() if "/torch/" not in f.filename and "fake_gpu" not in f.filename]
        self.found.append((str(func), " < ".join(frames[:-4:-1])))

    def taken(self) -> list[tuple[str, str]]:
        """What was found since it was last asked."""
        found, self.found = self.found, []
        return found


@dataclass
class Pretended:
    """Stands for a residency whose device is the fake one."""

    modules: dict[str, Any]
    device: torch.device = GPU
    dtype: torch.dtype = torch.float32

    @contextmanager
    def use(self, stage: str, **_: Any) -> Iterator[dict[str, Any]]:
        yield self.modules


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it would be on the device; within a fake mode."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)


def moved(script: Script, known: dict[int, Conditioning]) -> Script:
    """What is said, on the device; who is one conditioning stays one."""

    def one(c: Conditioning) -> Conditioning:
        if id(c) not in known:
            pooled = None if c.pooled is None else on_gpu(c.pooled)
            known[id(c)] = replace(c, tokens=on_gpu(c.tokens), pooled=pooled, extra={name: on_gpu(t) for name, t in c.extra.items()})
        return known[id(c)]

    return replace(script, steps=tuple(replace(said, prompts=tuple(map(one, said.prompts)), others=tuple(map(one, said.others))) for said in script.steps))


def waited(pipe: Any, plan: Any) -> list[list[tuple[str, str]]]:
    """What each step of a plan's first pass waits for on a GPU; the pipeline is on a CPU, and encodes words and pictures there."""
    own, one = Work(pipe.family, pipe.checkpoint, pipe.residency, pipe._memo, plan), plan.passes[0]
    scripts, z0 = own.scripts(one), own.source_latents(one)
    with pipe.residency.use("denoiser") as modules:
        copies = {name: deepcopy(module) for name, module in modules.items()}
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits, torch.no_grad():
        known: dict[int, Conditioning] = {}
        scripts = [moved(script, known) for script in scripts]
        modules = {name: module._apply(on_gpu) for name, module in copies.items()}
        eps = torch.zeros(len(plan.seeds), *pipe.family.latent.shape(plan.width, plan.height), device=GPU)
        z0 = None if z0 is None else on_gpu(z0)
        work = replace(own, residency=Pretended(modules))
        denoise = work.denoiser(one, modules, scripts, z0, eps)
        watch, steps = Watch(), []
        waits.taken()
        x = work.start(one, z0, eps, None)
        for step in sampler(plan.sampler).function(denoise, x, plan.levels, noise=lambda: torch.zeros_like(eps), **plan.options):
            watch.see(step.x0, step.x)
            steps.append(waits.taken())
    return steps
