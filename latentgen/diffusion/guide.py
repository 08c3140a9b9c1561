"""Wrappers around a denoiser that are denoisers themselves: guidance and masks.

Knows x0 estimates and levels. Does not know prompts, families, samplers or devices. Guidance acts on x0: every prediction is
affine in the network's output, so guiding x0 is guiding the output, whatever the family predicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from latentgen.diffusion.level import Denoiser, Level, noised
from latentgen.errors import RequestError


@dataclass(frozen=True)
class Estimates:
    """What is known of x0 at one level, each (B, C, h, w).

    positive: with the prompt.  others: with the negative prompt, and where a picture guides too, with neither; () without classifier-free guidance.
    empty: with the empty prompt, for Perp-Neg.  weak: guider -> with the prompt, of a weaker network, where that guider acts.
    """

    positive: Tensor
    others: tuple[Tensor, ...] = ()
    empty: Tensor | None = None
    weak: Mapping[str, Tensor] = field(default_factory=dict)


Rule = Callable[[Tensor, Level, Estimates], Tensor]  # (x, level, estimates) -> x0


def guided(
    positive: Denoiser,
    every: Callable[[Tensor, Level], Estimates],
    *,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    position: Callable[[Level], float],
    combine: Rule | None = None,
) -> Denoiser:
    """Classifier-free guidance: x0 = x0_neg + scale * (x0_pos - x0_neg) (Ho & Salimans 2022, eq. 6, as weight w = scale - 1).

    positive: (x, level) -> x0 with the prompt; all that is called at scale 1 and outside the interval.
    every: (x, level) -> all that the rule takes: with the prompt and with the negative prompt, and more where `combine` takes more.
    scale: 1 is off.
    rescale: in [0, 1], see `rescaled`; 0 is off.
    interval: (low, high) in s, 0 clean to 1 noise, ends included: where to guide (Kynkäänniemi et al. 2024).
    position: level -> s, for instance `lambda level: path.find(level.half_log_snr)`.
    combine: where another rule than the one above holds, for instance `image_guidance`, or those of `latentgen.diffusion.guidance.combine`.

    Raises RequestError for a scale that is not finite, a rescale outside [0, 1] or an interval not within [0, 1].
    """
    low, high = interval
    if not math.isfinite(scale):
        raise RequestError(f"guidance scale is {scale}: give a finite number (1 is off).")
    if not 0 <= rescale <= 1:
        raise RequestError(f"guidance rescale is {rescale}: give a number from 0 (off) to 1.")
    if not 0 <= low <= high <= 1:
        raise RequestError(f"guidance interval is {interval}: give (low, high) with 0 <= low <= high <= 1, 0 clean and 1 noise.")
    if scale == 1 and combine is None:
        return positive

    def denoise(x: Tensor, level: Level) -> Tensor:
        if not low <= position(level) <= high:
            return positive(x, level)
        said = every(x, level)
        x0 = said.others[0] + scale * (said.positive - said.others[0]) if combine is None else combine(x, level, said)
        return rescaled(x0, said.positive, rescale) if rescale > 0 else x0

    return denoise


def image_guidance(x0_full: Tensor, x0_image: Tensor, x0_none: Tensor, *, scale: float, image_scale: float) -> Tensor:
    """Guidance by words and by a picture (Brooks et al. 2023, InstructPix2Pix, eq. 3): estimates with both, with the picture alone, with neither.

    All are (B, C, h, w). scale: of the words. image_scale: of the picture.
    """
    return x0_none + image_scale * (x0_image - x0_none) + scale * (x0_full - x0_image)


def rescaled(x0: Tensor, x0_pos: Tensor, rescale: float) -> Tensor:
    """Guided x0 brought back towards the spread of the unguided one, against over-exposure (Lin et al. 2023, eq. 15-16).

    x0 and x0_pos are (B, C, h, w); the standard deviation is that of each image. The paper, and diffusers, take it of the
    network's output; here it is that of x0, so that families with different predictions are treated alike.
    """
    dims = tuple(range(1, x0.ndim))
    matched = x0 * (x0_pos.std(dim=dims, keepdim=True) / x0.std(dim=dims, keepdim=True))
    return rescale * matched + (1 - rescale) * x0


def masked(denoise: Denoiser, *, z0: Tensor, mask: Tensor, eps: Tensor) -> Denoiser:
    """Inpainting: where mask is 0 the denoiser sees z0 at the level's noise, and answers z0 (after Lugmayr et al. 2022, eq. 8).

    z0: the clean latent to keep, (B, C, h, w).  mask: (B, 1, h, w) in [0, 1], 1 = repaint.  eps: unit normal, like z0; the
    same noise at every level, so the kept area runs along one straight trajectory. A run that ends at sigma = 0 ends with
    exactly z0 where mask is exactly 0.
    """
    kept = (1 - mask) * z0

    def denoise_masked(x: Tensor, level: Level) -> Tensor:
        x0 = denoise(mask * x + (1 - mask) * noised(z0, eps, level), level)
        return mask * x0 + kept

    return denoise_masked
