"""sd3: Stable Diffusion 3 medium, 3.5 medium and large. A transformer over latent patches and words in one sequence, on a rectified flow
(Esser et al. 2024).

Two CLIP encoders and T5, each of which may be missing: the network was trained with any of them silent, which is zeros in its place. The kinds differ
in size, in norms of queries and keys, and in a second attention, all of which the transformer's own config says; turbo is a card. Knows no prompts,
samplers, guidance or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from latentgen.conditioning.tokens import TokenizerSpec
from latentgen.diffusion.level import Level, RectifiedFlow
from latentgen.errors import ModelError, RequestError
from latentgen.models.family import Conditioning, Config, Defaults, Family, Model, Modules, Original, Part, Signature, Words
from latentgen.pipelines._unet import clip_layers, latent_spec
from latentgen.pixels.latent import LatentSpec

INDEX = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
PARTS = (
    Part("text_encoder", "transformers.CLIPTextModelWithProjection", ("text",), optional=True, original=Original(
        ("text_encoders.clip_l.transformer.text_model.", "text_model.", ""), unique="embeddings.token_embedding.weight")),
    Part("text_encoder_2", "transformers.CLIPTextModelWithProjection", ("text",), optional=True, original=Original(
        ("text_encoders.clip_g.transformer.", ""), unique="text_model.embeddings.token_embedding.weight")),
    Part("text_encoder_3", "transformers.T5EncoderModel", ("text",), optional=True, original=Original(
        ("text_encoders.t5xxl.transformer.", ""), unique="encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")),
    Part("transformer", "diffusers.SD3Transformer2DModel", ("denoiser",), original=Original(
        ("model.diffusion_model.", ""), "convert_sd3_transformer_checkpoint_to_diffusers", unique="joint_blocks.0.x_block.attn.qkv.weight")),
    Part("vae", "diffusers.AutoencoderKL", ("encoder", "decoder"), original=Original(
        ("first_stage_model.", "vae.", ""), "convert_ldm_vae_checkpoint", unique="encoder.down.0.block.0.norm1.weight")),
)
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}  # encoder -> what it reads
CLIPS, T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
CHUNK, T5_LENGTH = 77, 256  # tokens
VAE = {"latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "scaling_factor": 1.5305, "shift_factor": 0.0609}
NET = {"in_channels": 16, "patch_size": 2, "sample_size": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 96}
SAMPLERS = {"FlowMatchEulerDiscreteScheduler": "euler", "FlowMatchHeunDiscreteScheduler": "heun"}
BENT = ("use_dynamic_shifting", "shift_terminal", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
        "stochastic_sampling")  # settings of a scheduler that change its levels or steps


def _signatures(variant: str, *, width: int, blocks: int, places: int, normed: bool, twice: bool) -> tuple[Signature, Signature]:
    """A published transformer by its makers' names and by diffusers': its ends, its first block, its last one and none after it.

    Args:
        places: along a side, of the table of positions.
        normed: queries and keys have norms; twice: the first block attends to the picture once more.
    """
    square, joined, image = (width, width), (3 * width, width), (width, 16, 2, 2)
    first, last, more = (f"joint_blocks.{n}." for n in (0, blocks - 1, blocks))
    original = {"x_embedder.proj.weight": image, "pos_embed": (1, places**2, width), "context_embedder.weight": (width, 4096),
                "y_embedder.mlp.0.weight": (width, 2048), "final_layer.linear.weight": (64, width), f"{first}x_block.attn.qkv.weight": joined,
                f"{first}context_block.attn.qkv.weight": joined, f"{last}x_block.attn.qkv.weight": joined,
                f"{more}x_block.attn.qkv.weight": None, f"{first}x_block.attn.ln_q.weight": (64,) if normed else None,
                f"{first}x_block.attn2.qkv.weight": joined if twice else None}
    first, last, more = (f"transformer_blocks.{n}.attn" for n in (0, blocks - 1, blocks))
    diffusers = {"pos_embed.proj.weight": image, "pos_embed.pos_embed": (1, places**2, width), "context_embedder.weight": (width, 4096),
                 "time_text_embed.text_embedder.linear_1.weight": (width, 2048), "proj_out.weight": (64, width),
                 **{f"{first}.{name}.weight": square for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj")}, f"{last}.to_q.weight": square,
                 f"{more}.to_q.weight": None, f"{first}.norm_q.weight": (64,) if normed else None, f"{first}2.to_q.weight": square if twice else None}
    found = [({name: shape for name, shape in names.items() if shape}, tuple(name for name, shape in names.items() if not shape))
             for names in (original, diffusers)]
    return Signature(variant, "original", *found[0]), Signature(variant, "diffusers", *found[1])


SIGNATURES = (
    *_signatures("sd35-medium", width=1536, blocks=24, places=384, normed=True, twice=True),
    *_signatures("sd35-large", width=2432, blocks=38, places=192, normed=True, twice=False),
    *_signatures("sd3-medium", width=1536, blocks=24, places=192, normed=False, twice=False),
)


@dataclass(frozen=True)
class PlacedLatents(LatentSpec):
    """Latents of a network that knows places only so far.

    Attributes:
        longest: side of a picture in pixels, up to which there are places.
    """

    longest: int = 3072

    def shape(self, width: int, height: int) -> tuple[int, int, int]:
        """As `LatentSpec.shape`.

        Raises:
            RequestError: also where a side is longer than the network has places for.
        """
        for name, side in (("width", width), ("height", height)):
            if side > self.longest:
                raise RequestError(f"{name} is {side}: this model has places for {self.longest} pixels along a side, so use {self.longest} or less")
        return super().shape(width, height)


def encode(modules: Modules, words: Words, *, widths: Mapping[str, int], joint: int) -> Conditioning:
    """Both CLIPs' last hidden states but one beside each other, filled up with zeros to T5's width, and T5's states after them:
    (1, n * 77 + 256, joint) for n chunks of CLIP. Pooled: both CLIPs' projections of the first chunk's end token, joined.

    An encoder that is not there counts as zeros, as silent ones did in training.

    Args:
        widths: of each CLIP's pooled vector, in the order in which they are joined.
        joint: width of T5's states.
    """
    heard = {part: _clip(modules[part], TOKENIZERS[part], words) for part in CLIPS if TOKENIZERS[part] in words.ids}
    third = TOKENIZERS[T5]
    tail = words.weigh(third, modules[T5](words.ids[third]).last_hidden_state) if third in words.ids else None
    like = next(iter(heard.values()))[0] if tail is None else tail
    length = next((states.shape[1] for states, _ in heard.values()), CHUNK)
    both = [heard.get(part) or (like.new_zeros(1, length, width), like.new_zeros(1, width)) for part, width in widths.items()]
    head = torch.cat([states for states, _ in both], dim=-1)
    head = torch.nn.functional.pad(head, (0, joint - head.shape[-1]))
    tail = like.new_zeros(1, T5_LENGTH, joint) if tail is None else tail
    return Conditioning(torch.cat([head, tail], dim=1), torch.cat([pooled for _, pooled in both], dim=-1))


def _clip(module: torch.nn.Module, reader: str, words: Words) -> tuple[Tensor, Tensor]:
    """(n, 77) ids of its tokenizer -> states (1, n * 77, width), the chunks joined end to end, and the first chunk's pooled vector (1, width)."""
    out = module(words.ids[reader], output_hidden_states=True)
    return words.weigh(reader, out.hidden_states[-1 - words.clip_skip]).flatten(0, 1)[None], out.text_embeds[:1]


def predict(modules: Modules, x: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
    """(B, 16, h, w) latents -> velocity eps - x0, float32, of the same shape."""
    net, pooled = modules["transformer"], conditioning.pooled
    assert pooled is not None
    time = torch.full((len(x),), level.time, device=x.device)
    return net(x.to(net.dtype), conditioning.tokens.to(net.dtype), pooled.to(net.dtype), time, return_dict=False)[0].float()


def build(model: Model) -> Family:
    """The family of one checkpoint, with those text encoders that it has.

    Raises:
        ModelError: no text encoder at all, encoders or a VAE of another model, or numbers or a scheduler that are not known here.
    """
    net, here = NET | model.config("transformer"), [part for part in TOKENIZERS if part in model.configs]
    if odd := [key for key in NET if not isinstance(net[key], int) or net[key] < 1]:
        raise ModelError(f"the transformer's config sets {odd[0]} to {net[odd[0]]!r:.40}: expected a whole number such as {NET[odd[0]]}")
    latent = latent_spec(VAE | model.config("vae"))
    if net["in_channels"] != latent.channels:
        raise ModelError(f"the transformer takes {net['in_channels']} channels and the VAE gives {latent.channels}: expected the same number, 16, "
                         "so give the VAE that belongs to it, and a transformer that takes latents alone")
    multiple, side = latent.factor * net["patch_size"], net["sample_size"] * latent.factor
    path, sampler, shift = _schedule(model.config("scheduler"))
    return Family(
        name="sd3", parts=tuple(p for p in PARTS if not p.optional or p.name in here), path=path, prediction="flow",
        latent=PlacedLatents(**vars(latent) | {"multiple": multiple, "longest": net["pos_embed_max_size"] * multiple}),
        tokenizers={TOKENIZERS[p]: TokenizerSpec("t5", T5_LENGTH) if p == T5 else TokenizerSpec("clip", CHUNK, pad="!" if p == CLIPS[1] else None)
                    for p in here},
        encode=partial(encode, widths=_widths(model, net), joint=net["joint_attention_dim"]), predict=predict,
        clip_skip=clip_layers(*map(model.config, clips)) - 1 if (clips := [part for part in CLIPS if part in here]) else 1,
        defaults=Defaults(width=side, height=side, steps=28, guidance_scale=7.0, sampler=sampler, spacing="linspace", shift=shift))


def _widths(model: Model, net: Config) -> dict[str, int]:
    """Width of each CLIP's pooled vector; a missing one's is what the others leave of the transformer's.

    Raises:
        ModelError: there is no text encoder, or they are not those that the transformer was trained with.
    """
    if not any(part in model.configs for part in TOKENIZERS):
        raise ModelError("there is no text encoder: expected CLIP-L, OpenCLIP-bigG or T5-XXL, so name one, as in load(..., text_encoder=PATH)")
    t5, joint, pooled = model.config(T5).get("d_model"), net["joint_attention_dim"], net["pooled_projection_dim"]
    if T5 in model.configs and t5 != joint:
        raise ModelError(f"text_encoder_3 gives states of width {t5!r:.40} and the transformer takes {joint}: expected T5-XXL, whose width is 4096")
    widths = {part: int(model.config(part).get("projection_dim", 512)) for part in CLIPS if part in model.configs}
    rest = pooled - sum(widths.values())
    if rest < 0 or (rest == 0) != (len(widths) == 2) or sum(model.config(part).get("hidden_size", 512) for part in widths) > joint:
        said = " and ".join(f"{part} of width {width}" for part, width in widths.items()) or "no CLIP"
        raise ModelError(f"the transformer takes a pooled vector of width {pooled} and there is {said}: expected CLIP-L of 768 as text_encoder and "
                         "OpenCLIP-bigG of 1280 as text_encoder_2, or one of them")
    all_of_them = widths | dict(zip((part for part in CLIPS if part not in widths), (rest, 0)))
    return {part: all_of_them[part] for part in CLIPS}


def _schedule(scheduler: Config) -> tuple[RectifiedFlow, str, float]:
    """The path, the sampler, and the shift of its levels.

    Raises:
        ModelError: a scheduler of another kind, or one that bends the levels in a way that is not run here.
    """
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0} | (scheduler or {"shift": 3.0})
    name, steps, shift = str(config["_class_name"]), config["num_train_timesteps"], config["shift"]
    bent = [key for key in BENT if config.get(key)]
    if name not in SAMPLERS or bent:
        what = f"sets {', '.join(bent)}" if bent else f"is of {name!r:.60}"
        raise ModelError(f"the scheduler config {what}: expected a plain {' or '.join(SAMPLERS)}, so write it as one of them")
    for key, value in (("num_train_timesteps", steps), ("shift", shift)):
        if isinstance(value, bool) or not isinstance(value, (int, float) if key == "shift" else int) or not 0 < value <= 100_000:
            raise ModelError(f"the scheduler config sets {key} to {value!r:.40}: expected {'3.0' if key == 'shift' else '1000'} or the like")
    return RectifiedFlow(steps), SAMPLERS[name], float(shift)
