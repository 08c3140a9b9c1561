"""How fast this machine computes, measured once and kept: a second of matrix products, convolutions and attention. Knows tensors; no model and no
plan."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import conv2d, scaled_dot_product_attention

from latentgen.errors import OutputError
from latentgen.run.kept import keep, read_kept

log = logging.getLogger(__name__)
NAME = "speed"
ENOUGH = 0.1  # seconds that one kind is measured
KINDS = ("matmul", "conv", "attention", "copy")


def speeds(device: torch.device, dtype: torch.dtype) -> Mapping[str, float]:
    """Operations a second by kind, and bytes a second under "copy"; as kept, else measured now."""
    key = f"{_name(device)} {dtype} torch {torch.__version__} {torch.get_num_threads()} threads"
    found = read_kept(NAME).get(key)
    if isinstance(found, dict) and all(isinstance(found.get(kind), (int, float)) and found[kind] > 0 for kind in KINDS):
        return found
    made = measured(device, dtype)
    try:
        keep(NAME, key, made)
    except OutputError as error:
        log.info("speeds are measured again the next time: %s", error)
    return made


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def measured(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The best of some repetitions of each kind, at sizes of a usual network's layers."""
    x, w = (torch.zeros(1024, 1280, device=device, dtype=dtype) for _ in range(2))
    picture = torch.zeros(1, 256, 64, 64, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    kernel = torch.zeros(256, 256, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    heads = torch.zeros(1, 8, 1024, 64, device=device, dtype=dtype)
    here, there = (torch.zeros(2**25, dtype=torch.uint8, device=place) for place in (torch.device("cpu"), device))
    with torch.no_grad():
        rates = {"matmul": _rate(lambda: x @ w.T, 2 * 1024 * 1024 * 1280, device),
                 "conv": _rate(lambda: conv2d(picture, kernel, padding=1), 2 * 64 * 64 * 256 * 256 * 9, device),
                 "attention": _rate(lambda: scaled_dot_product_attention(heads, heads, heads), 4 * 8 * 1024 * 1024 * 64, device),
                 "copy": _rate(lambda: there.copy_(here), 2**25, device)}
    return rates


def _rate(work: Callable[[], Any], amount: float, device: torch.device) -> float:
    """Of an amount of work, how much is done in a second."""
    def done() -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    done()
    best, spent = done(), 0.0
    while spent < ENOUGH:
        took = done()
        best, spent = min(best, took), spent + took
    return amount / max(best, 1e-9)
