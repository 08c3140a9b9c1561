"""Pictures whose edges meet: turned around an edge they are the same picture, for every kind of network, in passes, windows and edits."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_pipeline import hole, picture, same
from test_upscale import loaded  # noqa: F401 - a fixture

import latentgen
from latentgen.diffusion.noise import SeededNoise
from latentgen.errors import RequestError
from latentgen.models.around import Around
from latentgen.pixels.latent import decode
from latentgen.pixels.save import read_metadata
from latentgen.run.foreign.invoke import from_invoke, from_old_invoke
from latentgen.run.foreign.read import read_foreign
from latentgen.run.replay import replay
from latentgen.run.work import Work

BASE: dict[str, Any] = {"seed": 3, "steps": 3, "width": 64, "height": 96, "guidance_scale": 1.0}
AXES = {"x": (3,), "y": (2,), "both": (2, 3)}


def x0_of(pipe, x, *before, at=0, prompt="a cat", **said):
    """What the run's denoiser answers, about a given x; `before`: levels about which it is asked first."""
    run = pipe.stream(prompt, **BASE | said)
    work, one = run._work, run.plan.passes[0]
    scripts = work.scripts(one)
    with pipe.residency.use("denoiser") as modules:
        denoise = work.denoiser(one, modules, scripts, None, x)
        return [denoise(x, one.levels[n]) for n in (*before, at)][-1]


@pytest.mark.parametrize("seamless", AXES)
def test_a_turned_latent_is_denoised_to_the_turned_answer(pipe, seamless):
    """Turned by the network's own stride; along a side whose edges do not meet it is another picture."""
    x = SeededNoise([1], (4, 12, 8)).draw()
    plain = x0_of(pipe, x, seamless=seamless)
    for axis in (2, 3):
        turned = x0_of(pipe, x.roll(4, axis), seamless=seamless).roll(-4, axis)
        assert torch.allclose(turned, plain, rtol=0, atol=2e-5) == (axis in AXES[seamless])
    assert (plain - x0_of(pipe, x)).abs().max() > 1e-3


def test_windows_turn_with_the_picture(pipe):
    """Turned from one window's place to the next one's, of which there are three on one side and two on the other."""
    x, said = SeededNoise([1], (4, 12, 8)).draw(), {"tile": 48, "seamless": "both"}
    plain = x0_of(pipe, x, **said)
    assert len(pipe.plan("a cat", **BASE | said).passes[0].grid.windows) == 6
    for axis in (2, 3):
        torch.testing.assert_close(x0_of(pipe, x.roll(4, axis), **said).roll(-4, axis), plain, rtol=0, atol=2e-5)
        assert (x0_of(pipe, x.roll(4, axis), tile=48).roll(-4, axis) - x0_of(pipe, x, tile=48)).abs().max() > 1e-3


def test_windows_run_across_the_edge(pipe):
    """On a side that windows share they lie around it; on one that a single window covers the network itself is told."""
    grid = pipe.plan("a cat", **BASE | {"width": 128}, tile=96, seamless="both").passes[0].grid
    assert grid.edgeless == (2,) and {(w.columns.start, w.columns.length) for w in grid.windows} == {(0, 12), (8, 12)}
    assert pipe.plan("a cat", **BASE | {"width": 128}, tile=96).passes[0].grid.windows[-1].columns.start == 4


def test_a_window_is_encoded_as_the_part_that_it_is(loaded, monkeypatch):  # noqa: F811
    """Its own edges meet only where it is the whole side; the picture's do wherever that was said."""
    pipe, seen = loaded("sd15-inpaint"), []
    latents = Work.latents

    def looked(work, one, pixels, *, wrap):
        seen.append((pixels.shape[3], wrap))
        return latents(work, one, pixels, wrap=wrap)

    monkeypatch.setattr(Work, "latents", looked)
    result = pipe.inpaint("a cat", picture(112, 64), hole(112, 64), tile=64, steps=1, seed=0, seamless="both")
    assert result.image.size == (112, 64)
    assert {*seen} == {(64, (2,)), (112, (2, 3))}


@pytest.mark.parametrize("seamless", AXES)
def test_the_decoded_edges_are_those_of_copies_side_by_side(pipe, seamless):
    """Of three by three copies the middle one; the decoder of this checkpoint reaches less than 8 latents."""
    result = pipe.txt2img("a cat", **BASE, seamless=seamless)
    sides = [3 if axis in AXES[seamless] else 1 for axis in (2, 3)]
    with pipe.residency.use("decoder") as modules:
        copies = decode(modules["vae"], result.latents.tile(1, 1, *sides), pipe.family.latent)
    middle = copies.unflatten(3, (sides[1], 64))[..., sides[1] // 2, :].unflatten(2, (sides[0], 96))[..., sides[0] // 2, :, :]
    made = torch.from_numpy(np.array(result.image)).permute(2, 0, 1).float() / 127.5 - 1
    assert (made - middle[0].clamp(-1, 1)).abs().max() <= 1.1 / 127.5


def test_a_network_of_patches_is_turned_at_each_level(loaded):  # noqa: F811
    """A transformer knows places. At the second level it sees the latent rolled by whole patches, and answers it rolled back."""
    pipe = loaded("sd3")
    x = SeededNoise([1], (16, 12, 8)).draw()
    run = pipe.stream("a cat", **BASE, seamless="both")
    one, level = run.plan.passes[0], run.plan.levels[1]
    by = (round(0.7548776662466927 * 6) * 2, round(0.5698402909980532 * 4) * 2)
    rolled = x0_of(pipe, x.roll(by, (2, 3)), at=1).roll([-n for n in by], (2, 3))
    torch.testing.assert_close(x0_of(pipe, x, at=1, seamless="both"), rolled, rtol=0, atol=1e-5)
    torch.testing.assert_close(x0_of(pipe, x, seamless="both"), x0_of(pipe, x), rtol=0, atol=1e-6)  # the first is as it is
    assert (x0_of(pipe, x, at=1) - rolled).abs().max() > 1e-4 and one.levels[1] == level


def test_guidance_that_remembers_knows_the_picture_in_its_place(loaded):  # noqa: F811
    """Adaptive projected guidance adds up directions of several levels: each as it lies in the picture, not as the network saw it turned."""
    pipe, x = loaded("sd3"), SeededNoise([1], (16, 12, 8)).draw()
    pos, neg = ([x0_of(pipe, x, at=n, prompt=prompt, seamless="both") for n in (0, 1)] for prompt in ("a cat", "a dog"))
    said = {"negative_prompt": "a dog", "guidance_scale": 3.0, "guiders": {"apg": {"momentum": 0.5, "norm_threshold": 0.0, "eta": 1.0}}}
    made = x0_of(pipe, x, 0, at=1, seamless="both", **said)
    torch.testing.assert_close(made, pos[1] + 2 * (pos[1] - neg[1] + 0.5 * (pos[0] - neg[0])), rtol=0, atol=1e-4)


def test_what_is_led_is_shown_in_its_place(loaded):  # noqa: F811
    """A classifier that knows places sees x as it is."""
    pipe, x, seen = loaded("sd3"), SeededNoise([1], (16, 12, 8)).draw(), []
    x0_of(pipe, x, at=1, seamless="both", classifier=lambda x, level: (seen.append(x.detach()), x.sum((1, 2, 3)))[1])
    assert torch.equal(seen[0], x)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "flux1", "zimage", "pixart", "sd15-inpaint", "sd15-instruct"])
def test_every_family_makes_one(loaded, kind):  # noqa: F811
    pipe = loaded(kind)
    edits = {"sd15-inpaint": {"image": picture(), "mask": hole(64, 64)}, "sd15-instruct": {"reference": picture()}}
    edits = edits.get(kind, {"width": 64, "height": 64})
    options = {"steps": 2, "seed": 0, "upscale": 1.5} | edits
    one, plain = pipe.stream("a cat", seamless="both", **options).result, pipe.stream("a cat", **options).result
    assert one.image.size == (96, 96) and one.image.tobytes() != plain.image.tobytes() and one.notes == plain.notes
    with pipe.residency.use("denoiser") as modules:
        assert not any(isinstance(module, Around) for net in modules.values() for module in net.modules())  # nothing stays behind


@pytest.mark.parametrize("residency", ["stage", "stream"])
def test_wherever_the_weights_are(pipe, tiny_folder, residency):
    elsewhere = latentgen.load(tiny_folder, dtype="float32", device="cpu", residency=residency, progress=False)
    options = BASE | {"seamless": "both", "upscale": 2, "tile": 64, "guidance_scale": 3.0}
    same(elsewhere.txt2img("a cat", **options).images, pipe.txt2img("a cat", **options).images)


def test_batches_and_replays_hold(pipe, tmp_path):
    options = BASE | {"seamless": "x", "upscale": 1.5, "upscaler": "lanczos"}
    both = pipe.txt2img("a cat", **options | {"batch": 2})
    same(both.images[1:], pipe.txt2img("a cat", **options | {"seed": 4}).images)
    [file] = pipe.txt2img("a cat", **options).save(tmp_path / "x.png")
    again = replay(pipe, file)
    assert again.identical and again.differences == ()
    assert "edges meet left to right" in str(both.plan)


def test_inpainting_keeps_its_bytes(pipe):
    source, mask = picture(), hole(64, 64)
    made = np.asarray(pipe.inpaint("a cat", source, mask, seed=0, steps=2, seamless="both").image)
    assert (made[np.asarray(mask) == 0] == np.asarray(source)[np.asarray(mask) == 0]).all()


@pytest.mark.parametrize(("seamless", "words"), [("both", "Tiling: True"), ("x", "Tile X: True"), ("y", "Tile Y: True")])
def test_other_programs_words(pipe, tmp_path, seamless, words):
    text = read_metadata(*pipe.txt2img("a cat", **BASE, seamless=seamless).save(tmp_path / "x.png"))["parameters"]
    assert f", {words}, " in text
    found = read_foreign({"parameters": text})
    assert found.fields["seamless"] == seamless and not any("Til" in note for note in found.notes)
    assert "seamless" not in read_foreign({"parameters": text.replace("True", "False")}).fields
    axes = {"x": seamless != "y", "y": seamless != "x"}
    new = from_invoke({"positive_prompt": "a fox", **{f"seamless_{axis}": on for axis, on in axes.items()}})
    old = from_old_invoke({"image": {"prompt": "a fox", "seamless": True, "seamless_axes": [axis for axis, on in axes.items() if on]}})
    assert new.fields["seamless"] == old.fields["seamless"] == seamless and new.notes == old.notes == ()


@pytest.mark.parametrize(("said", "says"), [
    ({"seamless": "z"}, "seamless is 'z': expected 'x', 'y' or 'both'"), ({"tiling": "x"}, "did you mean 'seamless'"),
    ({"seamless": "x", "image": Image.new("RGB", (51, 40))}, "51x40 is cut out of 56x40: give a picture whose sides are multiples of 8")])
def test_what_cannot_be_is_refused_while_planning(pipe, said, says):
    with pytest.raises(RequestError, match=says):
        pipe.plan("a cat", **said)


def test_a_transformer_that_is_shown_a_picture_refuses(loaded):  # noqa: F811
    pipe = copy(loaded("flux1"))
    pipe.family = replace(pipe.family, references=1)
    with pytest.raises(RequestError, match="shown another picture place by place, whose edges do not meet"):
        pipe.plan("a cat", reference=picture(), seamless="x")
    assert pipe.plan("a cat", reference=picture()).passes[0].grid.wrap == ()


def test_not_strict_it_is_left_out(pipe):
    result = pipe.img2img("a cat", picture(51, 40), seed=0, steps=2, seamless="x", strict=False)
    assert result.image.size == (51, 40) and any("51x40 is cut out of" in note for note in result.notes)
    same(result.images, pipe.img2img("a cat", picture(51, 40), seed=0, steps=2).images)
