"""The cases of the speed table: what they make, count and write; no test reads a clock's value."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import latentgen
from latentgen.bench import cases, limit, report
from latentgen.bench.sides import OURS, STOCK, TUNED, Took, ours, theirs, timed
from latentgen.bench.weights import Architecture, write
from latentgen.errors import OutputError, RequestError

PICTURE = Image.new("RGB", (8, 8))
SMALL = Architecture("sd15", "sd15", {
    "unet": {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "attention_head_dim": 4, "cross_attention_dim": 32, "sample_size": 8},
    "vae": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}, "text_encoder": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(SMALL, tmp_path_factory.mktemp("bench") / "small")


def took(total: float, step: float, *, steps: int = 2) -> Took:
    return Took(total, step, 2 * total, steps, PICTURE)


def test_random_checkpoints_load_on_every_side_and_make_the_same_picture(folder: Path) -> None:
    """Same files, words, seed, steps, guidance and sampler default apart: here both by DDIM."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = latentgen.load(folder, dtype="float32", device="cpu", progress=False)
    said = {"width": 64, "height": 64, "guidance_scale": 4.0}
    mine = pipe.txt2img("a red heart", negative_prompt="blurry", seed=3, steps=3, sampler="ddim", spacing="leading", **said)
    import torch

    other = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False, local_files_only=True)
    other.scheduler = DDIMScheduler.from_config(other.scheduler.config, set_alpha_to_one=True)
    other.set_progress_bar_config(disable=True)
    latents = other("a red heart", negative_prompt="blurry", num_inference_steps=3, generator=torch.Generator("cpu").manual_seed(3), output_type="latent", **said).images
    assert (mine.latents - latents).abs().max() < 1e-4 * latents.abs().max()


def test_every_side_is_called_and_marks_its_steps(folder: Path) -> None:
    for call in (ours(folder, side=64, scale=3.0), theirs(folder, side=64, scale=3.0, tuned=True), theirs(folder, side=64, scale=3.0, tuned=False)):
        made = call("a red heart", 1, 3)
        assert made.image.size == (64, 64) and made.steps == 3
        assert 0 < made.step < made.total and made.at(3) == made.total and made.at(20) > made.total


def test_a_step_is_the_median_between_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.0, 13.0, 14.0, 20.0])  # began, three marks, the end
    monkeypatch.setattr("latentgen.bench.sides.time", SimpleNamespace(perf_counter=lambda: next(clock), process_time=lambda: 1.0))
    made = timed(lambda mark: [mark() for _ in range(3)], 3)
    assert (made.total, made.step, made.work) == (10.0, 1.5, 0.0)
    assert made.at(5) == 13.0


def test_ratios_are_of_whole_calls_at_the_reported_steps() -> None:
    found = cases.summed_up({OURS: [took(4, 1), took(6, 1), took(5, 1)], STOCK: [took(30, 10)] * 3}, full=12)
    assert found["seconds"][OURS] == {"call": 15, "step": 1, "rest": 3, "processor": 10}
    assert found["ratios"] == {STOCK: round(130 / 15, 2)} and found["processor_ratios"] == {STOCK: 6}


def test_sides_take_turns_after_a_call_to_warm_up() -> None:
    order: list[tuple[str, str, int]] = []

    def side(name: str) -> object:
        return lambda prompt, seed, steps: order.append((name, prompt, steps)) or took(1, 1)

    made = cases.in_turns({"a": side("a"), "b": side("b")}, steps=4, rounds=2)  # type: ignore[dict-item]
    assert [(name, steps) for name, _, steps in order] == [("a", 1), ("b", 1), ("a", 4), ("b", 4), ("b", 4), ("a", 4)]
    assert {len(taken) for taken in made.values()} == {2}


def test_arithmetic_is_counted_for_the_whole_call(folder: Path) -> None:
    pipe = latentgen.load(folder, device="cpu", dtype="bfloat16", progress=False)
    one, three = (limit.flops(pipe, pipe.plan("a red heart", seed=0, steps=n, width=64, height=64, sampler="ddim")) for n in (1, 3))
    assert 0 < one < three < 3 * one  # words and the decoder count once
    assert limit.matrix_speed() > 0


def test_a_case_reports_plain_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cases, "CASES", {"small": cases.Case("small", cases._pipelines(SMALL, side=64, scale=3.0, stock=True))})
    found = cases.measure(["all"], work=tmp_path, steps=2, rounds=1, threads=1)
    case = found["cases"]["small"]
    assert set(case["seconds"]) == {OURS, TUNED, STOCK} and set(case["ratios"]) == {TUNED, STOCK} and case["limit"]["tflop"] >= 0
    assert str(tmp_path) not in json.dumps(found)
    for bad in ({"names": ["sd99"]}, {"names": ["all"], "rounds": 0}, {"names": ["all"], "steps": 0}):
        with pytest.raises(RequestError):
            cases.measure(**{"work": tmp_path} | bad)


def whole(ratio: float = 2.0) -> dict:
    case = {"about": "a thing", "seconds": {OURS: {"call": 1.5, "step": 0.5}, TUNED: {"call": 3.0, "step": 1.0}}, "ratios": {TUNED: ratio},
            "asked": {"steps_run": 2, "steps_reported": 20}, "limit": {"tflop": 1.5, "gflops_a_second": 500, "seconds": 3.0, "times_the_limit": 1.2}}
    return {"cases": {"thing": case}, "environment": {"cpu": "one"}}


def test_the_report_keeps_what_was_measured_before_and_renews_the_page(tmp_path: Path) -> None:
    path, page = tmp_path / "speed.json", tmp_path / "speed.md"
    page.write_text(f"# Speed\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.written(whole(), path)
    again = whole() | {"cases": {"other": whole(3.0)["cases"]["thing"]}}
    files = report.written(again, path)
    assert path in files and page in files
    kept = json.loads(path.read_text())["cases"]
    assert list(kept) == ["thing", "other"] and kept["other"]["environment"] == {"cpu": "one"}
    text = page.read_text()
    assert text.startswith("# Speed\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| a thing, 20 steps (2 run) | latentgen | 0.50 s | 1.50 s |  |" in text and "3.00 times as long" in text and "1.20 times that" in text
    with pytest.raises(OutputError):
        report.written(whole(), tmp_path / "speed.txt")
    path.write_text("[]")
    with pytest.raises(OutputError):
        report.written(whole(), path)


def test_the_page_shows_the_numbers_that_were_measured() -> None:
    docs = Path(__file__).parent.parent / "docs"
    found = json.loads((docs / "speed.json").read_text("utf-8"))
    assert report.table(found) in (docs / "speed.md").read_text("utf-8")
