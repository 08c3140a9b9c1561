"""Networks compiled by torch.compile, by region: the blocks that repeat, each once for all. Knows diffusers' networks; knows no request.

The compiler fuses what it can by itself, so a compiled network keeps its plain weights and blocks. What it compiled is kept on disk by torch
(TORCHINDUCTOR_CACHE_DIR), so that a second process starts sooner.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING


from latentgen.errors import RequestError

if TYPE_CHECKING:
    from torch import nn


def compiled(module: nn.Module) -> nn.Module:
    """The network itself, its repeated blocks compiled when they are first called; one that says none of its blocks repeat is compiled whole.

    Raises:
        RequestError: torch.compile cannot run here.
    """
    weight = next(module.parameters())
    if weight.device.type == "cpu" and not any(map(shutil.which, ("cc", "gcc", "clang", "g++", "cl"))):
        raise RequestError("compile=True needs a C++ compiler for a network on the CPU, and none is here: install one (gcc or clang), "
                           "or leave it out")
    if getattr(module, "_repeated_blocks", None):
        module.compile_repeated_blocks()
    else:
        module.compile()
    return module
