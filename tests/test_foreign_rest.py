"""Every setting of another program's file has an equivalent here or a note: nothing that it says is dropped in silence."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_foreign import BASE, GRAPH, INVOKE, fields, graph, node, noted, settings_line

from latentgen.run.foreign.comfy import from_prompt
from latentgen.run.foreign.invoke import from_invoke, from_old_invoke
from latentgen.run.foreign.read import Foreign, from_diffusers, read_foreign
from latentgen.run.foreign.swarm import from_swarm
from latentgen.run.parameters import write_parameters
from latentgen.run.request import Request

LINE = "Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, RNG: CPU"
MORE = {  # what A1111, Forge and common extensions write beside the usual
    "ENSD": "31337", "Face restoration": "CodeFormer", "FP8 weight": "Enable", "Cache FP16 weight for LoRA": "True", "Conditional mask weight": "0.5",
    "Token merging ratio hr": "0.5", "NGMS": "0.3", "Skip Early CFG": "0.1", "Pad conds v0": "True",
    "Noise Schedule": "Zero Terminal SNR", "Downcast alphas_cumprod": "True", "Old prompt editing timelines": "True", "SGM noise multiplier": "True",
    "Discard penultimate sigma": "True", "Schedule min sigma": "0.1", "Schedule max sigma": "10", "Schedule rho": "5", "Beta schedule alpha": "0.5",
    "DDIM Discretize": "quad", "UniPC skip type": "logSNR", "Noise multiplier": "0.9", "Extra noise": "0.1", "Color correction": "True",
    "Postprocess upscale by": "2", "ADetailer model": "face_yolov8n.pt", "freeu_b1": "1.1", "Diffusion in Low Bits": "nf4",
    "Refiner": "refiner [ab12]", "Refiner switch at": "0.8", "VAE": "x.pt", "Lora hashes": "a: 12", "TI hashes": "b: 34", "TI": "b", "Hypernet": "h",
    "Hypernet strength": "0.5", "VAE Encoder": "TAESD", "Module 1": "ae", "ControlNet 0": "canny", "Script": "X/Y/Z plot", "Dynamic thresholding x": "1"}


@pytest.mark.parametrize("name", MORE)
def test_a_setting_of_a1111_without_an_equivalent_is_noted(name: str) -> None:
    found = settings_line(f"{LINE}, {name}: {MORE[name]}, Version: v1.10.1")
    assert len(found.notes) == 1 and found.notes[0].startswith(f"{name}: {MORE[name]}")


@given(name=st.from_regex(r"\A[A-Z][a-z]{2,12}( [a-z]{2,8})?\Z"), value=st.from_regex(r"\A[a-z0-9.]{1,9}\Z"))
@settings(max_examples=100, deadline=None)
def test_a_setting_nobody_knows_is_noted(name: str, value: str) -> None:
    plain = settings_line(LINE)
    found = settings_line(f"{LINE}, {name}: {value}")
    assert len(found.notes) > len(plain.notes) or found.fields != plain.fields or found.tool != plain.tool or found.model or found.needs \
        or name.endswith("hash") or name in ("User", "Backend", "Pipeline", "Operations", "Parser", "Version", "Hashes", "Eta")


@pytest.mark.parametrize(("said", "prompt", "expected", "words"), [
    ("Original", "a (fox:1.2)", {"weighting": "a1111"}, ()), ("No norm", "a (fox:1.2)", {"weighting": "a1111_no_norm"}, ()),
    ("None", "a (fox:1.2)", {"dialect": "plain"}, ()), ("None", "a (fox:1.2) AND a dog", {}, ("brackets were text there",)),
    ("None", "a fox", {}, ()), ("Ignore", "a fox", {}, ()), ("Ignore", "a (fox:1.2)", {}, ("weights were left out there",)),
    ("Cubic", "a (fox)", {}, ("this rule for weights is not known",))])
def test_emphasis(said: str, prompt: str, expected: dict[str, str], words: tuple[str, ...]) -> None:
    found = settings_line(f"{LINE}, Emphasis: {said}", prompt=prompt)
    fields(found, prompt=prompt, steps=20, sampler="euler", spacing="normal", guidance_scale=7.0, seed=1, **expected)
    assert len(found.notes) == len(words)
    noted(found, *words)


@pytest.mark.parametrize(("said", "text"), [({"dialect": "plain"}, "None"), ({"dialect": "a1111", "weighting": "a1111_no_norm"}, "No norm"),
                                            ({"dialect": "a1111", "weighting": "a1111"}, None)])
def test_our_own_text_says_how_brackets_were_read(said: dict[str, str], text: str | None) -> None:
    recipe = {"prompt": "a (fox:1.2)", "steps": 9, "sampler": "euler", "seed": 1, "guidance_scale": 2.0, **said}
    found = read_foreign({"parameters": write_parameters(recipe)})
    assert found is not None and (f"Emphasis: {text}" in write_parameters(recipe) if text else "Emphasis" not in write_parameters(recipe))
    request = found.request(strict=False)
    assert request.dialect == said["dialect"] and request.weighting == (said.get("weighting") if text == "No norm" else None)
    assert "Emphasis" not in write_parameters(recipe | {"prompt": "a fox"})


def test_settings_of_samplers() -> None:
    found = settings_line("Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, RNG: CPU, Sigma churn: 10, Sigma tmin: 0.1, Sigma noise: 1.01")
    assert found.fields["sampler_options"] == {"s_churn": 10.0, "s_tmin": 0.1, "s_noise": 1.01} and found.notes == ()
    unipc = settings_line("Steps: 20, Sampler: UniPC, CFG scale: 7, Seed: 1, RNG: CPU, UniPC order: 2, UniPC variant: bh2, UniPC skip type: time_uniform")
    assert unipc.fields["sampler_options"] == {"order": 2, "variant": "bh2"}
    noted(unipc, "UniPC skip type")
    noted(settings_line(f"{LINE}, UniPC order: 2, Sigma churn: lots"), "UniPC order: 2 has no equivalent", "Sigma churn: lots")
    noted(settings_line("Steps: 20, Sampler: UniPC, CFG scale: 7, Seed: 1, UniPC order: 99"), "UniPC order: 99")


def test_settings_that_say_what_is_so_here_or_nothing() -> None:
    assert settings_line(f"{LINE}, Pad conds: True, Noise Schedule: Default, User: me, Model hash: 12ab, Version: v1.9").notes == ()
    noted(settings_line(f"{LINE}, Pad conds: False"), "Pad conds: False")
    noted(settings_line("Steps: 20, Sampler: Euler, Size: huge, Seed resize from: -1x-1, RNG: CPU"), "Size 'huge'", "Seed resize from '-1x-1'")


def test_words_and_networks() -> None:
    said = json.dumps([{"type": "checkpoint", "modelVersionId": 1}, {"type": "lora", "weight": 0.8, "modelVersionId": 2, "modelName": "fluffy"}])
    found = settings_line(f'{LINE}, Template: "a {{red|blue}} fox", Negative Template: "x, y", Styles: "flat, blue", Civitai resources: {said}, Tiling: True')
    noted(found, "Template: a {red|blue} fox: the prompt is taken over as it came of that", "Negative Template: x, y", "Styles: flat, blue", "the lora 'fluffy' at 0.8")
    assert found.fields.get("seamless") == "both" or any(note.startswith("Tiling") for note in found.notes)
    assert found.request(strict=False).wildcards is False
    thresholded = settings_line(f"{LINE}, Dynamic thresholding enabled: True, Mimic scale: 7, Threshold percentile: 0.99, CFG mode: Constant")
    assert thresholded.notes == () and thresholded.fields["guiders"] == {"mimic": {"scale": 7.0, "percentile": 0.99}}


SWARM: dict[str, Any] = {"sui_image_params": {
    "prompt": "a fox", "negativeprompt": "dark", "model": "dir/some-model.safetensors", "seed": 305223794, "steps": 25, "cfgscale": 6.5, "aspectratio": "1:1",
    "width": 1024, "height": 768, "sampler": "dpmpp_2m", "scheduler": "karras", "variationseed": 7, "variationseedstrength": 0.2, "nopreviews": True,
    "clipstopatlayer": -2, "vae": "ae.sft", "loras": ["x/fluffy"], "loraweights": ["0.5"], "refinermethod": "PostApply", "swarm_version": "0.9.3.1"},
    "sui_extra_data": {"date": "2025-01-25"}, "sui_models": [{"name": "some-model.safetensors", "param": "model", "hash": "0xd7"}]}


def test_swarm() -> None:
    found = fields(read_foreign({"parameters": json.dumps(SWARM)}), prompt="a fox", negative_prompt="dark", steps=25, guidance_scale=6.5, seed=305223794,
                   width=1024, height=768, sampler="dpmpp_2m", spacing="karras", variation_seed=7, variation_strength=0.2, clip_skip=2)
    assert found.tool == "SwarmUI 0.9.3.1" and found.model == "some-model.safetensors" and found.request(strict=False).dialect == "comfy"
    noted(found, "vae: ae.sft", "LoRA 'fluffy' at 0.5", "refinermethod: PostApply")
    assert len(found.notes) == 3
    flux = copy.deepcopy(SWARM)
    flux["sui_image_params"] |= {"cfgscale": 2, "fluxguidancescale": 3.5, "sigmashift": 3, "initimage": "x.png", "initimagecreativity": 0.6}
    made = from_swarm(flux)
    assert made is not None and made.fields["guidance_scale"] == 3.5 and made.fields["true_cfg_scale"] == 2.0 and made.fields["shift"] == 3.0
    assert made.needs == ("image",) and made.fields["strength"] == 0.6
    for broken in ({}, {"sui_image_params": 3}, {"sui_image_params": {"prompt": 3}}):
        assert from_swarm(broken) is None


@given(name=st.sampled_from(sorted(SWARM["sui_image_params"])), value=st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.integers(), max_size=2))
@settings(max_examples=200, deadline=None)
def test_anything_may_stand_in_swarms_file(name: str, value: Any) -> None:
    found = from_swarm({"sui_image_params": SWARM["sui_image_params"] | {name: value}})
    assert found is None or found.request(strict=False).prompt is not None


def test_every_entry_of_invokeai_is_read_or_noted() -> None:
    found = from_invoke(INVOKE | {"positive_prompt": "a fox", "regions": [{"prompt": "sky"}], "hrf_strength": 0.4, "new_thing": {"x": 1}, "created_by": "me"})
    noted(found, "regions: ", "hrf_strength: 0.4", "new_thing: {'x': 1}")  # type: ignore[arg-type]
    assert not any("created_by" in note for note in found.notes)  # type: ignore[union-attr]
    old = from_old_invoke({"image": {"prompt": "a fox", "steps": 5, "facetool": "gfpgan", "facetool_strength": 0.8, "orig_hash": "12"}})
    noted(old, "facetool: gfpgan", "facetool_strength: 0.8")  # type: ignore[arg-type]


def test_comfyui_nodes_without_an_equivalent() -> None:
    after = graph(n12=node("ImageUpscaleWithModel", upscale_model=["13", 0], image=["8", 0]), n13=node("UpscaleModelLoader", model_name="4x.pth"),
                  i9={"images": ["12", 0]}, i8={"vae": ["14", 0]}, n14=node("VAELoader", vae_name="dir/mse.safetensors"))
    noted(fields(from_prompt(after), **BASE), "the node ImageUpscaleWithModel changes the finished picture", "VAE 'mse.safetensors'")
    flipped = graph(n12=node("LatentFlip", samples=["5", 0], flip_method="x"), i3={"latent_image": ["12", 0]})
    noted(fields(from_prompt(flipped), **BASE), "the node LatentFlip changes the latents")
    area = graph(n12=node("ConditioningSetArea", conditioning=["6", 0], width=64, height=64, x=0, y=0, strength=1.0), i3={"positive": ["12", 0]})
    noted(fields(from_prompt(area), **BASE), "the node ConditioningSetArea has no equivalent here")
    odd = graph(n12=node("SomeoneElsesConditioning", conditioning=["6", 0], amount=3), i3={"positive": ["12", 0]})
    noted(fields(from_prompt(odd), **BASE), "the node SomeoneElsesConditioning has no equivalent here")
    patched = graph(n12=node("SelfAttentionGuidance", model=["10", 0], scale=0.5), i3={"model": ["12", 0]})
    noted(fields(from_prompt(patched), **BASE), "the node SelfAttentionGuidance changes the model")
    silent = copy.deepcopy(GRAPH)
    silent["3"] = node("KSamplerAdvanced", add_noise="disable", noise_seed=5, steps=20, cfg=7.0, sampler_name="euler", scheduler="normal", start_at_step=0,
                       end_at_step=10000, return_with_leftover_noise="disable", model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0])
    noted(from_prompt(silent), "no noise was added")  # type: ignore[arg-type]


def test_comfyui_custom_sampling_with_more_nodes() -> None:
    custom = graph(n3=node("SamplerCustomAdvanced", noise=["20", 0], guider=["21", 0], sampler=["22", 0], sigmas=["23", 0], latent_image=["5", 0]),
                   n20=node("DisableNoise"), n21=node("DualCFGGuider", model=["4", 0], cond1=["6", 0], cond2=["6", 0], negative=["7", 0], cfg_conds=7.0,
                                                      cfg_cond2_negative=5.0),
                   n22=node("KSamplerSelect", sampler_name="euler"), n23=node("SplitSigmas", sigmas=["24", 0], step=5),
                   n24=node("KarrasScheduler", steps=12, sigma_max=14.614642, sigma_min=0.1, rho=7.0))
    found = from_prompt(custom)
    assert found is not None and found.fields["steps"] == 12 and found.fields["spacing"] == "karras" and found.fields["sampler"] == "euler"
    noted(found, "no noise was added", "the guider DualCFGGuider", "the node SplitSigmas changes the noise levels", "sigma_min 0.1 of the noise levels")


def test_every_key_of_a_diffusers_recipe_is_read_or_noted() -> None:
    said = {"prompt": "a fox", "num_inference_steps": 5, "styles": ["Fooocus V2"], "wildcards": "x", "ip_adapter_image": "a.png", "timesteps": [3], "odd": 1.5}
    found = from_diffusers(said)
    assert isinstance(found, Foreign) and set(found.fields) == {"prompt", "steps"}
    for key in set(said) - {"prompt", "num_inference_steps"}:
        assert any(note.startswith(f"{key}: ") or key in note for note in found.notes), key
    assert Request(prompt="x").wildcards is None
