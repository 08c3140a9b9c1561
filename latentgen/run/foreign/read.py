"""Pictures of other programs: which one wrote a file's texts, and what A1111's and diffusers' words come to here. Knows texts, no files.

A1111's words are also Forge's, SD.Next's and many others'. ComfyUI's graphs and InvokeAI's metadata have files of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from latentgen.pixels.save import PARAMETERS
from latentgen.run.foreign.comfy import from_prompt, from_workflow
from latentgen.run.foreign.fields import Foreign, Found, base_name, merging, number, whole
from latentgen.run.foreign.hires import hires
from latentgen.run.foreign.invoke import from_dream, from_invoke, from_old_invoke
from latentgen.run.foreign.rest import rest
from latentgen.run.foreign.swarm import from_swarm
from latentgen.run.parameters import Parameters, read_parameters
from latentgen.run.request import ALIASES, Request

_NUMBERS = {  # setting -> (field of a request, its kind); read in this order, so that a later one may correct an earlier one
    "Steps": ("steps", whole), "CFG scale": ("guidance_scale", number), "Image CFG scale": ("image_guidance_scale", number),
    "Clip skip": ("clip_skip", whole), "Eta": ("eta", number), "Eta DDIM": ("eta", number), "Shift": ("shift", number),
    "Token merging ratio": ("approximate", merging), "CFG Rescale phi": ("guidance_rescale", number), "CFG rescale": ("guidance_rescale", number),
}
_READ = {*_NUMBERS, "Sampler", "Schedule type", "Scheduler", "Seed", "Size", "Model", "Model hash", "Denoising strength", "Version", "App",
         "Distilled CFG Scale", "Seed resize from", "Variation seed", "Variation seed strength", "Tile", "Tile X", "Tile Y", "Tiling"}
_WHOLE = ("steps", "seed", "width", "height", "clip_skip", "variation_seed", "seed_width", "seed_height", "upscale_steps", "tile")
_FLOATS = ("guidance_scale", "guidance_rescale", "eta", "strength", "true_cfg_scale", "image_guidance_scale", "denoising_start", "denoising_end",
           "variation_strength", "upscale", "upscale_strength")
_PICTURE_SETTINGS = {"Mask blur": "mask", "Inpaint area": "mask", "Masked content": "mask", "Inpainting fill": "mask", "Masked area padding": "mask"}


def read_foreign(texts: Mapping[str, str]) -> Foreign | None:
    """What the texts of a picture's file say in another program's words, None where they say nothing.

    Args:
        texts: see `latentgen.pixels.save.read_metadata`.
    """
    readers = ((PARAMETERS, from_swarm), ("invokeai_metadata", from_invoke), ("sd-metadata", from_old_invoke), ("Sd-metadata", from_old_invoke),
               (PARAMETERS, from_diffusers),
               ("prompt", from_prompt), ("workflow", from_workflow), ("Comment", from_diffusers), ("diffusers", from_diffusers),
               ("recipe", from_diffusers))
    parameters = read_parameters(texts.get(PARAMETERS, ""))
    if parameters is not None and "invokeai_metadata" not in texts:
        return from_parameters(parameters)
    for key, reader in readers:
        data = None
        with suppress(ValueError, RecursionError):
            data = json.loads(texts.get(key, ""))
        found = reader(data) if isinstance(data, dict) else None
        if found is not None:
            return found
    if parameters is not None:
        return from_parameters(parameters)
    return from_dream(texts["Dream"]) if "Dream" in texts else None


def from_parameters(read: Parameters) -> Foreign:
    """A1111's text as fields of a request."""
    settings, found = read.settings, Found(_program(read.settings))
    found.take_prompts(read.prompt, read.negative_prompt)
    for name, (field, kind) in _NUMBERS.items():
        if name in settings:
            found.take(field, settings[name], kind, said=name)
    if "Distilled CFG Scale" in settings and found.take("guidance_scale", settings["Distilled CFG Scale"], number, said="Distilled CFG Scale"):
        cfg = settings.get("CFG scale", "1")
        if cfg not in ("1", "1.0"):
            found.take("true_cfg_scale", cfg, number, said="CFG scale")
    schedule = settings.get("Schedule type") or settings.get("Scheduler")
    found.take_sampler(settings.get("Sampler"), schedule, program="A1111", usual="leading" if settings.get("Sampler") == "DDIM" else "normal")
    for setting, field in (("Size", ""), ("Seed resize from", "seed_")):
        size = re.fullmatch(r"(\d{1,6})x(\d{1,6})", settings.get(setting, ""))
        if size is None and setting in settings:
            found.note(f"{setting} {settings[setting][:40]!r} was not taken over: it is not two sides")
        elif size:
            found.take(f"{field}width", size[1], whole, said=setting)
            found.take(f"{field}height", size[2], whole, said=setting)
    if found.take("seed", settings.get("Seed"), whole, said="Seed") and not found.tool.startswith("latentgen") and settings.get("RNG") != "CPU":
        found.note(f"{found.tool} draws its noise on the GPU unless its file says RNG: CPU, so this seed gives another picture here")
    if found.take("variation_strength", settings.get("Variation seed strength"), number, said="Variation seed strength"):
        found.take("variation_seed", settings.get("Variation seed"), whole, said="Variation seed")
    found.take("tile", settings.get("Tile"), whole, said="Tile")
    x, y = (settings.get(f"Tile {axis}") == "True" or settings.get("Tiling") == "True" for axis in "XY")
    found.take_seamless(x, y)
    _picture_settings(settings, found)
    found.model = base_name(settings["Model"]) if "Model" in settings else ""
    rest(settings, found, {*_READ, *_PICTURE_SETTINGS})
    return found.done()


def _program(settings: Mapping[str, str]) -> str:
    version, app = settings.get("Version", ""), settings.get("App", "")
    if app:
        return app[:40]
    if version.startswith(("latentgen", "ComfyUI", "Fooocus")):
        return version[:40]
    return "Forge" if re.match(r"f\d|neo|forge|classic", version) else "A1111"


def _picture_settings(settings: Mapping[str, str], found: Found) -> None:
    """Strength: of an edit, whose picture must be given, or of a second pass at a larger size, which has another meaning."""
    if not hires(settings, found) and "Denoising strength" in settings:
        found.take("strength", settings["Denoising strength"], number, said="Denoising strength")
        found.need("image", "it was made from a picture, which the file does not hold: give it as image")
    for name, picture in _PICTURE_SETTINGS.items():
        if name in settings:
            found.need(picture, "it was made with a mask, which the file does not hold: give it as mask")


def from_diffusers(data: Mapping[str, Any]) -> Foreign | None:
    """A JSON recipe in the words of a diffusers pipeline, or near them (Fooocus's among them); None for an object that is none."""
    names = {key: key if key in Request.model_fields else ALIASES.get(str(key).lower()) for key in data}
    if "prompt" not in names.values() or not {"steps", "guidance_scale", "seed"} & {*names.values()}:
        return None
    found = Found(base_name(data.get("version") or data.get("software") or "diffusers"))
    found.take_prompts(*(next((data[key] for key in data if names[key] == wanted), None) for wanted in ("prompt", "negative_prompt")))
    kinds = dict.fromkeys(_WHOLE, whole) | dict.fromkeys(_FLOATS, number)
    for key, name in names.items():
        value = data[key]
        if key == "clip_skip" and isinstance(value, int) and "num_inference_steps" in data:
            value += 1  # diffusers counts the layers that are left out
        if name in ("image", "mask", "reference"):
            found.need(name, f"it was made from a picture ({key}), which the file does not hold: give it as {name}")
        elif name in kinds and key not in ("size", "resolution"):
            found.take(name, value, kinds[name], said=key)
        elif name in ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3") and isinstance(value, str):
            found.take(name, value)
        elif str(key).lower() in ("model", "base_model", "checkpoint", "model_id", "pretrained_model_name_or_path"):
            found.model = base_name(value)
        elif name not in ("prompt", "negative_prompt", "sampler", "spacing", "batch", "width") and value not in (None, "", [], {}, False):
            found.note(f"{key}: {str(value)[:120]} has no equivalent here")
    _diffusers_size(data, found)
    _diffusers_sampler(data, found)
    return found.done()


def _diffusers_size(data: Mapping[str, Any], found: Found) -> None:
    """Fooocus writes (width, height) as text."""
    both = re.fullmatch(r"\D{0,2}(\d{1,6})\D{1,3}(\d{1,6})\D{0,2}", str(data.get("resolution", data.get("size", ""))))
    if both:
        found.take("width", both[1], whole)
        found.take("height", both[2], whole)


def _diffusers_sampler(data: Mapping[str, Any], found: Found) -> None:
    """The scheduler, as a class's name or as its config."""
    said = data.get("sampler_name") or data.get("sampler") or data.get("scheduler")
    spacing = data.get("scheduler") if data.get("sampler") else data.get("timestep_spacing")
    config = said if isinstance(said, dict) else data.get("scheduler_config")
    if isinstance(config, dict):
        said = config if "_class_name" in config else {**config, "_class_name": str(said)}
    found.take_sampler(said, spacing)
