"""The mathematics of diffusion. Imports torch and nothing else; knows no prompt, model, device or image.

A denoiser maps (x, level) to x0. `level` says what a level is, `schedule` which levels a run visits, `sample` how x moves
between them, `guide` wraps denoisers, `noise` turns seeds into noise.
"""

from latentgen.diffusion.guide import guided, masked
from latentgen.diffusion.level import (
    Denoiser,
    Level,
    NoisePath,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    noised,
    prediction_row,
    start,
)
from latentgen.diffusion.noise import SeededNoise
from latentgen.diffusion.sample import SAMPLERS, SamplerInfo, Step, sampler
from latentgen.diffusion.schedule import SPACINGS, shifted, spacing, zero_terminal_snr

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "Denoiser",
    "Level",
    "NoisePath",
    "RectifiedFlow",
    "SamplerInfo",
    "SeededNoise",
    "Step",
    "VarianceExploding",
    "VariancePreserving",
    "guided",
    "masked",
    "noised",
    "prediction_row",
    "sampler",
    "shifted",
    "spacing",
    "start",
    "zero_terminal_snr",
]
