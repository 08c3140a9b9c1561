"""Guiders in a request: what runs, what is counted, refused and written down; PAG and SLG as the stock pipelines run them."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image
from test_family_sd15 import PROMPT, agree, both, make_folder, stock, tiny_unet
from tiny import tiny_clip
from tiny_folders import tiny
from typer.testing import CliRunner

import latentgen
from latentgen.cli import app
from latentgen.diffusion.guidance.table import GUIDERS
from latentgen.errors import RequestError
from latentgen.run.recipe import read_recipe
from latentgen.run.request import Request

EVERY = [name for name in GUIDERS if name != "classifier"]
SAID = {"negative_prompt": "blue car", "guidance_scale": 4.0, "steps": 5, "seed": 3, "sampler": "euler"}


def said(name):
    """A request that this guider changes."""
    strong = {"static_threshold": {"limit": 0.5}, "dynamic_threshold": {"limit": 0.5}, "slg": {"end": 1.0}, "mimic": {"scale": 2.0, "percentile": 0.9},
              "apg": {"norm_threshold": 3.0}}
    options = {key: value for key, value in SAID.items() if key != "guidance_scale" or name != "cfg_pp"}
    return options | {"guiders": {name: strong.get(name, {})}}


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """A folder of a model that runs on a rectified flow."""
    return tiny("sd3").save(tmp_path_factory.mktemp("flow") / "it")


def counted(folder):
    """A pipeline, and the pictures that its network sees, call by call."""
    own, seen = latentgen.load(folder, dtype="float32", device="cpu", progress=False), []
    predict = own.family.predict

    def watched(modules, x, level, conditioning):
        if x.any():  # not the calls of zeros that tables are made from
            seen.append(len(x))
        return predict(modules, x, level, conditioning)

    own.family = replace(own.family, predict=watched)
    return own, seen


@pytest.mark.parametrize("name", EVERY)
def test_each_changes_the_picture_and_comes_back_from_its_recipe(pipe, name, tmp_path):
    result = pipe.txt2img("a red heart", **said(name))
    plain = pipe.txt2img("a red heart", **SAID)
    assert (result.latents - plain.latents).abs().max() > 1e-3 and torch.isfinite(result.latents).all()
    file = result.save(tmp_path / "it.png")[0]
    recipe = read_recipe(file)
    assert recipe.data["guiders"] == {name: dict(result.plan.guiders[name])} and set(recipe.data["guiders"][name]) == set(GUIDERS[name].options)
    replayed = pipe.replay(file)
    assert replayed.identical and replayed.result.image.tobytes() == result.image.tobytes()
    assert f"guiders   {name} " in str(result.plan)


@pytest.mark.parametrize("guiders", [*EVERY, ["apg", "pag", "dynamic_threshold"], ["cfg_zero", "cfg_pp", "slg", "mimic"], ["perp_neg", "apg", "pag", "slg"]], ids=str)
def test_a_batch_is_its_pictures_and_a_run_leaves_nothing_behind(pipe, guiders):
    options = {key: value for key, value in SAID.items() if key != "guidance_scale" or "cfg_pp" not in guiders} | {"guiders": guiders}
    batch = pipe.txt2img("a red heart", batch=2, **options)
    singles = [pipe.txt2img("a red heart", **options | {"seed": seed}) for seed in (3, 4)]
    assert [one.image.tobytes() for one in singles] == [image.tobytes() for image in batch.images]


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("more", [{}, {"guidance_interval": (0.2, 0.7)}, {"prompt": "a cat AND a dog :0.6"}, {"guidance_rescale": 0.5},
                                  {"image": Image.new("RGB", (64, 64), "teal"), "strength": 0.6}], ids=str)
@pytest.mark.parametrize("guiders", ["apg", "perp_neg", {"pag": {}, "slg": {"start": 0.2, "end": 0.6}}, ["perp_neg", "pag"]], ids=str)
def test_the_plan_counts_evaluations_exactly(tiny_folder, sampler, more, guiders):
    own, seen = counted(tiny_folder)
    run = own.stream(**{"request": more.get("prompt", "a cat")}, **SAID | {"sampler": sampler, "guiders": guiders} | {k: v for k, v in more.items() if k != "prompt"})
    assert run.result and sum(seen) == run.plan.evaluations


@pytest.mark.parametrize("more", [{}, {"sampler": "heun"}, {"guidance_interval": (0.2, 0.7)}, {"prompt": "a cat AND a dog :0.6"}, {"guiders": ["cfg_zero", "apg", "pag"]},
                                  {"image": Image.new("RGB", (64, 64), "teal"), "strength": 0.6}], ids=str)
def test_steps_that_stand_still_ask_no_network(flow, more):
    own, seen = counted(flow)
    options = {"request": "a cat", "seed": 3, "steps": 5, "guidance_scale": 4.0, "sampler": "euler", "width": 64, "height": 64, "guiders": {"cfg_zero": {"zero_steps": 2}}}
    run = own.stream(**options | {name if name != "prompt" else "request": value for name, value in more.items()})
    assert run.result and sum(seen) == run.plan.evaluations
    assert more or run.plan.evaluations == 2 * 3


@pytest.mark.parametrize("guiders", ["pag", [{"slg": {"end": 1.0}}, "static_threshold"], "dynamic_threshold"])
def test_some_need_no_guidance(tiny_folder, guiders):
    own, seen = counted(tiny_folder)
    run = own.stream("a cat", seed=3, steps=4, guidance_scale=1.0, guiders=guiders, **({} if guiders == "dynamic_threshold" else {"guidance_interval": (0.3, 0.9)}))
    assert run.result and sum(seen) == run.plan.evaluations and run.plan.batching == "off"
    plain = own.txt2img("a cat", seed=3, steps=4, guidance_scale=1.0)
    assert guiders == "dynamic_threshold" or (run.result.latents - plain.latents).abs().max() > 1e-4


def test_an_interval_and_rescale_hold_with_guiders(pipe):
    nowhere = pipe.txt2img("a cat", guidance_interval=(0.0, 1e-4), **SAID | {"guiders": ["apg", "pag", "slg"]})
    assert torch.equal(nowhere.latents, pipe.txt2img("a cat", seed=3, steps=5, sampler="euler", guidance_scale=1.0).latents)
    rescaled = pipe.txt2img("a cat", guidance_rescale=1.0, **SAID | {"guiders": "pag"})
    assert (rescaled.latents - pipe.txt2img("a cat", **SAID | {"guiders": "pag"}).latents).abs().max() > 1e-3


def test_apg_that_changes_nothing_is_the_plain_rule(pipe):
    same = pipe.txt2img("a cat", **SAID | {"guiders": {"apg": {"momentum": 0.0, "eta": 1.0, "norm_threshold": 0.0}}})
    torch.testing.assert_close(same.latents, pipe.txt2img("a cat", **SAID).latents, rtol=1e-4, atol=1e-4)


def test_perp_neg_with_an_empty_picture_of_the_negative_words(pipe):
    """Weight 0 leaves guidance from the empty prompt, which a request without negative words has."""
    made = pipe.txt2img("a cat", **SAID | {"guiders": {"perp_neg": {"weight": 0.0}}})
    torch.testing.assert_close(made.latents, pipe.txt2img("a cat", **{k: v for k, v in SAID.items() if k != "negative_prompt"}).latents, rtol=1e-4, atol=1e-4)
    assert made.plan.batching == "triple" and made.plan.evaluations == 15


def test_threads_with_and_without_guiders(pipe):
    wanted = {name: pipe.txt2img("a red heart", **said(name)).image.tobytes() for name in ("pag", "slg", "apg")}
    wanted[""] = pipe.txt2img("a red heart", **SAID).image.tobytes()
    found = {}

    def run(name):
        found[name] = [pipe.txt2img("a red heart", **(said(name) if name else SAID)).image.tobytes() == wanted[name] for _ in range(3)]

    threads = [threading.Thread(target=run, args=(name,)) for name in wanted]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert found == {name: [True] * 3 for name in wanted}


@pytest.mark.parametrize("options, word", [
    ({"guiders": "agp"}, "unknown guider 'agp'"), ({"guiders": ["apg", "apg"]}, "expected a guider's name"), ({"guiders": 3}, "expected a guider's name"),
    ({"guiders": {"apg": {"eta": 7}}}, "apg's eta is 7"), ({"guiders": "apg", "guidance_scale": 1.0}, "apg is given but guidance_scale is 1"),
    ({"guiders": "cfg_pp", "guidance_scale": 7.0}, "cfg_pp has a scale of its own, from 0 to 1: leave guidance_scale out"),
    ({"guiders": "cfg_pp", "guidance_scale": 1.0}, "cfg_pp has a scale of its own, from 0 to 1: leave guidance_scale out"),
    ({"guiders": "perp_neg"}, "no negative prompt"), ({"guiders": {"cfg_zero": {"zero_steps": 2}}}, "does not run on a rectified flow"),
    ({"sampler": "euler_cfg_pp"}, "did you mean 'euler' with the guider 'cfg_pp'"),
    ({"guiders": {"pag": {"layers": "mid"}}}, "pag's layer is 'mid' .* choose among down_blocks.1, mid_block, up_blocks.0"),
    ({"guiders": {"slg": {"layers": [7, 8]}}}, "slg's layer is 7"), ({"apg_eta": 0.5}, "did you mean 'guiders'"), ({"pag_scale": 3}, "did you mean 'guiders'")])
def test_what_cannot_be_honoured_is_said_while_planning(pipe, options, word):
    with pytest.raises(RequestError, match=word):
        pipe.plan("a cat", **options)


def test_not_strict_leaves_it_out_with_a_note(pipe):
    plan = pipe.plan("a cat", guiders={"perp_neg": {}, "pag": {"layers": "nowhere"}, "apg": {}}, strict=False)
    assert list(plan.guiders) == ["apg"] and sum("ignored: " in note for note in plan.notes) == 2 and plan.empty is None
    assert torch.equal(pipe.txt2img("a cat", seed=1, guiders="perp_neg", strict=False).latents, pipe.txt2img("a cat", seed=1).latents)


def test_a_guider_without_a_step_is_noted(pipe):
    note = "slg acts in none of the 4 steps: its start 0.01 and end 0.2 leave no step between them"
    assert note in pipe.plan("a cat", steps=4, guiders="slg").notes and note not in pipe.plan("a cat", steps=10, guiders="slg").notes


def test_a_guider_that_acts_in_the_second_pass_alone_is_not_noted(pipe):
    """Steps 1 and 2 of the second pass's 11 lie in slg's share, of the first pass's 4 none does."""
    second = {"upscale": 1.5, "upscale_steps": 10, "upscale_strength": 0.9}
    plan = pipe.plan("a cat", steps=4, guiders="slg", **second)
    assert not [note for note in plan.notes if "acts in none" in note]
    assert plan.evaluations == pipe.plan("a cat", steps=4, **second).evaluations + 2
    assert any("acts in none of the 5 steps" in note for note in pipe.plan("a cat", steps=4, guiders="slg", upscale=1.5, upscale_steps=1).notes)


@pytest.mark.parametrize("more", [{"steps": 2}, {"steps": 2, "sampler": "heun"}, {"steps": 2, "strict": False},
                                  {"steps": 20, "upscale": 1.5, "upscale_steps": 1, "upscale_strength": 0.5}], ids=str)
def test_a_run_of_which_nothing_moves_is_refused(flow, more):
    pipe = latentgen.load(flow, device="cpu", dtype="float32")
    options = {"request": "a cat", "guidance_scale": 4.0, "width": 64, "height": 64, "guiders": {"cfg_zero": {"zero_steps": 2}}}
    with pytest.raises(RequestError, match=r"zero_steps is 2, which leaves the network none of the \d step\(s\): give fewer"):
        pipe.plan(**options | more)
    assert pipe.plan(**options | {"steps": 3}).evaluations == 2
    assert pipe.plan(**options | {"steps": 2, "guidance_interval": (0.0, 0.9)}).evaluations > 0


def test_forms_of_a_request():
    forms = ["apg", ["apg"], {"apg": {}}, {"apg": None}, [{"apg": {}}]]
    assert {json.dumps(Request(prompt="a", guiders=form).guiders) for form in forms} == {'{"apg": {}}'}


def test_the_command_line_takes_and_lists_them(tiny_folder):
    def run(*words):
        return CliRunner().invoke(app, words)

    done = run("plan", "a cat", "-m", str(tiny_folder), "--negative", "dog", "--guider", "apg:eta=0.25,momentum=0", "--guider", "pag:layers=mid_block+up_blocks.0", "--json")
    guiders = json.loads(done.stdout)["guiders"]
    assert guiders["apg"] == {"momentum": 0, "eta": 0.25, "norm_threshold": 15.0} and guiders["pag"]["layers"] == ["mid_block", "up_blocks.0"]
    assert run("plan", "a cat", "-m", str(tiny_folder), "--guider", "apg:eta").stderr == \
        "error: --guider is 'apg:eta': expected NAME or NAME:OPTION=VALUE,OPTION=VALUE, as apg:eta=0.2\n"
    listed = run("guiders").stdout
    assert all(name in listed for name in GUIDERS) and "lambda" in run("guiders", "cfg_pp").stdout
    assert json.loads(run("guiders", "apg", "--json").stdout)["options"]["eta"]["default"] == 0.0 and "did you mean 'apg'" in run("guiders", "apgg").stderr


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd15")
    parts = make_folder(folder, "StableDiffusionPipeline", tiny_unet(), tiny_clip())
    return parts, latentgen.load(folder, dtype="float32", device="cpu", progress=False)


@pytest.mark.parametrize("layers, theirs", [("middle", "mid"), (["mid_block", "up_blocks.1"], ["mid", "up_blocks.1"])], ids=str)
@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_pag_is_that_of_the_stock_pipeline(sd15, layers, theirs, scale):
    from diffusers import StableDiffusionPAGPipeline

    parts, pipe = sd15
    plain = stock(parts)
    reference = StableDiffusionPAGPipeline(**parts, scheduler=plain.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
                                           pag_applied_layers=theirs)
    reference.set_progress_bar_config(disable=True)
    agree(*both(reference, pipe, scale=scale, stock={"pag_scale": 2.5}, ours={"guiders": {"pag": {"scale": 2.5, "layers": layers}}}), tolerance=1e-4)


def test_cfg_plus_plus_with_ddim_is_the_papers_run(sd15):
    """Algorithm 2 around the stock U-Net and DDIM's table."""
    parts, pipe = sd15
    run = pipe.stream(PROMPT, negative_prompt="blue car", guiders={"cfg_pp": {"scale": 0.7}}, sampler="ddim", steps=6, seed=3)
    states = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    x, levels = states, run.plan.levels
    words = {side: parts["text_encoder"](parts["tokenizer"](text, padding="max_length", return_tensors="pt").input_ids).last_hidden_state
             for side, text in (("positive", PROMPT), ("negative", "blue car"))}
    with torch.no_grad():
        for here, after in zip(levels, levels[1:]):
            eps = {side: parts["unet"](x, here.time, states).sample for side, states in words.items()}
            mixed = eps["negative"] + 0.7 * (eps["positive"] - eps["negative"])
            x = after.alpha * (x - here.sigma * mixed) / here.alpha + after.sigma * eps["negative"]
    torch.testing.assert_close(run.result.latents, x, rtol=0, atol=1e-4 * x.abs().max().item())


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux1", "flux2", "zimage", "qwenimage", "pixart"])
def test_weaker_networks_of_every_family_wherever_their_weights_are(tmp_path, kind):
    """Also where parts of the network stay in their file and are asked once, and where blocks come one by one."""
    (tmp_path / "it").mkdir()
    folder = tiny(kind).save(tmp_path / "it")
    said = {"seed": 1, "steps": 3, "width": 64, "height": 64, "sampler": "euler", "guiders": {"pag": {}, "slg": {"start": 0.0, "end": 1.0}}}
    pictures = [latentgen.load(folder, dtype="float32", device="cpu", progress=False, residency=residency).txt2img("a cat", **said).latents
                for residency in ("resident", "stage", "disk")]
    del said["guiders"]
    plain = latentgen.load(folder, dtype="float32", device="cpu", progress=False).txt2img("a cat", **said)
    assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[0], pictures[2])
    assert (pictures[0] - plain.latents).abs().max() > 1e-3


@pytest.mark.parametrize(("said", "row"), [
    ({}, "guidance  4 (pair)"), ({"guidance_scale": 1.0}, "guidance  off"),
    ({"guiders": "cfg_pp", "guidance_rescale": 0.7, "guidance_interval": (0.2, 0.8)}, "guidance  of cfg_pp (pair), rescale 0.7, from 0.2 to 0.8"),
    ({"split_guidance": True, "vae_tile": 64}, "told      split_guidance True, vae_tile 64")])
def test_the_plan_shows_all_that_guides(pipe, said, row):
    assert row in str(pipe.plan("a cat", **said)).splitlines()
