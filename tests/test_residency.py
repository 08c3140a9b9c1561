"""Where weights are: pictures do not depend on it, memory does, and threads may share what is streamed."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from middling import DEEP
from PIL import Image
from tiny_folders import MAKERS, tiny
from torch import nn

import latentgen
from latentgen.models.streamed import Lane, Streamed, blocks, filled
from latentgen.run.residency import POLICIES


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


@lru_cache
def folder(kind: str, place: Path) -> Path:
    return tiny(kind).save(place / kind)


def made(pipe: Any, seed: int = 0) -> torch.Tensor:
    said = {"reference": Image.new("RGB", (64, 64), "teal")} if pipe.family.task == "edit" else {}
    return pipe.stream("a red heart, flat", steps=2, seed=seed, width=64, height=64, **said).result.latents


EACH = [pytest.param(kind, dtype, marks=[pytest.mark.slow] * (dtype == "bfloat16" and kind not in ("sdxl", "flux2"))) for kind in MAKERS
        for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize("kind, dtype", EACH)
def test_every_policy_makes_the_same_bits(kind: str, dtype: str, place: Path) -> None:
    latents = {}
    for policy in POLICIES:
        pipe = latentgen.load(folder(kind, place), device="cpu", dtype=dtype, residency=policy, speed="plain", progress=False)
        latents[policy] = made(pipe)
        held = pipe.residency.resident_bytes()
        assert held == 0 if policy != "resident" else held > 0
    for policy in POLICIES[1:]:
        assert torch.equal(latents[policy], latents["resident"]), policy


def test_a_policy_for_one_use_takes_away_what_another_left(place: Path) -> None:
    pipe = latentgen.load(folder("flux1", place), device="cpu", dtype="float32", progress=False)
    made(pipe)
    held = pipe.residency.resident_bytes()
    with pipe.residency.use("denoiser", policy="disk") as modules:
        assert 0 < pipe.residency.resident_bytes() < held / 10
        assert any(isinstance(module, Streamed) for module in modules["transformer"].modules())
    assert pipe.residency.resident_bytes() == 0
    pipe._memo.clear()
    made(pipe)
    assert pipe.residency.resident_bytes() == held
    pipe.residency.clear()
    assert pipe.residency.resident_bytes() == 0


def test_threads_share_streamed_blocks(place: Path) -> None:
    pipe = latentgen.load(folder("sd3", place), device="cpu", dtype="float32", residency="disk", progress=False)
    alone = [made(pipe, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: made(pipe, seed), range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_which_blocks_are_read_one_by_one() -> None:
    def layers(count: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 64)) for _ in range(count))

    net = nn.ModuleDict({"first": nn.Linear(8, 16), "layers": layers(2), "middle": nn.ModuleDict({"inner": layers(1)}), "last": nn.Linear(16, 8)})
    assert blocks(net) == ("layers.0", "layers.1", "middle.inner.0")
    small = 4 * (16 * 16 + 16)  # of the first linear of a layer: the layer is larger, and so is its second linear, which has no children
    assert blocks(net, largest=small) == ("layers.0.0", "layers.0.2", "layers.1.0", "layers.1.2", "middle.inner.0.0", "middle.inner.0.2")


def test_filling_a_tree_changes_nothing_of_it() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    weight, mean = torch.eye(4), torch.full((4,), 2.0)
    numbers = {id(net[0].weight): weight, id(net[0].bias): torch.zeros(4), id(net[1].running_mean): mean, id(net[1].running_var): torch.ones(4),
               id(net[1].weight): torch.ones(4), id(net[1].bias): torch.zeros(4)}
    x = torch.arange(8.0).reshape(2, 4)
    assert torch.allclose(filled(net, numbers)(x), x - 2, atol=1e-4)
    assert all(t.is_meta for t in (*net.parameters(), net[1].running_mean))


def test_a_view_goes_with_its_last_user() -> None:
    """Without the collector of cycles: it may hold a block's numbers."""
    net, numbers = nn.Sequential(nn.Linear(4, 4)), torch.eye(4)
    gc.disable()
    try:
        copy = filled(net, {id(net[0].weight): numbers})
        gone = weakref.ref(copy)
        del copy
        assert gone() is None
    finally:
        gc.enable()


WHOLE = """
import json, sys, torch, latentgen
torch.set_num_threads(1)
pipe = latentgen.load(sys.argv[1], device="cpu", dtype=sys.argv[3], residency=sys.argv[2], progress=False)
import diffusers.models, transformers
for part in pipe.family.parts: latentgen.models.load.part_class(part.cls)
def now(key): return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
before = now("VmRSS")
pipe.stream("a cat", steps=1, seed=0, width=64, height=64).result
print(json.dumps([now("VmHWM") - before, pipe.checkpoint.weight_bytes("denoiser")]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory's high water is read from Linux")
@pytest.mark.parametrize("dtype", [pytest.param("float32"), pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_process_really_holds_less(dtype: str, tmp_path: Path) -> None:
    """Weights as they are stored stay in the file's pages; those in another dtype are copies. Either way one block at a time."""
    place = DEEP().save(tmp_path / "deep")
    quiet = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

    def took(policy: str) -> tuple[int, int]:
        done = subprocess.run([sys.executable, "-c", WHOLE, str(place), policy, dtype], capture_output=True, text=True, env={**os.environ, **quiet},
                              timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    (resident, weights), (streamed, _) = took("resident"), took("disk")
    held = weights * (0.5 if dtype == "bfloat16" else 1)
    assert resident > 0.95 * held and streamed < 0.45 * held
