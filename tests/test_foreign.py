"""Other programs' files, written here as those programs write them: what comes over, and that the rest is named."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_save import gradient

from latentgen.conditioning.dialect import parse
from latentgen.diffusion import SAMPLERS
from latentgen.errors import RequestError
from latentgen.pixels.save import save_image
from latentgen.run.foreign.comfy import from_prompt, from_workflow
from latentgen.run.foreign.fields import foreign_sampler
from latentgen.run.foreign.invoke import from_dream, from_invoke, from_old_invoke
from latentgen.run.foreign.read import Foreign, from_diffusers, read_foreign
from latentgen.run.parameters import write_parameters
from latentgen.run.recipe import read_recipe

A1111 = """masterpiece, (a red fox:1.2) in snow, <lora:fluffy:0.8>,
second line with Steps: 3
Negative prompt: lowres, "bad" hands
and a second line
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 2871113391, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, VAE hash: f921fb3f29, \
VAE: vae-ft-mse.safetensors, Clip skip: 2, Lora hashes: "fluffy: 0a1b2c3d4e5f, other: 11", TI hashes: "easynegative: c74b4e810b03", \
Hashes: {"vae": "f921fb3f29", "lora:fluffy": "0a1b"}, Version: v1.9.4"""


def fields(found: Foreign | None, **expected: Any) -> Foreign:
    """Exactly these fields came over, and they make a request."""
    assert found is not None and found.fields == expected
    request = found.request(strict=False)
    assert all(getattr(request, name) in (value, tuple(value) if isinstance(value, list) else value) for name, value in expected.items())
    return found


def noted(found: Foreign, *words: str) -> None:
    for word in words:
        assert any(word in note for note in found.notes), (word, found.notes)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a1111(tmp_path: Path, suffix: str) -> None:
    found = read_recipe(save_image(gradient(), tmp_path / f"a{suffix}", metadata={"parameters": A1111}))
    assert isinstance(found, Foreign) and found.tool == "A1111" and found.model == "v1-5-pruned-emaonly" and found.needs == ()
    fields(found, prompt="masterpiece, (a red fox:1.2) in snow, <lora:fluffy:0.8>,\nsecond line with Steps: 3",
           negative_prompt='lowres, "bad" hands\nand a second line',
           steps=28, sampler="dpmpp_2m", spacing="karras", guidance_scale=6.5, seed=2871113391, width=512, height=768, clip_skip=2)
    noted(found, "the prompt calls the lora 'fluffy'", "Lora hashes: fluffy: 0a1b2c3d4e5f, other: 11", "TI hashes", "vae-ft-mse", "RNG: CPU")


def settings_line(line: str, *, prompt: str = "a fox") -> Foreign:
    found = read_foreign({"parameters": f"{prompt}\n{line}"})
    assert found is not None
    return found


def test_older_and_other_hands_of_a1111() -> None:
    old = settings_line("Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: 7460a6fa, RNG: CPU")
    fields(old, prompt="a fox", steps=20, sampler="euler_ancestral", spacing="normal", guidance_scale=7.0, seed=1, width=512, height=512)
    assert old.notes == () and old.tool == "A1111"
    assert settings_line("Steps: 20, Sampler: DPM++ 2M SDE Karras, CFG scale: 7, Seed: 1").fields["spacing"] == "karras"
    assert settings_line("Steps: 20, Sampler: DPM++ 2M, Schedule type: Automatic, CFG scale: 7, Seed: 1").fields["spacing"] == "karras"
    assert settings_line("Steps: 20, Sampler: Euler, Schedule type: Automatic, CFG scale: 7, Seed: 1").fields["spacing"] == "normal"
    forge = settings_line("Steps: 20, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 5, Size: 896x1152, "
                          "Model hash: c161224931, "
                          "Model: dev-fp8, Version: f2.0.1v1.10.1-previous-501-g668e87f9, Module 1: ae, Module 2: t5xxl_fp16")
    fields(forge, prompt="a fox", steps=20, sampler="euler", spacing="simple", guidance_scale=3.5, seed=5, width=896, height=1152)
    assert forge.tool == "Forge"
    noted(forge, "Module 2: t5xxl_fp16")
    assert settings_line("Steps: 20, Sampler: Euler, CFG scale: 2, Distilled CFG Scale: 3.5, Seed: 5, Version: f2.0.1").fields["true_cfg_scale"] == 2
    sdnext = settings_line("Steps: 20, Size: 1024x1024, Sampler: Euler a, Seed: 9, CFG scale: 6, CFG rescale: 0.7, "
                           "App: SD.Next, Version: 0da2a5a, Operations: txt2img, "
                           "Model: some-model, Model hash: 31e35c80fc, Parser: Full parser")
    assert sdnext.tool == "SD.Next" and sdnext.model == "some-model" and sdnext.fields["guidance_rescale"] == 0.7 and len(sdnext.notes) == 1


def test_a1111_edits_second_passes_and_what_is_not_here() -> None:
    edit = settings_line("Steps: 20, Sampler: DDIM, CFG scale: 7, Seed: 1, Size: 512x512, Denoising strength: 0.45, "
                         "Mask blur: 4, Inpaint area: Only masked, Version: v1.10.0")
    assert edit.fields["strength"] == 0.45 and edit.fields["spacing"] == "leading" and edit.needs == ("image", "mask")
    noted(edit, "give it as image", "give it as mask")
    hires = settings_line("Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 512x512, Denoising strength: 0.45, "
                          "Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent")
    fields(hires, prompt="a fox", steps=20, sampler="euler", spacing="normal", guidance_scale=7.0, seed=1, width=512, height=512,
           upscale=2.0, upscaler="latent", upscale_strength=0.45, upscale_steps=10)
    assert hires.needs == () and len(hires.notes) == 1  # of the seed
    other = settings_line("Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 512x512, Denoising strength: 0.7, Hires resize: 1024x1024, "
                          "Hires upscaler: R-ESRGAN 4x+, Hires sampler: Use same sampler, Hires CFG Scale: 5, Hires prompt: \"a fox, sharp\"")
    assert {name: value for name, value in other.fields.items() if name.startswith("up")} == {
        "upscale": 2.0, "upscaler": "lanczos", "upscale_strength": 0.7, "upscale_steps": 20}  # where A1111 names no steps it runs as many as before
    noted(other, "'R-ESRGAN 4x+' is lanczos here", "Hires CFG Scale: 5", "Hires prompt: a fox, sharp")
    bent = settings_line("Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 512x512, Denoising strength: 0.7, Hires resize: 1024x768, Hires upscaler: Latent")
    assert "upscale" not in bent.fields and "strength" not in bent.fields
    noted(bent, "a second pass at a larger size (Hires resize: 1024x768, Hires upscaler: Latent, Denoising strength: 0.7) was not taken over")
    odd = settings_line('Steps: 20, Sampler: My Sampler, Schedule type: Zigzag, CFG scale: 700, Seed: -1, Size: 4x99999, '
                        'Clip skip: one, Token merging ratio hr: 0.5, '
                        'ControlNet 0: "Module: canny, Model: control_canny [e3fe], Weight: 1.0", Variation seed: 7, Variation seed strength: 2')
    assert set(odd.fields) == {"prompt", "steps"}
    noted(odd, "sampler 'My Sampler'", "schedule 'Zigzag'", "CFG scale '700' was not taken over", "Seed '-1'", "Size '4'", "Size '99999'",
          "Clip skip 'one'",
          "Token merging ratio hr: 0.5", "ControlNet 0: Module: canny, Model: control_canny [e3fe], Weight: 1.0", "Variation seed strength '2'")


TEXT = {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox", "clip": ["11", 0]}, "_meta": {"title": "CLIP Text Encode (Prompt)"}}
GRAPH: dict[str, Any] = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 156680208700286, "steps": 20, "cfg": 8, "sampler_name": "dpmpp_2m", "scheduler": "karras",
                                               "denoise": 1,
                                               "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "people\\fox-v1.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": TEXT, "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["11", 0]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    "10": {"class_type": "LoraLoader", "inputs": {"lora_name": "dir/fluffy.safetensors", "strength_model": 0.8, "strength_clip": 1, "model": ["4", 0],
                                                  "clip": ["4", 1]}},
    "11": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["10", 1]}},
}
BASE = {"prompt": "a fox", "negative_prompt": "text, watermark", "steps": 20, "sampler": "dpmpp_2m", "spacing": "karras", "guidance_scale": 8.0,
        "seed": 156680208700286,
        "width": 512, "height": 768, "clip_skip": 2}


def graph(**changed: Any) -> dict[str, Any]:
    """The graph above with nodes ("n3" is node 3) replaced or added, and inputs ("i3") changed."""
    made = copy.deepcopy(GRAPH)
    for key, value in changed.items():
        if key[0] == "n":
            made[key[1:]] = value
        else:
            made[key[1:]]["inputs"] |= value
    return made


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def test_comfyui(tmp_path: Path) -> None:
    found = read_recipe(save_image(gradient(), tmp_path / "a.png", metadata={"prompt": json.dumps(GRAPH), "workflow": "{}"}))
    assert isinstance(found, Foreign) and found.tool == "ComfyUI" and found.model == "fox-v1.safetensors" and found.needs == ()
    fields(found, **BASE)
    assert found.notes == ("LoRA 'fluffy.safetensors' at 0.8 was used, which is not loaded here",)
    exif = Image.Exif()
    exif[0x0110], exif[0x010F] = "prompt:" + json.dumps(GRAPH), "workflow:{}"
    gradient().save(tmp_path / "a.webp", exif=exif)
    assert read_recipe(tmp_path / "a.webp") == found


def test_comfyui_edits() -> None:
    edit = graph(n12=node("LoadImage", image="sub/photo.png", upload="image"), n13=node("VAEEncode", pixels=["12", 0], vae=["4", 2]),
                 i3={"latent_image": ["13", 0], "denoise": 0.6})
    found = fields(from_prompt(edit), **{k: v for k, v in BASE.items() if k not in ("width", "height")}, strength=0.6)
    assert found.needs == ("image",)
    noted(found, "made from the picture 'photo.png'")
    masked = graph(n12=node("LoadImage", image="photo.png"),
                   n13=node("VAEEncodeForInpaint", pixels=["12", 0], mask=["12", 1], vae=["4", 2], grow_mask_by=6), i3={"latent_image": ["13", 0]})
    found = from_prompt(masked)
    assert found is not None and found.needs == ("image", "mask") and found.fields["strength"] == 1
    advanced = node("KSamplerAdvanced", add_noise="enable", noise_seed=5, steps=20, cfg=7.0, sampler_name="euler", scheduler="normal",
                    start_at_step=8, end_at_step=10000,
                    return_with_leftover_noise="disable", model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["13", 0])
    found = from_prompt({**edit, "3": advanced})
    assert found is not None and found.fields["strength"] == 0.6 and found.fields["seed"] == 5 and found.fields["spacing"] == "normal"


def test_comfyui_two_passes_and_a_refiner() -> None:
    second = node("KSampler", seed=9, steps=12, cfg=5, sampler_name="euler", scheduler="normal", denoise=0.5, model=["4", 0], positive=["6", 0],
                  negative=["7", 0], latent_image=["13", 0])
    hires = graph(n12=second, n13=node("LatentUpscale", samples=["3", 0], width=1024, height=1536, upscale_method="nearest-exact", crop="disabled"),
                  i8={"samples": ["12", 0]})
    found = fields(from_prompt(hires), **BASE, upscale=2.0, upscaler="latent_nearest", upscale_strength=0.5, upscale_steps=12)
    noted(found, "the second pass draws its noise from a seed of its own", "it has cfg 5, here that of the first")
    by = {**hires, "13": node("LatentUpscaleBy", samples=["3", 0], scale_by=1.5, upscale_method="bislerp")}
    found = fields(from_prompt(by), **BASE, upscale=1.5, upscaler="latent", upscale_strength=0.5, upscale_steps=12)
    noted(found, "upscaler 'bislerp' is latent here")
    pixels = by | {"13": node("VAEEncode", pixels=["14", 0], vae=["4", 2]), "14": node("ImageScaleBy", image=["15", 0], scale_by=2.0, upscale_method="lanczos"),
                   "15": node("VAEDecode", samples=["3", 0], vae=["4", 2])}
    fields(from_prompt(pixels), **BASE, upscale=2.0, upscaler="lanczos", upscale_strength=0.5, upscale_steps=12)
    network = pixels | {"14": node("ImageScale", image=["16", 0], width=1024, height=1536, upscale_method="lanczos", crop="disabled"),
                        "16": node("ImageUpscaleWithModel", image=["15", 0], upscale_model=["17", 0])}
    bent = {**hires, "13": node("LatentUpscale", samples=["3", 0], width=1024, height=1024, upscale_method="bilinear", crop="disabled")}
    for graph_ in (network, bent):
        noted(fields(from_prompt(graph_), **BASE), "a later pass of KSampler (12 steps, denoise 0.5)")
    half = node("KSamplerAdvanced", add_noise="enable", noise_seed=5, steps=25, cfg=7.0, sampler_name="euler", scheduler="normal", start_at_step=0,
                end_at_step=20,
                return_with_leftover_noise="enable", model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0])
    rest = {**half, "inputs": half["inputs"] | {"add_noise": "disable", "start_at_step": 20, "end_at_step": 10000, "latent_image": ["3", 0]}}
    found = from_prompt(graph(n3=half, n12=rest, i8={"samples": ["12", 0]}))
    assert found is not None and found.fields["steps"] == 25 and "strength" not in found.fields
    noted(found, "stops after step 20 of 25", "a later pass of KSamplerAdvanced")


def test_comfyui_custom_sampling() -> None:
    custom: dict[str, Any] = {
        "1": node("UNETLoader", unet_name="dev.safetensors", weight_dtype="default"),
        "2": node("DualCLIPLoader", clip_name1="t5.safetensors", clip_name2="l.safetensors"),
        "3": node("CLIPTextEncode", text="a fox", clip=["2", 0]), "4": node("FlowGuidance", guidance=3.5, conditioning=["3", 0]),
        "5": node("BasicGuider", model=["14", 0], conditioning=["4", 0]), "6": node("KSamplerSelect", sampler_name="euler"),
        "7": node("BasicScheduler", scheduler="simple", steps=24, denoise=1, model=["14", 0]), "8": node("RandomNoise", noise_seed=["15", 0]),
        "9": node("EmptySomeLatentImage", width=1024, height=1024, batch_size=4),
        "10": node("SamplerCustomAdvanced", noise=["8", 0], guider=["5", 0], sampler=["6", 0], sigmas=["7", 0], latent_image=["9", 0]),
        "11": node("VAEDecode", samples=["10", 0], vae=["12", 0]), "12": node("VAELoader", vae_name="ae.safetensors"),
        "13": node("SaveImage", images=["11", 0]),
        "14": node("ModelSamplingShift", shift=3.0, model=["1", 0]), "15": node("PrimitiveInt", value=77)}
    expected = {"prompt": "a fox", "steps": 24, "sampler": "euler", "spacing": "simple", "guidance_scale": 3.5, "seed": 77, "width": 1024,
                "height": 1024, "shift": 3.0}
    found = fields(from_prompt(custom), **expected)
    assert found.model == "dev.safetensors"
    noted(found, "one of a batch")
    eight = from_prompt(custom | {"1": node("UNETLoader", unet_name="dev.safetensors", weight_dtype="fp8_e4m3fn_fast")})
    noted(eight, "one of a batch", "weight_dtype 'fp8_e4m3fn_fast' held the weights in 8 bits: load the model with quantise='fp8'")
    pair = custom | {"5": node("CFGGuider", model=["1", 0], positive=["4", 0], negative=["16", 0], cfg=2.0),
                     "16": node("CLIPTextEncode", text="dog", clip=["2", 0])}
    fields(from_prompt(pair), **{k: v for k, v in expected.items() if k != "shift"}, negative_prompt="dog", true_cfg_scale=2.0)
    lora = custom | {"1": node("UNETLoader", unet_name="dev.safetensors"),
                     "14": node("LoraLoaderModelOnly", lora_name="x.safetensors", strength_model=1, model=["1", 0])}
    noted(from_prompt(lora), "LoRA 'x.safetensors' at 1")  # type: ignore[arg-type]


def test_comfyui_conditioning() -> None:
    control = graph(i3={"positive": ["12", 0]}, n12=node("ControlNetApply", strength=1.0, conditioning=["6", 0], control_net=["13", 0],
                                                         image=["14", 0]),
                    n13=node("ControlNetLoader", control_net_name="canny.safetensors"), n14=node("LoadImage", image="edges.png"))
    noted(fields(from_prompt(control), **BASE), "ControlNet 'canny.safetensors'")
    combined = graph(i3={"positive": ["12", 0]}, n12=node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["13", 0]),
                     n13=node("CLIPTextEncode", text="two", clip=["4", 1]))
    noted(fields(from_prompt(combined), **BASE), "2 positive texts are combined")
    mean = node("ConditioningAverage", conditioning_to=["13", 0], conditioning_from=["6", 0], conditioning_to_strength=0.3)
    averaged = {"n12": mean, "n13": node("CLIPTextEncode", text="a wolf", clip=["4", 1])}
    between = from_prompt(graph(i3={"positive": ["12", 0]}, **averaged))
    noted(fields(between, **BASE, blend_prompt="a wolf", blend=0.3), "here they are along the sphere")
    noted(fields(from_prompt(graph(i3={"negative": ["12", 0]}, **averaged)), **BASE | {"negative_prompt": "a wolf"}), "ConditioningAverage has no equivalent")
    zero = graph(i3={"negative": ["12", 0]}, n12=node("ConditioningZeroOut", conditioning=["6", 0]))
    assert "negative_prompt" not in from_prompt(zero).fields  # type: ignore[union-attr]
    two = graph(n6=node("CLIPTextEncodeTwo", text_g="general", text_l="a fox", clip=["11", 0], width=1024, height=768, crop_w=8, crop_h=4,
                        target_width=512, target_height=256))
    fields(from_prompt(two), **BASE, prompt_2="general", original_size=[768, 1024], crop_top_left=[4, 8], target_size=[256, 512])
    told = graph(i6={"text": ["12", 0]}, n12=node("StringNode", string="a fox"))
    fields(from_prompt(told), **BASE)
    lost = from_prompt(graph(i6={"text": ["12", 0]}, n12=node("Wildcards", seed=["6", 0])))
    assert lost is not None and "prompt" not in lost.fields
    reference = graph(i3={"positive": ["12", 0]}, n12=node("ReferenceLatent", conditioning=["6", 0], latent=["5", 0]))
    assert from_prompt(reference).needs == ("reference",)  # type: ignore[union-attr]


def as_workflow(made: dict[str, Any], *, modern: bool) -> dict[str, Any]:
    """The graph as the screen saves it: links in a list of their own, values without names, and in newer files with their names in `inputs`."""
    links, nodes = [], []
    for key, one in made.items():
        slots, values = [], []
        for name, value in one["inputs"].items():
            if isinstance(value, list):
                links.append([len(links) + 1, int(value[0]), value[1], int(key), len(slots), "ANY"])
                slots.append({"name": name, "type": "ANY", "link": len(links)})
            else:
                values += [value, "randomize"] if name == "seed" and one["class_type"] == "KSampler" else [value]
                slots += [{"name": name, "type": "ANY", "link": None, "widget": {"name": name}}] if modern else []
        nodes.append({"id": int(key), "type": one["class_type"], "mode": 0, "inputs": slots, "outputs": [], "widgets_values": values})
    return {"last_node_id": 99, "nodes": nodes, "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4}


@pytest.mark.parametrize("modern", [True, False])
def test_comfyui_from_the_screen_alone(modern: bool) -> None:
    workflow = as_workflow(GRAPH, modern=modern)
    assert from_workflow(workflow) == from_prompt(GRAPH) and read_foreign({"workflow": json.dumps(workflow)}) == from_prompt(GRAPH)
    lora = next(n for n in workflow["nodes"] if n["type"] == "LoraLoader")
    lora["mode"] = 4  # bypassed: it only hands on
    fields(from_workflow(workflow), **BASE)
    assert from_workflow(workflow).notes == ()  # type: ignore[union-attr]
    workflow["links"] = [{"id": i, "origin_id": a, "origin_slot": b, "target_id": c, "target_slot": d, "type": t} for i, a, b, c, d,
                         t in workflow["links"]]
    fields(from_workflow(workflow), **BASE)


def test_comfyui_graphs_that_run_in_circles_come_to_an_end() -> None:
    circle = graph(i4={"model": ["10", 0]}, i5={"samples": ["3", 0], "width": ["5", 0]}, i6={"conditioning": ["6", 0], "text": ["6", 0]},
                   i10={"model": ["10", 0]})
    circle["5"]["class_type"] = circle["10"]["class_type"] = "Reroute"
    assert from_prompt(circle) is not None
    long = {str(n): node("Reroute", latent_image=[str(n + 1), 0]) for n in range(20, 4000)}
    assert from_prompt(graph(i3={"latent_image": ["20", 0]}) | long) is not None
    for empty in ({}, {"1": node("SaveImage", images=["2", 0])}, {"1": 3, "2": {"inputs": 3}, "3": {}}):
        assert from_prompt(empty) is None


INVOKE = {
    "generation_mode": "txt2img", "positive_prompt": "a fox, (snow)1.2", "negative_prompt": "blurred", "width": 1024, "height": 768,
    "seed": 2871113391, "rand_device": "cpu",
    "cfg_scale": 7.5, "cfg_rescale_multiplier": 0.0, "steps": 30, "scheduler": "dpmpp_2m_k", "clip_skip": 1, "strength": 0.5, "seamless_x": False,
    "seamless_y": True,
    "model": {"key": "a0", "hash": "blake3:11", "name": "some-model", "base": "xl", "type": "main"}, "controlnets": [], "ipAdapters": [],
    "t2iAdapters": [],
    "loras": [{"model": {"name": "fluffy", "type": "lora"}, "weight": 0.75}], "vae": {"name": "vae-fix"}, "positive_style_prompt": "oil painting",
    "negative_style_prompt": "blurred",
    "app_version": "5.4.2"}


def test_invokeai() -> None:
    found = read_foreign({"invokeai_metadata": json.dumps(INVOKE), "invokeai_graph": "{}"})
    found = fields(found, prompt="a fox, (snow)1.2", negative_prompt="blurred", prompt_2="oil painting", width=1024, height=768, seed=2871113391,
                   guidance_scale=7.5,
                   guidance_rescale=0.0, steps=30, sampler="dpmpp_2m", spacing="karras", clip_skip=2, seamless="y")
    assert found.tool == "InvokeAI 5.4.2" and found.model == "some-model" and found.needs == ()
    noted(found, "LoRA 'fluffy' at 0.75", "VAE 'vae-fix'", "weighted as InvokeAI weights")
    edit = from_invoke(INVOKE | {"generation_mode": "inpaint", "rand_device": "cuda", "positive_prompt": "a fox", "scheduler": "deis", "cfg_scale": 1,
                                 "guidance": 3.5})
    assert edit is not None and edit.needs == ("image", "mask") and edit.fields["strength"] == 0.5 and edit.fields["guidance_scale"] == 3.5
    noted(edit, "noise was drawn on the GPU")


def invoke(prompt: str, negative: str = "", **more: Any) -> Any:
    said = {"positive_prompt": prompt, "negative_prompt": negative, **more}
    return from_invoke({name: value for name, value in INVOKE.items() if not name.endswith("style_prompt")} | {"loras": [], "vae": None} | said)


@pytest.mark.parametrize("weights, blend", [("0.25,0.75", 0.75), ("1, 0.8", 0.8 / 1.8), ("3, 1", 0.25), ("", 0.5), ("1,0", 0.0)])
def test_two_prompts_that_invokeai_blends_are_blended(weights: str, blend: float) -> None:
    found = invoke(f'("a (blue) sphere", "red cube, \\"big\\"").blend({weights})', "dark")
    made = found.request()
    assert (made.prompt, made.blend_prompt, made.negative_prompt, made.dialect) == ("a (blue) sphere", 'red cube, "big"', "dark", "plain")
    assert made.blend == pytest.approx(blend) and found.notes == ("its texts were mixed along the straight line, here they are along the sphere: "
                                                                  "the picture is near, not the same",)


def test_a_conjunction_of_invokeais_is_broken_into_chunks() -> None:
    """Whatever brackets stand in the texts: they are text there."""
    parts = ["a fox (red) [old]", "oil, \\ [x:y:0.5]", "end"]
    found = invoke("(" + ", ".join(json.dumps(part) for part in parts) + ").and()", "dark (night)", positive_style_prompt="by (someone)")
    made = found.request()
    assert found.notes == () and made.dialect == "a1111"
    (span,) = parse(made.prompt).spans(20)
    (one,) = span.conjuncts
    assert {fragment.weight for fragment in one.fragments} == {1.0}
    broken = "".join("|" * fragment.breaks + fragment.text for fragment in one.fragments)
    assert broken == "|".join(parts)
    for text, wanted in ((made.negative_prompt, "dark (night)"), (made.prompt_2, "by (someone)")):
        assert "".join(fragment.text for fragment in parse(text).spans(20)[0].conjuncts[0].fragments) == wanted


@pytest.mark.parametrize("prompt, note", [
    ('("a", "b", "c").blend(1,1,1)', "is read here as text"), ('("a", "b").blend(1,-1)', "is read here as text"), ('("a", "b").blend(1,1,no_normalize)', "is read here as text"),
    ('("a", "b").and(1,2)', "is read here as text"), ('("a AND b", "c").and()', "is read here as text"), ('("a", "b").blend(1,1) and more', "is read here as text"),
    ('a cat.swap(dog)', "is read here as text"), ('("a++", "b").blend(1,1)', "weighted as InvokeAI weights")])
def test_what_of_it_cannot_be_said_stays_as_text_with_a_note(prompt: str, note: str) -> None:
    found = invoke(prompt)
    noted(found, note)
    assert found.fields["prompt"] == prompt and "blend" not in found.fields and found.request().dialect == "plain"


def test_negative_prompts_have_no_blend_here() -> None:
    noted(invoke("a fox", '("a", "b").blend(1,1)'), "is read here as text")


def test_old_invokeai() -> None:
    image = {"prompt": [{"prompt": "a fox [blurred] in snow [dark]", "weight": 1.0}, {"prompt": "b", "weight": 0.5}], "steps": 50, "cfg_scale": 7.5,
             "threshold": 0, "perlin": 0.1,
             "height": 512, "width": 640, "seed": 3, "seamless": False, "hires_fix": False, "type": "txt2img", "postprocessing": None,
             "sampler": "k_euler_a", "variations": []}
    data = {"model": "stable diffusion", "model_weights": "/home/me/models/base-1.5.ckpt", "model_hash": "cc6c", "app_id": "invoke-ai/InvokeAI",
            "app_version": "2.3.5", "image": image}
    expected = {"prompt": "a fox in snow", "negative_prompt": "blurred, dark", "steps": 50, "guidance_scale": 7.5, "height": 512, "width": 640,
                "seed": 3, "sampler": "euler_ancestral"}
    found = fields(read_foreign({"sd-metadata": json.dumps(data), "Dream": "x"}), **expected)
    assert found.model == "base-1.5.ckpt"
    noted(found, "1 more prompts", "perlin: 0.1")
    dream = fields(read_foreign({"Dream": '"a fox [blurred]" -s 50 -S 3 -W 640 -H 512 -C 7.5 -A k_euler -G 0.8'}), prompt="a fox",
                   negative_prompt="blurred", steps=50, seed=3,
                   width=640, height=512, guidance_scale=7.5, sampler="euler")
    noted(dream, "the option -G 0.8")
    assert from_dream('"unclosed') is None and from_dream("") is None and from_old_invoke({"image": {"prompt": []}}) is None


def test_diffusers_words(tmp_path: Path) -> None:
    data = {"prompt": "a fox", "negative_prompt": "blurred", "num_inference_steps": 25, "guidance_scale": 5, "height": 768, "width": 512,
            "generator": 42, "clip_skip": 1,
            "scheduler": {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, "timestep_spacing": "leading"},
            "model_id": "org/some-model", "cross_attention_kwargs": {"scale": 1},
            "strength": 0.3, "init_image": "photo.png", "prompt_2": "oil", "num_images_per_prompt": 4}
    found = read_recipe(save_image(gradient(), tmp_path / "a.png", metadata={"parameters": json.dumps(data)}))
    assert isinstance(found, Foreign)
    fields(found, prompt="a fox", negative_prompt="blurred", steps=25, guidance_scale=5.0, height=768, width=512, seed=42, clip_skip=2,
           sampler="dpmpp_2m", spacing="karras",
           strength=0.3, prompt_2="oil")
    assert found.needs == ("image",) and found.model == "some-model"
    noted(found, "cross_attention_kwargs", "give it as image")
    fooocus = {"prompt": "a fox", "negative_prompt": "", "steps": 30, "guidance_scale": 4, "resolution": "(896, 1152)", "sampler": "dpmpp_2m_sde_gpu",
               "scheduler": "karras", "seed": "12",
               "base_model": "m", "sharpness": 2, "loras": [["x", 0.1]], "version": "Fooocus v2.5"}
    found = fields(from_diffusers(fooocus), prompt="a fox", steps=30, guidance_scale=4.0, width=896, height=1152, sampler="dpmpp_2m_sde",
                   spacing="karras", seed=12)
    assert found.tool == "Fooocus v2.5"
    assert from_diffusers({"prompt": "a"}) is None and from_diffusers({"steps": 3}) is None


@pytest.mark.parametrize(("said", "expected"), [
    ("Euler", ("euler", None)), ("k_euler", ("euler", None)), ("Euler a", ("euler_ancestral", None)), ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
    ("EulerAncestralDiscreteScheduler", ("euler_ancestral", None)), ("dpmpp_2m_k", ("dpmpp_2m", "karras")), ("dpmpp_2m", ("dpmpp_2m", None)),
    ("DPM++ 2M SDE Exponential", ("dpmpp_2m_sde", "exponential")), ("DDIM", ("ddim", None)), ("DDIMScheduler", ("ddim", None)),
    ("LCM", ("lcm", None)),
    ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, ("dpmpp_2m", "karras")), ("dpm2_ancestral", ("dpm2_ancestral", None)),
    ("", None), (None, None), (3, None), ({}, None), ("no such", None), ("x" * 10**6, None)], ids=lambda said: str(said)[:40])
def test_names_of_samplers(said: Any, expected: tuple[str, str | None] | None) -> None:
    found = foreign_sampler(said)
    assert (found and (found.sampler, found.spacing)) == expected


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_of_ours_comes_back_from_the_text_for_others(sampler: str) -> None:
    found = read_foreign({"parameters": write_parameters({"prompt": "a", "steps": 9, "sampler": sampler, "spacing": "karras", "seed": 1,
                                                          "guidance_scale": 2.0})})
    assert found is not None and (found.fields["sampler"], found.fields["spacing"]) == (sampler, "karras")


def test_a_request_from_another_program_takes_changes_and_checks_them() -> None:
    found = from_prompt(GRAPH)
    assert found is not None and found.request(steps=5).steps == 5
    with pytest.raises(RequestError, match="did you mean"):
        found.request(num_inference_steps=5)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
                           | st.lists(st.sampled_from(["3", "6", "10", 0, 1]), min_size=2, max_size=2),
                           lambda inner: st.lists(inner, max_size=3)
                           | st.dictionaries(st.sampled_from(["inputs", "class_type", "prompt", "model", "name", "x"]), inner, max_size=3),
                           max_leaves=6)


@given(value=json_values, seed=st.integers(0, 10**6), which=st.sampled_from(range(6)))
@settings(max_examples=600, deadline=None)
def test_anything_may_stand_anywhere(value: Any, seed: int, which: int) -> None:
    """One place of a sound file is overwritten by anything: the reader gives fields that make a request, or nothing; it never fails."""
    reader, sound = ((from_prompt, GRAPH), (from_workflow, as_workflow(GRAPH, modern=True)), (from_workflow, as_workflow(GRAPH, modern=False)),
                     (from_invoke, INVOKE),
                     (from_old_invoke, {"image": {"prompt": [{"prompt": "a", "weight": 1}], "steps": 3, "sampler": "ddim"}, "model": "x"}),
                     (from_diffusers, {"prompt": "a", "steps": 3, "scheduler": {"_class_name": "x"}, "resolution": "(8, 8)", "loras": [],
                                       "clip_skip": 1}))[which]
    dice, broken = random.Random(seed), copy.deepcopy(sound)
    spot: Any = broken
    while True:
        key = dice.choice(list(spot) if isinstance(spot, dict) else range(len(spot)))
        if not spot[key] or not isinstance(spot[key], (dict, list)) or dice.random() < 0.2:
            break
        spot = spot[key]
    spot[key] = value
    found = reader(broken)  # type: ignore[operator]
    assert found is None or found.request(strict=False).prompt is not None


@pytest.mark.parametrize("tool, dialect", [("ComfyUI", "comfy"), ("InvokeAI 4.2", "plain"), ("diffusers", "plain"), ("A1111", "a1111"),
                                           ("Forge", "a1111")])
def test_prompts_are_read_as_the_program_read_them(tool: str, dialect: str) -> None:
    found = Foreign(tool, {"prompt": "a (cat:1.2)"})
    assert found.request().dialect == dialect and found.request(dialect="plain").dialect == "plain"


def test_token_merging_of_a1111_and_comfyui() -> None:
    found = settings_line("Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Token merging ratio: 0.5, Version: v1.9.4")
    assert found.fields["approximate"] == {"token_merging": {"ratio": 0.5}} and not any("merging" in note for note in found.notes)
    most = settings_line("Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Token merging ratio: 0.9, Version: v1.9.4")
    assert most.fields["approximate"] == {"token_merging": {"ratio": 0.75}}
    ours = write_parameters({"prompt": "a fox", "steps": 20, "approximate": {"token_merging": {"ratio": 0.5, "deepest": 1}}})
    assert "Token merging ratio: 0.5" in ours
