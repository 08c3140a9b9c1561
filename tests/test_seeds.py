"""Seeds of a request: lists, variations and other sizes, from what is said to the picture, its file, other programs' words and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_noise import a1111
from test_pipeline import hole, picture, same
from test_save import gradient
from typer.testing import CliRunner

import latentgen
from latentgen.cli import app
from latentgen.errors import RequestError
from latentgen.pixels.save import read_metadata, save_image
from latentgen.run.foreign.read import Foreign, read_foreign
from latentgen.run.recipe import Recipe, read_recipe

TURNED = {"seed": 3, "variation_seed": 100, "variation_strength": 0.3}
each = pytest.mark.parametrize


def start_of(pipe: Any, **options: Any) -> torch.Tensor:
    """The noise that a request starts from: at one step of a sampler on a denoiser that answers zero, x0 says nothing and the noise all."""
    plan = pipe.plan("a cat", **options)
    return plan.noise.noise(pipe.family.latent.shape(plan.width, plan.height), pipe.family.latent.factor).draw()


def test_a_list_of_seeds_is_a_batch_of_them(pipe) -> None:
    made = pipe.txt2img("a cat", seed=[11, 3, 7], steps=2, sampler="euler_ancestral")
    assert made.seeds == (11, 3, 7) and made.recipe["seed"] == [11, 3, 7] and made.recipe["batch"] == 3 and "seeds     11, 3, 7" in str(made.plan)
    same(made, [pipe.txt2img("a cat", seed=seed, steps=2, sampler="euler_ancestral").image for seed in (11, 3, 7)])
    same(made, pipe.txt2img("a cat", seed=(11, 3, 7), batch=3, steps=2, sampler="euler_ancestral"))
    same(pipe.txt2img("a cat", seed=range(4, 6), steps=1), pipe.txt2img("a cat", seed=4, batch=2, steps=1))


def test_changes_of_a_request_with_a_list() -> None:
    request = latentgen.Request(prompt="a", seed=[1, 2, 3])
    assert request.batch == 3 and request.replace(steps=3).seed == (1, 2, 3) and request.replace(seed=5).batch == 1
    assert request.replace(seed=[7, 8]).batch == 2 and request.replace(seed=5, batch=4).batch == 4


def test_a_variation_starts_from_a1111s_noise(pipe) -> None:
    shape = pipe.family.latent.shape(64, 64)
    torch.testing.assert_close(start_of(pipe, **TURNED)[0], a1111(3, shape, 100, 0.3), rtol=0, atol=2e-6)
    resized = start_of(pipe, **TURNED, seed_width=40, seed_height=80)
    torch.testing.assert_close(resized[0], a1111(3, shape, 100, 0.3, (10, 5)), rtol=0, atol=2e-6)


def test_a_batch_of_variations_keeps_the_seed_and_counts_the_other(pipe) -> None:
    """A1111's rule; each of them can be asked for alone."""
    made = pipe.txt2img("a cat", **TURNED, batch=3, steps=2)
    assert made.seeds == (3, 3, 3) and made.plan.noise.variations == (100, 101, 102) and len({image.tobytes() for image in made}) == 3
    same(made, [pipe.txt2img("a cat", **TURNED | {"variation_seed": 100 + n}, steps=2).image for n in range(3)])
    same(made, pipe.txt2img("a cat", **TURNED | {"seed": [3, 3, 3], "variation_seed": [100, 101, 102]}, steps=2))
    assert "seeds     3, 3, 3, varied by 0.3 towards 100, 101, 102" in str(made.plan)


def test_strength_goes_from_one_picture_to_the_other(pipe) -> None:
    def latents(**said: Any) -> torch.Tensor:
        return pipe.txt2img("a cat", steps=2, **said).latents

    ends, (near, far) = (latents(seed=3), latents(seed=100)), (latents(**TURNED | {"variation_strength": s}) for s in (0.1, 0.9))
    assert torch.equal(latents(**TURNED | {"variation_strength": 0.0, "variation_seed": None}), ends[0])
    torch.testing.assert_close(latents(**TURNED | {"variation_strength": 1.0}), ends[1], rtol=0, atol=1e-4)
    assert (near - ends[0]).norm() < (far - ends[0]).norm() and (far - ends[1]).norm() < (near - ends[1]).norm()


def test_a_variation_seed_that_is_left_open_is_drawn_and_told(pipe) -> None:
    made = pipe.txt2img("a cat", seed=3, variation_strength=0.5, steps=1, batch=2)
    drawn = made.recipe["variation_seed"]
    same(made, pipe.txt2img("a cat", seed=3, variation_strength=0.5, variation_seed=drawn, steps=1, batch=2))


def test_the_noise_of_another_size_keeps_the_middle(pipe) -> None:
    small = start_of(pipe, seed=3, width=40, height=24)
    assert torch.equal(start_of(pipe, seed=3, seed_width=40, seed_height=24)[..., 2:5, 1:6], small)
    assert torch.equal(start_of(pipe, seed=3, seed_width=64, seed_height=64), start_of(pipe, seed=3))


@each("options", [{"image": picture()}, {"image": picture(), "mask": hole(64, 64)}, {"sampler": "euler_ancestral"}], ids=lambda o: "+".join(o))
def test_edits_and_stochastic_samplers_too(pipe, options: dict, tmp_path: Path) -> None:
    said = TURNED | {"seed_width": 40, "seed_height": 80}
    made = pipe.stream("a cat", **options, **said, batch=2, steps=3).result
    assert made.image.tobytes() != pipe.stream("a cat", **options, seed=3, steps=3).result.image.tobytes()
    for n, file in enumerate(made.save(tmp_path / "a.png")):
        recipe = read_recipe(file)
        assert isinstance(recipe, Recipe) and (recipe.data["seed"], recipe.data["variation_seed"]) == (3, 100 + n)
        sources = {name: options[name] for name in ("image", "mask") if name in options}
        assert pipe.replay(file, **sources).identical


def test_a_list_replays_too(pipe, tmp_path: Path) -> None:
    for file in pipe.txt2img("a cat", seed=[9, 4], variation_strength=0.2, variation_seed=[5, 1], steps=1).save(tmp_path / "a.png"):
        assert pipe.replay(file).identical
    whole = pipe.txt2img("a cat", seed=[9, 4], variation_strength=0.2, steps=1)
    same(pipe.stream(Recipe(whole.recipe).request()).result, whole)


def test_variations_in_a1111s_words_and_back(pipe, tmp_path: Path) -> None:
    file = pipe.txt2img("a cat", **TURNED, seed_width=512, seed_height=768, steps=1).save(tmp_path / "a.png")[0]
    text = read_metadata(file)["parameters"]
    assert "Seed: 3, " in text and "Variation seed: 100, Variation seed strength: 0.3, Seed resize from: 512x768, " in text
    found = read_foreign({"parameters": text})
    assert isinstance(found, Foreign) and not [note for note in found.notes if "ariation" in note or "resize" in note]
    assert {name: found.fields[name] for name in (*TURNED, "seed_width", "seed_height")} == TURNED | {"seed_width": 512, "seed_height": 768}
    same(pipe.stream(found.request(strict=False)).result, pipe.txt2img("a cat", **TURNED, seed_width=512, seed_height=768, steps=1))


def test_other_programs_variations() -> None:
    line = "a cat\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x64, Variation seed: 9, Variation seed strength: 0.25, Seed resize from: 40x48"
    found = read_foreign({"parameters": line + ", RNG: CPU"})
    assert found is not None and found.notes == ()
    assert [found.fields[name] for name in ("seed", "variation_seed", "variation_strength", "seed_width", "seed_height")] == [5, 9, 0.25, 40, 48]
    data = {"app_version": "2.3.5", "image": {"prompt": "a", "seed": 3, "sampler": "k_euler", "variations": [{"seed": 7, "weight": 0.1}, {"seed": 8, "weight": 0.2}]}}
    found = read_foreign({"sd-metadata": json.dumps(data)})
    assert found is not None and (found.fields["variation_seed"], found.fields["variation_strength"]) == (7, 0.1)
    assert any("2 variations were combined" in note for note in found.notes) and any("column by column" in note for note in found.notes)
    node = {"seed": 3, "steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1, "variation_seed": 6, "variation_strength": 0.4,
            "positive": ["2", 0], "latent_image": ["4", 0]}
    graph = {"1": {"class_type": "KSampler //Inspire", "inputs": node}, "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a"}},
             "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}}
    found = read_foreign({"prompt": json.dumps(graph)})
    assert found is not None and (found.fields["variation_seed"], found.fields["variation_strength"]) == (6, 0.4) and "own rule" in " ".join(found.notes)


@each("strength", ["2", "x"])
def test_a_strength_that_is_none_takes_no_seed_with_it(strength: str, tmp_path: Path) -> None:
    found = read_foreign({"parameters": f"a\nSteps: 2, Sampler: Euler, Seed: 5, Size: 64x64, Variation seed: 9, Variation seed strength: {strength}"})
    assert found is not None and "variation_seed" not in found.fields and any("Variation seed strength" in note for note in found.notes)
    assert read_recipe(save_image(gradient(), tmp_path / "a.png")) is None


def test_what_starts_from_latents_has_its_noise(pipe) -> None:
    half = pipe.txt2img("a cat", seed=5, steps=4, denoising_end=0.5)
    said = {"latents": half.latents, "denoising_start": 0.5, "steps": 4, **TURNED}
    with pytest.raises(RequestError, match="starts from latents"):
        pipe.plan("a cat", **said)
    plan = pipe.plan("a cat", strict=False, **said)
    assert plan.noise.variations == () and any("starts from latents" in note for note in plan.notes)


def command(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, words)])


def test_the_command(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = ("--model", tiny_folder, "--quiet", "--steps", "1")
    for said in (("--seed", "3,7, 11"), ("--seed", "3", "--seed", "7", "--seed", "11")):
        done = command("txt2img", "a cat", *said, "-o", tmp_path, *here)
        assert done.exit_code == 0 and len(done.stdout.split()) == 3, done.output
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(f"a-cat-{seed}{n}.png" for seed in (3, 7, 11) for n in ("", "-2"))
    done = command("txt2img", "a cat", "--seed", "3", "--variation-strength", "0.2", "--variation-seed", "5", "--batch", "2", "--seed-width", "40",
                   "--seed-height", "48", "-o", tmp_path / "v.png", *here)
    assert done.exit_code == 0, done.output
    recipe = read_recipe(tmp_path / "v-2.png")
    assert isinstance(recipe, Recipe) and [recipe.data[n] for n in ("seed", "variation_seed", "variation_strength", "seed_width")] == [3, 6, 0.2, 40]
    told = json.loads(command("plan", "a cat", "--seed", "3,7", "--json", "--model", tiny_folder).stdout)
    assert told["seeds"] == [3, 7] and told["noise"]["strength"] == 0
    for wrong in ("lucky", "3,,7", "-1", "٣", "9" * 30):
        done = command("txt2img", "a cat", f"--seed={wrong}", *here)
        assert done.exit_code == 2 and "expected a whole number from 0 to 2**63 - 1" in done.stderr and done.stderr.count("\n") == 1, done.output
