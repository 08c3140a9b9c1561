"""Z-Image: one stream of a 16-channel latent's 2x2 patches and a language model's tokens, on a rectified flow; Qwen3 reads the prompt.

Two kinds of checkpoint with the same tensors: the base, guided by classifier-free guidance, and Turbo, distilled to 8 steps and never guided.
Guidance scales of other programs count differently for this model: they add g * (words - negative) to the estimate with the words, so that their
0 is off; here 1 is off, as for every family, and guidance_scale = g + 1. Knows nothing of prompts, samplers or files.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from latentgen.conditioning.tokens import TokenizerSpec
from latentgen.diffusion.level import Level, RectifiedFlow
from latentgen.errors import ModelError
from latentgen.models.family import Conditioning, Config, Defaults, Family, Model, Modules, Original, Part, Signature, Words
from latentgen.pipelines._flow import DYNAMIC, dynamic_shift
from latentgen.pixels.latent import LatentSpec

PATCH = 2  # latents along a side of a token
CHAT = TokenizerSpec("chat", 512, pad="<|endoftext|>", padded=False, before="<|im_start|>user\n", after="<|im_end|>\n<|im_start|>assistant\n")
VAE = {"latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "scaling_factor": 0.3611, "shift_factor": 0.1159}
SEES = "siglip_embedder.0.weight"  # of a network that looks at pictures, too
ENDS: dict[str, tuple[int | None, ...]] = {  # the last layer is asked for so that no pruned network is taken for it
    "cap_embedder.1.weight": (3840, 2560), "x_pad_token": (1, 3840), "layers.29.feed_forward.w1.weight": (10240, 3840)}
ORIGINAL = ENDS | {"layers.0.attention.qkv.weight": (11520, 3840), "final_layer.linear.weight": (64, 3840)}
DIFFUSERS = ENDS | {"layers.0.attention.to_q.weight": (3840, 3840), "all_final_layer.2-1.linear.weight": (64, 3840)}

SIGNATURES = tuple(Signature(variant, layout, shapes, absent=(SEES,))  # Turbo has the base's tensors: only a scheduler or a card tells it
                   for layout, shapes in (("original", ORIGINAL), ("diffusers", DIFFUSERS)) for variant in ("zimage", "zimage-turbo"))
INDEX = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
PARTS = (
    Part("text_encoder", "transformers.Qwen3ForCausalLM", ("text",), original=Original(("",), unique="model.layers.0.self_attn.q_norm.weight")),
    Part("transformer", "diffusers.ZImageTransformer2DModel", ("denoiser",),
         original=Original(("model.diffusion_model.", ""), convert="convert_z_image_transformer_checkpoint_to_diffusers",
                           unique="layers.0.attention.qkv.weight")),
    Part("vae", "diffusers.AutoencoderKL", ("encoder", "decoder"),
         original=Original(("first_stage_model.", "vae.", ""), convert="convert_ldm_vae_checkpoint", unique="encoder.down.0.block.0.norm1.weight")),
)


def encode(modules: Modules, words: Words) -> Conditioning:
    """The language model's states before its last layer, (1, n, 2560), of the n tokens of prompt and template; without padding, as in training."""
    language = modules["text_encoder"].model  # the vocabulary's head is of no use here
    states = language(words.ids["tokenizer"], output_hidden_states=True, use_cache=False).hidden_states[-2]
    return Conditioning(words.weigh("tokenizer", states))


def predict(modules: Modules, x: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
    """(B, c, h, w) latents -> velocity eps - x0, float32, of the same shape. The network counts time from noise to clean and answers x0 - eps."""
    net = modules["transformer"]
    time = torch.full((len(x),), 1 - level.time / 1000, device=x.device)
    out = net(list(x.to(net.dtype)[:, :, None]), time, list(conditioning.tokens.to(net.dtype)), return_dict=False)[0]
    return -torch.stack(out)[:, :, 0].float()


def build(model: Model) -> Family:
    """The family of one checkpoint, by its configs; Turbo by its variant.

    Raises:
        ModelError: the transformer is of a kind that looks at pictures, or the parts do not belong together.
    """
    vae, net, turbo = VAE | model.config("vae"), model.config("transformer"), model.variant == "zimage-turbo"
    factor, channels = 2 ** (len(vae["block_out_channels"]) - 1), vae["latent_channels"]
    _check(net, model.config("text_encoder"), channels)
    scheduler = {**DYNAMIC, "shift": 3.0 if turbo else 6.0, **model.config("scheduler")}
    dynamic = bool(scheduler["use_dynamic_shifting"])
    return Family(
        name="zimage", parts=PARTS, path=RectifiedFlow(), prediction="flow",
        latent=LatentSpec(channels=channels, factor=factor, multiple=PATCH * factor, scale=vae["scaling_factor"], shift=vae["shift_factor"] or 0.0),
        tokenizers={"tokenizer": CHAT}, encode=encode, predict=predict, guidance="none" if turbo else "cfg",
        shift=partial(dynamic_shift, patch=PATCH * factor, scheduler=scheduler) if dynamic else None,
        defaults=Defaults(width=1024, height=1024, steps=8 if turbo else 50, sampler="euler", spacing="trailing",
                          guidance_scale=1.0 if turbo else 5.0, shift=1.0 if dynamic else float(scheduler["shift"])))


def _check(net: Config, words: Config, channels: int) -> None:
    """Whether the parts are of this family and of one model.

    Raises:
        ModelError: they are not.
    """
    if net.get("siglip_feat_dim") is not None:
        raise ModelError("the transformer looks at pictures through SigLIP (Z-Image Omni), which this family does not: use Z-Image or Z-Image-Turbo")
    if PATCH not in net.get("all_patch_size", (PATCH,)) or 1 not in net.get("all_f_patch_size", (1,)):
        raise ModelError(f"the transformer reads patches of {net.get('all_patch_size')!r:.40}: expected 2, so it is not Z-Image")
    if net.get("in_channels", channels) != channels:
        raise ModelError(f"the transformer takes {net['in_channels']!r:.40} channels and the autoencoder gives {channels}: they are not of one "
                         "model, so give the parts that belong together")
    width, read = words.get("hidden_size"), net.get("cap_feat_dim")
    if None not in (width, read) and width != read:
        raise ModelError(f"the text encoder has width {width!r:.40} and the transformer reads {read!r:.40}: they are not of one model, "
                         "so give the text encoder that belongs to it (Qwen3-4B)")
