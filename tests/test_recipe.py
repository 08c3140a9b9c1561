"""Recipes in files: what goes in comes back, whatever the words and the format, and what a stranger wrote into a file does no harm."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from test_save import gradient

from latentgen.errors import ImageError, RequestError
from latentgen.pixels.save import MAX_TEXT, read_metadata, save_image
from latentgen.run.foreign.read import Foreign
from latentgen.run.recipe import KEY, Recipe, as_recipe, make_recipe, metadata, picture_hash, read_recipe

SUFFIXES = (".png", ".jpg", ".webp")
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=300)
options = st.fixed_dictionaries({"negative_prompt": words}, optional={
    "steps": st.integers(2, 40), "guidance_scale": st.floats(1.01, 100), "guidance_rescale": st.floats(0, 1), "seed": st.integers(0, 2**63 - 65),
    "width": st.sampled_from([48, 64, 96]), "guidance_interval": st.sampled_from([(0, 1), (0.1, 0.9), [0.25, 0.5]]), "batch": st.integers(1, 64),
    "sampler": st.sampled_from(["ddim", "euler", "dpmpp_2m"]), "spacing": st.sampled_from(["karras", "trailing"])})
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(prompt=words, said=options)
@quick
def test_a_recipe_comes_back_from_its_file(pipe, tmp_path_factory, suffix, prompt, said):
    plan = pipe.plan(prompt, **said)
    recipe = make_recipe(plan, "0123456789abcdef", plan.notes)
    path = save_image(gradient(), tmp_path_factory.getbasetemp() / f"recipe{suffix}", metadata=metadata(recipe, plan.seeds[0], gradient()))
    found = read_recipe(path)
    expected = json.loads(json.dumps({k: v for k, v in recipe.items() if k != "batch"} | {"pixels_sha256": picture_hash(gradient())}))
    assert isinstance(found, Recipe) and found.data == expected and found.notes == plan.notes and found.needs == ()
    again = pipe.plan(found.request(batch=said.get("batch", 1)))
    assert {**make_recipe(again, "0123456789abcdef", again.notes)} == recipe  # and it means the same


def test_it_is_read_from_a_path_from_bytes_and_from_an_open_image(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        path = save_image(gradient(), tmp_path / f"a{suffix}",
                          metadata={KEY: '{"prompt": "ü", "seed": 3}', "parameters": "ü\nSteps: 2, Seed: 3, Size: 8x8"})
        with Image.open(path) as image:
            for source in (path, str(path), path.read_bytes(), image):
                found = as_recipe(source)
                assert isinstance(found, Recipe) and found.fields == {"prompt": "ü", "seed": 3}


def test_every_field_that_was_said_is_in_the_recipe(pipe):
    """Also one that a later version adds: only pictures are left out, and whatever is no plain value, such as a path."""
    plan = pipe.plan("a cat", clip_skip=1, guidance_interval=(0.2, 0.8), denoising_end=0.5, strict=False, prompt_2="dog", batch=3, seed=5)
    recipe = make_recipe(plan, "d", ())
    assert recipe["denoising_end"] == 0.5 and recipe["strict"] is False and recipe["prompt_2"] == "dog" and recipe["batch"] == 3
    assert "clip_skip" not in recipe and "width" in recipe and recipe["device"] == "cpu" and set(recipe["versions"]) == {"latentgen", "torch",
        "kernels"}
    assert len({make_recipe(pipe.plan("a", spacing=s, seed=0), "d", ())["levels_sha256"] for s in ("karras", "trailing", "leading")}) == 3


def text_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(chunk: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    buffer = io.BytesIO()
    gradient().save(buffer, "PNG")
    return buffer.getvalue()[:33] + chunk + buffer.getvalue()[33:]


def test_a_packed_bomb_is_an_error_not_a_gigabyte() -> None:
    bomb = zlib.compress(b"a" * (64 * 2**20))
    for chunk in (text_chunk(b"zTXt", KEY.encode() + b"\0\0" + bomb), text_chunk(b"iTXt", KEY.encode() + b"\0\1\0\0\0" + bomb)):
        with pytest.raises(ImageError, match="cannot be read"):
            read_recipe(with_chunk(chunk))


def test_texts_have_a_limit(tmp_path: Path) -> None:
    long = "a" * (MAX_TEXT + 1)
    with pytest.raises(RequestError, match="at most 1,048,576"):
        save_image(gradient(), tmp_path / "a.png", metadata={"x": long})
    found = read_metadata(with_chunk(text_chunk(b"tEXt", b"x\0" + long.encode()) + text_chunk(b"tEXt", b"y\0short")))
    assert found == {"y": "short"}


@pytest.mark.parametrize("damaged", ["", "{", "[1]", "null", "3", '{"a": ' * 20_000, "[" * 100_000, "\x7f", '{"seed": ' + "9" * 6000 + "}"],
                         ids=lambda text: text[:9])
def test_a_damaged_recipe_is_said_and_the_other_text_is_read(damaged: str, tmp_path: Path) -> None:
    path = save_image(gradient(), tmp_path / "a.png", metadata={KEY: damaged})
    with pytest.raises(ImageError, match="recipe is damaged"):
        read_recipe(path)
    path = save_image(gradient(), tmp_path / "a.png",
                      metadata={KEY: damaged, "parameters": "cat\nSteps: 2, Seed: 3, Size: 8x8, Version: latentgen 1"})
    found = read_recipe(path)
    assert isinstance(found, Foreign) and found.fields["seed"] == 3 and "damaged" in found.notes[-1]


@pytest.mark.parametrize("data", [{}, {"prompt": 3}, {"prompt": "a", "steps": "20"}, {"prompt": "a", "steps": -1},
                                  {"prompt": "a", "guidance_scale": float("nan")},
                                  {"prompt": "a", "notes": 3, "versions": [], "task": {}}, {"prompt": "a", "guidance_interval": [1, 0]}], ids=str)
def test_an_altered_recipe_makes_no_request_that_could_not_be_said(data: dict, tmp_path: Path) -> None:
    found = read_recipe(save_image(gradient(), tmp_path / "a.png", metadata={KEY: json.dumps(data)}))
    assert isinstance(found, Recipe) and found.tool.startswith("latentgen") and found.notes == ()
    if data.keys() & {"steps", "guidance_scale", "guidance_interval"} or data.get("prompt") == 3:
        with pytest.raises(RequestError, match="expected"):
            found.request()
    else:
        assert found.request().prompt == data.get("prompt", "")


def test_a_file_never_names_a_file_to_be_opened(tmp_path: Path) -> None:
    data = {"prompt": "a", "image": "/etc/hostname", "mask": "x.png", "reference": ["y.png"], "latents": [1]}
    found = read_recipe(save_image(gradient(), tmp_path / "a.png", metadata={KEY: json.dumps(data)}))
    assert isinstance(found, Recipe) and found.fields == {"prompt": "a"} and found.request().task == "txt2img"


def test_a_picture_without_words(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.png")
    assert read_recipe(tmp_path / "a.png") is None and read_recipe(gradient()) is None
    with pytest.raises(ImageError, match="says nothing of how it was made"):
        as_recipe(tmp_path / "a.png")
    with pytest.raises(RequestError, match="a int was given"):
        as_recipe(3)
    for bad in (b"", b"\x89PNG\r\n\x1a\n", tmp_path, tmp_path / "no.png"):
        with pytest.raises(ImageError, match="cannot be read"):
            read_recipe(bad)


def test_a_jpeg_whose_words_do_not_all_fit_keeps_the_recipe(tmp_path: Path) -> None:
    """The text for other programs only repeats it; PNG and WebP have room for both."""
    recipe = {"prompt": "漢" * 9_000, "seed": 1, "steps": 2}
    for suffix, both in ((".png", True), (".webp", True), (".jpg", False)):
        texts = read_metadata(save_image(gradient(), tmp_path / f"a{suffix}", metadata=metadata(recipe, 1)))
        assert json.loads(texts[KEY])["prompt"] == recipe["prompt"] and ("parameters" in texts) is both


def test_a_text_behind_the_pixels_is_found(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.png", pnginfo=PngImagePlugin.PngInfo())
    data = (tmp_path / "a.png").read_bytes()
    assert read_metadata(data[:-12] + text_chunk(b"tEXt", b"latentgen\0{}") + data[-12:]) == {KEY: "{}"}
