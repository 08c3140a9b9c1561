"""Qwen-Image: a transformer over 2x2 patches of a 16-channel latent and a language model's tokens, on a rectified flow; Qwen2.5-VL reads the prompt.

Two kinds of checkpoint with the same tensors: the base draws from words; Edit changes a picture as the words instruct, and its text encoder sees
that picture, whose latent's tokens also stand behind the latent's own. Guided estimates get back the length of the unguided one, patch by patch.
Knows nothing of prompts, samplers or files. Edit with several pictures (Edit-2509 and later) and Layered are other models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from latentgen.conditioning.tokens import TokenizerSpec
from latentgen.diffusion.level import Level, RectifiedFlow
from latentgen.errors import ModelError
from latentgen.models.family import Conditioning, Config, Defaults, Family, Model, Modules, Original, Part, Scene, Side, Signature, Words
from latentgen.pipelines._flow import DYNAMIC, dynamic_shift, packed, unpacked
from latentgen.pixels.image import fit_to, to_images, to_tensor
from latentgen.pixels.latent import LatentSpec

PROMPT_TOKENS = 1024
TEMPLATE_TOKENS = {False: 34, True: 64}  # of `CHATS` before the user's turn, by the published tokenizer; the transformer does not read their states
CHATS = {edit: TokenizerSpec(
    "chat", PROMPT_TOKENS + TEMPLATE_TOKENS[edit], pad="<|endoftext|>", padded=False, after="<|im_end|>\n<|im_start|>assistant\n",
    before=f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{seen}") for edit, system, seen in (
        (False, "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects and "
                "background:", ""),
        (True, "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how the user's text "
               "instruction should alter or modify the image. Generate a new image that meets the user's requirements while maintaining consistency "
               "with the original input where appropriate.", "<|vision_start|><|image_pad|><|vision_end|>"))}
EDITS = ("QwenImageEditPipeline", "QwenImageEditInpaintPipeline")
OTHERS = {"QwenImageEditPlusPipeline": "edits by several pictures (Edit-2509 and later)", "QwenImageLayeredPipeline": "draws pictures in layers"}
AREA, STEP, MOST_ASPECT = 1024 * 1024, 32, 200  # of a reference: pixels, what its sides are multiples of, the longer side by the shorter one
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of pixels as the text encoder sees them
PUBLISHED: Config = {"use_dynamic_shifting": True, "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02}
SHAPES: dict[str, tuple[int | None, ...]] = {  # the last block is asked for so that no pruned network is taken for it
    "img_in.weight": (3072, 64), "txt_in.weight": (3072, 3584), "proj_out.weight": (64, 3072), "transformer_blocks.0.img_mod.1.weight": (18432, 3072),
    "transformer_blocks.59.attn.add_k_proj.weight": (3072, 3072)}
LAYERED = "time_text_embed.addition_t_embedding.weight"

SIGNATURES = tuple(  # Edit has the base's tensors: only an index or a card tells it. The makers' names are diffusers'
    Signature(variant, layout, SHAPES, absent=(LAYERED,), prefixes=(prefix,))
    for layout, prefix in (("diffusers", ""), ("original", "model.diffusion_model.")) for variant in ("qwenimage", "qwenimage-edit"))
INDEX = ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", *EDITS)
PARTS = (
    Part("text_encoder", "transformers.Qwen2_5_VLForConditionalGeneration", ("text",),
         original=Original(("",), unique="model.layers.0.self_attn.q_proj.weight")),
    Part("transformer", "diffusers.QwenImageTransformer2DModel", ("denoiser",),
         original=Original(("model.diffusion_model.", ""), unique="transformer_blocks.0.img_mod.1.weight")),
    Part("vae", "diffusers.AutoencoderKLQwenImage", ("encoder", "decoder"),
         original=Original(("vae.", "first_stage_model.", ""), convert="convert_wan_vae_to_diffusers", unique="encoder.conv1.weight")),
)


def encode(modules: Modules, words: Words) -> Conditioning:
    """The language model's last states, (1, n, 3584), of the picture's tokens if there is one, the prompt's and the rest of the template's."""
    model, ids = modules["text_encoder"].model, words.ids["tokenizer"]  # the vocabulary's head is of no use here
    drop = TEMPLATE_TOKENS[bool(words.references)]
    if not words.references:
        states = model.language_model(ids, use_cache=False).last_hidden_state
        return Conditioning(words.weigh("tokenizer", states)[:, drop:])
    pixels, grid = (t.to(ids.device) for t in seen(reference_sized(words.references[0]), model.config.vision_config))
    place = model.config.image_token_id
    at = int((ids[0] == place).nonzero()[0])
    count = int(grid.prod()) // model.config.vision_config.spatial_merge_size**2
    ids = torch.cat([ids[:, :at], torch.full_like(ids[:, :1], place).expand(1, count), ids[:, at + 1:]], dim=1)
    # said here, as the model would otherwise count a picture's tokens like words, in one line
    places, _ = model.get_rope_index(ids, mm_token_type_ids=(ids == place).int(), image_grid_thw=grid)
    states = model(ids, position_ids=places, pixel_values=pixels, image_grid_thw=grid, use_cache=False).last_hidden_state
    # the picture is one token of the tokenizer's, and its states are not weighed
    said = words.weigh("tokenizer", torch.cat([states[:, :at + 1], states[:, at + count:]], dim=1))
    return Conditioning(torch.cat([said[:, :at], states[:, at:at + count], said[:, at + 1:]], dim=1)[:, drop:])


def seen(picture: Tensor, vision: Any) -> tuple[Tensor, Tensor]:
    """A picture (1, 3, H, W) in [-1, 1] as the text encoder takes it: patches (n, 3 * frames * side * side); (1, 3) of (1, rows, columns) of them.

    Args:
        vision: the config of its eye: patch_size, spatial_merge_size (patches that make one token lie together) and temporal_patch_size.
    """
    side, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    rows, columns = (max(merge, round(length / (side * merge)) * merge) for length in picture.shape[2:])
    levels = ((picture + 1) * 127.5).round().to(torch.uint8)
    sized = torch.nn.functional.interpolate(levels, size=(rows * side, columns * side), mode="bicubic", antialias=True)
    x = (sized / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(DEVIATION).view(1, 3, 1, 1)
    x = x.reshape(3, rows // merge, merge, side, columns // merge, merge, side).permute(1, 4, 2, 5, 0, 3, 6)
    x = x[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, frames, -1, -1)
    return x.reshape(rows * columns, -1), torch.tensor([[1, rows, columns]])


def fits(reference: tuple[int, int], picture: tuple[int, int]) -> str:
    """What is wrong with a reference (width, height): one side is more than 200 times the other."""
    if max(reference) <= MOST_ASPECT * min(reference):
        return ""
    return f"reference is {reference[0]}x{reference[1]}: expected one side at most {MOST_ASPECT} times the other, so crop it"


def reference_sized(picture: Tensor) -> Tensor:
    """A picture (1, 3, H, W) in [-1, 1] stretched to about a megapixel, with sides that are multiples of 32."""
    height, width = picture.shape[2:]
    across = math.sqrt(AREA * (width / height))
    sides = (max(STEP, round(side / STEP) * STEP) for side in (across, across / (width / height)))
    return to_tensor(fit_to(to_images(picture)[0], *sides, how="resize"))


def inputs(scene: Scene, side: Side) -> Mapping[str, Tensor]:
    """`reference` (1, c, h', w'), the latent of the picture that is edited."""
    return {"reference": scene.encode(reference_sized(scene.references[0]))} if scene.references else {}


def predict(modules: Modules, x: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
    """(B, c, h, w) latents -> velocity eps - x0, float32, of the same shape. `reference` adds tokens behind."""
    net, own = modules["transformer"], packed(x)
    pictures = [x, *([conditioning.extra["reference"].to(x)] if "reference" in conditioning.extra else ())]
    tokens = torch.cat([packed(picture) for picture in pictures], dim=1)
    places = [(1, picture.shape[2] // 2, picture.shape[3] // 2) for picture in pictures]
    out = net(tokens.to(net.dtype), conditioning.tokens.to(net.dtype), timestep=torch.full((len(x),), level.time / 1000, device=x.device),
              img_shapes=[places] * len(x), return_dict=False)[0]
    return unpacked(out[:, :own.shape[1]].float(), *x.shape[2:])


def combine(x: Tensor, level: Level, x0_pos: Tensor, x0_neg: Tensor, scale: float) -> Tensor:
    """Guidance of velocities v = (x - x0) / sigma, v_neg + scale * (v_pos - v_neg), each 2x2 patch brought back to the length of v_pos there.

    All are (B, c, h, w); the result is x0.
    """
    pos, neg = (packed((x - x0) / level.sigma) for x0 in (x0_pos, x0_neg))
    v = neg + scale * (pos - neg)
    v = v * (pos.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    return x - level.sigma * unpacked(v, *x.shape[2:])


def to_native(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] -> latents (B, c, H/8, W/8), each channel with mean 0 and deviation 1.

    A picture is a film of one frame. The encoder is called as it is, because the film's own call keeps frames on the module between its steps.
    """
    mean, deviation = statistics(vae, pixels)
    return (vae.quant_conv(vae.encoder(pixels[:, :, None])).chunk(2, dim=1)[0][:, :, 0] - mean) / deviation


def to_pixels(vae: Any, z: Tensor) -> Tensor:
    """Native latents (B, c, h, w) -> pixels (B, 3, 8h, 8w) in about [-1, 1]."""
    mean, deviation = statistics(vae, z)
    return vae.decoder(vae.post_quant_conv((z * deviation + mean)[:, :, None]))[:, :, 0]


def statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latent's channels over the training set, each (1, c, 1, 1), of the dtype of `like`."""
    mean, deviation = (torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean, deviation


def build(model: Model) -> Family:
    """The family of one checkpoint: base or Edit by its variant, or by the pipeline that its index names.

    Raises:
        ModelError: it is another of the makers' models, or the parts do not belong together.
    """
    vae, net, index = model.config("vae"), model.config("transformer"), model.config("model_index")
    factor, channels = 2 ** len(vae.get("temperal_downsample", range(3))), vae.get("z_dim", 16)
    _check(net, str(index.get("_class_name")), channels)
    edit = model.variant == "qwenimage-edit" or index.get("_class_name") in EDITS
    scheduler = {**DYNAMIC, **(model.config("scheduler") or PUBLISHED)}
    dynamic, side = bool(scheduler["use_dynamic_shifting"]), 1024 if edit else 1328
    return Family(
        name="qwenimage", parts=PARTS, path=RectifiedFlow(), prediction="flow",
        latent=LatentSpec(channels=channels, factor=factor, multiple=2 * factor),
        tokenizers={"tokenizer": CHATS[edit]}, encode=encode, predict=predict, inputs=inputs, combine=combine,
        shift=partial(dynamic_shift, patch=2 * factor, scheduler=scheduler) if dynamic else None,
        terminal=float(scheduler.get("shift_terminal") or 0.0),
        task="edit" if edit else "any", references=int(edit), fits=fits, reads_pictures=edit, vae_encode=to_native, vae_decode=to_pixels,
        defaults=Defaults(width=side, height=side, steps=50, sampler="euler", spacing="trailing", guidance_scale=4.0,
                          shift=1.0 if dynamic else float(scheduler["shift"])))


def _check(net: Config, pipeline: str, channels: int) -> None:
    """Whether a checkpoint is one of the two kinds.

    Raises:
        ModelError: it is not.
    """
    layered = net.get("use_layer3d_rope") or net.get("use_additional_t_cond")
    if pipeline in OTHERS or layered:
        what = OTHERS.get(pipeline, OTHERS["QwenImageLayeredPipeline"])
        raise ModelError(f"the checkpoint {what}, which this version does not: use Qwen-Image or Qwen-Image-Edit")
    if net.get("guidance_embeds"):
        raise ModelError("the transformer takes guidance as an input (guidance_embeds), which no published Qwen-Image does: check its config")
    if net.get("in_channels", 4 * channels) != 4 * channels or net.get("out_channels", channels) != channels:
        raise ModelError(f"the transformer takes {net.get('in_channels')!r:.40} channels and gives {net.get('out_channels')!r:.40}: expected "
                         f"{4 * channels} and {channels}, so it is a control checkpoint or not of one model with its autoencoder")
