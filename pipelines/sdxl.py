"""sdxl: Stable Diffusion XL base, refiner and 9-channel inpainting: two CLIP encoders, a U-Net told sizes, a factor-8 VAE (Podell et al. 2023).

Knows the family's conventions, and reads from a checkpoint's configs which of its kinds it is. Turbo, Lightning and LCM merges are cards: the same
network with other defaults. Knows no prompts, samplers, guidance or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from latentgen.conditioning.tokens import TokenizerSpec
from latentgen.diffusion.level import Level
from latentgen.errors import ModelError
from latentgen.models.family import Conditioning, Config, Defaults, Family, Model, Modules, Original, Part, Scene, Side, Signature, Words
from latentgen.pipelines._unet import beside, check_parts, clip_layers, latent_spec, masked_picture, noise_path, prediction, run_defaults, told_time

INDEX = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")

PARTS = (
    Part("text_encoder", "transformers.CLIPTextModel", ("text",), optional=True, original=Original(  # the refiner has none
        ("conditioner.embedders.0.transformer.text_model.", "text_model.", ""), unique="embeddings.token_embedding.weight")),
    Part("text_encoder_2", "transformers.CLIPTextModelWithProjection", ("text",), original=Original(
        ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.", ""), "convert_open_clip_checkpoint",
        unique="transformer.resblocks.0.ln_1.weight")),
    Part("unet", "diffusers.UNet2DConditionModel", ("denoiser",), original=Original(
        ("model.diffusion_model.", ""), "convert_ldm_unet_checkpoint", unique="input_blocks.0.0.weight")),
    Part("vae", "diffusers.AutoencoderKL", ("encoder", "decoder"), original=Original(
        ("first_stage_model.", "vae.", ""), "convert_ldm_vae_checkpoint", unique="encoder.down.0.block.0.norm1.weight")),
)


def _signatures(variant: str, *, channels: int, width: int, added: int, words: int, deep: tuple[str, str]) -> tuple[Signature, Signature]:
    """A published U-Net by its makers' names and by diffusers': its ends, what it is told beside the words, the last block of its deepest attention.

    That block is asked for so that smaller U-Nets of the same outer shape are not taken for it.
    """
    shapes = {"{first}.weight": (width, channels, 3, 3), "{last}.weight": (4, width, 3, 3), "{told}.weight": (4 * width, added),
              "{deep}.attn2.to_k.weight": (4 * width, words)}
    original = {"first": "input_blocks.0.0", "last": "out.2", "told": "label_emb.0.0", "deep": deep[0]}
    diffusers = {"first": "conv_in", "last": "conv_out", "told": "add_embedding.linear_1", "deep": deep[1]}
    return (Signature(variant, "original", {k.format(**original): v for k, v in shapes.items()}),
            Signature(variant, "diffusers", {k.format(**diffusers): v for k, v in shapes.items()},
                      absent=("time_embedding.cond_proj.weight",)))  # a U-Net that is told the guidance scale: a folder with its own config says so


_DEEP = ("input_blocks.8.1.transformer_blocks.", "down_blocks.2.attentions.1.transformer_blocks.")
SIGNATURES = (
    *_signatures("sdxl-inpaint", channels=9, width=320, added=2816, words=2048, deep=(f"{_DEEP[0]}9", f"{_DEEP[1]}9")),
    *_signatures("sdxl-refiner", channels=4, width=384, added=2560, words=1280, deep=(f"{_DEEP[0]}3", f"{_DEEP[1]}3")),
    *_signatures("sdxl", channels=4, width=320, added=2816, words=2048, deep=(f"{_DEEP[0]}9", f"{_DEEP[1]}9")),
)
SIZES = ("original_size", "crop_top_left", "target_size")


def encode(modules: Modules, words: Words, *, encoders: Mapping[str, str], zeros: bool) -> Conditioning:
    """The last hidden states but one, without the final norm, of n chunks joined end to end: (1, n * 77, both widths); pooled is the second encoder's
    projection of the first chunk's end token.

    Args:
        encoders: part -> the tokenizer that it reads, in the order in which the states are joined.
        zeros: a negative side that says nothing is all zeros, as the checkpoint was trained.
    """
    if zeros and words.empty and words.side == "negative":
        return _silence(modules, words, encoders)
    states, pooled = [], None
    for part, tokenizer in encoders.items():
        out = modules[part](words.ids[tokenizer], output_hidden_states=True)
        states.append(words.weigh(tokenizer, out.hidden_states[-1 - words.clip_skip]).flatten(0, 1)[None])
        pooled = out.text_embeds[:1] if part == "text_encoder_2" else pooled
    return Conditioning(torch.cat(states, dim=-1), pooled)


def _silence(modules: Modules, words: Words, encoders: Mapping[str, str]) -> Conditioning:
    """What no words at all are: zeros in the shapes that `encode` gives, without running the encoders."""
    last = modules["text_encoder_2"]
    ids = words.ids[encoders["text_encoder_2"]]
    width = sum(modules[part].config.hidden_size for part in encoders)
    return Conditioning(torch.zeros(1, ids.numel(), width, dtype=last.dtype, device=ids.device),
                        torch.zeros(1, last.config.projection_dim, dtype=last.dtype, device=ids.device))


def inputs(scene: Scene, side: Side, *, scored: bool, channels: int, guidance_width: int) -> dict[str, Tensor]:
    """What the U-Net is told beside the words.

    Args:
        scored: the last numbers are an aesthetic score (the refiner) and not the target size.
        channels: of the U-Net's input; 9 adds the mask and the picture with a hole.
        guidance_width: of the guidance scale's embedding, 0 where the network does not hear it.

    Returns:
        sizes (1, 6): original height and width, crop top and left, target height and width; or (1, 5): the aesthetic score in place of the last two.
        Where the network takes them, guidance (1, guidance_width), and mask and masked picture (see `masked_picture`).
    """
    own = (scene.height, scene.width)
    said = dict(zip(SIZES, (own, (0, 0), own)), aesthetic_score=6.0)
    given = {name: value for name, value in scene.options.items() if value is not None}
    said |= {name: given[name] for name in said if name in given}
    if side != "positive":
        said |= {"aesthetic_score": 2.5} | {name: given[f"negative_{name}"] for name in said if f"negative_{name}" in given}
    last = (said["aesthetic_score"],) if scored else said["target_size"]
    made = {"sizes": torch.tensor([[*said["original_size"], *said["crop_top_left"], *last]], dtype=torch.float32)}
    if channels == 9:
        made |= masked_picture(scene, side)
    if guidance_width:
        made["guidance"] = _guidance(float(scene.options["guidance_scale"]), guidance_width)
    return made


def _guidance(scale: float, width: int) -> Tensor:
    """The scale as a wave embedding of w = scale - 1, (1, width) (Meng et al. 2023; sines first, at 1000 w)."""
    half = width // 2
    waves = 1000 * (scale - 1) * torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))
    return torch.nn.functional.pad(torch.cat([waves.sin(), waves.cos()]), (0, width % 2))[None]


def predict(modules: Modules, x: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
    """(B, 4, h, w) latents -> what the checkpoint predicts, float32."""
    unet, extra, pooled = modules["unet"], conditioning.extra, conditioning.pooled
    assert pooled is not None
    dtype = unet.dtype
    x = beside(x, conditioning).to(dtype).contiguous(memory_format=torch.channels_last)
    scale = extra["guidance"].to(x) if "guidance" in extra else None
    added = {"text_embeds": pooled.to(dtype), "time_ids": extra["sizes"].to(x.device)}
    return unet(x, told_time(x, level), conditioning.tokens.to(dtype), timestep_cond=scale, added_cond_kwargs=added, return_dict=False)[0].float()


def build(model: Model) -> Family:
    """The family as a checkpoint's configs have it.

    Raises:
        ModelError: a U-Net whose inputs are of another kind, or a noise schedule that is not known.
    """
    unet, second = model.config("unet"), model.config("text_encoder_2")
    channels, scored = _kind(unet, second)
    alone = unet.get("cross_attention_dim", 2048) == second.get("hidden_size", 1280)  # words of the second encoder only
    encoders = {"text_encoder_2": "tokenizer_2"} if alone else {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    heard = int(unet.get("time_cond_proj_dim") or 0)
    latent = latent_spec(model.config("vae"), scale=0.13025)
    check_parts(unet, latent, *(model.config(part) for part in encoders))
    said = {"steps": 30, "sampler": "euler"} | run_defaults(model.config("scheduler"), {"sample_size": unet.get("sample_size") or 128}, latent.factor)
    if heard:  # a latent consistency model: few steps, from pure noise
        said |= {"steps": 4, "sampler": "lcm", "spacing": "trailing", "guidance_scale": 8.0}
    return Family(
        name="sdxl",
        parts=tuple(p for p in PARTS if p.name != "text_encoder" or not alone),
        path=noise_path(model.config("scheduler")),
        prediction=prediction(model.config("scheduler")),
        latent=latent,
        tokenizers={name: TokenizerSpec("clip", length=second.get("max_position_embeddings", 77)) for name in encoders.values()},
        encode=partial(encode, encoders=encoders, zeros=bool(model.config("model_index").get("force_zeros_for_empty_prompt", True))),
        predict=predict,
        inputs=partial(inputs, scored=scored, channels=channels, guidance_width=heard),
        guidance="embedded" if heard else "cfg",
        task="inpaint" if channels == 9 else "any",
        clip_skip=clip_layers(*map(model.config, encoders)) - 1,
        options=tuple(side + name for side in ("", "negative_") for name in (*SIZES[:2], "aesthetic_score" if scored else SIZES[2])),
        defaults=Defaults(**said | {"strength": 0.3 if scored else 0.75}),
    )


def _kind(unet: Config, second: Config) -> tuple[int, bool]:
    """Input channels, and whether the last numbers beside the words are an aesthetic score.

    Raises:
        ModelError: the U-Net wants what this family does not have.
    """
    channels, kind = unet.get("in_channels", 4), unet.get("addition_embed_type", "text_time")
    added, each = unet.get("projection_class_embeddings_input_dim", 2816), unet.get("addition_time_embed_dim", 256)
    pooled = second.get("projection_dim", 1280)
    room = {n: n * each + pooled for n in (5, 6)} if isinstance(each, int) and isinstance(pooled, int) else {}
    if channels not in (4, 9) or kind != "text_time" or added not in room.values():
        raise ModelError(f"the U-Net takes {channels!r:.40} channels and beside the words {kind!r:.40} of width {added!r:.40}: expected 4 or 9 "
                         f"channels (9 for inpainting) and 'text_time' of width {room.get(6)} or {room.get(5)} (the "
                         "refiner), so load it as what it is")
    return int(channels), added == room[5]
