"""Stable Diffusion XL against the stock pipelines: tiny random base, refiner and inpainting checkpoints, the same components and noise on both sides.

By design we take the mean of the VAE's posterior where diffusers draws from it; show the kept area of a masked run to the network from the first step
on; apply clip_skip to both sides of guidance where diffusers applies it to the prompt alone; and tell the negative side of guidance what the
prompt's side is told wherever no negative_ value is given (diffusers falls back to a crop of (0, 0) in places).
"""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from layouts import single_file
from tiny import lively, mean_latents, tiny_clip, tiny_vae

import latentgen
from latentgen.conditioning.vocabulary import packaged_clip
from latentgen.errors import ModelError, RequestError
from latentgen.models.card import published
from latentgen.models.family import Model, Scene, Words
from latentgen.pipelines import sdxl

PROMPT, SECOND, NEGATIVE = "a red heart, flat", "oil painting of the sea, don't blur", "blue car"
SCALE, STEPS, SIZE = 4.0, 8, 64
NOISE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = {"euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),  # as published
              "ddim": ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}),
              "dpmpp_2m": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing", "final_sigmas_type": "zero"})}
KINDS = {"txt2img": "StableDiffusionXLPipeline", "img2img": "StableDiffusionXLImg2ImgPipeline", "inpaint": "StableDiffusionXLInpaintPipeline"}
each_sampler = pytest.mark.parametrize("sampler", SCHEDULERS)


def tiny_unet(*, words=64, numbers=6, seed=0, **config):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    own = {"sample_size": SIZE // 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8, "attention_head_dim": (2, 4),
           "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
           "transformer_layers_per_block": (1, 2), "use_linear_projection": True, "cross_attention_dim": words, "addition_embed_type": "text_time",
           "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": numbers * 8 + 32}
    return lively(UNet2DConditionModel(**own | config), seed=seed)


def tokenizer(pad):
    from transformers import CLIPTokenizer

    known = packaged_clip()
    return CLIPTokenizer(vocab=dict(known.vocab), merges=list(known.merges), pad_token=pad, model_max_length=77)


@pytest.fixture(scope="module")
def parts():
    """What base, refiner and inpainting checkpoints share, and their own U-Nets."""
    return {"text_encoder": tiny_clip(seed=1), "text_encoder_2": tiny_clip(seed=2, projected=True),
            "tokenizer": tokenizer("<|endoftext|>"), "tokenizer_2": tokenizer("!"),
            "vae": tiny_vae(seed=3, scaling_factor=0.13025), "base": tiny_unet(), "refiner": tiny_unet(words=32, numbers=5, seed=4),
            "inpaint": tiny_unet(in_channels=9, seed=5), "told": tiny_unet(time_cond_proj_dim=16, seed=6)}


def stock(parts, task="txt2img", sampler="euler", *, unet="base", **config):
    """The stock pipeline of a task with one of the U-Nets."""
    import diffusers

    name, more = SCHEDULERS[sampler]
    scheduler = getattr(diffusers, name)(**NOISE, **more)
    said = {name: parts[name] for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")}
    if unet == "refiner":
        said |= {"text_encoder": None, "tokenizer": None}
        config |= {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(diffusers, KINDS[task])(**said, unet=parts[unet], scheduler=scheduler, add_watermarker=False, **config)
    theirs.set_progress_bar_config(disable=True)
    return theirs


@pytest.fixture(scope="module")
def folders(parts, tmp_path_factory):
    place = tmp_path_factory.mktemp("sdxl")
    for unet, task in {"base": "txt2img", "refiner": "img2img", "inpaint": "inpaint", "told": "txt2img"}.items():
        stock(parts, task, unet=unet).save_pretrained(place / unet)
    return place


@pytest.fixture(scope="module")
def pipes(folders):
    """name of a U-Net -> pipeline."""
    return {name: latentgen.load(folders / name, dtype="float32", device="cpu", progress=False) for name in ("base", "refiner", "inpaint", "told")}


def run(pipe, sampler="euler", prompt=PROMPT, **more):
    """(final latents, pictures) of our pipeline."""
    spacing = SCHEDULERS[sampler][1]["timestep_spacing"]
    said = {"negative_prompt": NEGATIVE, "steps": STEPS, "guidance_scale": SCALE, "sampler": sampler, "spacing": spacing, "seed": 3} | more
    result = pipe.stream(prompt, **{name: value for name, value in said.items() if value is not None}).result
    return result.latents, result.images


def reference(parts, task="txt2img", sampler="euler", *, unet="base", batch=1, **more):
    """(final latents, pictures) of the stock pipeline."""
    theirs = stock(parts, task, sampler, unet=unet)
    noise = [torch.Generator("cpu").manual_seed(3 + i) for i in range(batch)]
    said = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": SCALE, "generator": noise,
            "num_images_per_prompt": batch} | ({} if task == "img2img" else {"width": SIZE, "height": SIZE}) | more
    with mean_latents(), torch.no_grad():
        latents = theirs(**said, output_type="latent").images
        pixels = theirs.vae.decode(latents / theirs.vae.config.scaling_factor).sample  # as its __call__ goes on
    return latents, theirs.image_processor.postprocess(pixels)


def same(latents, expected, *, tolerance=1e-4):
    assert latents.isfinite().all() and latents.shape == expected.shape and expected.std() > 0.1
    torch.testing.assert_close(latents, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def near(images, expected):
    """Pictures at most one of 255 apart, and not flat."""
    assert len(images) == len(expected)
    for ours, theirs in zip(images, expected, strict=True):
        a, b = (np.asarray(i, dtype=np.int16) for i in (ours, theirs))
        assert a.shape == b.shape and b.std() > 5
        assert np.abs(a - b).max() <= 1


def equal(ours, theirs):
    same(ours[0], theirs[0])
    near(ours[1], theirs[1])


def photo(width=SIZE, height=SIZE):
    dice = np.random.default_rng(5)
    return Image.fromarray(dice.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def hole():
    """A mask along the latents' grid."""
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (16, 8, 48, 56))
    return mask


# --- the pieces by themselves


def family(parts, unet="base", **index):
    configs = {name: parts[name].config for name in ("text_encoder", "text_encoder_2") if name != "text_encoder" or unet != "refiner"}
    configs = {name: config.to_dict() for name, config in configs.items()} | {"unet": dict(parts[unet].config), "vae": dict(parts["vae"].config)}
    scheduler = NOISE | SCHEDULERS["euler"][1] | {"_class_name": "EulerDiscreteScheduler"}
    return sdxl.build(Model("", configs | {"scheduler": scheduler, "model_index": index}))


def encoded(parts, prompt, second, *, unet="base", index=None, **more):
    """Our encoding of two texts, with tokens as transformers makes them."""
    texts = {"tokenizer": prompt, "tokenizer_2": second}
    said = {name: parts[name](text, padding="max_length", max_length=77, return_tensors="pt") for name, text in texts.items()}
    words = Words({k: t.input_ids for k, t in said.items()}, {k: t.attention_mask for k, t in said.items()}, **more)
    with torch.no_grad():
        return family(parts, unet, **(index or {})).encode(parts, words)


@pytest.mark.parity("encoders", "StableDiffusionXLPipeline")
@pytest.mark.parametrize("skip", [1, 2])
def test_both_encoders(parts, skip):
    theirs = stock(parts).encode_prompt(prompt=PROMPT, prompt_2=SECOND, do_classifier_free_guidance=False, clip_skip=skip - 1 or None)
    ours = encoded(parts, PROMPT, SECOND, clip_skip=skip)
    torch.testing.assert_close(ours.tokens, theirs[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.pooled, theirs[2], rtol=0, atol=1e-6)


def test_the_refiner_reads_with_its_one_encoder(parts):
    theirs = stock(parts, "img2img", unet="refiner").encode_prompt(prompt=PROMPT, negative_prompt=NEGATIVE)
    for text, states, pooled in ((PROMPT, theirs[0], theirs[2]), (NEGATIVE, theirs[1], theirs[3])):
        ours = encoded(parts, "not read", text, unet="refiner")
        torch.testing.assert_close(ours.tokens, states, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.pooled, pooled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("zeros", [True, False])
def test_what_saying_nothing_means(parts, zeros):
    theirs = stock(parts, force_zeros_for_empty_prompt=zeros).encode_prompt(prompt=PROMPT)
    ours = encoded(parts, "", "", side="negative", empty=True, index={"force_zeros_for_empty_prompt": zeros})
    torch.testing.assert_close(ours.tokens, theirs[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.pooled, theirs[3], rtol=0, atol=1e-6)
    assert bool(ours.tokens.any()) is not zeros


def test_a_long_text_keeps_the_first_chunks_summary(parts):
    names, both = ("tokenizer", "tokenizer_2"), [PROMPT, SECOND]
    ids = {name: parts[name](both, padding="max_length", max_length=77, return_tensors="pt").input_ids for name in names}
    with torch.no_grad():
        both = family(parts).encode(parts, Words(ids, {}))
    one, two = encoded(parts, PROMPT, PROMPT), encoded(parts, SECOND, SECOND)
    torch.testing.assert_close(both.tokens, torch.cat([one.tokens, two.tokens], dim=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(both.pooled, one.pooled, rtol=0, atol=1e-6)


def scene(**options):
    return Scene(96, 64, (4, 8, 12), encode=lambda pixels: pytest.fail("no picture is needed"), options={"guidance_scale": SCALE, **options})


def test_sizes_and_crops_as_told_by_the_stock_pipelines(parts):
    said = {"original_size": (50, 70), "crop_top_left": (3, 9), "target_size": (40, 44)}
    negative = {"negative_original_size": (11, 12), "negative_crop_top_left": (13, 14), "negative_target_size": (15, 16)}
    inputs = family(parts).inputs
    assert inputs(scene(), "positive")["sizes"].tolist() == inputs(scene(), "negative")["sizes"].tolist() == [[64, 96, 0, 0, 64, 96]]
    theirs = stock(parts)._get_add_time_ids((50, 70), (3, 9), (40, 44), torch.float32, text_encoder_projection_dim=32)
    assert inputs(scene(**said), "positive")["sizes"].equal(theirs) and inputs(scene(**said), "negative")["sizes"].equal(theirs)
    theirs = stock(parts)._get_add_time_ids((11, 12), (13, 14), (15, 16), torch.float32, text_encoder_projection_dim=32)
    assert inputs(scene(**said, **negative), "negative")["sizes"].equal(theirs)
    inputs = family(parts, "refiner").inputs
    own = ((64, 96), (0, 0), (64, 96))
    pair = stock(parts, "img2img", unet="refiner")._get_add_time_ids(*own, 6.0, 2.5, *own, torch.float32, 32)
    assert inputs(scene(), "positive")["sizes"].equal(pair[0]) and inputs(scene(), "negative")["sizes"].equal(pair[1])
    assert inputs(scene(aesthetic_score=7.5), "positive")["sizes"].tolist() == [[64, 96, 0, 0, 7.5]]


@pytest.mark.parametrize("config", [{"in_channels": 8}, {"projection_class_embeddings_input_dim": 33}, {"addition_embed_type": None},
                                    {"addition_time_embed_dim": "8"}], ids=str)
def test_a_unet_of_another_kind_is_refused(parts, config):
    with pytest.raises(ModelError, match="expected 4 or 9 channels"):
        sdxl.build(Model("", {"unet": dict(parts["base"].config) | config, "text_encoder_2": parts["text_encoder_2"].config.to_dict()}))


def test_clip_skip_past_the_first_layer_is_refused_while_planning(pipes):
    with pytest.raises(RequestError, match="clip_skip is 3 but sdxl here has layers for 1 to 2: give one of these"):
        pipes["base"].plan(PROMPT, clip_skip=3)
    off, own = (pipes["base"].txt2img(PROMPT, steps=1, seed=1, strict=False, clip_skip=skip) for skip in (3, 1))
    assert any("clip_skip is 3" in note for note in off.notes) and torch.equal(off.latents, own.latents)


@pytest.mark.parametrize(("variant", "task", "encoders", "numbers"), [
    ("sdxl", "any", 2, 6), ("sdxl-refiner", "any", 1, 5), ("sdxl-inpaint", "inpaint", 2, 6)])
def test_published_configs(variant, task, encoders, numbers):
    from diffusers import UNet2DConditionModel

    known = published(variant)
    with torch.device("meta"):
        tensors = UNet2DConditionModel.from_config(known["parts"]["unet"]).state_dict()
    known_by = [s for s in sdxl.SIGNATURES if s.layout == "diffusers"]
    fits = [s.variant for s in known_by if all(k in tensors and tensors[k].shape == v for k, v in s.shapes.items())]
    assert fits == [variant]
    made = sdxl.build(Model(variant, {**known["parts"], "scheduler": known["scheduler"], "model_index": known["index"]}))
    assert (made.task, len(made.tokenizers), len(made.parts), made.prediction, made.guidance) == (task, encoders, encoders + 2, "epsilon", "cfg")
    if task == "any":
        assert made.inputs(scene(), "positive")["sizes"].shape == (1, numbers)
    assert (made.latent.scale, made.latent.factor, made.defaults.width) == (0.13025, 8, 1024)


# --- the whole pipeline


@pytest.mark.parity("txt2img", "StableDiffusionXLPipeline")
@each_sampler
def test_txt2img(pipes, parts, sampler):
    equal(run(pipes["base"], sampler), reference(parts, sampler=sampler))


@pytest.mark.parametrize("said", [
    {"guidance_scale": 1.0, "negative_prompt": None}, {"negative_prompt": None}, {"prompt_2": SECOND},
    {"prompt_2": SECOND, "negative_prompt_2": "green"},
    {"width": 96, "height": 64}, {"width": 80, "height": 88}, {"original_size": (512, 256), "crop_top_left": (32, 8), "target_size": (128, 64)},
    {"original_size": (512, 256), "negative_original_size": (64, 64), "negative_crop_top_left": (5, 7), "negative_target_size": (72, 80)},
], ids=lambda said: "-".join(said))
def test_txt2img_with(pipes, parts, said):
    theirs = {name.replace("crop_top", "crops_coords_top"): value for name, value in said.items()}
    equal(run(pipes["base"], **said), reference(parts, **theirs))


def test_a_long_prompt_in_two_chunks(pipes, parts):
    """Beside silence, which is as long; the second tokenizer pads with "!"."""
    long = ", ".join([PROMPT, SECOND] * 5)
    chunks = {name: torch.tensor(read.ids) for name, read in pipes["base"].plan(long).prompt.chunks.items()}
    assert {name: (len(ids), ids[-1, -1].item()) for name, ids in chunks.items()} == {"tokenizer": (2, 49407), "tokenizer_2": (2, 0)}
    with torch.no_grad():
        one, two = (parts[f"text_encoder{n}"](chunks[f"tokenizer{n}"], output_hidden_states=True) for n in ("", "_2"))
    tokens, pooled = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1).reshape(1, 154, 64), two.text_embeds[:1]
    equal(run(pipes["base"], prompt=long, negative_prompt=None),
          reference(parts, prompt=None, negative_prompt=None, prompt_embeds=tokens, pooled_prompt_embeds=pooled,
                    negative_prompt_embeds=torch.zeros_like(tokens), negative_pooled_prompt_embeds=torch.zeros_like(pooled)))


@pytest.mark.parametrize(("unet", "layout"), [("base", "sdxl"), ("refiner", "sdxl-refiner")])
def test_a_single_file_is_its_folder(folders, pipes, parts, tmp_path, unet, layout):
    from safetensors.torch import save_file

    modules = {"unet": parts[unet], "vae": parts["vae"], "text_encoder": parts["text_encoder"], "text_encoder_2": parts["text_encoder_2"]}
    configs = {name: dict(m.config) if name in ("unet", "vae") else m.config.to_dict() for name, m in modules.items()}
    tensors = single_file(layout, {name: m.state_dict() for name, m in modules.items()}, configs)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, tmp_path / "one.safetensors")
    one = latentgen.load(tmp_path / "one.safetensors", config=folders / unet, dtype="float32", device="cpu", progress=False)
    (latents, images), (expected, pictures) = run(one), run(pipes[unet])
    assert latents.equal(expected) and images[0].tobytes() == pictures[0].tobytes()


def test_half_precision_networks(folders, pipes):
    half = latentgen.load(folders / "base", dtype="bfloat16", device="cpu", progress=False)
    latents, images = run(half)
    assert latents.dtype == torch.float32
    assert np.abs(np.asarray(images[0], dtype=np.int16) - np.asarray(run(pipes["base"])[1][0], dtype=np.int16)).mean() < 8


def test_a_batch(pipes, parts):
    equal(run(pipes["base"], batch=2), reference(parts, batch=2))


@pytest.mark.parity("img2img", "StableDiffusionXLImg2ImgPipeline")
@pytest.mark.parametrize("strength", [0.5, 0.9])
@each_sampler
def test_img2img(pipes, parts, sampler, strength):
    equal(run(pipes["base"], sampler, image=photo(), strength=strength), reference(parts, "img2img", sampler, image=photo(), strength=strength))


@pytest.mark.parity("img2img", "the same with the refiner")
@pytest.mark.parametrize("said", [
    {}, {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0}, {"guidance_scale": 1.0, "negative_prompt": None}, {"negative_prompt": None},
    {"original_size": (512, 256)}], ids=lambda said: "-".join(said) or "plain")
def test_the_refiner_redraws(pipes, parts, said):
    said = {"image": photo(), "strength": 0.5, **said}
    equal(run(pipes["refiner"], **said), reference(parts, "img2img", unet="refiner", **said))


@pytest.mark.parity("inpaint", "StableDiffusionXLInpaintPipeline")
@pytest.mark.parametrize(("unet", "strength"), [("base", 0.5), ("base", 0.9), ("inpaint", 0.5), ("inpaint", 1.0)])
def test_inpaint(pipes, parts, unet, strength):
    """By the wrapper on the base, and by the nine-channel U-Net. (At strength 1 diffusers hides the kept area from a base in the first step.)"""
    latents, images = run(pipes[unet], image=photo(), mask=hole(), strength=strength)
    theirs, pictures = reference(parts, "inpaint", unet=unet, image=photo(), mask_image=hole(), strength=strength)
    same(latents, theirs)
    near(images, [Image.composite(picture, photo(), hole()) for picture in pictures])


def test_the_inpainting_unet_paints_from_nothing(pipes, parts):
    """Without a picture: what the stock pipeline makes of a grey one that is masked everywhere."""
    grey, all_of_it = Image.new("RGB", (SIZE, SIZE), "grey"), Image.new("L", (SIZE, SIZE), 255)
    same(run(pipes["inpaint"])[0], reference(parts, "inpaint", unet="inpaint", image=grey, mask_image=all_of_it, strength=1.0)[0])


@pytest.mark.parity("txt2img", "base and refiner split")
@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_base_and_refiner_share_a_run(pipes, parts, sampler):
    first = pipes["base"].stream(PROMPT, negative_prompt=NEGATIVE, steps=STEPS, guidance_scale=SCALE, sampler=sampler, seed=3,
                                 spacing=SCHEDULERS[sampler][1]["timestep_spacing"], denoising_end=0.6).result
    ours = run(pipes["refiner"], sampler, latents=first.latents, denoising_start=0.6)
    half = reference(parts, sampler=sampler, denoising_end=0.6)[0]
    if sampler == "ddim":  # their Euler keeps its latents in other units, x / alpha
        same(first.latents, half)
    equal(ours, reference(parts, "img2img", sampler, unet="refiner", image=half, denoising_start=0.6))


def test_a_unet_that_is_told_the_guidance_scale(pipes, parts):
    said = {"guidance_scale": 7.5, "negative_prompt": None}
    made = run(pipes["told"], **said)
    equal(made, reference(parts, unet="told", **said))
    assert differ(made[1], run(pipes["told"], **said | {"guidance_scale": 1.5})[1]) > 0.04
    assert pipes["told"].plan(PROMPT).sampler == "lcm"


def differ(images, others):
    """The largest difference of a pixel, as a share of the range."""
    return max(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).max() / 255 for a, b in zip(images, others, strict=True))


@pytest.mark.parametrize(("said", "least"), [
    ({"prompt": "a green tree"}, 0.1), ({"negative_prompt": "sharp"}, 0.1), ({"prompt_2": SECOND}, 0.1), ({"negative_prompt_2": SECOND}, 0.1),
    ({"clip_skip": 2}, 0.05), ({"original_size": (256, 256)}, 0.1), ({"crop_top_left": (256, 256)}, 0.1)], ids=str)
def test_everything_said_is_heard(pipes, said, least):
    assert differ(run(pipes["base"])[1], run(pipes["base"], **said)[1]) >= least


@pytest.mark.parametrize(("unet", "said"), [
    ("base", {"aesthetic_score": 7.0}), ("refiner", {"target_size": (64, 64)}), ("refiner", {"prompt_2": SECOND})], ids=str)
def test_what_a_checkpoint_is_not_told_is_refused(pipes, unet, said):
    with pytest.raises(RequestError, match=next(iter(said))):
        pipes[unet].plan(PROMPT, **said)
