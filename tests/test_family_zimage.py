"""Z-Image against the stock pipelines of diffusers, as a tiny random checkpoint in diffusers layout; and what its two kinds refuse."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import lively, mean_latents, tiny_vae
from tiny_qwen import tiny_qwen3, tiny_qwen_tokenizer

import latentgen
from latentgen.errors import ModelError, RequestError
from latentgen.models.card import published
from latentgen.models.family import Model, Words
from latentgen.models.identify import identify, twins
from latentgen.models.inspect import folder_variant
from latentgen.pipelines import zimage

HEADERS = Path(__file__).parent / "headers"
PROMPT, NEGATIVE, STEPS = "a red heart, flat", "blurry photo of a blue car", 4
SIZES = ((64, 64), (48, 96))  # (width, height); 16 and 18 tokens, of which the network makes 32 each
each_size = pytest.mark.parametrize("size", SIZES, ids=str)
each_guidance = pytest.mark.parametrize("cfg", [{"guidance_scale": 1.0}, {"guidance_scale": 4.0, "negative_prompt": NEGATIVE}], ids=["plain", "cfg"])


def network():
    """Gates that are open, and words that weigh as much as the picture."""
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(1)
    net = lively(ZImageTransformer2DModel(in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
                                          axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64]))
    for name, weight in net.named_parameters():
        if "cap_embedder.1" in name or "norm_k" in name:
            weight.mul_(3)
        if "t_embedder" in name:  # its waves make rounding errors of the time as large as they can be
            weight.mul_(0.5)
        if "pad_token" in name:
            weight.copy_(torch.randn(weight.shape))
    return net


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """The stock pipeline, and the folder where its parts lie."""
    import diffusers

    folder = tmp_path_factory.mktemp("zimage")
    tokenizer = tiny_qwen_tokenizer(folder / "tokenizer")
    vae = tiny_vae(channels=16, scaling_factor=0.3611, shift_factor=0.1159)
    vae.encoder.conv_out.weight.mul_(15)
    theirs = diffusers.ZImagePipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0), vae=vae, tokenizer=tokenizer,
                                      text_encoder=tiny_qwen3(tokenizer), transformer=network())
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder)
    return theirs, folder


@pytest.fixture(scope="module")
def theirs(stock):
    return stock[0]


@pytest.fixture(scope="module")
def pipe(stock):
    return latentgen.load(stock[1], dtype="float32", device="cpu", progress=False)


def also(theirs, name):
    """The same parts in another stock pipeline."""
    import diffusers

    other = getattr(diffusers, name)(**theirs.components)
    other.set_progress_bar_config(disable=True)
    return other


def run_stock(theirs, *, seeds=(3,), size=SIZES[0], guidance_scale=1.0, **said):
    """(final latents (B, 16, h, w), pictures); their guidance scale is one less than ours."""
    said = {"prompt": PROMPT, "num_inference_steps": STEPS, "width": size[0], "height": size[1]} | said
    generator = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with mean_latents(), torch.no_grad():
        latents = theirs(**said, guidance_scale=guidance_scale - 1, num_images_per_prompt=len(seeds),
                         generator=generator if seeds[1:] else generator[0], output_type="latent").images
        pixels = theirs.vae.decode(latents / theirs.vae.config.scaling_factor + theirs.vae.config.shift_factor).sample
    return latents, theirs.image_processor.postprocess(pixels)


def agree(result, reference):
    """Latents within 1e-4 of their size, pictures within 1/255."""
    latents, pictures = reference
    assert latents.isfinite().all() and latents.abs().max() > 0.1
    assert (result.latents - latents).abs().max() <= 1e-4 * latents.abs().max()
    assert len(result.images) == len(pictures)
    for ours, theirs in zip(result.images, pictures, strict=True):
        a, b = (np.asarray(i, dtype=np.int16) for i in (ours, theirs))
        assert a.shape == b.shape and b.std() > 1 and np.abs(a - b).max() <= 1


def apart(one, other):
    """Largest difference of two pictures, as a part of the range."""
    return np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16)).max() / 255


def photo(width=64, height=64, seed=5):
    dice = np.random.default_rng(seed)
    return Image.fromarray(dice.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def box(width=64, height=64):
    """A mask that follows the latent's grid: whole 8x8 cells are repainted."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (16, 8, 40, height - 16))
    return mask


def said(**more):
    return {"steps": STEPS, "seed": 3, **more}


@pytest.mark.parity("encoders", "ZImagePipeline")
@pytest.mark.parametrize("text", [PROMPT, "", " naïve Ünïcode – 日本語 🙂 don't 2024's\n", "two dogs run over the hill, " * 12])
def test_the_encoder_hears_what_it_hears_in_diffusers(pipe, theirs, text):
    planned = pipe.plan(text, seed=0, width=64, height=64).prompt
    ids = {name: torch.tensor(chunks.ids) for name, chunks in planned.chunks.items()}
    with pipe.residency.use("text") as modules, torch.no_grad():
        words = pipe.family.encode(modules, Words(ids=ids, mask={}))
    with torch.no_grad():
        (expected,), _ = theirs.encode_prompt(text, do_classifier_free_guidance=False)
    assert words.tokens.shape == (1, *expected.shape)
    torch.testing.assert_close(words.tokens[0], expected, rtol=1e-5, atol=1e-4)


def test_an_encoder_that_was_saved_without_its_head_is_the_same(pipe, theirs, stock, tmp_path):
    """As a pipeline writes it that loaded it as Qwen3Model: names without "model."."""
    theirs.text_encoder.model.save_pretrained(tmp_path / "text_encoder")
    other = latentgen.load(stock[1], text_encoder=tmp_path / "text_encoder", dtype="float32", device="cpu", progress=False)
    asked = {"width": 64, "height": 64, **said()}
    assert other.txt2img(PROMPT, **asked).latents.equal(pipe.txt2img(PROMPT, **asked).latents)


def test_a_text_too_long_is_refused_and_not_cut(pipe):
    with pytest.raises(RequestError, match="at most"):
        pipe.plan("two dogs run over the hill, " * 60, seed=0, width=64, height=64)


@pytest.mark.parity("txt2img", "ZImagePipeline")
@each_size
@each_guidance
def test_txt2img(pipe, theirs, size, cfg):
    agree(pipe.txt2img(PROMPT, width=size[0], height=size[1], **said(**cfg)), run_stock(theirs, size=size, **cfg))


def test_the_negative_side_says_nothing_by_default(pipe, theirs):
    agree(pipe.txt2img(PROMPT, width=64, height=64, **said()), run_stock(theirs, guidance_scale=5.0))


def test_a_batch_is_its_seeds(pipe, theirs):
    cfg = {"guidance_scale": 4.0, "negative_prompt": NEGATIVE}
    agree(pipe.txt2img(PROMPT, width=48, height=96, batch=2, **said(**cfg)), run_stock(theirs, seeds=(3, 4), size=SIZES[1], **cfg))


@pytest.mark.parity("img2img", "ZImageImg2ImgPipeline")
@each_size
@each_guidance
@pytest.mark.parametrize("strength", [0.5, 0.75])
def test_img2img(pipe, theirs, size, cfg, strength):
    ours = pipe.img2img(PROMPT, photo(*size), strength=strength, **said(**cfg))
    agree(ours, run_stock(also(theirs, "ZImageImg2ImgPipeline"), size=size, image=photo(*size), strength=strength, **cfg))


@pytest.mark.parity("inpaint", "ZImageInpaintPipeline")
@each_size
@each_guidance
def test_inpaint(pipe, theirs, size, cfg):
    ours = pipe.inpaint(PROMPT, photo(*size), box(*size), strength=0.75, **said(**cfg))
    latents, pictures = run_stock(also(theirs, "ZImageInpaintPipeline"), size=size, image=photo(*size), mask_image=box(*size), strength=0.75, **cfg)
    agree(ours, (latents, [Image.composite(pictures[0], photo(*size), box(*size))]))


def test_outpaint_keeps_the_old_pixels(pipe):
    ours = pipe.outpaint(PROMPT, photo(), left=16, right=16, **said())
    assert ours.image.size == (96, 64) and ours.image.crop((16, 0, 80, 64)).tobytes() == photo().tobytes()


def test_levels_shift_with_the_size_where_the_scheduler_says_so(theirs):
    from diffusers import FlowMatchEulerDiscreteScheduler

    configs = {"transformer": theirs.transformer.config, "vae": theirs.vae.config}
    family = zimage.build(Model("", configs | {"scheduler": dict(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config)}))
    assert [family.shift(side, side, 20) for side in (256, 1024)] == pytest.approx([np.exp(0.5), np.exp(1.15)])
    assert zimage.build(Model("", configs | {"scheduler": {"shift": 2.5}})).defaults.shift == 2.5


def test_words_are_heard(pipe):
    def picture(prompt=PROMPT, **more):
        return pipe.txt2img(prompt, width=64, height=64, **said(**more)).image

    assert apart(picture(guidance_scale=1.0), picture("blue car, top view", guidance_scale=1.0)) >= 0.1
    assert apart(picture(negative_prompt=NEGATIVE), picture(negative_prompt="a green tree")) >= 0.1
    assert apart(picture(guidance_scale=2.0), picture(guidance_scale=5.0)) >= 0.1


def test_turbo_has_no_guidance_and_says_so(stock):
    folder = stock[1]
    configs = {name: json.loads((folder / name / "config.json").read_text("utf-8")) for name in ("transformer", "vae")}
    turbo = zimage.build(Model("zimage-turbo", configs))
    assert (turbo.guidance, turbo.defaults.guidance_scale, turbo.defaults.steps, turbo.defaults.shift) == ("none", 1.0, 8, 3.0)
    (folder / "card.toml").write_text('name = "tiny-turbo"\nfamily = "zimage"\nvariant = "zimage-turbo"\n', "utf-8")
    try:
        pipe = latentgen.load(folder, dtype="float32", device="cpu", progress=False)
    finally:
        (folder / "card.toml").unlink()
    assert pipe.plan(PROMPT, seed=0, width=64, height=64).batching == "off"
    for asked, named in (({"negative_prompt": "x"}, "negative_prompt"), ({"guidance_scale": 3.0}, "guidance_scale"), ({"clip_skip": 2}, "clip_skip"),
                         ({"reference": photo()}, "reference"), ({"width": 72}, "width is 72")):
        with pytest.raises(RequestError, match=named):
            pipe.plan(PROMPT, seed=0, **{"width": 64, "height": 64} | asked)


@pytest.mark.parametrize("name", ["zimage", "zimage.diffusers", "zimage-turbo", "zimage-turbo.diffusers"])
def test_published_files_are_known(name):
    tensors = json.loads(gzip.decompress((HEADERS / f"{name}.json.gz").read_bytes()))["tensors"]
    shapes = {key: tuple(shape) for key, (_, shape) in tensors.items()}
    found = identify(shapes)
    assert found is not None and (found.family, found.layout) == ("zimage", "diffusers" if name.endswith("diffusers") else "original")
    assert twins(found) == ("zimage", "zimage-turbo")
    variant = name.removesuffix(".diffusers")
    in_folder = folder_variant("", found, published(variant)["index"], published(variant)["scheduler"] | {"max_shift": 1.15})
    assert in_folder == (variant, ())  # the scheduler beside it tells
    assert identify({"model.diffusion_model." + key: shape for key, shape in shapes.items()}).prefix == "model.diffusion_model."
    assert identify(shapes | {zimage.SEES: (1152,)}) is None
    assert identify({key: shape for key, shape in shapes.items() if not key.startswith("layers.29.")}) is None


@pytest.mark.parametrize("variant", ["zimage", "zimage-turbo"])
def test_published_configs_make_both_kinds(variant):
    known = published(variant)
    family = zimage.build(Model(variant, {**known["parts"], "scheduler": known["scheduler"], "model_index": known["index"]}))
    assert vars(family.defaults).items() >= known["defaults"].items()
    assert (family.latent.shape(1024, 512), family.latent.scale, family.latent.shift) == ((16, 64, 128), 0.3611, 0.1159)
    assert family.shift is None and known["index"]["_class_name"] in zimage.INDEX


@pytest.mark.parametrize("config, named", [
    ({"siglip_feat_dim": 1152}, "SigLIP"), ({"all_patch_size": [1]}, "patches"), ({"in_channels": 4}, "4 channels"),
    ({"cap_feat_dim": 4096}, "4096")])
def test_parts_that_do_not_belong_together_are_refused(config, named):
    with pytest.raises(ModelError, match=named):
        zimage.build(Model("", {"transformer": config, "text_encoder": {"hidden_size": 2560}}))
