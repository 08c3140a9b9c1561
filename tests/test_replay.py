"""Replay: the same bytes from the file alone, in a process of its own, and otherwise the name of what differs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny
from PIL import Image
from test_pipeline import edited_weights, fresh, hole, picture
from test_save import gradient
from typer.testing import CliRunner

from latentgen.cli import app
from latentgen.errors import ImageError, RequestError
from latentgen.pixels.save import read_metadata, save_image
from latentgen.run.recipe import KEY, Recipe, metadata, read_recipe
from latentgen.run.replay import replay

TASKS = {
    "txt2img": {"negative_prompt": "dog", "sampler": "euler_ancestral", "guidance_interval": (0.1, 0.9), "width": 48},
    "img2img": {"image": picture(67, 45), "strength": 0.5},
    "inpaint": {"image": picture(67, 45), "mask": hole(67, 45, soft=True), "sampler": "ddim", "eta": 0.3},
    "outpaint": {"image": picture(40, 40), "left": 9, "bottom": 4, "feather": 4}}


@pytest.fixture(scope="module")
def made(pipe, tmp_path_factory) -> Path:
    """A folder with a picture of each task, its sources as files, and a batch."""
    folder = tmp_path_factory.mktemp("made")
    for task, options in TASKS.items():
        for name in ("image", "mask"):
            if name in options:
                options[name].save(folder / f"{task}-{name}.png")
        pipe.stream("a naïve 🙂 (cat:1.2)", seed=11, steps=4, **options).result.save(folder / f"{task}.png")
    pipe.txt2img("a cat", seed=5, steps=2, batch=3).save(folder / "batch.png")
    return folder


def sources(folder: Path, task: str) -> dict[str, Path]:
    return {name: path for name in ("image", "mask") if (path := folder / f"{task}-{name}.png").exists()}


def test_identical_bytes_in_a_new_process(made: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Of every task, from the files alone: pixels, recipe and the file as a whole."""
    code = ("import sys, json, pathlib, latentgen; from latentgen.run.replay import replay\n"
            "model, made, out = map(pathlib.Path, sys.argv[1:])\n"
            "pipe = latentgen.load(model, dtype='float32', device='cpu', progress=False)\n"
            f"for task in {list(TASKS)} + ['batch-2']:\n"
            "    said = {n: p for n in ('image', 'mask') if (p := made / f'{task}-{n}.png').exists()}\n"
            "    done = replay(pipe, made / f'{task}.png', **said)\n"
            "    done.result.save(out / f'{task}.png')\n"
            "    print(json.dumps([done.identical, done.differences]))\n")
    command = [sys.executable, "-c", code, str(tiny_folder), str(made), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[True, []]] * 5
    for task in (*TASKS, "batch-2"):
        assert (tmp_path / f"{task}.png").read_bytes() == (made / f"{task}.png").read_bytes(), task


def test_a_source_picture_is_checked_before_anything_runs(made: Path, tiny_folder: Path) -> None:
    pipe = fresh(tiny_folder)
    done = replay(pipe, made / "inpaint.png")
    assert (done.result, done.identical) == (None, False) and [d.split(":")[0] for d in done.differences] == ["image is missing", "mask is missing"]
    given = sources(made, "inpaint")
    done = replay(pipe, made / "inpaint.png", **given | {"image": picture(67, 45, seed=2)})
    assert (done.result, done.differences) == (None, ("image is not the picture that it was made from",))
    done = replay(pipe, made / "inpaint.png", **given | {"mask": hole(67, 45)})
    assert (done.result, done.differences) == (None, ("mask is not the picture that it was made from",))
    assert pipe.residency.resident_bytes() == 0
    for wrong, why in (({"mask": given["mask"]}, "mask is given but"), ({"steps": 4}, "'steps' is given to replay"),
                       ({"reference": gradient()}, "reference is given but")):
        with pytest.raises(RequestError, match=why):
            replay(pipe, made / "img2img.png", image=given["image"], **wrong)
    with pytest.raises(ImageError, match="asked for|is 40x40"):
        replay(pipe, made / "inpaint.png", **given | {"mask": hole(40, 40)})


def test_other_weights_are_named(pipe, made: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def nudged(tensors: dict[str, Any]) -> None:
        tensors["conv_out.weight"] *= 1.5

    edited_weights(tiny_folder, tmp_path / "other", "unet", nudged)
    done = replay(fresh(tmp_path / "other"), made / "txt2img.png")
    recipe = read_recipe(made / "txt2img.png")
    assert isinstance(recipe, Recipe) and not done.identical and done.result is not None
    weights, pixels = done.differences
    assert weights.startswith(f"the weights: {recipe.data['weights']} then") and "pixels differ, by" in pixels
    assert str(done).splitlines()[0] == "different" and str(replay(pipe, made / "txt2img.png")) == "identical"


def test_another_number_type_is_named(made: Path, tiny_folder: Path) -> None:
    done = replay(fresh(tiny_folder, dtype="bfloat16"), made / "txt2img.png")
    assert not done.identical and done.differences[0] == "dtype: float32 then, bfloat16 now" and "pixels differ" in done.differences[-1]


def altered(path: Path, target: Path, **changes: Any) -> Path:
    """The file with other things in its recipe."""
    data = json.loads(read_metadata(path)[KEY]) | changes
    with Image.open(path) as image:
        return save_image(image, target, metadata={KEY: json.dumps(data)})


@pytest.mark.parametrize(("changes", "said"), [
    ({"versions": {"torch": "1.0", "latentgen": "0.0.1"}}, ["latentgen: 0.0.1 then", "torch: 1.0 then"]),
    ({"device": "cuda"}, ["device: cuda then, cpu now"]),
    ({"rows": 4}, ["pictures per network call: 4 then, nothing now"]), ({"levels_sha256": "0" * 16}, ["the noise levels: 0000"]),
    ({"versions": 3, "notes": 3}, [])], ids=str)
def test_other_circumstances_are_named_though_the_pixels_are_the_same(pipe, made: Path, tmp_path: Path, changes: dict, said: list[str]) -> None:
    done = replay(pipe, altered(made / "txt2img.png", tmp_path / "a.png", **changes))
    assert done.identical and len(done.differences) == len(said) and all(word in d for word,
        d in zip(said, done.differences, strict=True)), done.differences


def test_a_file_that_was_changed_is_told(pipe, made: Path, tmp_path: Path) -> None:
    with Image.open(made / "txt2img.png") as image:
        painted = image.convert("RGB")
        data = read_metadata(made / "txt2img.png")
    painted.putpixel((3, 4), tuple(255 - v for v in painted.getpixel((3, 4))))
    done = replay(pipe, save_image(painted, tmp_path / "a.png", metadata=data))
    assert not done.identical and len(done.differences) == 1 and f"1 of {48 * 64} pixels differ, by" in done.differences[0]
    done = replay(pipe, save_image(painted.resize((24, 32)), tmp_path / "a.png", metadata=data))
    assert not done.identical and "the file is 24x32, the new picture 48x64" in done.differences[0]


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_file_that_is_not_exact_is_judged_by_its_hash(pipe, tmp_path: Path, suffix: str) -> None:
    result = pipe.txt2img("a cat", seed=5, steps=2)
    path = save_image(result.image, tmp_path / f"a{suffix}", metadata=metadata(result.recipe, 5, result.image))
    for made in (path, path.read_bytes()):
        done = replay(pipe, made)
        assert done.identical and done.differences == ()
    done = replay(pipe, save_image(result.image, path, metadata=metadata(result.recipe, 5, gradient(64, 64))))
    assert not done.identical and done.differences[0].startswith("the pixels are others (")
    done = replay(pipe, save_image(result.image, path, metadata=metadata(result.recipe, 5)))
    assert not done.identical and "keep a PNG" in done.differences[0]


def test_what_can_be_replayed(pipe, made: Path) -> None:
    with Image.open(made / "txt2img.png") as image:
        assert replay(pipe, image).identical and replay(pipe, (made / "txt2img.png").read_bytes()).identical
    recipe = read_recipe(made / "txt2img.png")
    assert isinstance(recipe, Recipe)
    hashed = Recipe({**recipe.data, "pixels_sha256": "0"})
    bare = Recipe({k: v for k, v in recipe.data.items() if k != "pixels_sha256"})
    assert replay(pipe, hashed).differences == ("the pixels are others",) and "does not tell what the pixels were" in replay(pipe,
        bare).differences[0]
    result = replay(pipe, bare).result
    assert result is not None
    assert replay(pipe, Recipe({**recipe.data} | json.loads(metadata(result.recipe, 11, result.image)[KEY]))).identical
    with pytest.raises(ImageError, match="says nothing"):
        replay(pipe, gradient())
    with pytest.raises(RequestError, match="expected a picture's file"):
        replay(pipe, 3)  # type: ignore[arg-type]


def test_the_rest_of_a_run_of_another_model(pipe, tmp_path: Path) -> None:
    half = pipe.txt2img("a cat", seed=5, steps=4, denoising_end=0.5)
    rest = pipe.txt2img("a cat", seed=5, steps=4, denoising_start=0.5, latents=half.latents)
    path = rest.save(tmp_path / "a.png")[0]
    assert replay(pipe, path, latents=half.latents).identical
    assert replay(pipe, path).differences == ("latents is missing: give the latents that it was made from",)
    assert replay(pipe, path, latents=half.latents + 1).differences == ("latents is not the picture that it was made from",)


FOREIGN = {"parameters": "a cat\nNegative prompt: dog\n"
           "Steps: 2, Sampler: Euler, CFG scale: 7, Seed: 3, Size: 48x64, Clip skip: 2, Model: x, Version: v1.9.0"}


def test_what_another_program_made_is_made_only_if_asked(pipe, tmp_path: Path) -> None:
    path = save_image(gradient(48, 64), tmp_path / "a.png", metadata=FOREIGN)
    with pytest.raises(RequestError, match="A1111 made this picture"):
        replay(pipe, path)
    done = replay(pipe, path, anyway=True)
    assert not done.identical and done.differences[0] == "A1111 made it" and done.result is not None and done.result.seeds == (3,
        ) and done.result.image.size == (48, 64)
    edit = save_image(gradient(48, 64), tmp_path / "a.png",
                      metadata={"parameters": FOREIGN["parameters"].replace("Clip skip: 2", "Denoising strength: 0.5")})
    assert replay(pipe, edit, anyway=True).differences == ("image is missing: give the image that it was made from",)
    assert replay(pipe, edit, anyway=True, image=picture(48, 64)).result.plan.task == "img2img"  # type: ignore[union-attr]


def command(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, words)])


def test_the_replay_command(made: Path, tiny_folder: Path, tmp_path: Path) -> None:
    said = ("--model", tiny_folder, "--quiet")
    done = command("replay", made / "inpaint.png", "--image", made / "inpaint-image.png", "--mask", made / "inpaint-mask.png", "-o",
                   tmp_path / "again.png", *said)
    assert (done.exit_code, done.stdout) == (0, f"identical\n{tmp_path / 'again.png'}\n"), done.output
    assert (tmp_path / "again.png").read_bytes() == (made / "inpaint.png").read_bytes()
    done = command("replay", made / "inpaint.png", "--json", *said)
    assert done.exit_code == 1 and json.loads(done.stdout)["differences"][0].startswith("image is missing") and json.loads(done.stdout)["files"] == []
    done = command("replay", made / "txt2img.png", "--dtype", "bfloat16", "--model", tiny_folder)
    assert done.exit_code == 1 and done.stdout.startswith("different\n  dtype: float32 then, bfloat16 now\n")
    path = save_image(gradient(), tmp_path / "foreign.png", metadata=FOREIGN)
    for words, code, why in (((path, *said), 2, "--anyway makes the nearest"), ((made / "txt2img.png",), 2, "say with --model where that is"),
                             ((made / "txt2img.png", "-o", "a.gif", *said), 2, "expected .png"), ((made / "no.png", *said), 2, "cannot be read"),
                             ((made / "txt2img.png", "-o", tmp_path / "no" / "a.png", *said), 4, "does not exist"),
                             ((made / "txt2img-none.png", *said), 2, "cannot be read")):
        done = command("replay", *words)
        assert done.exit_code == code and why in done.stderr and done.stderr.count("\n") == 1, done.output
    assert command("replay", path, "--anyway", *said).exit_code == 1


def test_replay_and_resume_hold_weights_as_the_run_did(tiny_folder: Path, tmp_path: Path) -> None:
    """Streamed blocks are not fused in bfloat16, and weights in fewer bits are others."""
    file, state = tmp_path / "it.png", tmp_path / "it.state"
    done = command("txt2img", "cat", "--model", tiny_folder, "--device", "cpu", "--dtype", "bfloat16", "--residency", "stream", "--quantise", "int8",
                   "--steps", 2, "--seed", 1, "-o", file, "--save-state", state)
    assert done.exit_code == 0, done.output
    told = read_recipe(file).data
    assert (told["residency"], told["quantise"]) == ("stream", "int8")
    done = command("replay", file, "--model", tiny_folder, "--quiet")
    assert (done.exit_code, done.stdout) == (0, "identical\n"), done.output
    assert "residency: stream then, nothing now" in command("replay", file, "--model", tiny_folder, "--residency", "resident").stdout
    done = command("resume", state, "--model", tiny_folder, "-o", tmp_path / "again.png")
    assert done.exit_code == 0 and (tmp_path / "again.png").read_bytes() == file.read_bytes() and "note" not in done.stderr, done.output


def test_the_recipe_command(made: Path, tmp_path: Path) -> None:
    done = command("recipe", made / "inpaint.png")
    words = ("made by            latentgen", "a naïve 🙂 (cat:1.2)", "image, mask (not in the file)", "ddim", "float32")
    assert done.exit_code == 0 and all(word in done.stdout for word in words)
    told = json.loads(command("recipe", made / "inpaint.png", "--json").stdout)
    assert told["needs"] == ["image", "mask"] and told["fields"]["eta"] == 0.3 and told["recipe"]["task"] == "inpaint"
    path = save_image(gradient(), tmp_path / "a.png", metadata={"parameters": FOREIGN["parameters"].replace("a cat", "a \x1b[31mcat")})
    done = command("recipe", path)
    assert done.exit_code == 0 and "\x1b" not in done.stdout and "A1111" in done.stdout and "note" in done.stdout
    gradient().save(tmp_path / "bare.png")
    assert command("recipe", tmp_path / "bare.png").exit_code == 2


def test_a_card_that_is_here_is_found_by_its_name(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentgen.models import card

    own = card.read_card(make_tiny(tmp_path / "tiny") / "card.toml")
    monkeypatch.setattr(card, "cards", lambda: {"tiny": own})
    done = command("replay", made / "txt2img.png", "--quiet")
    assert (done.exit_code, done.stdout) == (0, "identical\n"), done.output
    monkeypatch.setattr(card, "cards", lambda: {"tiny": replace(own, repo="org/tiny")})  # a file is not to start a download
    assert command("replay", made / "txt2img.png", "--quiet").exit_code == 2
    shutil.rmtree(tmp_path / "tiny")
