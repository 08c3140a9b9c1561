"""The table of attention kernels of a pipeline: as it was said, or measured once on this device and kept.
Knows kernels by name; no model and no plan.

A measured table is kept with the names of the device and of the versions of torch and cuDNN, and recipes hold it: the clock decides once, never in a
run. Where it cannot be kept it is not used, for the next process would measure another.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from latentgen.errors import RequestError
from latentgen.models.fast.kernels import HEADS, KERNELS, LONG, Table, kinds, takes
from latentgen.run.kept import device_name, once

log = logging.getLogger(__name__)
NAME = "attention"
MEASURED = "measured"
PICTURE, WORDS, HEADS_AT_ONCE = 4096, 128, 16  # tokens of a usual picture and of words, and heads, at which kernels are measured
TRIES, WARM = 10, 3
BETTER = 0.95  # of the time of PyTorch's own choice, which a kernel must stay below to be preferred


def attention_of(said: str | Table | None, device: torch.device, dtype: torch.dtype, *, alone: bool) -> dict[str, str]:
    """Kind of shapes -> kernel, {} for PyTorch's own choice.

    Args:
        said: None, a kernel's name for all kinds, "measured", or a table as recipes hold it.
        alone: networks are not compiled, and no other process shares their tokens.

    Raises:
        RequestError: an unknown name or kind, or a device that has one kernel only.
    """
    if said is None:
        return {}
    table = {kind: said for kind in kinds()} if isinstance(said, str) else said
    names = (*KERNELS, MEASURED)
    if not isinstance(table, Mapping) or not all(kind in kinds() for kind in table) or not all(name in names for name in table.values()):
        raise RequestError(f"attention is {said!r:.100}: expected {', '.join(map(repr, names))}, or a table of {', '.join(kinds())}")
    if device.type != "cuda":
        raise RequestError(f"attention is given, which chooses among the kernels of a CUDA device, and this is for {device.type}: leave it out")
    if not alone:
        raise RequestError("attention is given with compile or parallel='context', which choose for themselves: leave it or those out")
    return measured(device, dtype) if said == MEASURED else dict(table)


def measured(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The fastest kernel of each kind on this device, as kept, else measured now (a second or two)."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    key = f"{device_name(device)} {dtype} torch {torch.__version__} cudnn {cudnn}"
    table, unkept = once(NAME, key, measure=lambda: fastest(device, dtype),
                         valid=lambda found: all(kind in kinds() and kernel in KERNELS for kind, kernel in found.items()))
    if unkept:
        log.warning("PyTorch chooses the attention kernels, for what was measured cannot be kept: %s", unkept)
        return {}
    return table


def fastest(device: torch.device, dtype: torch.dtype, *, seconds: Callable[..., float] | None = None) -> dict[str, str]:
    """Kind -> the kernel that took least of PICTURE tokens; kinds in which PyTorch's own choice is about as fast are left out.

    Args:
        seconds: (what is called, device) -> seconds of one call; None asks the clock.
    """
    seconds, table = seconds or _seconds, {}
    for kind in kinds():
        width, length = kind.split()
        heads, keys = max(1, HEADS_AT_ONCE * HEADS[0] // int(width)), PICTURE if length == "long" else min(WORDS, LONG - 1)
        q, k = (torch.ones(1, heads, count, int(width), device=device, dtype=dtype) for count in (PICTURE, keys))
        own = seconds(lambda q=q, k=k: torch.nn.functional.scaled_dot_product_attention(q, k, k), device)
        taken: dict[str, float] = {}
        for name, kernel in KERNELS.items():
            if not takes(name, q, k, k):
                continue
            try:
                taken[name] = seconds(lambda q=q, k=k, kernel=kernel: kernel(q, k, k, None), device)
            except (RuntimeError, NotImplementedError) as error:  # this device, or this build of torch, does not have it
                log.info("no attention kernel %s here: %s", name, str(error).splitlines()[0])
        best = min(taken, key=lambda name: taken[name], default=None)
        if best is not None and taken[best] < BETTER * own:
            table[kind] = best
    return table


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The best of some calls."""
    best = float("inf")
    with torch.no_grad():
        for n in range(WARM + TRIES):
            began = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began) if n >= WARM else best
    return best
