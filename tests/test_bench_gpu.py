"""The cases that need a GPU, at tiny size on a CPU: all of their code but what a device tells of its memory. No test reads a clock's value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latentgen.bench import cases, gpu, limit, report
from latentgen.bench.gpu import EAGER, FLUX1, Meter, taken, timed
from latentgen.bench.sides import OURS
from latentgen.bench.weights import Architecture, shallower, write
from latentgen.errors import RequestError

PICTURE = Image.new("RGB", (8, 8))
VAE = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
CLIP = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "projection_dim": 32}
UNET = Architecture("sd15", "sd15", {
    "unet": {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "attention_head_dim": 4, "cross_attention_dim": 32, "sample_size": 8},
    "vae": VAE, "text_encoder": CLIP})
FLOW = Architecture("flux1-dev", "flux1", {
    "transformer": {"num_layers": 2, "num_single_layers": 4, "attention_head_dim": 128, "num_attention_heads": 1, "joint_attention_dim": 32, "pooled_projection_dim": 32},
    "vae": VAE, "text_encoder": CLIP, "text_encoder_2": {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2}})


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATENTGEN_CONFIG", str(tmp_path / "config"))
    monkeypatch.setattr(limit, "SIZES", ((256, 256, 256),))
    monkeypatch.setattr(limit, "COPIED", 2**20)


@pytest.mark.parametrize("architecture, negative", [(UNET, True), (FLOW, False)], ids=["unet", "flow"])
def test_a_case_measures_every_side_and_reports_plain_numbers(architecture: Architecture, negative: bool, tmp_path: Path) -> None:
    measure = gpu.speed(architecture, side=64, scale=3.0, negative=negative, device="cpu", compiled=False)
    found = {"about": "small"} | measure(tmp_path, 2, 1, 1, depth=0.5)
    assert set(found["seconds"]) == {OURS, EAGER} and set(found["ratios"]) == {EAGER} and not found["failed"]
    assert found["limit"]["tflop"] >= 0 and 0 < found["limit"]["share_of_roofline"] < 1 and found["limit"]["gbytes_a_second"] > 0
    assert all(0 < said["step"] < said["call"] and "peak_mb" not in said for said in found["seconds"].values())
    text = report.table({"cases": {"small": found}})
    assert "small, 20 steps (2 run), 0.5 of its layers | latentgen" in text and str(tmp_path) not in json.dumps(found)


def test_peaks_are_asked_of_each_model_in_each_cap(tmp_path: Path) -> None:
    found = gpu.memory(((UNET, (8.0, 1e-4)),), device="cpu")(tmp_path, 1, 1, 1)
    fits, small = found["memory"]
    assert fits["model"] == "sd15" and fits["residency"] == "resident" and fits["predicted_gb"] > 0 and fits["measured_gb"] is None and "failed" not in fits
    assert small["cap_gb"] == 1e-4 and "failed" in small
    text = report.table({"cases": {"caps": {"about": "caps"} | found}})
    assert "| caps | sd15 in 8 GB |  | resident: not measured," in text and "| sd15 in 0.0001 GB |" in text


def test_a_step_is_told_between_the_first_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 18.0, 19.0])  # began, the first step, the last, the end: nobody looks between
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(clock))
    waits: list[int] = []
    meter = Meter("cpu")
    monkeypatch.setattr(meter, "wait", lambda: waits.append(1))
    made = timed(lambda mark, prompt, seed, steps: [mark() for _ in range(steps)], meter, prompt="", seed=0, steps=4)
    assert (made.total, made.step, made.at(20)) == (9.0, 2.0, 41.0) and len(waits) == 4


def test_a_side_that_does_not_fit_is_reported_and_the_next_goes_on() -> None:
    def too_large() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert taken(too_large, Meter("cpu"), steps=1, rounds=1) is None
    seen: list[tuple[int, int]] = []
    made = taken(lambda: lambda mark, prompt, seed, steps: (seen.append((seed, steps)), [mark() for _ in range(steps)]), Meter("cpu"), steps=9, rounds=2)
    assert made is not None and seen == [(0, gpu.WARM), (1, 9), (2, 9)]
    case = {"about": "x", "asked": {"steps_run": 20, "steps_reported": 20}, "ratios": {}, "seconds": {OURS: {"call": 1.0, "step": 0.1, "peak_mb": 700}}, "failed": [EAGER]}
    assert "| x, 20 steps | latentgen, 700 MB at most |" in report.table({"cases": {"x": case}}) and f"| {EAGER} |  | out of memory |" in report.table({"cases": {"x": case}})


def test_an_architecture_can_be_made_shallower() -> None:
    assert shallower(FLUX1, 1) is FLUX1
    half = shallower(FLUX1, 0.25).configs
    assert (half["transformer"]["num_layers"], half["transformer"]["num_single_layers"], half["text_encoder_2"]["num_layers"]) == (5, 10, 6)
    assert half["vae"] == FLUX1.configs["vae"] and half["text_encoder"] == FLUX1.configs["text_encoder"]
    assert shallower(gpu.SDXL, 0.01).configs["unet"]["transformer_layers_per_block"] == [1, 1, 1]
    assert "text_encoder_3" not in shallower(gpu.SD3, 0.5).configs


def test_gpu_cases_are_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("gpu", "gpu-flux1-1024", "gpu-memory"):
        with pytest.raises(RequestError, match=r"'gpu-[\w-]+' needs a CUDA device, and this machine has none"):
            cases.measure([name], work=tmp_path)
    for depth in (0.0, 1.5):
        with pytest.raises(RequestError, match="depth is"):
            cases.measure(["load"], work=tmp_path, depth=depth)
    assert not list(tmp_path.glob("sd*")) and all(case.gpu == name.startswith("gpu-") for name, case in cases.CASES.items())


def test_a_machine_is_measured_where_it_is() -> None:
    assert limit.bandwidth(torch.device("cpu")) > 0


@pytest.mark.gpu
def test_a_tiny_case_on_a_gpu(tmp_path: Path) -> None:
    found = gpu.speed(UNET, side=64, scale=3.0)(tmp_path, 6, 1, 1)
    assert set(found["seconds"]) == {OURS, EAGER, gpu.GRAPHS, gpu.COMPILED} and all(said["peak_mb"] > 0 for said in found["seconds"].values())
    (row,) = gpu.memory(((UNET, (4.0,)),))(tmp_path, 1, 1, 1)["memory"]
    assert row["measured_gb"] > 0


@pytest.mark.gpu
@pytest.mark.slow
def test_predicted_peaks_are_those_of_a_gpu(tmp_path: Path) -> None:
    """SD 1.5 of full size, within a tenth."""
    (row,) = gpu.memory(((gpu.SD15, (3.0,)),))(write(gpu.SD15, tmp_path / "sd15").parent, 2, 1, 1)["memory"]
    assert abs(row["measured_gb"] / row["predicted_gb"] - 1) < 0.1
