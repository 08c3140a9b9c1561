"""Samplers without a history: one evaluation in a step, or several within it.

Knows levels and a denoiser. Does not know families, prompts, guidance, seeds or devices. What a sampler is given is told in `steps`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from latentgen.diffusion.level import Denoiser, Level, VariancePreserving
from latentgen.diffusion.samplers.steps import (
    Noise,
    Step,
    advance,
    ancestral,
    between,
    churned,
    fall,
    first_order,
    path_of,
    ratio,
    renoised,
    transitions,
)
from latentgen.errors import RequestError


def euler(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, s_churn: float = 0.0, s_tmin: float = 0.0,
          s_tmax: float = math.inf, s_noise: float = 1.0) -> Iterator[Step]:
    """Euler's method for the probability-flow ODE (Karras et al. 2022, algorithm 2 without its correction; Liu et al. 2022).

    In x / alpha against sigma / alpha, in the straight coordinates of a flow, and as DDIM: always the same step.
    """
    for index, now, then in transitions(x, levels):
        x, now = churned(x, now, levels, noise, (s_churn, s_tmin, s_tmax, s_noise))
        x0 = denoise(x, now)
        x = advance(x, x0, now, then)
        yield Step(index, len(levels) - 1, now, x0, x)


def ddim(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, eta: float = 0.0, s_noise: float = 1.0) -> Iterator[Step]:
    """DDIM (Song et al. 2021, eq. 12 and 16). eta: 0 is deterministic (Euler), 1 is ancestral (DDPM)."""
    for index, now, then in transitions(x, levels):
        x0 = denoise(x, now)
        x = advance(x, x0, now, then, keep=ancestral(now, then, eta), noise=noise, s_noise=s_noise)
        yield Step(index, len(levels) - 1, now, x0, x)


def ddpm(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise) -> Iterator[Step]:
    """Ancestral sampling: x' drawn from q(x' | x, x0) (Ho et al. 2020, eq. 6-7, with the smaller of its two variances)."""
    return ddim(denoise, x, levels, noise=noise, eta=1.0)


def euler_ancestral(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, eta: float = 1.0, s_noise: float = 1.0) -> Iterator[Step]:
    """k-diffusion's ancestral Euler: down to sigma_down, then noise of sigma_up. Multiplied out, that is DDIM's step on any path."""
    return ddim(denoise, x, levels, noise=noise, eta=eta, s_noise=s_noise)


def consistency(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, s_min: float = 0.002, s_noise: float = 1.0) -> Iterator[Step]:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): x0, then noise up to the next level. One step is x0 itself.

    s_min: the ratio at which the model was taught to stop (the paper's epsilon): the noise added has variance ratio'² - s_min².
    """
    for index, now, then in transitions(x, levels):
        x0 = denoise(x, now)
        x = then.alpha * x0
        fresh = s_noise * math.sqrt(max(0.0, then.sigma**2 - (then.alpha * s_min) ** 2))
        if fresh > 0:
            x = x + fresh * noise().to(x)
        yield Step(index, len(levels) - 1, now, x0, x)


def lcm(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise) -> Iterator[Step]:
    """Multistep consistency sampling for latent consistency models (Luo et al. 2023): all of sigma' is drawn afresh.

    Their boundary scalings c_skip and c_out belong to the network's row; they differ from 0 and 1 by less than 1e-5 from timestep 19
    on, the first that such a model is trained at.
    """
    return consistency(denoise, x, levels, noise=noise, s_min=0.0)


def tcd(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, gamma: float = 0.3) -> Iterator[Step]:
    """Strategic stochastic sampling of trajectory consistency distillation (Zheng et al. 2024, algorithm 4).

    Each step goes down past its target, to (1 - gamma) of the target's time, and comes back up by fresh noise. gamma: 0 is Euler.
    """
    for index, now, then in transitions(x, levels):
        x0 = denoise(x, now)
        below = then if gamma == 0 or then.sigma == 0 else _earlier(levels, then, 1 - gamma)
        x = advance(x, x0, now, below)
        if below is not then:
            x = renoised(x, below, then, noise)
        yield Step(index, len(levels) - 1, now, x0, x)


def _earlier(levels: Sequence[Level], level: Level, share: float) -> Level:
    """The level at a share of this one's time: on a table the whole timestep below it, else of the path's position."""
    path = path_of(levels)
    if isinstance(path, VariancePreserving):
        return path.at_time(math.floor(share * level.time))
    return path.at(share * path.find(level.half_log_snr))


def heun(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, variable: str = "sigma", s_churn: float = 0.0,
         s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0) -> Iterator[Step]:
    """Heun's method (Karras et al. 2022, algorithms 1 and 2): an Euler step, then the trapezoid rule. Second order, two evaluations.

    variable: "sigma", the rule on dx = x0 dalpha + eps dsigma: EDM's Heun where alpha = 1 and Heun in t on a rectified flow; "ratio" runs
    it on x / alpha in sigma / alpha, as k-diffusion and diffusers do on variance-preserving models (less exact, and first order in a step
    from alpha = 0).
    """
    for index, now, then in transitions(x, levels):
        x, now = churned(x, now, levels, noise, (s_churn, s_tmin, s_tmax, s_noise))
        x0, x = _trapezoid(denoise, x, now, then, variable)
        yield Step(index, len(levels) - 1, now, x0, x)


def _trapezoid(denoise: Denoiser, x: Tensor, now: Level, then: Level, variable: str) -> tuple[Tensor, Tensor]:
    """(x0, x') of one step of Heun's method: the first-order step with x0 + (x0' - x0) * sigma / (2 sigma') for x0."""
    x0 = x0_mean = denoise(x, now)
    shrink = fall(now, then) if variable == "ratio" else then.sigma / now.sigma
    if shrink > 0:
        x0_mean = x0 + (denoise(advance(x, x0, now, then), then) - x0) / (2 * shrink)
    return x0, advance(x, x0_mean, now, then)


def restart(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, times: int = 2, inner: int = 4, s_low: float = 0.1,
            s_high: float = 2.0) -> Iterator[Step]:
    """Restart sampling (Xu et al. 2023, algorithm 1): Heun, and on reaching ratio s_low `times` times back up to s_high by noise, and down again.

    The way back down takes `inner` Heun steps, even in the 7th root of the ratio, within the step that reached s_low. One draw for each restart.
    Where the run begins below s_high, its first level stands for it. Raises RequestError where no level lies near enough to s_low.
    """
    low = min((level for level in levels[1:] if level.sigma > 0), key=lambda level: abs(math.log(ratio(level) / s_low)), default=None)
    for index, now, then in transitions(x, levels):
        if low is None or ratio(low) >= s_high or s_low >= s_high:
            raise RequestError(f"restart goes from sigma / alpha near {s_low:g} back up to {s_high:g}, "
                               f"and none of these {len(levels) - 1} steps ends "
                               "between them: use more steps, or set s_low below s_high and both within the run.")
        x0, x = _trapezoid(denoise, x, now, then, "ratio")
        if then is low:
            up = between(levels, max(levels[0].half_log_snr, -math.log(s_high)))
            ends = [ratio(level) ** (1 / 7) for level in (up, then)]
            way = [up, *(between(levels, -7 * math.log(ends[0] + (ends[1] - ends[0]) * i / inner)) for i in range(1, inner)), then]
            for _ in range(times):
                x = renoised(x, then, up, noise)
                for higher, lower in pairwise(way):
                    x0, x = _trapezoid(denoise, x, higher, lower, "ratio")
        yield Step(index, len(levels) - 1, now, x0, x)


def dpm2(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, s_churn: float = 0.0, s_tmin: float = 0.0,
         s_tmax: float = math.inf, s_noise: float = 1.0) -> Iterator[Step]:
    """DPM-Solver-2 as in k-diffusion (Lu et al. 2022; Karras et al. 2022): the slope is asked at the middle in log sigma. Second order."""
    for index, now, then in transitions(x, levels):
        x, now = churned(x, now, levels, noise, (s_churn, s_tmin, s_tmax, s_noise))
        x0 = x0_mean = denoise(x, now)
        if not first_order(now, then):
            x0_mean = _midpoint_slope(denoise, x, x0, now, between(levels, (now.half_log_snr + then.half_log_snr) / 2))
        x = advance(x, x0_mean, now, then)
        yield Step(index, len(levels) - 1, now, x0, x)


def dpm2_ancestral(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, eta: float = 1.0, s_noise: float = 1.0) -> Iterator[Step]:
    """k-diffusion's ancestral DPM2: the step of `dpm2` to sigma_down, then noise."""
    for index, now, then in transitions(x, levels):
        x0 = x0_mean = denoise(x, now)
        keep = ancestral(now, then, eta)
        if not first_order(now, then):
            down = then.half_log_snr - math.log(keep)
            x0_mean = _midpoint_slope(denoise, x, x0, now, between(levels, (now.half_log_snr + down) / 2))
        x = advance(x, x0_mean, now, then, keep=keep, noise=noise, s_noise=s_noise)
        yield Step(index, len(levels) - 1, now, x0, x)


def _midpoint_slope(denoise: Denoiser, x: Tensor, x0: Tensor, now: Level, middle: Level) -> Tensor:
    """The x0 whose first-order step has the slope d(x / alpha) / d(sigma / alpha) found at the middle level."""
    return x0 + (denoise(advance(x, x0, now, middle), middle) - x0) / fall(now, middle)


def dpmpp_2s_ancestral(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, eta: float = 1.0,
                       s_noise: float = 1.0) -> Iterator[Step]:
    """DPM-Solver++(2S) (Lu et al. 2022, DPM-Solver++, algorithm 1) to k-diffusion's sigma_down, then noise. Second order at eta 0."""
    for index, now, then in transitions(x, levels):
        x0 = x0_middle = denoise(x, now)
        keep = ancestral(now, then, eta)
        if not first_order(now, then):
            middle = between(levels, (now.half_log_snr + then.half_log_snr - math.log(keep)) / 2)
            x0_middle = denoise(advance(x, x0, now, middle), middle)
        x = advance(x, x0_middle, now, then, keep=keep, noise=noise, s_noise=s_noise)
        yield Step(index, len(levels) - 1, now, x0, x)


def dpmpp_sde(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, eta: float = 1.0, s_noise: float = 1.0) -> Iterator[Step]:
    """SDE-DPM-Solver++(2S) as k-diffusion's "DPM++ SDE", with r = 1/2: an ancestral half step, then a whole one with the x0 found there.

    Two draws in a step, z of the first half and z' of the second: the whole step takes both, weighted as increments of one Brownian
    motion in sigma / alpha, which is what k-diffusion's tree gives. A first-order step draws once.
    """
    for index, now, then in transitions(x, levels):
        x0 = denoise(x, now)
        if first_order(now, then):
            x = advance(x, x0, now, then, keep=ancestral(now, then, eta), noise=noise, s_noise=s_noise)
        else:
            middle = between(levels, (now.half_log_snr + then.half_log_snr) / 2)
            drawn = [noise().to(x) for _ in range(2)] if eta > 0 else [x, x]
            x_middle = advance(x, x0, now, middle, keep=ancestral(now, middle, eta), noise=lambda z=drawn[0]: z, s_noise=s_noise)
            share = (ratio(now) - ratio(middle)) / (ratio(now) - ratio(then))
            whole = math.sqrt(share) * drawn[0] + math.sqrt(1 - share) * drawn[1]
            x = advance(x, denoise(x_middle, middle), now, then, keep=ancestral(now, then, eta), noise=lambda z=whole: z, s_noise=s_noise)
        yield Step(index, len(levels) - 1, now, x0, x)
