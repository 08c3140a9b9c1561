"""Samplers: one short generator each, from levels and a denoiser to x.

Knows levels and a denoiser. Does not know families, prompts, guidance, seeds or devices.

All of them take the same first-order step from (alpha, sigma) to (alpha', sigma'), written without a division by alpha or a
logarithm, so that it is exact where alpha = 0 (a rectified flow at t = 1, zero terminal SNR) and where sigma' = 0:

    r = sigma' / sigma        x' = r * x + (alpha' - alpha * r) * x0

They differ in what they put for x0, and in how much of sigma' they draw afresh. History lives in locals.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from latentgen.diffusion.level import Denoiser, Level
from latentgen.errors import RequestError


@dataclass(frozen=True)
class Step:
    """What a sampler yields after each of its `total` transitions.

    index: 0 ... total - 1.  level: where the denoiser was asked (levels[index]).  x0: its answer there, (B, C, h, w).
    x: the state after the step, at levels[index + 1]; the last one is the result.
    """

    index: int
    total: int
    level: Level
    x0: Tensor
    x: Tensor


# Every sampler: (denoise, x, levels, *, noise, ...) -> Iterator[Step], where
#   x       (B, C, h, w) at levels[0], float32 (float64 is kept too): the state is never held in half precision
#   levels  at least two, each cleaner than the one before; the last may have sigma = 0
#   noise   () -> unit normal noise like x: called once by each step of a stochastic sampler, except a step to sigma = 0
# and, when the first step is asked for, RequestError where x or levels are not so.


def euler(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Callable[[], Tensor]) -> Iterator[Step]:
    """Euler's method for the probability-flow ODE (Karras et al. 2022, algorithm 1 without its correction; Liu et al. 2022).

    In x / alpha against sigma / alpha, in the straight coordinates of a flow, and as DDIM: always the same step.
    """
    for index, now, then in _transitions(x, levels):
        x0 = denoise(x, now)
        x = _advance(x, x0, now, then)
        yield Step(index, len(levels) - 1, now, x0, x)


def ddim(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Callable[[], Tensor], eta: float = 0.0) -> Iterator[Step]:
    """DDIM (Song et al. 2021, eq. 12 and 16). eta in [0, 1]: 0 is deterministic (Euler), 1 is ancestral (DDPM)."""
    if not 0 <= eta <= 1:
        raise RequestError(f"eta is {eta}: give a number from 0 (deterministic) to 1 (as much noise as DDPM).")
    for index, now, then in _transitions(x, levels):
        x0 = denoise(x, now)
        x = _advance(x, x0, now, then, eta=eta, noise=noise)
        yield Step(index, len(levels) - 1, now, x0, x)


def ddpm(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Callable[[], Tensor]) -> Iterator[Step]:
    """Ancestral sampling: x' drawn from q(x' | x, x0) (Ho et al. 2020, eq. 6-7, with the smaller of its two variances)."""
    return ddim(denoise, x, levels, noise=noise, eta=1.0)


def euler_ancestral(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Callable[[], Tensor]) -> Iterator[Step]:
    """k-diffusion's ancestral Euler: down to sigma_down, then noise of sigma_up. Multiplied out, that is DDPM's step on any path."""
    return ddim(denoise, x, levels, noise=noise, eta=1.0)


def heun(
    denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Callable[[], Tensor], variable: str = "sigma"
) -> Iterator[Step]:
    """Heun's method (Karras et al. 2022, algorithm 1): an Euler step, then the trapezoid rule. Second order, two evaluations.

    The trapezoid rule on dx = x0 dalpha + eps dsigma is the first-order step with x0 + (x0' - x0) * sigma / (2 sigma') for x0,
    where x0' is asked at the end of the Euler step. This is EDM's Heun where alpha = 1 and Heun in t on a rectified flow.
    variable: "sigma", that rule; "ratio" runs it on x / alpha in sigma / alpha, as k-diffusion and diffusers do on variance-
    preserving models (less exact, and first order in a step from alpha = 0). A step to sigma' = 0 is first order in both.
    """
    if variable not in ("sigma", "ratio"):
        raise RequestError(f"variable is {variable!r}: choose 'sigma' or 'ratio'.")
    for index, now, then in _transitions(x, levels):
        x0 = x0_mean = denoise(x, now)
        shrink = then.sigma / now.sigma * (now.alpha / then.alpha if variable == "ratio" else 1.0)
        if shrink > 0:
            x0_mean = x0 + (denoise(_advance(x, x0, now, then), then) - x0) / (2 * shrink)
        x = _advance(x, x0_mean, now, then)
        yield Step(index, len(levels) - 1, now, x0, x)


def dpmpp_2m(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Callable[[], Tensor]) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, DPM-Solver++, algorithm 2): x0 extrapolated from the last two answers. Second order, one evaluation."""
    past = None
    for index, now, then in _transitions(x, levels):
        x0 = denoise(x, now)
        x = _advance(x, _extrapolated(x0, now, then, past), now, then)
        past = x0, now
        yield Step(index, len(levels) - 1, now, x0, x)


def dpmpp_2m_sde(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Callable[[], Tensor]) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M), midpoint form (Lu et al. 2022, DPM-Solver++): the ancestral step with the extrapolated x0."""
    past = None
    for index, now, then in _transitions(x, levels):
        x0 = denoise(x, now)
        x = _advance(x, _extrapolated(x0, now, then, past), now, then, eta=1.0, noise=noise)
        past = x0, now
        yield Step(index, len(levels) - 1, now, x0, x)


def lcm(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Callable[[], Tensor]) -> Iterator[Step]:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): all of sigma' is drawn afresh.

    For latent consistency models (Luo et al. 2023). Their boundary scalings c_skip and c_out belong to the network's row; they
    differ from 0 and 1 by less than 1e-5 from timestep 19 on, the first that such a model is trained at.
    """
    for index, now, then in _transitions(x, levels):
        x0 = denoise(x, now)
        x = then.alpha * x0
        if then.sigma > 0:
            x = x + then.sigma * noise().to(x)
        yield Step(index, len(levels) - 1, now, x0, x)


def _transitions(x: Tensor, levels: Sequence[Level]) -> Iterator[tuple[int, Level, Level]]:
    """(index, level, next level) of each step, once x and levels are seen to be what every sampler needs."""
    if x.dtype not in (torch.float32, torch.float64):
        raise RequestError(f"x is {x.dtype}: a latent of low precision drifts over the steps, give it in float32.")
    # cross-multiplied, so that alpha = 0 and sigma = 0 need no case of their own
    if len(levels) < 2 or not all(now.alpha * then.sigma < then.alpha * now.sigma for now, then in pairwise(levels)):
        raise RequestError(f"{len(levels)} levels were given: a sampler needs at least two, each cleaner than the one before.")
    for index, (now, then) in enumerate(pairwise(levels)):
        yield index, now, then


def _advance(
    x: Tensor, x0: Tensor, now: Level, then: Level, *, eta: float = 0.0, noise: Callable[[], Tensor] | None = None
) -> Tensor:
    """x' = alpha' * x0 + sqrt(sigma'² - n²) * eps + n * fresh noise, where eps = (x - alpha * x0) / sigma (DDIM, eq. 12).

    n = eta * sigma' * sqrt(1 - q²), with q = (alpha / sigma) / (alpha' / sigma') < 1. At eta = 1 that is the spread of
    q(x' | x, x0), on any path. At eta = 0 it is the deterministic step at the head of this file.
    """
    q = now.alpha * then.sigma / (then.alpha * now.sigma)
    n = eta * then.sigma * math.sqrt(1 - q * q)
    # sqrt(sigma'² - n²) / sigma; in this form nothing cancels, and eta = 0 gives sigma' / sigma to the last bit
    r = then.sigma / now.sigma * math.sqrt((1 - eta) * (1 + eta) + (eta * q) ** 2)
    x = r * x + (then.alpha - now.alpha * r) * x0
    return x + n * noise().to(x) if n > 0 else x


def _extrapolated(x0: Tensor, now: Level, then: Level, past: tuple[Tensor, Level] | None) -> Tensor:
    """x0 at the middle of the coming step, on the line through the last two answers in log(alpha / sigma).

    x0 itself where there is no line: in the first step, after a level with alpha = 0, and in a step to sigma' = 0.
    """
    if past is None:
        return x0
    x0_past, before = past
    h, h_past = then.half_log_snr - now.half_log_snr, now.half_log_snr - before.half_log_snr
    if math.isinf(h) or math.isinf(h_past):
        return x0
    return x0 + h / (2 * h_past) * (x0 - x0_past)


@dataclass(frozen=True)
class SamplerInfo:
    """A sampler and what to know before running it.

    stochastic: it draws noise with its options left alone.  evaluations_per_step: denoiser calls in a step (Heun's last step
    to sigma' = 0 makes one).  options: the names of its own keyword arguments.
    """

    function: Callable[..., Iterator[Step]]
    stochastic: bool
    evaluations_per_step: int
    options: tuple[str, ...] = ()


SAMPLERS: dict[str, SamplerInfo] = {
    "ddpm": SamplerInfo(ddpm, True, 1),
    "ddim": SamplerInfo(ddim, False, 1, ("eta",)),
    "euler": SamplerInfo(euler, False, 1),
    "euler_ancestral": SamplerInfo(euler_ancestral, True, 1),
    "heun": SamplerInfo(heun, False, 2, ("variable",)),
    "dpmpp_2m": SamplerInfo(dpmpp_2m, False, 1),
    "dpmpp_2m_sde": SamplerInfo(dpmpp_2m_sde, True, 1),
    "lcm": SamplerInfo(lcm, True, 1),
}

# What other programs call them, in the spelling of `_plain`
_ALIASES = {
    "eulera": "euler_ancestral",
    "eulerancestraldiscrete": "euler_ancestral",
    "eulerdiscrete": "euler",
    "flowmatcheulerdiscrete": "euler",
    "flowmatcheuler": "euler",
    "heundiscrete": "heun",
    "flowmatchheundiscrete": "heun",
    "dpm2m": "dpmpp_2m",
    "dpmpp": "dpmpp_2m",
    "dpmsolver": "dpmpp_2m",
    "dpmsolverpp": "dpmpp_2m",
    "dpmsolvermultistep": "dpmpp_2m",
    "dpmppsde": "dpmpp_2m_sde",
    "sdedpmsolverpp": "dpmpp_2m_sde",
}


def sampler(name: str) -> SamplerInfo:
    """The sampler of this exact name; otherwise RequestError, which knows what other programs call it."""
    if name in SAMPLERS:
        return SAMPLERS[name]
    plain = _plain(name)
    ours = {_plain(own): own for own in SAMPLERS}
    known = {**ours, **_ALIASES}
    close = difflib.get_close_matches(plain, known, 1, cutoff=0.7)
    hint = f"did you mean {known[close[0]]!r}{_spacing_hint(name)}? " if close else ""
    raise RequestError(f"unknown sampler {name!r}: {hint}Choose one of {', '.join(SAMPLERS)}.")


def _plain(name: object) -> str:
    """A name without what programs spell differently: "DPM++ 2M Karras" and "dpmpp_2m" are both "dpmpp2m"."""
    text = str(name).lower().replace("+", "p")
    for word in ("scheduler", "karras", "exponential", "k_", "sampler"):
        text = text.replace(word, "")
    return "".join(letter for letter in text if letter.isalnum())


def _spacing_hint(name: object) -> str:
    """A1111 puts the spacing into the sampler's name; here it is an option of its own."""
    words = [word for word in ("karras", "exponential") if word in str(name).lower()]
    return f" with spacing {words[0]!r}" if words else ""
