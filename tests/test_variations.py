"""Variations of a picture: its own request with other noise where its file tells it, and otherwise the picture redrawn a little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pipeline import edited_weights, fresh, hole, picture, same
from test_replay import FOREIGN
from test_save import gradient
from typer.testing import CliRunner

from latentgen.cli import app
from latentgen.errors import ImageError, RequestError
from latentgen.pixels.save import save_image
from latentgen.run.many.variations import plan_variations
from latentgen.run.recipe import Recipe, as_recipe, read_recipe

SAID = {"steps": 3, "seed": 7, "sampler": "euler_ancestral", "guidance_scale": 3.0}
each = pytest.mark.parametrize


@pytest.fixture(scope="module")
def made(pipe, tmp_path_factory) -> Path:
    return pipe.txt2img("a (cat:1.2)", **SAID, width=48).save(tmp_path_factory.mktemp("made") / "a.png")[0]


def test_by_the_recipe_in_the_file(pipe, made: Path) -> None:
    result = pipe.variations(made, count=3, amount=0.3, variation_seed=50)
    same(result, pipe.txt2img("a (cat:1.2)", **SAID, width=48, variation_strength=0.3, variation_seed=50, batch=3))
    assert result.seeds == (7, 7, 7) and result.notes == () and len(pipe.variations(made)) == 4
    same(pipe.variations(as_recipe(made), count=2, variation_seed=1), pipe.variations(made.read_bytes(), count=2, variation_seed=1))


def test_they_are_near_and_nearer_for_less(pipe, made: Path) -> None:
    base = pipe.txt2img("a (cat:1.2)", **SAID, width=48).latents
    far = [float((pipe.variations(made, amount=amount, count=2, variation_seed=9).latents - base).norm()) for amount in (0.02, 0.2, 0.9)]
    assert 0 < far[0] < far[1] < far[2]


def test_each_of_them_replays(pipe, made: Path, tmp_path: Path) -> None:
    for file in pipe.variations(made, count=2).save(tmp_path / "v.png"):
        assert pipe.replay(file).identical
    again = pipe.variations(file, count=1)
    assert again.seeds == (7,) and any("is a variation itself: these are variations of what seed 7 makes" in note for note in again.notes)


def test_how_far_is_said_by_amount_alone(pipe, made: Path) -> None:
    with pytest.raises(RequestError, match="variation_strength is given beside amount: say with amount alone"):
        pipe.variations(made, variation_strength=0.2)


def test_of_a_result_in_memory(pipe, made: Path) -> None:
    one = pipe.txt2img("a (cat:1.2)", **SAID, width=48)
    same(pipe.variations(one, count=2, variation_seed=5), pipe.variations(made, count=2, variation_seed=5))
    same(pipe.variations(pipe.txt2img("a cat", **SAID | {"seed": 3}, batch=1), count=1, variation_seed=5),
         pipe.txt2img("a cat", **SAID | {"seed": 3}, variation_strength=0.2, variation_seed=5))
    with pytest.raises(RequestError, match=r"the result has 2 pictures: save them and give one of the files"):
        pipe.variations(pipe.txt2img("a cat", **SAID, batch=2))


def test_whatever_is_said_beside_is_different(pipe, made: Path) -> None:
    result = pipe.variations(made, count=1, prompt="a dog", steps=2)
    assert result.plan.request.prompt == "a dog" and result.plan.steps == 2 and result.plan.sampler == "euler_ancestral"
    assert pipe.variations(made, count=2, variation_seed=[5, 5]).plan.noise.variations == (5, 5)


def test_a_picture_without_a_recipe_is_redrawn(pipe, tmp_path: Path) -> None:
    gradient(64, 64).save(tmp_path / "a.png")
    gradient(64, 64).save(tmp_path / "a.bmp")
    said = {"count": 2, "amount": 0.5, "seed": 3, "steps": 4}
    whole = pipe.stream("", image=gradient(64, 64), strength=0.5, seed=3, steps=4, batch=2).result
    for source in (tmp_path / "a.png", tmp_path / "a.bmp", gradient(64, 64), np.asarray(gradient(64, 64)), (tmp_path / "a.png").read_bytes()):
        result = pipe.variations(source, **said)
        same(result, whole)
        assert "the picture says nothing of how it was made, so it was redrawn at strength 0.5" in result.notes
    worded = pipe.variations(tmp_path / "a.png", **said, prompt="a cat")
    assert worded.image.tobytes() != whole.image.tobytes() and worded.plan.task == "img2img"


def test_the_pictures_that_it_was_made_from_are_asked_for(pipe, tmp_path: Path) -> None:
    file = pipe.inpaint("a cat", picture(), hole(64, 64), steps=2, seed=4).save(tmp_path / "a.png")[0]
    with pytest.raises(RequestError, match="image is missing: give the image that the picture was made from"):
        pipe.variations(file)
    with pytest.raises(RequestError, match="mask is not the picture that it was made from"):
        pipe.variations(file, image=picture(), mask=hole(64, 64, soft=True))
    result = pipe.variations(file, image=picture(), mask=hole(64, 64), count=2, variation_seed=6)
    same(result, pipe.inpaint("a cat", picture(), hole(64, 64), steps=2, seed=4, variation_strength=0.2, variation_seed=6, batch=2))
    wide = pipe.outpaint("a cat", picture(), left=8, steps=2, seed=4).save(tmp_path / "b.png")[0]
    assert pipe.variations(wide, image=picture(), count=1).image.size == (72, 64)


def test_what_another_program_made(pipe, tmp_path: Path) -> None:
    file = save_image(gradient(48, 64), tmp_path / "a.png", metadata=FOREIGN)
    result = pipe.variations(file, count=2)
    assert result.seeds == (3, 3) and result.image.size == (48, 64) and any("draws its noise on the GPU" in note for note in result.notes)
    unseeded = save_image(gradient(48, 64), tmp_path / "b.png", metadata={"parameters": FOREIGN["parameters"].replace("Seed: 3, ", "")})
    assert any("A1111 does not tell the picture's seed, so it was redrawn" in note for note in pipe.variations(unseeded, count=1, steps=5).notes)
    with pytest.raises(RequestError, match="give the picture itself"):
        pipe.variations(read_recipe(unseeded))


def test_other_weights_are_noted(tiny_folder: Path, made: Path, tmp_path: Path) -> None:
    other = fresh(edited_weights(tiny_folder, tmp_path / "other", "unet", lambda tensors: tensors["conv_out.weight"].mul_(1.5)))
    assert other.variations(made, count=1).notes == ("the picture was made with the model 'tiny' of other weights than these",)


@each("said, words", [({"count": 0}, "count is 0"), ({"count": 65}, "count is 65"), ({"count": True}, "count is True"), ({"amount": 0}, "amount is 0"),
                      ({"amount": 1.5}, "amount is 1.5"), ({"amount": float("nan")}, "amount is nan"), ({"stepz": 3}, "did you mean 'steps'"), ({"batch": 2}, "batch")], ids=str)
def test_what_is_said_wrongly(pipe, made: Path, said: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        plan_variations(pipe, made, **said)


def test_what_is_no_picture_of_its_own(pipe, tmp_path: Path) -> None:
    sheet = pipe.grid("a cat", x={"steps": [1, 2]}, seed=0).save(tmp_path / "sheet.png")
    with pytest.raises(RequestError, match="a sheet or film of many"):
        pipe.variations(sheet[0] if isinstance(sheet, list) else sheet)
    for wrong in (tmp_path / "none.png", b"", 5, tmp_path):
        with pytest.raises(ImageError):
            pipe.variations(wrong)
    damaged = save_image(gradient(), tmp_path / "a.png", metadata={"latentgen": "{"})
    with pytest.raises(ImageError, match="damaged"):
        pipe.variations(damaged)


def test_they_can_be_stopped_and_go_on(pipe, made: Path, tmp_path: Path) -> None:
    def stop(step: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.variations(made, count=2, variation_seed=5, on_step=stop, save_state=tmp_path / "a.state", save_every=1)
    same(pipe.resume(tmp_path / "a.state"), pipe.variations(made, count=2, variation_seed=5))


def test_the_command(made: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def command(*words: str | Path) -> Any:
        return CliRunner().invoke(app, [*map(str, words)])

    done = command("variations", made, "--count", "2", "--amount", "0.1", "-o", tmp_path / "v.png", "--model", tiny_folder, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["seeds"] == [7, 7], done.output
    recipe = read_recipe(tmp_path / "v-2.png")
    assert isinstance(recipe, Recipe) and recipe.data["variation_strength"] == 0.1 and recipe.data["seed"] == 7
    gradient(64, 64).save(tmp_path / "bare.png")
    done = command("variations", tmp_path / "bare.png", "-n", "1", "--prompt", "a cat", "-o", tmp_path / "w.png", "--model", tiny_folder)
    assert done.exit_code == 0 and "redrawn at strength 0.2" in done.stderr, done.output
    done = command("variations", made, "-o", tmp_path / "v.png")
    assert done.exit_code == 2 and "say with --model where that is" in done.stderr
