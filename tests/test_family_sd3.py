"""Stable Diffusion 3 and 3.5 against the stock pipelines: tiny random checkpoints, the same components and noise on both sides.

By design we take the mean of the VAE's posterior where diffusers draws from it, and apply clip_skip to both sides of guidance where diffusers applies
it to the prompt alone.
"""

import gzip
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import single_file
from PIL import Image
from safetensors.torch import save_file
from tiny import lively, mean_latents, tiny_clip, tiny_vae
from tiny_t5 import tiny_t5, tiny_t5_tokenizer

import latentgen
from latentgen.conditioning.vocabulary import packaged_clip
from latentgen.errors import ModelError, RequestError
from latentgen.models.card import published
from latentgen.models.family import Model, Words
from latentgen.models.identify import identify
from latentgen.pipelines import sd3

PROMPT, SECOND, THIRD, NEGATIVE = "a red heart, flat", "blue car, top view", "the cat sat on the mat", "blurry, low quality"
STEPS, SCALE, SIZES = 4, 4.0, ((64, 64), (48, 96))  # (width, height)
KINDS = {"sd3": {}, "sd35": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}}
TASKS = {"txt2img": "StableDiffusion3Pipeline", "img2img": "StableDiffusion3Img2ImgPipeline", "inpaint": "StableDiffusion3InpaintPipeline"}
CLIPS, WIDTHS, JOINT = ("text_encoder", "text_encoder_2"), (16, 32), 64
HEADERS = Path(__file__).parent / "headers"
each_size = pytest.mark.parametrize("size", SIZES, ids=str)
each_kind = pytest.mark.parametrize("kind", KINDS)


def network(**config):
    """With a gain of 2: at 3, attention without norms saturates, and turns the last bit of a float32 timestep into 1e-4 of the picture."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(1)
    return lively(SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=16, num_attention_heads=2, caption_projection_dim=32, joint_attention_dim=JOINT,
        pooled_projection_dim=sum(WIDTHS), pos_embed_max_size=12, **config), gain=2.0)


def clip_tokenizer(pad):
    from transformers import CLIPTokenizer

    known = packaged_clip()
    return CLIPTokenizer(vocab=dict(known.vocab), merges=list(known.merges), pad_token=pad, model_max_length=77)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What both kinds share. CLIP-L's projection is the identity, as in every published checkpoint."""
    from transformers import T5TokenizerFast

    made = {name: tiny_clip(seed=i, projected=True, width=WIDTHS[i], eos_token_id=2) for i, name in enumerate(CLIPS)}
    made["text_encoder"].text_projection.weight.data.copy_(torch.eye(WIDTHS[0]))
    return {**made, "text_encoder_3": tiny_t5(width=JOINT, seed=2), "tokenizer": clip_tokenizer("<|endoftext|>"), "tokenizer_2": clip_tokenizer("!"),
            "tokenizer_3": T5TokenizerFast.from_pretrained(tiny_t5_tokenizer(tmp_path_factory.mktemp("t5"))),
            "vae": tiny_vae(channels=16, seed=3, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)}


@pytest.fixture(scope="module")
def stock(parts):
    """(task, kind, encoders that are missing, scheduler) -> the stock pipeline."""
    import diffusers

    nets = {kind: network(**config) for kind, config in KINDS.items()}

    @lru_cache
    def make(task="txt2img", kind="sd3", without=(), scheduler="FlowMatchEulerDiscreteScheduler"):
        missing = {name: None for part in without for name in (part, part.replace("text_encoder", "tokenizer"))}
        theirs = getattr(diffusers, TASKS[task])(transformer=nets[kind], scheduler=getattr(diffusers, scheduler)(shift=3.0), **parts | missing)
        theirs.set_progress_bar_config(disable=True)
        return theirs

    return make


@pytest.fixture(scope="module")
def folders(stock, tmp_path_factory):
    """(kind, encoders that are missing) -> its folder."""
    root = tmp_path_factory.mktemp("sd3")

    @lru_cache
    def make(kind="sd3", without=()):
        place = root / "-".join((kind, *without))
        stock(kind=kind, without=without).save_pretrained(place)
        return place

    return make


@pytest.fixture(scope="module")
def pipes(folders):
    """(kind, encoders that are missing) -> our pipeline."""
    return lru_cache(lambda kind="sd3", without=(): load(folders(kind, without)))


def load(place, **more):
    return latentgen.load(place, dtype="float32", device="cpu", progress=False, **more)


def ours(pipe, prompt=PROMPT, size=SIZES[0], **more):
    """Our result; the size is the picture's where one is given."""
    sides = {} if "image" in more or size is None else {"width": size[0], "height": size[1]}
    said = {"negative_prompt": NEGATIVE, "steps": STEPS, "guidance_scale": SCALE, "seed": 3, **sides} | more
    return pipe.stream(prompt, **{name: value for name, value in said.items() if value is not None}).result


def theirs(pipe, *, batch=1, size=SIZES[0], **more):
    """(final latents, pictures) of a stock pipeline."""
    noise = [torch.Generator("cpu").manual_seed(3 + i) for i in range(batch)]
    said = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": SCALE, "width": size[0], "height": size[1],
            "num_images_per_prompt": batch, "generator": noise if batch > 1 else noise[0]} | more
    with mean_latents(), torch.no_grad():
        latents = pipe(**said, output_type="latent").images
        pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    return latents, pipe.image_processor.postprocess(pixels)


def agree(result, reference):
    """Latents within 1e-4 of their size, pictures within 1/255."""
    latents, pictures = reference
    assert latents.isfinite().all() and latents.std() > 0.1 and result.latents.shape == latents.shape
    assert (result.latents - latents).abs().max() <= 1e-4 * latents.abs().max()
    assert len(result.images) == len(pictures)
    for one, other in zip(result.images, pictures, strict=True):
        a, b = (np.asarray(i, dtype=np.int16) for i in (one, other))
        assert a.shape == b.shape and b.std() > 5 and np.abs(a - b).max() <= 1


def apart(one, other):
    """The largest difference of a pixel, as a share of the range."""
    return max(np.abs(np.asarray(a, dtype=np.int16) - np.asarray(b, dtype=np.int16)).max() / 255
               for a, b in zip(one.images, other.images, strict=True))


def photo(width=64, height=64):
    dice = np.random.default_rng(5)
    return Image.fromarray(dice.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def hole(width=64, height=64):
    """A mask along the latents' grid."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (16, 8, 40, height - 16))
    return mask


# --- words


def encoded(pipe, side="prompt", *, clip_skip=1, **said):
    """Our encoding of a planned request's texts."""
    texts = getattr(pipe.plan(**{"request": PROMPT, "negative_prompt": NEGATIVE, "seed": 0} | said), side)
    ids = {name: torch.tensor(chunks.ids) for name, chunks in texts.chunks.items()}
    with pipe.residency.use("text") as modules, torch.no_grad():
        return pipe.family.encode(modules, Words(ids, {}, clip_skip=clip_skip))


@pytest.mark.parity("encoders", "StableDiffusion3Pipeline")
@pytest.mark.parametrize("without", [(), ("text_encoder_3",)], ids=["all", "no-t5"])
@pytest.mark.parametrize("said", [
    {}, {"request": "", "negative_prompt": ""}, {"request": "naïve Ünïcode – 日本語 🙂 don't 2024's"},
    {"prompt_2": SECOND, "negative_prompt_2": "green"}, {"prompt_3": THIRD, "negative_prompt_3": "grey"}], ids=str)
def test_all_encoders_hear_what_they_hear_in_diffusers(pipes, stock, without, said):
    if without and "prompt_3" in said:
        with pytest.raises(RequestError, match="prompt_3 is given but sd3 here has no text encoder that would read it"):
            pipes(without=without).plan(PROMPT, prompt_3=THIRD)
        return
    named = {"prompt": said.get("request", PROMPT), "prompt_2": None, "prompt_3": None, "negative_prompt": NEGATIVE} | said
    named.pop("request", None)
    with torch.no_grad():
        expected = stock(without=without).encode_prompt(**named)
    for at, side in enumerate(("prompt", "negative")):
        heard = encoded(pipes(without=without), side, **said)
        assert heard.tokens.shape == (1, 77 + 256, JOINT) and heard.pooled.shape == (1, sum(WIDTHS))
        torch.testing.assert_close(heard.tokens, expected[at], rtol=0, atol=1e-5)
        torch.testing.assert_close(heard.pooled, expected[2 + at], rtol=0, atol=1e-5)


def test_clip_skip_reads_an_earlier_layer(pipes, stock):
    expected = stock().encode_prompt(prompt=PROMPT, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, clip_skip=1)
    heard = encoded(pipes(), clip_skip=2)
    torch.testing.assert_close(heard.tokens, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(heard.pooled, expected[2], rtol=0, atol=1e-5)
    assert (heard.tokens - encoded(pipes()).tokens)[:, :77].abs().max() > 0.1
    with pytest.raises(RequestError, match="clip_skip is 3 but sd3 here has layers for 1 to 2"):
        pipes().plan(PROMPT, clip_skip=3)


def test_a_long_prompt_is_read_in_chunks_by_both_clips(pipes, parts, stock):
    """Pooled is that of the first chunk; the other side of guidance is as long."""
    long = ", ".join([PROMPT, SECOND] * 9)
    plans = pipes().plan(long, negative_prompt=NEGATIVE)
    states = []
    for text in (plans.prompt, plans.negative):
        chunks = {name: torch.tensor(read.ids) for name, read in text.chunks.items()}
        assert {name: len(ids) for name, ids in chunks.items()} == {"tokenizer": 2, "tokenizer_2": 2, "tokenizer_3": 1}
        with torch.no_grad():
            clips = [parts[f"text_encoder{n}"](chunks[f"tokenizer{n}"], output_hidden_states=True) for n in ("", "_2")]
            tail = parts["text_encoder_3"](chunks["tokenizer_3"]).last_hidden_state
        head = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1).reshape(1, 154, sum(WIDTHS))
        head = torch.nn.functional.pad(head, (0, JOINT - sum(WIDTHS)))
        states.append((torch.cat([head, tail], dim=1), torch.cat([clip.text_embeds[:1] for clip in clips], dim=-1)))
    agree(ours(pipes(), long), theirs(stock(), **given(states)))


def given(states):
    """((tokens, pooled) of the prompt, and of the negative one) as a stock pipeline takes them."""
    (tokens, pooled), (negative, negative_pooled) = states
    return {"prompt": None, "negative_prompt": None, "prompt_embeds": tokens, "pooled_prompt_embeds": pooled, "negative_prompt_embeds": negative,
            "negative_pooled_prompt_embeds": negative_pooled}


@pytest.mark.parametrize("without", [("text_encoder",), ("text_encoder_2",), CLIPS, ("text_encoder_2", "text_encoder_3")], ids="-".join)
def test_an_encoder_that_is_missing_counts_as_zeros(pipes, stock, without):
    """The stock pipeline wants both CLIPs; it is given their states with those of the missing ones made zero."""
    with torch.no_grad():
        heard = stock().encode_prompt(prompt=PROMPT, prompt_2=None, prompt_3=None, negative_prompt=NEGATIVE)
    places = {"text_encoder": slice(0, WIDTHS[0]), "text_encoder_2": slice(WIDTHS[0], sum(WIDTHS))}
    for tokens, pooled in (heard[::2], heard[1::2]):
        for part in without:
            if part in places:
                tokens[:, :77, places[part]], pooled[:, places[part]] = 0, 0
            else:
                tokens[:, 77:] = 0
    pipe = pipes(without=without)
    assert {part.name for part in pipe.family.parts if part.stages == ("text",)} == {*CLIPS, "text_encoder_3"} - {*without}
    agree(ours(pipe), theirs(stock(), **given((heard[::2], heard[1::2]))))


def test_other_words_reach_the_encoder_that_they_are_for(pipes):
    """Also where the first encoder is missing, and the second one reads the prompt itself."""
    pipe = pipes(without=("text_encoder",))
    plan = pipe.plan(PROMPT, prompt_3=THIRD)
    assert {name: chunks.text for name, chunks in plan.prompt.chunks.items()} == {"tokenizer_2": PROMPT, "tokenizer_3": THIRD}
    with pytest.raises(RequestError, match="prompt_2 is given"):
        pipe.plan(PROMPT, prompt_2=SECOND)
    with pytest.raises(RequestError, match="clip_skip is 2"):
        pipes(without=CLIPS).plan(PROMPT, clip_skip=2)


# --- pictures


@pytest.mark.parity("txt2img", "StableDiffusion3Pipeline")
@each_kind
@each_size
def test_txt2img(pipes, stock, kind, size):
    agree(ours(pipes(kind), size=size), theirs(stock(kind=kind), size=size))


@pytest.mark.parametrize("said", [
    {"guidance_scale": 1.0, "negative_prompt": None}, {"negative_prompt": None}, {"prompt_2": SECOND, "prompt_3": THIRD},
    {"negative_prompt_2": SECOND, "negative_prompt_3": THIRD}], ids=lambda said: "-".join(said))
def test_txt2img_with(pipes, stock, said):
    agree(ours(pipes(), **said), theirs(stock(), **said))


def test_without_t5(pipes, stock, folders):
    without = ("text_encoder_3",)
    assert json.loads((folders(without=without) / "model_index.json").read_text("utf-8"))["text_encoder_3"] == [None, None]
    agree(ours(pipes(without=without)), theirs(stock(without=without)))


def test_a_batch_is_its_seeds(pipes, stock):
    agree(ours(pipes("sd35"), batch=2, size=SIZES[1]), theirs(stock(kind="sd35"), batch=2, size=SIZES[1]))


def test_heun_where_the_scheduler_says_so(stock, tmp_path):
    """diffusers counts its evaluations apart; the levels and the last x are the same."""
    heun = stock(scheduler="FlowMatchHeunDiscreteScheduler")
    heun.save_pretrained(tmp_path)
    assert load(tmp_path).plan(PROMPT).sampler == "heun"
    agree(ours(load(tmp_path)), theirs(heun))


@pytest.mark.parity("img2img", "StableDiffusion3Img2ImgPipeline")
@each_size
@pytest.mark.parametrize("strength", [0.5, 0.75])
def test_img2img(pipes, stock, size, strength):
    said = {"image": photo(*size), "strength": strength}
    agree(ours(pipes(), **said), theirs(stock("img2img"), size=size, **said))


@pytest.mark.parity("inpaint", "StableDiffusion3InpaintPipeline")
@each_size
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpaint(pipes, stock, size, strength):
    said = {"image": photo(*size), "strength": strength}
    latents, pictures = theirs(stock("inpaint"), size=size, mask_image=hole(*size), **said)
    agree(ours(pipes(), mask=hole(*size), **said), (latents, [Image.composite(pictures[0], photo(*size), hole(*size))]))


def test_edits_of_a_batch_without_guidance(pipes, stock):
    """The stock img2img wants as many pictures as generators."""
    said = {"image": photo(), "strength": 0.75, "guidance_scale": 1.0, "negative_prompt": None, "batch": 2}
    agree(ours(pipes("sd35"), **said), theirs(stock("img2img", "sd35"), **said | {"image": [photo(), photo()]}))
    latents, pictures = theirs(stock("inpaint", "sd35"), mask_image=hole(), **said)
    agree(ours(pipes("sd35"), mask=hole(), **said), (latents, [Image.composite(picture, photo(), hole()) for picture in pictures]))


def test_outpaint_keeps_what_was_there(pipes):
    result = ours(pipes(), image=photo(), left=16, right=16)
    assert result.image.size == (96, 64)
    assert result.image.crop((16, 0, 80, 64)).tobytes() == photo().tobytes()


@pytest.mark.parametrize("said", [
    {"prompt": "a green tree"}, {"negative_prompt": "sharp"}, {"prompt_2": SECOND}, {"prompt_3": SECOND},
    {"prompt": SECOND, "prompt_2": PROMPT, "prompt_3": PROMPT}, {"negative_prompt_2": SECOND}, {"negative_prompt_3": SECOND}, {"clip_skip": 2},
    {"shift": 1.0}], ids=lambda said: "-".join(said))
def test_everything_said_is_heard(pipes, said):
    """By the network with norms and a second attention too, which in this size hardly minds T5 and clip_skip."""
    for kind in ("sd3", "sd35") if {"prompt", "negative_prompt"} & said.keys() else ("sd3",):
        assert apart(ours(pipes(kind)), ours(pipes(kind), **said)) >= 0.1


def test_one_file_is_its_folder(pipes, stock, folders, tmp_path):
    """The makers' layout, with all encoders and the VAE inside: not a weight differs. (Where they lie in memory decides how sums are ordered.)"""
    modules = {name: stock(kind="sd35").components[name] for name in ("transformer", "vae", *CLIPS, "text_encoder_3")}
    configs = {name: m.config if name in ("transformer", "vae") else m.config.to_dict() for name, m in modules.items()}
    tensors = single_file("sd3", {name: m.state_dict() for name, m in modules.items()}, configs)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "one.safetensors")
    pipe, whole = load(tmp_path / "one.safetensors", config=folders("sd35")), pipes("sd35")
    for stage in ("text", "denoiser", "decoder"):
        with pipe.residency.use(stage) as one, whole.residency.use(stage) as other:
            assert one.keys() == other.keys()
            for got, wanted in ((module.state_dict(), other[name].state_dict()) for name, module in one.items()):
                assert got.keys() == wanted.keys() and all(torch.equal(tensor, wanted[key]) for key, tensor in got.items())
    agree(ours(pipe), (ours(whole).latents, ours(whole).images))


def test_half_precision_networks(folders, pipes):
    half = ours(latentgen.load(folders(), dtype="bfloat16", device="cpu", progress=False))
    difference = np.asarray(half.image, dtype=np.int16) - np.asarray(ours(pipes()).image, dtype=np.int16)
    assert half.latents.dtype == torch.float32 and np.abs(difference).mean() < 8


# --- what it is, and what it refuses


@pytest.mark.parametrize("file", sorted(HEADERS.glob("*.json.gz")), ids=lambda file: file.name.removesuffix(".json.gz"))
def test_signatures_fit_the_published_networks_and_no_other(file):
    shapes = {name: tuple(shape) for name, (_, shape) in json.loads(gzip.decompress(file.read_bytes()))["tensors"].items()}
    variant, _, layout = file.name.removesuffix(".json.gz").partition(".")
    found = identify(shapes)
    if variant.startswith("sd3"):
        assert (found.family, found.variant, found.layout) == ("sd3", variant, layout or "original")
    else:
        assert found is None or found.family != "sd3"


@pytest.mark.parametrize(("variant", "longest"), [("sd3-medium", 3072), ("sd35-medium", 6144), ("sd35-large", 3072)])
def test_published_configs(variant, longest):
    known = published(variant)
    family = sd3.build(Model(variant, {**known["parts"], "scheduler": known["scheduler"], "model_index": known["index"]}))
    own = {"steps", "guidance_scale"}  # the published ones are laid over the family's
    assert vars(family.defaults).items() >= {(key, value) for key, value in known["defaults"].items() if key not in own}
    assert (len(family.parts), family.prediction, family.guidance, family.task, family.clip_skip) == (5, "flow", "cfg", "any", 11)
    assert {name: spec.length for name, spec in family.tokenizers.items()} == {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 256}
    assert (family.latent.shape(1024, 512), family.latent.scale, family.latent.shift) == ((16, 64, 128), 1.5305, 0.0609)
    assert family.latent.shape(longest, 64)
    with pytest.raises(RequestError, match=f"height is {longest + 16}: this model has places for {longest} pixels"):
        family.latent.shape(64, longest + 16)


@each_kind
def test_skip_layer_guidance_is_that_of_diffusers(pipes, stock, kind):
    slg = {"layers": 0, "scale": 2.0, "start": 0.1, "end": 0.7}
    result = ours(pipes(kind), guiders={"slg": slg})
    assert result.plan.guiders["slg"]["layers"] == ["transformer_blocks.0"] and result.plan.evaluations == 2 * STEPS + 2
    agree(result, theirs(stock(kind=kind), skip_guidance_layers=[0], skip_layer_guidance_scale=2.0, skip_layer_guidance_start=0.1, skip_layer_guidance_stop=0.7))


@pytest.mark.parametrize(("asked", "named"), [
    ({"reference": "photo"}, "reference"), ({"true_cfg_scale": 2.0}, "true_cfg_scale"), ({"width": 72}, "width is 72"),
    ({"width": 208, "height": 64}, "width is 208: this model has places for 192"), ({"image": "photo"}, "width is 208"),
    ({"guidance_scale": 1.0, "negative_prompt": "x"}, "negative_prompt"), ({"original_size": (64, 64)}, "original_size"),
    ({"image_guidance_scale": 2.0}, "image_guidance_scale")], ids=str)
def test_what_it_cannot_do_is_refused_by_name(pipes, asked, named):
    with pytest.raises(RequestError, match=named):
        pipes().plan(PROMPT, **{name: photo(208, 64) if value == "photo" else value for name, value in asked.items()})


@pytest.mark.parametrize(("part", "config", "named"), [
    ("text_encoder", {"projection_dim": 1280}, "text_encoder of width 1280 and text_encoder_2 of width 1280: expected CLIP-L of 768"),
    ("text_encoder_3", {"d_model": 2048}, "width 2048 and the transformer takes 4096: expected T5-XXL"),
    ("vae", {"latent_channels": 4}, "takes 16 channels and the VAE gives 4"), ("transformer", {"in_channels": 33}, "takes 33 channels"),
    ("transformer", {"patch_size": "two"}, "sets patch_size to 'two'"), ("scheduler", {"use_dynamic_shifting": True}, "sets use_dynamic_shifting"),
    ("scheduler", {"_class_name": "DDIMScheduler"}, "is of 'DDIMScheduler'"), ("scheduler", {"shift": "3"}, "sets shift to '3'")], ids=str)
def test_parts_of_another_model_are_refused(part, config, named):
    known = published("sd3-medium")
    configs = {**known["parts"], "scheduler": known["scheduler"], "model_index": {}}
    with pytest.raises(ModelError, match=named):
        sd3.build(Model("", configs | {part: configs[part] | config}))


def test_at_least_one_text_encoder_is_needed():
    with pytest.raises(ModelError, match="there is no text encoder"):
        sd3.build(Model("", {name: published("sd3-medium")["parts"][name] for name in ("transformer", "vae")}))
