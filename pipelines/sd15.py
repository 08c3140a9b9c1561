"""sd15: Stable Diffusion 1.x and its fine-tunes. CLIP-L, a U-Net with cross-attention, a factor-8 VAE (Rombach et al. 2022).

Knows three shapes of the U-Net's input: 4 channels; 9 for inpainting (mask and masked picture beside x); 8 for editing by instruction
(InstructPix2Pix, Brooks et al. 2023). Prediction and noise table are the scheduler config's. Knows no prompts, samplers or files.
"""

from __future__ import annotations

from functools import partial

from latentgen.conditioning.tokens import TokenizerSpec
from latentgen.errors import ModelError
from latentgen.models.family import Conditioning, Config, Defaults, Family, Model, Modules, Original, Part, Signature, Words, no_inputs
from latentgen.pipelines._unet import (
    check_parts,
    clip_layers,
    clip_states,
    latent_spec,
    masked_picture,
    noise_path,
    of_one_shape,
    predict,
    prediction,
    reference_latents,
    run_defaults,
)

PARTS = (
    Part("text_encoder", "transformers.CLIPTextModel", ("text",), original=Original(
        ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.", "text_model.", ""),
        unique="embeddings.token_embedding.weight")),
    Part("unet", "diffusers.UNet2DConditionModel", ("denoiser",), original=Original(
        ("model.diffusion_model.", ""), "convert_ldm_unet_checkpoint", unique="input_blocks.0.0.weight")),
    Part("vae", "diffusers.AutoencoderKL", ("encoder", "decoder"), original=Original(
        ("first_stage_model.", "vae.", ""), "convert_ldm_vae_checkpoint", unique="encoder.down.0.block.0.norm1.weight")),
)
INDEX = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionInpaintPipelineLegacy",
         "StableDiffusionInstructPix2PixPipeline")
# SDXL, unCLIP, latent consistency
ADDED = ("add_embedding.linear_1.weight", "class_embedding.linear_1.weight", "time_embedding.cond_proj.weight")


def signatures(variant: str, channels: int, width: int) -> tuple[Signature, Signature]:
    """The U-Net of four levels with `channels` inputs and text states of `width`, by its makers' names and by diffusers'.

    One attention of the second layer and one of the deepest are asked for, so that U-Nets with fewer blocks are not taken for it.
    """
    shapes = {
        "{first}.weight": (320, channels, 3, 3), "{last}.weight": (4, 320, 3, 3),
        "{one}.transformer_blocks.0.attn2.to_k.weight": (320, width), "{two}.transformer_blocks.0.attn2.to_k.weight": (320, width),
        "{deep}.transformer_blocks.0.attn2.to_k.weight": (1280, width), "{middle}.transformer_blocks.0.attn2.to_k.weight": (1280, width),
    }
    original = {"first": "input_blocks.0.0", "last": "out.2", "one": "input_blocks.1.1", "two": "input_blocks.2.1",
                "deep": "input_blocks.8.1", "middle": "middle_block.1"}
    diffusers = {"first": "conv_in", "last": "conv_out", "one": "down_blocks.0.attentions.0", "two": "down_blocks.0.attentions.1",
                 "deep": "down_blocks.2.attentions.1", "middle": "mid_block.attentions.0"}
    return (Signature(variant, "original", {k.format(**original): v for k, v in shapes.items()}, absent=("label_emb.0.0.weight",)),
            Signature(variant, "diffusers", {k.format(**diffusers): v for k, v in shapes.items()}, absent=ADDED))


SIGNATURES = (*signatures("sd15", 4, 768), *signatures("sd15-inpaint", 9, 768), *signatures("sd15-instruct", 8, 768))


def encode(modules: Modules, words: Words) -> Conditioning:
    """(n, 77) token ids of n chunks -> states (1, n * 77, width), the chunks joined end to end."""
    weigh = partial(words.weigh, "tokenizer")
    return Conditioning(clip_states(modules["text_encoder"], words.ids["tokenizer"], skip=words.clip_skip, weigh=weigh))


def check_unet(unet: Config, name: str, *, channels: tuple[int, ...]) -> int:
    """The U-Net's input channels, if it is one that this kind of family can run.

    Raises:
        ModelError: another number of channels, or an input (class, size, guidance scale) that the family does not give it.
    """
    for key, what in (("time_cond_proj_dim", "a guidance scale (a latent consistency model)"), ("class_embed_type", "classes or noise levels"),
                      ("num_class_embeds", "classes or noise levels"), ("addition_embed_type", "pooled words and sizes")):
        if unet.get(key) is not None:
            raise ModelError(f"the U-Net wants {what} ({key} is {unet[key]!r:.40}), which {name} does not have: load it as the family that it is of")
    found = unet.get("in_channels", 4)
    if found not in channels:
        raise ModelError(f"the U-Net takes {found!r:.40} channels: {name} can run {', '.join(map(str, channels))}")
    return int(found)


def build(model: Model) -> Family:
    """Stable Diffusion 1.x as the configs describe it.

    Raises:
        ModelError: a U-Net or scheduler that is not of this family.
    """
    unet, scheduler, latent = model.config("unet"), model.config("scheduler"), latent_spec(model.config("vae"))
    channels = check_unet(unet, "sd15", channels=(4, 8, 9))
    check_parts(unet, latent, model.config("text_encoder"))
    return Family(
        name="sd15", parts=PARTS, path=noise_path(scheduler), prediction=prediction(scheduler), latent=latent,
        tokenizers={"tokenizer": TokenizerSpec("clip", pad="<|endoftext|>")},
        encode=encode, predict=predict, inputs={4: no_inputs, 8: partial(reference_latents, latent=latent), 9: masked_picture}[channels],
        guidance="image" if channels == 8 else "cfg", task={4: "any", 8: "edit", 9: "inpaint"}[channels], references=1 if channels == 8 else 0,
        fits=partial(of_one_shape, factor=latent.factor),
        clip_skip=clip_layers(model.config("text_encoder")),
        defaults=Defaults(guidance_scale=7.5, image_guidance_scale=1.5, **run_defaults(scheduler, unet, latent.factor)),
    )
