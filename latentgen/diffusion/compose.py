"""Several prompts at once: composable diffusion. Knows x0 estimates and weights; knows no prompt, family or sampler."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def composed(x0s: Sequence[Tensor], x0_base: Tensor, weights: Sequence[float]) -> Tensor:
    """x0_base + sum of w_i (x0_i - x0_base) (Liu et al. 2022, eq. 11, of x0). Guided by a scale s it is x0_base + s * that sum.

    Args:
        x0s: estimates with each of the prompts, (B, C, h, w).
        x0_base: the estimate that they are weighed against, of the negative prompt.
        weights: one of each prompt; negative ones lead away from theirs.
    """
    made = x0_base
    for x0, weight in zip(x0s, weights, strict=True):
        made = made + weight * (x0 - x0_base)
    return made
