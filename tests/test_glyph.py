"""The shipped model: complete, small, loadable by stock classes, and it draws what it is told."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import latentgen

FOLDER = Path(str(resources.files("latentgen.weights"))) / "glyph"


@pytest.fixture(scope="module")
def glyph() -> latentgen.Pipeline:
    return latentgen.load("glyph", device="cpu", progress=False)


def test_is_small_and_complete() -> None:
    weights = [p for p in FOLDER.rglob("*.safetensors")]
    assert sum(p.stat().st_size for p in weights) < 80e6
    assert {p.parent.name for p in weights} == {"text_encoder", "vision_tower", "unet", "vae"}
    for name in ("card.toml", "README.md", "held-out.json", "model_index.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"):
        assert (FOLDER / name).is_file(), name


def test_stock_classes_load_every_part() -> None:
    from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

    assert UNet2DConditionModel.from_pretrained(FOLDER / "unet").config.cross_attention_dim == CLIPTextModel.from_pretrained(FOLDER / "text_encoder").config.hidden_size
    assert AutoencoderTiny.from_pretrained(FOLDER / "vae").config.latent_channels == 4
    assert CLIPVisionModelWithProjection.from_pretrained(FOLDER / "vision_tower").config.image_size == 96
    assert CLIPTokenizer.from_pretrained(FOLDER / "tokenizer").model_max_length == 32
    assert DPMSolverMultistepScheduler.from_pretrained(FOLDER / "scheduler").config.prediction_type == "v_prediction"


def test_512_pixels_are_64_latents(glyph: latentgen.Pipeline) -> None:
    assert glyph.family.latent.shape(512, 512) == (4, 64, 64)


def _ink(image: Image.Image) -> np.ndarray:
    rgb = np.asarray(image).astype(int)
    return rgb[(rgb.min(-1) < 200)].mean(0)


def test_draws_colours_on_white(glyph: latentgen.Pipeline) -> None:
    red = glyph.txt2img("red heart, flat", seed=1, steps=12).image
    blue = glyph.txt2img("blue car, flat", seed=1, steps=12).image
    for image in (red, blue):
        rim = np.concatenate([np.asarray(image)[:4].reshape(-1, 3), np.asarray(image)[-4:].reshape(-1, 3)])
        assert np.median(rim) > 240
    assert _ink(red)[0] > _ink(red)[2] + 60, "a red heart is red"
    assert _ink(blue)[2] > _ink(blue)[0], "a blue car is blue"


def test_reconstructs_its_own_picture(glyph: latentgen.Pipeline) -> None:
    image = glyph.txt2img("red heart, flat", seed=1, steps=12).image
    mask = Image.new("L", image.size, 0)
    assert glyph.inpaint("x", image, mask, steps=1).image.tobytes() == image.tobytes()


def test_same_request_same_picture_in_a_new_process(glyph: latentgen.Pipeline, tmp_path: Path) -> None:
    here = glyph.txt2img("red heart, flat", seed=7, steps=4, width=128, height=128)
    done = subprocess.run([sys.executable, "-m", "latentgen", "txt2img", "red heart, flat", "--seed", "7", "--steps", "4", "--width", "128", "--height", "128",
                           "--device", "cpu", "-o", str(tmp_path / "a.png")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "a.png") as there:
        assert there.tobytes() == here.image.tobytes()
        assert json.loads(there.text["latentgen"])["weights"] == here.recipe["weights"]


def test_held_out_list_is_the_projects_own() -> None:
    raw = json.loads((FOLDER / "held-out.json").read_text())
    assert {k: len(v) for k, v in raw.items() if k in ("comp", "tone", "style", "concept", "recolor_heldout")} == {
        "comp": 358, "tone": 341, "style": 353, "concept": 393, "recolor_heldout": 425}
