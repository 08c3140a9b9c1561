"""Which levels: the tables models are trained on, and the few levels a run visits.

Knows levels and paths. Does not know samplers, families or images.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from latentgen.diffusion.level import Level, NoisePath, RectifiedFlow, VariancePreserving, expit
from latentgen.diffusion.spacings import AYS_TABLE, RHO, align_your_steps, beta_times, even, from_values, linear_quadratic, ramp
from latentgen.errors import RequestError

SPACINGS = ("linspace", "leading", "trailing", "simple", "normal", "sgm_uniform", "beta", "karras", "exponential", "polyexponential", "kl_optimal",
            "linear_quadratic", "ays", "ays_xl", "ays_video")
UNSHIFTED = ("karras", "exponential", "polyexponential", "kl_optimal", "linear_quadratic", "ays", "ays_xl",
             "ays_video")  # a shift does not reach them


class Levels(tuple[Level, ...]):
    """The levels of a run and the path they lie on, for samplers that ask between them. Equal to a tuple of the same levels; slices keep the path."""

    path: NoisePath | None

    def __new__(cls, levels: Iterable[Level], path: NoisePath | None = None) -> Levels:
        made = super().__new__(cls, levels)
        made.path = path
        return made

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return Levels(found, self.path) if isinstance(key, slice) else found

    def __reduce__(self) -> tuple[Any, ...]:
        return Levels, (tuple(self), self.path)


def linear(train_steps: int, beta_start: float, beta_end: float) -> tuple[float, ...]:
    """alphas_bar of betas that grow linearly (Ho et al. 2020, section 4)."""
    return _cumulative(even(beta_start, beta_end, train_steps))


def scaled_linear(train_steps: int, beta_start: float, beta_end: float) -> tuple[float, ...]:
    """alphas_bar of betas whose square roots grow linearly (latent diffusion, Rombach et al. 2022)."""
    return _cumulative(root**2 for root in even(math.sqrt(beta_start), math.sqrt(beta_end), train_steps))


def cosine(train_steps: int) -> tuple[float, ...]:
    """The cosine schedule (Nichol & Dhariwal 2021, eq. 17); betas are capped at 0.999."""
    return _from_curve(train_steps, lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)


def sigmoid(train_steps: int) -> tuple[float, ...]:
    """The sigmoid schedule from -3 to 3 at temperature 1 (Jabri et al. 2022; Chen 2023, algorithm 1); betas are capped at 0.999."""
    return _from_curve(train_steps, lambda t: (expit(3) - expit(6 * t - 3)) / (expit(3) - expit(-3)))


def zero_terminal_snr(alphas_bar: tuple[float, ...]) -> tuple[float, ...]:
    """The same table shifted and scaled so that its last level is pure noise, exactly 0 (Lin et al. 2023, algorithm 1)."""
    roots = [math.sqrt(value) for value in alphas_bar]
    scale = roots[0] / (roots[0] - roots[-1])
    return tuple(((root - roots[-1]) * scale) ** 2 for root in roots)


def shifted(s: float, shift: float) -> float:
    """A position of a rectified flow moved towards noise for larger pictures (Esser et al. 2024, eq. 23); shift 1 leaves it."""
    return shift * s / (1 + (shift - 1) * s)


def spacing(name: str, path: NoisePath, steps: int, *, shift: float = 1.0, offset: int = 0, terminal: float = 0.0,
            rho: float | None = None) -> Levels:
    """The steps + 1 levels of a run, noisiest first; the last is clean (alpha = 1, sigma = 0).

    With T = path.train_steps, on a table (`VariancePreserving`) these are timesteps, whole in the first four (Lin et al. 2023, table 2):
      linspace     T - 1 down to 0, evenly, both ends included; a single step is taken at T - 1
      leading      multiples of T // steps, plus `offset` (Stable Diffusion's own sampler: 1); starts below T - 1
      trailing     T - 1 downwards in steps of T / steps, rounded; the one to use where alpha(T - 1) = 0
      simple       as trailing, rounded towards noise (ComfyUI's "simple")
      normal       as linspace, not rounded (ComfyUI's "normal", k-diffusion's own)
      sgm_uniform  the first `steps` of steps + 1 such timesteps (ComfyUI's "sgm_uniform")
      beta         at even quantiles of a Beta(0.6, 0.6) distribution, whole where that keeps them apart (ComfyUI's "beta")
    On a continuous path timestep t is position (t + 1) / T and nothing is rounded: trailing and simple are s = 1 - i / steps
    (FLUX), and linspace is s = 1 ... 1/T (Stable Diffusion 3). There `shift` bends s through `shifted`; the lower end of linspace,
    normal and sgm_uniform is shifted before it is spaced, and so twice in all, as diffusers and ComfyUI do. A `terminal` above 0
    then stretches the distances from s = 1 so that the last level before the clean one lies there (as LTX-Video's schedule does).
    The rest are laid in sigma / alpha, and take no shift:
      karras           from that of s = 1 to that of s = 1/T, evenly in its rho-th root, rho 7 (Karras et al. 2022, eq. 5)
      exponential      the same ends, evenly in its logarithm
      polyexponential  the same, the logarithm a power rho of an even ramp; at rho 1, as k-diffusion has it, that is exponential
      kl_optimal       the same ends, evenly in its arc tangent (Sabour et al. 2024, theorem 3.1)
      linear_quadratic half of the steps within 2.5 % of the noise, then a parabola (Movie Gen); in s on a rectified flow
      ays, ays_xl, ays_video   the tables of Sabour et al. 2024, "Align Your Steps", for the schedules they were made for
    Where s = 1 has alpha = 0, sigma / alpha is infinite: ramps are then laid from one training step below (s = 1 - 1/T), and their
    first level put back to s = 1, where the network expects pure noise.

    Raises RequestError for an unknown name, steps outside [1, T], a table on another schedule, or a shift, offset or rho without effect.
    """
    _check_spacing(name, path, steps, shift, offset)
    _check_rho(name, rho)
    if name.startswith("ays"):
        made = align_your_steps(name, path, steps, scaled_linear(*AYS_TABLE))
    elif name == "linear_quadratic":
        made = linear_quadratic(path, steps)
    elif name in UNSHIFTED:
        made = ramp(name, path, steps, rho)
    elif isinstance(path, VariancePreserving):
        made = [path.at_time(t) for t in _timesteps(name, path.train_steps, steps, offset)]
    else:
        positions = [shifted(s, shift) for s in _positions(name, path.train_steps, steps, shift, offset)]
        made = [path.at(s) for s in _stretched(positions, terminal)]
    return Levels((*made, path.at(0.0)), path)


def explicit(path: NoisePath, *, times: Sequence[float] | None = None, sigmas: Sequence[float] | None = None) -> Levels:
    """The levels that someone gave, noisiest first; the clean end is added.

    times: training timesteps of a table; on other paths, times as the path's levels have them (1000 * s on a flow).  sigmas: s on a rectified flow,
    sigma / alpha elsewhere (what diffusers and k-diffusion call sigmas); a 0 at the end may be there or not.
    Raises RequestError unless exactly one is given, and its values fall and lie on the path.
    """
    if (times is None) == (sigmas is None):
        raise RequestError("levels are given by times or by sigmas: pass one of them.")
    if times is not None:
        if isinstance(path, VariancePreserving):
            return Levels((*from_values(times, "times", path.at_time, table=True), path.at(0.0)), path)
        if not isinstance(path, RectifiedFlow):
            raise RequestError(f"times are given, but those of {type(path).__name__} are no timesteps: pass sigmas.")
        scaled = [float(t) / path.train_steps for t in times]
        return Levels((*from_values(scaled, "times", path.at), path.at(0.0)), path)
    assert sigmas is not None

    def to_level(sigma: float) -> Level:
        if isinstance(path, RectifiedFlow):
            return path.at(sigma)
        level, top = path.at(path.find(-math.log(sigma))), path.at(1.0)
        if top.alpha * sigma > top.sigma * (1 + 1e-4):  # tables are published in a few digits
            raise RequestError(f"sigma {sigma:g} is noisier than the model was trained for: give at most {top.sigma / top.alpha:g}.")
        return level

    return Levels((*from_values(sigmas, "sigmas", to_level), path.at(0.0)), path)


def _timesteps(name: str, train_steps: int, steps: int, offset: int) -> Sequence[float]:
    """The spacings of a table of T timesteps, largest first. Python and numpy both round halves to even."""
    if name == "normal":
        return even(train_steps - 1, 0, steps)
    if name == "sgm_uniform":
        return even(train_steps - 1, 0, steps + 1)[:-1]
    if name == "beta":
        return beta_times(train_steps, steps, whole=True)
    if name == "linspace":
        return [round(t) for t in even(0, train_steps - 1, steps)][::-1] if steps > 1 else [train_steps - 1]
    if name == "leading":
        return [i * (train_steps // steps) + offset for i in reversed(range(steps))]
    if name == "trailing":
        stride = train_steps - (train_steps - train_steps / steps)  # as numpy.arange has it: this decides a few halves
        return [round(train_steps - i * stride) - 1 for i in range(steps)]
    return [train_steps - 1 - i * train_steps // steps for i in range(steps)]


def _positions(name: str, train_steps: int, steps: int, shift: float, offset: int) -> list[float]:
    """The spacings of a continuous path, largest first, before the shift."""
    if name in ("linspace", "normal"):
        return even(1.0, shifted(1 / train_steps, shift), steps)
    if name == "sgm_uniform":
        return even(1.0, shifted(1 / train_steps, shift), steps + 1)[:-1]
    if name == "beta":
        return [(t + 1) / train_steps for t in beta_times(train_steps, steps, whole=False)]
    if name == "leading":
        return [(t + 1) / train_steps for t in _timesteps(name, train_steps, steps, offset)]
    return [1 - i / steps for i in range(steps)]


def _stretched(positions: list[float], terminal: float) -> list[float]:
    """Positions that fall from 1, their distances from 1 scaled so that the last is `terminal`; as they are for 0, or where all are 1."""
    reach = 1 - positions[-1]
    return positions if not terminal or reach <= 0 else [1 - (1 - s) * ((1 - terminal) / reach) for s in positions]


def _check_spacing(name: str, path: NoisePath, steps: int, shift: float, offset: int) -> None:
    if name not in SPACINGS:
        close = difflib.get_close_matches(str(name).lower(), SPACINGS, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise RequestError(f"unknown spacing {name!r}: {hint}choose one of {', '.join(SPACINGS)}.")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= path.train_steps:
        raise RequestError(f"steps is {steps!r}: give a whole number from 1 to {path.train_steps}.")
    if not 0 < shift < math.inf:
        raise RequestError(f"shift is {shift}: give a number above 0 (1 leaves the spacing as it is).")
    if shift != 1 and (not isinstance(path, RectifiedFlow) or name in UNSHIFTED):
        raise RequestError(
            f"shift {shift} has no effect on {type(path).__name__} with {name} spacing: leave it at 1, "
            "or use a rectified-flow model with linspace, leading, trailing, simple, normal, sgm_uniform or beta spacing."
        )
    if offset and name != "leading":
        raise RequestError(f"offset {offset} was given with {name} spacing: only leading spacing has an offset.")
    if not 0 <= offset + (steps - 1) * (path.train_steps // steps) < path.train_steps:
        raise RequestError(f"offset {offset} leaves the {path.train_steps} training timesteps at {steps} steps: use fewer steps or offset 0.")


def _check_rho(name: str, rho: float | None) -> None:
    if rho is not None and name not in RHO:
        raise RequestError(f"rho {rho} was given with {name} spacing: only {' and '.join(RHO)} have a rho.")
    if rho is not None and not 0 < rho <= 100:
        raise RequestError(f"rho is {rho}: give a number above 0, at most 100.")


def _cumulative(betas: Iterable[float]) -> tuple[float, ...]:
    return tuple(itertools.accumulate((1 - beta for beta in betas), lambda product, alpha: product * alpha))


def _from_curve(train_steps: int, alpha_bar: Callable[[float], float]) -> tuple[float, ...]:
    """A table from a curve alpha_bar(t), t in [0, 1]. The cap keeps the last level from being pure noise."""
    grid = [alpha_bar(i / train_steps) for i in range(train_steps + 1)]
    return _cumulative(min(1 - after / before, 0.999) for before, after in itertools.pairwise(grid))
