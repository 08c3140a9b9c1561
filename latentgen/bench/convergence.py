"""How fast samplers come to the exact answer: on a mixture of Gaussians in the plane, whose denoiser is a formula.
Knows samplers and levels; no model.

The probability-flow ODE is followed from ratio sigma / alpha = 10 down to 0.1 on levels that are even in its logarithm, from fixed starts, in
float64.
Its end is known to 1e-12 from a Runge-Kutta run on levels far finer than any that is judged. A method of order p has an error of steps^-p.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentgen.diffusion.level import Denoiser, Level, NoisePath, VariancePreserving
from latentgen.diffusion.sample import SAMPLERS, asked, sampler
from latentgen.diffusion.schedule import Levels, scaled_linear
from latentgen.errors import OutputError, RequestError
from latentgen.pixels.save import SUFFIXES, whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = (5, 10, 20, 40, 80, 160)
RATIOS = (10.0, 0.1)  # sigma / alpha, from and to
MEANS = ((0.0, 1.6), (1.5, 0.5), (0.9, -1.3), (-0.9, -1.3), (-1.5, 0.5))
SPREAD = 0.25
JUDGED: Mapping[str, Mapping[str, Any]] = {
    "euler": {}, "heun": {}, "dpm2": {}, "dpmpp_2m": {}, "dpmpp_3m_sde": {"eta": 0.0}, "lms": {}, "deis": {}, "unipc": {},
}  # deterministic, or made so


@dataclass(frozen=True)
class Curve:
    """One sampler's errors.

    Attributes:
        steps, evaluations: of each run.
        errors: the largest distance of an end from the exact one, in units of the data, whose spread is about 1.4.
        order: the slope of the last doubling, log2 of the ratio of its errors.
    """

    name: str
    steps: tuple[int, ...]
    evaluations: tuple[int, ...]
    errors: tuple[float, ...]
    order: float


def mixture(means: Tensor | Sequence[Sequence[float]] = MEANS, spread: float = SPREAD) -> Denoiser:
    """The exact denoiser of equally likely Gaussians: E[x0 | x], the mean of each Gaussian's own answer, weighed by how likely x is of it.

    means: (k, d).  spread: standard deviation of each.  x: (n, d).
    """
    means = torch.as_tensor(means, dtype=torch.float64)

    def denoise(x: Tensor, level: Level) -> Tensor:
        centres = means.to(x)
        variance = (level.alpha * spread) ** 2 + level.sigma**2
        away = x[:, None] - level.alpha * centres  # (n, k, d)
        share = torch.softmax(-away.square().sum(-1) / (2 * variance), -1)
        return (share[..., None] * (centres + level.alpha * spread**2 / variance * away)).sum(1)

    return denoise


def starts(count: int = 64, *, seed: int = 0, ratio: float = RATIOS[0]) -> Tensor:
    """(count, 2) points of the noisiest level where x = alpha * (x0 + ratio * eps), over alpha: float64, drawn from the mixture itself."""
    draw = torch.Generator().manual_seed(seed)
    which = torch.randint(len(MEANS), (count,), generator=draw)
    noise = torch.randn((count, 2), generator=draw, dtype=torch.float64)
    return torch.tensor(MEANS, dtype=torch.float64)[which] + math.hypot(SPREAD, ratio) * noise


def even_levels(steps: int, path: NoisePath) -> Levels:
    """Levels from RATIOS[0] to RATIOS[1], even in log(sigma / alpha)."""
    first, last = (math.log(ratio) for ratio in RATIOS)
    return Levels([path.at(path.find(-(first + (last - first) * n / steps))) for n in range(steps + 1)], path)


def measure(judged: Mapping[str, Mapping[str, Any]] = JUDGED, *, steps: Sequence[int] = STEPS, path: NoisePath | None = None) -> list[Curve]:
    """The errors of samplers, given with their options, at numbers of steps.

    Raises:
        RequestError: an unknown sampler or option, one that draws noise, or fewer than two numbers of steps.
    """
    if len(steps) < 2 or any(type(count) is not int or count < 2 for count in steps):
        raise RequestError(f"steps is {steps!r}: expected two or more whole numbers of 2 or more")
    path = path or VariancePreserving(scaled_linear(1000, 0.00085, 0.012))
    denoise, x = mixture(), starts()
    truth = _end("rk45", {}, 8 * max(steps), path, denoise, x)
    curves = []
    for name, options in judged.items():
        errors = [(_end(name, options, count, path, denoise, x) - truth).norm(dim=-1).max().item() for count in steps]
        seen = tuple(len(asked(name, even_levels(count, path), options)) for count in steps)
        order = math.log2(errors[-2] / errors[-1]) / math.log2(steps[-1] / steps[-2]) if errors[-1] else math.inf
        curves.append(Curve(name, tuple(steps), seen, tuple(errors), order))
    return curves


def figure(curves: Sequence[Curve], path: str | Path) -> Path:
    """Draw the errors against steps and against evaluations of the network, both axes logarithmic, as .png.

    Raises:
        RequestError: another suffix. OutputError: the folder cannot be written.
    """
    from matplotlib.figure import Figure

    path = Path(path)
    if SUFFIXES.get(path.suffix.lower()) != "PNG":
        raise RequestError(f"the file name {path.name!r} ends in {path.suffix!r}: expected .png")
    if not path.parent.is_dir():
        raise OutputError(f"the folder {str(path.parent)!r} does not exist: make it first, or choose another")
    page = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = page.subplots(1, 2, sharey=True)
    draw(left, curves, "steps")
    draw(right, curves, "evaluations")
    left.set_ylabel("largest distance from the exact end")
    right.legend(fontsize=8, loc="lower left")
    page.suptitle("Samplers on a mixture of five Gaussians in the plane: error of the probability-flow ODE", fontsize=11)
    with whole_file(path) as file:
        page.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return path


def draw(axes: Axes, curves: Sequence[Curve], against: str) -> None:
    """The curves on matplotlib's axes, against "steps" or "evaluations", with lines of slope 1, 2 and 3 to compare."""
    for curve, mark in zip(curves, "osD^v<>PX*" * len(curves), strict=False):
        axes.plot(getattr(curve, against), curve.errors, marker=mark, markersize=4, linewidth=1.2, label=f"{curve.name} (order {curve.order:.1f})")
    if against == "steps":
        steps = (curves[0].steps[0], curves[0].steps[-1])
        for order in (1, 2, 3):
            ends = [1.2 * (count / steps[0]) ** -order for count in steps]
            axes.plot(steps, ends, color="0.7", linestyle=":", linewidth=1, zorder=0)
            axes.annotate(f" slope {order}", (steps[1], ends[1]), fontsize=7, color="0.5", ha="left", va="center")
        axes.set_xlim(steps[0] * 0.85, steps[1] * 1.6)
    axes.set(xscale="log", yscale="log", xlabel="steps" if against == "steps" else "evaluations of the denoiser")
    ticks = [count for count in (5, 10, 20, 40, 80, 160, 320, 640, 1280) if axes.get_xlim()[0] <= count <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()
    axes.grid(color="0.92", linewidth=0.7)


def as_data(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """The curves as plain data, with what the table of samplers says of their order."""
    return [{**asdict(curve), "table": SAMPLERS[curve.name].order} for curve in curves]


def _end(name: str, options: Mapping[str, Any], steps: int, path: NoisePath, denoise: Denoiser, x: Tensor) -> Tensor:
    """Where a sampler leaves the starts, as points of the data: over alpha."""
    levels = even_levels(steps, path)
    *_, last = sampler(name).function(denoise, x * levels[0].alpha, levels, noise=_no_noise, **options)
    return last.x / levels[-1].alpha


def _no_noise() -> Tensor:
    raise RequestError("a sampler that draws noise has no exact end: judge deterministic ones, or give eta=0")
