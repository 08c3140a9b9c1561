"""Films: keyframes are the pictures that they are alone, a frame between is an ordinary request, a broken film goes on, and its file makes it again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import latentgen
from latentgen.cli import app
from latentgen.errors import OutputError, RequestError
from latentgen.run.many.interpolate import NUMBERS, between, places
from latentgen.run.request import Request

SAID = {"steps": 2, "sampler": "euler"}


def test_places() -> None:
    assert places(2, 3, loop=False) == [(0, 0), (0, 0.5), (1, 0)]
    assert places(3, 5, loop=False) == [(0, 0), (0, 0.5), (1, 0), (1, 0.5), (2, 0)]
    assert places(2, 4, loop=True) == [(0, 0), (0, 0.5), (1, 0), (1, 0.5)]
    for keys, frames in ((2, 24), (7, 100)):
        assert places(keys, frames, loop=False)[-1] == (keys - 1, 0.0)  # exactly, whatever the division


def test_keyframes_are_the_pictures_that_they_are_alone(pipe: Any) -> None:
    keys = [Request(prompt="a cat", seed=1, guidance_scale=2.0, **SAID), Request(prompt="a dog", seed=5, guidance_scale=4.0, **SAID)]
    film = list(pipe.interpolate(keys, frames=3))
    assert [image.tobytes() for image in (film[0], film[2])] == [pipe.stream(key).result.image.tobytes() for key in keys]
    alone = pipe.txt2img("a cat", seed=1, variation_seed=5, variation_strength=0.5, blend_prompt="a dog", blend=0.5, guidance_scale=3.0, **SAID)
    assert film[1].tobytes() == alone.image.tobytes()


def test_a_loop_comes_back(pipe: Any) -> None:
    film = pipe.interpolate(["a cat", "a dog"], frames=4, loop=True, seed=[1, 2], **SAID)
    said = [(r.prompt, r.blend_prompt, r.blend, r.seed, r.variation_seed) for r in film.requests]
    assert said == [("a cat", None, None, 1, None), ("a cat", "a dog", 0.5, 1, 2), ("a dog", None, None, 2, None), ("a dog", "a cat", 0.5, 2, 1)]
    assert str(film) == "4 frames, 8 steps, a loop" and len(film) == 4


def test_one_seed_is_drawn_for_all(pipe: Any) -> None:
    film = pipe.interpolate(["a cat", "a dog"], frames=3, **SAID)
    assert len({request.seed for request in film.requests}) == 1 and all(request.variation_seed is None for request in film.requests)


def test_what_a_keyframe_draws_it_draws_for_its_own_seed(pipe: Any) -> None:
    film = pipe.interpolate(["a {cat|dog|tree|car}", "a {cat|dog|tree|car}"], frames=4, seed=[1, 4], **SAID)
    first, *middle, last = film.requests
    drawn = [pipe.plan("a {cat|dog|tree|car}", seed=seed).prompt.text for seed in (1, 4)]
    assert [first.prompt, last.prompt] == drawn and len(set(drawn)) == 2 and {(r.prompt, r.blend_prompt) for r in middle} == {tuple(drawn)}


def test_numbers_go_along_the_line() -> None:
    made = between(Request(prompt="a", guidance_scale=2.0, shift=1.0, seed=1), Request(prompt="a", guidance_scale=6.0, shift=3.0, seed=1), 0.25)
    assert (made.guidance_scale, made.shift, made.blend_prompt, made.variation_seed) == (3.0, 1.5, None, None)
    assert {"guidance_scale", "strength", "eta"} <= set(NUMBERS) and not {"steps", "blend", "seed", "guidance_interval"} & set(NUMBERS)


@pytest.mark.parametrize("a, b, message", [
    ({"steps": 4}, {"steps": 8}, "steps differs"), ({"negative_prompt": "x"}, {}, "negative_prompt differs"), ({"guidance_scale": 3.0}, {}, "say it in both"),
    ({"prompt": "a", "blend_prompt": "c", "blend": 0.5}, {"prompt": "b", "blend_prompt": "c", "blend": 0.5}, "says blend_prompt"),
    ({"seed": 1, "variation_seed": 3, "variation_strength": 0.5}, {"seed": 2, "variation_seed": 3, "variation_strength": 0.5}, "says variation_seed"),
])
def test_what_has_no_way_between_is_refused(pipe: Any, a: dict, b: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe.interpolate([Request(**{"prompt": "p", "seed": 1} | a), Request(**{"prompt": "p", "seed": 1} | b)], frames=2)


@pytest.mark.parametrize("keys, options, message", [
    (["a"], {}, "two or more keyframes"), ("ab", {}, "two or more keyframes"), (["a", "b"], {"frames": 1}, "frames is 1: expected a whole number from 2"),
    (["a", "b", "c"], {"frames": 2}, "from 3"), (["a", "b"], {"frames": 2401}, "frames is 2401"), (["a", "b"], {"seed": [1, 2, 3]}, "3 seeds for 2 keyframes"),
    (["a", "b"], {"batch": 2}, "makes 2 pictures"), (["a", "b AND c"], {}, "in frame 2: prompt or blend_prompt joins"), (["a", "b"], {"stepz": 2}, "'stepz' is not"),
])
def test_what_is_no_film_is_refused_before_anything_runs(pipe: Any, keys: Any, options: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(pipe), "stream", lambda *a, **k: pytest.fail("a frame ran"))
    with pytest.raises(RequestError, match=message):
        pipe.interpolate(keys, **options)


def test_steps_are_counted_over_the_whole(pipe: Any) -> None:
    seen: list[tuple[int, int]] = []
    film = pipe.interpolate(["a cat", "a dog"], frames=3, seed=1, on_step=lambda step: seen.append((step.index, step.total)), **SAID)
    assert not seen  # nothing runs before it is asked for
    next(iter(film))
    assert seen == [(0, 6), (1, 6)]  # and no more than was asked for


def test_a_film_that_was_broken_off_goes_on(pipe: Any, tmp_path: Path) -> None:
    def stop(step: Any) -> None:
        if step.index == 5:
            raise KeyboardInterrupt

    whole = [image.tobytes() for image in pipe.interpolate(["a cat", "a dog"], frames=4, seed=1, **SAID)]
    with pytest.raises(KeyboardInterrupt):
        pipe.interpolate(["a cat", "a dog"], frames=4, seed=1, folder=tmp_path / "f", on_step=stop, **SAID).save(tmp_path / "a.png")
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["frame-0001.png", "frame-0002.png"] and not (tmp_path / "a.png").exists()
    again = pipe.interpolate(["a cat", "a dog"], frames=4, seed=1, folder=tmp_path / "f", **SAID)
    assert again.steps == 4 and [image.tobytes() for image in again] == whole
    assert pipe.replay(tmp_path / "f" / "frame-0002.png").identical
    with pytest.raises(RequestError, match="'frame-0002.png' in the folder is no frame of this film"):
        pipe.interpolate(["a cat", "a dog"], frames=5, seed=1, folder=tmp_path / "f", **SAID)
    Image.open(tmp_path / "f" / "frame-0001.png").save(tmp_path / "f" / "frame-0001.png")  # its text is lost
    with pytest.raises(RequestError, match="'frame-0001.png' in the folder is no frame"):
        pipe.interpolate(["a cat", "a dog"], frames=4, seed=1, folder=tmp_path / "f", **SAID)


@pytest.mark.parametrize("suffix", [".png", ".gif", ".webp", ".mp4"])
def test_the_file_makes_the_film_again(pipe: Any, tiny_folder: Path, tmp_path: Path, suffix: str) -> None:
    if suffix == ".mp4":
        pytest.importorskip("av")
    film = pipe.interpolate(["a cat", "a dog"], frames=3, loop=True, seed=[1, 2], **SAID)
    path, = film.save(tmp_path / f"a{suffix}", fps=5)
    found = latentgen.read_recipe(path)
    assert found.data["film"] == {"frames": 3, "loop": True} and len(found.cells) == 3
    done = pipe.replay(path)
    assert done.identical, done.differences
    again, = done.result.save(tmp_path / f"b{suffix}", fps=5)
    assert again.read_bytes() == path.read_bytes()
    words = ["replay", str(path), "--model", str(tiny_folder), "--quiet", "-o"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / f"c{suffix}")])
    assert (done.exit_code, done.stdout) == (0, f"identical\n{tmp_path / f'c{suffix}'}\n"), done.output
    assert "expected .gif" in CliRunner().invoke(app, [*words, str(tmp_path / "c.jpg")]).stderr


def test_replay_tells_which_frame_differs(pipe: Any) -> None:
    film = pipe.interpolate(["a cat", "a dog"], frames=3, seed=1, **SAID)
    cells = [{**recipe, "pixels_sha256": "0" * 64} for recipe in film.recipes]
    done = pipe.replay(latentgen.Recipe({"film": {"frames": 3}, "cells": cells}))
    assert [d for d in done.differences if d.startswith("picture")] == [f"picture {n}: the pixels are others" for n in (1, 2, 3)]


def test_a_picture_can_be_redrawn_on_the_way(pipe: Any, tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), "teal")
    keys = [Request(prompt="a cat", image=image, strength=0.5, seed=1), Request(prompt="a cat", image=image, strength=1.0, seed=1)]
    path, = pipe.interpolate(keys, frames=3).save(tmp_path / "a.gif")
    assert pipe.replay(path, image=image).identical


def test_what_cannot_be_saved_is_found_before_it_runs(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = pipe.interpolate(["a cat", "a dog"], frames=3, seed=1, **SAID)
    monkeypatch.setattr(type(pipe), "stream", lambda *a, **k: pytest.fail("a frame ran"))
    for path, fps, error in ((tmp_path / "a.avi", 12, RequestError), (tmp_path / "a.gif", 0, RequestError), (tmp_path / "no" / "a.gif", 12, OutputError)):
        with pytest.raises(error):
            film.save(path, fps=fps)


def test_command(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "latentgen", "interpolate", "a cat", "a dog", "--frames", "3", "--seed", "3,7", "-m", str(tiny_folder), "--steps", "2", "-o", "a.gif"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "a.gif  3 frames, 6 steps", done.stderr
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3
    done = subprocess.run([*command[:-1], "a.avi"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "ends in '.avi'" in done.stderr


def test_frames_of_several_sizes_are_refused_before_any_is_made(pipe) -> None:  # noqa: ANN001
    from latentgen.run.request import Request

    keys = [Request(prompt="a cat", upscale=factor) for factor in (1.5, 2.0)]
    with pytest.raises(RequestError, match="upscale differs between two keyframes and has no way between"):
        pipe.interpolate(keys, frames=3, seed=1)
