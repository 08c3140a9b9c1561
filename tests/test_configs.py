"""The packaged configs and cards: every published variant builds on the meta device with the size that its makers state. No weight is read."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from latentgen.diffusion.level import NoisePath, RectifiedFlow, VariancePreserving
from latentgen.diffusion.sample import SAMPLERS
from latentgen.diffusion.schedule import linear, scaled_linear, spacing
from latentgen.models.family import Defaults

CONFIGS = Path(str(resources.files("latentgen.pipelines"))) / "configs"
CARDS = Path(str(resources.files("latentgen.weights")))
FAMILIES = ("sd15", "sd21", "sdxl", "sd3", "flux1", "flux2", "pixart", "zimage", "qwenimage")
VARIANTS = ("sd15", "sd15-inpaint", "sd15-instruct", "sd21", "sd21-v", "sd21-inpaint", "sdxl", "sdxl-refiner", "sdxl-inpaint", "sd3-medium",
            "sd35-medium", "sd35-large", "flux1-dev", "flux1-schnell", "flux1-fill", "flux1-kontext", "flux2-dev", "flux2-klein-4b", "flux2-klein-9b",
            "pixart-alpha-512", "pixart-alpha-1024", "pixart-sigma-1024", "zimage", "zimage-turbo", "qwenimage", "qwenimage-edit")

# Parameters as published. Exact where a file's tensors were counted in public, else the rounded number of a model card (then within 0.5 %).
CLIP_L, CLIP_L_PROJECTED, CLIP_H, CLIP_G, T5, QWEN3_4B = 123_060_480, 123_650_304, 340_387_840, 694_659_840, 4_762_310_656, 4_022_468_096
KL_4, KL_16 = 83_653_863, 83_819_683
EXTRA = 320 * 9  # of a first convolution, per further channel
DENOISERS = {
    "sd15": 859_520_964, "sd15-inpaint": 859_520_964 + 5 * EXTRA, "sd15-instruct": 859_520_964 + 4 * EXTRA,
    "sd21": 865_910_724, "sd21-v": 865_910_724, "sd21-inpaint": 865_910_724 + 5 * EXTRA,
    "sdxl": 2_567_463_684, "sdxl-inpaint": 2_567_463_684 + 5 * EXTRA, "sdxl-refiner": 2.26e9,
    "sd3-medium": 2.03e9, "sd35-medium": 2.24e9, "sd35-large": 8.06e9,
    "flux1-dev": 11_901_408_320, "flux1-kontext": 11_901_408_320, "flux1-fill": 11_901_408_320 + 320 * 3072,
    "flux1-schnell": 11_901_408_320 - (256 + 1 + 3072 + 1) * 3072,  # no embedder of the guidance scale: two linear layers
    "flux2-dev": 32.2e9, "flux2-klein-4b": 3.88e9, "flux2-klein-9b": 9.08e9,
    "pixart-alpha-512": 610_856_096, "pixart-sigma-1024": 610_856_096,
    "pixart-alpha-1024": 610_856_096 + 2 * (256 + 1 + 384 + 1) * 384,  # embedders of size and aspect ratio
    "zimage": 6.15e9, "zimage-turbo": 6.15e9, "qwenimage": 20_430_401_088, "qwenimage-edit": 20_430_401_088,
}
OTHERS = {
    "sd15": {"text_encoder": CLIP_L, "vae": KL_4},
    "sd21": {"text_encoder": CLIP_H, "vae": KL_4},
    "sdxl": {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "vae": KL_4},
    "sdxl-refiner": {"text_encoder_2": CLIP_G, "vae": KL_4},
    "sd3": {"text_encoder": CLIP_L_PROJECTED, "text_encoder_2": CLIP_G, "text_encoder_3": T5, "vae": KL_16},
    "flux1": {"text_encoder": CLIP_L, "text_encoder_2": T5, "vae": KL_16},
    "flux2-dev": {"text_encoder": 24_011_361_280, "vae": 84_046_115},
    "flux2-klein-4b": {"text_encoder": QWEN3_4B, "vae": 84_046_115},
    "flux2-klein-9b": {"text_encoder": 8_190_735_360, "vae": 84_046_115},
    "pixart": {"text_encoder": T5, "vae": KL_4},
    "zimage": {"text_encoder": QWEN3_4B, "vae": KL_16},
    "qwenimage": {"text_encoder": 8_292_166_656, "vae": 126_892_531},
}


@cache
def read(variant: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{variant}.json").read_text("utf-8"))


def of(table: dict[str, Any], variant: str) -> Any:
    """The entry of a variant, or of the family that its name begins with ("sd35-large" is of "sd3")."""
    return table[max((key for key in table if variant.startswith(key)), key=len)]


@cache
def size(config: str) -> int:
    """Parameters of the module that a config describes, by the class that it names."""
    import diffusers
    import transformers

    raw = json.loads(config)
    with torch.device("meta"):
        if "_class_name" in raw:
            module = getattr(diffusers, raw["_class_name"]).from_config(raw)
        else:
            cls = getattr(transformers, raw["architectures"][0])
            module = cls(cls.config_class(**raw))
    return sum(p.numel() for p in module.parameters())


def denoiser(variant: str) -> dict[str, Any]:
    parts = read(variant)["parts"]
    return parts["unet"] if "unet" in parts else parts["transformer"]


def path_of(variant: str) -> NoisePath:
    scheduler = read(variant)["scheduler"]
    if scheduler["_class_name"].startswith("FlowMatch"):
        return RectifiedFlow()
    table = {"linear": linear, "scaled_linear": scaled_linear}[scheduler["beta_schedule"]]
    return VariancePreserving(table(scheduler["num_train_timesteps"], scheduler["beta_start"], scheduler["beta_end"]))


def levels_exist(variant: str, defaults: dict[str, Any]) -> None:
    """Defaults are of the right names, types and ranges, and the engine makes a run of them."""
    types = {f.name: type(f.default) for f in fields(Defaults)}
    assert {name: type(value) for name, value in defaults.items()} == {name: types[name] for name in defaults}
    assert defaults["sampler"] in SAMPLERS and defaults["width"] % 16 == defaults["height"] % 16 == 0
    levels = spacing(defaults["spacing"], path_of(variant), defaults["steps"], shift=defaults["shift"], offset=defaults["offset"])
    assert len(levels) == defaults["steps"] + 1 and levels[-1].sigma == 0 < levels[-2].sigma


def test_every_variant_is_there() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(VARIANTS) == set(DENOISERS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_complete(variant: str) -> None:
    import diffusers

    raw = read(variant)
    assert list(raw) == ["summary", "defaults", "index", "scheduler", "parts", "tokenizers"]
    assert set(raw["parts"]) == {"unet" if "unet" in raw["parts"] else "transformer", *of(OTHERS, variant)}
    assert {name.replace("text_encoder", "tokenizer") for name in raw["parts"] if name.startswith("text_")} == set(raw["tokenizers"])
    assert {"pad"} <= set().union(*raw["tokenizers"].values()) <= {"pad", "model_max_length"}
    getattr(diffusers, raw["scheduler"]["_class_name"]).from_config(raw["scheduler"])
    assert hasattr(diffusers, raw["index"]["_class_name"])
    text = (CONFIGS / f"{variant}.json").read_text("utf-8")
    assert not re.search(r"_diffusers_version|torch_dtype|transformers_version|_name_or_path|Infinity|NaN", text)
    levels_exist(variant, raw["defaults"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_as_published(variant: str) -> None:
    expected = {**of(OTHERS, variant), ("unet" if "unet" in read(variant)["parts"] else "transformer"): DENOISERS[variant]}
    for part, count in expected.items():
        found = size(json.dumps(read(variant)["parts"][part], sort_keys=True))
        assert found == (pytest.approx(count, rel=5e-3) if isinstance(count, float) else count), part


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_fit_together(variant: str) -> None:
    parts, net = read(variant)["parts"], denoiser(variant)
    widths = [parts[f"text_encoder{i}"] for i in ("", "_2", "_3") if f"text_encoder{i}" in parts]
    hidden = [c.get("d_model") or c.get("hidden_size") or c["text_config"]["hidden_size"] for c in widths]
    words = net.get("cap_feat_dim") or net.get("caption_channels") or net.get("joint_attention_dim") or net["cross_attention_dim"]
    # side by side (SDXL), three layers of one (FLUX.2), or the last one, beside which CLIP is pooled or padded (SD3, FLUX.1)
    assert words == (sum(hidden) if "unet" in parts else 3 * hidden[0] if variant.startswith("flux2") else hidden[-1])
    if variant.startswith(("sd3", "flux1")):
        assert net["pooled_projection_dim"] == sum(hidden[:-1])
    latent = parts["vae"].get("latent_channels") or parts["vae"]["z_dim"]
    packed = latent * (4 if variant.startswith(("flux", "qwen")) else 1)
    # masked picture and mask, or the picture alone; Fill's mask at full size is folded in 8 x 8 and packed 2 x 2
    beside = {"sd15-inpaint": 5, "sd21-inpaint": 5, "sdxl-inpaint": 5, "sd15-instruct": 4, "flux1-fill": 64 + 256}
    assert net["in_channels"] == packed + beside.get(variant, 0)


def test_long_rotary_bases_survive_the_library() -> None:
    """The published files write rope_theta in the old place; a library that ignored it would give other states in silence."""
    from transformers import Mistral3Config, Qwen2_5_VLConfig, Qwen3Config

    mistral = Mistral3Config(**read("flux2-dev")["parts"]["text_encoder"])
    assert (mistral.text_config.rope_parameters["rope_theta"], mistral.vision_config.rope_parameters["rope_theta"]) == (1e9, 1e4)
    assert Qwen3Config(**read("zimage")["parts"]["text_encoder"]).rope_parameters["rope_theta"] == 1e6
    qwen = Qwen2_5_VLConfig(**read("qwenimage")["parts"]["text_encoder"]).text_config.rope_parameters
    assert (qwen["rope_theta"], qwen["mrope_section"]) == (1e6, [16, 24, 24])


CARD_FILES = sorted(path.name for path in CARDS.glob("*.toml"))


def test_every_variant_but_the_second_inpainting_has_a_card() -> None:
    named = {tomllib.loads((CARDS / name).read_text("utf-8"))["variant"] for name in CARD_FILES}
    assert named == set(VARIANTS) - {"sd21-inpaint"}  # its repository was withdrawn, and no copy is known to be kept


@pytest.mark.parametrize("name", CARD_FILES)
def test_card(name: str) -> None:
    card = tomllib.loads((CARDS / name).read_text("utf-8"))
    assert set(card) - {"defaults"} == {"name", "family", "variant", "repo", "summary", "licence"}
    assert f"{card['name']}.toml" == name and card["family"] in FAMILIES and all(card[key] for key in ("summary", "licence"))
    assert of({family: family for family in FAMILIES}, card["variant"]) == card["family"]
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", card["repo"])
    levels_exist(card["variant"], {**read(card["variant"])["defaults"], **card.get("defaults", {})})
