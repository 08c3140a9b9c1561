"""FLUX.1 against the stock pipelines of diffusers: dev, schnell, Fill and Kontext, each as a tiny random checkpoint in diffusers layout."""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import lively, mean_latents, tiny_clip, tiny_vae
from tiny_t5 import tiny_t5, tiny_t5_tokenizer

import latentgen
from latentgen.conditioning.vocabulary import packaged_clip
from latentgen.errors import ModelError, RequestError
from latentgen.models.card import published
from latentgen.models.family import Model, Words
from latentgen.pipelines import flux1
from latentgen.pixels.image import open_image, to_tensor

PROMPT, NEGATIVE, STEPS = "a red heart, flat", "blurry photo of a blue car", 4
KINDS = {"dev": ("FluxPipeline", 64, True), "schnell": ("FluxPipeline", 64, False), "fill": ("FluxFillPipeline", 384, True),
         "kontext": ("FluxKontextPipeline", 64, True)}
SIZES = ((64, 64), (48, 96))  # (width, height)
each_size = pytest.mark.parametrize("size", SIZES, ids=str)
SMALL = ((48, 80), (64, 64), (80, 48))  # stands for Kontext's sizes of a megapixel


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the two tokenizers."""
    root = tmp_path_factory.mktemp("flux1")
    clip = packaged_clip()
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "vocab.json").write_text(json.dumps(clip.vocab), "utf-8")
    (root / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in clip.merges), "utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (root / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    tiny_t5_tokenizer(root / "tokenizer_2")
    return root


def network(channels, guided):
    """Queries and keys are normalised: with unit weights attention is so even that 500 padding tokens drown the words. Sharper, it hears them."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(1)
    net = lively(FluxTransformer2DModel(
        in_channels=channels, out_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=guided, axes_dims_rope=(4, 6, 6)))
    for name, weight in net.named_parameters():
        if any(norm in name for norm in ("norm_q", "norm_k", "norm_added")):
            weight.mul_(3)
    return net


def autoencoder():
    """Its latents spread about as far as those of a trained one; a random one's are so small that a reference picture would hardly count."""
    vae = tiny_vae(channels=16, scaling_factor=0.3611, shift_factor=0.1159)
    vae.encoder.conv_out.weight.mul_(15)
    return vae


@pytest.fixture(scope="module")
def stock(root):
    """kind -> the stock pipeline, whose parts are saved as root/kind."""
    import diffusers
    from transformers import CLIPTokenizer, T5TokenizerFast

    words = {"tokenizer": CLIPTokenizer.from_pretrained(root / "tokenizer"), "tokenizer_2": T5TokenizerFast.from_pretrained(root / "tokenizer_2"),
             "text_encoder": tiny_clip(eos_token_id=2), "text_encoder_2": tiny_t5(seed=2), "vae": autoencoder()}

    @lru_cache
    def make(kind):
        name, channels, guided = KINDS[kind]
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided)
        theirs = getattr(diffusers, name)(**words, transformer=network(channels, guided), scheduler=scheduler)
        theirs.set_progress_bar_config(disable=True)
        theirs.save_pretrained(root / kind)
        return theirs

    return make


@pytest.fixture(scope="module")
def pipes(root, stock):
    """kind -> our pipeline of the same folder."""

    @lru_cache
    def make(kind):
        stock(kind)
        return latentgen.load(root / kind, dtype="float32", device="cpu", progress=False)

    return make


def also(theirs, name):
    """The same parts in another stock pipeline."""
    import diffusers

    other = getattr(diffusers, name)(**{key: part for key, part in theirs.components.items() if key not in ("image_encoder", "feature_extractor")})
    other.set_progress_bar_config(disable=True)
    return other


def run_stock(theirs, kind="dev", *, seeds=(3,), size=SIZES[0], **said):
    """(final latents (B, 16, h, w), pictures) of the stock pipeline; decoded as it does itself."""
    length = 256 if kind == "schnell" else 512
    said = {"prompt": PROMPT, "num_inference_steps": STEPS, "width": size[0], "height": size[1], "max_sequence_length": length} | said
    generator = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with mean_latents(), torch.no_grad():
        tokens = theirs(**said, num_images_per_prompt=len(seeds), generator=generator if seeds[1:] else generator[0], output_type="latent").images
        latents = theirs._unpack_latents(tokens, size[1], size[0], 8)
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
    mask.paste(255, (16, 8, 48, height - 16))
    return mask


def said(**more):
    return {"steps": STEPS, "seed": 3, "sampler": "euler", **more}


@pytest.mark.parity("encoders", "FluxPipeline")
@pytest.mark.parametrize("text", [PROMPT, "", "naïve Ünïcode – 日本語 🙂 don't 2024's", "two dogs run over the hill, " * 20])
def test_both_encoders_hear_what_they_hear_in_diffusers(pipes, stock, text):
    ours, theirs = pipes("dev"), stock("dev")
    planned = ours.plan(text, dialect="plain", seed=0, width=64, height=64).prompt
    ids = {name: torch.tensor(chunks.ids) for name, chunks in planned.chunks.items()}
    with ours.residency.use("text") as modules, torch.no_grad():
        words = ours.family.encode(modules, Words(ids=ids, mask={}))
    with torch.no_grad():
        tokens, pooled, _ = theirs.encode_prompt(text)
    assert words.tokens.shape == (1, 512, 32)
    torch.testing.assert_close(words.tokens, tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(words.pooled, pooled, rtol=0, atol=1e-5)


@pytest.mark.parity("txt2img", "FluxPipeline (dev, schnell)")
@each_size
@pytest.mark.parametrize("kind", ["dev", "schnell", "kontext"])
def test_txt2img(pipes, stock, kind, size):
    embedded = {"guidance_scale": 6.0} if kind == "dev" else {}
    theirs = embedded or {"guidance_scale": pipes(kind).family.defaults.guidance_scale}
    limit = {"max_area": size[0] * size[1]} if kind == "kontext" else {}
    agree(pipes(kind).txt2img(PROMPT, width=size[0], height=size[1], **said(**embedded)), run_stock(stock(kind), kind, size=size, **theirs, **limit))


def test_true_guidance_with_a_negative_prompt(pipes, stock):
    asked = {"negative_prompt": NEGATIVE, "true_cfg_scale": 3.0, "guidance_scale": 2.0}
    ours = pipes("dev").txt2img(PROMPT, width=64, height=64, **said(**asked))
    agree(ours, run_stock(stock("dev"), **asked))


def test_other_words_for_the_second_encoder(pipes, stock):
    agree(pipes("dev").txt2img(PROMPT, prompt_2="a green tree", width=64, height=64, **said()), run_stock(stock("dev"), prompt_2="a green tree"))


def test_a_batch_is_its_seeds(pipes, stock):
    asked = {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.0}
    agree(pipes("dev").txt2img(PROMPT, width=48, height=96, batch=2, **said(**asked)), run_stock(stock("dev"), seeds=(3, 4), size=SIZES[1], **asked))


@pytest.mark.parity("img2img", "FluxImg2ImgPipeline")
@each_size
@pytest.mark.parametrize("strength", [0.5, 0.75])
def test_img2img(pipes, stock, size, strength):
    ours = pipes("dev").img2img(PROMPT, photo(*size), strength=strength, **said())
    agree(ours, run_stock(also(stock("dev"), "FluxImg2ImgPipeline"), size=size, image=photo(*size), strength=strength, guidance_scale=3.5))


@pytest.mark.parity("inpaint", "FluxInpaintPipeline")
@each_size
@pytest.mark.parametrize("cfg", [{}, {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.0}], ids=["plain", "true_cfg"])
def test_inpaint(pipes, stock, size, cfg):
    ours = pipes("dev").inpaint(PROMPT, photo(*size), box(*size), strength=0.75, **said(**cfg))
    theirs, pictures = run_stock(also(stock("dev"), "FluxInpaintPipeline"), size=size, image=photo(*size), mask_image=box(*size), strength=0.75,
                                 guidance_scale=3.5, **cfg)
    agree(ours, (theirs, [Image.composite(pictures[0], photo(*size), box(*size))]))


@pytest.mark.parity("inpaint", "FluxFillPipeline")
@each_size
def test_fill_repaints(pipes, stock, size):
    """The mask need not follow any grid, and its greys are cut at one half."""
    mask = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0]), dtype=np.uint8))
    ours = pipes("fill").inpaint(PROMPT, photo(*size), mask, guidance_scale=20.0, batch=2, **said())
    theirs, _ = run_stock(stock("fill"), seeds=(3, 4), size=size, image=photo(*size), mask_image=mask, guidance_scale=20.0)
    assert (ours.latents - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    hard = box(*size)
    ours = pipes("fill").inpaint(PROMPT, photo(*size), hard, strength=0.5, **said())
    theirs, pictures = run_stock(stock("fill"), size=size, image=photo(*size), mask_image=hard, strength=0.5)
    agree(ours, (theirs, [Image.composite(pictures[0], photo(*size), hard)]))


@pytest.mark.parity("inpaint", "FluxFillPipeline")
def test_fill_outpaints(pipes, stock):
    ours = pipes("fill").outpaint(PROMPT, photo(), left=16, right=16, **said())
    source = ours.plan.source
    mask = Image.fromarray((source.mask[0, 0].numpy() * 255).astype(np.uint8))
    theirs, pictures = run_stock(stock("fill"), size=(96, 64), image=source.image, mask_image=mask)
    agree(ours, (theirs, [Image.composite(pictures[0], source.image, mask)]))


def test_fill_without_a_picture_sees_an_empty_one(pipes, stock):
    ours = pipes("fill").txt2img(PROMPT, width=64, height=64, **said())
    agree(ours, run_stock(stock("fill"), image=Image.new("RGB", (64, 64)), mask_image=Image.new("L", (64, 64), 255)))


@contextmanager
def small_sizes(monkeypatch):
    from diffusers.pipelines.flux import pipeline_flux_kontext as theirs

    assert tuple(theirs.PREFERRED_KONTEXT_RESOLUTIONS) == flux1.KONTEXT_SIZES
    with monkeypatch.context() as patch:
        patch.setattr(theirs, "PREFERRED_KONTEXT_RESOLUTIONS", SMALL)
        patch.setattr(flux1, "KONTEXT_SIZES", SMALL)
        yield


@pytest.mark.parity("edit", "FluxKontextPipeline")
@pytest.mark.parametrize("cfg", [{}, {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.0}], ids=["plain", "true_cfg"])
def test_kontext_looks_at_a_reference(pipes, stock, monkeypatch, cfg):
    """A reference of another size and shape than the picture, in a batch."""
    shown = photo(120, 72).resize((119, 75))
    with small_sizes(monkeypatch):
        ours = pipes("kontext").edit(PROMPT, shown, width=48, height=96, batch=2, **said(**cfg))
        theirs = run_stock(stock("kontext"), seeds=(3, 4), size=SIZES[1], image=shown, max_area=48 * 96, guidance_scale=2.5, **cfg)
        other = pipes("kontext").edit(PROMPT, photo(120, 72, seed=9), width=48, height=96, **said(**cfg))
    agree(ours, theirs)
    assert apart(ours.image, other.image) >= 0.1


@pytest.mark.parametrize("size", [(320, 200), (64, 64), (31, 250), (47, 31), (1024, 1024)])
def test_a_reference_takes_one_of_kontexts_sizes(stock, size):
    picture = open_image(photo(1024, 512).resize(size))
    theirs = stock("kontext")
    height, width = theirs.image_processor.get_default_height_width(picture)
    _, width, height = min((abs(width / height - w / h), w, h) for w, h in flux1.KONTEXT_SIZES)
    expected = theirs.image_processor.preprocess(theirs.image_processor.resize(picture, height, width), height, width)
    torch.testing.assert_close(flux1.kontext_sized(to_tensor(picture)), expected, rtol=0, atol=1e-6)


def test_words_are_heard(pipes):
    ours = pipes("dev")

    def picture(prompt=PROMPT, **more):
        return ours.txt2img(prompt, width=64, height=64, **said(**more)).image

    first = picture()
    assert apart(first, picture("blue car, top view")) >= 0.1
    assert apart(first, picture(prompt_2="blue car, top view")) >= 0.1  # T5 alone
    assert apart(first, picture("blue car, top view", prompt_2=PROMPT)) >= 0.1  # CLIP alone
    assert apart(first, picture(guidance_scale=1.5)) >= 0.1
    negative = {"true_cfg_scale": 4.0}
    assert apart(picture(negative_prompt=NEGATIVE, **negative), picture(negative_prompt="a green tree", **negative)) >= 0.1


def test_what_it_cannot_do_is_refused_by_name(pipes):
    for kind, asked, named in (("schnell", {"negative_prompt": "x"}, "negative_prompt"), ("dev", {"negative_prompt": "x"}, "true_cfg_scale"),
                               ("schnell", {"guidance_scale": 3.0}, "guidance_scale"), ("dev", {"clip_skip": 2}, "clip_skip"),
                               ("dev", {"reference": photo()}, "reference"), ("dev", {"width": 72}, "width is 72")):
        with pytest.raises(RequestError, match=named):
            pipes(kind).plan(PROMPT, seed=0, **{"width": 64, "height": 64} | asked)


@pytest.mark.parametrize("variant", ["flux1-dev", "flux1-schnell", "flux1-fill"])
def test_signatures_fit_the_published_networks(variant):
    """Kontext's are dev's: no tensor tells them apart."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        net = FluxTransformer2DModel(in_channels=384 if variant == "flux1-fill" else 64, out_channels=64, guidance_embeds=variant != "flux1-schnell")
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}

    def fits(signature):
        return signature.layout == "diffusers" and not any(name in shapes for name in signature.absent) and signature.shapes.items() <= shapes.items()

    assert [s.variant for s in flux1.SIGNATURES if fits(s)] == [variant, *["flux1-kontext"][:variant == "flux1-dev"]]


@pytest.mark.parametrize("variant", ["flux1-dev", "flux1-schnell", "flux1-fill", "flux1-kontext"])
def test_published_configs_make_the_four_kinds(variant):
    known = published(variant)
    family = flux1.build(Model(variant, {**known["parts"], "scheduler": known["scheduler"], "model_index": known["index"]}))
    kind, guided = variant.removeprefix("flux1-"), variant != "flux1-schnell"
    assert vars(family.defaults).items() >= known["defaults"].items()
    assert (family.task, family.references) == ("inpaint" if kind == "fill" else "any", int(kind == "kontext"))
    assert (family.guidance, family.tokenizers["tokenizer_2"].length) == (("embedded", 512) if guided else ("none", 256))
    assert (family.latent.shape(1024, 512), family.latent.scale, family.latent.shift) == ((16, 64, 128), 0.3611, 0.1159)
    if guided:
        assert [family.shift(side, side, 20) for side in (256, 1024)] == pytest.approx([np.exp(0.5), np.exp(1.15)])
    else:
        assert family.shift is None and family.defaults.shift == 1.0


def test_a_control_checkpoint_is_not_taken_for_one_of_the_four():
    with pytest.raises(ModelError, match="128 channels"):
        flux1.build(Model("", {"transformer": {"in_channels": 128, "guidance_embeds": True}}))
