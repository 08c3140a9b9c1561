"""Grids: every cell is the picture that a call of its own makes, one text is encoded once, one bad value refuses all, and the file makes the sheet again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import latentgen
from latentgen.errors import RequestError
from latentgen.pixels.save import read_metadata
from latentgen.run import words
from latentgen.run.many.grid import check_about, label, plan_grid
from latentgen.run.request import Request

X, Y = {"guidance_scale": [1, 4, 8]}, {"sampler": ["euler", "dpmpp_2m"]}


def test_every_cell_is_the_picture_of_its_own_call(pipe) -> None:  # noqa: ANN001
    grid = pipe.grid("a red heart", x=X, y=Y, seed=3, steps=3)
    assert [[result.plan.guidance_scale for result in row] for row in grid.rows] == [[1, 4, 8]] * 2
    for row, sampler in zip(grid.rows, Y["sampler"], strict=True):
        for result, scale in zip(row, X["guidance_scale"], strict=True):
            alone = pipe.txt2img("a red heart", seed=3, steps=3, guidance_scale=scale, sampler=sampler)
            assert result.image.tobytes() == alone.image.tobytes()
    assert grid.image.width > 3 * 64 and grid.image.height > 2 * 64 and len(grid.results) == 6
    assert "<img" in grid._repr_html_() and "guidance_scale" in grid._repr_html_() and "3 guidance_scale by 2 sampler" in repr(grid)


def test_one_seed_for_all_unless_it_is_an_axis(pipe) -> None:  # noqa: ANN001
    drawn = plan_grid(pipe, Request(prompt="a cat"), x=X)
    assert len({plan.seeds for plan in drawn.plans}) == 1
    assert [plan.seeds for plan in plan_grid(pipe, Request(prompt="a cat"), x={"seed": [5, 9]}).plans] == [(5,), (9,)]


def test_a_text_is_encoded_once(tiny_folder, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    pipe = latentgen.load(tiny_folder, dtype="float32", device="cpu", progress=False)
    seen = []
    encode = words.Speaker._encode
    monkeypatch.setattr(words.Speaker, "_encode", lambda self, *a: seen.append(a[0]) or encode(self, *a))
    pipe.grid(x={"prompt": ["a cat", "a dog"]}, y={"guidance_scale": [1, 3, 5]}, seed=1, steps=2, negative_prompt="", strict=False)
    assert len(seen) == 3  # two prompts and the empty one


def test_one_bad_value_refuses_the_sheet_before_anything_runs(pipe, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    monkeypatch.setattr(type(pipe), "stream", lambda *a, **k: pytest.fail("a cell ran"))
    with pytest.raises(RequestError, match=r"in the cell with guidance_scale 4, sampler 'eulr': .*eulr.*euler"):
        pipe.grid("a cat", x={"guidance_scale": [4, 1]}, y={"sampler": ["euler", "eulr"]})
    with pytest.raises(RequestError, match=r"in the cell with steps 0: steps is 0: expected"):
        pipe.grid("a cat", x={"steps": [4, 0]})
    with pytest.raises(RequestError, match=r"in the cell with guidance_scale 1: negative_prompt is given"):
        pipe.grid("a cat", x=X, negative_prompt="a dog")


@pytest.mark.parametrize("options, message", [
    ({"x": {"cfg": [1]}}, "'cfg', which is not a known option: did you mean 'guidance_scale'"), ({"x": {}}, "expected one field"),
    ({"x": {"seed": [1], "steps": [2]}}, "expected one field"), ({"x": {"seed": []}}, "one or more"), ({"x": {"sampler": "euler"}}, "expected a list"),
    ({"x": {"steps": [object()]}}, "expected plain data"), ({"x": {"batch": [1, 2]}}, "make seed an axis"), ({"x": {"image": [1]}}, "no cell can have"), ({"x": X, "y": {"guidance_scale": [2]}}, "x and y are both"),
    ({"x": X, "batch": 2}, "makes 2 pictures"), ({"x": {"steps": [2]}, "steps": 3}, "steps is the axis x and given beside it"),
    ({"x": {"prompt": ["b"]}}, "prompt is the axis x and given"), ({"x": {"seed": list(range(1025))}}, "1,025 cells"), ({"x": X, "cell": 5}, "cell is 5"),
])
def test_what_is_no_axis_is_refused(pipe, options: dict, message: str) -> None:  # noqa: ANN001
    with pytest.raises(RequestError, match=message):
        pipe.grid("a cat", **options)


def test_prompts_too_long_for_the_recipe_are_refused_while_planning(pipe) -> None:  # noqa: ANN001
    with pytest.raises(RequestError, match="recipe of the sheet would have"):
        plan_grid(pipe, Request(prompt="", dialect="plain"), x={"prompt": [" " * 19_000 + "a", "b"]}, y={"seed": list(range(60))})


def test_steps_are_counted_over_the_whole_and_can_be_stopped(pipe) -> None:  # noqa: ANN001
    seen = []
    pipe.grid("a cat", x={"steps": [2, 3]}, seed=1, on_step=lambda step: seen.append((step.index, step.total)))
    assert seen == [(n, 5) for n in range(5)]

    def stop(step) -> None:  # noqa: ANN001
        if step.index == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.grid("a cat", x={"steps": [2, 3]}, seed=1, on_step=stop)


@pytest.mark.parametrize("name", ["sheet.png", "sheet.webp"])
def test_the_file_makes_the_sheet_again(pipe, tmp_path: Path, name: str) -> None:  # noqa: ANN001
    grid = pipe.grid("a red heart", x=X, y={"guidance_interval": [(0.0, 1.0), (0.2, 0.8)]}, seed=3, steps=3, strict=False)
    file, = grid.save(tmp_path / name)
    found = latentgen.read_recipe(file)
    assert len(found.cells) == 6 and found.data["seed"] == 3 and "guidance_scale" not in found.data
    done = pipe.replay(file)
    assert done.identical, done.differences
    assert done.result.image.tobytes() == grid.image.tobytes()


def test_replay_tells_what_differs(pipe, tmp_path: Path) -> None:  # noqa: ANN001
    grid = pipe.grid("a red heart", x=X, seed=3, steps=3)
    file, = grid.save(tmp_path / "sheet.png")
    data = json.loads(read_metadata(file)["latentgen"])
    data["cells"][1] |= {"pixels_sha256": "0" * 64, "levels_sha256": "other"}
    done = pipe.replay(latentgen.Recipe(data))
    assert not done.identical and any("the noise levels" in d for d in done.differences) and any(d.startswith("picture 2: the pixels") for d in done.differences)
    with pytest.raises(RequestError, match="tells of no sheet"):
        pipe.replay(latentgen.Recipe(data | {"cells": data["cells"][:2]}))


@pytest.mark.parametrize("about", [None, {}, {"axes": [], "title": ""}, {"axes": [["a", 3]], "title": ""}, {"axes": [["a", [1, 2]]], "title": "", "cell": 10**9},
                                   {"axes": [["a", [1]]], "title": ""}, {"axes": [["a", [1, 2]]], "title": 3}])
def test_a_recipe_that_tells_of_no_sheet_is_refused(about: object) -> None:
    with pytest.raises(RequestError):
        check_about(about, 2)


def test_a_sheet_over_an_edit_needs_its_picture(pipe, tmp_path: Path) -> None:  # noqa: ANN001
    picture = Image.new("RGB", (64, 64), "teal")
    file, = pipe.grid("a cat", x={"strength": [0.5, 1.0]}, image=picture, seed=1).save(tmp_path / "s.png")
    assert pipe.replay(file).differences == ("image is missing: give the image that it was made from",)
    assert pipe.replay(file, image=picture).identical


def test_other_programs_read_the_axes(pipe) -> None:  # noqa: ANN001
    from latentgen.run.recipe import metadata

    text = metadata(pipe.grid("a cat", x=X, y=Y, seed=3, steps=2).recipe)["parameters"]
    assert 'Script: X/Y/Z plot, X Type: CFG Scale, X Values: "1, 4, 8", Y Type: Sampler, Y Values: "euler, dpmpp_2m"' in text


def test_labels() -> None:
    assert [label("prompt", "a cat"), label("eta", 0.5), label("steps", 4)] == ["a cat", "eta 0.5", "steps 4"]
    assert [label("guiders", said) for said in (None, "apg", {"apg": {"eta": 0.5}}, {"apg": {}, "pag": {"scale": 3.0, "layers": ["mid"]}}, ["apg", "pag"])] == [
        "guiders none", "guiders apg", "guiders apg eta 0.5", "guiders apg, pag scale 3 layers mid", "guiders apg, pag"]
    assert label("original_size", (64, 32)) == "original_size 64, 32" and label("prompt", "") == ""


def test_command(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "latentgen", "grid", "", "--x", 'prompt="a cat, flat",a dog', "--y", "clip-skip=1", "-m", str(tiny_folder), "--steps", "2",
               "-o", "s.png", "--seed", "1", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"]["grid"]["axes"] == [["prompt", ["a cat, flat", "a dog"]], ["clip_skip", [1]]]
    assert latentgen.read_recipe(tmp_path / "s.png").data["seed"] == 1
