"""The bench: structure and arithmetic only; no test reads a clock's value."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentgen.bench import run
from latentgen.errors import RequestError


@pytest.fixture(scope="module")
def found(tiny_folder: Path) -> dict:
    import torch

    before = torch.get_num_threads()
    found = run.bench(tiny_folder, width=64, height=64, steps=1, rounds=1, threads=1, cold=False)
    assert torch.get_num_threads() == before
    return found


def test_every_side_is_timed_and_compared(found: dict) -> None:
    sides = {"latentgen", "diffusers float32", "diffusers bfloat16"}
    assert set(found["seconds"]) == sides
    assert set(found["ratios"]) == set(found["rms_levels"]) == sides - {"latentgen"}
    assert all(0 < s["min"] <= s["median"] <= s["max"] for s in found["seconds"].values())
    assert found["stages"]["total"] >= found["stages"]["sample"] >= 0
    assert found["asked"]["steps"] == 1 and found["asked"]["width"] == 64


def test_the_reference_does_the_same_work(tiny_folder: Path) -> None:
    """In float32 both sides make the same picture but for rounding; another seed or prompt is many times further away."""
    import torch

    import latentgen

    pipe, options = latentgen.load(tiny_folder, dtype="float32", device="cpu", progress=False), {"width": 64, "height": 64, "steps": 4}
    ours, theirs = run._ours(pipe, options, []), run._diffusers(pipe, pipe.plan("x", seed=0, **options), torch.float32)

    def apart(prompt: str, seed: int) -> float:
        return run._differences({"latentgen": ours("a red heart", 3), "other": theirs(prompt, seed)})["other"]

    assert 5 * apart("a red heart", 3) < min(apart("blue car", 3), apart("a red heart", 4))


def test_no_path_leaves_the_machine(found: dict, tiny_folder: Path) -> None:
    text = json.dumps(found)
    assert str(tiny_folder) not in text and str(Path.home()) not in text and sys.prefix not in text
    assert found["environment"]["threads"] == 1 and found["environment"]["torch"]


def test_bench_prints_nothing(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = run.bench(tiny_folder, width=64, height=64, steps=1, rounds=1, against=None, cold=False)
    assert alone["ratios"] == {} and list(alone["seconds"]) == ["latentgen"]
    assert capsys.readouterr() == ("", "")


def test_sides_take_turns_and_the_order_reverses() -> None:
    order: list[tuple[str, str, int]] = []

    def side(name: str) -> run.Call:
        return lambda prompt, seed: order.append((name, prompt, seed)) or Image.new("RGB", (8, 8))

    taken, _ = run.in_turns({"a": side("a"), "b": side("b")}, 3)
    assert [name for name, _, _ in order] == ["a", "b", "b", "a", "a", "b"]
    assert len({(prompt, seed) for _, prompt, seed in order}) == 3 and {len(s) for s in taken.values()} == {3}


def test_differences_are_root_mean_square_levels() -> None:
    ours, theirs = Image.new("RGB", (4, 4), (10, 10, 10)), Image.fromarray(np.full((4, 4, 3), 13, np.uint8))
    assert run._differences({"latentgen": ours, "other": theirs}) == {"other": 3.0}


def test_cold_starts_name_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def process(command: list[str], threads: int | None) -> tuple[float, float | None, int]:
        commands.append(command)
        return (2.0, 100.0, 0) if "txt2img" in command else (0.1, None, 0) if "--help" in command else (0.1, None, 1)

    monkeypatch.setattr(run, "_process", process)
    assert run.cold_starts("glyph", {"steps": 1}, rounds=1) == {"txt2img": {"seconds": 2.0, "peak_rss_mb": 100.0}, "help": {"seconds": 0.1},
                                                                 "import": {"failed": "exit status 1"}}
    assert commands[0][commands[0].index("--steps") + 1] == "1"


def test_a_real_process_is_measured_without_our_own_memory() -> None:
    took, peak, status = run._process([sys.executable, "-c", "raise SystemExit(3)"], None)
    assert took > 0 and status == 3 and (peak is None or 1 < peak < 100)  # this process, with torch, holds several hundred


@pytest.mark.parametrize("options", [{"against": "comfy"}, {"rounds": 0}, {"threads": 0}, {"steps": 0}, {"width": 65}])
def test_bad_values_are_refused(tiny_folder: Path, options: dict) -> None:
    with pytest.raises(RequestError):
        run.bench(tiny_folder, **{"width": 64, "height": 64, "steps": 1, "rounds": 1, "against": None, "cold": False} | options)
