"""Classifiers in a run: what each is shown, and where it acts. Knows plans, previews and decoders; makes no estimate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentgen.diffusion.guidance.classify import classified
from latentgen.diffusion.guidance.progress import Progress
from latentgen.diffusion.level import Denoiser, Level
from latentgen.pixels.latent import coloured, rendered
from latentgen.run.residency import Residency

if TYPE_CHECKING:
    from latentgen.models.family import Family
    from latentgen.run.plan import Plan

SHOWN = ("x", "x0", "pixels")  # what a classifier may be of: noisy latents, the estimate of clean ones, or what that looks like


def seen_by(classifier: Any) -> str:
    """What a classifier is shown: its attribute `of`, or noisy latents."""
    return str(getattr(classifier, "of", "x"))


def digest_of(classifier: Any) -> str:
    """What a recipe knows of a classifier: its own `digest`, or that nothing is known."""
    found = getattr(classifier, "digest", None)
    return found if isinstance(found, str) else "unknown"


def steered(denoise: Denoiser, *, plan: Plan, family: Family, progress: Progress, residency: Residency) -> Denoiser:
    """The denoiser, led by the request's classifier where there is one."""
    judge, options = plan.request.classifier, plan.guiders.get("classifier")
    if judge is None or options is None:
        return denoise
    low, high = plan.guidance_interval
    sloped = torch.float32 if residency.device.type == "cpu" else None  # what makes bf16 fast on a CPU has no derivative

    def active(level: Level) -> bool:
        return low <= family.path.find(level.half_log_snr) <= high and progress.within(level, options["start"], options["end"])

    def of_pixels(x0: Tensor, level: Level) -> Tensor:
        if options["through"] == "preview":
            return judge(coloured(x0, family.latent), level)
        with residency.use("decoder", dtype=sloped) as modules:
            return judge(rendered(modules["vae"], x0, family.latent, call=family.vae_decode), level)

    shown: Callable[[Tensor, Level], Tensor] = of_pixels if seen_by(judge) == "pixels" else judge
    return classified(denoise, shown, scale=options["scale"], of="x" if seen_by(judge) == "x" else "x0", active=active)
