"""Thresholds: what keeps x0 within a range (Saharia et al. 2022, Imagen, section 2.3). Knows x0; does not know guidance, families or samplers.

Imagen's are for pixels in [-1, 1]. Latents have no such bounds: `limit` is the largest value that is thought to be right, in native latents, where
most families' have a spread of about 1.
"""

from __future__ import annotations

from torch import Tensor

from latentgen.diffusion.guidance.rules import quantile


def static_threshold(x0: Tensor, *, limit: float) -> Tensor:
    """x0 clamped to [-limit, limit]; (B, C, h, w)."""
    return x0.clamp(-limit, limit)


def dynamic_threshold(x0: Tensor, *, limit: float, percentile: float) -> Tensor:
    """x0 clamped to its own percentile s of |x0|, picture by picture, and shrunk by limit / s, where s is above the limit; (B, C, h, w)."""
    reach = quantile(x0.abs().flatten(1), percentile).clamp(min=limit).reshape(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-reach, reach) * (limit / reach)
