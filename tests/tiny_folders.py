"""A tiny random checkpoint of every original layout, as a diffusers folder. Knows torch, diffusers and transformers; no latentgen but its vocabulary.

Only what loading needs: that networks react as those of a family should is for the family's own tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from layouts import single_file
from safetensors.torch import save_file
from tiny import lively, tiny_clip, tiny_vae
from tiny_t5 import tiny_t5, tiny_t5_tokenizer

from latentgen.conditioning.vocabulary import packaged_clip

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<s>", "</s>",
           "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
BETAS = {"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
         "beta_end": 0.012, "timestep_spacing": "leading", "steps_offset": 1}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
CLIP, SECOND = {"tokenizer": "<|endoftext|>"}, {"tokenizer_2": "!"}


@dataclass(frozen=True)
class Tiny:
    """A checkpoint.

    Attributes:
        layout: the key of layouts.LAYOUTS.
        index: the class that model_index.json names.
        modules: part -> module.
        tokenizers: name -> CLIP's padding token, or "t5", or "chat".
        family: for a card.toml, where the index does not tell.
    """

    layout: str
    index: str
    modules: Mapping[str, Any]
    tokenizers: Mapping[str, str]
    scheduler: Mapping[str, Any]
    family: str = ""

    def states(self) -> dict[str, dict[str, torch.Tensor]]:
        """part -> its state dict."""
        return {name: dict(module.state_dict()) for name, module in self.modules.items()}

    def configs(self) -> dict[str, dict[str, Any]]:
        """part -> its config, as its config.json has it."""
        return {name: m.config.to_dict() if hasattr(m.config, "to_dict") else dict(m.config) for name, m in self.modules.items()}

    def original(self) -> dict[str, torch.Tensor]:
        """The single file that its makers would have published."""
        return single_file(self.layout, self.states(), self.configs())

    def save(self, folder: Path) -> Path:
        """Write the diffusers folder."""
        for name, module in self.modules.items():
            module.save_pretrained(folder / name)
        for name, kind in self.tokenizers.items():
            {"t5": tiny_t5_tokenizer, "chat": chat_tokenizer}.get(kind, lambda place, kind=kind: clip_tokenizer(place, pad=kind))(folder / name)
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(self.scheduler))
        classes = {name: [type(m).__module__.partition(".")[0], type(m).__name__] for name, m in self.modules.items()}
        classes |= dict.fromkeys(self.tokenizers, ["transformers", "Tokenizer"]) | {"scheduler": ["diffusers", self.scheduler["_class_name"]]}
        (folder / "model_index.json").write_text(json.dumps({"_class_name": self.index, **classes}))
        if self.family:
            (folder / "card.toml").write_text(f'name = "tiny"\nfamily = "{self.family}"\n')
        return folder


def written(tensors: Mapping[str, torch.Tensor], path: Path) -> Path:
    """A safetensors file of these tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path)
    return path


def clip_tokenizer(folder: Path, *, pad: str) -> None:
    """CLIP's own, as checkpoints carry it."""
    clip = packaged_clip()
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(clip.vocab, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in clip.merges), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}))


def chat_tokenizer(folder: Path) -> Path:
    """Bytes and special tokens, which is all that the templates of language models need."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    folder.mkdir(parents=True)
    inner.save(str(folder / "tokenizer.json"))
    return folder


def _unet(seed: int, *, width: int = 32, **config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    said = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": width,
            "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    return lively(UNet2DConditionModel(**(said | config)))


def _xl(seed: int, *, width: int, numbers: int) -> Any:
    return _unet(seed, width=width, attention_head_dim=(2, 4), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                 up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2), use_linear_projection=True,
                 addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * numbers + 32)


def _qwen(layers: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(2)
    return lively(Qwen3ForCausalLM(Qwen3Config(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                                               vocab_size=400, initializer_range=0.3, num_hidden_layers=layers)))


def _sd15(channels: int) -> Tiny:
    index = {4: "StableDiffusionPipeline", 8: "StableDiffusionInstructPix2PixPipeline", 9: "StableDiffusionInpaintPipeline"}[channels]
    return Tiny("sd15", index, {"unet": _unet(channels, in_channels=channels), "vae": tiny_vae(), "text_encoder": tiny_clip()}, CLIP, BETAS)


def _sd21() -> Tiny:
    modules = {"unet": _unet(1, width=48, use_linear_projection=True), "vae": tiny_vae(), "text_encoder": tiny_clip(width=48, hidden_act="gelu")}
    return Tiny("sd21", "StableDiffusionPipeline", modules, {"tokenizer": "!"}, BETAS | {"prediction_type": "v_prediction"}, family="sd21")


def _sdxl() -> Tiny:
    words = {"text_encoder": tiny_clip(seed=1), "text_encoder_2": tiny_clip(seed=2, projected=True)}
    return Tiny("sdxl", "StableDiffusionXLPipeline", {"unet": _xl(0, width=64, numbers=6), "vae": tiny_vae(), **words}, CLIP | SECOND, BETAS)


def _refiner() -> Tiny:
    modules = {"unet": _xl(4, width=32, numbers=5), "vae": tiny_vae(), "text_encoder_2": tiny_clip(seed=2, projected=True)}
    return Tiny("sdxl-refiner", "StableDiffusionXLImg2ImgPipeline", modules, SECOND, BETAS)


def _sd3() -> Tiny:
    """Its first encoder has no projection of its own: the published file has none, and means the identity."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(1)
    net = lively(SD3Transformer2DModel(sample_size=8, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64,
                                       caption_projection_dim=32, pooled_projection_dim=64, in_channels=16, out_channels=16, pos_embed_max_size=16,
                                       dual_attention_layers=(0,), qk_norm="rms_norm"))
    first = tiny_clip(seed=1, projected=True)
    first.text_projection.weight.copy_(torch.eye(32))
    vae = tiny_vae(channels=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609)
    modules = {"transformer": net, "vae": vae, "text_encoder": first, "text_encoder_2": tiny_clip(seed=2, projected=True),
               "text_encoder_3": tiny_t5(width=64)}
    return Tiny("sd3", "StableDiffusion3Pipeline", modules, CLIP | SECOND | {"tokenizer_3": "t5"}, FLOW)


def _flux1() -> Tiny:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(1)
    net = lively(FluxTransformer2DModel(in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                                        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6)))
    vae = tiny_vae(channels=16, scaling_factor=0.3611, shift_factor=0.1159)
    return Tiny("flux1", "FluxPipeline", {"transformer": net, "vae": vae, "text_encoder": tiny_clip(), "text_encoder_2": tiny_t5()},
                CLIP | {"tokenizer_2": "t5"}, FLOW)


def _flux2() -> Tiny:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    torch.manual_seed(1)
    net = lively(Flux2Transformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=48,
                                         axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False))
    vae = lively(AutoencoderKLFlux2(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, sample_size=64))
    vae.bn.running_var.copy_(0.5 + torch.rand(128))
    return Tiny("flux2", "Flux2KleinPipeline", {"transformer": net, "vae": vae, "text_encoder": _qwen(28)}, {"tokenizer": "chat"}, FLOW)


def _zimage() -> Tiny:
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(1)
    net = lively(ZImageTransformer2DModel(dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=(4, 6, 6),
                                          axes_lens=(512, 32, 32)))
    return Tiny("zimage", "ZImagePipeline", {"transformer": net, "vae": tiny_vae(channels=16, scaling_factor=0.3611, shift_factor=0.1159),
                                             "text_encoder": _qwen(3)}, {"tokenizer": "chat"}, FLOW)


def _qwenimage() -> Tiny:
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(1)
    net = lively(QwenImageTransformer2DModel(in_channels=64, out_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2,
                                             joint_attention_dim=16, axes_dims_rope=(4, 6, 6)))
    vae = lively(AutoencoderKLQwenImage(base_dim=8))
    words = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "vocab_size": 400, "bos_token_id": None, "eos_token_id": None,
             "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}}
    eye = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4}
    config = Qwen2_5_VLConfig(text_config=words, vision_config=eye, image_token_id=263, vision_start_token_id=261)
    encoder = lively(Qwen2_5_VLForConditionalGeneration(config))
    return Tiny("qwenimage", "QwenImagePipeline", {"transformer": net, "vae": vae, "text_encoder": encoder}, {"tokenizer": "chat"}, FLOW)


def pixart() -> Tiny:
    """Without an original layout."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(1)
    net = lively(PixArtTransformer2DModel(sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8,
                                          cross_attention_dim=16, caption_channels=32, use_additional_conditions=False))
    return Tiny("", "PixArtSigmaPipeline", {"transformer": net, "vae": tiny_vae(), "text_encoder": tiny_t5()}, {"tokenizer": "t5"}, BETAS)


MAKERS: dict[str, Callable[[], Tiny]] = {
    "sd15": lambda: _sd15(4), "sd15-inpaint": lambda: _sd15(9), "sd15-instruct": lambda: _sd15(8), "sd21": _sd21, "sdxl": _sdxl,
    "sdxl-refiner": _refiner, "sd3": _sd3, "flux1": _flux1, "flux2": _flux2, "zimage": _zimage, "qwenimage": _qwenimage, "pixart": pixart,
}


@lru_cache
def tiny(kind: str) -> Tiny:
    """The checkpoint of a kind, made once; its modules are not to be changed."""
    return MAKERS[kind]()
