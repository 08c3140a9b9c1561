"""Files to modules. Knows safetensors, configs and a fixed list of classes; knows no request and moves nothing between devices.

Weights are memory-mapped and assigned to a module built on the meta device, so a part costs its weights once. Nothing from a folder is
executed: the class comes from the family's declaration, the config gives numbers only, and only safetensors are read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from functools import lru_cache
from importlib import import_module
from inspect import signature
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from latentgen.errors import ModelError
from latentgen.models.family import Part

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)
CLASSES = {  # declared name -> where it lives; nothing else is ever instantiated
    "diffusers.UNet2DConditionModel": "diffusers.models.unets.unet_2d_condition",
    "diffusers.AutoencoderKL": "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.AutoencoderTiny": "diffusers.models.autoencoders.autoencoder_tiny",
    "transformers.CLIPTextModel": "transformers.models.clip.modeling_clip",
    "transformers.CLIPVisionModelWithProjection": "transformers.models.clip.modeling_clip",
    "transformers.CLIPTextModelWithProjection": "transformers.models.clip.modeling_clip",
}
MAX_HEADER = 64 * 2**20


def load_part(folder: Path, part: Part, dtype: torch.dtype) -> nn.Module:
    """Build a part from `folder/part.name` in eval mode, without gradients, on the CPU.

    Raises:
        ModelError: a file is missing, damaged, a pickle, or does not fit the class.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if part.cls not in CLASSES:
        raise ModelError(f"{part.cls!r} is not a class that parts may have: expected one of {', '.join(CLASSES)}")
    place = folder / part.name
    config, weights = part_config(place), weights_file(place)
    check_header(weights)
    library, name = part.cls.split(".")
    cls = getattr(import_module(CLASSES[part.cls]), name)
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder.name}/{part.name}/{weights.name} cannot be read ({error}): get it again") from error
    try:
        with torch.device("meta"):
            module = cls.from_config(_init_arguments(cls, config)) if library == "diffusers" else cls(cls.config_class(**config, attn_implementation="sdpa"))
    except Exception as error:
        raise ModelError(f"the config of {folder.name}/{part.name} does not fit {name}: {shorten(str(error), 200)}") from error
    try:
        module.load_state_dict({k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}, strict=True, assign=True)
    except RuntimeError as error:
        raise ModelError(f"the weights in {folder.name}/{part.name} do not fit its config: {shorten(str(error).splitlines()[1], 200)}") from error
    _restore_buffers(module)
    module.eval().requires_grad_(False)
    return module.to(memory_format=torch.channels_last) if library == "diffusers" else module


def _init_arguments(cls: type, config: dict[str, Any]) -> dict[str, Any]:
    """What of a diffusers config the class takes; the rest (written by other versions) is logged."""
    known = signature(cls.__init__).parameters
    if extra := [k for k in config if k not in known and not k.startswith("_")]:
        log.info("config keys that %s does not take: %s", cls.__name__, ", ".join(extra))
    return {k: v for k, v in config.items() if k in known}


def _restore_buffers(module: nn.Module) -> None:
    """Buffers that files do not carry (CLIP's position ids) are counted anew; any other left on meta is an error."""
    import torch

    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta and name == "position_ids":
                setattr(owner, name, torch.arange(buffer.shape[-1]).expand(buffer.shape).clone())
            elif buffer.is_meta:
                raise ModelError(f"the buffer {name!r} of {type(owner).__name__} is in no file: the checkpoint is incomplete")


def part_config(place: Path) -> dict[str, Any]:
    """The part's config.json, numbers and names only.

    Raises:
        ModelError: missing or not a JSON object.
    """
    try:
        config = json.loads((place / "config.json").read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{place.parent.name}/{place.name}/config.json cannot be read ({type(error).__name__}): the folder needs a diffusers layout") from error
    if not isinstance(config, dict) or "auto_map" in config:
        raise ModelError(f"{place.parent.name}/{place.name}/config.json is refused: expected a plain object that names no code")
    return config


def weights_file(place: Path) -> Path:
    """The one safetensors file of a part.

    Raises:
        ModelError: none there; a pickle in its place is named.
    """
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        if (place / name).is_file():
            return place / name
    pickles = [p.name for p in place.glob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".pth")]
    if pickles:
        raise ModelError(f"{place.parent.name}/{place.name} has only {pickles[0]}, a pickle, which can run code: convert it to safetensors")
    raise ModelError(f"{place.parent.name}/{place.name} has no weights: expected diffusion_pytorch_model.safetensors or model.safetensors")


def check_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, checked against the file's length before any tensor is read.

    Raises:
        ModelError: the file is cut short or is not safetensors.
    """
    where = f"{path.parent.name}/{path.name}"
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ModelError(f"{where} is not a safetensors file or is damaged at byte 0: get it again")
        try:
            header = json.loads(file.read(length))
            end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        except (ValueError, AttributeError, LookupError, TypeError):
            raise ModelError(f"{where} has a damaged header (bytes 8 to {8 + length}): get it again") from None
    if 8 + length + end > size:
        raise ModelError(f"{where} is cut short: {size:,} bytes of {8 + length + end:,}: get it again")
    return header


def weight_bytes(folder: Path, part: Part) -> int:
    """Bytes of a part's weights as stored, from the header alone."""
    header = check_header(weights_file(folder / part.name))
    return sum(v["data_offsets"][1] - v["data_offsets"][0] for k, v in header.items() if k != "__metadata__")


@lru_cache(maxsize=64)
def _digest(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(folder: Path, parts: tuple[Part, ...]) -> str:
    """One short hash over all weights of a checkpoint (sha256, 16 hex digits), computed once per file version."""
    whole = hashlib.sha256()
    for part in parts:
        path = weights_file(folder / part.name)
        stat = path.stat()
        whole.update(_digest(str(path), stat.st_size, stat.st_mtime_ns).encode())
    return whole.hexdigest()[:16]
