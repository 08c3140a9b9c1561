"""glyph: words to icons. A CLIP text encoder, a small U-Net with cross-attention (v-prediction, zero-terminal SNR), a factor-8 VAE.

The same layout as Stable Diffusion 2 with a v-prediction U-Net, at a hundredth of the size; knows nothing of prompts or samplers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentgen.conditioning.tokens import TokenizerSpec
from latentgen.diffusion.level import Level, VariancePreserving
from latentgen.diffusion.schedule import scaled_linear, zero_terminal_snr
from latentgen.models.family import Conditioning, Defaults, Family, Model, Modules, Part, Signature, Words
from latentgen.pipelines._unet import told_time
from latentgen.pixels.latent import LatentSpec

PARTS = (
    Part("text_encoder", "transformers.CLIPTextModel", ("text",)),
    Part("unet", "diffusers.UNet2DConditionModel", ("denoiser",)),
    Part("vae", "diffusers.AutoencoderTiny", ("encoder", "decoder")),
)
SIGNATURES: tuple[Signature, ...] = ()  # known by its card
INDEX: tuple[str, ...] = ()


def encode(modules: Modules, words: Words) -> Conditioning:
    """(n, 32) token ids of n chunks -> states (1, n * 32, width), the chunks joined end to end."""
    states = words.weigh("tokenizer", modules["text_encoder"](words.ids["tokenizer"]).last_hidden_state)
    return Conditioning(states.reshape(1, -1, states.shape[-1]))


def predict(modules: Modules, x: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
    """(B, 4, h, w) latents -> v, float32."""
    unet = modules["unet"]
    dtype = next(unet.parameters()).dtype  # unet.dtype walks through every module
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    return unet(x, told_time(x, level), conditioning.tokens.to(dtype), return_dict=False)[0].float()


def build(model: Model) -> Family:
    """glyph, or a checkpoint of its shape."""
    return Family(
        name="glyph", parts=PARTS, path=VariancePreserving(zero_terminal_snr(scaled_linear(1000, 0.00085, 0.012))), prediction="v",
        latent=LatentSpec(channels=4, factor=8, multiple=8, scale=float(model.config("vae").get("scaling_factor") or 1.0)),
        tokenizers={"tokenizer": TokenizerSpec("clip")}, encode=encode, predict=predict,
        defaults=Defaults(width=256, height=256, steps=20, sampler="dpmpp_2m", spacing="trailing", guidance_scale=4.0),
    )
