"""Modules on paper: a part as loading gives it, with shapes, dtypes and memory formats and no byte of its weights. Knows headers and configs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from latentgen.models.form import as_kept, kept_precise
from latentgen.models.load import empty_module
from latentgen.models.quantise import hold

if TYPE_CHECKING:
    from torch import nn

    from latentgen.models.family import Part
    from latentgen.models.load import Source


def paper_part(source: Source, part: Part, dtype: torch.dtype, *, quantise: bool = False) -> nn.Module:
    """The part as `load_part` gives it, with weights on the meta device: shapes, dtypes and memory formats without a byte of them.

    Args:
        quantise: with the linears of blocks in 8 bits.

    Raises:
        ModelError: an unknown class, or a config that does not fit it.
    """
    module = empty_module(source, part)
    keep = kept_precise(module, dtype)
    images = part.cls.startswith("diffusers.")
    state = {name: as_kept(torch.empty(t.shape, dtype=t.dtype, device="meta"), dtype, keep=any(k in name.split(".") for k in keep), images=images)
             if t.is_floating_point() else t for name, t in module.state_dict().items()}
    module.load_state_dict(state, strict=True, assign=True)
    if quantise:
        hold(module)
    return module.eval().requires_grad_(False)
