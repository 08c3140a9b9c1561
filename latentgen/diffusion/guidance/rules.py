"""The formulas of guidance on x0 estimates. Knows tensors and levels; does not know which of them a run uses, nor prompts, families or samplers.

All x0 are (B, C, h, w). What is measured (a norm, an angle, a spread) is measured of each picture by itself, so that a batch equals its pictures.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentgen.diffusion.guidance.progress import Progress
from latentgen.diffusion.level import Level

TINY = 1e-12  # keeps a division by the length of a tensor of zeros finite

Row = Callable[[Level], tuple[float, float]]  # level -> (a, b) of x0 = a * x + b * out, for instance `prediction_row` of the family's prediction


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The scalar product of each picture, (B, 1, 1, 1)."""
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


class Momentum:
    """The running sum d_i + momentum * d_(i-1) + momentum² * d_(i-2) ... of one run (Sadat et al. 2024, section 4.3). Make one for each run."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.sum: Tensor | None = None

    def __call__(self, direction: Tensor) -> Tensor:
        """The sum with this direction as its newest term."""
        self.sum = direction if self.sum is None else direction + self.momentum * self.sum
        return self.sum


def shortened(direction: Tensor, norm_threshold: float) -> Tensor:
    """The direction, brought back to this length where it is longer (Sadat et al. 2024, section 4.2); 0 leaves it."""
    if norm_threshold <= 0:
        return direction
    return direction * (norm_threshold / _dot(direction, direction).sqrt().clamp(min=TINY)).clamp(max=1)


def projected(direction: Tensor, x0: Tensor, *, eta: float) -> Tensor:
    """The part of a direction that stands upright on x0, and eta times the part along it (Sadat et al. 2024, section 4.1, of x0 as there)."""
    along = _dot(direction, x0) / _dot(x0, x0).clamp(min=TINY) * x0
    return direction - along + eta * along


def optimised_negative(x: Tensor, x0_pos: Tensor, x0_neg: Tensor, *, row: tuple[float, float]) -> Tensor:
    """The negative estimate, its output scaled to lie nearest to the positive one: s = <out_pos, out_neg> / |out_neg|² (Fan et al. 2025, eq. 13).

    The paper scales velocities, so the scale is that of the network's outputs, which the row gives back from x0; the result is x0.
    """
    a, b = row
    if b == 0:  # at sigma = 0 there is nothing left to predict
        return x0_neg
    out_pos, out_neg = (x0_pos - a * x) / b, (x0_neg - a * x) / b
    scale = _dot(out_pos, out_neg) / _dot(out_neg, out_neg).clamp(min=TINY)
    return a * x + b * (scale * out_neg)


def perpendicular(x0_pos: Tensor, x0_neg: Tensor, x0_empty: Tensor, *, weight: float) -> Tensor:
    """Where Perp-Neg guides to, seen from the empty prompt's estimate: d_pos - weight * (d_neg without its part along d_pos).

    d is an estimate less that of the empty prompt (Armandpour et al. 2023, eq. 8): the negative words take nothing from what both prompts say.
    """
    pos, neg = x0_pos - x0_empty, x0_neg - x0_empty
    return pos - weight * projected(neg, pos, eta=0.0)


def manifold_scale(strength: float, progress: Progress) -> Callable[[Level], float]:
    """CFG++ (Chung et al. 2024, algorithm 2) as a guidance scale that changes with the level.

    A step of CFG++ goes to x' = alpha' x0_strength + sigma' eps_neg, with x0_strength = x0_neg + strength * (x0_pos - x0_neg).
    That is the first-order
    step with guidance scale strength / (1 - q), where q = (sigma' / alpha') / (sigma / alpha) is how much of the noise stays until the next level.
    """

    def scale(level: Level) -> float:
        following = progress.following(level)
        if following.sigma == 0 or level.alpha == 0:
            return strength
        q = following.sigma * level.alpha / (following.alpha * level.sigma)
        return strength / (1 - q) if q < 1 else 1.0  # at the very level that it goes to, nothing is guided

    return scale


def mimicked(x0: Tensor, x0_mimic: Tensor, *, percentile: float) -> Tensor:
    """x0 of a high guidance scale with the range of a lower one's, channel by channel, as sd-dynamic-thresholding has it (mean, absolute deviation).

    Around its mean each channel is clamped at its `percentile` of |deviation| and brought to the largest deviation that the lower scale has.
    """
    mean = x0.mean(dim=(-2, -1), keepdim=True)
    far, aim = x0 - mean, (x0_mimic - x0_mimic.mean(dim=(-2, -1), keepdim=True)).abs().amax(dim=(-2, -1), keepdim=True)
    reach = torch.maximum(quantile(far.abs().flatten(2), percentile)[..., None, None], aim)
    return mean + far.clamp(-reach, reach) * (aim / reach.clamp(min=TINY))


def quantile(values: Tensor, percentile: float) -> Tensor:
    """The quantile along the last axis, linear between two values. By sorting: torch's own takes 16 million numbers at most."""
    ordered = values.sort(dim=-1).values
    place = percentile * (values.shape[-1] - 1)
    low = int(place)
    high = min(low + 1, values.shape[-1] - 1)
    return ordered[..., low].lerp(ordered[..., high], place - low)
