"""Multistep samplers that keep past noise: Adams-Bashforth methods on the estimate eps = (x - alpha * x0) / sigma.

Knows levels and a denoiser. Does not know families, prompts, guidance, seeds or devices. What a sampler is given is told in `steps`.

In y = x / alpha and r = sigma / alpha the ODE is dy = eps dr, so a step is y' = y + sum of w_j * eps_j with weights that add up to r' - r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from torch import Tensor

from latentgen.diffusion.level import Denoiser, Level
from latentgen.diffusion.samplers.steps import Noise, Step, advance, first_order, path_of, ratio, transitions

# Adams and Bashforth's weights for even steps, the newest first
_EVEN = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise) -> Iterator[Step]:
    """PLMS: PNDM's linear multistep of order 4 (Liu et al. 2022, PNDM, eq. 12), with one step of Heun's to begin with, as in latent diffusion."""
    past: list[Tensor] = []
    for index, now, then in transitions(x, levels):
        x0 = denoise(x, now)
        if first_order(now, then):
            x = advance(x, x0, now, then)
        else:
            past = [_eps(x, x0, now), *past[:3]]
            weights, slopes = _EVEN[len(past) - 1], past
            if len(past) == 1:
                ahead = advance(x, x0, now, then)
                weights, slopes = (0.5, 0.5), [past[0], _eps(ahead, denoise(ahead, then), then)]
            x = _moved(x, x0, now, then, weights, slopes)
        yield Step(index, len(levels) - 1, now, x0, x)


def pndm(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise) -> Iterator[Step]:
    """PNDM (Liu et al. 2022, algorithm 2): three pseudo Runge-Kutta steps of four evaluations, halved in the path's position, then as `plms`."""
    past: list[Tensor] = []
    for index, now, then in transitions(x, levels):
        x0 = denoise(x, now)
        if first_order(now, then):
            x = advance(x, x0, now, then)
        else:
            past = [_eps(x, x0, now), *past[:3]]
            if len(past) < 4:
                middle, slope, slopes = _halfway(levels, now, then), past[0], [past[0]]
                for level in (middle, middle, then):
                    ahead = _moved(x, x0, now, level, (0.0, 1.0), [past[0], slope])
                    slope = _eps(ahead, denoise(ahead, level), level)
                    slopes.append(slope)
                x = _moved(x, x0, now, then, (1 / 6, 1 / 3, 1 / 3, 1 / 6), slopes)
            else:
                x = _moved(x, x0, now, then, _EVEN[3], past)
        yield Step(index, len(levels) - 1, now, x0, x)


def ipndm(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, order: int = 4) -> Iterator[Step]:
    """Improved PNDM (Zhang & Chen 2023, DEIS, section 3.3): as `plms`, begun with lower orders instead of more evaluations."""
    return _adams(denoise, x, levels, order, lambda nodes, then: [weight * (ratio(then) - nodes[0]) for weight in _EVEN[len(nodes) - 1]])


def lms(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, order: int = 4) -> Iterator[Step]:
    """k-diffusion's linear multistep: eps as the polynomial in sigma / alpha through the last answers, integrated exactly."""
    return _adams(denoise, x, levels, order, lambda nodes, then: integrals(nodes, nodes[0], ratio(then), lambda r: 1.0))


def deis(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, order: int = 3) -> Iterator[Step]:
    """DEIS (Zhang & Chen 2023, eq. 15), the log-rho kind of diffusers: eps as a polynomial in log(sigma / alpha), integrated exactly."""
    return _adams(denoise, x, levels, order,
                  lambda nodes, then: integrals([math.log(r) for r in nodes], math.log(nodes[0]), -then.half_log_snr, math.exp))


def _adams(denoise: Denoiser, x: Tensor, levels: Sequence[Level], order: int,
           weigh: Callable[[Sequence[float], Level], Sequence[float]]) -> Iterator[Step]:
    """weigh: (ratios of this level and of those before it, the next level) -> the weight of the eps at each."""
    past: list[tuple[Tensor, float]] = []
    for index, now, then in transitions(x, levels):
        x0 = denoise(x, now)
        if first_order(now, then):
            x = advance(x, x0, now, then)
        else:
            past = [(_eps(x, x0, now), ratio(now)), *past[: order - 1]]
            x = _moved(x, x0, now, then, weigh([r for _, r in past], then), [eps for eps, _ in past], relative=False)
        yield Step(index, len(levels) - 1, now, x0, x)


def _eps(x: Tensor, x0: Tensor, level: Level) -> Tensor:
    return (x - level.alpha * x0) / level.sigma


def _moved(x: Tensor, x0: Tensor, now: Level, then: Level, weights: Sequence[float], slopes: Sequence[Tensor], *, relative: bool = True) -> Tensor:
    """y' = y + sum of w_j * eps_j, as the first-order step and what differs from it: nothing large cancels where alpha is small.

    weights: they add up to r' - r, or with `relative` to 1. slopes: the first is the eps of x0.
    """
    unit = then.alpha * (ratio(then) - ratio(now) if relative else 1.0)
    x = advance(x, x0, now, then)
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        x = x + unit * weight * (slope - slopes[0])
    return x


def _halfway(levels: Sequence[Level], now: Level, then: Level) -> Level:
    """The level halfway between two in the position on the path."""
    path = path_of(levels)
    return path.at((path.find(now.half_log_snr) + path.find(then.half_log_snr)) / 2)


def integrals(nodes: Sequence[float], low: float, high: float, density: Callable[[float], float]) -> list[float]:
    """The integral from low to high of density times each of the Lagrange polynomials of the nodes."""
    middle, half = (low + high) / 2, (high - low) / 2
    found = [0.0] * len(nodes)
    for place, weight in gauss_legendre(16):
        u = middle + half * place
        for j, node in enumerate(nodes):
            shape = math.prod((u - other) / (node - other) for m, other in enumerate(nodes) if m != j)
            found[j] += half * weight * density(u) * shape
    return found


@cache
def gauss_legendre(count: int) -> tuple[tuple[float, float], ...]:
    """(place, weight) of Gauss and Legendre's rule on [-1, 1]: exact for polynomials of degree below 2 * count."""
    found = []
    for i in range(count):
        place = math.cos(math.pi * (i + 0.75) / (count + 0.5))
        for _ in range(50):  # Newton's method, which needs about five
            before, value = 1.0, place
            for n in range(2, count + 1):
                before, value = value, ((2 * n - 1) * place * value - (n - 1) * before) / n
            slope = count * (place * value - before) / (place * place - 1)
            step = value / slope
            place -= step
            if abs(step) < 1e-16:
                break
        found.append((place, 2 / ((1 - place * place) * slope * slope)))
    return tuple(found)
