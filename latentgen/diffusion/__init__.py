"""The mathematics of diffusion. Imports torch and nothing else; knows no prompt, model, device or image.

A denoiser maps (x, level) to x0. `level` says what a level is, `schedule` which levels a run visits, `sample` which samplers there
are to move x between them (`samplers`), `names` what others call them, `guide` wraps denoisers, `guidance` has further rules, `noise` turns seeds
into noise.
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
from latentgen.diffusion.names import Ours, foreign, from_diffusers
from latentgen.diffusion.noise import SeededNoise, centred, slerp
from latentgen.diffusion.option import Option
from latentgen.diffusion.sample import SAMPLERS, SamplerInfo, Step, asked, sampler
from latentgen.diffusion.schedule import SPACINGS, UNSHIFTED, Levels, explicit, shifted, spacing, zero_terminal_snr

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "UNSHIFTED",
    "Denoiser",
    "Level",
    "Levels",
    "NoisePath",
    "Option",
    "Ours",
    "RectifiedFlow",
    "SamplerInfo",
    "SeededNoise",
    "Step",
    "VarianceExploding",
    "VariancePreserving",
    "asked",
    "centred",
    "explicit",
    "foreign",
    "from_diffusers",
    "guided",
    "masked",
    "noised",
    "prediction_row",
    "sampler",
    "shifted",
    "slerp",
    "spacing",
    "start",
    "zero_terminal_snr",
]
