"""What this machine could do at best: the time that its fastest bf16 matrix products would take for the arithmetic of a request. Knows the clock and
plans."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from latentgen.run.rehearsal import rehearse

if TYPE_CHECKING:
    from latentgen.run.pipeline import Pipeline
    from latentgen.run.plan import Plan

SIZES = ((2048, 2048, 2048), (8192, 320, 320), (4096, 1280, 1280), (2048, 2560, 640))  # large ones, and those of U-Nets
TRIES = 5


def flops(pipe: Pipeline, plan: Plan) -> float:
    """Floating-point operations of a plan, all stages, counted on paper for the plain networks: a product and a sum are two."""
    return float(sum(sum(kinds.values()) for kinds in rehearse(pipe.checkpoint, pipe.family, plan).flops.values()))


def matrix_speed() -> float:
    """Floating-point operations a second of the fastest bf16 matrix product among some shapes, torch's own call, with torch's threads as they are."""
    import torch

    best = 0.0
    for rows, inner, columns in SIZES:
        a, b = (torch.ones(*shape, dtype=torch.bfloat16) for shape in ((rows, inner), (inner, columns)))
        for _ in range(TRIES):
            began = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - began))
    return best
