"""What a plan is predicted to need, against what its run takes: every family by tensors' bytes, some by the memory of a whole process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from middling import MIDDLING
from tiny_folders import MAKERS, tiny

import latentgen
from latentgen.models.fast import attention, onednn
from latentgen.models.paper import paper_part
from latentgen.run.memory import rehearsal
from latentgen.run.memory.ledger import ARITHMETIC, Ledger
from latentgen.run.memory.rehearsal import rehearse
from latentgen.run.memory.workspace import on_cpu

# Stage -> predicted and measured bytes, of a whole process: its memory's high water above what it held when the stage began
WHOLE = """
import json, sys, torch, latentgen
from contextlib import contextmanager
from latentgen.run.memory.rehearsal import rehearse
torch.set_num_threads(1)
folder, width, height, said = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
pipe = latentgen.load(folder, device="cpu", progress=False, **said)
def now(key): return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
plan = lambda w, h: pipe.plan("a cat", steps=1, sampler="euler", seed=0, width=w, height=h)
predicted = rehearse(pipe.checkpoint, pipe.family, plan(width, height)).activations
pipe.stream(plan(width, height) if said["dtype"] == "bfloat16" else plan(64, 64)).result  # oneDNN keeps a kernel for each size of a packed layer
real, measured = pipe.residency, {}
class Watched:
    def __getattr__(self, name): return getattr(real, name)
    @contextmanager
    def use(self, stage, **options):
        with real.use(stage, **options) as modules:
            before = now("VmRSS")
            open("/proc/self/clear_refs", "w").write("5")
            yield modules
            measured[stage] = now("VmHWM") - before
pipe.residency = Watched()
pipe.stream(plan(width, height)).result
print(json.dumps({stage: (predicted[stage], took) for stage, took in measured.items()}))
"""


def whole_process(folder: Path, width: int, height: int, **said: Any) -> dict[str, tuple[int, int]]:
    quiet = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # what was freed goes back, so that it is not counted
    done = subprocess.run([sys.executable, "-c", WHOLE, str(folder), str(width), str(height), json.dumps(said)], capture_output=True, text=True,
                          env={**os.environ, **quiet}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])

class Watched:
    """A residency whose stages are read off a ledger of the tensors that really come and go."""

    def __init__(self, real: Any, ledger: Ledger) -> None:
        self.real, self.ledger, self.peaks = real, ledger, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    @contextmanager
    def use(self, stage: str, **options: Any) -> Iterator[dict[str, Any]]:
        with self.real.use(stage, **options) as modules:
            self.ledger.restart()
            yield modules
            self.peaks[stage] = max(self.peaks.get(stage, 0), self.ledger.peak)


@lru_cache
def opened(kind: str, place: Path, dtype: str = "float32") -> Any:
    folder = place / kind
    return latentgen.load(folder if folder.exists() else tiny(kind).save(folder), device="cpu", dtype=dtype, progress=False)


def measured(pipe: Any, plan: Any) -> tuple[dict[str, int], dict[str, float]]:
    """Stage -> peak bytes of tensors, and the work of a real run."""
    pipe.stream(plan).result  # noqa: B018 - so that the weights are there
    pipe._memo.clear()
    real = pipe.residency
    with Ledger(workspace=on_cpu) as ledger:
        pipe.residency = watched = Watched(real, ledger)
        try:
            pipe.stream(plan).result  # noqa: B018
        finally:
            pipe.residency = real
    return watched.peaks, ledger.work


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


@pytest.mark.parametrize("kind", MAKERS)
def test_on_paper_as_in_numbers(kind: str, place: Path) -> None:
    pipe = opened(kind, place)
    picture = Image.new("RGB", (128, 128), "teal")
    said = {"reference": picture} if pipe.family.task == "edit" else {"image": picture, "strength": 0.99}
    if pipe.family.guidance != "embedded" and pipe.family.defaults.guidance_scale != 1:
        said["negative_prompt"] = "blue"
    plan = pipe.plan("a red heart, flat", steps=2, sampler="euler", seed=0, **said)
    rehearsed = rehearse(pipe.checkpoint, pipe.family, plan)
    peaks, work = measured(pipe, plan)
    assert set(rehearsed.activations) == set(peaks)
    for stage, peak in peaks.items():
        assert rehearsed.activations[stage] == pytest.approx(peak, rel=0.03), stage
    for what in ARITHMETIC:
        assert sum(by.get(what, 0) for by in rehearsed.work.values()) == pytest.approx(work[what], rel=0.05), what


@pytest.mark.skipif(not onednn.available(), reason="this torch or processor has no packed bf16 products")
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ("sd15", "sd3", "pixart"))) for kind in MAKERS])
def test_packed_networks_on_paper_as_in_numbers(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = opened(kind, place, "bfloat16")
    said = {"reference": Image.new("RGB", (128, 128), "teal")} if pipe.family.task == "edit" else {"width": 128, "height": 128}
    plan = pipe.plan("a red heart, flat", steps=2, sampler="euler", seed=0, **said)
    first = rehearse(pipe.checkpoint, pipe.family, plan)
    monkeypatch.setattr(attention, "CALM", -1.0)  # numbers decide which of two ways a block takes: the one that takes more memory
    monkeypatch.setattr(rehearsal.PaperResidency, "weights", lambda self: 0)
    monkeypatch.setattr(rehearsal, "unused", lambda module: module)  # as in the second run of a process, which packs nothing any more
    for _ in range(2):
        for kept in (rehearsal._rehearsals, rehearsal._decodings):
            kept._kept.clear()
        rehearsed = rehearse(pipe.checkpoint, pipe.family, plan)
    peaks, work = measured(pipe, plan)
    assert sum(first.packed["vae"].values()) > 0
    step = 2 * 4 * prod(pipe.family.latent.shape(128, 128))  # what a run keeps of the step before, on paper not
    assert set(rehearsed.activations) == set(peaks) and work["packed matmul"] + work["packed conv"] > 0
    for stage, peak in peaks.items():
        assert rehearsed.activations[stage] == pytest.approx(peak, rel=0.03, abs=step), stage
    found = {what: sum(by.get(what, 0) for by in rehearsed.work.values()) for what in ARITHMETIC}
    found["matmul"] += found.pop("blocked attention")  # which in numbers is products of blocks
    assert found == pytest.approx({what: work[what] for what in found}, rel=0.05)


@pytest.mark.parametrize("said", [{"upscale": 2}, {"upscale": 2, "upscaler": "lanczos", "tile": 64}], ids=str)
def test_two_passes_and_windows_on_paper(place: Path, said: dict[str, Any]) -> None:
    pipe = opened("sd15", place)
    plan = pipe.plan("a red heart", steps=2, sampler="euler", seed=0, width=64, height=64, **said)
    rehearsed = rehearse(pipe.checkpoint, pipe.family, plan)
    peaks, work = measured(pipe, plan)
    assert rehearsed.activations == pytest.approx(peaks, rel=0.03)
    for what in ARITHMETIC:
        assert sum(by.get(what, 0) for by in rehearsed.work.values()) == pytest.approx(work[what], rel=0.05), what


def test_what_was_rehearsed_is_remembered_by_its_shapes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other words of the same length, another seed and more steps of the same kind change no memory; another size does."""
    pipe = opened("sd15", place)
    seen = []
    monkeypatch.setattr(rehearsal, "paper_part", lambda *args, **said: seen.append(args) or paper_part(*args, **said))
    said = {"steps": 3, "width": 64, "height": 64}
    first = rehearse(pipe.checkpoint, pipe.family, pipe.plan("a cat on a mat", seed=1, **said))
    loaded = len(seen)
    assert rehearse(pipe.checkpoint, pipe.family, pipe.plan("a dog on a rug", seed=2, **said)) == first and len(seen) == loaded
    larger = rehearse(pipe.checkpoint, pipe.family, pipe.plan("a cat on a mat", seed=1, **{**said, "width": 128}))
    assert larger.activations["decoder"] == pytest.approx(2 * first.activations["decoder"], rel=0.05)


def test_a_ledger_forgets_what_is_freed_and_what_was_there_before() -> None:
    before = torch.zeros(1000)
    with Ledger() as ledger:
        a = torch.zeros(500)
        b = before.view(10, 100)
        assert (ledger.live, ledger.peak) == (2000, 2000)
        c = a + before[:500]
        del a
        assert (ledger.live, ledger.peak) == (2000, 4000)
        ledger.restart()
        d = c[None] @ c[:, None] + b.sum()
        assert ledger.peak <= 2016 and ledger.work["matmul"] == 1000
    del c, d
    assert ledger.live == 0


def test_paper_takes_no_memory_and_keeps_numbers_that_decide() -> None:
    """A weight without numbers makes all that it meets paper; a mask beside it stays a mask."""
    weight = torch.empty(40_000, 40_000, device="meta")
    with Ledger(paper=True) as ledger:
        mask = torch.tensor([True, False]).to(weight.device)
        assert not bool(mask.all()) and bool(torch.isfinite(weight).all())
        out = torch.zeros(2, 40_000) @ weight
        assert out.device.type == "meta" and ledger.work["matmul"] == 2 * 2 * 40_000**2
        heads = out.view(1, 2, 8, 5000)
        assert torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).shape == heads.shape
        assert ledger.work["attention"] == 4 * 2 * 8 * 8 * 5000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the memory's high water is read from Linux")
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "sdxl")) for kind in MIDDLING])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_memory_of_a_whole_process(kind: str, dtype: str, tmp_path: Path) -> None:
    """Activations of 300 MB and more, so that the noise of the allocator is small beside them; half of that in bfloat16, where networks are packed."""
    found = whole_process(MIDDLING[kind]().save(tmp_path / kind), 1024, 1024, dtype=dtype)
    for stage in ("denoiser", "decoder"):
        predicted, measured = found[stage]
        assert measured > (150e6 if dtype == "float32" else 50e6) and predicted == pytest.approx(measured, rel=0.1), stage


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", MIDDLING)
def test_the_memory_of_a_gpu(kind: str, tmp_path: Path) -> None:
    """Stage by stage, weights and activations together, against what torch says it allocated. Never run on a machine without a GPU."""
    pipe = latentgen.load(MIDDLING[kind]().save(tmp_path / kind), device="cuda", dtype="bfloat16", progress=False)
    plan = pipe.plan("a cat", steps=2, sampler="euler", seed=0, width=1024, height=1024)
    before = torch.cuda.memory_allocated()
    pipe.stream(plan).result  # noqa: B018 - every part is there
    pipe._memo.clear()
    real, peaks = pipe.residency, {}

    class Allocated:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        @contextmanager
        def use(self, stage: str, **options: Any) -> Iterator[dict[str, Any]]:
            with real.use(stage, **options) as modules:
                torch.cuda.reset_peak_memory_stats()
                yield modules
                peaks[stage] = torch.cuda.max_memory_allocated() - before

    pipe.residency = Allocated()
    pipe.stream(plan).result  # noqa: B018
    for stage in ("denoiser", "decoder"):
        assert plan.memory.stages[stage].peak == pytest.approx(peaks[stage], rel=0.1), stage
