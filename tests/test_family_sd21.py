"""sd21 against the stock pipelines: epsilon, v and zero-terminal-SNR tables, "!" as padding, 9-channel inpainting and the depth model.

What sd21 shares with sd15 (samplers, sizes, clip skip, long prompts, scheduler configs) is shown in test_family_sd15.py. In a folder of this size
no tensor tells SD 2 from SD 1, so a card names the family. By design a "!" in a prompt is a word.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from latentgen.errors import ModelError, RequestError
from latentgen.models.family import Model, Scene
from latentgen.pipelines import sd15, sd21
from test_family_sd15 import (NOISE, PROMPT, SCALE, STEPS, agree, both, box, fitting, make_folder, names_and_shapes, opened, photo, states_of, stock,
                              tiny_unet)
from tiny import tiny_clip

ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def checkpoint(place, kind="StableDiffusionPipeline", channels=4, **scheduler):
    """A tiny SD 2: tokens projected, heads by size, OpenCLIP's activation, padded with "!"."""
    folder = place / "tiny"
    unet = tiny_unet(channels, width=48, use_linear_projection=True)
    parts = make_folder(folder, kind, unet, tiny_clip(width=48, hidden_act="gelu"), pad="!", **scheduler)
    (folder / "card.toml").write_text('name = "tiny"\nfamily = "sd21"\n')
    return parts, opened(folder)


@pytest.fixture(scope="module")
def with_v(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("sd21-v"), prediction_type="v_prediction")


@pytest.mark.parity("encoders", "StableDiffusionPipeline")
def test_words_are_padded_with_an_exclamation_mark(with_v):
    parts, pipe = with_v
    ids = pipe.plan(PROMPT, seed=0).prompt.ids[0]
    assert ids[-1] == 0 and ids.count(49407) == 1
    theirs = stock(parts)
    for text in (PROMPT, "", "Two dogs, 2024's"):
        torch.testing.assert_close(states_of(pipe, text), theirs.encode_prompt(text, "cpu", 1, False)[0], rtol=0, atol=1e-5)


def test_an_exclamation_mark_in_a_prompt_is_a_word(with_v):
    """As OpenCLIP, which trained the encoder, reads it; transformers takes it for padding, so there we differ by design."""
    parts, pipe = with_v
    assert pipe.plan("Two dogs!", seed=0).prompt.ids[0][3:5] == (256, 49407)
    assert parts["tokenizer"]("Two dogs!").input_ids[3:] == [0, 49407]


@pytest.mark.parity("txt2img", "StableDiffusionPipeline (v)")
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_v_prediction(with_v, sampler):
    parts, pipe = with_v
    assert pipe.family.name == "sd21" and pipe.family.prediction == "v"
    agree(*both(stock(parts, sampler, prediction_type="v_prediction"), pipe, sampler, height=64, width=96))


@pytest.mark.parity("inpaint", "StableDiffusionInpaintPipeline")
@pytest.mark.parity("img2img", "StableDiffusionImg2ImgPipeline")
def test_v_prediction_redraws_and_repaints(with_v):
    parts, pipe = with_v
    again = stock(parts, "ddim", "StableDiffusionImg2ImgPipeline", prediction_type="v_prediction")
    agree(*both(again, pipe, image=photo(), strength=0.75))
    paint = stock(parts, "ddim", "StableDiffusionInpaintPipeline", prediction_type="v_prediction")
    latents, image, reference, made = both(paint, pipe, ours={"mask": box()}, stock={"mask_image": box()}, image=photo(), strength=0.75,
                                           height=64, width=64)
    agree(latents, image, reference, Image.composite(made, photo(), box()))


@pytest.mark.parity("txt2img", "StableDiffusionPipeline (epsilon)")
@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_epsilon(tmp_path, scale):
    parts, pipe = checkpoint(tmp_path)
    agree(*both(stock(parts, "euler"), pipe, "euler", scale=scale, height=64, width=64))


def test_zero_terminal_snr(tmp_path):
    """Started at pure noise: their DDIM is the one stock scheduler whose last level is exactly that."""
    parts, pipe = checkpoint(tmp_path, prediction_type="v_prediction", **ZERO)
    assert pipe.family.defaults.spacing == "trailing" and pipe.family.path.at(1.0).alpha == 0
    theirs = stock(parts, "ddim", prediction_type="v_prediction", **ZERO)
    agree(*both(theirs, pipe, "ddim", ours={"spacing": "trailing"}, height=64, width=64))


def test_words_change_the_picture(with_v):
    _, pipe = with_v
    made = [np.asarray(pipe.txt2img(p, negative_prompt=n, guidance_scale=SCALE, steps=STEPS, seed=3).image, dtype=np.int16)
            for p, n in ((PROMPT, "blue car"), ("a green tree", "blue car"), (PROMPT, "yellow dog"))]
    assert min(np.abs(made[0] - other).max() for other in made[1:]) >= 26


@pytest.mark.parity("inpaint", "StableDiffusionInpaintPipeline (9 channels)")
def test_nine_channels(tmp_path):
    parts, pipe = checkpoint(tmp_path, "StableDiffusionInpaintPipeline", 9)
    mask = box(area=(13, 5, 50, 61))
    theirs = stock(parts, "ddim", "StableDiffusionInpaintPipeline")
    latents, image, reference, made = both(theirs, pipe, ours={"mask": mask}, stock={"mask_image": mask}, image=photo(), strength=0.75,
                                           height=64, width=64)
    agree(latents, image, reference, Image.composite(made, photo(), mask))


@pytest.mark.parity("edit", "StableDiffusionDepth2ImgPipeline")
def test_depth(tmp_path):
    """A picture redrawn under a depth map, which is given as the reference."""
    parts, pipe = checkpoint(tmp_path, "StableDiffusionDepth2ImgPipeline", 5)
    depth = Image.fromarray(np.add.outer(np.arange(64), np.arange(64) * 2).astype(np.uint8))
    theirs = stock(parts | {"depth_estimator": None, "feature_extractor": None}, "ddim", "StableDiffusionDepth2ImgPipeline")
    given = torch.from_numpy(np.asarray(depth, dtype=np.float32) / 255)[None]
    agree(*both(theirs, pipe, ours={"reference": depth}, stock={"depth_map": given}, image=photo(), strength=0.75))
    with pytest.raises(RequestError, match="the reference is 96x64 but the picture will be 64x64, of another shape"):
        pipe.plan("a cat", image=photo(), reference=Image.new("L", (96, 64)))


def test_a_flat_depth_map_is_far_away_everywhere():
    family = sd21.build(Model("", {"unet": {"in_channels": 5}, "scheduler": NOISE}))
    seen = family.inputs(Scene(64, 64, (4, 8, 8), lambda x: x, references=(torch.zeros(1, 3, 64, 64),)), "positive")["beside"]
    assert seen.shape == (1, 1, 8, 8) and seen.unique().tolist() == [-1]


def test_without_a_scheduler_config_nothing_is_guessed():
    with pytest.raises(ModelError, match="epsilon or v"):
        sd21.build(Model("sd21-v", {"unet": {}}))
    with pytest.raises(ModelError, match="8 channels: sd21 can run 4, 5, 9"):
        sd21.build(Model("", {"unet": {"in_channels": 8}, "scheduler": NOISE}))


@pytest.mark.parametrize(("variant", "known"), [("sd21", ["sd21-v", "sd21"]), ("sd21-v", ["sd21-v", "sd21"]), ("sd21-inpaint", ["sd21-inpaint"])])
def test_published_networks_are_known_by_their_tensors(variant, known):
    """Epsilon and v have the same tensors: both signatures fit, and the first is the 768 model."""
    tensors = names_and_shapes(variant)
    assert fitting(tensors, sd21.SIGNATURES) == known and fitting(tensors, sd15.SIGNATURES) == []
