"""The formulas of spacings: positions, ratios and tables. Knows paths and numbers; `schedule.spacing` says which name stands for what.

"ratio" is sigma / alpha. Functions give `steps` values, the noisiest first, without the clean end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from latentgen.diffusion.level import Level, NoisePath, RectifiedFlow, VarianceExploding, VariancePreserving
from latentgen.errors import RequestError

RHO = {"karras": 7.0, "polyexponential": 1.0}  # Karras et al. 2022, eq. 5; k-diffusion
LINEAR_SHARE, BETA = 0.025, 0.6  # as ComfyUI has them: noise taken by the linear half; both shapes of the distribution

# Sabour et al. 2024, "Align Your Steps": training timesteps of their 10 steps, and the ratios of the video model
AYS_TIMES = {
    "ays": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),  # made for Stable Diffusion 1.5
    "ays_xl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),  # made for SDXL
}
AYS_VIDEO = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)  # made for Stable Video Diffusion
AYS_TABLE = (1000, 0.00085, 0.012)  # the scaled-linear table of both image models


def ramp(name: str, path: NoisePath, steps: int, rho: float | None) -> list[Level]:
    """Levels even in a function of the ratio, between the path's ends s = 1 and s = 1/T, which are met exactly.

    Where s = 1 has alpha = 0, its ratio is infinite: the ramp is then laid from s = 1 - 1/T, and its first level put back to s = 1.
    """
    first, last = path.at(1.0), path.at(1 / path.train_steps)
    noisy = first if first.alpha > 0 else path.at(1 - 1 / path.train_steps)
    high, low = -noisy.half_log_snr, -last.half_log_snr
    shares = even(1.0, 0.0, steps)
    bend = RHO.get(name, 1.0) if rho is None else rho
    if name == "karras":
        roots = math.exp(high / bend), math.exp(low / bend)
        logs = [bend * math.log(roots[1] + share * (roots[0] - roots[1])) for share in shares]
    elif name == "kl_optimal":
        angles = math.atan(math.exp(high)), math.atan(math.exp(low))
        logs = [math.log(math.tan(share * angles[0] + (1 - share) * angles[1])) for share in shares]
    else:
        logs = [low + share**bend * (high - low) for share in shares]
    return [first, *(path.at(path.find(-log)) for log in logs[1:-1]), last][:steps]


def linear_quadratic(path: NoisePath, steps: int) -> list[Level]:
    """Half of the steps take 2.5 % of the noise evenly, the rest falls as a parabola (Movie Gen, Polyak et al. 2024; LTX-Video).

    In s on a rectified flow, in the ratio elsewhere.
    """
    half = steps // 2
    taken = [LINEAR_SHARE * i / half for i in range(half)]
    if half == 0:
        taken = [0.0]
    else:
        rest, ahead = steps - half, half - LINEAR_SHARE * steps
        curve = ahead / (half * rest**2)
        slope = LINEAR_SHARE / half - 2 * ahead / rest**2
        taken += [curve * i * i + slope * i + curve * half**2 for i in range(half, steps)]
    first = path.at(1.0)
    if isinstance(path, RectifiedFlow):
        return [path.at(1 - share) for share in taken]
    high = (first if first.alpha > 0 else path.at(1 - 1 / path.train_steps)).half_log_snr
    return [first, *(path.at(path.find(high - math.log(1 - share))) for share in taken[1:])]


def align_your_steps(name: str, path: NoisePath, steps: int, table: Sequence[float]) -> list[Level]:
    """The published levels of Sabour et al. 2024, whose logarithms are interpolated for other counts of steps than their 10.

    table: alphas_bar of the image models. Raises RequestError for a path that the levels were not made for.
    """
    if name == "ays_video":
        if not (isinstance(path, VarianceExploding) and math.isclose(path.sigma_max, AYS_VIDEO[0], rel_tol=1e-3)):
            raise RequestError(f"{name} spacing was made for a video model with sigmas from 0.002 to 700, "
                               f"not for this {type(path).__name__}: use karras.")
        logs = [math.log(sigma) for sigma in AYS_VIDEO]
    else:
        made_for = isinstance(path, VariancePreserving) and len(path.alphas_bar) == len(table) and all(
            math.isclose(a, b, rel_tol=1e-2) for a, b in zip(path.alphas_bar[::111], table[::111], strict=True))
        if not made_for or not isinstance(path, VariancePreserving):
            raise RequestError(f"{name} spacing was made for models with 1000 timesteps of scaled-linear noise from 0.00085 to 0.012, and this one "
                               "has another schedule: use karras or trailing spacing.")
        if steps == len(AYS_TIMES[name]):
            return [path.at_time(t) for t in AYS_TIMES[name]]
        logs = [-path.at_time(t).half_log_snr for t in (*AYS_TIMES[name], 0)]
    found = []
    for i in range(steps):
        place = i * (len(logs) - 1) / steps
        j = math.floor(place)
        found.append(logs[j] + (place - j) * (logs[j + 1] - logs[j]))
    return [path.at(path.find(-log)) for log in found]


def beta_times(train_steps: int, steps: int, *, whole: bool) -> list[float]:
    """Timesteps at even quantiles of a Beta(0.6, 0.6) distribution (Lee et al. 2024, "Beta Sampling is All You Need").

    whole: rounded, as ComfyUI does, where that leaves them distinct.
    """
    times = [(train_steps - 1) * beta_quantile(1 - i / steps, BETA, BETA) for i in range(steps)]
    rounded = [float(round(t)) for t in times]
    return rounded if whole and all(a > b for a, b in pairwise(rounded)) else times


def beta_quantile(share: float, a: float, b: float) -> float:
    """The x in [0, 1] below which a share of the Beta(a, b) distribution lies, by bisection: about 1e-15."""
    if share <= 0 or share >= 1:
        return float(share >= 1)
    low, high = 0.0, 1.0
    while True:
        x = (low + high) / 2
        if x in (low, high):
            return x
        low, high = (x, high) if beta_share(x, a, b) < share else (low, x)


def beta_share(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz's method), for x in (0, 1)."""
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_share(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 200):
        for term in (m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)), -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))):
            c, d = 1 + term / c, 1 / (1 + term * d)
            value *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return front * value


def even(start: float, stop: float, count: int) -> list[float]:
    """count numbers from start to stop, both included; start alone for one."""
    if count == 1:
        return [start]
    return [start + i * ((stop - start) / (count - 1)) for i in range(count - 1)] + [stop]


def from_values(values: Sequence[float], what: str, to_level: Callable[[float], Level], *, table: bool = False) -> list[Level]:
    """A level for each value that someone gave; RequestError unless they fall and lie on the path.

    table: 0 is a timestep like any other. Elsewhere it is the clean level, which is left out at the end.
    """
    given = [float(value) for value in values]
    given = given[:-1] if len(given) > 1 and given[-1] == 0 and not table else given
    if not given or not all(math.isfinite(value) and (value > 0 or table) for value in given) or not all(a > b for a, b in pairwise(given)):
        raise RequestError(f"{what} hold {len(given)} numbers that do not fall strictly: give the noisiest first, "
                           "each below the one before, above 0.")
    return [to_level(value) for value in given]
