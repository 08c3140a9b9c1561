"""Tiny random networks that react: what every family's parity test builds its checkpoints from. Knows torch, diffusers and transformers; no latentgen.

Freshly initialised networks hide mistakes: cross-attention hardly hears the prompt, zero biases and unit norms cancel. `lively` cures that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

CONDITIONING = ("attn2", "to_k", "to_v", "add_", "context_embedder", "caption", "time_text_embed", "time_embedding", "class_embedding", "text_proj", "norm1.linear", "modulation")


def lively(module: Any, *, seed: int = 0, gain: float = 3.0) -> Any:
    """The module with conditioning weights `gain` times as large, and biases and norms moved by a tenth; in eval mode, float32."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim <= 1:
                p.add_(0.1 * torch.randn(p.shape, generator=dice))
            elif any(word in name for word in CONDITIONING):
                p.mul_(gain)
    return module.float().eval().requires_grad_(False)


def tiny_vae(*, channels: int = 4, seed: int = 0, **config: Any) -> nn.Module:
    """An AutoencoderKL of factor 8 (four levels of 8 channels)."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "block_out_channels": (8,) * 4, "norm_num_groups": 4}
    return lively(AutoencoderKL(latent_channels=channels, **(blocks | config)), seed=seed)


def tiny_clip(*, width: int = 32, projected: bool = False, seed: int = 0, **config: Any) -> nn.Module:
    """A CLIP text model over the full vocabulary with three layers: CLIPTextModel, or with a projection of the same width."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    said = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 49408, "projection_dim": width,
            "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
    return lively((CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**(said | config))), seed=seed)


@contextmanager
def mean_latents() -> Iterator[None]:
    """Let diffusers' pipelines take the mean of the VAE's posterior, as this library does, where they would draw from it."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Posterior

    drawn = Posterior.sample
    Posterior.sample = lambda self, generator=None: self.mean
    try:
        yield
    finally:
        Posterior.sample = drawn
