"""A loaded network made fast in place. Knows modules; moves none between devices and knows no request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn


def prepare(module: nn.Module, *, speed: str, device: torch.device) -> nn.Module:
    """The network itself, made as fast as `speed` says on the device where it will run: "exact", "compiled", or "plain" for as it is
    (and "graphs", which captures calls of the network as it is, see `graphs`).

    Exact: on a CPU which multiplies bf16, the leaves and small blocks of diffusers' networks in bf16 are swapped; nothing changes but rounding. Every
    other network stays as it was loaded, in float32 bit for bit.
    """
    from latentgen.models.fast.whole import pack_whole

    pack_whole(module, device=device)
    weight = next(module.parameters(), None)
    if speed in ("plain", "graphs") or weight is None or not type(module).__module__.startswith("diffusers."):
        return module
    if speed == "compiled":
        from latentgen.models.fast.compiling import compiled

        return compiled(module)
    return swap(module) if _swaps(module, speed=speed, device=device, dtype=weight.dtype) else module


def promised(module: nn.Module, *, speed: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the weights that `prepare` will pack, of a network which will be in that dtype: they need not be made before they are used."""
    from latentgen.models.fast.layers import packable

    if not _swaps(module, speed=speed, device=device, dtype=dtype):
        return ()
    return tuple(f"{name}.weight" for name, child in module.named_modules() if packable(child))


def _swaps(module: nn.Module, *, speed: str, device: torch.device, dtype: torch.dtype) -> bool:
    from latentgen.models.fast import onednn

    diffusers = type(module).__module__.startswith("diffusers.")
    return diffusers and speed == "exact" and device.type == "cpu" and dtype == torch.bfloat16 and onednn.available()


def swap(module: nn.Module) -> nn.Module:
    """Swap every module that is of a kind known here, in place; each plain weight goes as soon as its packed one is there."""
    from torch import nn

    from latentgen.models.fast.blocks import BLOCKS, attending
    from latentgen.models.fast.layers import pack, packs

    fast = BLOCKS.get(type(module))
    if fast is not None and fast.fits(module):
        module.__class__ = fast
        module.prepared()
    elif hasattr(module, "processor") and hasattr(module, "set_processor"):
        module.set_processor(attending(module.processor))
    if packs(module):
        pack(module)
    for child in module.children():
        swap(child)
    return module


def undo(attention: nn.Module) -> None:
    """Let a view's own copy of an attention call torch's `scaled_dot_product_attention` again, for who listens to that call."""
    from latentgen.models.fast.blocks import BLOCKS

    attention.__class__ = next((plain for plain, fast in BLOCKS.items() if type(attention) is fast), type(attention))
    if (plain := getattr(getattr(attention, "processor", None), "plain", None)) is not None:
        attention.processor = plain


def held_bytes(module: nn.Module) -> int:
    """Bytes of all weights that a module holds, packed ones too."""
    kernels = (vars(m).get("kernel") for m in module.modules())
    plain = sum(p.numel() * p.element_size() for p in (*module.parameters(), *module.buffers()) if not p.is_meta)
    return plain + sum(kernel.bytes for kernel in kernels if kernel is not None)
