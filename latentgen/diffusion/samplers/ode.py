"""The probability-flow ODE by an embedded Runge-Kutta method of fifth order.

Knows levels and a denoiser. Does not know families, prompts, guidance, seeds or devices. What a sampler is given is told in `steps`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from latentgen.diffusion.level import Denoiser, Level
from latentgen.diffusion.samplers.steps import Noise, Step, advance, between, transitions
from latentgen.errors import RequestError

# Dormand & Prince 1980: where the slopes are asked, what each is asked with, and the difference of the two answers
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
_STAGES = (
    (), (1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9), (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656), (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_MOST = 1000  # tries within one step


def rk45(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, rtol: float = 0.0, atol: float = 1e-5) -> Iterator[Step]:
    """The probability-flow ODE (Song et al. 2021, score SDE, section 4.3) by Dormand and Prince's Runge-Kutta pair of orders 5 and 4.

    It runs in z = x / hypot(alpha, sigma) against the angle atan(sigma / alpha), where every path is dz = (eps cos - x0 sin) dangle:
    finite at alpha = 0. rtol 0: one step of six evaluations from level to level, order 5. Above 0 (the paper: 1e-5): as many steps between
    two levels as keep the error below atol + rtol |z|, in the root mean square of the worst image; then a batch shares its steps.
    A step to sigma' = 0 is x0, one evaluation.
    """
    for index, now, then in transitions(x, levels):
        x0 = denoise(x, now)
        x = advance(x, x0, now, then) if then.sigma == 0 else _between_levels(denoise, x, x0, levels, now, then, rtol, atol)
        yield Step(index, len(levels) - 1, now, x0, x)


def _between_levels(denoise: Denoiser, x: Tensor, x0: Tensor, levels: Sequence[Level], now: Level, then: Level, rtol: float, atol: float) -> Tensor:
    """x' at the next level, in one step (rtol 0) or in as many as the tolerances ask for."""
    angle, end = (math.atan2(level.sigma, level.alpha) for level in (now, then))

    def slope(z: Tensor, at: float) -> Tensor:
        """dz / dangle there; the ends are the run's own levels."""
        level = now if at == start_angle else then if at == end else between(levels, -math.log(math.tan(at)))
        return _slope(z, denoise(z * math.hypot(level.alpha, level.sigma), level), level)

    start_angle, z, step = angle, x / math.hypot(now.alpha, now.sigma), end - angle
    first = _slope(z, x0, now)
    for _ in range(_MOST):
        last = abs(end - angle) <= abs(step) * (1 + 1e-9)
        step = end - angle if last else step
        slopes = [first]
        for node, weights in zip(_NODES[1:], _STAGES[1:-1], strict=True):
            at = end if last and node == 1 else angle + node * step
            slopes.append(slope(_moved(z, slopes, weights, step), at))
        z_next = _moved(z, slopes, _STAGES[-1], step)
        if rtol == 0:
            return z_next * math.hypot(then.alpha, then.sigma)
        slopes.append(slope(z_next, end if last else angle + step))
        error = _moved(torch.zeros_like(z), slopes, _ERROR, step) / (atol + rtol * torch.maximum(z.abs(), z_next.abs()))
        size = float(error.reshape(len(error), -1).square().mean(dim=1).max().sqrt())
        if size <= 1:
            z, angle, first = z_next, angle + step, slopes[-1]
            if last:
                return z * math.hypot(then.alpha, then.sigma)
        step *= min(5.0, max(0.2, 0.9 * max(size, 1e-10) ** -0.2))
    raise RequestError(f"rk45 did not reach rtol {rtol:g} and atol {atol:g} within {_MOST} tries between two levels: "
                       "use larger tolerances, or rtol 0.")


def _slope(z: Tensor, x0: Tensor, level: Level) -> Tensor:
    """eps cos - x0 sin = (z cos - x0) / sin, at a level whose angle has cos and sin proportional to alpha and sigma."""
    size = math.hypot(level.alpha, level.sigma)
    return (z * (level.alpha / size) - x0) / (level.sigma / size)


def _moved(z: Tensor, slopes: Sequence[Tensor], weights: Sequence[float], step: float) -> Tensor:
    return z + step * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)
