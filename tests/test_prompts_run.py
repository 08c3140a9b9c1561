"""Prompts all the way to pictures: weights, schedules and AND, each against its rule worked out by hand on a tiny checkpoint."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_folders import tiny
from torch import Tensor
from typer.testing import CliRunner

import latentgen
from latentgen.cli import app
from latentgen.conditioning.weighting import weighted
from latentgen.diffusion.level import prediction_row
from latentgen.diffusion.noise import SeededNoise
from latentgen.errors import RequestError
from latentgen.models.family import Conditioning, Words
from latentgen.pixels.save import read_metadata
from latentgen.run.recipe import Recipe
from latentgen.run.replay import replay

DIALECTS = ("a1111", "comfy", "plain")
EULER = {"sampler": "euler", "seed": 3, "steps": 4}


def bytes_of(pipe: Any, prompt: str, **said: Any) -> bytes:
    return pipe.txt2img(prompt, **{"seed": 1, "steps": 2} | said).image.tobytes()


def encoded(pipe: Any, text: str, *, weight: float = 1.0, at: int | None = None) -> Conditioning:
    """A text's states from the encoder itself, those of one token (place `at`) times a weight. This encoder's last norm leaves a mean of 0, so that
    A1111 has none to keep."""
    chunks = pipe.plan(text, dialect="plain", guidance_scale=1.0).prompt.chunks
    with pipe.residency.use("text") as modules, torch.no_grad():
        ids, mask = ({k: torch.tensor(getattr(c, what)) for k, c in chunks.items()} for what in ("ids", "mask"))
        made = pipe.family.encode(modules, Words(ids, mask))
    if at is None:
        return made
    states = made.tokens.clone()
    states[:, at] *= weight
    return Conditioning(states)


def by_hand(pipe: Any, said: list[list[tuple[float, Conditioning]]], *, scale: float,
            negative: Conditioning | list[Conditioning] | None = None) -> Tensor:
    """Euler written out, with the prompts of each step: x after the last one."""
    against = negative if isinstance(negative, list) else [negative] * 4
    levels = pipe.plan("a", **EULER).levels
    x = SeededNoise((EULER["seed"],), pipe.family.latent.shape(64, 64)).draw() * levels[0].sigma
    with pipe.residency.use("denoiser") as modules, torch.no_grad():
        for prompts, other, now, then in zip(said, against, levels[:-1], levels[1:], strict=True):
            def x0_of(c: Conditioning, x: Tensor = x, now: Any = now) -> Tensor:
                a, b = prediction_row(pipe.family.prediction, now)
                return a * x + b * pipe.family.predict(modules, x, now, c)

            x0 = x0_of(prompts[0][1])
            if other is not None:
                base = x0_of(other)
                x0 = base + scale * sum(w * (x0_of(c) - base) for w, c in prompts)
            eps = (x - now.alpha * x0) / now.sigma
            x = then.alpha * x0 + then.sigma * eps
    return x


def near(result: Any, x: Tensor) -> None:
    torch.testing.assert_close(result.latents, x, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("prompt", ["", "a cat", "red heart, dog", "a cat: 3 dogs", "cat | dog"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_prompt_without_syntax_is_the_same_in_every_dialect(pipe: Any, prompt: str, guidance_scale: float) -> None:
    made = {bytes_of(pipe, prompt, dialect=dialect, guidance_scale=guidance_scale) for dialect in DIALECTS}
    assert len(made) == 1


def test_plain_takes_brackets_as_text(pipe: Any) -> None:
    plan = pipe.plan("a (cat:1.5) [dog:tree:0.5] AND car", dialect="plain")
    assert len(plan.prompt.spans) == plan.prompt.composed == 1 and not plan.prompt.weighted
    assert plan.prompt.chunks["tokenizer"].text == plan.request.prompt
    assert bytes_of(pipe, "a (cat:1.5)", dialect="plain") != bytes_of(pipe, "a cat") != bytes_of(pipe, "a (cat:1.5)")
    assert bytes_of(pipe, r"a \(cat\)") == bytes_of(pipe, "a (cat)", dialect="plain")


def test_a_weight_is_that_of_the_rule(pipe: Any) -> None:
    result = pipe.txt2img("a (cat:1.5)", guidance_scale=1.0, **EULER)
    near(result, by_hand(pipe, [[(1, encoded(pipe, "a cat", weight=1.5, at=2))]] * 4, scale=1))
    assert (result.latents - pipe.txt2img("a cat", guidance_scale=1.0, **EULER).latents).abs().max() > 1e-3


def test_a1111_keeps_the_mean_of_states_that_have_one(tmp_path: Path) -> None:
    xl = latentgen.load(tiny("sdxl").save(tmp_path), dtype="float32", device="cpu", progress=False)
    said = EULER | {"width": 64, "height": 64}
    made = {rule: xl.txt2img("a (cat:1.5)", weighting=rule, **said).latents for rule in ("a1111", "a1111_no_norm", "comfy")}
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in combinations(made.values(), 2))


def test_the_recipe_names_the_rule_and_is_replayed(pipe: Any, tmp_path: Path) -> None:
    assert bytes_of(pipe, "(a:1) cat") == bytes_of(pipe, "a cat")
    for said, rule in (({}, "a1111"), ({"dialect": "comfy"}, "comfy"), ({"dialect": "comfy", "weighting": "a1111"}, "a1111")):
        plan = pipe.plan("a (cat:1.5)", **said)
        assert plan.weighting == rule and f"weights as {rule}" in str(plan)
    for dialect, rule in (("a1111", "a1111"), ("comfy", "comfy"), ("plain", "a1111")):
        pipe.txt2img("a (cat:1.5) [dog:tree:2]", dialect=dialect, negative_prompt="(dog:1.2)", **EULER).save(tmp_path / f"{dialect}.png")
        written = json.loads(read_metadata(tmp_path / f"{dialect}.png")["latentgen"])
        assert (written["prompt"], written["dialect"], written["weighting"]) == ("a (cat:1.5) [dog:tree:2]", dialect, rule)
        assert replay(pipe, tmp_path / f"{dialect}.png").identical
        first = {name: value for name, value in written.items() if name not in ("dialect", "weighting")}  # as the first version wrote it
        assert Recipe(first).request().dialect == "plain"


def test_comfy_weighs_against_the_empty_prompt(pipe: Any) -> None:
    result = pipe.txt2img("a (cat:1.5)", dialect="comfy", guidance_scale=1.0, **EULER)
    full, empty = encoded(pipe, "a cat").tokens, encoded(pipe, "").tokens
    states = full.clone()
    states[:, 2] = empty[:, 2] + 1.5 * (full[:, 2] - empty[:, 2])
    near(result, by_hand(pipe, [[(1, Conditioning(states))]] * 4, scale=1))


def test_a_schedule_is_one_prompt_and_then_the_other(pipe: Any) -> None:
    cat, dog, none = (encoded(pipe, text) for text in ("a cat", "dog", ""))
    for prompt, order in (("[a cat:dog:0.5]", (cat, cat, dog, dog)), ("[a cat:dog:1]", (cat, dog, dog, dog)), ("[a cat|dog]", (cat, dog, cat, dog)),
                          ("[dog:0.75]", (none, none, none, dog)), ("[dog::0.25]", (dog, none, none, none))):
        near(pipe.txt2img(prompt, guidance_scale=1.0, **EULER), by_hand(pipe, [[(1, c)] for c in order], scale=1))
        near(pipe.txt2img(prompt, guidance_scale=3.0, **EULER), by_hand(pipe, [[(1, c)] for c in order], scale=3, negative=none))
    assert pipe.txt2img("[a cat:dog:1.0]", **EULER).image.tobytes() == pipe.txt2img("a cat", **EULER).image.tobytes()


def test_a_schedule_in_the_negative_prompt(pipe: Any) -> None:
    cat, dog, tree = (encoded(pipe, text) for text in ("a cat", "dog", "tree"))
    result = pipe.txt2img("a cat", negative_prompt="[dog:tree:0.5]", guidance_scale=3.0, **EULER)
    near(result, by_hand(pipe, [[(1, cat)]] * 4, scale=3, negative=[dog, dog, tree, tree]))
    assert len(result.plan.negative.spans) == 2 and "steps 1 to 2: 'dog'" in str(result.plan)


def test_and_is_the_weighted_sum_of_its_prompts(pipe: Any) -> None:
    cat, dog, none = (encoded(pipe, text) for text in ("a cat", "dog", ""))
    result = pipe.txt2img("a cat AND dog :0.4", guidance_scale=3.0, **EULER)
    near(result, by_hand(pipe, [[(1, cat), (0.4, dog)]] * 4, scale=3, negative=none))
    assert result.plan.batching == "several" and result.plan.evaluations == 12 and result.plan.prompt.composed == 2
    near(pipe.txt2img("a cat :0.5 AND a cat :0.5", guidance_scale=3.0, **EULER), by_hand(pipe, [[(1, cat)]] * 4, scale=3, negative=none))
    away = pipe.txt2img("a cat AND dog :-1", guidance_scale=3.0, guidance_rescale=0.5, guidance_interval=(0.3, 0.9), **EULER)
    assert away.plan.evaluations == 12 and bool(torch.isfinite(away.latents).all())


@pytest.mark.parametrize("prompt", ["a cat AND dog :0.4", "[a cat:(dog:1.3):0.5]", "[cat|dog] AND (tree:0.5)"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "ddpm"])
def test_a_batch_is_its_pictures_one_by_one(pipe: Any, prompt: str, sampler: str) -> None:
    said = {"sampler": sampler, "steps": 3}
    batch = pipe.txt2img(prompt, seed=5, batch=2, **said)
    assert [image.tobytes() for image in batch] == [pipe.txt2img(prompt, seed=seed, **said).image.tobytes() for seed in (5, 6)]


def test_the_plan_counts_what_the_network_is_asked(pipe: Any) -> None:
    """Steps of an edit are the last ones of the whole run."""
    photo = pipe.txt2img("a cat", **EULER).image
    plan = pipe.plan("[a cat:dog:0.75]", image=photo, strength=0.5, steps=8, sampler="euler")
    assert (plan.first_step, plan.steps) == (5, 4) and [span.last for span in plan.prompt.spans] == [6, 8]
    said = {"image": photo, "strength": 0.5, "steps": 8, "sampler": "euler", "seed": 2}
    late = pipe.img2img("[a cat:dog:0.5]", **said).image.tobytes()  # step 4 is over when it starts
    assert late == pipe.img2img("dog", **said).image.tobytes() != pipe.img2img("[a cat:dog:0.75]", **said).image.tobytes()


def test_what_is_refused_says_what_to_do(pipe: Any) -> None:
    for prompt, said, words in (("a cat AND dog", {"guidance_scale": 1.0}, "raise guidance_scale"), ("a", {"dialect": "a1"}, "dialect is 'a1'"),
                                ("a", {"weighting": "compel"}, "weighting is 'compel': expected 'a1111', 'a1111_no_norm' or 'comfy'")):
        with pytest.raises(RequestError, match=words) as caught:
            pipe.plan(prompt, **said)
        assert "\n" not in str(caught.value)
    loose = pipe.plan("a cat AND dog", guidance_scale=1.0, strict=False)
    assert loose.prompt.composed == 1 and any("ignored: prompt joins 2 prompts by AND" in note for note in loose.notes)
    odd = pipe.plan("a (cat", negative_prompt="dog AND tree")
    assert any("no partner" in note for note in odd.notes) and any("AND is read as a word" in note for note in odd.notes) and odd.batching == "pair"


def test_a_weight_is_not_taken_for_another_by_the_memo(pipe: Any) -> None:
    first = [bytes_of(pipe, prompt) for prompt in ("a (cat:1.5)", "a (cat:0.5)", "a cat", "(a:1.5) cat")]
    assert len({*first}) == 4 and first == [bytes_of(pipe, prompt) for prompt in ("a (cat:1.5)", "a (cat:0.5)", "a cat", "(a:1.5) cat")]


def heard(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor, Tensor, Tensor | None]]:
    """(reader, states before, states after, the empty prompt's where they are known) of all that `encode` weighs from now on, by the pipeline's own rule."""
    import latentgen.conditioning.weighting as rules

    seen: list[tuple[str, Tensor, Tensor, Tensor | None]] = []
    real = rules.Weighing.__call__

    def watched(self: Any, reader: str, states: Tensor) -> Tensor:
        made = real(self, reader, states)
        seen.append((reader, states, made, self.empty.get(reader)))
        return made

    monkeypatch.setattr(rules.Weighing, "__call__", watched)
    return seen


@pytest.mark.parametrize("kind, readers, deaf", [
    ("sd15", ["tokenizer"], ()), ("sd21", ["tokenizer"], ()), ("sdxl", ["tokenizer", "tokenizer_2"], ()),
    ("sd3", ["tokenizer", "tokenizer_2", "tokenizer_3"], ()),
    ("flux1", ["tokenizer_2"], ("tokenizer",)), ("flux2", ["tokenizer"], ()), ("pixart", ["tokenizer"], ()), ("zimage", ["tokenizer"], ()),
    ("qwenimage", ["tokenizer"], ())])
def test_every_family_weighs_all_that_its_network_reads(kind: str, readers: list[str], deaf: tuple[str, ...], tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = latentgen.load(tiny(kind).save(tmp_path), dtype="float32", device="cpu", progress=False)
    said = {"width": 64, "height": 64, "steps": 1, "seed": 1, "sampler": "euler"}
    plain = pipe.txt2img("a red heart", **said).latents
    seen = heard(pipe, monkeypatch)
    result = pipe.txt2img("a (red:1.5) heart", **said)
    assert [reader for reader, *_ in seen] == readers and not torch.equal(result.latents, plain)
    for reader, before, after, _ in seen:
        weights = torch.tensor(result.plan.prompt.chunks[reader].weights)
        assert (weights == 1.5).any() and torch.equal(after, weighted(before, weights, "a1111")) and not torch.equal(before, after)
    assert [note for note in result.notes if "weights say nothing" in note] == [
        f"weights say nothing to {reader}, whose pooled vector alone is used" for reader in deaf]
    again = pipe.txt2img("a (red:1.5) heart", **said)  # from the memo, with the note
    assert torch.equal(again.latents, result.latents) and again.notes == result.notes
    seen.clear()
    other = pipe.txt2img("a (red:1.5) heart", dialect="comfy", **said)
    assert bool(torch.isfinite(other.latents).all()) and not torch.equal(other.latents, plain) and [reader for reader, *_ in seen] == readers
    for reader, before, after, empty in seen:  # ComfyUI's rule: away from the empty prompt, token by token
        weights = torch.tensor(other.plan.prompt.chunks[reader].weights)[..., None]
        assert empty is not None and not torch.equal(empty, before)
        torch.testing.assert_close(after, torch.where(weights == 1, before, (before - empty) * weights + empty), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind, said", [("sd15-instruct", {}), ("sdxl", {}), ("flux1", {"true_cfg_scale": 3.0}), ("qwenimage", {})])
def test_and_goes_with_every_kind_of_guidance(kind: str, said: dict[str, Any], tmp_path: Path) -> None:
    """Two evaluations or three, guidance that is built in, and a family's own rule."""
    pipe = latentgen.load(tiny(kind).save(tmp_path), dtype="float32", device="cpu", progress=False)
    said = said | {"width": 64, "height": 64, "steps": 2, "seed": 1, "sampler": "euler", "negative_prompt": "dog"}
    said |= {"reference": Image.effect_noise((64, 64), 60).convert("RGB")} if kind == "sd15-instruct" else {}
    said |= {"guidance_scale": 3.0} if kind == "qwenimage" else {}
    plain, same, other = (pipe.stream(text, **said).result for text in ("a cat", "a cat :0.25 AND a cat :0.75", "a cat AND a tree"))
    torch.testing.assert_close(same.latents, plain.latents, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(other.latents, plain.latents, atol=1e-3) and other.plan.batching == "several"
    assert other.plan.evaluations == plain.plan.evaluations + 2


def test_explain_from_python_and_from_the_command_line(pipe: Any, tiny_folder: Path) -> None:
    made = pipe.explain("[a (cat:1.2):dog:0.5]", steps=4)
    assert [row[:2] for row in made.schedule] == [(1, 2), (3, 4)] and "1.2" in str(made) and "<table" in made._repr_html_()
    assert len(pipe.explain("[a (cat:1.2):dog:0.5]", dialect="plain").prompts) == 1 and pipe.explain("a").steps == 4
    call = ["explain", "[a (cat:1.2):dog:0.5]", "--model", str(tiny_folder), "--steps", "4"]
    done, data = CliRunner().invoke(app, call), CliRunner().invoke(app, [*call, "--json"])
    assert done.exit_code == data.exit_code == 0 and done.stdout.strip() == str(made)
    assert json.loads(data.stdout)["schedule"][0][:2] == [1, 2]
    assert CliRunner().invoke(app, [*call, "--dialect", "latin"]).exit_code == 2
