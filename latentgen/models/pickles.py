"""Pickled weight files (.ckpt, .bin, .pt, .pth), for a caller who asks for them by name. Knows torch's restricted unpickler; runs nothing from a
file.

Only tensors in plain containers are accepted (`torch.load(weights_only=True)`); anything else in the file ends the loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from latentgen.errors import ModelError
from latentgen.models.header import PICKLES, Header, TensorInfo, where

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
         "int64": "I64",
         "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}


def is_pickle(path: Path) -> bool:
    """Whether a file is one of these, by its name."""
    return path.suffix.lower() in PICKLES


def refuse_pickle(path: Path) -> None:
    """Raises ModelError for a file of this kind: the caller did not ask for it."""
    if is_pickle(path):
        raise ModelError(f"{where(path)} is a pickle, which can run code when it is opened: get it as .safetensors, or if you trust where it comes "
                         "from pass allow_pickle=True, which accepts tensors alone")


def pickle_header(path: Path) -> Header:
    """Names and shapes of its tensors, without their values.

    Raises:
        ModelError: not a file of tensors, or damaged.
    """
    tensors, at = {}, 0
    for name, tensor in pickle_tensors(path, device="meta").items():
        end = at + tensor.numel() * tensor.element_size()
        tensors[name] = TensorInfo(NAMES.get(str(tensor.dtype).removeprefix("torch."), str(tensor.dtype)), tuple(tensor.shape), at, end)
        at = end
    return Header(path, path.stat().st_size, tensors, {}, "safetensors")


def pickle_tensors(path: Path, *, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Its tensors, memory-mapped where the file allows that; a training checkpoint's `state_dict` is looked into.

    Raises:
        ModelError: see `pickle_header`.
    """
    import torch

    try:
        whole: Any = torch.load(path, map_location=device, weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # torch raises whatever the file made it meet
        raise ModelError(f"{where(path)} is refused: it holds more than tensors, "
                         f"or is damaged ({shorten(str(error), 120)}); get it as .safetensors") from None
    if isinstance(whole, Mapping) and isinstance(whole.get("state_dict"), Mapping):
        whole = whole["state_dict"]
    if not isinstance(whole, Mapping) or not any(isinstance(value, torch.Tensor) for value in whole.values()):
        raise ModelError(f"{where(path)} holds a {type(whole).__name__} without tensors: expected weights by name")
    return {str(name): value for name, value in whole.items() if isinstance(value, torch.Tensor)}


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"
