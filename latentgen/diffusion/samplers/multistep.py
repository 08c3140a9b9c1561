"""Multistep samplers that keep past x0: exponential integrators in lambda = log(alpha / sigma).

Knows levels and a denoiser. Does not know families, prompts, guidance, seeds or devices. What a sampler is given is told in `steps`.

Each puts for x0 a mean of x0 over the coming step, from the line or parabola through the last answers; where there is none (in the first
step, after a level with alpha = 0, in a step to sigma' = 0) it is the last answer itself. h is the step in lambda, q = exp(-h).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from latentgen.diffusion.level import Denoiser, Level
from latentgen.diffusion.samplers.adams import gauss_legendre, integrals
from latentgen.diffusion.samplers.steps import Noise, Step, advance, ancestral, fall, first_order, ratio, transitions

Past = list[tuple[Tensor, float]]  # (x0, lambda) of the levels seen, the newest first


def dpmpp_2m(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, DPM-Solver++, algorithm 2): x0 extrapolated from the last two answers. Second order, one evaluation."""
    return dpmpp_2m_sde(denoise, x, levels, noise=noise, eta=0.0)


def dpmpp_2m_sde(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, eta: float = 1.0, s_noise: float = 1.0,
                 solver: str = "midpoint") -> Iterator[Step]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, DPM-Solver++), as in k-diffusion: keep = exp(-eta h). eta: 0 is DPM++ 2M, 1 has the noise of DDPM.

    solver: where on the line through the last two answers x0 is taken: "midpoint", or "heun" for its exact mean.
    """
    past: Past = []
    for index, now, then in transitions(x, levels):
        x0 = x0_mean = denoise(x, now)
        if past and not first_order(now, then):
            h, h_past = then.half_log_snr - now.half_log_snr, now.half_log_snr - past[0][1]
            x0_mean = x0 + (0.5 if solver == "midpoint" else _share(h * (1 + eta))) * h / h_past * (x0 - past[0][0])
        x = advance(x, x0_mean, now, then, keep=fall(now, then) ** eta, noise=noise, s_noise=s_noise)
        past = _remembered(past, x0, now, 0)
        yield Step(index, len(levels) - 1, now, x0, x)


def dpmpp_3m_sde(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, eta: float = 1.0, s_noise: float = 1.0) -> Iterator[Step]:
    """k-diffusion's DPM++ 3M SDE: the parabola through the last three answers. At eta 0 that is DPM-Solver++(3M) of Lu et al. 2022.

    As published its term of second order has half the weight it would need, so that its order is 2, not 3.
    """
    past: Past = []
    for index, now, then in transitions(x, levels):
        x0 = x0_mean = denoise(x, now)
        if past and not first_order(now, then):
            h = then.half_log_snr - now.half_log_snr
            wide, spans = h * (1 + eta), [(a[1] - b[1]) / h for a, b in zip([(x0, now.half_log_snr), *past], past, strict=False)]
            first, second = (x0 - past[0][0]) / spans[0], 0.0
            if len(past) == 2:
                bend = first - (past[0][0] - past[1][0]) / spans[1]
                first, second = first + bend * (spans[0] / sum(spans)), bend / sum(spans)
            phi_2 = math.expm1(-wide) / wide + 1
            x0_mean = x0 - (phi_2 * first - (phi_2 / wide - 0.5) * second) / math.expm1(-wide)
        x = advance(x, x0_mean, now, then, keep=fall(now, then) ** eta, noise=noise, s_noise=s_noise)
        past = _remembered(past, x0, now, 1)
        yield Step(index, len(levels) - 1, now, x0, x)


def res_multistep(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, eta: float = 0.0, s_noise: float = 1.0) -> Iterator[Step]:
    """The refined exponential solver RES(2M) (Zhang et al. 2023, "Improved order analysis", table 1), with an ancestral step for eta above 0.

    At eta 0 it is DPM++ 2M with the exact mean of the line. Above, as in ComfyUI, it steps to sigma_down, and measures the past step to there.
    """
    past: tuple[Tensor, float] | None = None  # the last x0, and how long in lambda its step was
    for index, now, then in transitions(x, levels):
        x0 = x0_mean = denoise(x, now)
        keep = ancestral(now, then, eta)
        if first_order(now, then):
            past = None
        else:
            h = then.half_log_snr - math.log(keep) - now.half_log_snr
            if past is not None:
                x0_mean = x0 + _share(h) * h / past[1] * (x0 - past[0])
            past = x0, h
        x = advance(x, x0_mean, now, then, keep=keep, noise=noise, s_noise=s_noise)
        yield Step(index, len(levels) - 1, now, x0, x)


def unipc(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, order: int = 2, variant: str = "bh2") -> Iterator[Step]:
    """UniPC (Zhao et al. 2023, algorithms 1 and 2, on x0): each answer first corrects the step that led to it, then predicts the next.

    variant: B(h) = h ("bh1") or exp(h) - 1 ("bh2"). The last steps are of lower order, as in the authors' code.
    """
    past: Past = []
    before: tuple[Tensor, Level, Past] | None = None
    for index, now, then in transitions(x, levels):
        x0 = denoise(x, now)
        if before is not None:
            x_last, last, used = before
            x = advance(x_last, _unified(used, now, variant, x0), last, now)
        past = _remembered(past, x0, now, order - 1) or [(x0, now.half_log_snr)]
        used = past[: min(order, len(levels) - 1 - index)]
        before = x, now, used
        x = advance(x, _unified(used, then, variant), now, then)
        yield Step(index, len(levels) - 1, now, x0, x)


def _unified(past: Past, then: Level, variant: str, answer: Tensor | None = None) -> Tensor:
    """The mean of x0 on the way to `then`, by UniP from the past, or with the answer found there by UniC (Zhao et al. 2023, eq. 3-8)."""
    (x0, here), older = past[0], past[1:]
    h = then.half_log_snr - here
    if math.isinf(h):
        return x0 if answer is None else x0 + 0.5 * (answer - x0)
    places = [(there - here) / h for _, there in older] + ([] if answer is None else [1.0])
    slopes = [(value - x0) / place for (value, _), place in zip(older, places, strict=False)] + ([] if answer is None else [answer - x0])
    if not places:
        return x0
    scale = -h if variant == "bh1" else math.expm1(-h)
    sides, phi = [], math.expm1(-h) / -h - 1  # phi_2, phi_3, ... times h
    for k in range(1, len(places) + 1):
        sides.append(phi * math.factorial(k) / scale)
        phi = phi / -h - 1 / math.factorial(k + 1)
    rows = torch.tensor([[place**k for place in places] for k in range(len(places))], dtype=torch.float64)
    weights = [0.5] if len(places) == 1 else torch.linalg.solve(rows, torch.tensor(sides, dtype=torch.float64)).tolist()
    return x0 + scale / math.expm1(-h) * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))


def sa_solver(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, predictor_order: int = 2, corrector_order: int = 2,
              tau: float = 1.0, s_tmin: float = 0.0, s_tmax: float = math.inf) -> Iterator[Step]:
    """SA-Solver (Xue et al. 2023, algorithm 1): stochastic Adams methods, each answer first correcting the step that led to it.

    corrector_order: how many answers the corrector takes, the new one included; 0 has none. tau: 0 is the ODE, 1 the SDE of DDPM, between
    the ratios s_tmin and s_tmax; the ODE elsewhere. One draw in a step with tau above 0, used by predictor and corrector alike.
    """
    past: Past = []
    before: tuple[Tensor, Level, float, Tensor | None] | None = None
    keep_past = max(predictor_order, corrector_order - 1) - 1
    for index, now, then in transitions(x, levels):
        x0, left = denoise(x, now), len(levels) - 1 - index
        if before is not None and corrector_order > 0 and past:
            x_last, last, last_tau, z = before
            x = _adams_step(x_last, [(x0, now.half_log_snr), *past][: min(corrector_order, left + 2)], last, now, last_tau, z)
        past = _remembered(past, x0, now, keep_past) or [(x0, now.half_log_snr)]
        now_tau = tau if s_tmin <= ratio(now) <= s_tmax else 0.0
        z = noise().to(x) if now_tau > 0 and then.sigma > 0 else None
        before = (x, now, now_tau, z) if now.alpha > 0 else None
        x = _adams_step(x, past[: min(predictor_order, left)], now, then, now_tau, z)
        if now.alpha == 0:
            past = []
        yield Step(index, len(levels) - 1, now, x0, x)


def _adams_step(x: Tensor, past: Past, now: Level, then: Level, tau: float, z: Tensor | None) -> Tensor:
    """From one level to the next with the polynomial through `past`, which is integrated exactly (Xue et al. 2023, eq. 14 and 17).

    For two answers the authors' code takes h² / 2 instead of the exact integral of the slope, which changes no order; so does this.
    """
    rate, x0_mean = 1 + tau * tau, past[0][0]
    if not first_order(now, then) and len(past) > 1:
        here, there = now.half_log_snr, then.half_log_snr
        total = -math.expm1(-rate * (there - here))
        if len(past) == 2:
            (a, at_a), (b, at_b) = past
            x0_mean = (a if at_a == here else b) + rate * (there - here) ** 2 / (2 * total * (at_a - at_b)) * (a - b)
        else:
            weights = integrals([at for _, at in past], here, there, lambda at: rate * math.exp(rate * (at - there)))
            x0_mean = past[0][0] + sum(weight / total * (value - past[0][0]) for weight, (value, _) in zip(weights[1:], past[1:], strict=True))
    keep = fall(now, then) ** (tau * tau)
    return advance(x, x0_mean, now, then, keep=keep, noise=None if z is None else lambda: z)


def er_sde(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, order: int = 3, s_noise: float = 1.0) -> Iterator[Step]:
    """ER-SDE-Solver of order 1 to 3 (Cui et al. 2023, eq. 14, 23 and 25), with the authors' noise scale ER-SDE 5: r (exp(r^0.3) + 10).

    r = sigma / alpha. The integrals that the authors' code sums over 200 points are taken exactly.
    """
    past: list[tuple[Tensor, float]] = []  # (x0, r), the newest first
    slope_past: Tensor | None = None
    for index, now, then in transitions(x, levels):
        x0 = x0_mean = denoise(x, now)
        slope, keep = None, 0.0 if first_order(now, then) else math.exp(_log_tail(ratio(then)) - _log_tail(ratio(now)))
        if past and not first_order(now, then):
            r, r_then = ratio(now), ratio(then)
            slope = (x0 - past[0][0]) / (r - past[0][1])
            scale = r_then * math.exp(_log_tail(r_then))
            more = (r_then - r + scale * _scale_integral(r, r_then, 0.0)) * slope
            if slope_past is not None:
                bend = (slope - slope_past) / ((r - past[1][1]) / 2)
                more = more + ((r_then - r) ** 2 / 2 + scale * _scale_integral(r, r_then, 1.0)) * bend
            x0_mean = x0 + more / (1 - keep * r_then / r)
        x = advance(x, x0_mean, now, then, keep=keep, noise=noise, s_noise=s_noise)
        slope_past = slope if order > 2 else None
        past = [(x0, ratio(now)), *past[:1]] if order > 1 and now.alpha > 0 else []
        yield Step(index, len(levels) - 1, now, x0, x)


def _log_tail(r: float) -> float:
    """log(exp(r^0.3) + 10), which cannot overflow."""
    return r**0.3 + math.log1p(10 * math.exp(-(r**0.3)))


def _scale_integral(high: float, low: float, power: float) -> float:
    """The integral from low to high of (r - high)^power / (r (exp(r^0.3) + 10)), taken in log r."""
    middle, half = (math.log(high) + math.log(low)) / 2, (math.log(high) - math.log(low)) / 2
    places = [(math.exp(middle + half * place), weight) for place, weight in gauss_legendre(16)]
    return half * sum(weight * (r - high) ** power * math.exp(-_log_tail(r)) for r, weight in places)


def _share(h: float) -> float:
    """Where on the way the exact mean of a line lies: 1 / (1 - exp(-h)) - 1 / h, which is 1/2 for small h."""
    return 0.5 + h / 12 if h < 1e-4 else -1 / math.expm1(-h) - 1 / h


def _remembered(past: Past, x0: Tensor, now: Level, older: int) -> Past:
    """The past with this answer in front of at most `older` others; nothing of a level with alpha = 0."""
    return [(x0, now.half_log_snr), *(seen for seen in past[:older] if math.isfinite(seen[1]))] if now.alpha > 0 else []
