"""pixart against the stock pipelines of diffusers: alpha with and without size conditioning and Sigma, tiny random checkpoints in diffusers layout.

diffusers has no pipeline of theirs that edits pictures: img2img and inpaint are compared with a loop around its schedulers, written out here. The
stock pipelines are run without what they add around the model: caption cleaning and resolution bins.
"""

from __future__ import annotations

import gzip
import json
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_spiece import folder as spiece_folder
from test_spiece import model as spiece_model
from tiny import lively, mean_latents, tiny_vae
from tiny_t5 import tiny_t5, tiny_t5_tokenizer

import latentgen
from latentgen.errors import ModelError, RequestError
from latentgen.models.card import published
from latentgen.models.family import Conditioning, Model, Scene, Words
from latentgen.models.identify import identify, twins
from latentgen.pipelines import pixart

PROMPT, NEGATIVE, SCALE, STEPS = "a red heart, flat", "blurry photo of a blue car", 4.0, 8  # steps that divide 1000
NOISE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
SAMPLERS = {  # ours -> their class, config and spacing; where a class has its own idea of a spacing, one that it shares with ours
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "leading"}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero", "timestep_spacing": "trailing"}),
}
KINDS = {  # pipeline, network, scale of the latents
    "alpha": ("PixArtAlphaPipeline", {"sample_size": 8, "interpolation_scale": 1, "use_additional_conditions": False}, 0.18215),
    "told": ("PixArtAlphaPipeline", {"sample_size": 128, "interpolation_scale": 2, "use_additional_conditions": True}, 0.18215),
    "sigma": ("PixArtSigmaPipeline", {"sample_size": 16, "interpolation_scale": 2, "use_additional_conditions": False}, 0.13025),
}
SIZES = ((64, 64), (48, 96))  # (width, height)
HEADERS = Path(__file__).parent / "headers"
each_kind = pytest.mark.parametrize("kind", KINDS)
each_size = pytest.mark.parametrize("size", SIZES, ids=str)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("pixart")


@pytest.fixture(scope="module")
def stock(root):
    """kind -> the stock pipeline, whose parts are saved as root/kind."""
    import diffusers
    from transformers import T5TokenizerFast

    words = {"tokenizer": T5TokenizerFast.from_pretrained(tiny_t5_tokenizer(root / "tokenizer")), "text_encoder": tiny_t5(seed=2)}

    @lru_cache
    def make(kind):
        name, config, scale = KINDS[kind]
        torch.manual_seed(1)
        net = lively(diffusers.PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=24, cross_attention_dim=48, num_layers=2,
                                                        caption_channels=32, **config))
        theirs = getattr(diffusers, name)(**words, vae=tiny_vae(scaling_factor=scale), transformer=net,
                                          scheduler=diffusers.DPMSolverMultistepScheduler(**NOISE))
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
        return opened(root / kind)

    return make


def opened(folder):
    return latentgen.load(folder, dtype="float32", device="cpu", progress=False)


def scheduler(sampler):
    import diffusers

    name, config = SAMPLERS[sampler]
    return getattr(diffusers, name)(**NOISE | config)


def decoded(theirs, latents):
    with torch.no_grad():
        return theirs.image_processor.postprocess(theirs.vae.decode(latents / theirs.vae.config.scaling_factor).sample)


def run_stock(theirs, sampler="ddim", *, seeds=(3,), size=SIZES[0], scale=SCALE):
    """(final latents (B, 4, h, w), pictures) of the stock pipeline."""
    theirs.scheduler = scheduler(sampler)
    generator = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        latents = theirs(PROMPT, negative_prompt=NEGATIVE, guidance_scale=scale, num_inference_steps=STEPS, width=size[0], height=size[1],
                         generator=generator, num_images_per_prompt=len(seeds), output_type="latent", clean_caption=False,
                         use_resolution_binning=False).images
    return latents, decoded(theirs, latents)


def run_by_hand(theirs, sampler, strength, image, mask=None, *, seed=3):
    """The same of an edit: from the picture's noised latents; after each step what the mask keeps is put back at the level that was reached."""
    noise, (width, height) = scheduler(sampler), image.size
    words, used, negative, negative_used = theirs.encode_prompt(PROMPT, True, NEGATIVE)
    with mean_latents(), torch.no_grad():
        z0 = theirs.vae.encode(theirs.image_processor.preprocess(image)).latent_dist.sample() * theirs.vae.config.scaling_factor
    eps = torch.randn(z0.shape, generator=torch.Generator("cpu").manual_seed(seed))
    told = {"resolution": torch.tensor([[height, width]] * 2).float(), "aspect_ratio": torch.tensor([[height / width]] * 2)}
    keep = 0 if mask is None else 1 - torch.from_numpy(np.asarray(mask) / 255).float()[None, None, ::8, ::8]
    noise.set_timesteps(STEPS)
    times = noise.timesteps[-int(STEPS * strength):]
    if hasattr(noise, "set_begin_index"):
        noise.set_begin_index(STEPS - len(times))
    x = noise.add_noise(z0, eps, times[:1])
    for index, t in enumerate(times):
        with torch.no_grad():
            out = theirs.transformer(noise.scale_model_input(torch.cat([x, x]), t), torch.cat([words, negative]), t.expand(2), told,
                                     encoder_attention_mask=torch.cat([used, negative_used]), return_dict=False)[0]
        first, second = out[:, :4].chunk(2)
        x = noise.step(second + SCALE * (first - second), t, x, return_dict=False)[0]
        kept = z0 if index == len(times) - 1 else noise.add_noise(z0, eps, times[index + 1:index + 2])
        x = keep * kept + (1 - keep) * x
    return x, decoded(theirs, x)


def agree(result, reference):
    """Latents within 1e-4 of their size, pictures within 1/255, and neither trivial."""
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


def said(sampler="ddim", **more):
    return {"steps": STEPS, "seed": 3, "sampler": sampler, "spacing": SAMPLERS[sampler][1]["timestep_spacing"], "guidance_scale": SCALE,
            "negative_prompt": NEGATIVE, **more}


@pytest.mark.parity("encoders", "PixArtAlphaPipeline, PixArtSigmaPipeline")
@pytest.mark.parametrize("text", [PROMPT, "", "  Naïve CAFÉ – 日本語 🙂 don't 2024's ", "two dogs run over the hill, " * 4])
@pytest.mark.parametrize("kind", ["alpha", "sigma"])
def test_words_as_the_stock_pipeline_encodes_them(pipes, stock, kind, text):
    """In lower case, and with the mask that both the encoder and the network see."""
    ours, theirs = pipes(kind), stock(kind)
    planned = ours.plan(text, seed=0, strict=False).prompt.chunks["tokenizer"]
    with ours.residency.use("text") as modules, torch.no_grad():
        words = ours.family.encode(modules, Words({"tokenizer": torch.tensor(planned.ids)}, {"tokenizer": torch.tensor(planned.mask)}))
    with torch.no_grad():
        tokens, mask, *_ = theirs.encode_prompt(text, False)
    assert words.tokens.shape == (1, 120 if kind == "alpha" else 300, 32)
    torch.testing.assert_close(words.tokens, tokens, rtol=0, atol=1e-5)
    assert torch.equal(words.extra["mask"], mask) and 0 < mask.sum() <= mask.numel()


def test_a_longer_text_is_refused_or_cut_as_there(pipes, stock):
    long = "the quick brown fox " * 40
    with pytest.raises(RequestError, match=r"prompt has \d+ tokens .*reads at most 119"):
        pipes("alpha").plan(long, seed=0)
    cut = pipes("alpha").plan(long, seed=0, strict=False).prompt
    theirs = stock("alpha").tokenizer(long.strip(), max_length=120, truncation=True).input_ids
    assert cut.ids == (tuple(theirs),) and cut.tokens == 119


@pytest.mark.parity("txt2img", "PixArtAlphaPipeline, PixArtSigmaPipeline")
@pytest.mark.parametrize("scale", [1.0, SCALE])
@each_size
@each_kind
def test_txt2img(pipes, stock, kind, size, scale):
    negative = {} if scale > 1 else {"negative_prompt": ""}
    ours = pipes(kind).txt2img(PROMPT, width=size[0], height=size[1], **said(guidance_scale=scale, **negative))
    agree(ours, run_stock(stock(kind), size=size, scale=scale))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_other_samplers(pipes, stock, sampler):
    agree(pipes("sigma").txt2img(PROMPT, width=64, height=64, **said(sampler)), run_stock(stock("sigma"), sampler))


@pytest.mark.parametrize("kind", ["told", "sigma"])
def test_a_batch_is_its_seeds(pipes, stock, kind):
    ours = pipes(kind).txt2img(PROMPT, width=48, height=96, batch=2, **said())
    agree(ours, run_stock(stock(kind), seeds=(3, 4), size=SIZES[1]))
    assert apart(*ours.images) >= 0.1


@pytest.mark.parity("img2img", "hand loop")
@pytest.mark.parametrize(("kind", "sampler", "size", "strength"), [
    ("alpha", "ddim", SIZES[0], 0.5), ("told", "ddim", SIZES[1], 0.75), ("sigma", "dpmpp_2m", SIZES[1], 0.4), ("told", "euler", SIZES[0], 1.0)])
def test_img2img(pipes, stock, kind, sampler, size, strength):
    agree(pipes(kind).img2img(PROMPT, photo(*size), strength=strength, **said(sampler)), run_by_hand(stock(kind), sampler, strength, photo(*size)))


@pytest.mark.parity("inpaint", "hand loop")
@pytest.mark.parametrize(("kind", "sampler", "size", "strength"), [
    ("alpha", "dpmpp_2m", SIZES[0], 0.5), ("told", "ddim", SIZES[1], 0.75), ("sigma", "ddim", SIZES[0], 0.9)])
def test_inpaint(pipes, stock, kind, sampler, size, strength):
    ours = pipes(kind).inpaint(PROMPT, photo(*size), box(*size), strength=strength, **said(sampler))
    latents, pictures = run_by_hand(stock(kind), sampler, strength, photo(*size), box(*size))
    agree(ours, (latents, [Image.composite(pictures[0], photo(*size), box(*size))]))


def test_outpaint_keeps_the_picture(pipes):
    made = pipes("sigma").outpaint(PROMPT, photo(), left=16, right=32, **said()).image
    assert made.size == (112, 64) and made.crop((16, 0, 80, 64)).tobytes() == photo().tobytes() and np.asarray(made)[:, 84:].std() > 1


@each_kind
def test_words_are_heard(pipes, kind):
    def picture(prompt=PROMPT, **more):
        return pipes(kind).txt2img(prompt, width=64, height=64, **said(**more)).image

    first = picture()
    assert apart(first, picture("blue car, top view")) >= 0.1
    assert apart(first, picture(negative_prompt="a green tree")) >= 0.1
    assert apart(first, picture(PROMPT.upper())) == 0  # all is read in lower case
    if kind == "told":  # what the network is told of the size changes what it returns; agreement with the stock pipeline shows that it is told right
        seen = pipes(kind).family.inputs(Scene(96, 48, (4, 6, 12), encode=lambda x: x), "negative")
        assert seen["resolution"].tolist() == [[48, 96]] and seen["aspect_ratio"].tolist() == [[0.5]]
        with pipes(kind).residency.use("denoiser") as modules, torch.no_grad():
            level = pipes(kind).plan(PROMPT, seed=0).levels[0]
            others = {"resolution": torch.tensor([[512.0, 512.0]])}, {"aspect_ratio": torch.ones(1, 1)}
            words = [Conditioning(torch.ones(1, 120, 32), extra={"mask": torch.ones(1, 120), **seen, **other}) for other in ({}, *others)]
            out = [pixart.predict(modules, torch.zeros(1, 4, 8, 8), level, each) for each in words]
        assert min((out[0] - other).abs().max() for other in out[1:]) > 1e-3


def test_a_folder_as_published(root, pipes, stock, tmp_path):
    """Of before the class had its own name, with SentencePiece's file alone: the same picture."""
    stock("told")
    old = tmp_path / "old"
    shutil.copytree(root / "told", old, ignore=shutil.ignore_patterns("tokenizer"))
    spiece_folder(old / "tokenizer", spiece_model(rules=b""), extra_ids=100, model_max_length=512, pad_token="<pad>")
    config = json.loads((old / "transformer" / "config.json").read_text("utf-8"))
    config |= {"_class_name": "Transformer2DModel", "use_additional_conditions": None, "interpolation_scale": None, "num_vector_embeds": None}
    (old / "transformer" / "config.json").write_text(json.dumps(config), "utf-8")
    made = [pipe.txt2img(PROMPT, width=64, height=64, **said(steps=2)).image for pipe in (opened(old), pipes("told"))]
    assert made[0].tobytes() == made[1].tobytes()


def test_what_it_cannot_do_is_refused_by_name(pipes):
    for asked, named in (({"clip_skip": 2}, "clip_skip"), ({"reference": photo()}, "reference"), ({"width": 72}, "width is 72.*multiple of 16"),
                         ({"true_cfg_scale": 2.0}, "true_cfg_scale"), ({"original_size": (64, 64)}, "original_size"), ({"shift": 3.0}, "shift"),
                         ({"negative_prompt": "x", "guidance_scale": 1}, "negative_prompt"), ({"prompt_2": "x"}, "prompt_2")):
        with pytest.raises(RequestError, match=named):
            pipes("told").plan(PROMPT, seed=0, **{"width": 64, "height": 64} | asked)


def test_the_solvers_linspace_is_our_trailing(pipes):
    """The scheduler config of the published folders; ours of the name linspace ends at timestep 0, theirs before it."""
    import diffusers

    plan = pipes("sigma").plan(PROMPT, seed=0)
    theirs = diffusers.DPMSolverMultistepScheduler(**NOISE)
    theirs.set_timesteps(20)
    assert (plan.spacing, plan.sampler, plan.steps, plan.guidance_scale, plan.width) == ("trailing", "dpmpp_2m", 20, 4.5, 128)
    assert max(abs(level.time - t) for level, t in zip(plan.levels[:-1], theirs.timesteps.tolist(), strict=True)) <= 1


@pytest.mark.parametrize("path", sorted(HEADERS.rglob("*.json.gz")), ids=lambda path: path.name.removesuffix(".json.gz"))
def test_published_headers(path):
    """Each of ours is known, and no other is taken for it. Without size conditioning alpha and Sigma have the same tensors."""
    found = identify({name: tuple(shape) for name, (_, shape) in json.loads(gzip.decompress(path.read_bytes()))["tensors"].items()})
    variant = path.name.removesuffix(".json.gz").removesuffix(".diffusers")
    if not variant.startswith("pixart"):
        assert found is None or found.family != "pixart"
        return
    assert found is not None and (found.family, found.layout) == ("pixart", "diffusers")
    assert twins(found) == (("pixart-alpha-1024",) if variant == "pixart-alpha-1024" else ("pixart-sigma-1024", "pixart-alpha-512"))


@pytest.mark.parametrize(("variant", "length", "told", "scale"), [
    ("pixart-alpha-512", 120, False, 0.18215), ("pixart-alpha-1024", 120, True, 0.18215), ("pixart-sigma-1024", 300, False, 0.13025)])
def test_published_configs(variant, length, told, scale):
    known = published(variant)
    configs = {**known["parts"], "scheduler": known["scheduler"]}
    for family in (pixart.build(Model(variant, configs)), pixart.build(Model("", configs | {"model_index": known["index"]}))):
        assert vars(family.defaults).items() >= known["defaults"].items()
        assert (family.tokenizers["tokenizer"].length, bool(family.inputs(Scene(64, 32, (4, 4, 8), encode=lambda x: x), "none"))) == (length, told)
        assert (family.latent.scale, family.latent.multiple, family.latent.shape(64, 32)) == (scale, 16, (4, 4, 8))
        assert (family.prediction, family.guidance, family.path.train_steps) == ("epsilon", "cfg", 1000)
    # a folder of alpha's whose tensors are Sigma's too: the index decides
    assert pixart.build(Model("pixart-sigma-1024", configs | {"model_index": known["index"]})).tokenizers["tokenizer"].length == length
    bare = pixart.build(Model(variant, {"transformer": known["parts"]["transformer"]}))  # no scheduler config: as all of them are trained
    assert bare.path.at(1.0).alpha == pytest.approx(0.00635, rel=1e-2) and bare.defaults.spacing == "trailing"


@pytest.mark.parametrize(("configs", "words"), [
    ({"transformer": {"in_channels": 16}}, "16 channels"), ({"transformer": {"out_channels": 12}}, "12"),
    ({"vae": {"latent_channels": 16}}, "the VAE has 16"),
    ({"transformer": {"norm_type": "ada_norm_zero"}}, "'ada_norm_zero'"), ({"transformer": {"patch_size": "2"}}, "patch_size"),
    ({"transformer": {"caption_channels": 4096}, "text_encoder": {"d_model": 2048}}, "2048 values and the transformer reads 4096"),
    ({"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}}, "FlowMatch"), ({"transformer": {"sample_size": "x"}}, "sample_size")])
def test_what_is_not_of_this_family_is_refused(configs, words):
    with pytest.raises(ModelError, match=words):
        pixart.build(Model("", configs))
