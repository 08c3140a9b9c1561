"""Tiny random checkpoints made on the spot: the tests need neither the network nor glyph's trained weights (a few use them where shipped)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from latentgen.train.text import CONTEXT, VOCABULARY, train_tokenizer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a GPU is skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def make_tiny(folder: Path, *, name: str = "tiny") -> Path:
    """A checkpoint of glyph's architecture, random, 0.3 M parameters, in `folder`."""
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    train_tokenizer(["a red heart", "blue car, flat", "green tree", "cat", "dog"], folder / "tokenizer")
    text = CLIPTextModel(CLIPTextConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                        max_position_embeddings=CONTEXT, hidden_act="gelu", eos_token_id=VOCABULARY - 1, bos_token_id=VOCABULARY - 2))
    unet = UNet2DConditionModel(sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=16, attention_head_dim=8,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1))
    text.save_pretrained(folder / "text_encoder")
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    rows = "[[0.1, 0.2, 0.3], [0.3, 0.1, 0.0], [0.0, 0.2, 0.1], [0.1, 0.0, 0.1], [0.0, 0.0, 0.0]]"
    (folder / "card.toml").write_text(f'name = "{name}"\nfamily = "glyph"\nsummary = "random"\npreview = {rows}\n[defaults]\nwidth = 64\nheight = 64\nsteps = 4\n')
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def pipe(tiny_folder: Path):  # noqa: ANN201
    import latentgen

    return latentgen.load(tiny_folder, dtype="float32", device="cpu", progress=False)
