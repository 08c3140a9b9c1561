"""The contract between the engine and a model family. Knows shapes of things; names no family and loads nothing.

A family is one file in `pipelines/` that declares data and two functions, `encode` and `predict`. The engine never asks which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from latentgen.conditioning.encoders import ClipTokens
    from latentgen.diffusion.level import Level, NoisePath
    from latentgen.pixels.latent import LatentSpec

Modules = Mapping[str, Any]  # part name -> torch module
Stage = Literal["text", "encoder", "denoiser", "decoder"]


@dataclass(frozen=True)
class Part:
    """One module of a checkpoint.

    Attributes:
        name: its key in `Modules`, also its folder in a diffusers layout.
        cls: library and class, "diffusers.UNet2DConditionModel"; taken from this declaration, never from the folder.
        stages: when it is needed.
    """

    name: str
    cls: str
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Conditioning:
    """Words (and more) as tensors.

    Attributes:
        tokens: (B, n, width) states for cross-attention or joint attention.
        pooled: (B, width) or None.
        extra: further inputs by the network's own names (time ids, image latents, ...).
    """

    tokens: Tensor
    pooled: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Defaults:
    """What a request gets where it says nothing."""

    width: int = 512
    height: int = 512
    steps: int = 20
    sampler: str = "dpmpp_2m"
    spacing: str = "trailing"
    guidance_scale: float = 5.0
    guidance_rescale: float = 0.0
    strength: float = 0.75
    shift: float = 1.0


@dataclass(frozen=True)
class Family:
    """An architecture with its conventions.

    Attributes:
        name: as cards name it.
        parts: its modules.
        path: how levels run from noise to clean.
        prediction: what the network returns: "epsilon", "v", "flow", "x0" or "edm".
        latent: shape and scale of latents (a checkpoint's own VAE config may refine it).
        guidance: "cfg" (two evaluations), "embedded" (an input of the network) or "none".
        encode: (modules, ids (n, length)) -> Conditioning of batch 1.
        predict: (modules, x (B, c, h, w), level, conditioning of batch B) -> raw network output, float32.
        tokenizer: folder of the checkpoint -> tokenizer.
    """

    name: str
    parts: tuple[Part, ...]
    path: NoisePath
    prediction: str
    latent: LatentSpec
    encode: Callable[[Modules, Tensor], Conditioning]
    predict: Callable[[Modules, Tensor, Level, Conditioning], Tensor]
    tokenizer: Callable[[Path], ClipTokens]
    guidance: Literal["cfg", "embedded", "none"] = "cfg"
    defaults: Defaults = Defaults()
