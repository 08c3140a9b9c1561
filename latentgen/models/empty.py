"""Modules made without numbers. Knows how torch makes and fills parameters; knows no file, and of modules nothing but that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MADE_BLANK = {torch.empty, torch.rand, torch.randn}  # what parameters are made by, and nothing that a module computes with
# and of tensors and of transformers likewise
FILLS = {"zero_", "fill_"} | {name for name in dir(torch.nn.init) if name.endswith("_") and not name.startswith("_")}


class Empty(TorchFunctionMode):
    """While it is entered, parameters are made on the meta device and not filled; what a module computes (rope tables, position ids) is real.

    Of this thread alone, and without a number drawn. Filling a tensor that has no numbers changes nothing, and yet takes most of the time that it
    takes to make a network.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MADE_BLANK and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        elif getattr(func, "__name__", None) in FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)
