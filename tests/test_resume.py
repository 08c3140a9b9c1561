"""An interrupted run goes on to the very bytes that it would have had: of every sampler, task and kind of guidance, wherever it stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_pipeline import edited_weights, fresh, hole, picture, same
from tiny_folders import tiny
from typer.testing import CliRunner

import latentgen
from latentgen.cli import app
from latentgen.cli.meter import Meter
from latentgen.diffusion import SAMPLERS
from latentgen.errors import OutputError, RequestError
from latentgen.diffusion.level import Level
from latentgen.diffusion.sample import Step
from latentgen.run.state import KEY, Keeper, State, checked_path, read_state

each = pytest.mark.parametrize


class Interrupted(Exception):
    """What stands for a power cut."""


def stopping(pipe: Any, after: int) -> Any:
    """A pipeline of the same weights whose network fails in its next call after so many; calls of zeros, which tables are made from, do not count."""
    calls = [0]

    def predict(*asked: Any) -> torch.Tensor:
        calls[0] += bool(asked[1].any())
        if calls[0] > after:
            raise Interrupted
        return pipe.family.predict(*asked)

    twin = copy(pipe)
    twin.family = replace(pipe.family, predict=predict)
    return twin


def asked(pipe: Any, **options: Any) -> tuple[Any, list[Any]]:
    """The result of a whole run, and the levels that its network was asked about."""
    twin, seen = listening(pipe)
    return twin.stream("a (cat:1.2)", **options).result, seen


def listening(pipe: Any) -> tuple[Any, list[Any]]:
    """A pipeline of the same weights, and the levels that its network is asked about; calls of zeros do not count."""
    seen: list[Any] = []

    def predict(*said: Any) -> torch.Tensor:
        seen.extend([said[2]] * bool(said[1].any()))
        return pipe.family.predict(*said)

    twin = copy(pipe)
    twin.family = replace(pipe.family, predict=predict)
    return twin, seen


def equal(made: Any, whole: Any) -> None:
    same(made, whole)
    assert torch.equal(made.latents, whole.latents) and made.notes == whole.notes and str(made.plan) == str(whole.plan)
    assert json.dumps(made.recipe, sort_keys=True) == json.dumps(whole.recipe, sort_keys=True)


EDITS = {
    "txt2img": {}, "img2img": {"image": picture(67, 45), "strength": 0.8}, "inpaint": {"image": picture(67, 45), "mask": hole(67, 45, soft=True)},
    "outpaint": {"image": picture(40, 40), "left": 9, "feather": 4}}
SAID = {"steps": 5, "seed": 4}


@each("sampler", SAMPLERS)
def test_every_sampler_from_the_middle(pipe, sampler: str, tmp_path: Path) -> None:
    options = SAID | {"sampler": sampler, "width": 32, "height": 32, "spacing": "karras"} | ({"sampler_options": {"s_churn": 2.0}} if sampler == "euler" else {})
    whole, seen = asked(pipe, **options)
    file = tmp_path / "run.state"
    with pytest.raises(Interrupted):
        list(stopping(pipe, len(seen) // 2).stream("a (cat:1.2)", save_state=file, save_every=1, **options))
    rest, after = listening(pipe)
    equal(rest.resume(file), whole)
    assert len(after) == len(seen) - len(seen) // 2  # nothing is computed twice


@each("task", EDITS)
@each("options", [{"batch": 2, "sampler": "dpmpp_2m_sde"}, {"guidance_rescale": 0.5, "negative_prompt": "dog"}, {"guidance_scale": 1.0, "sampler": "unipc"}],
      ids=lambda o: "+".join(o))
def test_every_task_wherever_it_stops(pipe, task: str, options: dict, tmp_path: Path) -> None:
    said = SAID | EDITS[task] | options | {"steps": 3}
    whole, seen = asked(pipe, **said)
    for after in range(1, len(seen) + 1):
        file = tmp_path / f"{after}.state"
        with suppress(Interrupted):
            list(stopping(pipe, after).stream("a (cat:1.2)", save_state=file, save_every=1, **said))
        equal(pipe.resume(read_state(file)), whole)


def test_more_that_may_be_said(pipe, tmp_path: Path) -> None:
    """Words by step, AND, variations, intervals, latents of another run, and what strict=False left out."""
    half = pipe.txt2img("a cat", seed=5, steps=4, denoising_end=0.5)
    for n, said in enumerate([
            {"prompt": "a [cat:dog:0.5] AND tree", "guidance_interval": (0.2, 0.8)}, {"seed": [9, 2], "variation_strength": 0.3, "seed_width": 40, "seed_height": 40},
            {"latents": half.latents, "denoising_start": 0.5}, {"strict": False, "eta": 0.5, "strength": 0.3}, {"seed": None, "variation_strength": 0.1}]):
        file, said = tmp_path / f"{n}.state", {"steps": 4, "seed": 1} | said
        request = latentgen.Request(**{"prompt": "a cat"} | said)
        kept = pipe.stream(request, save_state=file, save_every=1)
        next(kept)
        next(kept)
        state = read_state(file)
        equal(pipe.resume(state), kept.result)
        assert (state.steps, state.total) == (2, kept.plan.steps)


@each("guiders", ["apg", {"apg": {"momentum": -0.75}, "dynamic_threshold": {}}, "pag", "cfg_zero"], ids=str)
def test_guidance_that_remembers(pipe, guiders: Any, tmp_path: Path) -> None:
    said = SAID | {"guiders": guiders, "guidance_scale": 4.0, "sampler": "euler_ancestral"}
    whole, seen = asked(pipe, **said)
    with pytest.raises(Interrupted):
        list(stopping(pipe, len(seen) // 2 + 1).stream("a (cat:1.2)", save_state=tmp_path / "a.state", save_every=1, **said))
    equal(pipe.resume(tmp_path / "a.state"), whole)


@each("options", [{"upscale": 2}, {"upscale": 1.5, "upscaler": "lanczos", "upscale_steps": 3}, {"tile": 32}], ids=str)
def test_two_passes_and_windows(pipe, options: dict, tmp_path: Path) -> None:
    said = SAID | {"sampler": "dpmpp_2m_sde", "width": 48, "height": 48, "batch": 2} | options
    whole, seen = asked(pipe, **said)
    for after in (2, len(seen) - 3):
        with pytest.raises(Interrupted):
            list(stopping(pipe, after).stream("a (cat:1.2)", save_state=tmp_path / f"{after}.state", save_every=1, **said))
        equal(pipe.resume(tmp_path / f"{after}.state"), whole)


def test_a_classifier_is_asked_for(pipe, tmp_path: Path) -> None:
    class Clean:
        of, digest = "x0", "abc"

        def __call__(self, x0: torch.Tensor, level: Any) -> torch.Tensor:
            return -(x0 ** 2).flatten(1).sum(1)

    said = SAID | {"classifier": Clean(), "guiders": {"classifier": {"scale": 0.01}}}
    whole = pipe.txt2img("a cat", **said)
    run = pipe.stream("a cat", save_state=tmp_path / "a.state", save_every=1, **said)
    next(run)
    next(run)
    run.close()
    with pytest.raises(RequestError, match="classifier is missing: give the one that leads the run"):
        pipe.resume(tmp_path / "a.state")
    other = Clean()
    other.digest = "def"
    with pytest.raises(RequestError, match="classifier sha256 abc .* give the same one"):
        pipe.resume(tmp_path / "a.state", classifier=other)
    equal(pipe.resume(tmp_path / "a.state", classifier=Clean()), whole)
    pipe.txt2img("a cat", **SAID, save_state=tmp_path / "b.state")
    with pytest.raises(RequestError, match="none leads the run"):
        pipe.resume(tmp_path / "b.state", classifier=Clean())


def test_saving_changes_nothing(pipe, tmp_path: Path) -> None:
    options = SAID | {"sampler": "euler_ancestral"}
    whole = pipe.txt2img("a cat", **options)
    equal(pipe.txt2img("a cat", **options, save_state=tmp_path / "a.state", save_every=2), whole)
    equal(pipe.txt2img("a cat", **options, save_state=str(tmp_path / "a.state")), whole)  # over that of a run that was finished
    equal(pipe.resume(tmp_path / "a.state"), whole)  # which only decodes


def test_when_it_is_saved(pipe, tmp_path: Path) -> None:
    file = tmp_path / "a.state"
    run = pipe.stream("a cat", **SAID, save_state=file, save_every=2)
    states = [read_state(file).steps if next(run) and file.exists() else 0 for _ in range(5)]
    assert states == [0, 2, 2, 4, 5] and sorted(path.name for path in tmp_path.iterdir()) == ["a.state"]
    other = tmp_path / "b.state"
    run = pipe.stream("a cat", **SAID, save_state=other, save_every=100)
    for _ in range(3):
        next(run)
    assert not other.exists()
    run.close()
    assert read_state(other).steps == 3


def test_a_call_that_is_stopped(pipe, tmp_path: Path) -> None:
    def stop(step: Any) -> None:
        if step.index == 2:
            raise KeyboardInterrupt

    file, options = tmp_path / "a.state", SAID | {"image": picture(), "mask": hole(64, 64)}
    with pytest.raises(KeyboardInterrupt):
        pipe.inpaint("a cat", **options, save_state=file, save_every=50, on_step=stop)
    seen: list[Any] = []
    equal(pipe.resume(file, on_step=seen.append), pipe.inpaint("a cat", **options))
    assert [step.index for step in seen] == [3, 4] and {step.total for step in seen} == {5}
    assert read_state(file).steps == 5  # the file is written on


def test_stopped_twice_and_streamed(pipe, tmp_path: Path) -> None:
    file = tmp_path / "a.state"
    first = pipe.stream("a cat", **SAID, save_state=file)
    next(first)
    first.close()
    second = pipe.stream(read_state(file), save_every=1)
    assert second.done == 1 and next(second).index == 1
    second.close()
    elsewhere = tmp_path / "b.state"
    third = pipe.stream(read_state(file), save_state=elsewhere)
    assert [step.index for step in third] == [2, 3, 4] and read_state(elsewhere).steps == 5 and read_state(file).steps == 2
    equal(third.result, pipe.txt2img("a cat", **SAID))


def test_source_pictures_are_in_the_file(pipe, tmp_path: Path) -> None:
    """The files that they came from may go."""
    picture(67, 45).save(tmp_path / "a.png")
    hole(80, 80, soft=True).save(tmp_path / "m.png")
    options = SAID | {"image": tmp_path / "a.png", "mask": str(tmp_path / "m.png"), "fit": "resize", "width": 48, "height": 48}
    whole = pipe.inpaint("a cat", **options)
    run = pipe.stream("a cat", **options, save_state=tmp_path / "a.state")
    next(run)
    run.close()
    (tmp_path / "a.png").unlink()
    (tmp_path / "m.png").unlink()
    equal(pipe.resume(tmp_path / "a.state"), whole)


@each("mask", [hole(67, 45).convert("RGBA"), np.asarray(hole(67, 45)) > 0, torch.from_numpy(np.array(hole(67, 45, soft=True))).float() / 255], ids=lambda m: type(m).__name__)
def test_masks_of_every_kind(pipe, mask: Any, tmp_path: Path) -> None:
    whole = pipe.inpaint("a cat", picture(67, 45), mask, steps=2, seed=0)
    run = pipe.stream("a cat", image=picture(67, 45), mask=mask, steps=2, seed=0, save_state=tmp_path / "a.state")
    next(run)
    run.close()
    equal(pipe.resume(tmp_path / "a.state"), whole)


def test_the_bar_starts_where_the_run_was(pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm.auto

    shown: list[dict] = []
    real = tqdm.auto.tqdm
    monkeypatch.setattr(tqdm.auto, "tqdm", lambda **said: shown.append(said) or real(**said, disable=True))
    run = pipe.stream("a cat", **SAID, save_state=tmp_path / "a.state", save_every=1)
    next(run)
    next(run)
    run.close()
    watched = copy(pipe)
    watched.progress = True
    watched.resume(tmp_path / "a.state")
    assert (shown[0]["initial"], shown[0]["total"]) == (2, 5)


def test_a_new_process_goes_on(tiny_folder: Path, pipe, tmp_path: Path) -> None:
    options = SAID | {"image": picture(), "sampler": "dpmpp_3m_sde", "batch": 2, "strength": 1.0}
    run = pipe.stream("a cat", **options, save_state=tmp_path / "a.state", save_every=2)
    for _ in range(3):
        next(run)
    run.close()
    code = ("import sys, latentgen\npipe = latentgen.load(sys.argv[1], dtype='float32', device='cpu', progress=False)\n"
            "pipe.resume(sys.argv[2]).save(sys.argv[3])")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tiny_folder), str(tmp_path / "a.state"), str(tmp_path / "b.png")],
                          capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert done.returncode == 0, done.stderr
    pipe.img2img("a cat", **options).save(tmp_path / "whole.png")
    for n in (1, 2):
        assert (tmp_path / f"b-{n}.png").read_bytes() == (tmp_path / f"whole-{n}.png").read_bytes()


@each("kind", ["sd15", "flux1", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd15-inpaint", "sdxl", "sd3", "flux2", "zimage", "qwenimage", "pixart"))])
def test_every_family(kind: str, tmp_path: Path) -> None:
    """Also where what depends on the level alone was computed before the first step, by calls that make no picture."""
    own = latentgen.load(tiny(kind).save(tmp_path / "model"), dtype="float32", device="cpu", progress=False)
    said = {"steps": 3, "seed": 1, "width": 64, "height": 64, "batch": 2, "guidance_scale" if own.family.guidance == "cfg" else "true_cfg_scale": 3.0}
    kept = own.stream("a red heart", save_state=tmp_path / "a.state", save_every=1, **said)
    next(kept)
    state = read_state(tmp_path / "a.state")
    counted = copy(own)
    calls: list[int] = []

    def predict(*asked: Any) -> torch.Tensor:
        answer = own.family.predict(*asked)
        calls.append(len(answer))
        return answer

    counted.family = replace(own.family, predict=predict)
    equal(counted.resume(state), kept.result)
    assert sum(calls) == 2 * (kept.plan.evaluations - kept.plan.evaluations // 3)


def test_channels_last_answers_stay_so(pipe, tmp_path: Path) -> None:
    """A sum over them would else run in another order."""
    last = copy(pipe)
    last.family = replace(pipe.family, predict=lambda *said: pipe.family.predict(*said).contiguous(memory_format=torch.channels_last))
    run = last.stream("a cat", **SAID, save_state=tmp_path / "a.state", save_every=1)
    next(run)
    run.close()
    assert not read_state(tmp_path / "a.state").answers[0].is_contiguous()
    equal(last.resume(tmp_path / "a.state"), last.txt2img("a cat", **SAID))


# What is not gone on with


@pytest.fixture
def state(pipe, tmp_path: Path) -> Path:
    run = pipe.stream("a cat", **SAID, image=picture(), strength=1.0, save_state=tmp_path / "run.state")
    next(run)
    next(run)
    run.close()
    return tmp_path / "run.state"


def rewritten(file: Path, *, without: str = "", **changes: Any) -> Path:
    """The file with other things in its header."""
    with safe_open(file, "pt") as opened:
        data = json.loads(opened.metadata()[KEY])
    recipe = {k: v for k, v in (data["recipe"] | changes.pop("recipe", {})).items() if v is not ...}
    tensors = {name: tensor for name, tensor in load_file(file).items() if not (without and name.startswith(without))}
    save_file(tensors, file, {KEY: json.dumps(data | {"recipe": recipe} | changes)})
    return file


def test_other_weights_and_another_number_type(state: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def nudged(tensors: dict[str, Any]) -> None:
        tensors["conv_out.weight"] *= 1.5

    for other, words in ((fresh(edited_weights(tiny_folder, tmp_path / "other", "unet", nudged)), "begun with weights .*load those weights"),
                         (fresh(tiny_folder, dtype="bfloat16"), "dtype float32 and here it would be bfloat16: load the model with that dtype")):
        with pytest.raises(RequestError, match=words):
            other.resume(state)
        assert other.residency.resident_bytes() == 0


@each("change, words", [
    ({"without": "answer.000000"}, "damaged"), ({"without": "image.000000"}, "damaged .the image is missing"), ({"steps": -1}, "holds no run"), ({"total": 0}, "holds no run"),
    ({"asked": [1]}, "damaged"), ({"format": 2}, "holds no run"), ({"recipe": {"steps": "many"}}, "steps is 'many'"), ({"recipe": {"steps": 7}}, "begun with levels"),
    ({"recipe": {"device": "cuda"}}, "begun with device cuda"), ({"recipe": {"image_sha256": "0"}}, "image sha256 0 .*altered"), ({"recipe": {"prompt": ...}}, "")], ids=str)
def test_a_file_that_was_altered(pipe, state: Path, change: dict, words: str) -> None:
    file = rewritten(state, **change)
    if not words:
        assert pipe.resume(file).plan.request.prompt == ""
        return
    with pytest.raises(RequestError, match=words) as raised:
        pipe.resume(file)
    assert "\n" not in str(raised.value) and str(state.parent) not in str(raised.value)


@each("damage", [lambda data: data[:len(data) // 2], lambda data: b"", lambda data: data[:4], lambda data: b"\xff" * 64 + data, lambda data: data[:-8]], ids=range(5))
def test_a_file_that_is_damaged(pipe, state: Path, damage: Any) -> None:
    state.write_bytes(damage(state.read_bytes()))
    with pytest.raises(RequestError, match="'run.state'.*(damaged|holds no run)") as raised:
        pipe.resume(state)
    assert "\n" not in str(raised.value) and str(state.parent) not in str(raised.value)


def test_answers_of_another_shape(pipe, state: Path) -> None:
    kept = read_state(state)
    with pytest.raises(RequestError, match="does not fit: answer 2 has shape"):
        pipe.resume(replace(kept, answers=(kept.answers[0], kept.answers[1][:, :, :4])))


def test_what_may_change_the_last_bits_is_noted(pipe, state: Path) -> None:
    kept = read_state(state)
    older = replace(kept, recipe={**kept.recipe, "versions": {"torch": "1.0"}})
    assert any("begun with torch 1.0 and went on with" in note for note in pipe.resume(older).notes)
    other = replace(kept, asked=tuple(one ^ 1 for one in kept.asked))
    assert sum("not to the last bit" in note for note in pipe.resume(other).notes) == 1


def test_what_a_state_may_not_be_written_over(pipe, state: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("dear diary")
    for name, words in (("run.state", "stopped after step 2 of 5: go on with it by resume, remove the file"), ("notes.txt", "holds no run: choose another"),
                        (".", "which is a folder: name a file in it")):
        with pytest.raises(RequestError, match=words):
            pipe.txt2img("a cat", **SAID, save_state=tmp_path / name)
    assert (tmp_path / "notes.txt").read_text() == "dear diary"
    with pytest.raises(OutputError, match="does not exist"):
        pipe.txt2img("a cat", **SAID, save_state=tmp_path / "no" / "a.state")


@each("said, words", [({"save_every": 2}, "save_every is given without save_state"), ({"save_state": "a", "save_every": 0}, "save_every is 0"),
                      ({"save_state": "a", "save_every": True}, "save_every is True"), ({"save_state": 3}, "save_state is 3"), ({"save_state": ""}, "save_state is ''")], ids=str)
def test_what_is_said_wrongly(pipe, said: dict, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=words):
        pipe.txt2img("a cat", **said)
    assert not list(tmp_path.iterdir())


def test_where_it_does_not_belong(pipe, state: Path) -> None:
    with pytest.raises(RequestError, match="belongs to the calls"):
        pipe.plan("a cat", save_state="a")
    with pytest.raises(RequestError, match="an interrupted run was given with steps"):
        pipe.stream(read_state(state), steps=3)
    with pytest.raises(RequestError, match="no file 'none.state'"):
        pipe.resume(state.parent / "none.state")


def test_what_a_network_remembers_is_not_kept(tmp_path: Path) -> None:
    own = latentgen.load(tiny("sd15").save(tmp_path / "model"), dtype="float32", device="cpu", progress=False)
    with pytest.raises(RequestError, match=r"with approximate \(deep_cache\)"):
        own.txt2img("a cat", approximate="deep_cache", save_state=tmp_path / "a.state")


def test_a_disk_that_is_full_does_not_end_the_run(pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentgen.run import state as module

    def full(*_: Any) -> None:
        raise OutputError("the disk is full: make room")

    monkeypatch.setattr(module, "write_whole", full)
    made = pipe.txt2img("a cat", **SAID, save_state=tmp_path / "a.state", save_every=2)
    assert [note for note in made.notes if "was not saved: the disk is full" in note] and len(made.notes) == 3
    same(made, pipe.txt2img("a cat", **SAID))


# Loading the model


def test_the_model_is_loaded_by_its_cards_name(pipe, state: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentgen.models import card, checkpoint

    with pytest.raises(RequestError, match=r"begun with the model 'tiny' \(weights [0-9a-f]{16}\), which no card names: load it .* pipe.resume"):
        latentgen.resume(state)
    own = card.read_card(tiny_folder / "card.toml")
    monkeypatch.setattr(card, "cards", lambda: {"tiny": own})
    monkeypatch.setattr(checkpoint, "find_card", lambda name: own)
    equal(latentgen.resume(state, progress=False), pipe.img2img("a cat", picture(), **SAID, strength=1.0))
    with pytest.raises(RequestError, match="dtype"):
        latentgen.resume(state, dtype="bfloat16", progress=False)


def test_the_model_is_loaded_by_its_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentgen.models import hub

    folder = tiny("sd15").save(tmp_path / ("a" * 40))
    monkeypatch.setattr(hub, "resolve", lambda name: name)
    monkeypatch.setattr(hub, "fetch_pipeline", lambda snapshot, progress: folder)
    own = latentgen.load("org/tiny-model", dtype="float32", device="cpu", progress=False)
    run = own.stream("a cat", **SAID, width=64, height=64, save_state=tmp_path / "a.state", save_every=1)
    next(run)
    assert run.plan.model == "org/tiny-model" and read_state(tmp_path / "a.state").recipe["model"] == "org/tiny-model"
    run.close()
    equal(latentgen.resume(tmp_path / "a.state", progress=False), own.txt2img("a cat", **SAID, width=64, height=64))


# The command line


def command(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, words)])


def test_the_commands(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    said = ("img2img", "a cat", "a.png", "--steps", "5", "--strength", "1", "--seed", "3", "--model", tiny_folder, "--dtype", "float32", "--device", "cpu")
    assert command(*said, "-o", "whole.png").exit_code == 0
    real, shown = Meter.step, []

    def stop(meter: Meter, step: Any) -> None:
        real(meter, step)
        shown.append(step.index)
        if step.index == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Meter, "step", stop)
    done = command(*said, "-o", "b.png", "--save-state", "my run.state", "--save-every", "4")
    assert done.exit_code == 130 and "go on with `latentgen resume 'my run.state'`" in done.stderr, done.output
    assert not (tmp_path / "b.png").exists() and read_state("my run.state").steps == 3
    done = command("resume", "my run.state", "-o", "b.png")
    assert done.exit_code == 2 and "--model" in done.stderr, done.output
    done = command("resume", "my run.state", "-o", "b.png", "--model", tiny_folder)
    assert done.exit_code == 0 and "step 4/5" in done.stderr and shown == [0, 1, 2, 3, 4], done.output
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    for words, code, why in ((("resume", "a.png"), 2, "holds no run"), (("resume", "none"), 2, "no file 'none'"), (("resume", "my run.state", "-o", "b.gif"), 2, ".png"),
                             ((*said, "--save-state", "a.png"), 2, "choose another name"), ((*said, "--save-every", "2"), 2, "without save_state")):
        done = command(*words)
        assert done.exit_code == code and why in done.stderr and done.stderr.strip().count("\n") <= 1, done.output


def test_a_run_that_stops_while_all_steps_are_run_once_more_is_not_finished(tmp_path):
    """Two steps in half precision, then both again: stopped after the third it is kept as three of four, and not written over."""
    x = torch.zeros(1, 4, 2, 2)
    keeper = Keeper(State({}, total=2, every=1, path=tmp_path / "run.state"), dict)

    def twice():
        for index in (0, 1, 0, 1):
            keeper.record.answers.append(x.clone())
            keeper.record.asked.append(0)
            yield Step(index, 2, Level(0.5, 0.5, 500.0), x, x)

    run = keeper.steps(twice())
    for _ in range(3):
        next(run)
    run.close()
    with pytest.raises(RequestError, match="stopped after step 3 of 4"):
        checked_path(tmp_path / "run.state")
