"""Guidance by a gradient: a classifier's, or of anything else that says how likely a picture is. Knows x, x0 and levels; knows no network and no
words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from latentgen.diffusion.level import Denoiser, Level
from latentgen.errors import RequestError

Classifier = Callable[[Tensor, Level], Tensor]  # (x or x0 (B, C, h, w), level) -> log p(y | it), (B,), differentiable


def classified(denoise: Denoiser, log_p: Classifier, *, scale: float, of: Literal["x", "x0"] = "x",
               active: Callable[[Level], bool] = lambda level: True) -> Denoiser:
    """Classifier guidance (Dhariwal & Nichol 2021, algorithm 2): eps' = eps - scale * sigma * d/dx log p(y | x), told in x0 for any path.

    scale: 1 is Bayes' rule.
    of: "x" is the paper's: a classifier of noisy latents, x0' = x0 + scale * sigma² / alpha * d/dx log p. It is left out at alpha = 0, where x
        says nothing of y. "x0" is for a judge of clean pictures, who is shown the estimate: the network is not asked for its own slope, which is
        taken as that of data with spread 1, alpha / (alpha² + sigma²), so x0' = x0 + scale * sigma² / (alpha² + sigma²) * d/dx0 log p.
    active: where it acts.

    Raises RequestError, when it is called, for an answer that is not (B,) numbers which depend on what was given.
    """

    def denoise_classified(x: Tensor, level: Level) -> Tensor:
        x0 = denoise(x, level)
        if not active(level) or (of == "x" and level.alpha == 0):
            return x0
        slope = _slope(log_p, x if of == "x" else x0, level)
        reach = level.sigma**2 / level.alpha if of == "x" else level.sigma**2 / (level.alpha**2 + level.sigma**2)
        return x0 + (scale * reach) * slope.to(x0)

    return denoise_classified


def _slope(log_p: Classifier, at: Tensor, level: Level) -> Tensor:
    """d log p / d at, of each picture by itself."""
    with torch.enable_grad():
        shown = at.detach().requires_grad_()
        said = log_p(shown, level)
        if not isinstance(said, Tensor) or said.shape != at.shape[:1]:
            what = f"a tensor {tuple(said.shape)}" if isinstance(said, Tensor) else f"a {type(said).__name__}"
            raise RequestError(f"the classifier gave {what}: expected log p of each picture, a tensor ({len(at)},).")
        if not said.requires_grad:
            raise RequestError("the classifier's answer has no gradient: compute it with torch from what it is given, without detach() or no_grad().")
        (slope,) = torch.autograd.grad(said.sum(), shown, allow_unused=True)
    if slope is None:
        raise RequestError("the classifier's answer does not depend on the latents that it is given: compute it from them.")
    return slope
