"""No step of a run waits for a GPU: on a device that is made up, over every family, sampler and guider; and on a real one, where torch tells of each wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny
from fake_gpu import GPU, Waits, waited
from PIL import Image
from tiny_folders import MAKERS, tiny
from torch._subclasses.fake_tensor import FakeTensorMode

import latentgen
from latentgen.diffusion.level import VariancePreserving
from latentgen.diffusion.sample import SAMPLERS
from latentgen.diffusion.schedule import Levels, scaled_linear
from latentgen.run.work import _sent

TEAL = Image.new("RGB", (64, 64), "teal")
SAID: dict[str, Any] = {"prompt": "a cat", "steps": 2, "width": 64, "height": 64, "seed": 0}
ONCE = 16  # waits of a run's first step: whether both sides of guidance are the same is looked up for each shared layer, and tables of places are made
WAYS: dict[str, dict[str, Any]] = {
    "pag": {"guiders": "pag"}, "apg": {"guiders": "apg"}, "cfg_zero": {"guiders": "cfg_zero"}, "mimic": {"guiders": "mimic"}, "cfg_pp": {"guiders": "cfg_pp"},
    "perp_neg": {"guiders": "perp_neg", "negative_prompt": "a dog"}, "thresholds": {"guiders": "dynamic_threshold"}, "rescale": {"guidance_rescale": 0.7},
    "inpaint": {"image": TEAL, "mask": Image.new("L", (64, 64), 255)}, "seamless": {"seamless": "both"}, "batch": {"batch": 2},
    "deep_cache": {"approximate": "deep_cache"}, "token_merging": {"approximate": "token_merging"}, "AND": {"prompt": "a cat AND a dog"},
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Any] = {}

    def load(kind: str) -> Any:
        if kind not in made:
            place = tmp_path_factory.mktemp(kind)
            folder = make_tiny(place) if kind == "glyph" else tiny(kind).save(place / kind)
            made[kind] = latentgen.load(folder, dtype="float32", device="cpu", progress=False)
        return made[kind]

    return load


def plan(pipe: Any, **more: Any) -> Any:
    return pipe.plan(**SAID | ({"reference": TEAL} if pipe.family.task == "edit" else {}) | more)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("sd15-inpaint", "sd21", "sdxl-refiner"))) for kind in (*MAKERS, "glyph")])
def test_no_step_of_any_family_waits(load: Any, kind: str) -> None:
    first, *later = waited(load(kind), plan(load(kind)))
    assert later and not any(later), later
    assert len(first) <= ONCE, first


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way in ("cfg_pp", "rescale", "cfg_zero", "batch", "AND"))) for way in WAYS])
def test_no_way_of_guiding_or_editing_waits(load: Any, way: str) -> None:
    _, *later = waited(load("sd15"), plan(load("sd15"), **WAYS[way]))
    assert later and not any(later), later


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sampler_waits(name: str) -> None:
    path = VariancePreserving(scaled_linear(1000, 0.00085, 0.012))
    levels = Levels([path.at(s) for s in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)], path)
    with FakeTensorMode(), Waits() as waits:
        x = torch.zeros(2, 4, 8, 8, device=GPU)
        steps = list(SAMPLERS[name].function(lambda x, level: 0.5 * x, x, levels, noise=lambda: torch.zeros_like(x)))
    assert len(steps) == 5 and steps[-1].x.device == GPU and not waits.taken()


def test_the_record_tells_every_kind_of_wait() -> None:
    with FakeTensorMode(), Waits() as waits:
        x, here = torch.zeros(2, 3, device=GPU), torch.zeros(3)
        quiet = (lambda: x + 1, lambda: torch.full((2,), 3.0, device=GPU), lambda: here.to(GPU, non_blocking=True), lambda: x.to(torch.bfloat16), lambda: here.sum().item(),
                 lambda: x.masked_fill(x > 0, 1.0))
        loud = (lambda: x.sum().item(), lambda: bool((x > 0).all()), lambda: torch.equal(x, x), lambda: torch.tensor([1.5], device=GPU), lambda: here.to(GPU),
                lambda: x.cpu(), lambda: x.copy_(here))
        for ask in quiet:
            ask()
            assert not waits.taken()
        for ask in loud:
            ask()
            (what,) = waits.taken()
            assert "test_no_waits.py" in what[1]


def test_noise_goes_as_it_is() -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert _sent(noise, torch.device("cpu")) is noise


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*MAKERS, "glyph"])
def test_no_step_waits_on_a_real_gpu(kind: str, tmp_path: Path) -> None:
    """With a sampler that draws noise in every step; torch raises where the host waits."""
    folder = make_tiny(tmp_path) if kind == "glyph" else tiny(kind).save(tmp_path / kind)
    pipe = latentgen.load(folder, device="cuda", progress=False)
    said = SAID | {"steps": 4, "sampler": "euler_ancestral"} | ({"reference": TEAL} if pipe.family.task == "edit" else {})
    pipe.stream(**said).result.image  # noqa: B018 - kernels are chosen, and page-locked memory is taken, once
    run, made = pipe.stream(**said), 0
    try:
        for step in run:
            torch.cuda.set_sync_debug_mode("default" if step.index + 2 >= step.total else "error")  # after the last step pictures are read
            made += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert made == 4 and torch.isfinite(run.result.latents).all()
