"""A second pass at a larger size: what it computes, worked out by hand, and what must hold of it as of any run."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_pipeline import counted, hole, picture, same
from tiny_folders import tiny

import latentgen
from latentgen.diffusion.level import noised, prediction_row
from latentgen.diffusion.noise import SeededNoise
from latentgen.errors import RequestError
from latentgen.pixels.image import to_images, to_tensor
from latentgen.pixels.latent import decode, encode
from latentgen.pixels.save import read_metadata
from latentgen.pixels.upscale import UPSCALERS, larger_latents, larger_pixels
from latentgen.run.batch import repeated
from latentgen.run.foreign.read import read_foreign
from latentgen.run.recipe import read_recipe
from latentgen.run.replay import replay
from latentgen.run.request import Request

BASE: dict[str, Any] = {"seed": 3, "steps": 5, "width": 48, "height": 64}
EULER = BASE | {"sampler": "euler", "guidance_scale": 1.0}
each_upscaler = pytest.mark.parametrize("upscaler", UPSCALERS)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Pipelines of tiny families, made when first asked for."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = latentgen.load(tiny(kind).save(tmp_path_factory.mktemp("models") / kind), dtype="float32", device="cpu", progress=False)
        return made[kind]

    return get


# Enlarging


def test_latents_grow_along_straight_lines():
    """A plane stays the plane: sample points of the larger grid lie between those of the smaller, half a latent in."""
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    large = larger_latents((2 * y + 3 * x)[None, None], (12, 16), mode="bilinear")[0, 0]
    v, u = torch.meshgrid((torch.arange(12.0) - 0.5) / 2, (torch.arange(16.0) - 0.5) / 2, indexing="ij")
    torch.testing.assert_close(large[1:-1, 1:-1], (2 * v + 3 * u)[1:-1, 1:-1])
    assert torch.equal(larger_latents(y[None, None], (12, 16), mode="nearest-exact")[0, 0], y.repeat_interleave(2, 0).repeat_interleave(2, 1))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest-exact"])
@pytest.mark.parametrize("wrap", [(2,), (3,), (2, 3)])
def test_edges_that_meet_meet_in_the_larger_one(mode, wrap):
    z = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    turns = [2 if axis in wrap else 0 for axis in (2, 3)]
    large = larger_latents(z, (12, 16), mode=mode, wrap=wrap)
    torch.testing.assert_close(larger_latents(z.roll(turns, (2, 3)), (12, 16), mode=mode, wrap=wrap), large.roll([2 * n for n in turns], (2, 3)))
    pixels = to_tensor(picture(24, 18))
    turned = larger_pixels(pixels.roll(turns, (2, 3)), (36, 48), mode="LANCZOS", wrap=wrap)
    assert torch.equal(turned, larger_pixels(pixels, (36, 48), mode="LANCZOS", wrap=wrap).roll([2 * n for n in turns], (2, 3)))


def test_pixels_grow_as_pil_does_it():
    one = picture(24, 18)
    assert to_images(larger_pixels(to_tensor(one), (27, 36), mode="LANCZOS"))[0].tobytes() == one.resize((36, 27), Image.Resampling.LANCZOS).tobytes()


# What it computes


def second_by_hand(pipe, first, levels, eps, upscaler):
    """Euler written out, from the first pass's result."""
    spec, modules = pipe.family.latent, {}
    for stage in ("text", "denoiser", "decoder", "encoder"):
        with pipe.residency.use(stage) as there:
            modules |= there
    height, width = eps.shape[2:]
    if UPSCALERS[upscaler].pixels:
        image = to_images(decode(modules["vae"], first.latents, spec))[0]
        z = encode(modules["vae"], to_tensor(image.resize((width * 8, height * 8), Image.Resampling[UPSCALERS[upscaler].mode])), spec)
    else:
        corners = {} if upscaler == "latent_nearest" else {"align_corners": False}
        z = torch.nn.functional.interpolate(first.latents, size=(height, width), mode=UPSCALERS[upscaler].mode, **corners)
    plan = first.plan
    run = pipe.stream("a red cat", **EULER)
    words = run._work.scripts(plan.passes[0])[0].at(levels[0]).prompts[0]
    run.close()
    x = noised(z, eps, levels[0])
    for now, then in pairwise(levels):
        a, b = prediction_row(pipe.family.prediction, now)
        with torch.no_grad():
            x0 = a * x + b * pipe.family.predict(modules, x, now, repeated(words, 1))
        x = then.sigma / now.sigma * x + (then.alpha - now.alpha * then.sigma / now.sigma) * x0
    return x


@each_upscaler
def test_the_second_pass_is_img2img_of_the_enlarged_first_with_the_next_noise_of_the_seed(pipe, upscaler):
    first = pipe.txt2img("a red cat", **EULER)
    both = pipe.txt2img("a red cat", upscale=2, upscaler=upscaler, upscale_strength=0.6, **EULER)
    levels = both.plan.passes[1].levels
    assert levels == first.plan.levels[-4:]  # 3 of 5 steps
    stream = SeededNoise([3], (4, 8, 6))
    stream.draw()
    torch.testing.assert_close(both.latents, second_by_hand(pipe, first, levels, stream.sized((4, 16, 12)).draw(), upscaler), rtol=0, atol=2e-5)
    assert both.image.size == (96, 128) and both.latents.shape == (1, 4, 16, 12) and both.notes == ()


def test_noise_of_another_size_goes_on_in_the_stream():
    """What a generator gives next, whatever was drawn before; variations and a seed's size belong to the first draw."""
    varied = SeededNoise([7, 8], (4, 6, 6), variations=[1, 2], strength=0.5, origin=(4, 4))
    varied.draw()
    dice = torch.Generator().manual_seed(8)
    torch.randn(1, 4, 6, 6, generator=dice)
    large = varied.sized((4, 12, 12))
    drawn = large.draw()
    assert torch.equal(drawn[1:], torch.randn(1, 4, 12, 12, generator=dice))
    assert torch.equal(large.draw()[1:], torch.randn(1, 4, 12, 12, generator=dice))


@pytest.mark.parametrize(("options", "run", "of"), [
    ({}, 12, 20), ({"upscale_strength": 0.3}, 6, 20), ({"upscale_strength": 0.01}, 1, 20), ({"upscale_strength": 1.0}, 20, 20),
    ({"upscaler": "lanczos"}, 9, 20),
    ({"upscale_steps": 12}, 12, 20), ({"upscale_steps": 10, "upscale_strength": 0.7}, 10, 14), ({"upscale_steps": 7, "upscale_strength": 1.0}, 7, 7)])
def test_how_many_steps_it_makes(pipe, options, run, of):
    """Without a number the share of the first pass's; with one, so many are run, of A1111's int(number / strength)."""
    plan = pipe.plan("a cat", steps=20, upscale=2, **options)
    second = plan.passes[1]
    assert (second.steps, second.asked_steps, second.first_step, plan.steps) == (run, of, of - run + 1, 20 + run)
    assert second.levels == pipe.plan("a cat", steps=of).levels[-(run + 1):]
    assert ("upscale_strength 0.01 of 20 steps is less than one step: one is run" in plan.notes) == (options.get("upscale_strength") == 0.01)


@pytest.mark.parametrize(("said", "size", "noted"), [({"upscale": 2}, (96, 128), False), ({"upscale": 1.5}, (72, 96), False),
                                                     ({"upscale": 4}, (192, 256), False),
                                                     ({"upscale": 1.3}, (64, 80), True), ({"upscale": 1.05}, (48, 64), None)])
def test_sizes(pipe, said, size, noted):
    if noted is None:
        with pytest.raises(RequestError, match=r"upscale is 1.05, which leaves 48x64 as it is, for sides are multiples of 8: give 1.07 or more"):
            pipe.plan("a cat", **BASE, **said)
        return
    plan = pipe.plan("a cat", **BASE, **said)
    assert plan.crop == size and (plan.width, plan.height) == (48, 64)
    assert any("64x80 is made" in note for note in plan.notes) == noted
    shown = str(plan)
    assert f"\nthen      {size[0]}x{size[1]} by latent, 3 of 5 steps (strength 0.6)" in shown and "size      48x64\n" in shown


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"sampler": "heun"}, {"guidance_interval": (0.3, 0.8)}, {"batch": 2}, {"tile": 48},
                                     {"guiders": "pag", "tile": 48}, {"guiders": ["apg", "dynamic_threshold"], "tile": 48, "seamless": "both"},
                                     {"image": picture(), "strength": 0.6}])
@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_the_plan_counts_evaluations_exactly(pipe, options, upscaler):
    own, seen = counted(pipe)
    run = own.stream("a cat", steps=4, seed=0, upscale=1.5, upscaler=upscaler, **options)
    assert run.result and sum(seen) == run.plan.evaluations * len(run.result)
    assert f"{run.plan.passes[1].evaluations} evaluations" in str(run.plan)


# What must hold of any run


@each_upscaler
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_a_batch_is_its_pictures_one_by_one(pipe, upscaler, sampler):
    options = BASE | {"upscale": 1.5, "upscaler": upscaler, "sampler": sampler, "steps": 3}
    batch = pipe.txt2img("a cat", **options | {"batch": 3})
    for n, image in enumerate(batch.images):
        same([image], pipe.txt2img("a cat", **options | {"seed": 3 + n}).images)
    assert batch.images[0].tobytes() != pipe.txt2img("a cat", **options | {"seed": 4}).image.tobytes()


def test_steps_count_through_both_passes(pipe):
    run = pipe.stream("a cat", upscale=2, **BASE)
    steps = list(run)
    assert [step.index for step in steps] == list(range(8)) and {step.total for step in steps} == {8} == {run.plan.steps}
    assert [run.preview(step)[0].size for step in steps] == [(6, 8)] * 5 + [(12, 16)] * 3
    assert [step.level for step in steps] == [level for one in run.plan.passes for level in one.levels[:-1]]


@pytest.mark.parametrize("options", [{"upscale": 2},
                                     {"upscale": 1.5, "upscaler": "lanczos", "upscale_strength": 0.35, "upscale_steps": 4, "tile": 48},
                                     {"upscale": 2, "image": picture(), "strength": 0.5, "width": None, "height": None}])
def test_the_recipe_makes_it_again(pipe, tmp_path, options):
    result = pipe.stream("a (cat:1.2)", **BASE | {"steps": 7} | options).result
    [file] = result.save(tmp_path / "x.png")
    recipe = read_recipe(file)
    assert recipe.data["upscaler"] == options.get("upscaler", "latent") and recipe.data["upscale_strength"] == options.get("upscale_strength", 0.6)
    pictures = {"image": options["image"]} if "image" in options else {}
    again = replay(pipe, file, **pictures)
    assert again.identical and again.differences == ()


@pytest.mark.parametrize("stop", [2, 6])
def test_an_interrupted_run_goes_on_in_either_pass(pipe, tmp_path, stop):
    options = BASE | {"upscale": 2, "sampler": "euler_ancestral"}

    def at(step):
        if step.index == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.txt2img("a cat", save_state=tmp_path / "run.state", save_every=1, on_step=at, **options)
    same(pipe.resume(tmp_path / "run.state").images, pipe.txt2img("a cat", **options).images)


def test_other_programs_read_it(pipe, tmp_path):
    result = pipe.txt2img("a cat", upscale=2, upscaler="lanczos", upscale_strength=0.5, **BASE)
    text = read_metadata(*result.save(tmp_path / "x.png"))["parameters"]
    assert "Size: 48x64, " in text and "Denoising strength: 0.5, Hires upscale: 2, Hires steps: 2, Hires upscaler: Lanczos" in text
    read = read_foreign({"parameters": text})
    assert {name: read.fields[name] for name in ("width", "height", "upscale", "upscaler", "upscale_strength", "upscale_steps")} == {
        "width": 48, "height": 64, "upscale": 2.0, "upscaler": "lanczos", "upscale_strength": 0.5, "upscale_steps": 2}
    assert read.needs == () and "strength" not in read.fields
    edit = pipe.img2img("a cat", picture(), upscale=2, strength=0.7, seed=0, steps=2)  # A1111 has no second pass of an edit: only what it has is said
    text = read_metadata(*edit.save(tmp_path / "y.png"))["parameters"]
    assert "Size: 128x128" in text and "Denoising strength: 0.7" in text and "Hires" not in text
    assert json.loads(read_metadata(tmp_path / "y.png")["latentgen"])["upscale"] == 2


# Edits


def test_inpainting_keeps_the_enlarged_picture(pipe):
    """All that the mask keeps is the source as PIL enlarges it, byte for byte."""
    source, mask = picture(), hole(64, 64)
    result = pipe.inpaint("a cat", source, mask, upscale=2, seed=0, steps=3)
    wide = np.asarray(source.resize((128, 128), Image.Resampling.LANCZOS))
    kept = np.asarray(mask.resize((128, 128), Image.Resampling.BILINEAR)) == 0
    made = np.asarray(result.image)
    assert result.image.size == (128, 128) and (made[kept] == wide[kept]).all() and (made[~kept] != wide[~kept]).any()


def test_an_odd_size_is_cropped_at_the_end(pipe):
    result = pipe.img2img("a cat", picture(51, 37), upscale=2, seed=0, steps=2)
    assert result.image.size == (102, 74) and (result.plan.passes[1].width, result.plan.passes[1].height) == (112, 80) and result.notes == ()
    assert pipe.outpaint("a cat", picture(40, 35), left=10, right=5, bottom=20, upscale=2, seed=0, steps=2).image.size == (110, 110)


def test_only_pictures_that_were_given_are_remembered(tiny_folder):
    own = latentgen.load(tiny_folder, dtype="float32", device="cpu", progress=False)
    for image, count in ((None, 0), (picture(64, 64), 2)):  # one for each pass
        own.txt2img("a cat", upscale=1.5, upscaler="lanczos", **BASE) if image is None else own.inpaint("a cat", image, hole(64, 64), upscale=1.5, upscaler="lanczos", steps=2, seed=1)
        assert len([key for key in own._memo._kept if key[0] == "image"]) == count


@pytest.mark.parametrize("kind", ["sd15-inpaint", "sd15-instruct", "sdxl", "sd3", "flux1", "zimage", "pixart"])
@pytest.mark.parametrize("said", [{}, {"upscaler": "lanczos", "tile": 64}])
def test_every_family_is_told_what_each_pass_is(loaded, kind, said):
    pipe, seen = loaded(kind), []
    inputs = pipe.family.inputs

    def looked(scene, side):
        seen.append((scene.width, scene.height, scene.shape))
        return inputs(scene, side)

    edits = {"sd15-inpaint": {"image": picture(), "mask": hole(64, 64)}, "sd15-instruct": {"reference": picture()}}
    edits = edits.get(kind, {"width": 64, "height": 64})
    if kind == "sd15-instruct":
        said = {name: value for name, value in said.items() if name != "tile"}
    run = pipe.stream("a cat", steps=2, seed=0, upscale=1.5, upscale_strength=0.9, **edits, **said)
    object.__setattr__(run._work, "family", replace(pipe.family, inputs=looked))
    assert run.result.image.size == (96, 96)
    channels = pipe.family.latent.channels
    assert {*seen} == {(64, 64, (channels, 8, 8)), (96, 96, (channels, 12, 12)) if "tile" not in said else (64, 64, (channels, 8, 8))}


def test_size_conditioning_and_shift_are_of_each_pass(loaded):
    xl = loaded("sdxl")
    run = xl.stream("a cat", steps=2, seed=0, width=64, height=64, upscale=2)
    told = [run._work.scripts(one)[0].at(one.levels[0]).prompts[0].extra["sizes"].tolist()[0] for one in run.plan.passes]
    assert told == [[64, 64, 0, 0, 64, 64], [128, 128, 0, 0, 128, 128]]
    flux = copy(loaded("flux1"))
    flux.family = replace(flux.family, shift=lambda width, height, steps: 1 + width * height / 2**18)
    plan = flux.plan("a cat", steps=4, width=256, height=256, upscale=4, upscale_strength=1.0)
    assert plan.passes[1].levels == flux.plan("a cat", steps=4, width=1024, height=1024).levels != plan.levels


def test_a_schedule_acts_at_the_same_noise(pipe):
    """The second pass begins where 60 % of the path is left, and there the first one said the second word."""
    run = pipe.stream("[cat:dog:0.4]", **BASE | {"steps": 10}, upscale=2, upscale_strength=0.6)
    first, second = (run._work.scripts(one)[0] for one in run.plan.passes)
    dog = pipe.stream("dog", **BASE)._work
    words = dog.scripts(dog.plan.passes[0])[0].steps[0].prompts[0]
    assert [torch.equal(first.at(level).prompts[0].tokens, words.tokens) for level in run.plan.levels[:-1]] == [False] * 4 + [True] * 6
    assert all(torch.equal(second.at(level).prompts[0].tokens, words.tokens) for level in run.plan.passes[1].levels[:-1])


# Refused


@pytest.mark.parametrize(("said", "says"), [
    ({"upscale": 1.0}, "upscale is 1.0: expected a number from 1.05 to 4"), ({"upscale": 5}, "upscale is 5"),
    ({"upscale": 2, "upscale_strength": 0}, "upscale_strength is 0"),
    ({"upscale": 2, "upscaler": "esrgan"}, "upscaler is 'esrgan': expected one of 'latent', 'latent_bicubic'"),
    ({"upscale_steps": 3}, "upscale_steps is given but upscale is not"),
    ({"upscaler": "latent"}, "upscaler is given but upscale is not: pass upscale=2"),
    ({"upscale": 2, "denoising_end": 0.5}, "denoising_end leaves the picture unfinished"),
    ({"hr_scale": 2}, "did you mean 'upscale'"),
    ({"upscale": 4, "width": 4096, "height": 4096}, "megapixels: at most"), ({"tile": 50}, "tile is 50: expected a multiple of 8, so use 48 or 56"),
    ({"tile": 8}, "tile is 8")])
def test_what_cannot_be_is_refused_while_planning(pipe, said, says):
    with pytest.raises(RequestError, match=says):
        pipe.plan("a cat", **said)


def test_not_strict_says_what_it_leaves_out(pipe):
    result = pipe.txt2img("a cat", **BASE, upscale_strength=0.5, strict=False)
    assert result.image.size == (48, 64) and any("upscale_strength is given but upscale is not" in note for note in result.notes)


def test_windows_are_refused_to_what_looks_at_a_whole_reference(loaded):
    with pytest.raises(RequestError, match="this edit looks at its reference as a whole: leave tile out"):
        loaded("sd15-instruct").plan("a cat", reference=picture(), tile=32)


# Windows


def test_a_window_as_large_as_the_picture_is_no_window(pipe):
    made = pipe.txt2img("a cat", tile=64, **BASE)
    same(made.images, pipe.txt2img("a cat", **BASE).images)
    assert "tile is 64, and nothing larger is denoised (48x64): the network sees it whole" in made.notes
    assert not [note for note in pipe.plan("a cat", tile=64, upscale=1.5, **BASE).notes if "tile" in note]  # the second pass is larger
    note = "vae_tile is 64, and nothing larger is decoded (48x64): the autoencoder sees it whole"
    assert note in pipe.plan("a cat", vae_tile=64, **BASE).notes
    assert not pipe.plan("a cat", vae_tile=64, upscale=1.5, **BASE).notes
    large = pipe.plan("a cat", vae_tile=2048, width=1032, height=1024)  # said so that there are no tiles
    assert large.tile is None and not [note for note in large.notes if "tile" in note]


def test_windows_are_denoised_each_as_its_own_and_averaged(pipe):
    """One step by hand, guided: the picture's x0 is the weighted mean of the windows' x0."""
    options = {"seed": 1, "steps": 1, "width": 112, "height": 64}
    windowed = pipe.stream("a cat", tile=64, **options)
    [step] = list(windowed)
    grid, level = windowed.plan.passes[0].grid, windowed.plan.levels[0]
    assert [(w.columns.start, w.columns.length) for w in grid.windows] == [(0, 8), (6, 8)] and "2 windows of 64 pixels" in str(windowed.plan)
    x = SeededNoise([1], (4, 8, 14)).draw() * level.sigma
    work = pipe.stream("a cat", **options | {"width": 64})._work
    one = work.plan.passes[0]
    with pipe.residency.use("denoiser") as modules:
        denoise = work.denoiser(one, modules, work.scripts(one), None, x)
        left, right = (denoise(x[..., a:a + 8], level) for a in (0, 6))
    torch.testing.assert_close(step.x0[..., :6], left[..., :6], rtol=0, atol=1e-5)
    torch.testing.assert_close(step.x0[..., 8:], right[..., 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(step.x0[..., 6:8], torch.stack([left[..., 6], right[..., 1]], 3), rtol=0, atol=1e-5)  # at once


def test_masked_in_windows_keeps_every_byte(pipe):
    source, mask = picture(112, 96), hole(112, 96, soft=True)
    made = np.asarray(pipe.inpaint("a cat", source, mask, seed=0, steps=2, tile=48).image)
    kept = np.asarray(mask) == 0
    assert (made[kept] == np.asarray(source)[kept]).all() and (made != np.asarray(source)).any()


def test_each_window_remembers_for_itself(pipe):
    """A picture of one row again and again: both windows see the same in every step, and caches or guiders that mixed them up would show."""
    options = BASE | {"width": 64, "height": 112, "tile": 64, "approximate": "deep_cache", "guiders": "apg", "sampler": "euler"}
    run, alone = pipe.stream("a cat", **options), pipe.stream("a cat", **options | {"height": 64})
    x = SeededNoise([1], (4, 1, 8)).draw().expand(1, 4, 14, 8)
    with pipe.residency.use("denoiser") as modules:
        whole, part = (r._work.denoiser(one := r.plan.passes[0], modules, r._work.scripts(one), None, x) for r in (run, alone))
        for level in run.plan.levels[:-1]:
            x0, own = whole(x, level), part(x[:, :, :8], level)
            torch.testing.assert_close(x0[:, :, :6], own[:, :, :6], rtol=0, atol=1e-5)
            torch.testing.assert_close(x0[:, :, 8:], own[:, :, 2:], rtol=0, atol=1e-5)


def test_each_window_of_an_inpaint_checkpoint_is_told_its_own_part(loaded):
    """Nine channels: mask and picture beside x are those of the window."""
    pipe = loaded("sd15-inpaint")
    run = pipe.stream("a cat", image=picture(112, 64), mask=hole(112, 64), tile=64, steps=1, seed=0)
    [one] = run.plan.passes
    scripts = run._work.scripts(one)
    parts = [script.at(one.levels[0]).prompts[0].extra["beside"] for script in scripts]
    assert [part.shape for part in parts] == [(1, 5, 8, 8)] * 2 and not torch.equal(*parts)
    small = torch.nn.functional.interpolate((one.source.mask >= 0.5).float(), size=(8, 14), mode="nearest")
    assert torch.equal(parts[0][:, :1], small[..., :8]) and torch.equal(parts[1][:, :1], small[..., 6:])
    assert run.result.image.size == (112, 64)


def test_a_second_pass_far_too_large_is_denoised_in_windows_and_says_so(pipe):
    plan = pipe.plan("a cat", upscale=2)
    assert len(plan.passes[1].grid.windows) == 1 and plan.notes == ()
    plan = pipe.plan("a cat", upscale=2.25)
    assert len(plan.passes[1].grid.windows) == 9 and plan.passes[1].grid.tile == 8
    assert plan.notes == ("144x144 is 5.1 times this model's own area: it is denoised in windows of 64 pixels",)


def test_requests_take_numbers_of_any_kind():
    assert Request(prompt="a", upscale=np.float64(2)).upscale == 2.0 and Request(prompt="a", upscale=2).upscale == 2


@pytest.mark.parametrize(("kind", "own"), [("sd15", 1), ("sd15-inpaint", 4)])
def test_windows_that_hear_the_same_have_one_script(loaded, kind, own):
    """And so one table of what is known before the first step; a network that is shown the picture has one for each window."""
    pipe = loaded(kind)
    run = pipe.stream("a cat", image=picture(96, 96), mask=hole(96, 96), tile=64, seed=0, steps=2)
    scripts = run._work.scripts(run.plan.passes[0])
    assert len(scripts) == len(run.plan.passes[0].grid.windows) == 4 and len({id(script) for script in scripts}) == own
