"""Samplers of score models that walk at a fixed level: annealed Langevin dynamics and predictor-corrector.

Knows levels and a denoiser: the score of x is (alpha * x0 - x) / sigma². Does not know families, prompts, guidance, seeds or devices. What a
sampler is given is told in `steps`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from latentgen.diffusion.level import Denoiser, Level
from latentgen.diffusion.samplers.steps import Noise, Step, advance, ancestral, fall, transitions


def annealed_langevin(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, inner: int = 5, step: float = 0.2) -> Iterator[Step]:
    """Annealed Langevin dynamics (NCSN, Song & Ermon 2019, algorithm 1): `inner` steps of Langevin's walk at each level, one draw each.

    x moves to the next level by its scale alone (not at all where alpha = 1), except from alpha = 0 and to sigma' = 0: there it takes the
    first-order step, the latter being the last denoising of Jolicoeur-Martineau et al. 2020. step: the paper's step size at a level as a
    share of its sigma² (epsilon / sigma_L², there 2e-5 / 0.01²). It wants many levels, close together: the paper has 10 with inner = 100,
    NCSNv2 hundreds with inner = 5.
    """
    for index, now, then in transitions(x, levels):
        for _ in range(inner):
            x0 = denoise(x, now)
            x = (1 - step / 2) * x + (step / 2 * now.alpha) * x0 + math.sqrt(step) * now.sigma * noise().to(x)
        if then.sigma == 0 or now.alpha == 0:
            x0 = denoise(x, now)
            x = advance(x, x0, now, then)
        else:
            x = x * (then.alpha / now.alpha)
        yield Step(index, len(levels) - 1, now, x0, x)


def predictor_corrector(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, snr: float = 0.16, corrector_steps: int = 1,
                        predictor: str = "ancestral") -> Iterator[Step]:
    """Predictor-corrector sampling (Song et al. 2021, score SDE, algorithms 1 and 4-5): at each level Langevin steps, then a step down.

    snr: the corrector's r, its signal-to-noise ratio. Norms are those of each image, so that a picture never depends on its batch.
    predictor: "ancestral" (exact for a right x0), "reverse" (reverse diffusion, the paper's for the VE SDE: noise larger by ratio /
    ratio'; ancestral from alpha = 0), or "none" for the corrector and the deterministic step. Draws: the correctors', then the predictor's.
    """
    for index, now, then in transitions(x, levels):
        for _ in range(corrector_steps):
            x = _corrected(x, denoise(x, now), now, noise().to(x), snr)
        x0 = denoise(x, now)
        keep = 1.0 if predictor == "none" else ancestral(now, then, 1.0)
        shrink = fall(now, then)
        louder = 1 / shrink if predictor == "reverse" and shrink > 0 else 1.0
        x = advance(x, x0, now, then, keep=keep, noise=noise, s_noise=louder)
        yield Step(index, len(levels) - 1, now, x0, x)


def _corrected(x: Tensor, x0: Tensor, now: Level, z: Tensor, snr: float) -> Tensor:
    """x + e * score + sqrt(2 e) * z, with the paper's e = 2 (snr |z| / |score|)²; the score is -eps / sigma."""
    eps = (x - now.alpha * x0) / now.sigma
    dims = tuple(range(1, x.ndim)) if x.ndim > 1 else (0,)
    sizes = [value.square().sum(dim=dims, keepdim=True).sqrt() for value in (z, eps)]
    pace = snr * sizes[0] / sizes[1].clamp_min(1e-12)
    return x - 2 * now.sigma * pace**2 * eps + 2 * now.sigma * pace * z
