"""Between two prompts: the states by the formula written out, the ends exactly, every family, and what has no way between."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_prompts_run import EULER, by_hand, encoded, near
from tiny_folders import MAKERS, tiny
from torch import Tensor

import latentgen
from latentgen.errors import RequestError
from latentgen.models.family import Conditioning
from latentgen.run.batch import blended

SHORT, LONG = "a cat", "a dog and a tree, blue and red " * 6  # of one chunk, of several
UNPADDED = ("zimage", "qwenimage")  # read each text at its own length


def on_the_sphere(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Shoemake's formula for each row of two matrices, in a loop; the straight line where rows are parallel."""
    rows = []
    for one, other in zip(a.reshape(-1, a.shape[-1]).double(), b.reshape(-1, b.shape[-1]).double(), strict=True):
        w = math.acos(min(1.0, float(one @ other / one.norm() / other.norm())))
        rows.append(one + t * (other - one) if w < 1e-3 else (math.sin((1 - t) * w) * one + math.sin(t * w) * other) / math.sin(w))
    return torch.stack(rows).reshape(a.shape).float()


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_states_between_lie_on_the_sphere(pipe: Any, share: float) -> None:
    result = pipe.txt2img(SHORT, blend_prompt="a dog", blend=share, guidance_scale=1.0, **EULER)
    between = Conditioning(on_the_sphere(encoded(pipe, SHORT).tokens, encoded(pipe, "a dog").tokens, share))
    near(result, by_hand(pipe, [[(1, between)]] * 4, scale=1))
    norms = [c.tokens.norm(dim=-1) for c in (encoded(pipe, SHORT), between)]
    torch.testing.assert_close(*norms, rtol=0.02, atol=0)  # no word is said more softly on the way


def test_guidance_and_schedules_go_on_as_ever(pipe: Any) -> None:
    result = pipe.txt2img("[a cat:a tree:2]", blend_prompt="a [dog:car:3]", blend=0.3, guidance_scale=3.0, **EULER)
    a, b = (["a cat"] * 2 + ["a tree"] * 2), (["a dog"] * 3 + ["a car"])
    said = [[(1, Conditioning(on_the_sphere(encoded(pipe, one).tokens, encoded(pipe, other).tokens, 0.3)))] for one, other in zip(a, b, strict=True)]
    near(result, by_hand(pipe, said, scale=3, negative=encoded(pipe, "")))


def test_the_ends_are_the_prompts_themselves(pipe: Any) -> None:
    for blend, alone in ((0.0, SHORT), (1.0, LONG)):
        made = pipe.txt2img(SHORT, blend_prompt=LONG, blend=blend, **EULER)
        assert made.image.tobytes() == pipe.txt2img(alone, **EULER).image.tobytes()
    assert torch.equal(pipe.txt2img(SHORT, blend_prompt=LONG, **EULER).latents, pipe.txt2img(SHORT, blend_prompt=LONG, blend=0.5, **EULER).latents)


def test_two_texts_that_are_one_stay_it(pipe: Any) -> None:
    assert pipe.txt2img(SHORT, blend_prompt=SHORT, blend=0.4, **EULER).image.tobytes() == pipe.txt2img(SHORT, **EULER).image.tobytes()


@pytest.mark.parametrize("texts", [(SHORT, LONG), (LONG, SHORT), (SHORT, "")])
def test_texts_of_other_lengths_have_as_many_chunks(pipe: Any, texts: tuple[str, str]) -> None:
    plan = pipe.plan(texts[0], blend_prompt=texts[1], blend=0.5, guidance_scale=4.0)
    assert len(plan.prompt.ids) == len(plan.prompt.towards.ids) == len(plan.negative.ids)
    assert "turned by 0.5 towards" in str(plan)
    ends = [pipe.txt2img(text, **EULER).latents for text in texts]
    middle = pipe.txt2img(texts[0], blend_prompt=texts[1], **EULER).latents
    assert all((middle - end).abs().max() > 1e-3 for end in ends)


@pytest.mark.parametrize("kind", sorted({*MAKERS} - {"sd15-instruct", "sd15-inpaint", "sdxl-refiner"}))
def test_every_family_has_a_way_between(tmp_path: Path, kind: str) -> None:
    model = latentgen.load(tiny(kind).save(tmp_path), dtype="float32", device="cpu", progress=False)
    said = {"seed": 1, "steps": 2, "width": 64, "height": 64}
    a, b, between = (model.txt2img("red", **said, **more).latents for more in ({}, {"blend_prompt": "cat", "blend": 1.0}, {"blend_prompt": "cat", "blend": 0.5}))
    assert torch.isfinite(between).all() and min((between - end).abs().max() for end in (a, b)) > 1e-5
    if kind in UNPADDED:
        with pytest.raises(RequestError, match="reads each text at its own length"):
            model.plan("red", blend_prompt="a cat and a dog", blend=0.5)


def test_masks_hear_what_either_hears_and_one_input_is_left_alone() -> None:
    told = torch.ones(1, 2)
    a, b = (Conditioning(torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(n)), torch.full((1, 4), 1.0 + n),
                         {"mask": torch.tensor([mask]), "told": told}) for n, mask in enumerate(([1, 1, 0], [1, 0, 0])))
    made = blended(a, b, 0.5)
    assert made.extra["mask"].tolist() == [[1, 1, 0]] and made.extra["told"] is told
    torch.testing.assert_close(made.pooled, torch.full((1, 4), 1.5))


def test_a_file_replays_it(pipe: Any, tmp_path: Path) -> None:
    file, = pipe.txt2img(SHORT, blend_prompt="", blend=0.25, **EULER).save(tmp_path / "a.png")
    assert latentgen.read_recipe(file).fields | {"blend_prompt": "", "blend": 0.25} == latentgen.read_recipe(file).fields
    assert pipe.replay(file).identical


@pytest.mark.parametrize("said, message", [
    ({"blend": 0.5}, "there is no blend_prompt"), ({"blend_prompt": "a AND b", "blend": 0.5}, "joins prompts by AND"),
    ({"blend_prompt": "a", "blend": 1.5}, "blend is 1.5: expected a number from 0"), ({"blend_prompt": 3}, "blend_prompt is 3: expected one string"),
])
def test_what_cannot_be_between_is_refused(pipe: Any, said: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe.plan(SHORT, **said)
    with pytest.raises(RequestError, match="did you mean 'blend'"):
        pipe.plan(SHORT, conditioning_to_strength=0.5)


def test_without_strictness_it_is_noted(pipe: Any) -> None:
    assert any("no blend_prompt" in note for note in pipe.plan(SHORT, blend=0.5, strict=False).notes)
