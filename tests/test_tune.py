"""Tuning: what is tried, what is kept, and that nothing of it is used but where it is asked for, and then told. No test reads a clock's value."""

import json
from contextlib import closing
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny_folders import tiny
from typer.testing import CliRunner

import latentgen
from latentgen.bench import tune as tuning
from latentgen.cli import app
from latentgen.errors import OutputError, RequestError
from latentgen.diffusion.table import in_words
from latentgen.run.kept import config_folder, keep, read_kept
from latentgen.run.state import read_state
from latentgen.run.tuned import Tuned, keep_tuned, read_tuned, tuned_key

SMALL = {"steps": 3, "width": 64, "height": 64}
FOUND = Tuned({"deep_cache": {"interval": 2}}, 0.9, 1.5)


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTGEN_CONFIG", str(tmp_path / "config"))
    return tmp_path / "config"


@pytest.fixture
def fresh(tiny_folder):
    return latentgen.load(tiny_folder, dtype="float32", device="cpu", progress=False)


def key_of(pipe):
    return tuned_key(pipe.checkpoint.digest, "cpu", "float32")


def test_candidates_are_what_requests_take():
    for kind, count in (("unet", 17), ("transformer", 11)):
        made = tuning.candidates(kind)
        assert len({in_words(each) for each in made}) == len(made) == count and all(made)


def test_tuning_measures_all_and_keeps_the_fastest_that_holds(tiny_folder, fresh, config, monkeypatch):
    monkeypatch.setattr(tuning, "candidates", lambda kind: [{"deep_cache": {"interval": 2}}, {"deep_cache": {"interval": 1}}, {"token_merging": {"ratio": 0.5}}])
    seen = []
    found = tuning.tune(tiny_folder, quality=0.5, prompts=["a cat", "a dog"], dtype="float32", device="cpu", on_picture=lambda n, of: seen.append((n, of)), **SMALL)
    assert seen == [(n, 8) for n in range(1, 9)]
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == {"exact", "deep_cache interval 2", "deep_cache interval 1", "token_merging ratio 0.5"}
    assert rows["exact"]["quality"] == 1 and rows["exact"]["psnr"] == 99 and rows["exact"]["holds"]
    assert rows["deep_cache interval 1"]["psnr"] == 99 and rows["deep_cache interval 2"]["psnr"] < 99
    assert [row["seconds"] for row in found["rows"]] == sorted(row["seconds"] for row in found["rows"])
    fastest = next(row for row in found["rows"] if row["holds"])
    assert found["chosen"]["name"] == fastest["name"]
    kept = read_tuned(key_of(fresh), "tiny")
    assert kept.approximate == fastest["approximate"] and kept.quality == 0.5
    assert str(tiny_folder) not in (config / "tuned.json").read_text() + json.dumps(found)


def test_where_nothing_holds_the_exact_run_is_kept(tiny_folder, fresh, monkeypatch):
    monkeypatch.setattr(tuning, "candidates", lambda kind: [{"deep_cache": {"interval": 3}}])
    monkeypatch.setattr(tuning, "_embedder", lambda tower: lambda pictures: np.eye(4)[[n % 4 for n in range(len(pictures))]] if seen.pop() else np.eye(4)[::-1][:len(pictures)])
    seen = [0, 1]
    found = tuning.tune(tiny_folder, prompts=["a cat"], dtype="float32", device="cpu", **SMALL)
    assert found["chosen"]["name"] == "exact" and read_tuned(key_of(fresh), "tiny").approximate == {}


def test_pictures_are_as_far_apart_as_they_are():
    assert tuning.psnr(Image.new("RGB", (4, 4), (10, 10, 10)), Image.new("RGB", (4, 4), (20, 20, 20))) == pytest.approx(20 * np.log10(25.5))
    assert tuning.psnr(Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4))) == 99


def test_weights_in_fewer_bits_are_shown_beside_and_not_kept(tiny_folder, fresh, monkeypatch):
    monkeypatch.setattr("latentgen.models.quantise.held.LEAST", 1)
    monkeypatch.setattr(tuning, "candidates", lambda kind: [{"deep_cache": {"interval": 2}}])
    found = tuning.tune(tiny_folder, quality=0.0, prompts=["a cat"], dtype="float32", device="cpu", ways=("int8", "int4"), **SMALL)
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == {"exact", "deep_cache interval 2", "quantise int8", "quantise int4"}
    assert 99 > rows["quantise int8"]["psnr"] > rows["quantise int4"]["psnr"] and rows["quantise int8"]["approximate"] == {}
    assert found["chosen"]["name"] in ("exact", "deep_cache interval 2") and read_tuned(key_of(fresh), "tiny").approximate == found["chosen"]["approximate"]


@pytest.mark.parametrize(("said", "problem"), [({"quality": 1.5}, "quality is 1.5"), ({"quality": True}, "quality is True"), ({"prompts": []}, "prompts is empty"),
                                               ({"prompts": ["a cat"], "steps": 0}, "steps is 0")])
def test_what_cannot_be_tuned(tiny_folder, said, problem):
    with pytest.raises(RequestError, match=problem):
        tuning.tune(tiny_folder, **said)


def test_tuned_is_used_only_where_it_is_asked_for_and_then_told(tiny_folder, fresh, config):
    with pytest.raises(RequestError, match="run `latentgen tune`"):
        latentgen.load(tiny_folder, dtype="float32", device="cpu", progress=False, tuned=True)
    keep_tuned(key_of(fresh), FOUND)
    pipe = latentgen.load(tiny_folder, dtype="float32", device="cpu", progress=False, tuned=True)
    assert not fresh.plan("a cat").approximate
    plan = pipe.plan("a cat")
    assert plan.approximate == {"deep_cache": {"interval": 2, "layers": 1}}
    assert any(note.startswith("tuned on this machine: deep_cache interval 2, 1.50 times as fast at a quality of 0.9") for note in plan.notes)
    assert not pipe.plan("a cat", approximate={}).approximate and not pipe.plan("a cat", approximate={}).notes
    assert pipe.plan("a cat", approximate="token_merging").approximate == {"token_merging": {"ratio": 0.5, "deepest": 1}}
    made = pipe.txt2img("a cat", seed=1, **SMALL)
    assert made.recipe["approximate"] == {"deep_cache": {"interval": 2, "layers": 1}}
    again = fresh.txt2img("a cat", seed=1, approximate={"deep_cache": {"interval": 2}}, **SMALL)
    assert made.image.tobytes() == again.image.tobytes()
    (file,) = made.save(config.parent / "cat.png")
    assert fresh.replay(file).identical  # the recipe says it all: the other pipeline is not tuned
    (plain,) = fresh.txt2img("a cat", seed=1, **SMALL).save(config.parent / "plain.png")
    assert pipe.replay(plain).identical  # and takes nothing of what this one is tuned to


def test_an_interrupted_run_goes_on_as_it_was_begun(fresh, config):
    """By a pipeline that is tuned, without what it is tuned to; not by one that holds its weights in another way."""
    state, whole = config.parent / "run.state", fresh.txt2img("a cat", seed=1, **SMALL)
    with closing(fresh.stream("a cat", seed=1, save_state=state, save_every=1, **SMALL)) as run:
        next(run)
    keep_tuned(key_of(fresh), FOUND)
    found = read_state(state)
    other = copy(fresh)
    other._machine = replace(fresh._machine, ways=("int8",))
    with pytest.raises(RequestError, match="begun with quantise None and here it would be int8: load the model with that"):
        other.resume(found)
    assert fresh.tuned().resume(found).image.tobytes() == whole.image.tobytes()


@pytest.mark.parametrize("damage", ['{"approximate": {"no_such": {}}, "quality": 1, "speedup": 1}', '{"quality": 1}', '{"approximate": 3, "quality": 1, "speedup": 1}', "[]"])
def test_a_finding_that_cannot_be_read_is_named(fresh, config, damage):
    keep("tuned", key_of(fresh), json.loads(damage))
    with pytest.raises(RequestError, match="cannot be read"):
        fresh.tuned()


def test_kept_files(config, monkeypatch):
    assert read_kept("tuned") == {} and config_folder() == config
    keep("tuned", "a", 1)
    keep("tuned", "b", {"c": 2})
    assert read_kept("tuned") == {"a": 1, "b": {"c": 2}} and [p.name for p in config.iterdir()] == ["tuned.json"]
    (config / "tuned.json").write_text("not json")
    assert read_kept("tuned") == {}
    monkeypatch.setenv("LATENTGEN_CONFIG", str(config / "tuned.json"))
    with pytest.raises(OutputError, match="set LATENTGEN_CONFIG"):
        keep("tuned", "a", 1)
    monkeypatch.delenv("LATENTGEN_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/somewhere")
    assert config_folder().as_posix() == "/somewhere/latentgen"


def test_on_the_command_line(tiny_folder, config, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "candidates", lambda kind: [{"deep_cache": {"interval": 2}}])
    run = CliRunner().invoke
    small = ["--steps", "2", "--width", "64", "--height", "64"]
    told = run(app, ["tune", str(tiny_folder), "--quality", "0.1", "--prompt", "a cat", "--dtype", "float32", "--device", "cpu", *small])
    assert "quantise int8_dynamic" in told.output
    assert told.exit_code == 0, told.output
    assert "deep_cache interval 2" in told.output and "kept for --tuned" in told.output
    keep_tuned(next(iter(read_kept("tuned"))), FOUND)
    words = ["plan", "a cat", "--model", str(tiny_folder), "--dtype", "float32", "--device", "cpu"]
    assert "approx    deep_cache interval 2 layers 1" in run(app, [*words, "--tuned"]).output
    assert "approx" not in run(app, [*words, "--tuned", "--approximate", "none"]).output.replace("--approximate", "")
    shown = run(app, [*words, "--approximate", "deep_cache:interval=4,layers=2", "--approximate", "token_merging"]).output
    assert "approx    deep_cache interval 4 layers 2, token_merging ratio 0.5 deepest 1" in shown
    assert "expected NAME or NAME:OPTION=VALUE" in run(app, [*words, "--approximate", "deep_cache:interval"]).output
    listed = json.loads(run(app, ["approximations", "--json"]).output)
    assert {row["approximation"] for row in listed} == {"first_block", "tea_cache", "taylor", "deep_cache", "token_merging"}
    assert "TaylorSeer" in run(app, ["approximations"]).output


def test_of_a_transformer(tmp_path, monkeypatch):
    folder = tiny("flux1").save(tmp_path / "flux1")
    monkeypatch.setattr(tuning, "candidates", lambda kind: [{"first_block": {"threshold": 0.1}}] if kind == "transformer" else [])
    found = tuning.tune(folder, quality=0.0, prompts=["a cat"], dtype="float32", device="cpu", save=False, **SMALL)
    assert {row["name"] for row in found["rows"]} == {"exact", "first_block threshold 0.1"} and read_kept("tuned") == {}


def test_what_is_remembered_of_a_latent_that_turns_is_refused(tmp_path):
    """A transformer sees a seamless picture turned at each level, so nothing of the level before fits. Windows along the edge do not turn."""
    pipe = latentgen.load(tiny("sd3").save(tmp_path / "sd3"), dtype="float32", device="cpu", progress=False)
    with pytest.raises(RequestError, match="taylor is given but seamless turns the latent at every level"):
        pipe.plan("a cat", approximate="taylor", seamless="x", **SMALL)
    assert pipe.plan("a cat", approximate="taylor", seamless="x", tile=32, **SMALL).approximate
    keep_tuned(key_of(pipe), Tuned({"taylor": {}}, 0.9, 1.5))
    plan = pipe.tuned().plan("a cat", seamless="x", **SMALL)
    assert not plan.approximate and any("tuned, but nothing is left out" in note for note in plan.notes)
