"""Which levels: the tables models are trained on, and the few levels a run visits.

Knows levels and paths. Does not know samplers, families or images.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Iterable

from latentgen.diffusion.level import Level, NoisePath, RectifiedFlow, VariancePreserving, expit
from latentgen.errors import RequestError

SPACINGS = ("linspace", "leading", "trailing", "simple", "karras", "exponential")

RHO = 7.0  # Karras et al. 2022, eq. 5: bends the steps towards the clean end


def linear(train_steps: int, beta_start: float, beta_end: float) -> tuple[float, ...]:
    """alphas_bar of betas that grow linearly (Ho et al. 2020, section 4)."""
    return _cumulative(_linspace(beta_start, beta_end, train_steps))


def scaled_linear(train_steps: int, beta_start: float, beta_end: float) -> tuple[float, ...]:
    """alphas_bar of betas whose square roots grow linearly (latent diffusion, Rombach et al. 2022)."""
    return _cumulative(root**2 for root in _linspace(math.sqrt(beta_start), math.sqrt(beta_end), train_steps))


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


def spacing(name: str, path: NoisePath, steps: int, *, shift: float = 1.0, offset: int = 0, terminal: float = 0.0) -> tuple[Level, ...]:
    """The steps + 1 levels of a run, noisiest first; the last is clean (alpha = 1, sigma = 0).

    With T = path.train_steps, on a table (`VariancePreserving`) all of these are whole timesteps, as in Lin et al. 2023, table 2:
      linspace     T - 1 down to 0, evenly, both ends included; a single step is taken at T - 1
      leading      multiples of T // steps, plus `offset` (Stable Diffusion's own sampler: 1); starts below T - 1
      trailing     T - 1 downwards in steps of T / steps, rounded; the one to use where alpha(T - 1) = 0
      simple       as trailing, rounded towards noise (ComfyUI's "simple")
    On a continuous path timestep t is position (t + 1) / T and nothing is rounded: trailing and simple are s = 1 - i / steps
    (FLUX), and linspace is s = 1 ... 1/T (Stable Diffusion 3). There `shift` bends s through `shifted`; linspace's lower end is
    shifted before it is spaced, and so twice in all, as diffusers does. A `terminal` above 0 then stretches the distances from
    s = 1 so that the last level before the clean one lies there (as LTX-Video's schedule does).
      karras       sigma / alpha from that of s = 1 to that of s = 1/T, evenly in its 7th root (Karras et al. 2022, eq. 5)
      exponential  the same ends, evenly in its logarithm
    Where s = 1 has alpha = 0, sigma / alpha is infinite: the two ramps are then laid from one training step below
    (s = 1 - 1/T), and their first level put back to s = 1, where the network expects pure noise.

    Raises RequestError for an unknown name, steps outside [1, T], or a shift or offset that would have no effect.
    """
    _check_spacing(name, path, steps, shift, offset)
    if name in ("karras", "exponential"):
        return (*_ramp(name, path, steps), path.at(0.0))
    if isinstance(path, VariancePreserving):
        return (*(path.at_time(t) for t in _timesteps(name, path.train_steps, steps, offset)), path.at(0.0))
    positions = [shifted(s, shift) for s in _positions(name, path.train_steps, steps, shift, offset)]
    return (*(path.at(s) for s in _stretched(positions, terminal)), path.at(0.0))


def _timesteps(name: str, train_steps: int, steps: int, offset: int) -> list[int]:
    """The even spacings of a table of T timesteps, largest first. Python and numpy both round halves to even."""
    if name == "linspace":
        return [round(t) for t in _linspace(0, train_steps - 1, steps)][::-1] if steps > 1 else [train_steps - 1]
    if name == "leading":
        return [i * (train_steps // steps) + offset for i in reversed(range(steps))]
    if name == "trailing":
        stride = train_steps - (train_steps - train_steps / steps)  # as numpy.arange has it: this decides a few halves
        return [round(train_steps - i * stride) - 1 for i in range(steps)]
    return [train_steps - 1 - i * train_steps // steps for i in range(steps)]


def _positions(name: str, train_steps: int, steps: int, shift: float, offset: int) -> list[float]:
    """The even spacings of a continuous path, largest first, before the shift."""
    if name == "linspace":
        return _linspace(1.0, shifted(1 / train_steps, shift), steps)
    if name == "leading":
        return [(t + 1) / train_steps for t in _timesteps(name, train_steps, steps, offset)]
    return [1 - i / steps for i in range(steps)]


def _stretched(positions: list[float], terminal: float) -> list[float]:
    """Positions that fall from 1, their distances from 1 scaled so that the last is `terminal`; as they are for 0, or where all are 1."""
    reach = 1 - positions[-1]
    return positions if not terminal or reach <= 0 else [1 - (1 - s) * ((1 - terminal) / reach) for s in positions]


def _ramp(name: str, path: NoisePath, steps: int) -> list[Level]:
    """`steps` levels even in a power or the logarithm of sigma / alpha; the ends are the path's own."""
    first, last = path.at(1.0), path.at(1 / path.train_steps)
    noisy = first if first.alpha > 0 else path.at(1 - 1 / path.train_steps)
    high, low = -noisy.half_log_snr, -last.half_log_snr
    if name == "exponential":
        ramp = _linspace(high, low, steps)
    else:
        ramp = [RHO * math.log(root) for root in _linspace(math.exp(high / RHO), math.exp(low / RHO), steps)]
    return [first, *(path.at(path.find(-log_ratio)) for log_ratio in ramp[1:-1]), last][:steps]


def _check_spacing(name: str, path: NoisePath, steps: int, shift: float, offset: int) -> None:
    if name not in SPACINGS:
        close = difflib.get_close_matches(str(name).lower(), SPACINGS, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise RequestError(f"unknown spacing {name!r}: {hint}choose one of {', '.join(SPACINGS)}.")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= path.train_steps:
        raise RequestError(f"steps is {steps!r}: give a whole number from 1 to {path.train_steps}.")
    if not 0 < shift < math.inf:
        raise RequestError(f"shift is {shift}: give a number above 0 (1 leaves the spacing as it is).")
    if shift != 1 and (not isinstance(path, RectifiedFlow) or name in ("karras", "exponential")):
        raise RequestError(
            f"shift {shift} has no effect on {type(path).__name__} with {name} spacing: leave it at 1, "
            "or use a rectified-flow model with linspace, leading, trailing or simple spacing."
        )
    if offset and name != "leading":
        raise RequestError(f"offset {offset} was given with {name} spacing: only leading spacing has an offset.")
    if not 0 <= offset + (steps - 1) * (path.train_steps // steps) < path.train_steps:
        raise RequestError(f"offset {offset} leaves the {path.train_steps} training timesteps at {steps} steps: use fewer steps or offset 0.")


def _linspace(start: float, stop: float, count: int) -> list[float]:
    if count == 1:
        return [start]
    return [start + i * ((stop - start) / (count - 1)) for i in range(count - 1)] + [stop]


def _cumulative(betas: Iterable[float]) -> tuple[float, ...]:
    return tuple(itertools.accumulate((1 - beta for beta in betas), lambda product, alpha: product * alpha))


def _from_curve(train_steps: int, alpha_bar: Callable[[float], float]) -> tuple[float, ...]:
    """A table from a curve alpha_bar(t), t in [0, 1]. The cap keeps the last level from being pure noise."""
    grid = [alpha_bar(i / train_steps) for i in range(train_steps + 1)]
    return _cumulative(min(1 - after / before, 0.999) for before, after in itertools.pairwise(grid))
