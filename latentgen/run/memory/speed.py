"""How fast this machine does each kind of work, measured once and kept: two seconds of what networks are made of. Knows tensors and layers; no plan.

What is measured is what is run: packed layers and blocked attention where networks are made fast, torch's own operators beside them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, scaled_dot_product_attention, silu

from latentgen.models.fast import onednn
from latentgen.models.fast.attention import attend
from latentgen.models.fast.layers import pack
from latentgen.models.fast.swap import prepare
from latentgen.run.kept import device_name, once
from latentgen.run.memory.ledger import KINDS, NEAR, Ledger

log = logging.getLogger(__name__)
NAME = "speed"
ENOUGH = 0.1  # seconds that one measurement takes
VERSION = 2  # of how it is measured: what another one kept is not used
SAMPLE = 2e-3  # seconds of work between two looks at the clock
HEADS = 4  # in which attention is measured
MOST = 1e15  # a second: what takes no time that can be seen


def speeds(device: torch.device, dtype: torch.dtype) -> Mapping[str, float]:
    """How much a second by kind of `ledger.KINDS`, and bytes a second that come to the device under "copy"; as kept, else measured now."""
    key = f"{device_name(device)} {dtype} torch {torch.__version__} {torch.get_num_threads()} threads, measured in way {VERSION}"
    rates, unkept = once(NAME, key, measure=lambda: measured(device, dtype),
                         valid=lambda found: all(isinstance(found.get(kind), (int, float)) and found[kind] > 0 for kind in (*KINDS, "copy")))
    if unkept:
        log.info("speeds are measured again the next time: %s", unkept)
    return rates


def measured(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The best of some repetitions of each kind, at sizes of a usual network's layers."""
    with torch.no_grad():
        rates = _products(device, dtype, packed=False) | _moving(device, dtype)
        rates |= _attention(device, dtype, scaled_dot_product_attention, "attention", side=32)
        if device.type == "cpu" and dtype == torch.bfloat16 and onednn.available():
            rates |= _products(device, dtype, packed=True) | _attention(device, dtype, attend, "blocked attention", side=256)
        for kind in KINDS[:-1]:  # where nothing is packed, a plan asks for none of it
            rates.setdefault(kind, rates[kind.replace("packed ", "").replace("blocked ", "")])
        return rates | {"operators": _operators(device, dtype, rates)}


def _products(device: torch.device, dtype: torch.dtype, *, packed: bool) -> dict[str, float]:
    """Operations a second of linears and convolutions, calls a second of one that has nothing to do, and bytes a second of weights that no cache
    holds."""
    def ready(layer: nn.Module) -> nn.Module:
        layer = layer.to(device=device, dtype=dtype, memory_format=torch.channels_last)
        if packed:
            pack(layer)
        return layer

    x, picture = (torch.ones(*shape, device=device, dtype=dtype) for shape in ((1024, 640), (1, 256, 64, 64)))
    picture = picture.contiguous(memory_format=torch.channels_last)
    linear, convolution, small = ready(nn.Linear(640, 1280)), ready(nn.Conv2d(256, 256, 3, padding=1)), ready(nn.Linear(8, 8))
    many, few = [ready(nn.Linear(640, 640)) for _ in range(64)], torch.ones(64, 640, device=device, dtype=dtype)
    called = 1 / _rate(lambda: small(x[:1, :8]), 1.0, device)
    product, convolved = (max(took - called, took / 10)
                          for took in (1 / _rate(lambda: linear(x), 1.0, device), 1 / _rate(lambda: convolution(picture), 1.0, device)))
    same, others = (1 / _rate(lambda some=some: [each(few) for each in some], 1.0, device) for some in (many[:1] * len(many), many))
    read = len(many) * 640 * 640 * dtype.itemsize
    name = "packed " if packed else ""
    return {f"{name}products": 1 / called, f"{name}matmul": 2 * 1024 * 640 * 1280 / product, "weights": read / max(others - same, read / MOST),
            f"{name}conv": 2 * 64 * 64 * 256 * 256 * 9 / convolved}


def _attention(device: torch.device, dtype: torch.dtype, way: Callable[[Tensor, Tensor, Tensor], Tensor], name: str, *,
               side: int) -> dict[str, float]:
    """Operations, scores and heads a second, of three sizes: few tokens, many, and many of many channels.

    Args:
        side: the few.
    """
    took = []
    for tokens, channels in ((side, 32), (1024, 32), (1024, 256)):
        q = torch.ones(1, tokens, HEADS, channels, device=device, dtype=dtype).transpose(1, 2)
        took.append(1 / _rate(lambda q=q: way(q, q, q), 1.0, device) / HEADS)
    each = max((took[2] - took[1]) / (4.0 * 1024**2 * (256 - 32)), 1 / MOST)  # seconds of an operation
    score = max((took[1] - took[0]) / (1024**2 - side**2) - 4 * 32 * each, 1 / MOST)
    head = max(took[0] - side**2 * (score + 4 * 32 * each), 1 / MOST)
    return {name: 1 / each, f"{name} scores": 1 / score, f"{name} heads": 1 / head}


def _moving(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second of what norms, activations and sums do, within a cache and beyond it, and of what comes to the device."""
    rates = {}
    for name, size in (("near", NEAR // 16), ("far", 2 * NEAR)):
        side = int((size / 128 / dtype.itemsize)**0.5)
        x = torch.ones(1, 128, side, side, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        rates[name] = _rate(lambda x=x: group_norm(silu(x) + x, 32), 7 * x.numel() * x.element_size(), device)
    here, there = (torch.zeros(2**25, dtype=torch.uint8, device=place) for place in (torch.device("cpu"), device))
    return rates | {"copy": _rate(lambda: there.copy_(here), 2**25, device)}


def _operators(device: torch.device, dtype: torch.dtype, rates: Mapping[str, float]) -> float:
    """Operators a second that are no products, with the code around them: of a small block, what its other work, seen on paper, does not tell."""
    from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2DCrossAttn

    def called(place: torch.device) -> Callable[[], Any]:
        with place:
            block = UNetMidBlock2DCrossAttn(96, 384, num_attention_heads=8, cross_attention_dim=320, use_linear_projection=True).to(dtype).eval()
            x, level, words = (torch.ones(*shape, dtype=dtype) for shape in ((2, 96, 8, 8), (2, 384), (2, 32, 320)))
        block, x = prepare(block, speed="exact", device=device), x.contiguous(memory_format=torch.channels_last)
        return lambda: block(x, level, words)

    paper = called(torch.device("meta"))
    with Ledger(paper=True) as ledger:
        paper()
    took = 1 / _rate(called(device), 1.0, device)
    rest = took - sum(number / rates[kind] for kind, number in ledger.work.items() if kind != "operators")
    return ledger.work["operators"] / max(rest, took / 10)


def _rate(work: Callable[[], Any], amount: float, device: torch.device) -> float:
    """Of an amount of work, how much is done in a second: the best of several samples. Of one thread its own time, which other programs do not
    lengthen."""
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def sample(times: int) -> float:
        began = clock()
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (clock() - began) / times

    sample(1)
    times = max(1, int(SAMPLE / max(sample(1), 1e-6)))
    best, spent = float("inf"), 0.0
    while spent <= ENOUGH:
        took = sample(times)
        best, spent = min(best, took), spent + max(took * times, SAMPLE)
    return amount / max(best, 1e-9)
