"""Original layouts: there and back bit for bit on tiny networks, complete at full size on the meta device; lazy and damaged files."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, single_file, to_original
from safetensors.torch import save_file
from tiny import tiny_clip, tiny_vae
from torch import Tensor

from latentgen.errors import ModelError
from latentgen.models.convert import SURPLUS, LazyTensors, as_module_names, dequantised, find_prefix, part_tensors
from latentgen.models.family import Original, Part

HEADERS = Path(__file__).parent / "headers"
CLIP = "embeddings.token_embedding.weight"
PROJECTED = "transformers.CLIPTextModelWithProjection"
OPEN_CLIP = ("convert_open_clip_checkpoint", "transformer.resblocks.0.ln_1.weight")
DENOISER = ("model.diffusion_model.", "")


def unused_names(names, parts):
    """Names in a file that no part of these takes: averages of training, schedules, losses."""
    prefixes = tuple(p for part in parts if part.original and (p := find_prefix(names, part.original)) is not None)
    taken = [(name, next((p for p in prefixes if name.startswith(p)), None)) for name in names]
    return tuple(name for name, prefix in taken if prefix is None or SURPLUS.search(name.removeprefix(prefix)))


def part(name: str, cls: str, prefixes: tuple[str, ...], convert: str = "", unique: str = "") -> Part:
    return Part(name, cls, ("denoiser",), original=Original(prefixes, convert, unique))


def unet() -> Part:
    return part("unet", "diffusers.UNet2DConditionModel", DENOISER, "convert_ldm_unet_checkpoint", "input_blocks.0.0.weight")


def vae(cls: str = "AutoencoderKL") -> Part:
    return part("vae", f"diffusers.{cls}", ("first_stage_model.", "vae.", ""), "convert_ldm_vae_checkpoint", "encoder.down.0.block.0.norm1.weight")


def clip(name: str, *prefixes: str, projected: bool = False) -> Part:
    return part(name, f"transformers.CLIPTextModel{'WithProjection' * projected}", (*prefixes, "text_model."), "", CLIP)


def transformer(cls: str, convert: str, unique: str) -> Part:
    return part("transformer", f"diffusers.{cls}", DENOISER, convert, unique)


FLUX = "double_blocks.0.img_attn.qkv.weight"
T5 = ("text_encoders.t5xxl.transformer.", ""), "", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
PARTS: dict[str, tuple[Part, ...]] = {
    "sd15": (unet(), vae(), clip("text_encoder", "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")),
    "sd21": (unet(), vae(), part("text_encoder", "transformers.CLIPTextModel", ("cond_stage_model.model.", ""), *OPEN_CLIP)),
    "sdxl": (unet(), vae(), clip("text_encoder", "conditioner.embedders.0.transformer.text_model."),
             part("text_encoder_2", PROJECTED, ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.", ""), *OPEN_CLIP)),
    "sd3": (transformer("SD3Transformer2DModel", "convert_sd3_transformer_checkpoint_to_diffusers", "joint_blocks.0.x_block.attn.qkv.weight"), vae(),
            clip("text_encoder", "text_encoders.clip_l.transformer.text_model.", projected=True),
            part("text_encoder_2", PROJECTED, ("text_encoders.clip_g.transformer.", ""), "", f"text_model.{CLIP}"),
            part("text_encoder_3", "transformers.T5EncoderModel", *T5)),
    "flux1": (transformer("FluxTransformer2DModel", "convert_flux_transformer_checkpoint_to_diffusers", FLUX), vae(),
              clip("text_encoder", "text_encoders.clip_l.transformer.text_model."), part("text_encoder_2", "transformers.T5EncoderModel", *T5)),
    "flux2": (transformer("Flux2Transformer2DModel", "convert_flux2_transformer_checkpoint_to_diffusers", FLUX), vae("AutoencoderKLFlux2")),
    "zimage": (transformer("ZImageTransformer2DModel", "convert_z_image_transformer_checkpoint_to_diffusers", "layers.0.attention.qkv.weight"),
               vae()),
    "qwenimage": (transformer("QwenImageTransformer2DModel", "", "transformer_blocks.0.img_mod.1.weight"),
                  part("vae", "diffusers.AutoencoderKLQwenImage", ("vae.", "first_stage_model.", ""), "convert_wan_vae_to_diffusers",
                       "encoder.conv1.weight")),
}
PARTS["sdxl-refiner"] = tuple(p for p in PARTS["sdxl"] if p.name != "text_encoder")


@lru_cache
def maker() -> Any:
    """tests/headers/make.py as a module."""
    spec = importlib.util.spec_from_file_location("make_headers", HEADERS / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variants(*, layout: str) -> list[str]:
    stems = sorted(path.name.removesuffix(".json.gz") for path in HEADERS.glob("*.json.gz"))
    return [stem for stem in stems if stem.endswith(".diffusers") == (layout == "diffusers")]


def header(name: str) -> dict[str, Tensor]:
    """A fixture as tensors on the meta device."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}
    told = json.loads(gzip.decompress((HEADERS / f"{name}.json.gz").read_bytes()))
    return {key: torch.empty(shape, dtype=dtypes[dtype], device="meta") for key, (dtype, shape) in told["tensors"].items()}


@lru_cache
def shapes_of(config: str) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in maker().module_state(json.loads(config)).items()}


def check_complete(found: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    wanted = dict(shapes_of(json.dumps(config, sort_keys=True)))
    wanted.pop("encoder.embed_tokens.weight", None)  # tied to shared.weight; loading fills it in
    got = {name: found[source].shape for name, source in as_module_names(found, wanted).items()}
    assert sorted(set(wanted) - set(got)) == [] and sorted(set(got) - set(wanted)) == []
    assert {name: (got[name], shape) for name, shape in wanted.items() if got[name] != shape} == {}


# ------------------------------------------------------------------------------------------------------------- full size, on the meta device


@pytest.mark.parametrize("variant", variants(layout="original"))
def test_every_part_of_a_published_file_is_complete(variant: str) -> None:
    """No tensor of any part missing or left over, every shape right; what no part takes is what training left behind."""
    tensors = header(variant)
    family = maker().family_of(variant)
    configs = json.loads(maker().CONFIGS[variant].read_text("utf-8"))["parts"]
    there = [p for p in PARTS[family] if find_prefix(tensors.keys(), p.original) is not None]
    expected = {"sd15": 3, "sd21": 3, "sdxl": 4, "sdxl-refiner": 3, "sd3": 5 if variant == "sd3-medium" else 2}.get(family, 1)
    assert len(there) == expected
    for p in there:
        check_complete(part_tensors(tensors, p, configs[p.name]), configs[p.name])
    idle = ("model_ema.", "betas", "alphas", "sqrt_", "log_", "posterior_")
    loose = [name for name in unused_names(tensors.keys(), there) if not name.startswith(idle)]
    assert all(name.endswith(("position_ids", "logit_scale")) or name == "norm_final.weight" for name in loose)
    assert ("alphas_cumprod" in unused_names(tensors.keys(), there)) == (family in ("sd15", "sd21"))


@pytest.mark.parametrize(("name", "family", "which"), [
    ("vae-sd", "sd15", "vae"), ("vae-sdxl", "sdxl", "vae"), ("vae-flux1", "flux1", "vae"), ("vae-flux2", "flux2", "vae"),
    ("vae-qwenimage", "qwenimage", "vae"),
    ("clip-l", "flux1", "text_encoder"), ("clip-l", "sd15", "text_encoder"), ("clip-l", "sd3", "text_encoder"), ("clip-g", "sd3", "text_encoder_2"),
    ("t5xxl", "flux1", "text_encoder_2"), ("t5xxl", "sd3", "text_encoder_3"),
])
def test_parts_published_alone_are_complete(name: str, family: str, which: str) -> None:
    variant = {"flux1": "flux1-dev", "flux2": "flux2-dev", "sd3": "sd3-medium"}.get(family, family)
    config = json.loads(maker().CONFIGS[variant].read_text("utf-8"))["parts"][which]
    found = part_tensors(header(f"parts/{name}"), next(p for p in PARTS[family] if p.name == which), config)
    check_complete(found, config)


@pytest.mark.parametrize("variant", variants(layout="diffusers"))
def test_the_headers_agree_with_the_configs(variant: str) -> None:
    """A config changed after its header was made is noticed."""
    parts = json.loads(maker().CONFIGS[variant.removesuffix(".diffusers")].read_text("utf-8"))["parts"]
    check_complete(header(variant), parts.get("unet") or parts["transformer"])


def test_every_variant_has_its_headers() -> None:
    assert {name.removesuffix(".diffusers") for name in variants(layout="diffusers")} == set(maker().CONFIGS)
    assert set(maker().CONFIGS) - set(variants(layout="original")) == {name for name in maker().CONFIGS if name.startswith("pixart")}
    assert sum(path.stat().st_size for path in HEADERS.rglob("*.gz")) < 500_000


# ------------------------------------------------------------------------------------------------------------- there and back, bit for bit


def tiny_unet(**config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    said = {"sample_size": 8, "layers_per_block": 2, "block_out_channels": (8, 16, 16), "norm_num_groups": 4, "cross_attention_dim": 16,
            "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}
    return UNet2DConditionModel(**(said | config))


def tiny_xl() -> Any:
    return tiny_unet(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                     up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 1, 2),
                     use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
                     projection_class_embeddings_input_dim=40, attention_head_dim=(2, 4, 4))


def tiny_sd3(**config: Any) -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(sample_size=8, num_layers=3, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
                                 caption_projection_dim=16, pooled_projection_dim=12, pos_embed_max_size=8, **config)


def tiny_flux(**config: Any) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
                                  pooled_projection_dim=12, axes_dims_rope=(2, 2, 4), **config)


def tiny_flux2(*, guidance: bool) -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
                                   joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=guidance)


def tiny_zimage() -> Any:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
                                   axes_dims=(4, 6, 6), axes_lens=(32, 16, 16))


def tiny_t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"))


def tiny_flux2_vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                              layers_per_block=1, latent_channels=4, norm_num_groups=4)


def tiny_video_vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=2)  # the converter knows this shape alone


def declared(family: str, name: str) -> Part:
    return next(p for p in PARTS[family] if p.name == name)


CASES = {  # what -> (family, part, module)
    "unet": ("sd15", "unet", tiny_unet), "unet, 9 channels": ("sd15", "unet", lambda: tiny_unet(in_channels=9)),
    "unet, linear": ("sd21", "unet", lambda: tiny_unet(use_linear_projection=True, layers_per_block=1)),
    "unet, two encoders": ("sdxl", "unet", tiny_xl), "unet, four levels": ("sdxl-refiner", "unet", lambda: tiny_unet(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=4)),
    "vae": ("sd15", "vae", tiny_vae),
    "vae, 16 channels": ("sd3", "vae", lambda: tiny_vae(channels=16, use_quant_conv=False, use_post_quant_conv=False)),
    "vae, 3 levels": ("flux1", "vae", lambda: tiny_vae(block_out_channels=(8, 8, 16), layers_per_block=2,
                                                       down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)),
    "vae, batch norm": ("flux2", "vae", tiny_flux2_vae), "vae, frames": ("qwenimage", "vae", tiny_video_vae),
    "clip": ("sd15", "text_encoder", tiny_clip), "clip, xl": ("sdxl", "text_encoder", tiny_clip), "clip, flux": ("flux1", "text_encoder", tiny_clip),
    "clip g": ("sd3", "text_encoder_2", lambda: tiny_clip(projected=True)),
    "open clip": ("sd21", "text_encoder", tiny_clip), "open clip, projected": ("sdxl", "text_encoder_2", lambda: tiny_clip(projected=True)),
    "open clip, other width": ("sdxl", "text_encoder_2", lambda: tiny_clip(projected=True, projection_dim=24)),
    "open clip, refiner": ("sdxl-refiner", "text_encoder_2", lambda: tiny_clip(projected=True)), "t5": ("sd3", "text_encoder_3", tiny_t5),
    "mmdit": ("sd3", "transformer", tiny_sd3),
    "mmdit, dual": ("sd3", "transformer", lambda: tiny_sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm")),
    "flux": ("flux1", "transformer", tiny_flux), "flux, guided": ("flux1", "transformer", lambda: tiny_flux(guidance_embeds=True)),
    "flux 2": ("flux2", "transformer", lambda: tiny_flux2(guidance=True)),
    "flux 2, distilled": ("flux2", "transformer", lambda: tiny_flux2(guidance=False)),
    "z-image": ("zimage", "transformer", tiny_zimage),
}


def random_state(module: Any) -> dict[str, Tensor]:
    """Its state with every number drawn: a swap of equal tensors would go unseen."""
    dice = torch.Generator().manual_seed(1)
    drawn = {name: torch.randn(t.shape, generator=dice) if t.is_floating_point() else t for name, t in module.state_dict().items()}
    if "encoder.embed_tokens.weight" in drawn:
        drawn["encoder.embed_tokens.weight"] = drawn["shared.weight"]
    return drawn


def config_of(module: Any) -> dict[str, Any]:
    return module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)


def same(found: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    wanted = {name: tensor for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}
    assert sorted(found) == sorted(wanted)
    assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str) -> None:
    """Inside a file with other parts beside it, and alone without a prefix."""
    family, name, make = CASES[case]
    module, p = make(), declared(family, name)
    state, config = random_state(module), config_of(module)
    kind, prefix = LAYOUTS[family][name]
    inside = to_original(kind, state, config, prefix=prefix) | {"model_ema.decay": torch.zeros(()), "other.encoder.layers.0.weight": torch.zeros(2)}
    assert sum("transformer_blocks" in key for key in inside) == 0 or kind == "ldm_unet"
    before = dict(inside)
    same(part_tensors(inside, p, config), state)
    assert inside.keys() == before.keys() and all(inside[key] is before[key] for key in before)  # converters empty what they get: not the caller's
    same(part_tensors(to_original(kind, state, config), p, config), state)


def test_a_clip_without_projection_gets_the_identity() -> None:
    """The published file has none and means that; a stray one beside it is not taken."""
    module = tiny_clip(projected=True)
    state, config = random_state(module), config_of(module)
    identity = state | {"text_projection.weight": torch.eye(32)}
    p = declared("sd3", "text_encoder")
    assert not torch.equal(state["text_projection.weight"], torch.eye(32))
    same(part_tensors(to_original("clip_plain", state, config), p, config), identity)
    same(part_tensors(to_original("clip", state, config, prefix="text_encoders.clip_l.transformer."), p, config), identity)


def test_older_clip_files_without_text_model() -> None:
    module = tiny_clip()
    state, p = random_state(module), declared("sd15", "text_encoder")
    same(part_tensors({f"cond_stage_model.transformer.{name}": t for name, t in state.items()}, p, config_of(module)), state)


def test_equal_to_the_reference_loader(tmp_path: Path) -> None:
    """diffusers' own from_single_file with a local config gives the same tensors."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    modules = {"unet": tiny_unet(), "vae": tiny_vae()}
    states = {name: random_state(module) for name, module in modules.items()}
    configs = {name: config_of(module) for name, module in modules.items()}
    save_file({name: t.contiguous() for name, t in single_file("sd15", states, configs).items()}, tmp_path / "all.safetensors")
    for (name, module), cls in zip(modules.items(), (UNet2DConditionModel, AutoencoderKL), strict=True):
        module.save_config(tmp_path / name)
        reference = cls.from_single_file(str(tmp_path / "all.safetensors"), config=str(tmp_path), subfolder=name, local_files_only=True)
        same(part_tensors(LazyTensors(tmp_path / "all.safetensors"), declared("sd15", name), configs[name]), reference.state_dict())


# ------------------------------------------------------------------------------------------------------------- laziness and copies


class Watched(Mapping[str, Tensor]):
    """Notes which tensors were looked up."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.seen = tensors, set()

    def __getitem__(self, name: str) -> Tensor:
        self.seen.add(name)
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_only_the_part_is_read() -> None:
    tensors = Watched(header("sd3-medium"))
    config = json.loads(maker().CONFIGS["sd3-medium"].read_text("utf-8"))["parts"]["text_encoder_3"]
    p = declared("sd3", "text_encoder_3")
    assert tensors.seen == set()
    part_tensors(dequantised(tensors), p, config)
    assert tensors.seen and all(name.startswith("text_encoders.t5xxl.") for name in tensors.seen)


def test_what_is_split_stays_in_the_file(tmp_path: Path) -> None:
    """A joined projection is not copied: its three parts point into the mapping of the file."""
    module = tiny_flux()
    state, config = random_state(module), config_of(module)
    save_file(to_original("flux", state, config), tmp_path / "flux.safetensors")
    tensors = LazyTensors(tmp_path / "flux.safetensors")
    found = part_tensors(tensors, declared("flux1", "transformer"), config)
    joined = tensors["single_blocks.1.linear1.weight"]
    for index, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
        assert found[f"single_transformer_blocks.1.{name}.weight"].data_ptr() == joined[16 * index].data_ptr()
    assert found["x_embedder.weight"].data_ptr() == tensors["img_in.weight"].data_ptr()


# ------------------------------------------------------------------------------------------------------------- refusals and leftovers


def test_refusals() -> None:
    module = tiny_sd3()
    state, config, p = to_original("mmdit", random_state(module), config_of(module)), config_of(module), declared("sd3", "transformer")
    with pytest.raises(ModelError, match="holds no unet .*give that part from its own file"):
        part_tensors(state, unet(), {})
    with pytest.raises(ModelError, match="no original single-file layout is known for transformer"):
        part_tensors(state, Part("transformer", "diffusers.PixArtTransformer2DModel", ("denoiser",)), {})
    with pytest.raises(ModelError, match="lacks 'final_layer.linear.weight'"):
        part_tensors({name: t for name, t in state.items() if name != "final_layer.linear.weight"}, p, config)
    with pytest.raises(ModelError, match="do not fit their published layout"):
        part_tensors(state | {"joint_blocks.last.x_block.attn.qkv.weight": torch.zeros(3)}, p, config)
    for name in ("convert_nothing", "load_single_file_checkpoint", "infer_diffusers_model_type", "logger"):
        with pytest.raises(ModelError, match="has no converter"):
            part_tensors(state, part("transformer", "diffusers.X", ("",), name), config)


@pytest.mark.parametrize(("kind", "which", "make"), [
    ("ldm_unet", ("sd15", "unet"), tiny_unet), ("mmdit", ("sd3", "transformer"), tiny_sd3), ("ldm_vae", ("sd15", "vae"), tiny_vae),
])
def test_what_a_converter_ignores_is_not_lost(kind: str, which: tuple[str, str], make: Any) -> None:
    """It stays under its own name, where a strict load finds it."""
    module = make()
    state, config = random_state(module), config_of(module)
    found = part_tensors(to_original(kind, state, config) | {"surprise.weight": torch.zeros(1)}, declared(*which), config)
    assert set(found) - set(state) == {"surprise.weight"}


def test_older_spellings() -> None:
    newer = {  # in a file -> in the module
        "encoder.mid_block.attentions.0.query.weight": "encoder.mid_block.attentions.0.to_q.weight",
        "encoder.mid_block.attentions.0.proj_attn.bias": "encoder.mid_block.attentions.0.to_out.0.bias",
        "visual.patch.weight": "model.visual.patch.weight", "model.layers.0.weight": "model.language_model.layers.0.weight",
        "text_model.final_layer_norm.weight": "final_layer_norm.weight", "kept": "kept",
    }
    tensors = dict.fromkeys([*newer, "embeddings.position_ids", "strange"], torch.zeros(1))
    assert as_module_names(tensors, [*newer.values(), "absent"]) == {new: old for old, new in newer.items()} | {"strange": "strange"}
    other = as_module_names({"final_layer_norm.weight": torch.zeros(1)}, ["text_model.final_layer_norm.weight"])
    assert other == {"text_model.final_layer_norm.weight": "final_layer_norm.weight"}
