"""pixart: PixArt-alpha (Chen et al. 2023) and -Sigma (Chen et al. 2024). T5, a transformer over 2x2 patches with cross-attention, SD's or SDXL's VAE.

Knows alpha's networks with and without size conditioning, and Sigma, whose network is that of alpha without it: only the pipeline that an index
names, or the variant, tells those two apart. The network also returns a variance, which no sampler here asks for. Knows no prompts or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from latentgen.conditioning.tokens import TokenizerSpec
from latentgen.diffusion.level import Level
from latentgen.errors import ModelError
from latentgen.models.family import Conditioning, Config, Defaults, Family, Model, Modules, Original, Part, Scene, Side, Signature, Words, no_inputs
from latentgen.pipelines._unet import latent_spec, noise_path, prediction, run_defaults

SCHEDULER: Config = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
                     "num_train_timesteps": 1000}
LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}  # tokens, as each was trained
TOLD = ("adaln_single.emb.resolution_embedder.linear_1.weight", "adaln_single.emb.aspect_ratio_embedder.linear_1.weight")

_SHAPES = {"pos_embed.proj.weight": (1152, 4, 2, 2), "adaln_single.linear.weight": (6912, 1152), "caption_projection.linear_1.weight": (1152, 4096),
           "transformer_blocks.27.attn2.to_k.weight": (1152, 1152), "proj_out.weight": (32, 1152)}
SIGNATURES = (  # a lone network without size conditioning is taken as Sigma's: of that kind, most are
    Signature("pixart-alpha-1024", "diffusers", {**_SHAPES, **dict.fromkeys(TOLD, (384, 256))}),
    Signature("pixart-sigma-1024", "diffusers", _SHAPES, absent=TOLD),
    Signature("pixart-alpha-512", "diffusers", _SHAPES, absent=TOLD),
)
INDEX = tuple(LENGTHS)
PARTS = (
    Part("text_encoder", "transformers.T5EncoderModel", ("text",), original=Original(
        ("text_encoders.t5xxl.transformer.", ""), unique="encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")),
    Part("transformer", "diffusers.PixArtTransformer2DModel", ("denoiser",)),  # no converter of its makers' own names is known
    Part("vae", "diffusers.AutoencoderKL", ("encoder", "decoder"), original=Original(
        ("first_stage_model.", "vae.", ""), "convert_ldm_vae_checkpoint", unique="encoder.down.0.block.0.norm1.weight")),
)


def encode(modules: Modules, words: Words) -> Conditioning:
    """T5's states (1, 120 or 300, width), and which of them are words: `mask` (1, 120 or 300), 0 at padding."""
    mask = words.mask["tokenizer"]
    states = modules["text_encoder"](words.ids["tokenizer"], attention_mask=mask).last_hidden_state
    return Conditioning(words.weigh("tokenizer", states), extra={"mask": mask})


def predict(modules: Modules, x: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
    """(B, c, h, w) latents -> epsilon, float32; the second half of what the network returns, its variance, is left."""
    net, extra = modules["transformer"], conditioning.extra
    time = torch.full((len(x),), level.time, device=x.device)
    told = {name: extra.get(name) for name in ("resolution", "aspect_ratio")}
    out = net(x.to(net.dtype), encoder_hidden_states=conditioning.tokens.to(net.dtype), encoder_attention_mask=extra["mask"].to(net.dtype),
              timestep=time, added_cond_kwargs=told, return_dict=False)[0]
    return out[:, :x.shape[1]].float()


def size_told(scene: Scene, side: Side) -> Mapping[str, Tensor]:
    """What alpha's network of 1024 px is told on every side: `resolution` (1, 2), height and width in pixels, and their `aspect_ratio` (1, 1)."""
    return {"resolution": torch.tensor([[float(scene.height), float(scene.width)]]), "aspect_ratio": torch.tensor([[scene.height / scene.width]])}


def check_network(net: Config, text: Config, channels: int) -> None:
    """The transformer is one that these functions can run, beside this encoder and this VAE.

    Raises:
        ModelError: other channels, another way of conditioning, or an encoder of another width.
    """
    given, made = net.get("in_channels", 4), net.get("out_channels", 8)
    if given != channels or made not in (channels, 2 * channels, None):
        raise ModelError(f"the transformer takes {given!r:.40} channels and returns {made!r:.40}, and the VAE has {channels}: expected {channels}, "
                         "and as many or twice as many back, so give the VAE that belongs to it")
    if net.get("norm_type", "ada_norm_single") != "ada_norm_single":
        raise ModelError(f"the transformer has norm_type {net['norm_type']!r:.60}: expected 'ada_norm_single', so it is of another family")
    width, heard = text.get("d_model"), net.get("caption_channels") or net.get("cross_attention_dim", 1152)
    if width is not None and width != heard:
        raise ModelError(f"the text encoder gives states of {width!r:.40} values and the transformer reads {heard!r:.40}: "
                         "give the T5 that belongs to it")


def build(model: Model) -> Family:
    """PixArt-alpha or -Sigma: by the pipeline that the index names, else by the variant. A checkpoint that says neither is taken as Sigma.

    Raises:
        ModelError: a transformer, VAE or scheduler that is not of this family.
    """
    net, scheduler = model.config("transformer"), model.config("scheduler") or SCHEDULER
    plain = latent_spec(model.config("vae"))
    check_network(net, model.config("text_encoder"), plain.channels)
    patch, size = net.get("patch_size", 2), net.get("sample_size", 128)
    if not isinstance(patch, int) or not 1 <= patch <= 16:
        raise ModelError(f"the transformer's config sets patch_size to {patch!r:.60}: expected a whole number from 1 to 16")
    told = net.get("use_additional_conditions")
    told = size == 128 if told is None else bool(told)  # as diffusers fills it in: the first configs do not say it
    named = str(model.config("model_index").get("_class_name", ""))
    alpha = "PixArtAlphaPipeline" if told or model.variant.startswith("pixart-alpha") else "PixArtSigmaPipeline"
    defaults = run_defaults(scheduler, {"sample_size": size}, plain.factor)
    return Family(
        name="pixart", parts=PARTS, path=noise_path(scheduler), prediction=prediction(scheduler),
        latent=replace(plain, multiple=plain.factor * patch),
        tokenizers={"tokenizer": TokenizerSpec("t5", LENGTHS.get(named, LENGTHS[alpha]), pad="<pad>", lower=True)},
        encode=encode, predict=predict, inputs=size_told if told else no_inputs, guidance="cfg",
        defaults=Defaults(steps=20, guidance_scale=4.5, **defaults),
    )
