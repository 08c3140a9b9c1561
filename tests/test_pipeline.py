"""What must hold of any request, whatever the weights: the batch, the thread, the process and the policy never change a picture."""

import hashlib
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import latentgen
from latentgen.diffusion import SAMPLERS
from latentgen.errors import NotFiniteError, RequestError
from latentgen.models.modulation import modulation_names
from latentgen.pixels.mask import canvas
from latentgen.run.memo import Memo
from latentgen.run.recipe import make_recipe

each_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def fresh(folder, **options):
    return latentgen.load(folder, **{"dtype": "float32", "device": "cpu", "progress": False} | options)


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.size == other.size and one.tobytes() == other.tobytes()


def picture(width=64, height=64, seed=1):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def hole(width, height, *, soft=False):
    """A mask: a white box off the latent grid, and if soft a ramp beside it."""
    values = np.zeros((height, width), dtype=np.uint8)
    values[height // 5:height // 2, width // 4:width // 2 + 3] = 255
    if soft:
        values[height // 2:height // 2 + 7] = np.linspace(1, 254, width, dtype=np.uint8)
    return Image.fromarray(values)


def counted(pipe):
    """A pipeline of the same weights that notes how many pictures each call of its network sees."""
    seen = []

    def predict(modules, x, level, conditioning):
        if x.any():  # not the calls of zeros that tables are made from
            seen.append(len(x))
        return pipe.family.predict(modules, x, level, conditioning)

    twin = copy(pipe)
    twin.family = replace(pipe.family, predict=predict)
    return twin, seen


def edited_weights(folder, target, part, change):
    """A copy of the checkpoint in which `change(tensors)` was applied to one part."""
    shutil.copytree(folder, target)
    file = next((target / part).glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file)
    return target


# Seeds, batches, processes, threads


def test_names_of_ours_in_another_case(pipe):
    plan = pipe.plan("a cat", sampler="DPMpp_2M", spacing="Karras", steps=3)
    assert (plan.sampler, plan.spacing, plan.levels) == ("dpmpp_2m", "karras", pipe.plan("a cat", sampler="dpmpp_2m", spacing="karras", steps=3).levels)
    assert make_recipe(plan, "", ())["sampler"] == "dpmpp_2m"
    with pytest.raises(RequestError, match="did you mean 'unipc' with order 3"):
        pipe.plan("a cat", sampler="UniPC")


@each_sampler
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_batch_is_its_pictures_one_by_one(pipe, sampler, guidance_scale):
    options = {"sampler": sampler, "guidance_scale": guidance_scale, "steps": 3, "width": 48}
    batch = pipe.txt2img("a cat", seed=10, batch=3, **options)
    assert batch.seeds == (10, 11, 12) and len({i.tobytes() for i in batch}) == 3
    same(batch, [pipe.txt2img("a cat", seed=seed, **options).image for seed in batch.seeds])


def test_edits_in_a_batch_too(pipe):
    options = {"image": picture(), "mask": hole(64, 64, soft=True), "steps": 3, "sampler": "dpmpp_2m_sde"}
    same(pipe.inpaint("a cat", batch=2, seed=4, **options), [pipe.inpaint("a cat", seed=seed, **options).image for seed in (4, 5)])


def test_the_picture_depends_on_what_was_said(pipe):
    """Else the equalities in this file would say little."""
    base = {"prompt": "a cat", "negative_prompt": "dog", "seed": 0, "steps": 5, "guidance_scale": 5.0}
    changes = [{}, {"prompt": "green tree"}, {"negative_prompt": "car"}, {"seed": 1}, {"steps": 6}, {"guidance_scale": 9.0}, {"guidance_rescale": 0.9},
               {"guidance_interval": (0.5, 1.0)}, {"sampler": "ddpm"}, {"spacing": "karras"}, {"sampler": "ddim", "eta": 0.5}, {"sampler": "ddim"}]
    run = [pipe.stream(**{"request" if k == "prompt" else k: v for k, v in (base | change).items()}) for change in changes]
    latents = [list(steps)[-1].x for steps in run]
    for i, a in enumerate(latents):
        for b in latents[:i]:
            assert not torch.equal(a, b)


def test_stream_is_the_call(pipe):
    options = {"steps": 4, "seed": 2, "sampler": "euler_ancestral"}
    run = pipe.stream("a cat", **options)
    steps = list(run)
    assert [s.index for s in steps] == [0, 1, 2, 3] and {s.total for s in steps} == {4} and [s.level for s in steps] == list(run.plan.levels[:-1])
    same(run.result, pipe.txt2img("a cat", **options))
    assert run.result is run.result
    half = pipe.stream(run.plan)
    next(half)
    same(half.result, run.result)  # `result` runs what is left
    seen = []
    pipe.txt2img("a cat", on_step=seen.append, **options)
    assert all(torch.equal(a.x, b.x) for a, b in zip(seen, steps, strict=True))
    assert pipe.preview(steps[0])[0].size == (8, 8)


@pytest.mark.parametrize("policy", ["resident", "stage"])
def test_eight_threads_are_eight_runs_in_a_row(tiny_folder, pipe, policy):
    asked = [{"prompt": f"a {w}", "seed": n, "sampler": s, "steps": 3, "width": 48 + 8 * (n % 3)}
             for n, (w, s) in enumerate(zip(["cat", "dog", "tree", "car"] * 2, ("ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"), strict=True))]
    asked[5] |= {"image": picture(56, 64), "mask": hole(56, 64), "width": 56}
    asked[6] |= {"image": picture(64, 40, seed=3), "width": 64}
    method = {5: "inpaint", 6: "img2img"}
    expected = [getattr(pipe, method.get(n, "txt2img"))(**said).image for n, said in enumerate(asked)]
    shared = fresh(tiny_folder, residency=policy)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            made = list(pool.map(lambda n: getattr(shared, method.get(n, "txt2img"))(**asked[n]).image, range(8)))
            same(made, expected)
    assert (shared.residency.resident_bytes() == 0) is (policy == "stage")


def test_a_new_process_makes_the_same_picture(tiny_folder, pipe):
    code = ("import sys, hashlib, torch, latentgen\ntorch.manual_seed(99)\npipe = latentgen.load(sys.argv[1], dtype='float32', device='cpu', progress=False)\n"
            "print(hashlib.sha256(pipe.txt2img('a cat', seed=5, steps=3, sampler='ddpm').image.tobytes()).hexdigest())")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tiny_folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == hashlib.sha256(pipe.txt2img("a cat", seed=5, steps=3, sampler="ddpm").image.tobytes()).hexdigest()


def test_no_global_generator_is_touched(tiny_folder):
    def state():
        generators = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        return *generators, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()

    before = state()
    fresh(tiny_folder).inpaint("a cat", picture(), hole(64, 64), sampler="ddpm", batch=2)
    assert state() == before


def test_settings_of_the_caller_do_not_reach_the_picture(pipe):
    expected = pipe.txt2img("a cat", seed=1, steps=2)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(1234)
        same(pipe.txt2img("a cat", seed=1, steps=2), expected)
    torch.set_default_dtype(torch.float64)
    try:
        same(pipe.txt2img("a cat", seed=1, steps=2), expected)
    finally:
        torch.set_default_dtype(torch.float32)


# Memory


def test_by_stage_is_resident(tiny_folder, pipe):
    staged = fresh(tiny_folder, residency="stage")
    options = {"image": picture(), "mask": hole(64, 64), "steps": 3, "seed": 1}
    same(staged.inpaint("a cat", **options), pipe.inpaint("a cat", **options))
    assert staged.residency.resident_bytes() == 0
    run = staged.stream("a cat", steps=2, seed=0)
    with pipe.residency.use("denoiser") as modules:  # of which modulations stay in their file
        left = sum(p.nbytes for name in modulation_names(modules["unet"]) for p in modules["unet"].get_submodule(name).parameters())
    assert [staged.residency.resident_bytes() for _ in run] == [run.plan.weights["denoiser"] - left] * 2
    assert run.result and staged.residency.resident_bytes() == 0


@pytest.mark.parametrize("policy", ["resident", "stage"])
def test_stopping_midway(tiny_folder, pipe, policy):
    own = fresh(tiny_folder, residency=policy)
    run = own.stream("a cat", steps=4, seed=0)
    next(run)
    run.close()
    run.close()
    with pytest.raises(RequestError, match="stopped before it was done"):
        run.result  # noqa: B018

    def stop(step):
        if step.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        own.txt2img("a cat", steps=4, seed=0, on_step=stop)
    assert stopped.traceback  # which would keep a generator that nobody closed
    assert all(users == 0 for users in own.residency._users.values())
    assert policy == "resident" or own.residency.resident_bytes() == 0
    never = own.stream("a cat", steps=4, seed=0)
    never.close()
    same(own.txt2img("a cat", steps=4, seed=0), pipe.txt2img("a cat", steps=4, seed=0))


def test_a_failing_network_leaves_the_pipeline_usable(pipe):
    broken = copy(pipe)
    broken.family = replace(pipe.family, predict=lambda *_: (_ for _ in ()).throw(MemoryError("too big")))
    with pytest.raises(MemoryError):
        broken.txt2img("a cat", steps=2, seed=0)
    assert all(users == 0 for users in pipe.residency._users.values())
    same(pipe.txt2img("a cat", steps=2, seed=0), pipe.txt2img("a cat", steps=2, seed=0))


@pytest.mark.parametrize("policy", ["resident", "stage"])
def test_what_was_encoded_is_remembered(tiny_folder, policy):
    own, calls = fresh(tiny_folder, residency=policy), []
    real = own.family.encode
    own.family = replace(own.family, encode=lambda modules, words: calls.append(tuple(map(tuple, words.ids["tokenizer"].tolist()))) or real(modules, words))
    first = own.txt2img("a cat", steps=1, seed=0, negative_prompt="dog")
    same(own.txt2img("a cat", steps=1, seed=0, negative_prompt="dog"), first)
    assert len(calls) == 2 == len(set(calls))
    own.txt2img("a cat", steps=1, seed=0, negative_prompt="car")
    own.txt2img("a cat", steps=1, seed=0, guidance_scale=1)
    assert len(calls) == 3  # one new text, and no negative one without guidance
    own.txt2img("a cat", steps=1, seed=0)
    loaded = []
    take = own.residency._take
    own.residency._take = lambda part, *how: loaded.append(part.name) or take(part, *how)
    own.img2img("a cat", picture(), steps=2, seed=0)
    own.img2img("a cat", picture(), steps=2, seed=1)
    assert loaded == ["vae", "unet", "vae", "unet", "vae"]  # nothing is read for a text or picture that is remembered


def test_the_memo_is_bounded():
    memo, made = Memo(limit=1000), []

    def get(key, count=25):
        return memo.get(key, lambda: made.append(key) or torch.zeros(count), lambda t: [t])

    for key in "abcdefghijabcdefghij":
        get(key)
    assert len(made) == 10 and memo._bytes == 1000
    get("k")  # "a" goes, the one used longest ago
    get("b")
    assert made[-1] == "k"
    get("a")
    assert made[-1] == "a" and memo._bytes == 1000
    get("huge", 1000)
    get("huge", 1000)
    assert made[-2:] == ["huge", "huge"] and memo._bytes == 1000 and len(memo._kept) == 10
    memo.clear()
    assert get("b") is not None and made[-1] == "b" and memo._bytes == 100


def test_the_memo_keeps_no_picture(tiny_folder):
    """Its keys are hashes: the pixels of a source picture, which its bound does not count, are not among them."""
    own = fresh(tiny_folder)
    own.img2img("a cat", picture(256, 256), steps=1, seed=0)
    longest = max(len(item) for key in own._memo._kept for item in key if isinstance(item, bytes))
    assert longest <= 32


# Evaluations


@each_sampler
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"guidance_interval": (0.3, 0.8)}, {"batch": 2}, {"steps": 1}, {"spacing": "karras"},
                                     {"image": picture(), "strength": 0.6}], ids=str)
def test_the_plan_counts_evaluations_exactly(pipe, sampler, options):
    own, seen = counted(pipe)
    options = {"steps": 5, "seed": 0, "sampler": sampler} | options
    if sampler == "restart" and options["steps"] == 1:
        with pytest.raises(RequestError, match="use more steps"):
            own.plan("a cat", **options)
        return
    run = own.stream("a cat", **options)
    assert run.result
    assert sum(seen) == run.plan.evaluations * len(run.result)
    assert set(seen) <= {1, 2}  # on a CPU one picture a call, or a guided pair of one


def test_guidance_that_is_off_costs_nothing(pipe):
    own, seen = counted(pipe)
    counts = []
    for options in ({}, {"guidance_interval": (0.4, 0.7)}, {"guidance_scale": 1}):
        own.txt2img("a cat", steps=10, sampler="euler", seed=0, **options)
        counts.append(sum(seen))
        seen.clear()
    assert counts[0] == 20 and 10 < counts[1] < 20 and counts[2] == 10


def test_rows_do_not_change_the_picture(pipe):
    """On a GPU a batch runs in one call: the same to rounding."""
    plan = pipe.plan("a cat", steps=3, seed=0, batch=3)
    one, many = pipe.stream(plan), pipe.stream(replace(plan, rows=3))
    torch.testing.assert_close(list(many)[-1].x, list(one)[-1].x, rtol=0, atol=1e-4)


# Kept pixels


def kept_exactly(made, original, mask):
    before, after, weight = np.asarray(original), np.asarray(made), np.asarray(mask)
    assert after.shape == before.shape
    assert (after[weight == 0] == before[weight == 0]).all()
    assert (after[weight == 255] != before[weight == 255]).any()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (67, 45), (8, 24), (9, 9)])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_kept_pixels_come_back_byte_for_byte(pipe, size, soft, strength):
    original, mask = picture(*size), hole(*size, soft=soft and min(size) > 30)
    result = pipe.inpaint("a cat", original, mask, steps=3, seed=0, strength=strength, batch=2)
    for made in result:
        kept_exactly(made, original, mask)
    assert result.plan.crop == size and result.plan.width % 8 == result.plan.height % 8 == 0


@pytest.mark.parametrize("size", [(64, 64), (67, 45)])
def test_an_empty_mask_returns_the_picture(pipe, size):
    result = pipe.inpaint("a cat", picture(*size), Image.new("L", size), steps=2, seed=0)
    same(result, [picture(*size)])
    assert "the mask is all black" in result.notes[0]


def test_a_full_mask_at_full_strength_is_made_from_words_alone(pipe):
    """At zero terminal SNR nothing of the source is in the first latent, and with a white mask nothing comes in later."""
    options = {"steps": 3, "seed": 3}
    same(pipe.inpaint("a cat", picture(), Image.new("L", (64, 64), 255), **options), pipe.txt2img("a cat", width=64, height=64, **options))


def test_a_latent_is_repainted_as_far_as_any_of_its_pixels(pipe):
    """One white pixel frees the whole latent it lies in; what of it is kept, the pasting back decides."""
    masks = np.zeros((2, 64, 64), np.float32)
    masks[0, 21, 30] = 1
    masks[1, 16:24, 24:32] = 1
    dot, cell = (list(pipe.stream("a cat", image=picture(), mask=mask, steps=3, seed=0))[-1].x for mask in masks)
    assert torch.equal(dot, cell)
    run = pipe.stream("a cat", image=picture(), steps=1)
    z0 = run._work.source_latents(run.plan.passes[0])
    changed = (dot != z0).any(dim=1)[0].nonzero().tolist()
    assert changed == [[2, 3]]


def test_outpaint(pipe):
    original = picture(40, 35)
    result = pipe.outpaint("a cat", original, left=10, right=5, bottom=20, steps=3, seed=0)
    assert result.image.size == (55, 55) and (result.plan.width, result.plan.height) == (56, 56)
    assert result.image.crop((10, 0, 50, 35)).tobytes() == original.tobytes()
    feathered = pipe.outpaint("a cat", original, top=16, feather=8, steps=3, seed=0)
    assert feathered.image.size == (40, 51)
    _, mask = canvas(original, top=16, feather=8)
    assert feathered.image.crop((0, 24, 40, 51)).tobytes() == original.crop((0, 8, 40, 35)).tobytes() and mask.getpixel((0, 20)) > 0


def test_img2img_keeps_the_size_and_more_at_lower_strength(pipe):
    original = picture(67, 45)
    latents = {}
    for strength in (0.2, 1.0):
        run = pipe.stream("a cat", image=original, strength=strength, steps=10, seed=0)
        latents[strength] = list(run)[-1].x
        assert run.result.image.size == (67, 45) and run.plan.steps == 10 * strength
    z0 = run._work.source_latents(run.plan.passes[0])
    assert (latents[0.2] - z0).abs().mean() < (latents[1.0] - z0).abs().mean()
    small = pipe.plan("a cat", image=original, strength=0.01, steps=4)
    assert small.steps == 1 and "less than one step" in small.notes[0]


# Half precision


def test_a_decoder_that_overflows_is_run_once_more_in_float32(tiny_folder, tmp_path):
    def swell(tensors):
        first, *_, last = (k for k in tensors if k.startswith("decoder") and k.endswith(".weight"))
        tensors[first] *= 1e5
        tensors[last] *= 1e-5

    folder = edited_weights(tiny_folder, tmp_path / "swollen", "vae", swell)
    half = fresh(folder, dtype="float16")
    made = half.txt2img("a cat", steps=2, seed=0)
    assert any("decoded once more in float32: the decoder gave NaN or infinity in float16" in note for note in made.notes)
    assert made.notes == tuple(made.recipe["notes"])
    assert {key[1] for key in half.residency._here} == {torch.float16}  # the copy in float32 is not kept


def test_an_encoder_that_overflows_says_so_each_time(tiny_folder, tmp_path):
    def swell(tensors):
        first, *_, last = (k for k in tensors if k.startswith("encoder") and k.endswith(".weight"))
        tensors[first] *= 1e5
        tensors[last] *= 1e-5

    half = fresh(edited_weights(tiny_folder, tmp_path / "swollen", "vae", swell), dtype="float16")
    for _ in range(2):  # the second time from the memo
        assert any("encoded once more in float32" in note for note in half.img2img("a cat", picture(), steps=2, seed=0).notes)


def test_what_float32_cannot_cure_is_an_error(tiny_folder, tmp_path):
    def poison(tensors):
        for tensor in tensors.values():  # finite, so that loading has nothing to say, and too large to compute with
            tensor.fill_(1e38)

    for part, what in {"unet": "denoiser", "vae": "coder"}.items():
        own = fresh(edited_weights(tiny_folder, tmp_path / part, part, poison))
        with pytest.raises(NotFiniteError, match=what) as raised:
            own.img2img("a cat", picture(), steps=2, seed=0)
        assert "dtype='float32'" not in str(raised.value)


# Options of a sampler


def test_sampler_options_reach_the_sampler_and_the_recipe(pipe):
    plain = pipe.txt2img("a cat", seed=0, steps=4, sampler="euler")
    churned = pipe.txt2img("a cat", seed=0, steps=4, sampler="euler", sampler_options={"s_churn": 2.0})
    assert churned.image.tobytes() != plain.image.tobytes() and churned.recipe["sampler_options"] == {"s_churn": 2.0}
    assert pipe.txt2img("a cat", seed=0, steps=4, sampler="ddim", sampler_options={"eta": 1.0}).image.tobytes() == pipe.txt2img(
        "a cat", seed=0, steps=4, sampler="ddim", eta=1.0).image.tobytes()


@pytest.mark.parametrize("options, words", [({"s_chrn": 1}, "it takes s_churn"), ({"s_churn": "x"}, "s_churn is 'x'"), ({"s_churn": -1}, "s_churn is -1"), ([1], "sampler_options is")])
def test_sampler_options_that_are_not_taken(pipe, options, words):
    with pytest.raises(RequestError, match=words):
        pipe.plan("a cat", sampler="euler", sampler_options=options)
