"""Modules on paper: a part as loading gives it and as it is made fast, with shapes, dtypes and memory formats and no byte of its weights.

Knows headers, configs and packed layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from latentgen.models.fast.swap import prepare, promised
from latentgen.models.form import Form, kept_precise
from latentgen.models.load import empty_module, tensors_on_paper
from latentgen.models.promised import Promised
from latentgen.models.quantise.held import hold
from latentgen.models.view import view

if TYPE_CHECKING:
    from torch import nn

    from latentgen.models.family import Part
    from latentgen.models.load import Source


def paper_part(source: Source, part: Part, dtype: torch.dtype, *, quantise: str | None = None, speed: str = "plain",
               device: torch.device | None = None) -> nn.Module:
    """The part as `load_part` and `prepare` give it, with weights on the meta device: shapes, dtypes and memory formats without a byte of them.

    Args:
        quantise: how the weights of linears are held.
        speed: "exact" makes it fast as it would be on the device; what torch.compile makes of it is not known.

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
    module = module.eval().requires_grad_(False)
    if speed != "exact" or device is None:
        return module
    for name in promised(module, speed=speed, device=device, dtype=dtype):
        owner, weight = module.get_submodule(name.rpartition(".")[0]), module.get_parameter(name).data
        owner.weight = Promised(weight, weight, ready=torch.empty_like, release=lambda stored: None)
    return prepare(module, speed=speed, device=device)


def unused(module: nn.Module) -> nn.Module:
    """A view of a part on paper whose packed weights are its own, and not yet made."""

    def renew(_: str, own: nn.Module) -> None:
        if (kernel := vars(own).get("kernel")) is not None:
            own.kernel = type(kernel)(kernel.plain)

    return view(module, renew)


def packed_bytes(module: nn.Module) -> dict[str, int]:
    """Name of a packed layer -> bytes of its weight, in as many orders as it was used in; nothing of those that were not."""
    return {name: each.kernel.bytes for name, each in module.named_modules() if "kernel" in vars(each) and each.kernel.bytes}
