"""A1111's text: written so that it reads back letter by letter, also by programs that are not ours."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_save import gradient

from latentgen.pixels.save import read_metadata, save_image
from latentgen.run.foreign.read import read_foreign
from latentgen.run.parameters import read_parameters, write_parameters
from latentgen.run.recipe import metadata

RECIPE = {"prompt": "a red heart", "negative_prompt": "blurred, dark", "steps": 20, "sampler": "dpmpp_2m", "spacing": "karras", "guidance_scale": 7.5,
          "seed": 1234,
          "width": 512, "height": 768, "model": "tiny", "strength": 0.6, "clip_skip": 2, "versions": {"latentgen": "0.1.0"}}
awkward = st.lists(st.sampled_from(["Negative prompt:", "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 8x8", "\n", " ", ", ", '"', "\\",
                                    ":", "a cat", "é漢🎨",
                                    "Steps: ", "\t", "{", "(x:1.2)", "\u2028", "\r", "\x85"]), max_size=12).map("".join)
prompts = awkward | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=80)


def test_the_text() -> None:
    assert write_parameters(RECIPE) == (
        "a red heart\nNegative prompt: blurred, dark\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, "
        "Seed: 1234, Size: 512x768, Model: tiny, Denoising strength: 0.6, Clip skip: 2, Version: latentgen 0.1.0")
    built_in = write_parameters({"prompt": "", "steps": 1, "guidance_scale": 3.5, "true_cfg_scale": 1.0, "model": 'a, b: "c"'}, size=(8, 16))
    assert built_in == '\nSteps: 1, CFG scale: 1, Distilled CFG Scale: 3.5, Size: 8x16, Model: "a, b: \\"c\\"", Version: latentgen'


@given(prompt=prompts, negative=prompts, model=prompts)
@settings(max_examples=300, deadline=None)
def test_whatever_is_written_reads_back(prompt: str, negative: str, model: str) -> None:
    read = read_parameters(write_parameters(RECIPE | {"prompt": prompt, "negative_prompt": negative, "model": model}))
    assert read is not None

    def told(text: str) -> str:  # the one thing that this text cannot tell: a line of the prompt that opens as the negative prompt does
        return "\n".join(line.replace("Negative prompt:", "Negative prompt :", 1) if line.lstrip().startswith("Negative prompt:") else line
                         for line in text.split("\n"))

    assert (read.prompt, read.negative_prompt) == (told(prompt), told(negative))
    assert read.settings["Steps"] == "20" and read.settings["Version"] == "latentgen 0.1.0" and read.settings["Seed"] == "1234"
    assert read.settings["Model"] == (model if any(mark in model for mark in ',:\n"') else model.strip())


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@given(prompt=prompts.filter(lambda text: "Negative prompt:" not in text), negative=prompts.filter(lambda text: "Negative prompt:" not in text))
@settings(max_examples=20, deadline=None)
def test_it_comes_back_from_a_file_as_fields(tmp_path_factory: pytest.TempPathFactory, suffix: str, prompt: str, negative: str) -> None:
    words = metadata(RECIPE | {"prompt": prompt, "negative_prompt": negative}, 77, gradient())
    texts = read_metadata(save_image(gradient(), tmp_path_factory.getbasetemp() / f"text{suffix}", metadata=words))
    found = read_foreign({"parameters": texts["parameters"]})
    assert found is not None and found.tool == "latentgen 0.1.0" and found.model == "tiny" and found.needs == ("image",)
    expected = {"prompt": prompt, "steps": 20, "sampler": "dpmpp_2m", "spacing": "karras", "guidance_scale": 7.5, "seed": 77, "width": 24,
                "height": 16, "strength": 0.6,
                "clip_skip": 2} | ({"negative_prompt": negative} if negative else {})
    assert found.fields == expected


@pytest.mark.parametrize("text", ["", "a cat", "Steps: 20", "a\nSteps: many, Sampler: x, Seed: y",
                                  "Postprocess upscale by: 4, Postprocess upscaler: ESRGAN",
                                  "https://example.org: a, b: c, d: e"])
def test_a_text_without_settings_is_none_of_these(text: str) -> None:
    read = read_parameters(text)
    assert read is None or text == "Steps: 20"


def test_a_million_letters_are_read_in_a_moment() -> None:
    nasty = ["a" * 2**20, "a:" * 2**19, 'a:"' * 300_000, " " * 2**20, "Steps: 2," * 100_000, "\n" * 2**20, 'a: "\\"' * 100_000,
             "\nSteps:  " * 100_000,
             "Steps: 1, " + 'a: ["x' * 10_000, "Steps: 1, " + "a: {" * 10_000]
    for text in nasty:
        began = time.process_time()
        read_parameters(text)
        assert time.process_time() - began < 2, text[:20]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_reader_from_elsewhere_understands_our_files(tmp_path: Path, suffix: str) -> None:
    sd_parsers = pytest.importorskip("sd_parsers", reason="the package sd-parsers is not installed")
    prompt = 'a naïve "cat", 漢字 🎨,\nSteps: 3 in the snow'
    path = save_image(gradient(), tmp_path / f"a{suffix}", metadata=metadata(RECIPE | {"prompt": prompt}, 77, gradient()))
    found = sd_parsers.ParserManager().parse(path)
    assert found is not None and found.generator == sd_parsers.data.Generators.AUTOMATIC1111
    sampler = found.samplers[0]
    assert [p.value for p in sampler.prompts] == [prompt] and [p.value for p in sampler.negative_prompts] == ["blurred, dark"]
    assert sampler.name == "DPM++ 2M" and sampler.model.name == "tiny" and found.metadata["Size"] == "24x16"
    assert sampler.parameters == {"cfg_scale": "7.5", "scheduler": "Karras", "seed": "77", "steps": "20"}
