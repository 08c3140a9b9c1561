"""The pipeline against the stock one: the same checkpoint folder, read by diffusers and transformers' own classes and run by their own loop."""

import warnings
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import latentgen
from latentgen.models.family import Words
from latentgen.diffusion import VariancePreserving

PROMPT, NEGATIVE = "a red heart, flat", "blue car"
SCALE, SIZE = 4.0, 64
STEPS = 8  # divides 1000: else the step of stock DDIM goes to t - 1000 // steps, which is not the next timestep that it visits
NOISE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
         "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SCHEDULERS = {"ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}), "euler": ("EulerDiscreteScheduler", {}),
              "dpmpp_2m": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"})}
each_sampler = pytest.mark.parametrize("sampler", SCHEDULERS)


@pytest.fixture(scope="module")
def parts(tiny_folder):
    """The folder's parts as stock classes read them."""
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    assert "max_length" not in (tokenizer := CLIPTokenizer.from_pretrained(tiny_folder / "tokenizer")).init_kwargs
    return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel.from_pretrained(tiny_folder / "text_encoder").eval(),
            "unet": UNet2DConditionModel.from_pretrained(tiny_folder / "unet").eval(), "vae": AutoencoderTiny.from_pretrained(tiny_folder / "vae").eval()}


def stock(parts, sampler, kind="StableDiffusionPipeline"):
    import diffusers

    name, config = SCHEDULERS[sampler]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, name)(**NOISE, **config)
        theirs = getattr(diffusers, kind)(**parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def said(seed=3, **more):
    return {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": SCALE,
            "generator": torch.Generator("cpu").manual_seed(seed), **more}


@pytest.fixture(scope="module")
def ours(pipe):
    """(sampler, ...) -> (final latent, picture). Of the stock schedulers only DDIM has exactly alpha = 0 at zero terminal SNR; where the others put
    alpha_bar = 2**-24 our path is given the same, so that the rest can be compared closely."""
    finite = copy(pipe)
    finite.family = replace(pipe.family, path=VariancePreserving((*pipe.family.path.alphas_bar[:-1], 2**-24)))
    return lambda sampler, **more: run(pipe if sampler == "ddim" else finite, sampler, **more)


def run(pipe, sampler, **more):
    stream = pipe.stream(PROMPT, negative_prompt=NEGATIVE, steps=STEPS, guidance_scale=SCALE, sampler=sampler, seed=3, **more)
    *_, last = stream
    return last.x, stream.result.image


def same(x, reference, *, tolerance=1e-4):
    assert x.isfinite().all() and reference.abs().max() > 0.1
    torch.testing.assert_close(x, reference, rtol=0, atol=tolerance * max(1.0, reference.abs().max().item()))


def near(image, reference):
    """Pictures at most one of 255 apart, and not a flat colour."""
    a, b = (np.asarray(i, dtype=np.int16) for i in (image, reference))
    assert a.shape == b.shape and b.std() > 1
    assert np.abs(a - b).max() <= 1


def photo(width=SIZE, height=SIZE):
    dice = np.random.default_rng(5)
    return Image.fromarray(dice.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def test_the_words_as_transformers_encodes_them(pipe, parts):
    for text in (PROMPT, "", "  A   Red\nHEART ", "naïve Ünïcode – 日本語 🙂 don't 2024's", "x" * 20):
        chunks = pipe.plan(text, seed=0).prompt.ids
        theirs = parts["tokenizer"](text, padding="max_length", max_length=len(chunks[0]), truncation=False, return_tensors="pt").input_ids
        if len(chunks) == 1:
            assert theirs.tolist() == [list(chunks[0])], text
        else:  # laid out over several chunks, each with a start and an end of its own
            words = [i for chunk in chunks for i in chunk[1:-1]]
            assert words[:theirs.shape[1] - 2] == theirs[0, 1:-1].tolist(), text
        with pipe.residency.use("text") as modules, torch.no_grad():
            states = pipe.family.encode(modules, Words({"tokenizer": torch.tensor(chunks)}, {})).tokens
            expected = torch.cat([parts["text_encoder"](torch.tensor([chunk])).last_hidden_state for chunk in chunks], dim=1)
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)


def test_the_hand_written_loop(ours, parts):
    """DDIM with guidance in the fewest lines, with nothing of ours in it but the seed's noise."""
    theirs = stock(parts, "ddim")
    tokens = parts["tokenizer"]([PROMPT, NEGATIVE], padding="max_length", max_length=32, return_tensors="pt").input_ids
    x = torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(3))
    theirs.scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        states = parts["text_encoder"](tokens).last_hidden_state
        for t in theirs.scheduler.timesteps:
            v, v_negative = parts["unet"](torch.cat([x, x]), t, states).sample.chunk(2)
            x = theirs.scheduler.step(v_negative + SCALE * (v - v_negative), t, x).prev_sample
        pixels = parts["vae"].decode(x).sample
    latent, image = ours("ddim")
    same(latent, x)
    near(image, Image.fromarray(((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()))


@each_sampler
def test_txt2img(ours, parts, sampler):
    theirs = stock(parts, sampler)
    latent, image = ours(sampler)
    same(latent, theirs(**said(height=SIZE, width=SIZE, output_type="latent")).images)
    near(image, theirs(**said(height=SIZE, width=SIZE)).images[0])


@each_sampler
def test_exactly_zero_terminal_snr_is_what_they_come_near_to(pipe, parts, sampler):
    theirs = stock(parts, sampler)(**said(height=SIZE, width=SIZE, output_type="latent")).images
    same(run(pipe, sampler)[0], theirs, tolerance=2e-3)


@pytest.mark.parametrize("strength", [0.3, 0.45, 0.75, 1.0])
@each_sampler
def test_img2img(ours, parts, sampler, strength):
    theirs = stock(parts, sampler, "StableDiffusionImg2ImgPipeline")
    latent, image = ours(sampler, image=photo(), strength=strength)
    same(latent, theirs(**said(image=photo(), strength=strength, output_type="latent")).images)
    near(image, theirs(**said(image=photo(), strength=strength)).images[0])


@pytest.mark.parametrize("strength", [0.5, 1.0])
@each_sampler
def test_inpaint_of_whole_latents(ours, parts, sampler, strength):
    """With a mask of 0 and 1 that follows the latent grid, the denoiser that answers z0 outside is their resetting after each step."""
    theirs = stock(parts, sampler, "StableDiffusionInpaintPipeline")
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (16, 8, 48, 64))
    picture = photo()
    latent, image = ours(sampler, image=picture, mask=mask, strength=strength)
    asked = {"image": picture, "mask_image": mask, "strength": strength, "height": SIZE, "width": SIZE}
    same(latent, theirs(**said(**asked, output_type="latent")).images)
    made = theirs(**said(**asked)).images[0]
    near(image, Image.composite(made, picture, mask))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_one_step_of_guidance_is_what_the_papers_say(pipe, parts, rescale):
    """At alpha = 0, x0 = -v, so there guiding and rescaling x0 is guiding and rescaling v, as diffusers does."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    run = pipe.stream(PROMPT, negative_prompt=NEGATIVE, steps=STEPS, guidance_scale=SCALE, guidance_rescale=rescale, seed=3)
    first = next(run)
    run.close()
    tokens = parts["tokenizer"]([PROMPT, NEGATIVE], padding="max_length", max_length=32, return_tensors="pt").input_ids
    x = torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(3))
    with torch.no_grad():
        v, v_negative = parts["unet"](torch.cat([x, x]), 999, parts["text_encoder"](tokens).last_hidden_state).sample.chunk(2)
    guided = v_negative + SCALE * (v - v_negative)
    torch.testing.assert_close(first.x0, -rescale_noise_cfg(guided, v, rescale), rtol=0, atol=1e-5)


def test_float_types_agree(tiny_folder, pipe):
    """Half precision in the networks alone: the latent stays float32 and drifts by rounding only."""
    _, reference = run(pipe, "ddim")
    half = latentgen.load(tiny_folder, dtype="bfloat16", device="cpu", progress=False)
    latent, image = run(half, "ddim")
    assert latent.dtype == torch.float32
    assert np.abs(np.asarray(image, dtype=np.int16) - np.asarray(reference, dtype=np.int16)).mean() < 8
