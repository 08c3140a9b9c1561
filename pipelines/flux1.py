"""FLUX.1: a transformer over 2x2 patches of a 16-channel latent and T5's tokens in one sequence, on a rectified flow; CLIP-L gives one pooled vector.

Four kinds of checkpoint: dev (guidance is an input of the network), schnell (none at all), Fill (the network sees the mask and what is kept of the
picture) and Kontext (the tokens of a reference picture stand behind the latent's own). Knows nothing of prompts, samplers or true guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from latentgen.conditioning.tokens import TokenizerSpec
from latentgen.diffusion.level import Level, RectifiedFlow
from latentgen.errors import ModelError
from latentgen.models.family import Conditioning, Defaults, Family, Model, Modules, Original, Part, Scene, Side, Signature, Words
from latentgen.pixels.image import fit_to, to_images, to_tensor
from latentgen.pixels.latent import LatentSpec
from latentgen.pipelines._flow import DYNAMIC, dynamic_shift, packed, unpacked

KONTEXT_SIZES = (  # (width, height) of about a megapixel that Kontext was trained on
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104), (1024, 1024),
    (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672))
VAE = {"latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "scaling_factor": 0.3611, "shift_factor": 0.1159}

_GUIDED = {"guidance_in.in_layer.weight": (3072, 256)}
_GUIDED_DIFFUSERS = {"time_text_embed.guidance_embedder.linear_1.weight": (3072, 256)}


def _original(channels: int) -> dict[str, tuple[int | None, ...]]:
    return {"img_in.weight": (3072, channels), "txt_in.weight": (3072, 4096), "vector_in.in_layer.weight": (3072, 768),
            "double_blocks.0.img_attn.qkv.weight": (9216, 3072), "single_blocks.0.linear1.weight": (21504, 3072)}


def _diffusers(channels: int) -> dict[str, tuple[int | None, ...]]:
    return {"x_embedder.weight": (3072, channels), "context_embedder.weight": (3072, 4096),
            "time_text_embed.text_embedder.linear_1.weight": (3072, 768), "transformer_blocks.0.attn.add_k_proj.weight": (3072, 3072),
            "single_transformer_blocks.0.proj_mlp.weight": (12288, 3072)}


SIGNATURES = (  # Kontext has dev's tensors: only an index or a card tells it
    Signature("flux1-fill", "original", _original(384) | _GUIDED),
    Signature("flux1-dev", "original", _original(64) | _GUIDED),
    Signature("flux1-kontext", "original", _original(64) | _GUIDED),
    Signature("flux1-schnell", "original", _original(64), absent=tuple(_GUIDED)),
    Signature("flux1-fill", "diffusers", _diffusers(384) | _GUIDED_DIFFUSERS, absent=("controlnet_x_embedder.weight",)),
    Signature("flux1-dev", "diffusers", _diffusers(64) | _GUIDED_DIFFUSERS, absent=("controlnet_x_embedder.weight",)),
    Signature("flux1-kontext", "diffusers", _diffusers(64) | _GUIDED_DIFFUSERS, absent=("controlnet_x_embedder.weight",)),
    Signature("flux1-schnell", "diffusers", _diffusers(64), absent=(*_GUIDED_DIFFUSERS, "controlnet_x_embedder.weight")),
)
INDEX = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline", "FluxKontextPipeline")
PARTS = (
    Part("text_encoder", "transformers.CLIPTextModel", ("text",),
         original=Original(("text_encoders.clip_l.transformer.text_model.", "text_model.", ""), unique="embeddings.token_embedding.weight")),
    Part("text_encoder_2", "transformers.T5EncoderModel", ("text",),
         original=Original(("text_encoders.t5xxl.transformer.", ""), unique="encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")),
    Part("transformer", "diffusers.FluxTransformer2DModel", ("denoiser",),
         original=Original(("model.diffusion_model.", ""), convert="convert_flux_transformer_checkpoint_to_diffusers",
                           unique="double_blocks.0.img_attn.qkv.weight")),
    Part("vae", "diffusers.AutoencoderKL", ("encoder", "decoder"),
         original=Original(("first_stage_model.", "vae.", ""), convert="convert_ldm_vae_checkpoint", unique="encoder.down.0.block.0.norm1.weight")),
)


def encode(modules: Modules, words: Words) -> Conditioning:
    """T5's states (1, 512 or 256, 4096), padding included as in training, and CLIP's pooled vector (1, 768).

    A long text is whole in T5's tokens; CLIP's vector is that of the first chunk.
    """
    pooled = modules["text_encoder"](words.ids["tokenizer"][:1]).pooler_output
    states = modules["text_encoder_2"](words.ids["tokenizer_2"]).last_hidden_state
    return Conditioning(words.weigh("tokenizer_2", states), pooled)


def predict(modules: Modules, x: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
    """(B, c, h, w) latents -> velocity eps - x0, float32, of the same shape. `beside` adds channels, `reference` adds tokens behind."""
    net, extra = modules["transformer"], conditioning.extra
    beside = extra.get("beside")
    tokens = packed(x if beside is None else torch.cat([x, beside.to(x)], dim=1))
    places = positions(x, 0)
    if "reference" in extra:
        tokens = torch.cat([tokens, packed(extra["reference"].to(x))], dim=1)
        places = torch.cat([places, positions(extra["reference"], 1).to(places)])
    words, pooled = conditioning.tokens.to(net.dtype), conditioning.pooled.to(net.dtype)
    guidance = extra["guidance"].to(x.device) if "guidance" in extra else None
    time = torch.full((len(x),), level.time / 1000, device=x.device)
    out = net(tokens.to(net.dtype), words, pooled, time, img_ids=places, txt_ids=torch.zeros(words.shape[1], 3, device=x.device),
              guidance=guidance, return_dict=False)[0]
    return unpacked(out[:, :x.shape[2] * x.shape[3] // 4].float(), *x.shape[2:])


def positions(x: Tensor, picture: int) -> Tensor:
    """Places of the tokens of latents (B, c, h, w): (h/2 * w/2, 3) of (which picture, row, column), float32 (bfloat16 counts to 256 only)."""
    h, w = x.shape[2] // 2, x.shape[3] // 2
    rows, columns = (torch.arange(side, dtype=torch.float32, device=x.device) for side in (h, w))  # made where they are used: no copy in each step
    return torch.cartesian_prod(torch.full((1,), float(picture), device=x.device), rows, columns).reshape(h * w, 3)


def inputs(scene: Scene, side: Side, *, guided: bool, fill: bool) -> Mapping[str, Tensor]:
    """What the network takes beside words: `guidance` (1,); for Fill `beside` (1, c + 64, h, w), see `kept_picture`; for Kontext `reference`
    (1, c, h', w'), the latent of the picture that it looks at."""
    made = {"guidance": torch.tensor([float(scene.options["guidance_scale"])])} if guided else {}
    if fill:
        made["beside"] = kept_picture(scene)
    if scene.references:
        made["reference"] = scene.encode(kontext_sized(scene.references[0]))
    return made


def kept_picture(scene: Scene) -> Tensor:
    """What Fill sees: latent of the picture with the repainted area grey (c channels), then the mask, 8x8 pixels of it to a latent (64 channels).

    The mask is cut at one half, as the network was trained. Without a mask all is repainted.
    """
    image = torch.zeros(1, 3, scene.height, scene.width) if scene.image is None else scene.image
    mask = torch.ones(1, 1, scene.height, scene.width) if scene.mask is None or scene.image is None else (scene.mask >= 0.5).float()
    latent = scene.encode(image * (1 - mask.to(image)))
    return torch.cat([latent, torch.nn.functional.pixel_unshuffle(mask, scene.height // scene.shape[1]).to(latent)], dim=1)


def kontext_sized(picture: Tensor) -> Tensor:
    """A picture (1, 3, H, W) in [-1, 1] stretched to the one of Kontext's sizes that is nearest in shape."""
    height, width = (max(16, side // 16 * 16) for side in picture.shape[2:])
    _, *size = min((abs(width / height - w / h), w, h) for w, h in KONTEXT_SIZES)
    return to_tensor(fit_to(to_images(picture)[0], *size, how="resize"))


def build(model: Model) -> Family:
    """The family of one checkpoint: which of the four kinds, by its configs.

    Raises:
        ModelError: the transformer takes a number of channels that none of the four kinds has.
    """
    vae, net = VAE | model.config("vae"), model.config("transformer")
    factor, c = 2 ** (len(vae["block_out_channels"]) - 1), vae["latent_channels"]
    channels, guided = net.get("in_channels", 64), bool(net.get("guidance_embeds", False))
    plain, wide = 4 * c, 4 * (2 * c + factor**2)
    if channels not in (plain, wide):
        raise ModelError(f"the transformer takes {channels} channels: expected {plain} (dev, schnell, Kontext) or {wide} (Fill), "
                         "so this is a control checkpoint or another model: use one of the four")
    for part, theirs, key in (("text_encoder", "hidden_size", "pooled_projection_dim"), ("text_encoder_2", "d_model", "joint_attention_dim")):
        width, heard = model.config(part).get(theirs), net.get(key)
        if None not in (width, heard) and width != heard:
            raise ModelError(f"the {part} has width {width!r:.40} and the transformer reads {heard!r:.40}: they are not of one model, so give the "
                             "one that belongs to it")
    fill = channels == wide
    kontext = not fill and (model.variant == "flux1-kontext" or model.config("model_index").get("_class_name") == "FluxKontextPipeline")
    scheduler = DYNAMIC | (model.config("scheduler") or {"use_dynamic_shifting": guided})
    dynamic = bool(scheduler["use_dynamic_shifting"])
    steps, scale = (50, 30.0) if fill else (28, 2.5) if kontext else (50, 3.5) if guided else (4, 1.0)
    return Family(
        name="flux1", parts=PARTS, path=RectifiedFlow(), prediction="flow",
        latent=LatentSpec(channels=c, factor=factor, multiple=2 * factor, scale=vae["scaling_factor"], shift=vae["shift_factor"] or 0.0),
        tokenizers={"tokenizer": TokenizerSpec("clip", 77), "tokenizer_2": TokenizerSpec("t5", 512 if guided else 256)},
        encode=encode, predict=predict, inputs=partial(inputs, guided=guided, fill=fill),
        guidance="embedded" if guided else "none",
        shift=partial(dynamic_shift, patch=2 * factor, scheduler=scheduler) if dynamic else None,
        task="inpaint" if fill else "any", references=int(kontext),
        defaults=Defaults(width=1024, height=1024, steps=steps, sampler="euler", spacing="trailing", guidance_scale=scale if guided else 1.0,
                          shift=1.0 if dynamic else float(scheduler["shift"])))
