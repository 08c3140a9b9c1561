"""Styles and wildcards from a request to the picture: drawn for each picture by its own seed, shown, and replayed from the words that they came to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import latentgen
from latentgen.cli import app
from latentgen.conditioning.wildcards import expand
from latentgen.errors import RequestError
from latentgen.pixels.save import PARAMETERS, read_metadata
from latentgen.run.parameters import read_parameters
from latentgen.run.recipe import KEY, read_recipe
from latentgen.run.request import Request

STYLES = """
[flat]
prompt = "{prompt}, flat, {soft|crisp} shading"
negative = "dark"

[blue]
prompt = "blue"
"""
SAID = "a {red|green|blue|2::white} __animal__"


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secret-place") / "lists"
    folder.mkdir()
    (folder / "animal.txt").write_text("cat\ndog\nhouse\ntree {old|young}\n")
    (folder / "nul.txt").write_text("no\0")
    (folder / "styles.toml").write_text(STYLES)
    return folder


def text_of(plan, at: int = 0) -> str:
    return (plan.pictures or (plan,))[at].prompt.text


def test_each_picture_draws_by_its_own_seed(pipe, lists: Path) -> None:
    """The oracle is `expand` itself, for the seed of each picture; and a picture of a batch is the picture that its seed gives alone."""
    made = pipe.txt2img(SAID, negative_prompt="{ugly|dark}", seed=3, batch=4, wildcards=lists, steps=2)
    texts = [text_of(made.plan, at) for at in range(4)]
    assert texts == [expand(SAID, seed=3 + at, folder=lists).text for at in range(4)] and len(set(texts)) > 1
    assert [plan.negative.text for plan in made.plan.pictures] == [expand("{ugly|dark}", seed=3 + at, name="negative_prompt").text for at in range(4)]
    for at in range(4):
        alone = pipe.txt2img(SAID, negative_prompt="{ugly|dark}", seed=3 + at, wildcards=str(lists), steps=2)
        drawn = pipe.txt2img(texts[at], negative_prompt=made.plan.pictures[at].negative.text, seed=3 + at, steps=2)
        assert made.images[at].tobytes() == alone.image.tobytes() == drawn.image.tobytes()
    listed = pipe.txt2img(SAID, negative_prompt="{ugly|dark}", seed=[6, 3], wildcards=lists, steps=2)
    assert [image.tobytes() for image in listed.images] == [made.images[at].tobytes() for at in (3, 0)]


def test_where_all_draw_the_same_or_nothing_there_is_one_text(pipe, lists: Path) -> None:
    assert pipe.plan("a cat", batch=4).pictures == () and pipe.plan("{a|a} cat", batch=4, seed=1).pictures == ()
    assert pipe.plan("{a|a} cat", batch=4, seed=1).request.prompt == "a cat"
    request = Request(prompt="a cat", batch=3, seed=1)
    assert pipe.plan(request).request is request and pipe.plan(request).origin == {}
    assert pipe.plan("a {cat|cat}", strict=True).seeds[0] >= 0


def test_texts_of_one_batch_may_be_of_any_kind(pipe, lists: Path) -> None:
    """One picture of a batch may join prompts by AND, another turn in the middle, a third need two chunks: each is as it is alone."""
    said = "{a red heart AND a cat :0.5|[cat:dog:0.5]|" + "green tree, " * 20 + "}"
    seeds = [next(seed for seed in range(99) if mark in expand(said, seed=seed).text) for mark in ("AND", "[", "green")]
    made = pipe.txt2img(said, seed=seeds, steps=2)
    assert [plan.prompt.composed for plan in made.plan.pictures] == [2, 1, 1] and len(made.plan.pictures[2].prompt.ids) > 1
    assert made.plan.evaluations == 6 and "seed" in str(made.plan)
    for at, seed in enumerate(seeds):
        assert made.images[at].tobytes() == pipe.txt2img(said, seed=seed, steps=2).image.tobytes()


def test_edits_and_variations_of_a_batch(pipe, lists: Path) -> None:
    image = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    for extra in ({"image": image, "strength": 0.5}, {"image": image, "mask": mask}, {"left": 16, "image": image}, {"sampler": "euler_ancestral"}, {"upscale": 1.5},
                  {"guiders": {"apg": {"momentum": -0.5}, "perp_neg": {}}, "negative_prompt": "{dark|grey}"}):
        made = pipe.stream(Request(prompt=SAID, seed=1, batch=3, wildcards=lists, steps=2, **extra)).result
        assert len({id(plan.source) for plan in made.plan.pictures}) == 1  # held once, however large the batch
        for at in range(3):
            assert made.images[at].tobytes() == pipe.stream(Request(prompt=SAID, seed=1 + at, wildcards=lists, steps=2, **extra)).result.image.tobytes()
    varied = pipe.txt2img(SAID, seed=1, variation_seed=5, variation_strength=0.3, batch=2, wildcards=lists, steps=2)
    assert varied.plan.pictures == () and varied.plan.noise.variations == (5, 6)  # they share the seed, and so the words
    half = pipe.txt2img("{red|blue} heart", seed=[1, 2, 3, 4], denoising_end=0.5, steps=2)
    rest = pipe.txt2img("{red|blue} heart", seed=[1, 2, 3, 4], denoising_start=0.5, latents=half.latents, steps=2)
    assert torch.equal(rest.latents[1:2], pipe.txt2img("{red|blue} heart", seed=2, denoising_start=0.5, latents=half.latents[1:2], steps=2).latents)


def test_a_file_tells_the_words_and_needs_no_folder(pipe, tiny_folder: Path, lists: Path, tmp_path: Path) -> None:
    made = pipe.txt2img(SAID, seed=3, batch=3, wildcards=lists, styles=["flat", "blue"], styles_file=lists / "styles.toml", steps=2)
    other = latentgen.load(tiny_folder, dtype="float32", device="cpu", progress=False)
    for at, file in enumerate(made.save(tmp_path / "a.png")):
        texts = read_metadata(file)
        assert all("secret-place" not in text and "lists" not in text for text in texts.values())
        data = json.loads(texts[KEY])
        assert data["prompt"] == made.plan.pictures[at].prompt.text and data["negative_prompt"] == "dark"
        assert data["template"] == {"prompt": SAID, "negative_prompt": ""} and data["styled_with"] == ["flat", "blue"] and len(data["drawn"]) >= 3
        read = read_parameters(texts[PARAMETERS])
        assert read.prompt == data["prompt"] and read.settings["Template"] == SAID and read.settings["Styles"] == "flat, blue"
        assert other.replay(file).identical and not other.replay(file).differences
        request = read_recipe(file).request()
        assert request.prompt == data["prompt"] and not request.styles and request.styles_file is None
    assert made.recipe["cells"][1]["prompt"] == made.plan.pictures[1].prompt.text


def test_braces_that_were_drawn_are_text(pipe, tmp_path: Path) -> None:
    """What was escaped, or drawn from a list, is not drawn a second time."""
    (tmp_path / "odd.txt").write_text("\\{cat\\|dog\\}\n")
    plan = pipe.plan(r"a \{red|blue\} __odd__", seed=1, wildcards=tmp_path)
    assert plan.prompt.text == "a {red|blue} {cat\\|dog}"
    [file] = pipe.txt2img(r"a \{red|blue\} heart", seed=1, steps=2).save(tmp_path / "a.png")
    assert read_recipe(file).request().prompt == "a {red|blue} heart" and pipe.replay(file).identical
    plain = pipe.txt2img("a {red|blue} heart", dialect="plain", seed=1, steps=2)
    assert plain.plan.prompt.text == "a {red|blue} heart" and plain.recipe["prompt"] == "a {red|blue} heart"
    assert pipe.plan("a {red|blue} heart", wildcards=False).prompt.text == "a {red|blue} heart"
    [file] = plain.save(tmp_path / "b.png")
    assert pipe.replay(file).identical


def test_old_recipes_and_those_of_others_draw_nothing() -> None:
    from latentgen.run.foreign.read import Foreign
    from latentgen.run.recipe import Recipe

    assert Recipe({"prompt": "{a|b}", "dialect": "a1111"}).request().wildcards is False
    assert Foreign("A1111", {"prompt": "{a|b}"}).request().wildcards is False


def test_a_file_from_elsewhere_names_no_place_that_is_read(pipe, lists: Path) -> None:
    """A picture from anywhere may claim to have been made with a folder or file of this machine: neither is looked at."""
    from latentgen.run.recipe import Recipe

    recipe = Recipe({"prompt": "a __animal__", "dialect": "a1111", "wildcards": str(lists), "styles": ["flat"], "styles_file": str(lists / "styles.toml")})
    request = recipe.request()
    assert (request.wildcards, request.styles, request.styles_file) == (False, (), None) and not {"wildcards", "styles", "styles_file"} & {*recipe.fields}
    assert pipe.plan(request).prompt.text == "a __animal__"
    assert pipe.plan(recipe.request(wildcards=lists, seed=1)).prompt.text == expand("a __animal__", seed=1, folder=lists).text  # where the caller says so


def test_styles(pipe, lists: Path) -> None:
    styles = {"styles_file": str(lists / "styles.toml"), "seed": 2}
    plan = pipe.plan("a cat", styles="flat", **styles)
    assert plan.prompt.text == expand("a cat, flat, {soft|crisp} shading", seed=2).text and plan.negative.text == "dark"
    assert pipe.plan("a cat", negative_prompt="grey", styles=("flat",), **styles).negative.text == "grey, dark"
    assert pipe.plan("a cat", styles=["blue"], **styles).prompt.text == "a cat, blue" and pipe.plan("a cat", styles=["blue"], **styles).negative.text == ""
    assert pipe.plan("a cat", styles=["flat"], dialect="plain", **styles).prompt.text == "a cat, flat, {soft|crisp} shading"
    assert "flat, " in str(plan) and "{soft|crisp} -> " in str(plan) and plan.origin["template"] == {"prompt": "a cat", "negative_prompt": ""}


@pytest.mark.parametrize(("said", "message"), [
    ({"styles": ["flt"], "styles_file": "styles.toml"}, "style 'flt' is not known: did you mean 'flat'"),
    ({"styles": ["flat"]}, "there is no file of styles: pass styles_file"),
    ({"styles_file": "styles.toml"}, "no style of it is asked for: pass styles .there is 'blue', 'flat'"),
    ({"styles": ["flat"], "styles_file": "no.toml"}, "are not there"), ({"styles": [3]}, "styles is .*: expected names of styles"),
    ({"styles": 3}, "styles is 3: expected names"), ({"wildcards": True}, "wildcards is True: expected a folder"),
    ({"wildcards": ""}, "wildcards is '': expected a folder"), ({"styles_file": 3}, "styles_file is 3: expected a TOML"),
    ({"prompt": "__nothing__", "wildcards": "."}, "has no list nothing.txt"), ({"prompt": "__animal__", "wildcards": "no"}, "which is no folder"),
    ({"prompt": "{0::a|0::b}"}, "weight 0"), ({"prompt": "{a|b}", "wildcards": ".", "dialect": "plain"}, "in the dialect 'plain' nothing is syntax"),
    ({"prompt": "__nul__", "wildcards": "."}, "prompt has a NUL character at position 2"),
    ({"negative_prompt": "__animal__", "guidance_scale": 1.0, "wildcards": "."}, "negative_prompt is given but guidance_scale is 1"),
], ids=str)
def test_what_cannot_be_drawn_is_said_while_planning(pipe, lists: Path, said: dict, message: str) -> None:
    places = {name: lists / place for name in ("styles_file", "wildcards") if isinstance(place := said.get(name), str) and place}
    for ask in (pipe.plan,) if "negative_prompt" in said else (pipe.plan, pipe.explain):  # which reads the prompt alone
        with pytest.raises(RequestError, match=message):
            ask(Request(**{"prompt": "a cat", "seed": 1} | said | places))


def test_notes(pipe, lists: Path) -> None:
    assert any("__animal__ is read as text: give a folder" in note for note in pipe.plan("a __animal__").notes)
    assert any("no text has anything to draw" in note for note in pipe.plan("a cat", wildcards=lists).notes)
    loose = pipe.plan("{a|b} cat", wildcards=lists, dialect="plain", strict=False)
    assert any(note.startswith("ignored: wildcards") for note in loose.notes) and loose.prompt.text == "{a|b} cat"


def test_a_run_that_is_kept(pipe, lists: Path, tmp_path: Path) -> None:
    whole = pipe.txt2img(SAID, seed=3, wildcards=lists, steps=2)
    run = pipe.stream(SAID, seed=3, wildcards=lists, steps=2, save_state=tmp_path / "run.state", save_every=1)
    next(iter(run))
    run.close()
    resumed = pipe.resume(tmp_path / "run.state")
    assert resumed.image.tobytes() == whole.image.tobytes() and resumed.recipe == whole.recipe and resumed.recipe["drawn"]


@pytest.mark.parametrize("more", [{}, {"seed": [3, 4, 5], "variation_seed": 5, "variation_strength": 0.3}, {"seed": [9, 2, 7]}, {"guiders": ["apg", "pag"]},
                                  {"image": Image.new("RGB", (64, 64), "teal"), "strength": 0.7, "upscale": 1.5}], ids=lambda more: "-".join(more))
def test_a_batch_of_different_texts_that_is_kept(pipe, lists: Path, tmp_path: Path, more: dict) -> None:
    said = {"seed": 3, "batch": 3, "wildcards": lists, "steps": 3, "negative_prompt": "{dark|grey|old}"} | more
    said = said if isinstance(said["seed"], int) else {name: value for name, value in said.items() if name != "batch"}
    whole = pipe.txt2img(SAID, **said) if "image" not in more else pipe.img2img(SAID, **said)
    assert len(whole.plan.pictures) == 3 and len({plan.prompt.text for plan in whole.plan.pictures}) > 1
    run = pipe.stream(SAID, **said, save_state=tmp_path / "run.state", save_every=1)
    next(iter(run))
    run.close()
    resumed = pipe.resume(tmp_path / "run.state")
    assert [image.tobytes() for image in resumed.images] == [image.tobytes() for image in whole.images]
    assert resumed.seeds == whole.seeds and [one.prompt.text for one in resumed.plan.pictures] == [one.prompt.text for one in whole.plan.pictures]
    assert resumed.recipe == whole.recipe and not [note for note in resumed.notes if "differ" in note]


def test_latents_of_different_texts_are_not_kept(pipe, lists: Path, tmp_path: Path) -> None:
    latents = pipe.txt2img(SAID, seed=3, batch=2, steps=2, denoising_end=0.5).latents
    with pytest.raises(RequestError, match="different texts for the latents of this batch"):
        pipe.txt2img(SAID, seed=3, batch=2, steps=2, wildcards=lists, latents=latents, denoising_start=0.5, save_state=tmp_path / "run.state")


def test_explain_shows_what_is_drawn(pipe, lists: Path) -> None:
    drawn = expand(SAID, seed=7, folder=lists)
    told = pipe.explain(SAID, seed=7, wildcards=lists)
    assert told.text == drawn.text and told.drawn == drawn.drawn and all(f"drawn     {draw}" in str(told) for draw in drawn.drawn)
    assert pipe.explain("{a|b} cat").text == expand("{a|b} cat", seed=0).text and "-&gt;" in pipe.explain("{a|b} cat")._repr_html_()


def test_the_commands(tiny_folder: Path, lists: Path, tmp_path: Path) -> None:
    words = ["--wildcards", str(lists), "--style", "flat", "--styles-file", str(lists / "styles.toml"), "--seed", "3", "--model", str(tiny_folder)]
    drawn = expand("a __animal__, flat, {soft|crisp} shading", seed=3, folder=lists).text
    done = CliRunner().invoke(app, ["explain", "a __animal__", *words])
    assert done.exit_code == 0 and f"prompt 1  '{drawn}'" in done.stdout and "__animal__ -> " in done.stdout
    done = CliRunner().invoke(app, ["txt2img", "a __animal__", *words, "--steps", "1", "--batch", "2", "-q", "-o", str(tmp_path)])
    assert done.exit_code == 0 and len(done.stdout.split()) == 2 and drawn.split()[1].strip(",") in Path(done.stdout.split()[0]).name
    done = CliRunner().invoke(app, ["plan", "a __animal__", *words, "--batch", "3", "--json"])
    assert json.loads(done.stdout)["prompt"]["texts"][0] == drawn
    done = CliRunner().invoke(app, ["plan", "a cat", "--style", "flat", "--model", str(tiny_folder)])
    assert done.exit_code == 2 and "styles_file" in done.stderr


def test_a_sheet_over_styles(pipe, lists: Path) -> None:
    made = pipe.grid("a cat", x={"styles": [["flat"], ["blue"]]}, seed=1, steps=1, styles_file=lists / "styles.toml")
    assert [result.plan.prompt.text for result in made.results][1] == "a cat, blue"
    with pytest.raises(RequestError, match="which no cell can have of its own"):
        pipe.grid("a __animal__", x={"wildcards": [str(lists)]}, seed=1)
