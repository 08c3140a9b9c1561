"""Headers of published checkpoints without their data: names, dtypes and shapes, from the configs in `pipelines/configs`. Run it to make them anew:

    python tests/headers/make.py [variant ...]

<variant>.json.gz is the original single file with the parts that its makers put in it, <variant>.diffusers.json.gz the denoiser of a
diffusers folder, parts/<name>.json.gz a part that is published alone. Each holds {"tensors": {name: [dtype, shape]}, "metadata": {...}}.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from layouts import LAYOUTS, to_original  # noqa: E402

HERE = Path(__file__).parent
CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32"}
CONFIGS = {path.stem: path for path in (Path(str(resources.files("latentgen.pipelines"))) / "configs").glob("*.json")}
HALVES = {"sd15": torch.float32, "sd21": torch.float32, "sdxl": torch.float16, "sd3": torch.float16, "pixart": torch.float32}  # the rest: bfloat16
ALONE = {"flux1", "flux2", "zimage", "qwenimage"}  # the denoiser is a file of its own, without a prefix
PARTS = {  # name -> (variant, part, kind): published alone and bare
    "vae-sd": ("sd15", "vae", "ldm_vae"), "vae-sdxl": ("sdxl", "vae", "ldm_vae"), "vae-flux1": ("flux1-dev", "vae", "ldm_vae"),
    "vae-flux2": ("flux2-dev", "vae", "ldm_vae_inside"), "vae-qwenimage": ("qwenimage", "vae", "video_vae"),
    "clip-l": ("flux1-dev", "text_encoder", "clip"), "clip-g": ("sd3-medium", "text_encoder_2", "clip"),
    "t5xxl": ("flux1-dev", "text_encoder_2", "t5"),
}
SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def family_of(variant: str) -> str:
    """The key of LAYOUTS (and of HALVES) for a variant."""
    names = {"sdxl-refiner": "sdxl-refiner", "sd3-medium": "sd3", "sd35-medium": "sd3", "sd35-large": "sd3", "zimage-turbo": "zimage"}
    return names.get(variant, variant.split("-")[0])


def module_state(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of the module that a config.json describes, on the meta device."""
    import diffusers
    import transformers

    with torch.device("meta"):
        if "_class_name" in config:
            return getattr(diffusers, config["_class_name"]).from_config(dict(config)).state_dict()
        cls = getattr(transformers, config["architectures"][0])
        return cls(cls.config_class(**config)).state_dict()


def original(variant: str, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The single file that the makers of this variant published, {} where no original layout is known."""
    family = family_of(variant)
    out: dict[str, Tensor] = {}
    for name, (kind, prefix) in LAYOUTS.get(family, {}).items():
        denoiser = name in ("unet", "transformer")
        inside = denoiser or (family not in ALONE and (not variant.startswith("sd35") or name == "vae"))
        if inside and name in parts:
            out |= to_original(kind, module_state(parts[name]), parts[name], prefix="" if family in ALONE else prefix)
    if family in ("sd15", "sd21"):
        out |= {name: torch.empty(1000, device="meta") for name in SCHEDULE}
        out |= {"model_ema.decay": torch.empty((), device="meta"), "model_ema.num_updates": torch.empty((), dtype=torch.int32, device="meta")}
    return out


def save(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write one header; the same input gives the same bytes."""
    kept = {}
    for key, tensor in tensors.items():
        single = tensor.dtype != torch.float32 or key in SCHEDULE  # integers, and what is never halved
        kept[key] = [CODES[tensor.dtype if single else dtype], list(tensor.shape)]
    text = json.dumps({"tensors": kept, "metadata": {"format": "pt"}}, sort_keys=True, separators=(",", ":"))
    path = HERE / f"{name}.json.gz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def make(variant: str) -> None:
    """Both layouts of one variant."""
    parts = json.loads(CONFIGS[variant].read_text("utf-8"))["parts"]
    dtype = HALVES.get(family_of(variant).split("-")[0], torch.bfloat16)
    denoiser = "unet" if "unet" in parts else "transformer"
    save(f"{variant}.diffusers", module_state(parts[denoiser]), dtype)
    if tensors := original(variant, parts):
        save(variant, tensors, dtype)


if __name__ == "__main__":
    for wanted in sys.argv[1:] or sorted(CONFIGS):
        make(wanted)
    for name, (variant, part, kind) in PARTS.items() if not sys.argv[1:] else ():
        config = json.loads(CONFIGS[variant].read_text("utf-8"))["parts"][part]
        dtype = torch.float16 if part.startswith("text_encoder") else HALVES.get(family_of(variant), torch.bfloat16)
        save(f"parts/{name}", to_original(kind, module_state(config), config), dtype)
