"""What this machine could do at best: the time that its fastest bf16 matrix products would take for the arithmetic of a request. Knows the clock and
plans."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from latentgen.run.memory.ledger import ARITHMETIC
from latentgen.run.memory.rehearsal import rehearse

if TYPE_CHECKING:
    import torch

    from latentgen.run.pipeline import Pipeline
    from latentgen.run.plan import Plan

SIZES = ((2048, 2048, 2048), (8192, 320, 320), (4096, 1280, 1280), (2048, 2560, 640))  # large ones, and those of U-Nets
LARGE = ((8192, 8192, 8192), (16384, 4096, 4096), (4096, 12288, 3072))  # for a GPU, which smaller ones do not fill
COPIED = 2**31  # bytes
TRIES = 5


def flops(pipe: Pipeline, plan: Plan) -> float:
    """Floating-point operations of a plan, all stages, counted on paper for the plain networks: a product and a sum are two."""
    work = rehearse(pipe.checkpoint, pipe.family, replace(plan, speed="plain")).work
    return float(sum(kinds[kind] for kinds in work.values() for kind in ARITHMETIC))


def matrix_speed(device: torch.device | None = None) -> float:
    """Floating-point operations a second of the fastest bf16 matrix product among some shapes, torch's own call, with torch's threads as they are.

    Args:
        device: None for the CPU. The random numbers of a GPU's products make it draw the power that a network's do; zeros would run faster.
    """
    import torch

    best, dice = 0.0, torch.Generator().manual_seed(0)
    for rows, inner, columns in SIZES if device is None or device.type == "cpu" else LARGE:
        a, b = (torch.randn(*shape, generator=dice).to(device, torch.bfloat16) for shape in ((rows, inner), (inner, columns)))
        best = max(best, 2 * rows * inner * columns / _seconds(lambda a=a, b=b: torch.mm(a, b), device))
    return best


def bandwidth(device: torch.device) -> float:
    """Bytes a second at which a device reads and writes its own memory, the best of some copies: both ways are counted."""
    import torch

    here = torch.zeros(COPIED if device.type == "cuda" else COPIED // 16, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    return 2 * len(here) / _seconds(lambda: there.copy_(here), device)


def _seconds(call: Callable[[], Any], device: torch.device | None) -> float:
    """Of the fastest of some calls."""
    import torch

    best = math.inf
    for _ in range(TRIES):
        began = time.perf_counter()
        call()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best
