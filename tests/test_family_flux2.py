"""FLUX.2 against the stock pipelines of diffusers: dev, klein and base klein, each as a tiny random checkpoint in diffusers layout."""

from __future__ import annotations

import gzip
import json
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import single_file
from PIL import Image
from safetensors.torch import save_file
from tiny import mean_latents
from tiny_flux2 import autoencoder, language_model, network, tokenizer

import latentgen
from latentgen.errors import ModelError, RequestError
from latentgen.models.card import published
from latentgen.models.family import Model, Words
from latentgen.models.identify import identify
from latentgen.pipelines import flux2
from latentgen.pixels.image import to_tensor

PROMPT, NEGATIVE, STEPS = "a red heart, flat", "blurry photo of a blue car", 4
KINDS = {"dev": "Flux2Pipeline", "klein": "Flux2KleinPipeline", "base": "Flux2KleinPipeline"}
SIZES = ((64, 64), (96, 128))  # (width, height)
each_size = pytest.mark.parametrize("size", SIZES, ids=str)
each_kind = pytest.mark.parametrize("kind", KINDS)
HEADERS = {path.name.removesuffix(".json.gz"): path for path in (Path(__file__).parent / "headers").glob("*.json.gz")}
VARIANTS = ("flux2-dev", "flux2-klein-4b", "flux2-klein-9b")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """kind -> the stock pipeline, whose parts are saved as stock.root/kind."""
    import diffusers

    root, vae = tmp_path_factory.mktemp("flux2"), autoencoder()
    words = {kind: {"tokenizer": tokenizer(kind, root / f"{kind}.json"), "text_encoder": language_model(kind)} for kind in ("dev", "klein")}

    @lru_cache
    def make(kind):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        more = {} if kind == "dev" else {"is_distilled": kind == "klein"}
        theirs = getattr(diffusers, KINDS[kind])(**words["dev" if kind == "dev" else "klein"], transformer=network(guided=kind == "dev"), vae=vae,
                                                 scheduler=scheduler, **more)
        theirs.set_progress_bar_config(disable=True)
        theirs.save_pretrained(root / kind)
        return theirs

    make.root = root
    return make


@pytest.fixture(scope="module")
def pipes(stock):
    """kind -> our pipeline of the same folder."""

    @lru_cache
    def make(kind):
        stock(kind)
        return latentgen.load(stock.root / kind, dtype="float32", device="cpu", progress=False)

    return make


def run_stock(theirs, *, seeds=(3,), size=SIZES[0], **said):
    """(final latents (B, 128, h, w) before the statistics, pictures) of the stock pipeline; its noise is drawn in our layout, from a seed each."""
    seen = []

    def watch(pipe, index, time, values):
        seen.append(values["latents"])
        return values

    sides = {"width": size[0], "height": size[1]} if size else {}
    said = {"prompt": PROMPT, "num_inference_steps": STEPS, "num_images_per_prompt": len(seeds)} | sides | said
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with mean_latents(), torch.no_grad():
        pictures = theirs(**said, generator=generators if seeds[1:] else generators[0], callback_on_step_end=watch).images
    return seen[-1].transpose(1, 2).unflatten(2, (pictures[0].height // 16, pictures[0].width // 16)), pictures


def agree(result, reference):
    """Latents within 1e-4 of their size, pictures within 1/255."""
    latents, pictures = reference
    assert latents.isfinite().all() and latents.abs().max() > 0.1
    assert result.latents.shape == latents.shape and (result.latents - latents).abs().max() <= 1e-4 * latents.abs().max()
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
    """A mask that follows the latent's grid: whole 16x16 cells are repainted."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (16, 16, 48, height - 16))
    return mask


def said(**more):
    return {"steps": STEPS, "seed": 3, **more}


@pytest.mark.parity("encoders", "Flux2Pipeline, Flux2KleinPipeline")
@pytest.mark.parametrize("kind", ["dev", "klein"])
@pytest.mark.parametrize("text", [PROMPT, "", "naïve Ünïcode – 日本語 🙂 don't 2024's\n\n  two lines ", "the cat sat on the mat, " * 20])
def test_the_encoder_hears_what_it_hears_in_diffusers(pipes, stock, kind, text):
    ours, theirs, heard = pipes(kind), stock(kind), {}
    watch = theirs.text_encoder.register_forward_pre_hook(lambda module, args, given: heard.update(given), with_kwargs=True)
    with torch.no_grad():
        expected, _ = theirs.encode_prompt(text)
    watch.remove()
    planned = ours.plan(text, seed=0, width=64, height=64).prompt.chunks["tokenizer"]
    ids, mask = torch.tensor(planned.ids), torch.tensor(planned.mask)
    assert ids.shape == (1, 512) and torch.equal(ids, heard["input_ids"]) and torch.equal(mask, heard["attention_mask"])
    with ours.residency.use("text") as modules, torch.no_grad():
        words = ours.family.encode(modules, Words(ids={"tokenizer": ids}, mask={"tokenizer": mask}))
    assert words.tokens.shape == (1, 512, 48)
    torch.testing.assert_close(words.tokens, expected, rtol=1e-5, atol=1e-5)


def test_a_long_prompt_is_never_cut_in_silence(pipes):
    with pytest.raises(RequestError, match="512|at most"):
        pipes("klein").plan("the cat sat on the mat, " * 200, seed=0, width=64, height=64)
    assert any("cut off" in note for note in pipes("klein").plan("the cat sat on the mat, " * 200, seed=0, width=64, height=64, strict=False).notes)


@pytest.mark.parity("txt2img", "Flux2Pipeline, Flux2KleinPipeline")
@each_size
@each_kind
def test_txt2img(pipes, stock, kind, size):
    scale = {} if kind == "klein" else {"guidance_scale": 3.0}
    agree(pipes(kind).txt2img(PROMPT, width=size[0], height=size[1], **said(**scale)), run_stock(stock(kind), size=size, **scale))


@each_kind
def test_a_batch_is_its_seeds(pipes, stock, kind):
    agree(pipes(kind).txt2img(PROMPT, width=96, height=128, batch=2, **said()), run_stock(stock(kind), seeds=(3, 4), size=SIZES[1]))


def test_guidance_off_is_one_evaluation(pipes, stock):
    ours = pipes("base").txt2img(PROMPT, width=64, height=64, **said(guidance_scale=1.0))
    assert ours.plan.batching == "off"
    agree(ours, run_stock(stock("base"), guidance_scale=1.0))


def test_a_negative_prompt(pipes, stock):
    """The stock pipeline takes one as states alone."""
    ours = pipes("base").txt2img(PROMPT, negative_prompt=NEGATIVE, width=64, height=64, **said(guidance_scale=3.0))
    states, _ = stock("base").encode_prompt(NEGATIVE)
    agree(ours, run_stock(stock("base"), negative_prompt_embeds=states, guidance_scale=3.0))


@pytest.mark.parity("edit", "Flux2Pipeline, Flux2KleinPipeline")
@each_kind
@pytest.mark.parametrize("sizes", [((64, 64),), ((120, 75), (64, 200))], ids=["one", "two"])
def test_reference_pictures(pipes, stock, kind, sizes):
    """Of other sizes and shapes than the picture that is made, and not multiples of 16."""
    shown = [photo(*size, seed=n) for n, size in enumerate(sizes)]
    ours = pipes(kind).edit(PROMPT, shown, width=96, height=128, **said())
    agree(ours, run_stock(stock(kind), size=SIZES[1], image=shown))
    other = pipes(kind).edit(PROMPT, [*shown[:-1], photo(*sizes[-1], seed=9)], width=96, height=128, **said())
    assert apart(ours.image, other.image) >= 0.1


def test_references_in_a_batch_have_an_order(pipes, stock):
    shown = [photo(seed=1), photo(seed=2)]
    ours = pipes("base").edit(PROMPT, shown, width=64, height=64, batch=2, **said())
    agree(ours, run_stock(stock("base"), seeds=(3, 4), image=shown))
    assert apart(ours.image, pipes("base").edit(PROMPT, shown[::-1], width=64, height=64, **said()).image) >= 0.1


@pytest.mark.parametrize("size", [(64, 64), (75, 131), (1200, 1000), (2000, 300), (64, 512)])
def test_a_reference_is_sized_as_in_diffusers(stock, size):
    picture, processor = photo(*size), stock("dev").image_processor
    small = processor._resize_if_exceeds_area(picture)
    width, height = (side // 16 * 16 for side in small.size)
    expected = processor.preprocess(small, height=height, width=width, resize_mode="crop")
    torch.testing.assert_close(flux2.reference_sized(to_tensor(picture), 16), expected, rtol=0, atol=1e-6)


def by_hand(theirs, picture, *, strength, guidance_scale, mask=None):
    """img2img and inpainting by diffusers' parts and scheduler, as it has no pipeline for them without a reference: (latents, pictures)."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    with mean_latents(), torch.no_grad():
        (words, ids), (nothing, _) = (theirs.encode_prompt(text) for text in (PROMPT, ""))
        z0 = theirs._encode_vae_image(theirs.image_processor.preprocess(picture), None)
        places, shape = theirs._prepare_latent_ids(z0), z0.shape
        theirs.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=compute_empirical_mu(shape[2] * shape[3], STEPS))
        first = STEPS - int(STEPS * strength)
        theirs.scheduler.set_begin_index(first)
        eps = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(3))
        x = theirs.scheduler.scale_noise(z0, theirs.scheduler.timesteps[first:first + 1], eps)
        for at in range(first, STEPS):
            time, guided = theirs.scheduler.timesteps[at], theirs.transformer.config.guidance_embeds
            embedded = torch.tensor([guidance_scale]) if guided else None
            given = {"timestep": time[None] / 1000, "img_ids": places, "txt_ids": ids, "guidance": embedded, "return_dict": False}
            with_words, without = (theirs._unpack_latents_with_ids(theirs.transformer(theirs._pack_latents(x), states, **given)[0], places)
                                   for states in (words, nothing))
            x = theirs.scheduler.step(with_words if guided else without + guidance_scale * (with_words - without), time, x).prev_sample
            if mask is not None:
                kept = z0 if at + 1 == STEPS else theirs.scheduler.scale_noise(z0, theirs.scheduler.timesteps[at + 1:at + 2], eps)
                x = mask * x + (1 - mask) * kept
        deviation = torch.sqrt(theirs.vae.bn.running_var + theirs.vae.config.batch_norm_eps)
        latents = theirs._unpatchify_latents(x * deviation[:, None, None] + theirs.vae.bn.running_mean[:, None, None])
        return x, theirs.image_processor.postprocess(theirs.vae.decode(latents).sample)


@pytest.mark.parity("img2img", "hand loop")
@each_size
@pytest.mark.parametrize("kind", ["dev", "base"])
def test_img2img(pipes, stock, kind, size):
    ours = pipes(kind).img2img(PROMPT, photo(*size), strength=0.75, **said(guidance_scale=3.0))
    agree(ours, by_hand(stock(kind), photo(*size), strength=0.75, guidance_scale=3.0))


@pytest.mark.parity("inpaint", "hand loop")
@each_size
@pytest.mark.parametrize("kind", ["dev", "base"])
def test_inpaint(pipes, stock, kind, size):
    ours = pipes(kind).inpaint(PROMPT, photo(*size), box(*size), strength=0.5, **said(guidance_scale=3.0))
    mask = torch.nn.functional.max_pool2d((to_tensor(box(*size))[:, :1] > 0).float(), 16)
    x, pictures = by_hand(stock(kind), photo(*size), strength=0.5, guidance_scale=3.0, mask=mask)
    agree(ours, (x, [Image.composite(pictures[0], photo(*size), box(*size))]))


@pytest.mark.parametrize("kind", ["klein", "base"])
@pytest.mark.parametrize("mask", ["box", "all"])
def test_inpaint_that_sees_the_picture(pipes, stock, kind, mask):
    """The stock pipeline shows the network the picture and a second one; here they are said as `reference`. All repainted, it is img2img."""
    import diffusers

    theirs = diffusers.Flux2KleinInpaintPipeline(**stock(kind).components, is_distilled=kind == "klein")
    theirs.set_progress_bar_config(disable=True)
    picture, second, drawn = photo(96, 128), photo(64, 80, seed=8), box(96, 128) if mask == "box" else Image.new("L", (96, 128), 255)
    scale = {} if kind == "klein" else {"guidance_scale": 3.0}
    x, pictures = run_stock(theirs, size=None, image=picture, image_reference=second, mask_image=drawn, strength=0.75, **scale)
    asked = said(strength=0.75, reference=[picture, second], **scale)
    ours = pipes(kind).inpaint(PROMPT, picture, drawn, **asked) if mask == "box" else pipes(kind).img2img(PROMPT, picture, **asked)
    agree(ours, (x, [Image.composite(pictures[0], picture, drawn)]))


def test_outpaint_keeps_what_was_there(pipes):
    ours = pipes("klein").outpaint(PROMPT, photo(), left=16, bottom=32, **said())
    assert ours.image.size == (80, 96) and np.array_equal(np.asarray(ours.image.crop((16, 0, 80, 64))), np.asarray(photo()))


def test_words_and_guidance_are_heard(pipes):
    def picture(kind, prompt=PROMPT, **more):
        return pipes(kind).txt2img(prompt, width=64, height=64, **said(**more)).image

    for kind in KINDS:
        assert apart(picture(kind), picture(kind, "blue car, top view")) >= 0.1
    assert apart(picture("dev", guidance_scale=1.5), picture("dev", guidance_scale=6.0)) >= 0.1
    assert apart(picture("base", negative_prompt=NEGATIVE), picture("base", negative_prompt="a green tree")) >= 0.1


def test_a_single_file_is_its_folder(pipes, stock, tmp_path):
    """Network and autoencoder by their makers' names in one file: the folder's tensors bit for bit (sums differ in the last bit with their place)."""
    theirs, own, folder = stock("klein"), pipes("klein"), stock.root / "klein"
    modules = {"transformer": theirs.transformer, "vae": theirs.vae}
    tensors = single_file("flux2", {k: m.state_dict() for k, m in modules.items()}, {k: dict(m.config) for k, m in modules.items()})
    assert {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "vae.bn.running_var"} <= set(tensors)
    file = tmp_path / "klein.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    ours = latentgen.load(file, config=folder, text_encoder=folder / "text_encoder", dtype="float32", device="cpu", progress=False)
    for stage, part in (("denoiser", "transformer"), ("decoder", "vae")):
        with ours.residency.use(stage) as one, own.residency.use(stage) as other:
            found, expected = one[part].state_dict(), other[part].state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    asked = said(width=64, height=64, reference=photo())
    torch.testing.assert_close(ours.edit(PROMPT, **asked).latents, own.edit(PROMPT, **asked).latents, rtol=0, atol=1e-5)


def test_a_lone_tokenizer_file_pads_as_the_model_was_trained(pipes, stock):
    for kind in ("dev", "klein"):
        folder = latentgen.load(stock.root / kind, tokenizer=stock.root / f"{kind}.json", device="cpu", progress=False)
        lone, own = (pipe.plan(PROMPT, seed=0, width=64, height=64).prompt.chunks["tokenizer"] for pipe in (folder, pipes(kind)))
        assert (lone.ids, lone.mask) == (own.ids, own.mask) and own.mask[0][-1] == (kind == "dev")


def test_what_it_cannot_do_is_refused_by_name(pipes):
    for kind, asked, named in (("klein", {"negative_prompt": "x"}, "negative_prompt"), ("dev", {"negative_prompt": "x"}, "true_cfg_scale"),
                               ("klein", {"guidance_scale": 3.0}, "guidance_scale"), ("dev", {"clip_skip": 2}, "clip_skip"),
                               ("dev", {"width": 72}, "width is 72"), ("base", {"reference": [photo()] * 11}, "11 pictures"),
                               ("base", {"true_cfg_scale": 2.0}, "true_cfg_scale")):
        with pytest.raises(RequestError, match=named):
            pipes(kind).plan(PROMPT, seed=0, **{"width": 64, "height": 64} | asked)
    for size in ((63, 64), (1040, 128)):
        with pytest.raises(RequestError, match=rf"reference is {size[0]}x{size[1]}"):
            pipes("klein").plan(PROMPT, reference=photo(*size), width=64, height=64)


@pytest.mark.parametrize("name", [variant + layout for variant in VARIANTS for layout in ("", ".diffusers")])
def test_published_networks_are_known_by_their_tensors(name):
    shapes = header(name)
    found = identify(shapes)
    assert (found.family, found.variant, found.layout) == ("flux2", name.removesuffix(".diffusers"), "diffusers" if "." in name else "original")
    assert identify({f"model.diffusion_model.{key}": shape for key, shape in shapes.items()}).variant == found.variant
    last = max(int(key.split(".")[1]) for key in shapes if key.startswith(("single_blocks", "single_transformer_blocks")))
    assert identify({key: shape for key, shape in shapes.items() if f".{last}." not in key}) is None  # pruned


def test_no_other_family_is_taken_for_it():
    others = [name for name in HEADERS if not name.startswith("flux2")]
    assert {"flux1-dev", "flux1-schnell.diffusers"} <= set(others)
    for name in others:
        shapes = header(name)
        assert not any(all(shapes.get(key) == shape for key, shape in s.shapes.items()) for s in flux2.SIGNATURES), name


def header(name):
    return {key: tuple(shape) for key, (_, shape) in json.loads(gzip.decompress(HEADERS[name].read_bytes()))["tensors"].items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_configs_make_the_kinds(variant):
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    known = published(variant)
    family = flux2.build(Model(variant, {**known["parts"], "scheduler": known["scheduler"], "model_index": known["index"]}))
    dev = variant == "flux2-dev"
    assert vars(family.defaults).items() >= known["defaults"].items()
    assert (family.guidance, family.task, family.latent.shape(1024, 512)) == ("embedded" if dev else "none", "any", (128, 32, 64))
    assert family.parts[0].cls == f"transformers.{known['parts']['text_encoder']['architectures'][0]}"
    assert family.encode.keywords["layers"] == ((10, 20, 30) if dev else (9, 18, 27))
    for side, steps in ((256, 4), (1024, 50), (2048, 50), (1024, 250)):
        assert family.shift(side, side, steps) == pytest.approx(np.exp(compute_empirical_mu((side // 16) ** 2, steps)), rel=1e-6)
    assert not dev or flux2.build(Model(variant, {"transformer": {"guidance_embeds": True}, "scheduler": {"shift": 3.0}})).defaults.shift == 3.0


def test_an_index_tells_a_base_klein_from_its_twin(stock, tmp_path):
    """Also where the card names the distilled variant, whose steps and guidance are then not the base's."""
    for kind, expected in (("klein", ("none", 4, 1.0)), ("base", ("cfg", 50, 4.0))):
        stock(kind)
        shutil.copytree(stock.root / kind, tmp_path / kind)
        (tmp_path / kind / "card.toml").write_text('name = "mine"\nfamily = "flux2"\nvariant = "flux2-klein-4b"\n')
        family = latentgen.load(tmp_path / kind, device="cpu", progress=False).family
        assert (family.guidance, family.defaults.steps, family.defaults.guidance_scale) == expected
    kept = flux2.build(Model("", {"transformer": {"guidance_embeds": False}, "model_index": {"_class_name": "Flux2KleinKVPipeline"}}))
    assert (kept.guidance, kept.references) == ("none", 0)  # its way of looking at references is another


@pytest.mark.parametrize(("configs", "named"), [
    ({"transformer": {"in_channels": 64}, "vae": {"latent_channels": 32}}, "takes 64 channels and the autoencoder gives 128"),
    ({"transformer": {"joint_attention_dim": 7680}, "text_encoder": {"hidden_size": 4096, "num_hidden_layers": 36}}, "width 4096"),
    ({"text_encoder": {"model_type": "mistral3", "text_config": {"num_hidden_layers": 30, "hidden_size": 5120}}}, "30 layers")])
def test_parts_that_do_not_belong_together(configs, named):
    with pytest.raises(ModelError, match=named):
        flux2.build(Model("", configs))
