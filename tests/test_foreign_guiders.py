"""Guidance in the words of A1111's extensions and ComfyUI's nodes, and ours in theirs."""

import json

import pytest

from latentgen.run.foreign.comfy import from_prompt
from latentgen.run.foreign.read import from_parameters
from latentgen.run.parameters import read_parameters, write_parameters
from latentgen.run.recipe import read_recipe

LINE = "Steps: 20, Sampler: Euler, Schedule type: Normal, CFG scale: 7, Size: 512x512, RNG: CPU"


def graph(node, inputs, *, sampler="euler", cfg=7.0):
    """A small run with one node between checkpoint and sampler."""
    return {"1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "it.safetensors"}},
            "2": {"class_type": node, "inputs": {"model": ["1", 0], **inputs}},
            "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox", "clip": ["1", 1]}},
            "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "dark", "clip": ["1", 1]}},
            "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512, "batch_size": 1}},
            "6": {"class_type": "KSampler", "inputs": {"model": ["2", 0], "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0], "seed": 1,
                                                       "steps": 20, "cfg": cfg, "sampler_name": sampler, "scheduler": "normal", "denoise": 1.0}},
            "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0]}}}


@pytest.mark.parametrize("node, inputs, guiders, notes", [
    ("PerturbedAttentionGuidance", {"scale": 3.0}, {"pag": {"scale": 3.0}}, 0),
    ("APG", {"eta": 0.5, "norm_threshold": 5.0, "momentum": -0.25}, {"apg": {"eta": 0.5, "norm_threshold": 5.0, "momentum": -0.25}}, 0),
    ("CFGZeroStar", {}, {"cfg_zero": {"zero_steps": 0}}, 0),
    ("SkipLayerGuidanceDiT", {"double_layers": "7, 8", "single_layers": "3,4", "scale": 3.0, "start_percent": 0.01, "end_percent": 0.15, "rescaling_scale": 0},
     {"slg": {"layers": [7, 8, "single_transformer_blocks.3", "single_transformer_blocks.4"], "scale": 3.0, "start": 0.01, "end": 0.15}}, 1),
    ("DynamicThresholdingSimple", {"mimic_scale": 7.0, "threshold_percentile": 0.99}, {"mimic": {"scale": 7.0, "percentile": 0.99}}, 0),
    ("DynamicThresholdingFull", {"mimic_scale": 7.0, "threshold_percentile": 1.0, "mimic_mode": "Linear Up", "interpolate_phi": 1},
     {"mimic": {"scale": 7.0, "percentile": 1.0}}, 1),
    ("PerpNeg", {"empty_conditioning": ["4", 0], "neg_scale": 1.5}, {"perp_neg": {"weight": 1.5}}, 0)])
def test_nodes_of_comfyui(node, inputs, guiders, notes):
    found = from_prompt(graph(node, inputs))
    assert found.fields["guiders"] == guiders and found.request().guiders == guiders
    assert sum(node in note for note in found.notes) == notes, found.notes


def test_a_node_with_a_value_that_ours_does_not_take_is_noted():
    found = from_prompt(graph("APG", {"eta": 5.0, "norm_threshold": 5.0, "momentum": 0.0}))
    assert "guiders" not in found.fields and any("was not taken over" in note and "from 0 to 1" in note for note in found.notes)


def test_samplers_that_stand_for_cfg_plus_plus():
    found = from_prompt(graph("APG", {"eta": 0.0, "norm_threshold": 0.0, "momentum": 0.0}, sampler="euler_cfg_pp", cfg=0.8))
    assert found.fields["sampler"] == "euler" and found.fields["guiders"]["cfg_pp"] == {"scale": 0.8} and "guidance_scale" not in found.fields
    high = from_parameters(read_parameters(f"a fox\n{LINE.replace('Sampler: Euler', 'Sampler: Euler CFG++')}"))
    assert "guiders" not in high.fields and any("one of CFG++ with a scale of 7" in note for note in high.notes)


def test_settings_of_a1111s_extensions():
    said = f"{LINE}, Dynamic thresholding enabled: True, Mimic scale: 7, Threshold percentile: 100, Mimic mode: Half Cosine Up, PAG Active: True, PAG Scale: 2.5"
    found = from_parameters(read_parameters(f"a fox\n{said}"))
    assert found.fields["guiders"] == {"mimic": {"scale": 7.0, "percentile": 1.0}, "pag": {"scale": 2.5}}
    assert len(found.notes) == 1 and "Mimic mode Half Cosine Up" in found.notes[0]


def test_ours_in_a1111s_words_and_back(pipe, tmp_path):
    result = pipe.txt2img("a cat", negative_prompt="dog", steps=2, seed=1, guiders={"mimic": {"scale": 2.0, "percentile": 0.9}, "pag": {}, "apg": {}})
    recipe = read_recipe(result.save(tmp_path / "it.png")[0]).data
    text = write_parameters(recipe)
    assert all(said in text for said in ("Dynamic thresholding enabled: True, Mimic scale: 2, Threshold percentile: 90, PAG Active: True, PAG Scale: 3", "Guiders: "))
    found = from_parameters(read_parameters(text))
    assert json.dumps(found.fields["guiders"], sort_keys=True) == json.dumps(recipe["guiders"], sort_keys=True) and not any("PAG" in note for note in found.notes)
