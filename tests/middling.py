"""Random checkpoints of middling size: weights of some ten megabytes whose activations at 1024x1024 take hundreds. Knows torch, diffusers, the tiny ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tiny import lively, tiny_vae
from tiny_folders import Tiny, tiny


def _grown(kind: str, vae_width: int = 64, **networks: Callable[[], Any]) -> Tiny:
    """A tiny checkpoint with a larger denoiser and, where it is the plain one, a larger VAE."""
    torch.manual_seed(0)
    small = tiny(kind)
    made = {name: lively(make(), gain=1.0) for name, make in networks.items()}
    if "vae" not in made and type(small.modules["vae"]).__name__ == "AutoencoderKL":
        config = small.modules["vae"].config
        made["vae"] = tiny_vae(channels=config.latent_channels, block_out_channels=(vae_width,) * 4, norm_num_groups=8, scaling_factor=config.scaling_factor,
                               shift_factor=config.shift_factor, use_quant_conv=config.use_quant_conv, use_post_quant_conv=config.use_post_quant_conv)
    return replace(small, modules={**small.modules, **made})


def _unet(**config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    said = {"sample_size": 128, "layers_per_block": 1, "block_out_channels": (128, 256), "cross_attention_dim": 32, "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    return UNet2DConditionModel(**(said | config))


def _xl() -> Any:
    return _unet(cross_attention_dim=64, block_out_channels=(192, 512), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(3, 8),
                 up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2), use_linear_projection=True,
                 addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + 32)


def _film() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(base_dim=32)


def _transformer(name: str, kind: str, **config: Any) -> Callable[[], Any]:
    import diffusers

    known = {key: value for key, value in tiny(kind).modules["transformer"].config.items() if not key.startswith("_")}
    return lambda: getattr(diffusers, name)(**(known | config))


MIDDLING: dict[str, Callable[[], Tiny]] = {
    "sd15": lambda: _grown("sd15", unet=_unet),
    "sd21": lambda: _grown("sd21", unet=lambda: _unet(cross_attention_dim=48, use_linear_projection=True)),
    "sdxl": lambda: _grown("sdxl", unet=_xl),
    "sd3": lambda: _grown("sd3", transformer=_transformer("SD3Transformer2DModel", "sd3", attention_head_dim=64, num_attention_heads=16,
                                                          caption_projection_dim=1024, pos_embed_max_size=64)),
    "flux1": lambda: _grown("flux1", transformer=_transformer("FluxTransformer2DModel", "flux1", attention_head_dim=64, num_attention_heads=24,
                                                              axes_dims_rope=(16, 24, 24))),
    "flux2": lambda: _grown("flux2", transformer=_transformer("Flux2Transformer2DModel", "flux2", attention_head_dim=64, num_attention_heads=20,
                                                              axes_dims_rope=(16, 16, 16, 16))),
    "zimage": lambda: _grown("zimage", transformer=_transformer("ZImageTransformer2DModel", "zimage", dim=1536, n_heads=24, n_kv_heads=24,
                                                                axes_dims=(16, 24, 24), axes_lens=(512, 64, 64))),
    "qwenimage": lambda: _grown("qwenimage", transformer=_transformer("QwenImageTransformer2DModel", "qwenimage", attention_head_dim=64,
                                                                      num_attention_heads=20, axes_dims_rope=(16, 24, 24)), vae=_film),
    "pixart": lambda: _grown("pixart", transformer=_transformer("PixArtTransformer2DModel", "pixart", attention_head_dim=64, num_attention_heads=16, cross_attention_dim=1024,
                                                                sample_size=128)),
}


def DEEP() -> Tiny:  # noqa: N802 - a maker, as those above
    """Half a gigabyte of weights in ten blocks."""
    return _grown("flux1", vae_width=8, transformer=_transformer("FluxTransformer2DModel", "flux1", attention_head_dim=64, num_attention_heads=14,
                                                                 axes_dims_rope=(16, 24, 24), num_layers=2, num_single_layers=8))
