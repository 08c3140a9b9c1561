"""A small autoencoder in the place of the model's own: pictures go through it at its own scale, as diffusers' pipelines do with it, and a note says so."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import mean_latents
from tiny_folders import tiny

import latentgen
from latentgen.errors import ModelError


def small(folder, channels):
    from diffusers import AutoencoderTiny

    torch.manual_seed(3)
    vae = AutoencoderTiny(latent_channels=channels, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
                          num_decoder_blocks=(1,) * 4)
    vae.save_pretrained(folder)
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize(("kind", "channels"), [("sd15", 4), ("flux1", 16)])
def test_latents_are_the_models_own_and_pixels_the_small_ones(kind, channels, tmp_path):
    folder = tiny(kind).save(tmp_path / kind)
    vae = small(tmp_path / "taesd", channels)
    pipe = latentgen.load(folder, vae=tmp_path / "taesd", dtype="float32", device="cpu", progress=False)
    said = {"steps": 2, "seed": 1, "width": 64, "height": 64}
    made = pipe.txt2img("a cat", **said)
    own = latentgen.load(folder, dtype="float32", device="cpu", progress=False).txt2img("a cat", **said)
    assert torch.equal(made.latents, own.latents) and made.image.tobytes() != own.image.tobytes()
    with torch.no_grad():
        pixels = vae.decode(made.latents).sample[0]
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(made.image, np.float32) - expected).max() <= 1
    assert any("small autoencoder" in note for note in made.notes) and made.recipe["weights"] != own.recipe["weights"]


def test_an_edit_is_that_of_diffusers_with_the_same_autoencoder(tmp_path):
    """Encoded and decoded by the small one, whose latents the U-Net takes as they are."""
    from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
    from transformers import CLIPTokenizer

    folder = tiny("sd15").save(tmp_path / "sd15")
    vae, modules = small(tmp_path / "taesd", 4), tiny("sd15").modules
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    stock = StableDiffusionImg2ImgPipeline(vae=vae, text_encoder=modules["text_encoder"], unet=modules["unet"], scheduler=scheduler, safety_checker=None,
                                           tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"), feature_extractor=None, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    picture = Image.fromarray((np.random.default_rng(0).random((64, 64, 3)) * 255).astype(np.uint8))
    with mean_latents(), torch.no_grad():
        theirs = stock("a cat", picture, strength=0.5, num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(1), output_type="latent").images
    pipe = latentgen.load(folder, vae=tmp_path / "taesd", dtype="float32", device="cpu", progress=False)
    ours = pipe.img2img("a cat", picture, strength=0.5, steps=4, guidance_scale=3.0, seed=1, sampler="ddim", spacing="leading").latents
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_one_for_other_latents_is_refused(tmp_path):
    small(tmp_path / "taesd", 16)
    with pytest.raises(ModelError, match="latents of 16 channels and this model's have 4"):
        latentgen.load(tiny("sd15").save(tmp_path / "sd15"), vae=tmp_path / "taesd", device="cpu", progress=False)
