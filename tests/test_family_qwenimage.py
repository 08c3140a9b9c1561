"""Qwen-Image and Qwen-Image-Edit against the stock pipelines of diffusers, each as a tiny random checkpoint in diffusers layout."""

from __future__ import annotations

import gzip
import json
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import lively, mean_latents
from tiny_qwen import tiny_qwen_tokenizer, tiny_qwen_vl

import latentgen
from latentgen.diffusion.level import RectifiedFlow
from latentgen.diffusion.schedule import spacing
from latentgen.errors import ModelError, RequestError
from latentgen.models.card import published
from latentgen.models.family import Model, Words
from latentgen.models.identify import identify, twins
from latentgen.pipelines import qwenimage
from latentgen.pixels.image import to_tensor

HEADERS = Path(__file__).parent / "headers"
PROMPT, NEGATIVE, STEPS = "a red heart, flat", "blurry photo of a blue car", 4
SIZES = ((64, 64), (48, 96))  # (width, height)
SCHEDULER = published("qwenimage")["scheduler"]
each_size = pytest.mark.parametrize("size", SIZES, ids=str)
each_guidance = pytest.mark.parametrize("cfg", [{"guidance_scale": 1.0}, {"guidance_scale": 4.0, "negative_prompt": NEGATIVE}], ids=["plain", "cfg"])


def network():
    """Gates that are open, attention that is not even, and words that weigh as much as the picture."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(1)
    net = lively(QwenImageTransformer2DModel(in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
                                             joint_attention_dim=32, axes_dims_rope=(4, 6, 6)))
    for name, weight in net.named_parameters():
        if any(part in name for part in ("norm_k", "norm_added_k", "txt_in.weight", "to_out.0.weight", "proj_out.weight", "mod.1.weight")):
            weight.mul_(3)
        if "timestep_embedder" in name:  # its waves make rounding errors of the time as large as they can be
            weight.mul_(0.3)
    return net


def autoencoder():
    """Its latents, and its pictures, tell pictures apart as those of a trained one do; a random one's are mostly biases."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(4)
    vae = lively(AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1))
    for name, weight in vae.named_parameters():
        if name.startswith(("encoder.conv_in", "encoder.down_blocks", "decoder.conv_in", "decoder.up_blocks")) and weight.ndim >= 4:
            weight.mul_(3)
    vae.quant_conv.weight.mul_(20)
    return vae


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("qwenimage")


@pytest.fixture(scope="module")
def stock(root):
    """kind ("base" or "edit") -> the stock pipeline, whose parts are saved as root/kind."""
    import diffusers
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = tiny_qwen_tokenizer(root / "tokenizer")
    parts = {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**{k: v for k, v in SCHEDULER.items() if k[0] != "_"}), "vae": autoencoder(),
             "text_encoder": tiny_qwen_vl(tokenizer), "tokenizer": tokenizer, "transformer": network()}

    @lru_cache
    def make(kind):
        if kind == "edit":
            eye = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056)
            seeing = with_places(parts["text_encoder"])
            processor = Qwen2VLProcessor(image_processor=eye, tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor(), chat_template="")
            theirs = diffusers.QwenImageEditPipeline(**parts | {"text_encoder": seeing}, processor=processor)
        else:
            theirs = diffusers.QwenImagePipeline(**parts)
        theirs.set_progress_bar_config(disable=True)
        theirs.save_pretrained(root / kind)
        return theirs

    return make


def with_places(encoder):
    """The text encoder as transformers 4 has it, and as it was trained: a picture's tokens have rows and columns without being told apart.

    transformers 5 wants `mm_token_type_ids` for that, which its processor gives and diffusers 0.42 does not pass on: its picture's tokens stand in
    one line, like words (a known fault there).
    """
    plain = encoder.forward

    def forward(input_ids, **more):
        if more.get("pixel_values") is not None:
            more["mm_token_type_ids"] = (input_ids == encoder.config.image_token_id).int()
        return plain(input_ids=input_ids, **more)

    encoder.forward = forward
    return encoder


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

    other = getattr(diffusers, name)(**theirs.components)
    other.set_progress_bar_config(disable=True)
    return other


def run_stock(theirs, *, seeds=(3,), size=SIZES[0], guidance_scale=1.0, negative_prompt="", **said):
    """(final latents (B, 16, h, w), pictures), decoded as it does itself."""
    said = {"prompt": PROMPT, "num_inference_steps": STEPS, "width": size[0], "height": size[1]} | said
    generator = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with mean_latents(), torch.no_grad():
        tokens = theirs(**said, true_cfg_scale=guidance_scale, negative_prompt=negative_prompt, num_images_per_prompt=len(seeds),
                        generator=generator if seeds[1:] else generator[0], output_type="latent").images
        latents, config = theirs._unpack_latents(tokens, size[1], size[0], 8), theirs.vae.config
        mean, deviation = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        pixels = theirs.vae.decode(latents * deviation + mean).sample[:, :, 0]
    return latents[:, :, 0], theirs.image_processor.postprocess(pixels)


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


@contextmanager
def small_area(monkeypatch, area=128 * 128):
    """Stands for the megapixel that a reference is brought to."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as theirs

    real = theirs.calculate_dimensions
    with monkeypatch.context() as patch:
        patch.setattr(theirs, "calculate_dimensions", lambda wanted, ratio: real(area, ratio))
        patch.setattr(qwenimage, "AREA", area)
        yield


def heard(pipe, text, **more):
    """What our encoder says of a text."""
    planned = pipe.plan(text, seed=0, width=64, height=64, **more)
    ids = {name: torch.tensor(chunks.ids) for name, chunks in planned.prompt.chunks.items()}
    with pipe.residency.use("text") as modules, torch.no_grad():
        return pipe.family.encode(modules, Words(ids=ids, mask={}, references=tuple(map(to_tensor, planned.references)))).tokens


@pytest.mark.parity("encoders", "QwenImagePipeline")
@pytest.mark.parametrize("text", [PROMPT, "", " naïve Ünïcode – 日本語 🙂 don't 2024's\n", "two dogs run over the hill, " * 30])
def test_the_encoder_hears_what_it_hears_in_diffusers(pipes, stock, text):
    with torch.no_grad():
        expected, mask = stock("base").encode_prompt(text)
    tokens = heard(pipes("base"), text)
    assert mask is None and tokens.shape == expected.shape
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-4)


def test_a_text_too_long_is_refused_and_not_cut(pipes):
    with pytest.raises(RequestError, match="at most"):
        pipes("base").plan("two dogs run over the hill, " * 200, seed=0, width=64, height=64)


@pytest.mark.parity("txt2img", "QwenImagePipeline")
@each_size
@each_guidance
def test_txt2img(pipes, stock, size, cfg):
    agree(pipes("base").txt2img(PROMPT, width=size[0], height=size[1], **said(**cfg)), run_stock(stock("base"), size=size, **cfg))


def test_the_negative_side_says_nothing_by_default(pipes, stock):
    agree(pipes("base").txt2img(PROMPT, width=64, height=64, **said()), run_stock(stock("base"), guidance_scale=4.0))


def test_a_batch_is_its_seeds(pipes, stock):
    cfg = {"guidance_scale": 4.0, "negative_prompt": NEGATIVE}
    agree(pipes("base").txt2img(PROMPT, width=48, height=96, batch=2, **said(**cfg)), run_stock(stock("base"), seeds=(3, 4), size=SIZES[1], **cfg))


@pytest.mark.parity("img2img", "QwenImageImg2ImgPipeline")
@each_size
@each_guidance
@pytest.mark.parametrize("strength", [0.5, 0.75])
def test_img2img(pipes, stock, size, cfg, strength):
    ours = pipes("base").img2img(PROMPT, photo(*size), strength=strength, **said(**cfg))
    agree(ours, run_stock(also(stock("base"), "QwenImageImg2ImgPipeline"), size=size, image=photo(*size), strength=strength, **cfg))


@pytest.mark.parity("inpaint", "QwenImageInpaintPipeline")
@each_size
@each_guidance
def test_inpaint(pipes, stock, size, cfg):
    ours = pipes("base").inpaint(PROMPT, photo(*size), box(*size), strength=0.75, **said(**cfg))
    theirs = also(stock("base"), "QwenImageInpaintPipeline")
    latents, pictures = run_stock(theirs, size=size, image=photo(*size), mask_image=box(*size), strength=0.75, **cfg)
    agree(ours, (latents, [Image.composite(pictures[0], photo(*size), box(*size))]))


def test_outpaint_keeps_the_old_pixels(pipes):
    ours = pipes("base").outpaint(PROMPT, photo(), left=16, right=16, **said())
    assert ours.image.size == (96, 64) and ours.image.crop((16, 0, 80, 64)).tobytes() == photo().tobytes()


@pytest.mark.parity("edit", "QwenImageEditPipeline (told which tokens are the picture's)")
@each_guidance
def test_edit_looks_at_a_reference(pipes, stock, monkeypatch, cfg):
    """A reference of another size and shape than the picture, in a batch."""
    shown = photo(160, 96).resize((157, 91))
    with small_area(monkeypatch):
        ours = pipes("edit").edit(PROMPT, shown, width=48, height=96, batch=2, **said(**cfg))
        theirs = run_stock(stock("edit"), seeds=(3, 4), size=SIZES[1], image=shown, **cfg)
        other = pipes("edit").edit(PROMPT, photo(160, 96, seed=9), width=48, height=96, **said(**cfg))
    agree(ours, theirs)
    assert apart(ours.image, other.image) >= 0.1


@pytest.mark.parametrize("text", [PROMPT, "", "make it <|image_pad|> blue"])
@pytest.mark.parametrize("size", [(160, 96), (128, 128), (40, 200)])
def test_the_encoder_sees_what_it_sees_in_diffusers(pipes, stock, monkeypatch, text, size):
    """Whatever is written, only the template's picture is one: theirs takes a special token in a prompt for a second picture."""
    theirs, shown = stock("edit"), photo(160, 160).resize(size)
    with small_area(monkeypatch):
        tokens = heard(pipes("edit"), text, reference=shown)
        resized = theirs.image_processor.resize(shown, *qwenimage.reference_sized(to_tensor(shown)).shape[2:])
    if "<|" in text:
        plain = text.replace("<|image_pad|>", "")
        assert tokens.shape[1] > theirs.encode_prompt(plain, image=resized)[0].shape[1]
        return
    with torch.no_grad():
        expected, mask = theirs.encode_prompt(text, image=resized)
    assert mask is None and tokens.shape == expected.shape
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [(320, 200), (64, 64), (31, 250), (1024, 1024)])
def test_a_reference_is_sized_as_in_diffusers(stock, size):
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions

    picture, theirs = photo(1024, 512).resize(size), stock("edit")
    width, height, _ = calculate_dimensions(1024 * 1024, size[0] / size[1])
    expected = theirs.image_processor.preprocess(theirs.image_processor.resize(picture, height, width), height, width)
    torch.testing.assert_close(qwenimage.reference_sized(to_tensor(picture)), expected, rtol=0, atol=1e-6)


def test_the_eye_takes_patches_as_its_processor_gives_them(stock):
    theirs = stock("edit")
    for size in ((1024, 1024), (832, 1248), (64, 96)):
        picture = photo(512, 512).resize(size)
        expected = theirs.processor.image_processor(picture, return_tensors="pt")
        patches, grid = qwenimage.seen(to_tensor(picture), theirs.text_encoder.config.vision_config)
        assert grid.equal(expected["image_grid_thw"])
        assert (patches - expected["pixel_values"]).abs().max() <= 1e-5


def test_words_are_heard(pipes):
    def picture(prompt=PROMPT, **more):
        return pipes("base").txt2img(prompt, width=64, height=64, **said(**more)).image

    assert apart(picture(guidance_scale=1.0), picture("blue car, top view", guidance_scale=1.0)) >= 0.1
    assert apart(picture(negative_prompt=NEGATIVE), picture(negative_prompt="a green tree")) >= 0.1
    assert apart(picture(guidance_scale=2.0), picture(guidance_scale=5.0)) >= 0.1


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_levels_end_where_the_scheduler_says(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    known = published("qwenimage")
    family = qwenimage.build(Model("qwenimage", {**known["parts"], "scheduler": SCHEDULER}))
    levels = spacing("trailing", RectifiedFlow(), steps, shift=family.shift(1328, 1328, steps), terminal=family.terminal)
    theirs = FlowMatchEulerDiscreteScheduler(**{k: v for k, v in SCHEDULER.items() if k[0] != "_"} | ({"shift_terminal": None} if steps == 1 else {}))
    mu = 0.5 + (0.9 - 0.5) / (8192 - 256) * (83 * 83 - 256)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert [level.sigma for level in levels] == pytest.approx(theirs.sigmas.tolist(), abs=1e-6)
    assert levels[-2].sigma == pytest.approx(0.02 if steps > 1 else 1.0)


def test_what_it_cannot_do_is_refused_by_name(pipes):
    for kind, asked, named in (
            ("base", {"clip_skip": 2}, "clip_skip"), ("base", {"reference": photo()}, "reference"), ("base", {"width": 72}, "width is 72"),
            ("base", {"negative_prompt": "x", "guidance_scale": 1.0}, "negative_prompt"), ("base", {"true_cfg_scale": 2.0}, "true_cfg_scale"),
            ("edit", {}, "pass reference="), ("edit", {"reference": [photo(), photo()]}, "2 pictures")):
        with pytest.raises(RequestError, match=named):
            pipes(kind).plan(PROMPT, seed=0, **{"width": 64, "height": 64} | asked)
    with pytest.raises(RequestError, match="200 times"):
        pipes("edit").plan(PROMPT, reference=Image.new("RGB", (201, 1)))


@pytest.mark.parametrize("name", ["qwenimage", "qwenimage.diffusers", "qwenimage-edit", "qwenimage-edit.diffusers"])
def test_published_files_are_known(name):
    tensors = json.loads(gzip.decompress((HEADERS / f"{name}.json.gz").read_bytes()))["tensors"]
    shapes = {key: tuple(shape) for key, (_, shape) in tensors.items()}
    found = identify(shapes)
    assert found is not None and (found.family, found.layout, twins(found)) == ("qwenimage", "diffusers", ("qwenimage", "qwenimage-edit"))
    whole = identify({"model.diffusion_model." + key: shape for key, shape in shapes.items()})
    assert (whole.family, whole.layout, whole.prefix) == ("qwenimage", "original", "model.diffusion_model.")
    assert identify(shapes | {qwenimage.LAYERED: (2, 3072)}) is None
    assert identify({key: shape for key, shape in shapes.items() if not key.startswith("transformer_blocks.59.")}) is None


@pytest.mark.parametrize("variant", ["qwenimage", "qwenimage-edit"])
def test_published_configs_make_both_kinds(variant):
    known = published(variant)
    family = qwenimage.build(Model(variant, {**known["parts"], "scheduler": known["scheduler"], "model_index": known["index"]}))
    edit = variant == "qwenimage-edit"
    assert vars(family.defaults).items() >= known["defaults"].items()
    assert (family.task, family.references, family.reads_pictures) == (("edit", 1, True) if edit else ("any", 0, False))
    assert (family.latent.shape(1024, 512), family.terminal) == ((16, 64, 128), 0.02)
    assert family.shift(1024, 1024, 20) == pytest.approx(np.exp(0.5 + 0.4 * (4096 - 256) / (8192 - 256)))
    assert known["index"]["_class_name"] in qwenimage.INDEX


@pytest.mark.parametrize("index, config, named", [
    ("QwenImageEditPlusPipeline", {}, "several pictures"), ("QwenImageLayeredPipeline", {}, "layers"),
    ("", {"use_additional_t_cond": True}, "layers"), ("", {"guidance_embeds": True}, "guidance_embeds"),
    ("", {"in_channels": 132, "out_channels": 16}, "132 channels")])
def test_other_models_of_the_makers_are_refused(index, config, named):
    with pytest.raises(ModelError, match=named):
        qwenimage.build(Model("", {"model_index": {"_class_name": index}, "transformer": config, "vae": {"z_dim": 16}}))
