"""What all samplers share: the first-order step, fresh noise, and levels between those of a run.

Knows levels and tensors. Does not know denoisers, families, prompts, seeds or devices.

Every sampler here is a function (denoise, x, levels, *, noise, ...) -> Iterator[Step], where
  x       (B, C, h, w) at levels[0], float32 (float64 is kept too): the state is never held in half precision
  levels  at least two, each cleaner than the one before; the last may have sigma = 0. Those that ask between the levels, or go back to
          noisier ones, need them as `Levels` (what `spacing` gives), which know their path
  noise   () -> unit normal noise like x, drawn in a fixed order in each step, and never in a step to sigma = 0 that has no inner steps
and, when the first step is asked for, RequestError where x or levels are not so. All take the same first-order step from (alpha, sigma) to
(alpha', sigma'), written without a division by alpha or a logarithm, so that it is exact where alpha = 0 and where sigma' = 0:

    r = keep * sigma' / sigma        x' = r * x + (alpha' - alpha * r) * x0 + sqrt(1 - keep²) * sigma' * noise

They differ in what they put for x0, and in which share `keep` of the noise they keep. A step to sigma' = 0 returns x0 itself, whatever the
sampler; a step from alpha = 0 is first order, and is no part of a history. "ratio" is sigma / alpha, the sigma of k-diffusion and EDM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from latentgen.diffusion.level import Level, NoisePath
from latentgen.diffusion.schedule import Levels
from latentgen.errors import RequestError

Noise = Callable[[], Tensor]


@dataclass(frozen=True)
class Step:
    """What a sampler yields after each of its `total` transitions.

    index: 0 ... total - 1.  level: where the denoiser was asked (levels[index], or noisier after Karras' churn).  x0: its answer there,
    (B, C, h, w).  x: the state after the step, at levels[index + 1]; the last one is the result.
    """

    index: int
    total: int
    level: Level
    x0: Tensor
    x: Tensor


def transitions(x: Tensor, levels: Sequence[Level]) -> Iterator[tuple[int, Level, Level]]:
    """(index, level, next level) of each step, once x and levels are seen to be what every sampler needs."""
    if x.dtype not in (torch.float32, torch.float64):
        raise RequestError(f"x is {x.dtype}: a latent of low precision drifts over the steps, give it in float32.")
    # cross-multiplied, so that alpha = 0 and sigma = 0 need no case of their own
    if len(levels) < 2 or not all(now.alpha * then.sigma < then.alpha * now.sigma for now, then in pairwise(levels)):
        raise RequestError(f"{len(levels)} levels were given: a sampler needs at least two, each cleaner than the one before.")
    for index, (now, then) in enumerate(pairwise(levels)):
        yield index, now, then


def advance(x: Tensor, x0: Tensor, now: Level, then: Level, *, keep: float = 1.0, noise: Noise | None = None, s_noise: float = 1.0) -> Tensor:
    """x' = alpha' * x0 + keep * sigma' * eps + sqrt(1 - keep²) * sigma' * s_noise * fresh noise, eps = (x - alpha * x0) / sigma (DDIM, eq. 12).

    At keep = 1, the deterministic step, no noise is drawn.
    """
    r = then.sigma / now.sigma * keep
    x = r * x + (then.alpha - now.alpha * r) * x0
    fresh = s_noise * then.sigma * math.sqrt((1 - keep) * (1 + keep))
    return x if fresh == 0 or noise is None else x + fresh * noise().to(x)


def fall(now: Level, then: Level) -> float:
    """q = ratio' / ratio = exp(-h) in [0, 1), with h the step in log(alpha / sigma); exactly 0 from alpha = 0 and to sigma' = 0."""
    return now.alpha * then.sigma / (then.alpha * now.sigma)


def ancestral(now: Level, then: Level, eta: float) -> float:
    """The `keep` of an ancestral step (DDIM, eq. 16; sigma_down / sigma' of k-diffusion): at eta = 1 the spread of q(x' | x, x0) on any path."""
    return math.sqrt((1 - eta) * (1 + eta) + (eta * fall(now, then)) ** 2)


def ratio(level: Level) -> float:
    """sigma / alpha; infinite at alpha = 0."""
    return level.sigma / level.alpha if level.alpha > 0 else math.inf


def first_order(now: Level, then: Level) -> bool:
    """Whether log(alpha / sigma) is infinite at an end of the step, where every method falls back to its first order."""
    return now.alpha == 0 or then.sigma == 0


def path_of(levels: Sequence[Level]) -> NoisePath:
    """The path that a run's levels lie on; RequestError where they do not know it."""
    if not isinstance(levels, Levels) or levels.path is None:
        raise RequestError("this sampler asks between the levels, and these do not know their path: "
                           "pass what spacing() gives, or Levels(levels, path).")
    return levels.path


def between(levels: Sequence[Level], half_log_snr: float) -> Level:
    """The level of the run's path with this log(alpha / sigma); never noisier than the path itself."""
    path = path_of(levels)
    return path.at(path.find(half_log_snr))


def renoised(x: Tensor, now: Level, up: Level, noise: Noise, s_noise: float = 1.0) -> Tensor:
    """x taken from a level with alpha > 0 to a noisier one by fresh noise alone: q(x_up | x)."""
    scale = up.alpha / now.alpha
    fresh = up.sigma**2 - (scale * now.sigma) ** 2
    return scale * x + s_noise * math.sqrt(fresh) * noise().to(x) if fresh > 0 else x


def churned(x: Tensor, now: Level, levels: Sequence[Level], noise: Noise, churn: tuple[float, float, float, float]) -> tuple[Tensor, Level]:
    """Karras' churn (Karras et al. 2022, algorithm 2): x and level, with noise added where (s_churn, s_tmin, s_tmax, s_noise) say so.

    s_tmin and s_tmax are ratios. The level is never noisier than its path: at the noisy end nothing is added.
    """
    s_churn, s_tmin, s_tmax, s_noise = churn
    gamma = min(s_churn / (len(levels) - 1), math.sqrt(2) - 1)
    if gamma == 0 or now.alpha == 0 or not s_tmin <= ratio(now) <= s_tmax:
        return x, now
    up = between(levels, now.half_log_snr - math.log1p(gamma))
    if fall(up, now) >= 1:
        return x, now
    return renoised(x, now, up, noise, s_noise), up
