"""sd15 against the stock pipelines: tiny random checkpoints of its three kinds, saved as diffusers folders and run by both sides from the same noise.

By design we take the mean of the VAE's posterior where diffusers draws from it, end every run at the clean level (set_alpha_to_one), and apply
clip_skip to both sides of guidance where diffusers applies it to the prompt alone.
"""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import latentgen
from latentgen.conditioning.vocabulary import packaged_clip
from latentgen.errors import ModelError, RequestError
from latentgen.models.family import Model, Scene, Words
from latentgen.pipelines import sd15
from tiny import lively, mean_latents, tiny_clip, tiny_vae

PROMPT, NEGATIVE = "a red heart, flat", "blue car"
LONG = "a red heart on a green hill under a yellow sun, " * 9
SCALE, STEPS, SIZE = 4.0, 8, (64, 64)  # steps that divide 1000: else the last step of stock DDIM lands elsewhere
NOISE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SAMPLERS = {  # ours -> their class, config and spacing; where a class has its own idea of a spacing, one that it shares with ours
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "leading"}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero", "timestep_spacing": "trailing"}),
}
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def write_tokenizer(folder, *, pad="<|endoftext|>"):
    """CLIP's tokenizer as checkpoints carry it, from the packaged vocabulary."""
    clip = packaged_clip()
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(clip.vocab, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in clip.merges), "utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}), "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), "utf-8")


def tiny_unet(channels=4, *, width=32, **config):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(channels)
    return lively(UNet2DConditionModel(sample_size=8, in_channels=channels, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
                                       cross_attention_dim=width, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                       up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **config))


def make_folder(folder, kind, unet, text, *, pad="<|endoftext|>", **scheduler):
    """A checkpoint in diffusers layout; the stock parts, read back from it."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    unet.save_pretrained(folder / "unet")
    text.save_pretrained(folder / "text_encoder")
    tiny_vae().save_pretrained(folder / "vae")
    write_tokenizer(folder / "tokenizer", pad=pad)
    (folder / "scheduler").mkdir()
    config = {"_class_name": "PNDMScheduler", "prediction_type": "epsilon", **NOISE, **scheduler}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind, "safety_checker": [None, None]}))
    return {"tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder").eval(),
            "unet": UNet2DConditionModel.from_pretrained(folder / "unet").eval(), "vae": AutoencoderKL.from_pretrained(folder / "vae").eval()}


def stock(parts, sampler="ddim", kind="StableDiffusionPipeline", **scheduler):
    import diffusers

    name, config = SAMPLERS[sampler]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = {} if "Depth" in kind else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        theirs = getattr(diffusers, kind)(**parts, scheduler=getattr(diffusers, name)(**NOISE | config | scheduler), **plain)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def both(theirs, pipe, sampler="ddim", *, scale=SCALE, seed=3, ours=None, stock=None, **shared):
    """(our latents, our picture, theirs, theirs) of one request, with words that one side alone understands in `ours` and `stock`."""
    negative = {} if scale == 1 else {"negative_prompt": NEGATIVE}
    result = pipe.stream(PROMPT, guidance_scale=scale, steps=STEPS, sampler=sampler, seed=seed,
                         **negative, **shared, **{"spacing": SAMPLERS[sampler][1]["timestep_spacing"]} | (ours or {})).result
    with mean_latents(), torch.no_grad():
        latents = theirs(PROMPT, guidance_scale=scale, num_inference_steps=STEPS, generator=torch.Generator("cpu").manual_seed(seed),
                         output_type="latent", **negative, **shared, **stock or {}).images
        picture = theirs.image_processor.postprocess(theirs.vae.decode(latents / theirs.vae.config.scaling_factor).sample)[0]
    return result.latents, result.image, latents, picture


def agree(latents, image, reference, picture, *, tolerance=2e-5):
    """Latents within 2e-5 of their largest value, pictures at most one of 255 apart, and neither trivial."""
    assert reference.abs().max() > 0.1 and np.asarray(picture).std() > 1
    torch.testing.assert_close(latents, reference, rtol=0, atol=tolerance * max(1.0, reference.abs().max().item()))
    assert np.abs(np.asarray(image, dtype=np.int16) - np.asarray(picture, dtype=np.int16)).max() <= 1


def photo(width=64, height=64, seed=5):
    dice = np.random.default_rng(seed)
    return Image.fromarray(dice.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def box(size=SIZE, area=(16, 8, 48, 64)):
    mask = Image.new("L", size)
    mask.paste(255, area)
    return mask


def opened(folder):
    return latentgen.load(folder, dtype="float32", device="cpu", progress=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd15") / "plain"
    return make_folder(folder, "StableDiffusionPipeline", tiny_unet(), tiny_clip()), opened(folder)


def states_of(pipe, text, **how):
    planned = pipe.plan(text, seed=0).prompt
    with pipe.residency.use("text") as modules, torch.no_grad():
        return pipe.family.encode(modules, Words({"tokenizer": torch.tensor(planned.ids)}, {}, **how)).tokens


@pytest.mark.parity("encoders", "StableDiffusionPipeline")
def test_words_as_the_stock_pipeline_encodes_them(plain):
    parts, pipe = plain
    theirs = stock(parts)
    for text in (PROMPT, "", "  A   Red\nHEART ", "naïve Ünïcode 2024's"):
        torch.testing.assert_close(states_of(pipe, text), theirs.encode_prompt(text, "cpu", 1, False)[0], rtol=0, atol=1e-5)


def test_clip_skip_is_the_layer_before_and_the_final_norm(plain):
    parts, pipe = plain
    theirs = stock(parts)
    object.__setattr__(theirs.text_encoder, "text_model", theirs.text_encoder)  # which diffusers asks for and transformers 5 no longer has
    skipped = theirs.encode_prompt(PROMPT, "cpu", 1, False, clip_skip=1)[0]
    torch.testing.assert_close(states_of(pipe, PROMPT, clip_skip=2), skipped, rtol=0, atol=1e-5)
    assert (skipped - states_of(pipe, PROMPT)).abs().max() > 0.1
    with torch.no_grad():
        made = theirs(prompt_embeds=skipped, num_inference_steps=STEPS, guidance_scale=1.0, height=64, width=64, output_type="latent",
                      generator=torch.Generator("cpu").manual_seed(3)).images
    ours = pipe.txt2img(PROMPT, clip_skip=2, guidance_scale=1, steps=STEPS, sampler="ddim", seed=3).latents
    torch.testing.assert_close(ours, made, rtol=0, atol=1e-4 * made.abs().max().item())
    with pytest.raises(RequestError, match="clip_skip is 4 but sd15 here has layers for 1 to 3"):
        pipe.plan(PROMPT, clip_skip=4)


def test_a_long_prompt_is_read_whole(plain):
    parts, pipe = plain
    chunks = pipe.plan(LONG, seed=0).prompt.ids
    empty = pipe.plan("", seed=0).prompt.ids[0]
    assert len(chunks) == 2
    encoder, theirs = parts["text_encoder"], stock(parts)
    with torch.no_grad():
        positive, negative = (torch.cat([encoder(torch.tensor([c])).last_hidden_state for c in each], dim=1) for each in (chunks, (empty, empty)))
        made = theirs(prompt_embeds=positive, negative_prompt_embeds=negative, num_inference_steps=STEPS, guidance_scale=SCALE, height=64,
                      width=64, output_type="latent", generator=torch.Generator("cpu").manual_seed(3)).images
    torch.testing.assert_close(states_of(pipe, LONG), positive, rtol=0, atol=1e-5)
    ours = pipe.txt2img(LONG, guidance_scale=SCALE, steps=STEPS, sampler="ddim", seed=3).latents
    torch.testing.assert_close(ours, made, rtol=0, atol=1e-4 * made.abs().max().item())


@pytest.mark.parity("txt2img", "StableDiffusionPipeline")
@pytest.mark.parametrize("scale", [1.0, SCALE])
@each_sampler
def test_txt2img(plain, sampler, scale):
    agree(*both(stock(plain[0], sampler), plain[1], sampler, scale=scale, height=64, width=64))


def test_txt2img_of_another_size(plain):
    agree(*both(stock(plain[0], "euler"), plain[1], "euler", height=72, width=96))


def test_batch_of_two(plain):
    """Picture i of a batch has the noise of seed + i."""
    parts, pipe = plain
    ours = pipe.txt2img(PROMPT, negative_prompt=NEGATIVE, guidance_scale=SCALE, steps=STEPS, sampler="ddim", seed=3, batch=2)
    noise = torch.cat([torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(seed)) for seed in (3, 4)])
    with torch.no_grad():
        theirs = stock(parts)(PROMPT, negative_prompt=NEGATIVE, guidance_scale=SCALE, num_inference_steps=STEPS, latents=noise,
                              num_images_per_prompt=2, height=64, width=64, output_type="latent").images
    assert len(ours.images) == 2 and (theirs[0] - theirs[1]).abs().max() > 0.1
    torch.testing.assert_close(ours.latents, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parity("img2img", "StableDiffusionImg2ImgPipeline")
@pytest.mark.parametrize("strength", [0.45, 1.0])
@each_sampler
def test_img2img(plain, sampler, strength):
    agree(*both(stock(plain[0], sampler, "StableDiffusionImg2ImgPipeline"), plain[1], sampler, image=photo(), strength=strength))


@pytest.mark.parity("inpaint", "StableDiffusionInpaintPipeline")
@each_sampler
def test_inpaint(plain, sampler):
    """With a mask that follows the latent grid; outside it our picture is the source's own bytes."""
    theirs = stock(plain[0], sampler, "StableDiffusionInpaintPipeline")
    latents, image, reference, made = both(theirs, plain[1], sampler, ours={"mask": box()}, stock={"mask_image": box()}, image=photo(), strength=0.75,
                                           height=64, width=64)
    agree(latents, image, reference, Image.composite(made, photo(), box()))


def test_words_change_the_picture(plain):
    _, pipe = plain
    made = [np.asarray(pipe.txt2img(p, negative_prompt=n, guidance_scale=SCALE, steps=STEPS, seed=3).image, dtype=np.int16)
            for p, n in ((PROMPT, NEGATIVE), ("a green tree", NEGATIVE), (PROMPT, "yellow dog"))]
    assert min(np.abs(made[0] - other).max() for other in made[1:]) >= 26


@pytest.fixture(scope="module")
def inpainter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd15") / "inpaint"
    return make_folder(folder, "StableDiffusionInpaintPipeline", tiny_unet(9), tiny_clip()), opened(folder)


@pytest.mark.parity("inpaint", "StableDiffusionInpaintPipeline (9 channels)")
@pytest.mark.parametrize(("sampler", "size", "area", "strength"), [
    ("ddim", SIZE, (16, 8, 48, 64), 0.75), ("euler", SIZE, (13, 5, 50, 61), 1.0), ("dpmpp_2m", (96, 64), (3, 3, 40, 40), 0.5)])
def test_nine_channels(inpainter, sampler, size, area, strength):
    """The network sees mask and picture itself, so any mask is followed as diffusers follows it."""
    parts, pipe = inpainter
    mask = box(size, area)
    theirs = stock(parts, sampler, "StableDiffusionInpaintPipeline")
    latents, image, reference, made = both(theirs, pipe, sampler, ours={"mask": mask}, stock={"mask_image": mask}, image=photo(*size),
                                           strength=strength, height=size[1], width=size[0])
    agree(latents, image, reference, Image.composite(made, photo(*size), mask))


def test_nine_channels_without_a_picture(inpainter):
    """Words alone: everything is to be painted, over grey."""
    parts, pipe = inpainter
    grey, white = torch.zeros(1, 3, 64, 64), Image.new("L", SIZE, 255)
    theirs = stock(parts, "ddim", "StableDiffusionInpaintPipeline")
    with mean_latents(), torch.no_grad():
        made = theirs(PROMPT, negative_prompt=NEGATIVE, image=grey, mask_image=white, guidance_scale=SCALE, num_inference_steps=STEPS, height=64,
                      width=64, generator=torch.Generator("cpu").manual_seed(3), output_type="latent").images
    ours = pipe.txt2img(PROMPT, negative_prompt=NEGATIVE, guidance_scale=SCALE, steps=STEPS, sampler="ddim", seed=3, width=64, height=64).latents
    torch.testing.assert_close(ours, made, rtol=0, atol=1e-4 * made.abs().max().item())


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd15") / "instruct"
    return make_folder(folder, "StableDiffusionInstructPix2PixPipeline", tiny_unet(8), tiny_clip()), opened(folder)


@pytest.mark.parity("edit", "StableDiffusionInstructPix2PixPipeline")
@pytest.mark.parametrize(("sampler", "size", "weight"), [("ddim", SIZE, 1.5), ("euler", (96, 72), 1.2), ("dpmpp_2m", SIZE, 2.0)])
def test_instruct_pix2pix(editor, sampler, size, weight):
    """Three evaluations: words and picture, picture, neither."""
    parts, pipe = editor
    theirs = stock(parts, sampler, "StableDiffusionInstructPix2PixPipeline")
    agree(*both(theirs, pipe, sampler, ours={"reference": photo(*size)}, stock={"image": photo(*size)}, image_guidance_scale=weight))


def test_an_editor_wants_a_picture_of_its_own_shape(editor):
    _, pipe = editor
    assert pipe.family.defaults.image_guidance_scale == 1.5
    with pytest.raises(RequestError, match="reference"):
        pipe.txt2img(PROMPT)
    with pytest.raises(RequestError, match="64x64 but the picture will be 96x64"):
        pipe.plan(PROMPT, reference=photo(), width=96, height=64, steps=2)
    pipe.edit(PROMPT, reference=photo(70, 66), steps=2, seed=0)  # rounded to whole latents


def scene(encode=lambda x: torch.nn.functional.avg_pool2d(x[:, [0, 1, 2, 0]], 8), **said):
    return Scene(64, 64, (4, 8, 8), encode, **said)


def test_what_each_side_of_guidance_sees():
    """A mask cut at 0.5 and read at each latent's first pixel; the reference unscaled, and nothing on the side "none"."""
    nine = sd15.build(Model("", {"unet": {"in_channels": 9}}))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 8:16, 15:24] = 0.5
    mask[..., 32:, 32:] = 0.49
    seen = nine.inputs(scene(image=torch.ones(1, 3, 64, 64), mask=mask), "negative")["beside"]
    assert seen.shape == (1, 5, 8, 8) and seen[0, 0].nonzero().tolist() == [[1, 2]]
    assert seen[0, 1, 1, 2] == 0 and seen[0, 1, 4, 4] == 1
    assert nine.inputs(scene(), "positive")["beside"].flatten(2).amax(2).tolist() == [[1, 0, 0, 0, 0]]
    eight = sd15.build(Model("", {"unet": {"in_channels": 8}, "vae": {"scaling_factor": 0.5}}))
    shown = scene(references=(torch.ones(1, 3, 64, 64),))
    assert eight.inputs(shown, "positive")["beside"].unique().tolist() == [2] and not eight.inputs(shown, "none")["beside"].any()


def test_defaults_are_the_scheduler_configs():
    def of(scheduler, **unet):
        return sd15.build(Model("", {"scheduler": scheduler, "unet": unet}))

    plain = of({**NOISE, "_class_name": "PNDMScheduler"}).defaults
    assert (plain.width, plain.height, plain.spacing, plain.offset, plain.guidance_scale) == (512, 512, "leading", 1, 7.5)
    assert of({}, sample_size=96).defaults.width == 768 and of({}).latent.scale == 0.18215
    euler = of({**NOISE, "_class_name": "EulerDiscreteScheduler"}).defaults
    assert (euler.sampler, euler.spacing, euler.offset) == ("euler", "linspace", 1)  # for a request that asks for "leading"
    zero = of({**NOISE, "_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    assert (zero.prediction, zero.defaults.spacing, zero.path.at(1.0).alpha) == ("v", "trailing", 0.0)
    assert of({**NOISE, "prediction_type": "sample"}).prediction == "x0"
    assert of({**NOISE, "use_karras_sigmas": True}).defaults.spacing == "karras"


@pytest.mark.parametrize(("scheduler", "unet", "said"), [
    ({"beta_schedule": "sqrt"}, {}, "'sqrt'"), ({"trained_betas": [0.1]}, {}, "a table of its own"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, {}, "FlowMatch"),
    ({"prediction_type": "score"}, {}, "'score'"), ({"beta_start": "x"}, {}, "beta_start"),
    ({"num_train_timesteps": 10**9}, {}, "num_train_timesteps"),
    ({"timestep_spacing": "odd"}, {}, "'odd'"), ({**NOISE, "rescale_betas_zero_snr": True}, {}, "rescale_betas_zero_snr"),
    ({}, {"in_channels": 7}, "7 channels"), ({}, {"time_cond_proj_dim": 256}, "latent consistency"),
    ({}, {"addition_embed_type": "text_time"}, "pooled words"),
    ({}, {"sample_size": "64"}, "sample_size"),
])
def test_what_it_cannot_run_is_refused_by_name(scheduler, unet, said):
    with pytest.raises(ModelError, match=said):
        sd15.build(Model("", {"scheduler": scheduler, "unet": unet}))


def names_and_shapes(variant):
    """A published U-Net's tensors, without their data."""
    from diffusers import UNet2DConditionModel

    from latentgen.models.card import published

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(published(variant)["parts"]["unet"])
    return {name: tuple(t.shape) for name, t in unet.state_dict().items()}


def fitting(tensors, signatures, layout="diffusers"):
    return [s.variant for s in signatures if s.layout == layout and not set(s.absent) & tensors.keys()
            and all(name in tensors and tensors[name] == shape for name, shape in s.shapes.items())]


@pytest.mark.parametrize("variant", ["sd15", "sd15-inpaint", "sd15-instruct"])
def test_published_networks_are_known_by_their_tensors(variant):
    tensors = names_and_shapes(variant)
    assert fitting(tensors, sd15.SIGNATURES) == [variant]
    few = {name: shape for name, shape in tensors.items() if "attentions.1" not in name}  # a distilled U-Net with fewer blocks
    assert fitting(few, sd15.SIGNATURES) == []
