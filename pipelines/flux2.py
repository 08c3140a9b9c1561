"""FLUX.2: a transformer over the 128-channel latents of 16x16 pixel cells and a language model's tokens in one sequence, on a rectified flow.

Three kinds of checkpoint: dev (guidance is an input of the network, words come from Mistral Small 3), klein (distilled to a few steps, no guidance)
and the base klein (classifier-free guidance), both with Qwen3. All look at reference pictures, whose tokens stand behind the latent's own. Native
latents are the autoencoder's 2x2 patches, normalised by its running statistics. Knows nothing of prompts, samplers or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from latentgen.conditioning.tokens import TokenizerSpec
from latentgen.diffusion.level import Level, RectifiedFlow
from latentgen.errors import ModelError
from latentgen.models.family import Conditioning, Config, Defaults, Family, Model, Modules, Original, Part, Scene, Side, Signature, Words
from latentgen.pixels.image import fit_to, to_images, to_tensor
from latentgen.pixels.latent import LatentSpec

MISTRAL, QWEN = "transformers.Mistral3ForConditionalGeneration", "transformers.Qwen3ForCausalLM"
LAYERS = {MISTRAL: (10, 20, 30), QWEN: (9, 18, 27)}  # after which the states are read; 0 would be the embeddings
CHATS = {  # as the published chat templates lay one turn out
    MISTRAL: TokenizerSpec("chat", 512, pad="<pad>", left=True, after="[/INST]", before=(
        "<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured responses focusing on object relationships, "
        "object\nattribution and actions without speculation.[/SYSTEM_PROMPT][INST]")),
    QWEN: TokenizerSpec("chat", 512, pad="<|endoftext|>", before="<|im_start|>user\n",
                        after="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
}
CACHED = "Flux2KleinKVPipeline"  # its references attend to themselves only, at time 0
REFERENCES, MOST_PIXELS, LEAST_SIDE, MOST_ASPECT = 10, 1024 * 1024, 64, 8  # of reference pictures
SCHEDULER = {"shift": 1.0, "use_dynamic_shifting": False}


def _signatures(variant: str, *, width: int, words: int, double: int, single: int, guided: bool = False) -> tuple[Signature, Signature]:
    """A published network by its makers' names and by diffusers': widths, and the last block of each kind, so that no pruned one is taken for it.

    What is asked of a block no other network of such a width has, so that an adapter's modules tell them apart, too.
    """
    shapes: dict[str, tuple[int | None, ...]] = {
        "{image}.weight": (width, 128), "{words}.weight": (width, words), "{modulation}.weight": (3 * width, width),
        "{single}.0.{joined}.weight": (9 * width, width), f"{{single}}.{single - 1}.{{joined}}.weight": (9 * width, width),
        "{double}.0.{mlp}.weight": (6 * width, width), f"{{double}}.{double - 1}.{{mlp}}.weight": (6 * width, width)}
    original = {"image": "img_in", "words": "txt_in", "modulation": "single_stream_modulation.lin", "single": "single_blocks", "joined": "linear1",
                "double": "double_blocks", "mlp": "img_mlp.0"}
    diffusers = {"image": "x_embedder", "words": "context_embedder", "modulation": "single_stream_modulation.linear",
                 "single": "single_transformer_blocks", "joined": "attn.to_qkv_mlp_proj", "double": "transformer_blocks", "mlp": "ff.linear_in"}
    told = ("guidance_in.in_layer.weight", "time_guidance_embed.guidance_embedder.linear_1.weight")
    found = [{k.format(**names): v for k, v in shapes.items()} | ({key: (width, 256)} if guided else {})
             for names, key in zip((original, diffusers), told, strict=True)]
    return (Signature(variant, "original", found[0], absent=() if guided else told[:1]),
            Signature(variant, "diffusers", found[1], absent=() if guided else told[1:]))


SIGNATURES = (  # a base klein has the tensors of its distilled twin: only an index or a card tells it
    *_signatures("flux2-dev", width=6144, words=15360, double=8, single=48, guided=True),
    *_signatures("flux2-klein-4b", width=3072, words=7680, double=5, single=20),
    *_signatures("flux2-klein-9b", width=4096, words=12288, double=8, single=24),
)
INDEX = ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline", CACHED)
PARTS = (
    Part("text_encoder", QWEN, ("text",), original=Original(("",), unique="model.layers.0.self_attn.q_proj.weight")),  # Mistral for dev: see `build`
    Part("transformer", "diffusers.Flux2Transformer2DModel", ("denoiser",),
         original=Original(("model.diffusion_model.", ""), convert="convert_flux2_transformer_checkpoint_to_diffusers",
                           unique="double_blocks.0.img_attn.qkv.weight")),
    Part("vae", "diffusers.AutoencoderKLFlux2", ("encoder", "decoder"),
         original=Original(("first_stage_model.", "vae.", ""), convert="convert_ldm_vae_checkpoint", unique="encoder.down.0.block.0.norm1.weight")),
)


def encode(modules: Modules, words: Words, *, layers: tuple[int, ...]) -> Conditioning:
    """States of three layers of the language model side by side, (1, 512, 3 * width), padding included as in training."""
    model = modules["text_encoder"].model  # the vocabulary's head is of no use here
    language = getattr(model, "language_model", model)
    states = language(words.ids["tokenizer"], attention_mask=words.mask["tokenizer"], output_hidden_states=True, use_cache=False).hidden_states
    return Conditioning(words.weigh("tokenizer", torch.cat([states[layer] for layer in layers], dim=-1)))


def predict(modules: Modules, x: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
    """(B, c, h, w) latents -> velocity eps - x0, float32, of the same shape. `reference` adds tokens behind, with `places` of their own."""
    net, extra = modules["transformer"], conditioning.extra
    tokens, places = x.flatten(2).transpose(1, 2), positions(x, 0)
    if "reference" in extra:
        tokens = torch.cat([tokens, extra["reference"].to(x)], dim=1)
        places = torch.cat([places, extra["places"][0].to(places)])
    words = conditioning.tokens.to(net.dtype)
    order = torch.nn.functional.pad(torch.arange(words.shape[1], device=x.device)[:, None], (3, 0))  # of the words, on the last axis of positions
    out = net(tokens.to(net.dtype), words, torch.full((len(x),), level.time / 1000, device=x.device), img_ids=places[None],
              txt_ids=order[None], guidance=extra["guidance"].to(x.device) if "guidance" in extra else None, return_dict=False)[0]
    return out[:, :x.shape[2] * x.shape[3]].float().transpose(1, 2).reshape(x.shape)


def positions(x: Tensor, time: int) -> Tensor:
    """Places of the tokens of latents (B, c, h, w): (h * w, 4) whole numbers, (time, row, column, 0). The picture made is at time 0."""
    rows, columns = (torch.arange(side, device=x.device) for side in x.shape[2:])  # made where they are used: no copy in each step
    when, last = (torch.full((1,), number, device=x.device) for number in (time, 0))
    return torch.cartesian_prod(when, rows, columns, last)


def inputs(scene: Scene, side: Side, *, guided: bool) -> Mapping[str, Tensor]:
    """What the network takes beside words: `guidance` (1,); of reference pictures `reference` (1, n, c), their tokens one picture after the other,
    and `places` (1, n, 4), the pictures at times 10, 20, ..."""
    made = {"guidance": torch.tensor([float(scene.options["guidance_scale"])])} if guided else {}
    if scene.references:
        seen = [scene.encode(reference_sized(picture, scene.height // scene.shape[1])) for picture in scene.references]
        made["reference"] = torch.cat([z.flatten(2).transpose(1, 2) for z in seen], dim=1)
        made["places"] = torch.cat([positions(z, 10 * n) for n, z in enumerate(seen, 1)])[None]
    return made


def fits(reference: tuple[int, int], picture: tuple[int, int]) -> str:
    """What is wrong with a reference (width, height): a side below 64 pixels, or more than 8 times the other, which the network was not trained
    on."""
    if min(reference) >= LEAST_SIDE and max(reference) <= MOST_ASPECT * min(reference):
        return ""
    return (f"reference is {reference[0]}x{reference[1]}: expected sides of {LEAST_SIDE} pixels or more, one at most {MOST_ASPECT} times the other, "
            "so crop or enlarge it")


def reference_sized(picture: Tensor, multiple: int) -> Tensor:
    """A picture (1, 3, H, W) in [-1, 1] scaled down to a megapixel if it is larger, then its middle, with sides that are multiples of `multiple`."""
    height, width = picture.shape[2:]
    if width * height > MOST_PIXELS:
        scale = math.sqrt(MOST_PIXELS / (width * height))
        width, height = int(width * scale), int(height * scale)
        picture = to_tensor(fit_to(to_images(picture)[0], width, height, how="resize"))
    right, bottom = width // multiple * multiple, height // multiple * multiple
    left, top = (width - right) // 2, (height - bottom) // 2
    return picture[:, :, top:top + bottom, left:left + right]


def to_native(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] -> the latent's 2x2 patches, each channel with mean 0 and variance 1: (B, 4c, H/16, W/16), float32."""
    mean, deviation = statistics(vae)
    return (pixel_unshuffle(vae.encode(pixels).latent_dist.mean.float(), 2) - mean) / deviation


def to_pixels(vae: Any, z: Tensor) -> Tensor:
    """Native latents (B, 4c, h, w) -> pixels (B, 3, 16h, 16w) in about [-1, 1]."""
    mean, deviation = statistics(vae)
    return vae.decode(pixel_shuffle(z.float() * deviation + mean, 2).to(z.dtype)).sample


def statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the patches' channels over the training set, each (1, 4c, 1, 1), float32."""
    norm = vae.bn
    return norm.running_mean.float().view(1, -1, 1, 1), torch.sqrt(norm.running_var.float().view(1, -1, 1, 1) + norm.eps)


def empirical_shift(width: int, height: int, steps: int, *, patch: int, linear: bool) -> float:
    """Shift of the levels: exp(mu), where mu was fitted by the makers to the number n of tokens and of steps.

    Two lines in n are known, for 10 steps and for 200; between them mu is linear in the steps. Above 4,300 tokens the one for 200 holds alone.
    """
    n = (width // patch) * (height // patch)
    few, many = 8.73809524e-05 * n + 1.89833333, 0.00016927 * n + 0.45666666
    mu = many if n > 4300 else many + (many - few) / 190 * (steps - 200)
    return mu if linear else math.exp(mu)


def build(model: Model) -> Family:
    """The family of one checkpoint: which of the three kinds, by its configs.

    Raises:
        ModelError: the parts' widths do not belong together.
    """
    net, vae, index = model.config("transformer"), model.config("vae"), model.config("model_index")
    factor, channels = 2 ** len(vae.get("block_out_channels", range(4))), 4 * vae.get("latent_channels", 32)  # one level of the factor is the patch's
    words = _words(model.config("text_encoder"), net)
    if net.get("in_channels", 128) != channels:
        raise ModelError(f"the transformer takes {net.get('in_channels')!r:.40} channels and the autoencoder gives {channels}: they are not of one "
                         "model, so give the parts that belong together")
    guided = bool(net.get("guidance_embeds", True))
    # a published klein alone, without an index, is taken for the distilled one, as its variant says
    distilled = not guided and bool(index.get("is_distilled", index.get("_class_name") == CACHED or bool(model.variant and not index)))
    scheduler = SCHEDULER | (model.config("scheduler") or {"use_dynamic_shifting": True})
    dynamic = bool(scheduler["use_dynamic_shifting"])
    return Family(
        name="flux2",
        parts=tuple(replace(p, cls=words, original=p.original if words == QWEN else None) if p.name == "text_encoder" else p for p in PARTS),
        path=RectifiedFlow(), prediction="flow", latent=LatentSpec(channels=channels, factor=factor, multiple=factor),
        tokenizers={"tokenizer": CHATS[words]}, encode=partial(encode, layers=LAYERS[words]), predict=predict, inputs=partial(inputs, guided=guided),
        guidance="embedded" if guided else "none" if distilled else "cfg",
        shift=partial(empirical_shift, patch=factor, linear=scheduler.get("time_shift_type") == "linear") if dynamic else None,
        references=0 if index.get("_class_name") == CACHED else REFERENCES, fits=fits, vae_encode=to_native, vae_decode=to_pixels,
        defaults=Defaults(width=1024, height=1024, steps=4 if distilled else 50, sampler="euler", spacing="trailing",
                          guidance_scale=1.0 if distilled else 4.0, shift=1.0 if dynamic else float(scheduler["shift"])))


def _words(config: Config, net: Config) -> str:
    """The class of the language model.

    Raises:
        ModelError: it is too shallow, or the transformer reads states of another width.
    """
    cls = MISTRAL if config.get("model_type") == "mistral3" or f"transformers.{(config.get('architectures') or [''])[0]}" == MISTRAL else QWEN
    text = config.get("text_config", config)
    last, depth, width = LAYERS[cls][-1], text.get("num_hidden_layers"), text.get("hidden_size")
    if depth is not None and not (isinstance(depth, int) and depth > last):
        raise ModelError(f"the text encoder has {depth!r:.40} layers and its layer {last} is read: expected the one that the model was trained with")
    if width is not None and net.get("joint_attention_dim", 3 * width) != 3 * width:
        raise ModelError(f"the text encoder has width {width!r:.40} and the transformer reads {net['joint_attention_dim']!r:.40}: expected three "
                         "times as much, so give the text encoder that belongs to it")
    return cls
