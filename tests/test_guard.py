"""Numbers that go wrong at any stage: named, cured in float32 where that is the cure, and never returned as a picture in silence."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_pipeline import edited_weights, fresh, hole, picture, same

from latentgen.errors import ModelError, NotFiniteError
from latentgen.run.guard import Watch, check_words, even, flat, once_more

each = pytest.mark.parametrize


def swollen(folder: Path, target: Path, part: str, *, first: str, last: str) -> Path:
    """A copy whose part computes with numbers that float16 does not have, and gives what it gave before up to rounding."""
    def swell(tensors: dict[str, torch.Tensor]) -> None:
        for name, factor in ((first, 1e5), (last, 1e-5)):
            tensors[name] *= factor

    return edited_weights(folder, target, part, swell)


# The pieces


def test_once_more() -> None:
    asked: list[torch.dtype] = []

    def compute(dtype: torch.dtype) -> str:
        asked.append(dtype)
        if dtype != torch.float32:
            raise NotFiniteError("too large")
        return "fine"

    assert once_more("it was made", compute, torch.float16) == ("fine", ("it was made once more in float32: too large",))
    assert asked == [torch.float16, torch.float32]
    assert once_more("it was made", compute, torch.float32) == ("fine", ())
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(NotFiniteError, match="^too large$"):
            once_more("it was made", lambda dtype: compute(torch.float16), dtype)


def test_the_first_step_that_went_wrong_is_found() -> None:
    watch, fine = Watch(), torch.zeros(3, 4, 2, 2)
    assert watch.first() is None
    bad = fine.clone()
    bad[1, 0, 0, 0] = float("inf")
    worse = bad.clone()
    worse[0, 3, 1, 1] = float("nan")
    for x0, x in ((fine, fine), (fine, bad), (worse, worse)):
        watch.see(x0, x)
    assert watch.first() == (1, (1,))


def test_watching_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step leaves flags where it was computed; what makes a host wait for a device is asked for once, in the end."""
    waited: list[str] = []
    for name in ("__bool__", "item", "cpu", "tolist", "__float__", "__int__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *rest, _real=real, _name=name: waited.append(_name) or _real(self, *rest))
    watch = Watch()
    for _ in range(5):
        watch.see(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3))
    assert waited == []
    assert watch.first() is None and waited.count("cpu") == 1


def test_flat_is_one_colour_to_a_byte() -> None:
    grey = torch.full((1, 3, 4, 4), 0.1)
    nearly, off, dark = grey.clone(), grey.clone(), torch.rand((1, 3, 4, 4), generator=torch.Generator().manual_seed(0)) - 3
    nearly[0, 1, 2, 2] += 2 / 255
    off[0, 1, 2, 2] += 6 / 255
    assert flat(torch.cat([grey, nearly, off, dark])) == [True, True, False, True]  # below black is black
    colours = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert flat(colours) == [True] and even(torch.cat([grey, off])) == [True, False]


def test_the_encoder_that_overflowed_is_named() -> None:
    fine, bad = torch.zeros(1, 2, 3), torch.full((1, 2, 3), float("inf"))
    check_words({"tokenizer": fine}, fine, None, torch.float16)
    with pytest.raises(NotFiniteError, match=r"the text encoder \(text_encoder_2\) gave NaN or infinity in float16"):
        check_words({"tokenizer": fine, "tokenizer_2": bad}, bad, fine, torch.float16)
    with pytest.raises(NotFiniteError, match="the text encoder gave NaN or infinity in bfloat16"):
        check_words({"tokenizer": fine}, fine, bad[0], torch.bfloat16)


# The stages of a run


def test_a_text_encoder_that_overflows_is_run_once_more_in_float32(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "swollen"
    edited_weights(tiny_folder, folder, "text_encoder", lambda tensors: [tensors[name].mul_(6e4) for name in tensors if name.endswith("fc1.weight")])
    half = fresh(folder, dtype="float16")
    note = "the words were encoded once more in float32: the text encoder (text_encoder) gave NaN or infinity in float16"
    for _ in range(2):  # the second time from the memo
        made = half.txt2img("a (cat:1.2)", weighting="comfy", steps=2, seed=0)
        assert sum(note in one for one in made.notes) == 1, made.notes
    assert {key[1] for key in half.residency._here} == {torch.float16}  # the copy in float32 is not kept


def test_a_picture_that_half_precision_flattens_is_decoded_again(tiny_folder: Path, tmp_path: Path) -> None:
    half, calls = fresh(tiny_folder, dtype="float16"), []
    real = half.family

    def flattening(vae: Any, raw: torch.Tensor) -> torch.Tensor:
        calls.append(raw.dtype)
        pixels = vae.decode(raw).sample
        return pixels if raw.dtype == torch.float32 else torch.full_like(pixels, -1.5)

    own = copy(half)
    own.family = replace(real, vae_decode=flattening)
    made = own.txt2img("a cat", steps=2, seed=[7, 8])
    assert calls == [torch.float16] * 2 + [torch.float32] * 2
    assert made.notes == ("picture 1 (seed 7), 2 (seed 8) came out of the decoder as one flat colour in float16 and was decoded once more in float32",)
    assert made.image.getextrema() != ((0, 0),) * 3 and made.notes == tuple(made.recipe["notes"])


@each("value, why", [(-1.5, "its latent is not, so the decoder lost it"), (0.3, "so the decoder lost it")])
def test_a_flat_picture_is_told(pipe, value: float, why: str) -> None:
    own = copy(pipe)
    own.family = replace(pipe.family, vae_decode=lambda vae, raw: torch.full((len(raw), 3, raw.shape[2] * 8, raw.shape[3] * 8), value))
    made = own.txt2img("a cat", steps=2, seed=7)
    assert [note for note in made.notes if note.startswith("the picture is one flat colour: ") and why in note], made.notes
    assert own.txt2img("a cat", steps=1, seed=7, width=8, height=8).notes == pipe.txt2img("a cat", steps=1, seed=7, width=8, height=8).notes  # one latent says one thing


def test_a_flat_latent_is_told(pipe) -> None:
    own = copy(pipe)
    own.family = replace(pipe.family, prediction="x0", predict=lambda modules, x, level, words: torch.zeros_like(x),
                         vae_decode=lambda vae, raw: raw[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))
    made = own.txt2img("a cat", steps=2, seed=7, sampler="ddim")
    assert any("its latent is flat, so the denoiser gave nothing" in note for note in made.notes), made.notes


def test_a_flat_source_may_stay_flat(pipe) -> None:
    own = copy(pipe)
    own.family = replace(pipe.family, vae_decode=lambda vae, raw: torch.full((len(raw), 3, raw.shape[2] * 8, raw.shape[3] * 8), 0.3))
    grey = Image.new("RGB", (64, 64), (166,) * 3)
    assert not any("flat" in note for note in own.img2img("a cat", grey, steps=2, seed=0).notes)
    assert any("flat" in note for note in own.inpaint("a cat", picture(), hole(64, 64), steps=2, seed=0).notes)
    same(pipe.img2img("a cat", grey, steps=2, seed=0), pipe.img2img("a cat", grey, steps=2, seed=0))


def test_weights_that_half_precision_does_not_hold(tiny_folder: Path, tmp_path: Path) -> None:
    folder = edited_weights(tiny_folder, tmp_path / "large", "unet", lambda tensors: tensors["conv_in.weight"].fill_(7e4))
    with pytest.raises(ModelError, match="conv_in.weight.*dtype='float32', for float16 holds no number above 65504"):
        fresh(folder, dtype="float16").txt2img("a cat", steps=1, seed=0)
    assert fresh(folder).txt2img("a cat", steps=1, seed=0).image.size == (64, 64)


def overflowing(pipe: Any, *, after: int, cured: bool = True, row: int = 0) -> tuple[Any, list[torch.dtype]]:
    """A pipeline whose network gives infinity from its call number `after` on, in half precision only where that is the cure."""
    seen: list[torch.dtype] = []

    def predict(modules: Any, x: torch.Tensor, level: Any, words: Any) -> torch.Tensor:
        answer = pipe.family.predict(modules, x, level, words)
        if not x.any():  # a call that tables are made from
            return answer
        seen.append(next(iter(modules.values())).dtype)
        if len(seen) > after and not (cured and seen[-1] == torch.float32):
            answer[row, 0, 0, 0] = float("inf")
        return answer

    own = copy(pipe)
    own.family = replace(pipe.family, predict=predict)
    return own, seen


@pytest.fixture(scope="module")
def half(tiny_folder: Path) -> Any:
    return fresh(tiny_folder, dtype="float16")


@each("options", [{"sampler": "euler_ancestral"}, {"image": picture(), "mask": hole(64, 64), "sampler": "dpmpp_2m_sde"}], ids=str)
def test_a_denoiser_that_overflows_is_run_once_more_in_float32(half, tiny_folder: Path, options: dict) -> None:
    own, seen = overflowing(half, after=2)
    run = own.stream("a cat", steps=4, seed=7, guidance_scale=1.0, **options)
    steps = [step.index for step in run]
    assert steps == [0, 1, 2, 3] * 2 and seen == [torch.float16] * 4 + [torch.float32] * 4
    assert run.result.notes == ("all steps were run once more with the denoiser in float32: the denoiser gave NaN or infinity in float16, in step 3 of 4: "
                                "run it in float32",) and run.result.recipe["notes"] == list(run.result.notes)
    assert {key[1] for key in half.residency._here} == {torch.float16}  # the copy in float32 is not kept
    # what it then does is what a float32 network does on words and pictures encoded in float16
    words = fresh(tiny_folder).stream("a cat", steps=4, seed=7, guidance_scale=1.0, **options).result
    torch.testing.assert_close(run.result.latents, words.latents, rtol=0, atol=0.05)


def test_the_picture_that_went_wrong_is_named(half) -> None:
    own, _ = overflowing(half, after=1)
    made = own.txt2img("a cat", steps=2, seed=[7, 9], guidance_scale=1.0)  # on a CPU one picture a call: the second one of the first step
    assert "in float16, in step 1 of 2 for picture 2 (seed 9): run it in float32" in made.notes[0]


@each("dtype", ["float16", "float32"])
def test_what_float32_does_not_cure_is_an_error_that_names_the_step(half, pipe, dtype: str) -> None:
    own, _ = overflowing(half if dtype == "float16" else pipe, after=2, cured=False)
    step = {"float16": "step 1 of 4", "float32": "step 3 of 4"}[dtype]  # run once more, it is wrong from the start
    with pytest.raises(NotFiniteError, match=f"in float32, in {step}: check its weights and guidance_scale"):
        own.txt2img("a cat", steps=4, seed=7, guidance_scale=1.0)


def test_room_on_a_gpu(half, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bytes for each number of the stage, beside what the device says is free and what torch holds of it unused."""
    half.txt2img("a cat", steps=1, seed=0)
    on_gpu = copy(half.residency)
    on_gpu.device = torch.device("cuda")
    with half.residency.use("denoiser") as modules:
        need = 4 * sum(p.numel() for p in modules["unet"].parameters())
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    for free, fits in ((need - 2000, True), (need - 2001, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, _free=free: (_free, 10**12))
        assert on_gpu.room("denoiser", torch.float32) is fits
    assert half.residency.room("denoiser", torch.float32)  # elsewhere it is tried


def test_without_room_the_second_try_comes_block_by_block(half, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = overflowing(half, after=2)[0].txt2img("a cat", steps=4, seed=7, guidance_scale=1.0)
    streamed: list[bool] = []
    real = type(half.residency)._take
    monkeypatch.setattr(type(half.residency), "room", lambda self, stage, dtype: False)
    monkeypatch.setattr(type(half.residency), "_take", lambda self, part, key, policy: streamed.append((key[1], policy)) or real(self, part, key, policy))
    made = overflowing(half, after=2)[0].txt2img("a cat", steps=4, seed=7, guidance_scale=1.0)
    assert (torch.float32, "stream") in streamed and (torch.float16, "stream") not in streamed
    same(made, whole)


def test_an_interrupted_second_try_goes_on(half, tmp_path: Path) -> None:
    whole = overflowing(half, after=2)[0].txt2img("a cat", steps=4, seed=7, guidance_scale=1.0)
    run = overflowing(half, after=2)[0].stream("a cat", steps=4, seed=7, guidance_scale=1.0, save_state=tmp_path / "a.state", save_every=1)
    for _ in range(6):
        next(run)
    run.close()
    same(half.resume(tmp_path / "a.state"), whole)
    assert half.resume(tmp_path / "a.state").notes == whole.notes


def test_weights_that_make_half_precision_overflow(tiny_folder: Path, tmp_path: Path) -> None:
    """Nothing injected: a network whose first layer gives more than float16 holds."""
    own = fresh(swollen(tiny_folder, tmp_path / "swollen", "unet", first="conv_in.weight", last="conv_out.weight"), dtype="float16")
    made = own.txt2img("a cat", steps=2, seed=0)
    assert any("in float16, in step 1 of 2: run it in float32" in note for note in made.notes) and bool(torch.isfinite(made.latents).all())
