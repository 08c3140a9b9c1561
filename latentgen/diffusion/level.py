"""Levels of noise and the paths they lie on.

Knows alpha, sigma and the number a network is told. Does not know samplers, prompts, models, images or devices.

Everywhere in this folder x = alpha * x0 + sigma * eps, in the coordinates the network was trained in. Levels are Python
floats: no scalar ever has to be fetched from a device.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from latentgen.errors import RequestError

PREDICTIONS = ("epsilon", "v", "flow", "x0", "edm")


@dataclass(frozen=True)
class Level:
    """One noise level: x = alpha * x0 + sigma * eps.

    alpha: share of the clean latent, 1 at the clean end and possibly exactly 0 at the noisy one.
    sigma: share of the noise, exactly 0 at the clean end.
    time: what the network is given for this level (a training timestep, perhaps fractional; 1000 * s on a flow).
    """

    alpha: float
    sigma: float
    time: float

    @property
    def half_log_snr(self) -> float:
        """lambda = log(alpha / sigma), as in Lu et al. 2022 (DPM-Solver); +inf where sigma = 0, -inf where alpha = 0."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


# (x, level) -> x0, the estimate of the clean latent: both (B, C, h, w), in the dtype of x (float32). A network that
# runs in half precision is cast inside its denoiser, so that nothing downstream has to know.
Denoiser = Callable[[Tensor, Level], Tensor]


@runtime_checkable
class NoisePath(Protocol):
    """How levels run from clean (s = 0: alpha = 1, sigma = 0) to noise (s = 1), s in [0, 1]."""

    @property
    def train_steps(self) -> int:
        """Number of levels of the training grid s = 1/T, 2/T, ..., 1."""

    def at(self, s: float) -> Level:
        """The level at position s in [0, 1]; RequestError outside."""

    def find(self, half_log_snr: float) -> float:
        """The position s whose level has this log(alpha / sigma), the inverse of `at`; clamped to [0, 1]."""


@dataclass(frozen=True)
class VariancePreserving:
    """alpha² + sigma² = 1 over a table of T training timesteps (Ho et al. 2020, section 2): alphas_bar[t] = alpha(t)².

    The timestep of position s is t = s * T - 1, so s = 1/T is t = 0 and s = 1 is t = T - 1 (the papers count t from 1).
    Between two timesteps log(alpha / sigma) is linear in t, as in k-diffusion; where the noisier of the two has alpha = 0
    (zero terminal SNR) that is infinite, and alpha is linear instead. Below t = 0, sigma / alpha falls linearly to 0.

    Raises RequestError unless alphas_bar falls strictly within (0, 1); its last value alone may be exactly 0.
    """

    alphas_bar: tuple[float, ...]

    def __post_init__(self) -> None:
        table = tuple(float(value) for value in self.alphas_bar)
        object.__setattr__(self, "alphas_bar", table)
        if len(table) < 2 or not (table[0] < 1 and table[-1] >= 0) or not all(a > b for a, b in zip(table, table[1:])):
            raise RequestError(
                f"alphas_bar has {len(table)} values that do not fall strictly from below 1 to at least 0: "
                "give the cumulative products of 1 - beta, one for each training timestep, cleanest first."
            )

    @property
    def train_steps(self) -> int:
        return len(self.alphas_bar)

    def at_time(self, t: float) -> Level:
        """The level of training timestep t in [0, T - 1], which may be fractional; a table entry where t is whole."""
        if not 0 <= t <= self.train_steps - 1:
            raise RequestError(f"timestep {t} is outside the training range: give one from 0 to {self.train_steps - 1}.")
        j = math.floor(t)
        f = t - j
        if f == 0:
            return Level(math.sqrt(self.alphas_bar[j]), math.sqrt(1 - self.alphas_bar[j]), float(t))
        if self.alphas_bar[j + 1] == 0:
            alpha = (1 - f) * math.sqrt(self.alphas_bar[j])
            return Level(alpha, math.sqrt(1 - alpha * alpha), t)
        half_log_snr = (1 - f) * self._half_log_snr(j) + f * self._half_log_snr(j + 1)
        return Level(math.sqrt(expit(2 * half_log_snr)), math.sqrt(expit(-2 * half_log_snr)), t)

    def at(self, s: float) -> Level:
        """The level at position s in [0, 1]: timestep s * T - 1."""
        t = check_position(s) * self.train_steps - 1
        if t >= 0:
            return self.at_time(t)
        ratio = (t + 1) * math.exp(-self._half_log_snr(0))
        return Level(1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio), 0.0)

    def find(self, half_log_snr: float) -> float:
        """The position s of this log(alpha / sigma); 1 for anything noisier than the table."""
        alpha_bar = expit(2 * half_log_snr)
        if alpha_bar <= self.alphas_bar[-1]:
            return 1.0
        if half_log_snr >= self._half_log_snr(0):
            return math.exp(self._half_log_snr(0) - half_log_snr) / self.train_steps
        j = max(0, bisect_left(self.alphas_bar, -alpha_bar, key=lambda value: -value) - 1)  # rounding can put it above the first entry
        if self.alphas_bar[j + 1] == 0:
            f = 1 - math.sqrt(alpha_bar / self.alphas_bar[j])
        else:
            f = (self._half_log_snr(j) - half_log_snr) / (self._half_log_snr(j) - self._half_log_snr(j + 1))
        return (j + f + 1) / self.train_steps

    def _half_log_snr(self, j: int) -> float:
        return 0.5 * math.log(self.alphas_bar[j] / (1 - self.alphas_bar[j]))


@dataclass(frozen=True)
class RectifiedFlow:
    """alpha = 1 - s, sigma = s, time = train_steps * s: the straight path of Liu et al. 2022 and Esser et al. 2024 (SD3), eq. 13."""

    train_steps: int = 1000

    def at(self, s: float) -> Level:
        """The level at position s in [0, 1]; exactly (0, 1) at s = 1."""
        return Level(1.0 - check_position(s), float(s), self.train_steps * float(s))

    def find(self, half_log_snr: float) -> float:
        """The position s of this log(alpha / sigma)."""
        return expit(-half_log_snr)


@dataclass(frozen=True)
class VarianceExploding:
    """alpha = 1; sigma runs geometrically from sigma_min (s = 1/T) to sigma_max (s = 1), below sigma_min linearly to 0.

    time = log(sigma) / 4, the c_noise of Karras et al. 2022 (EDM) table 1, and that of sigma_min at cleaner levels.
    """

    sigma_min: float
    sigma_max: float
    train_steps: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf or self.train_steps < 2:
            raise RequestError(
                f"sigma_min {self.sigma_min}, sigma_max {self.sigma_max} and train_steps {self.train_steps} were given: "
                "expected 0 < sigma_min < sigma_max and at least 2 steps."
            )

    def at(self, s: float) -> Level:
        """The level at position s in [0, 1]."""
        t = check_position(s) * self.train_steps - 1
        grow = math.log(self.sigma_max / self.sigma_min) / (self.train_steps - 1)
        sigma = self.sigma_min * (math.exp(t * grow) if t >= 0 else t + 1)
        return Level(1.0, sigma, math.log(max(sigma, self.sigma_min)) / 4)

    def find(self, half_log_snr: float) -> float:
        """The position s whose sigma is exp(-half_log_snr); 1 above sigma_max."""
        steps = -half_log_snr - math.log(self.sigma_min)
        t = steps * (self.train_steps - 1) / math.log(self.sigma_max / self.sigma_min) if steps >= 0 else math.exp(steps) - 1
        return min(1.0, (t + 1) / self.train_steps)


def prediction_row(prediction: str, level: Level, *, sigma_data: float = 0.5) -> tuple[float, float]:
    """(a, b) with x0 = a * x + b * out: how a network's output becomes the clean latent.

    "epsilon" predicts eps (Ho et al. 2020, eq. 15); "v" predicts alpha * eps - sigma * x0 (Salimans & Ho 2022, appendix D);
    "flow" predicts eps - x0 (Liu et al. 2022); "x0" predicts x0; "edm" is F of Karras et al. 2022, table 1, with the data's
    standard deviation sigma_data, written for any alpha.

    Raises RequestError for another name, and for "epsilon" at alpha = 0, where x holds no trace of x0.
    """
    alpha, sigma = level.alpha, level.sigma
    if prediction == "epsilon":
        if alpha == 0:
            raise RequestError("an epsilon prediction was given at alpha = 0 (zero terminal SNR), where it cannot tell x0: use v.")
        return 1 / alpha, -sigma / alpha
    if prediction == "v":
        return alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2)
    if prediction == "flow":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    if prediction == "x0":
        return 0.0, 1.0
    if prediction == "edm":
        variance = sigma**2 + (alpha * sigma_data) ** 2
        return alpha * sigma_data**2 / variance, sigma * sigma_data / math.sqrt(variance)
    raise RequestError(f"unknown prediction {prediction!r}: choose one of {', '.join(PREDICTIONS)}.")


def noised(x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    """x = alpha * x0 + sigma * eps: the clean latent x0 (B, C, h, w) brought to a level with unit normal noise eps."""
    return level.alpha * x0 + level.sigma * eps


def start(eps: Tensor, level: Level) -> Tensor:
    """The first x of a picture made from noise alone: eps (B, C, h, w) at the spread of unit-variance data on this level."""
    return eps * math.hypot(level.alpha, level.sigma)


def check_position(s: float) -> float:
    """s itself, or RequestError when it is not in [0, 1]."""
    if not 0 <= s <= 1:
        raise RequestError(f"position {s} is outside the noise path: give one from 0 (clean) to 1 (noise).")
    return s


def expit(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow, exact at ±inf."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
