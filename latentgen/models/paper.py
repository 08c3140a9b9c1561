"""Modules on paper: a part as loading gives it, with shapes, dtypes and memory formats and no byte of its weights. Knows headers and configs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from latentgen.models.form import Form, kept_precise
from latentgen.models.load import empty_module, tensors_on_paper
from latentgen.models.quantise.held import hold

if TYPE_CHECKING:
    from torch import nn

    from latentgen.models.family import Part
    from latentgen.models.load import Source


def paper_part(source: Source, part: Part, dtype: torch.dtype, *, quantise: str | None = None) -> nn.Module:
    """The part as `load_part` gives it, with weights on the meta device: shapes, dtypes and memory formats without a byte of them.

    Args:
        quantise: how the weights of linears are held.

    Raises:
        ModelError: an unknown class, or a config that does not fit it.
    """
    module = empty_module(source, part)
    form = Form(source.label, dtype, kept_precise(module, dtype), images=part.cls.startswith("diffusers."))
    state = {name: form.kept(name, torch.empty(t.shape, dtype=t.dtype, device="meta")) if t.is_floating_point() else t
             for name, t in module.state_dict().items()}
    module.load_state_dict(state, strict=True, assign=True)
    if quantise is not None:
        hold(module, quantise, tensors_on_paper(source, part, module), form.dtype_of)
    return module.eval().requires_grad_(False)
