"""Plans for a memory: full-size checkpoints from headers alone, what is said about them, and that what they choose is what runs."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_full_size import Shelf
from tiny_folders import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import latentgen
from latentgen.cli import app
from latentgen.errors import RequestError
from latentgen.models.fast import attention, onednn
from latentgen.run.memory import budget as budget_module
from latentgen.run.memory import speed
from latentgen.run.memory.budget import fitted, memory_bytes
from latentgen.run.memory.forecast import Need, forecast
from latentgen.run.memory.ledger import KINDS
from latentgen.run.memory.speed import speeds
from latentgen.run.request import Request
from latentgen.run.residency import POLICIES

GB = 10**9


@pytest.fixture(autouse=True)
def own_config(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTGEN_CONFIG", str(tmp_path_factory.getbasetemp() / "config"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Any:
    shelf, made = Shelf(tmp_path_factory.mktemp("full")), {}

    def pipe(variant: str) -> Any:
        if variant not in made:
            file = shelf.file(variant)
            beside = shelf.beside(variant, latentgen.inspect(file).missing)
            made[variant] = latentgen.load(file, dtype="bfloat16", device="cpu", progress=False, **beside)
        return made[variant]

    return pipe


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return latentgen.load(tiny("sdxl").save(tmp_path_factory.mktemp("small") / "sdxl"), device="cpu", dtype="float32", progress=False)


FITS = {"flux1-dev": {36: "resident", 24: "stage", 16: "stream", 12: "stream", 8: "stream"}, "sdxl": {8: "resident", 6: "stage", 4: "stream"},
        "sd15": {3: "resident", 2: "stage"}}
EACH = [pytest.param(variant, size, marks=[pytest.mark.slow] * ((variant, size) in [("flux1-dev", 36), ("flux1-dev", 12), ("sdxl", 6)]))
        for variant, sizes in FITS.items() for size in sizes]


@pytest.mark.parametrize("variant, size", EACH)
def test_published_models_in_the_memory_of_usual_cards(full: Any, variant: str, size: int) -> None:
    plan = full(variant).plan("a cat", seed=0, memory=f"{size}GB")
    assert plan.residency == FITS[variant][size]
    assert max(need.peak for need in plan.memory.stages.values()) == plan.memory.peak <= size * GB
    assert set(plan.memory.seconds) == set(plan.memory.stages) == {"text", "denoiser", "decoder"}
    assert f"of {size} GB at most" in str(plan) and ("to fit" in str(plan)) == (plan.residency != "resident" or plan.request.vae_tile is not None)


def test_what_a_policy_holds_is_what_the_headers_say(full: Any) -> None:
    pipe = full("flux1-dev")
    resident, stage, stream = ([full("flux1-dev").plan("a cat", seed=0).memory] + [pipe.plan("a cat", seed=0, memory=size).memory for size in ("24GB", "8GB")])
    assert resident.stages["denoiser"].weights == pytest.approx(sum(part for part in (2 * 11_901_408_320, 9_524_621_312, 246_144_000, 167_640_000)), rel=0.01)
    modulation = 2 * (19 * 2 * (6 * 3072 * 3072 + 6 * 3072) + 38 * (3 * 3072 * 3072 + 3 * 3072) + 2 * 3072 * 3072 + 2 * 3072)
    assert stage.stages["denoiser"].weights == 2 * 11_901_408_320 - modulation
    assert stream.stages["denoiser"].weights < 0.06 * resident.stages["denoiser"].weights
    assert resident.flops == pytest.approx(50 * 74.4e12, rel=0.03)  # the physical size of FLUX.1 at 1024x1024, and its VAE


def test_what_cannot_fit_says_what_it_needs(full: Any) -> None:
    with pytest.raises(RequestError, match=r"memory is 0.3 GB but this needs at least [\d.]+ GB, for \w+ at 512x512 with residency 'stream': .*smaller"):
        full("sd15").plan("a cat", seed=0, memory="300MB")


def test_fewer_bits_where_they_are_allowed_and_needed(full: Any) -> None:
    """Where weights as they are would have to be streamed; never in place of what needs no streaming, and not without leave."""
    pipe = full("flux1-dev")
    auto = copy(pipe)
    auto._machine = replace(pipe._machine, ways=(None, "int8", "int4"))
    assert pipe.plan("a cat", seed=0, memory="16GB").quantise is None
    rates = dict.fromkeys(speeds(torch.device("cpu"), torch.bfloat16), 1e12) | {"copy": 1e9}
    foresee = partial(forecast, auto.checkpoint, auto.family, speeds=rates)
    wish = auto._unlimited(Request(prompt="a cat", seed=0))
    plan = fitted(wish, foresee, 14 * GB)
    assert (plan.quantise, plan.residency) == ("int8", "stage") and plan.memory.peak <= 14 * GB
    assert "weights are held in int8 (" in plan.notes[-1] and "s with residency 'stream' and weights as they are) and residency is 'stage'" in plan.notes[-1]
    assert fitted(wish, foresee, 24 * GB).quantise is None
    swift = fitted(wish, partial(forecast, auto.checkpoint, auto.family, speeds=rates | {"copy": 1e15}), 14 * GB)
    assert (swift.quantise, swift.residency) == (None, "stream")  # whose blocks come in no time


@pytest.mark.slow
def test_down_to_4_bits(full: Any) -> None:
    pipe = copy(full("flux1-dev"))
    pipe._machine = replace(pipe._machine, ways=(None, "int8", "int4"))
    rates = dict.fromkeys(speeds(torch.device("cpu"), torch.bfloat16), 1e12) | {"copy": 1e9}
    foresee = partial(forecast, pipe.checkpoint, pipe.family, speeds=rates)
    wish = pipe._unlimited(Request(prompt="a cat", seed=0))
    for size, way, policy in ((14, "int8", "stage"), (8, "int4", "stage"), (4, None, "stream")):
        plan = fitted(wish, foresee, size * GB)
        assert (plan.quantise, plan.residency) == (way, policy) and plan.memory.peak <= size * GB, size
    sizes = [foresee(replace(wish, quantise=way, residency="stage")).stages["denoiser"].weights for way in (None, "int8", "int4")]
    assert sizes[1] == pytest.approx(0.51 * sizes[0], rel=0.03) and sizes[2] == pytest.approx(0.29 * sizes[0], rel=0.04)


def test_memory_is_asked_for_late(full: Any) -> None:
    plan = full("sd15").plan("a cat", seed=0)
    assert plan.forecast is None and "GB" not in str(plan) and plan.memory.budget is None and not plan.memory.seconds
    assert "TFLOP" in plan.memory.time


@pytest.mark.parametrize("said, expected", [("8GB", 8e9), ("7.5 GiB", 7.5 * 2**30), ("800mb", 8e8), (12345678, 12345678), ("4096000", 4096000), ("4KB", 4000), ("64 B", 64)])
def test_sizes(said: Any, expected: float) -> None:
    assert memory_bytes(said, torch.device("cpu")) == expected


@pytest.mark.parametrize("said", ["", "much", "8 apples", 0, -1, True, 2.5, "0GB"])
def test_what_is_no_size(said: Any, small: Any) -> None:
    with pytest.raises(RequestError, match="memory is .* expected a size as '8GB'"):
        small.plan("a cat", memory=said)


@pytest.mark.parametrize("said", [8, "8", " 8.0 "])
def test_a_number_without_its_unit(said: Any, small: Any) -> None:
    with pytest.raises(RequestError, match="memory is 8 bytes, in which no model has room: say the unit, as '8GB'$"):
        small.plan("a cat", memory=said)


def test_auto_is_what_is_free(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 10**8 < memory_bytes("auto", torch.device("cpu")) < 10**15
    monkeypatch.setattr(budget_module, "_available", lambda: 5 * GB)
    monkeypatch.setattr(budget_module, "_number", {"/sys/fs/cgroup/memory.max": 4 * GB, "/sys/fs/cgroup/memory.current": GB}.get)
    assert memory_bytes("auto", torch.device("cpu")) == 3 * GB
    assert small.plan("a cat", width=64, height=64, memory="auto").residency == "resident"


def test_it_goes_down_one_ladder(small: Any, tmp_path: Path) -> None:
    """With less and less: guidance split, then tiles, then policies; and what the plan says is what runs, and what is replayed."""
    said = {"seed": 0, "steps": 2, "width": 512, "height": 512, "guidance_scale": 4.0}
    whole = small.plan("a cat", **said).memory
    seen, last = [], whole.peak * 1.04
    while True:
        try:
            plan = small.plan("a cat", memory=int(last), **said)
        except RequestError:
            break
        seen.append((POLICIES.index(plan.residency), plan.tile or 512, plan.request.split_guidance))
        last = plan.memory.peak * 1.02
    assert seen[0] == (0, 512, False) and len(seen) >= 4
    assert [each[0] for each in seen] == sorted(each[0] for each in seen) and seen[-1][0] >= 1 and any(tile < 512 for _, tile, _ in seen)
    made = small.stream(plan).result
    assert torch.equal(made.latents, small.txt2img("a cat", **said, split_guidance=plan.request.split_guidance, vae_tile=plan.request.vae_tile).latents)
    assert small.replay(made.save(tmp_path / "made.png")[0]).identical


def test_without_a_memory_a_plan_on_a_gpu_fits_what_is_free(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that is made up: all pictures in one call where there is room, else fewer; with no room for one, a note and no refusal."""
    monkeypatch.setattr(small, "_machine", replace(small._machine, device="cuda"))
    monkeypatch.setattr(small.residency, "device", torch.device("cuda"))
    said = {"seed": 0, "steps": 2, "width": 256, "height": 256, "batch": 8, "guidance_scale": 4.0}
    free = [10**12]
    monkeypatch.setattr(budget_module, "free_bytes", lambda device: free[0])
    roomy = small.plan("a cat", **said)
    assert (roomy.rows, roomy.forecast, len(roomy.notes)) == (8, None, 1)
    need = roomy.memory
    free[0] = int(max(need.stages["decoder"].peak, need.stages["denoiser"].peak * 0.7) * 1.04)
    tight = small.plan("a cat", **said)
    assert tight.rows < 8 and tight.memory.peak <= free[0] and "to fit" in tight.notes[-1]
    seconds = {None: 5.0, "int8": 1.0, "int4": 2.0}  # weights as they are would be streamed, those in fewer bits need not be
    monkeypatch.setattr(small, "_machine", replace(small._machine, ways=tuple(seconds)))
    monkeypatch.setattr(small, "_timed", lambda: lambda plan: replace(
        need, stages={"denoiser": Need(10**9 if plan.residency != "stream" and not plan.quantise else 10**5, 0)},
        seconds={"denoiser": seconds[plan.quantise]}))
    held = small.plan("a cat", **said)
    assert (held.quantise, held.residency) == ("int8", "resident") and "(1 s predicted, against 5 s with residency 'stream'" in held.notes[-1]
    free[0] = 10**5
    hopeless = small.plan("a cat", **said)
    assert hopeless.rows == 8 and "GB is free" in hopeless.notes[-1]


def test_on_a_cpu_what_does_not_fit_is_noted_before_anything_loads(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small.residency.clear()  # what is held counts as free
    monkeypatch.setattr(budget_module, "free_bytes", lambda device: 10**5)
    plan = small.plan("a cat", width=64, height=64, steps=1, seed=0)
    assert plan.residency == "resident" and "GB is free: name what it may take, as memory='1MB'" in plan.notes[-1]
    monkeypatch.setattr(budget_module, "free_bytes", lambda device: 5 * 10**6)
    assert "as memory='5MB'" in small.plan("a cat", width=512, height=512, steps=1, seed=0).notes[-1]


def test_a_prediction_that_nobody_asked_for_cannot_spoil_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = latentgen.load(tiny("sd15").save(tmp_path / "tiny"), device="cpu", dtype="float32", progress=False)
    monkeypatch.setattr(budget_module, "free_bytes", lambda device: 10**5)

    def broken(*args: Any, **said: Any) -> Any:
        raise IndexError("numbers that paper does not have")

    monkeypatch.setattr("latentgen.run.memory.forecast.rehearse", broken)
    said = {"width": 64, "height": 64, "steps": 1, "seed": 0}
    assert pipe.plan("a cat", **said).forecast is None and pipe.txt2img("a cat", **said).image.size == (64, 64)
    with pytest.raises(IndexError, match="paper"):
        pipe.plan("a cat", memory="1GB", **said)


def test_a_pipeline_loaded_for_a_memory(tmp_path: Path) -> None:
    pipe = latentgen.load(tiny("sd15").save(tmp_path / "tiny"), device="cpu", dtype="float32", progress=False, memory="1GB")
    result = pipe.txt2img("a cat", steps=1, width=64, height=64, seed=0)
    assert result.plan.forecast is not None and result.plan.forecast.budget == GB
    with pytest.raises(RequestError, match="memory is 'x'"):
        latentgen.load(tmp_path / "tiny", device="cpu", memory="x")


def test_speeds_are_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATENTGEN_CONFIG", str(tmp_path))
    first = speeds(torch.device("cpu"), torch.float32)
    assert min(first.values()) > 1e3 and speeds(torch.device("cpu"), torch.float32) == first
    (tmp_path / "speed.json").write_text("{broken")
    assert set(speeds(torch.device("cpu"), torch.float32)) == set(first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_speeds_are_those_of_what_is_run(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed layers and blocked attention where networks are made of them, torch's own operators for the rest; all finite."""
    for name in ("ENOUGH", "SAMPLE"):
        monkeypatch.setattr(speed, name, 0.0)
    seen: set[Any] = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(attention, "in_blocks", lambda *args, way=attention.in_blocks: seen.add("in blocks") or way(*args))
    with Seen():
        rates = speed.measured(torch.device("cpu"), dtype)
    packed = dtype == torch.bfloat16 and onednn.available()
    assert set(rates) == {*KINDS, "copy"} and all(0 < rate < float("inf") for rate in rates.values())
    assert (set(onednn.products()) <= seen) == packed == ("in blocks" in seen) and torch.ops.aten.addmm.default in seen


def test_what_was_measured_otherwise_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATENTGEN_CONFIG", str(tmp_path))
    made = []
    monkeypatch.setattr(speed, "measured", lambda *args: made.append(args) or dict.fromkeys((*KINDS, "copy"), 1e9))
    monkeypatch.setattr(speed, "VERSION", speed.VERSION - 1)
    speeds(torch.device("cpu"), torch.float32), speeds(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(speed, "VERSION", speed.VERSION + 1)
    speeds(torch.device("cpu"), torch.float32)
    assert len(made) == 2


def test_on_the_command_line(tmp_path: Path) -> None:
    folder = tiny("sd15").save(tmp_path / "tiny")
    said = ["plan", "a cat", "--model", str(folder), "--device", "cpu", "--dtype", "float32", "--width", "64", "--height", "64", "--seed", "1"]
    done = CliRunner().invoke(app, [*said, "--memory", "1GB"])
    assert done.exit_code == 0 and "of 1 GB at most" in done.output and "about" in done.output
    assert '"budget": 1000000000' in CliRunner().invoke(app, [*said, "--memory", "1GB", "--json"]).output
    assert "needs at least" in CliRunner().invoke(app, [*said, "--memory", "1MB"]).output
