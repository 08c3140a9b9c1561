"""Approximations in requests: refused where a model has no such blocks, shown in the plan, kept in the recipe, their savings told in the result."""

import json

import numpy as np
import pytest
import torch
from tiny_folders import tiny
from typer.testing import CliRunner

import latentgen
from latentgen.cli import app
from latentgen.errors import RequestError
from latentgen.models.approximate.table import APPROXIMATIONS
from latentgen.run.recipe import read_recipe

STACKED = ("flux1", "flux2", "sd3", "zimage", "qwenimage", "pixart")
DEEP = ("sd15", "sd21", "sdxl")
EXACT = {"first_block": {"threshold": 0}, "taylor": {"interval": 1}, "tea_cache": {"threshold": 0}}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    made = {}

    def load(kind):
        if kind not in made:
            made[kind] = latentgen.load(tiny(kind).save(tmp_path_factory.mktemp(kind)), dtype="float32", device="cpu", progress=False)
        return made[kind]

    return load


def make(pipe, **said):
    pair = {"guidance_scale": 4.0} if pipe.family.guidance == "cfg" else {"true_cfg_scale": 3.0}
    return pipe.txt2img("a red heart", **{"steps": 6, "seed": 1, "width": 64, "height": 64} | pair | said)


def blocks_run(pipe, **said):
    """(result, how often each block ran), counted on the shared network."""
    from latentgen.models.approximate.stack import block_names

    with pipe.residency.use("denoiser") as modules:
        (net,) = modules.values()
    calls = dict.fromkeys(block_names(net), 0)
    hooks = [net.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1})) for name in calls]
    made = make(pipe, **said)
    for hook in hooks:
        hook.remove()
    return made, calls


@pytest.mark.parametrize("kind", STACKED)
@pytest.mark.parametrize("name", EXACT)
def test_asked_for_nothing_the_picture_is_the_exact_one(load, kind, name):
    pipe = load(kind)
    assert torch.equal(make(pipe, approximate={name: EXACT[name]}).latents, make(pipe).latents)


@pytest.mark.parametrize("kind", STACKED)
def test_blocks_of_every_transformer_are_reused(load, kind):
    """Of six levels Taylor with two at first computes levels 1, 2 and 4 and 6; every block is left out in the other two, on each side."""
    pipe = load(kind)
    made, calls = blocks_run(pipe, approximate={"taylor": {"interval": 2, "warmup": 2}})
    _, plain = blocks_run(pipe)
    each = plain[next(iter(plain))]
    assert set(plain.values()) == {each} and set(calls.values()) == {each * 4 // 6}
    assert f"taylor: {each * len(calls) * 2 // 6} of {each * len(calls)} block passes were reused" in made.notes
    exact = make(pipe)
    assert 0 < (made.latents - exact.latents).abs().max()


@pytest.mark.parametrize("kind", STACKED)
def test_a_high_threshold_reuses_all_it_may(load, kind):
    """The first block then runs in every call of the network, the others in the first alone."""
    pipe = load(kind)
    made, calls = blocks_run(pipe, approximate={"first_block": {"threshold": 1.0}})
    first, *others = calls.values()
    assert torch.isfinite(made.latents).all() and all(0 < n < first for n in others)
    made, calls = blocks_run(pipe, approximate={"tea_cache": {"threshold": 2.0}})
    assert all(0 < n < first for n in calls.values())


@pytest.mark.parametrize("kind", DEEP)
def test_deep_cache_of_every_unet(load, kind):
    pipe = load(kind)
    exact = make(pipe)
    assert torch.equal(make(pipe, approximate={"deep_cache": {"interval": 1}, "token_merging": {"ratio": 0}}).latents, exact.latents)
    for layers in (1, 2):
        made = make(pipe, approximate={"deep_cache": {"interval": 2, "layers": layers}})
        assert torch.isfinite(made.latents).all() and not torch.equal(made.latents, exact.latents)
        note = next(note for note in made.notes if note.startswith("deep_cache"))
        saved, whole = (int(word) for word in note.split() if word.isdigit())
        assert 0 < saved < whole / 2


@pytest.mark.parametrize(("kind", "name"), [*((kind, "deep_cache") for kind in STACKED), ("pixart", "token_merging"), *((kind, "first_block") for kind in DEEP)])
def test_refused_by_name_where_there_are_no_such_blocks(load, kind, name):
    pipe = load(kind)
    with pytest.raises(RequestError, match=f"{name} is given but works on"):
        pipe.plan("a cat", approximate=name)
    plan = pipe.plan("a cat", approximate=name, strict=False)
    assert not plan.approximate and any(note.startswith(f"ignored: {name}") for note in plan.notes)


@pytest.mark.parametrize(("said", "problem"), [
    ("deepcache", "did you mean 'deep_cache'"), ("tome", "did you mean 'token_merging'"), ("TeaCache", "did you mean 'tea_cache'"),
    ("fbcache", "did you mean 'first_block'"), ("taylor_seer", "did you mean 'taylor'"), ("nonsense!", "the approximations are first_block"), ({"deep_cache": {"intervall": 3}}, "no such option"), ({"deep_cache": {"interval": 0}}, "from 1 to 20"),
    ({"deep_cache": {"interval": 2.5}}, "a whole number"), ({"token_merging": {"ratio": 0.9}}, "from 0 to 0.75"), (3, "expected names of approximations"),
    ([], "expected names of approximations"), (["deep_cache", "deep_cache"], "expected names of approximations")])
def test_what_cannot_be_is_refused_while_planning(pipe, said, problem):
    with pytest.raises(RequestError, match=problem):
        pipe.plan("a cat", approximate=said)


def test_the_command_tells_of_one():
    def run(*words):
        return CliRunner().invoke(app, ("approximations", *words))

    one = run("deep_cache").stdout
    assert one.startswith("approximation         deep_cache\n") and "\nworks on              " in one and "interval" in one and "token_merging" not in one
    assert json.loads(run("tea_cache", "--json").stdout) in json.loads(run("--json").stdout)
    assert all(name in run().stdout for name in APPROXIMATIONS)
    missing = run("tome")
    assert (missing.exit_code, missing.stderr) == (2, f"error: unknown approximation 'tome': did you mean 'token_merging'? the approximations are {', '.join(APPROXIMATIONS)}.\n")


def test_two_for_the_same_work_are_refused(load):
    with pytest.raises(RequestError, match="taylor and first_block both decide"):
        load("flux1").plan("a cat", approximate=["taylor", "first_block"])


@pytest.mark.parametrize("word", ["deepcache", "teacache", "tome_ratio", "cache_config"])
def test_words_of_other_programs_lead_here(pipe, word):
    with pytest.raises(RequestError, match="did you mean 'approximate'"):
        pipe.plan("a cat", **{word: 1})


def test_the_plan_shows_it_with_all_options(pipe):
    plan = pipe.plan("a cat", approximate=["token_merging", {"deep_cache": {"interval": 4}}])
    assert "approx    deep_cache interval 4 layers 1, token_merging ratio 0.5 deepest 1" in str(plan)
    assert "approx" not in str(pipe.plan("a cat"))


def test_a_recipe_makes_the_same_picture_again(pipe, tmp_path):
    made = pipe.txt2img("a cat", steps=4, seed=3, approximate={"deep_cache": {"interval": 2}})
    (file,) = made.save(tmp_path / "cat.png")
    found = read_recipe(file)
    assert found.fields["approximate"] == {"deep_cache": {"interval": 2, "layers": 1}}
    json.dumps(found.data)
    again = pipe.replay(file)
    assert again.identical
    assert any("deep_cache" in note for note in again.result.notes)


def test_each_run_begins_anew_and_pictures_do_not_depend_on_their_batch(pipe):
    said = {"steps": 4, "approximate": {"deep_cache": {"interval": 2}, "token_merging": {}}}
    pair = pipe.txt2img("a cat", seed=3, batch=2, **said)
    alone = pipe.txt2img("a cat", seed=4, **said)
    assert torch.equal(pair.latents[1:], alone.latents)
    assert torch.equal(pipe.txt2img("a cat", seed=3, batch=2, **said).latents, pair.latents)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_sde", "dpmpp_2m"])
def test_with_samplers_that_ask_twice_and_a_guidance_interval(pipe, sampler):
    said = {"steps": 5, "seed": 1, "sampler": sampler, "guidance_interval": (0.3, 0.8)}
    made = pipe.txt2img("a cat", approximate={"deep_cache": {"interval": 2}}, **said)
    exact = pipe.txt2img("a cat", **said)
    assert torch.isfinite(made.latents).all() and not torch.equal(made.latents, exact.latents)
    assert torch.equal(pipe.txt2img("a cat", approximate={"deep_cache": {"interval": 1}}, **said).latents, exact.latents)


def test_a_picture_that_adapts_goes_alone(load):
    pipe = load("flux1")
    machine = pipe._machine
    from dataclasses import replace

    from latentgen.run.plan import make_plan
    from latentgen.run.request import Request

    for name, rows in (("taylor", 3), ("first_block", 1)):
        plan = make_plan(Request(prompt="a cat", batch=3, approximate=name), pipe.family, pipe.checkpoint.tokenizers, replace(machine, device="cuda"))
        assert plan.rows == rows


def psnr(a, b):
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return 10 * np.log10(255**2 / max(float((difference**2).mean()), 1e-12))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "least"), [("deep_cache", {"interval": 2}, 20.0), ("token_merging", {"ratio": 0.25, "deepest": 8}, 20.0)])
def test_quality_on_a_trained_model(name, options, least):
    """glyph's own weights: how near to the exact picture an approximation stays."""
    glyph = latentgen.load("glyph", dtype="float32", device="cpu", progress=False)
    exact = glyph.txt2img("a red heart", seed=1)
    made = glyph.txt2img("a red heart", seed=1, approximate={name: options})
    assert psnr(made.image, exact.image) > least


@pytest.mark.parametrize(("kind", "chosen"), [("flux1", {"first_block": {"threshold": 1.0}}), ("pixart", {"tea_cache": {"threshold": 2.0}}),
                                              ("sd15", {"deep_cache": {"interval": 2}, "token_merging": {}})])
def test_where_weights_come_block_by_block_it_is_the_same(load, tmp_path, kind, chosen):
    streamed = latentgen.load(tiny(kind).save(tmp_path / kind), dtype="float32", device="cpu", progress=False, residency="stream")
    made, resident = make(streamed, approximate=chosen), make(load(kind), approximate=chosen)
    assert torch.equal(made.latents, resident.latents) and made.notes == resident.notes


def test_every_approximation_is_tried_here():
    assert {*EXACT, "deep_cache", "token_merging"} == set(APPROXIMATIONS)


def test_each_window_of_a_tiled_run_remembers_its_own_and_the_note_counts_all(pipe):
    said = {"steps": 4, "seed": 1, "width": 96, "height": 64, "tile": 64, "strict": False}
    exact = pipe.txt2img("a cat", **said)
    assert torch.equal(pipe.txt2img("a cat", approximate={"deep_cache": {"interval": 1}}, **said).latents, exact.latents)
    made = pipe.txt2img("a cat", approximate={"deep_cache": {"interval": 2}}, **said)
    whole = pipe.txt2img("a cat", approximate={"deep_cache": {"interval": 2}}, **said | {"width": 64, "tile": None})
    (note,) = (note for note in made.notes if note.startswith("deep_cache"))
    (one,) = (note for note in whole.notes if note.startswith("deep_cache"))
    windows = len(made.plan.passes[0].grid.windows)
    assert windows > 1 and [int(n) for n in note.split() if n.isdigit()] == [windows * int(n) for n in one.split() if n.isdigit()]
