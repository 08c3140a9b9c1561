"""A1111's `parameters` text: prompt, negative prompt and one line of settings, which most programs read. Knows that text; no file and no request.

    a red heart
    Negative prompt: blurred
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1234, Size: 512x512, Model: name, Version: latentgen 0.1.0
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from latentgen.diffusion.names import SAMPLER_NAMES, SPACING_NAMES
from latentgen.run.foreign.guiders import settings_of
from latentgen.run.foreign.hires import WORDS
from latentgen.run.passes import upscale_steps

NEGATIVE = "Negative prompt:"
MAX_SETTINGS = 2**16  # letters of the line of settings that are read
_SETTING = re.compile(r'(\w[\w \-/]{0,60}):[ \t]*("(?:\\.|[^\\"])*"(?=\s*(?:,|$))|[^,]*)')
_TILING = {"both": {"Tiling": True}, "x": {"Tile X": True}, "y": {"Tile Y": True}}  # one side alone in the words of an extension
_JSON = json.JSONDecoder()
_SAMPLERS = {ours.sampler: label for label, ours in reversed(SAMPLER_NAMES["A1111"].items()) if ours.sampler}  # of several names the first
_SPACINGS = {ours.spacing: label for label, ours in reversed(SPACING_NAMES["A1111"].items()) if ours.spacing} | {
    "linspace": "Uniform", "normal": "Normal", "trailing": "SGM Uniform"}  # the nearest
_AXES = {"seed": "Seed", "steps": "Steps", "guidance_scale": "CFG Scale", "image_guidance_scale": "Image CFG Scale", "sampler": "Sampler",
         "spacing": "Schedule type", "strength": "Denoising", "clip_skip": "Clip skip", "eta": "Eta", "prompt": "Prompt S/R"}


@dataclass(frozen=True)
class Parameters:
    """What such a text says: both prompts as they stand, and the settings as text, in their order."""

    prompt: str
    negative_prompt: str
    settings: Mapping[str, str]


def write_parameters(recipe: Mapping[str, Any], *, size: tuple[int, int] | None = None) -> str:
    """A recipe as other programs read it.

    The text has no way to tell a prompt's own line "Negative prompt:" from the one that ends the prompt; such a line gets a space before its colon,
    which CLIP reads as the same tokens.

    Args:
        recipe: see `latentgen.run.recipe.make_recipe`.
        size: width and height of the picture in pixels; with a second pass the recipe tells that of the first.
    """
    built_in = "true_cfg_scale" in recipe  # then guidance_scale is what Forge calls distilled
    second = {"upscale", "upscaler", "width"} <= {*recipe} and "denoising_end" not in recipe  # A1111 has no second pass of an edit
    width, height = size if size is not None and not second else (recipe.get("width"), recipe.get("height"))
    said = {
        "Steps": recipe.get("steps"), "Sampler": _SAMPLERS.get(str(recipe.get("sampler")), recipe.get("sampler")),
        "Schedule type": _SPACINGS.get(str(recipe.get("spacing")), recipe.get("spacing")),
        "CFG scale": recipe["true_cfg_scale"] if built_in else recipe.get("guidance_scale"),
        "Distilled CFG Scale": recipe.get("guidance_scale") if built_in else None, "Image CFG scale": recipe.get("image_guidance_scale"),
        "Seed": recipe.get("seed"), "Size": f"{width}x{height}" if width and height else None, "Model": recipe.get("model"),
        "Variation seed": recipe.get("variation_seed"), "Variation seed strength": recipe.get("variation_strength"),
        "Seed resize from": f"{recipe['seed_width']}x{recipe['seed_height']}" if "seed_width" in recipe else None,
        "Denoising strength": recipe.get("upscale_strength") if second else recipe.get("strength"), **(_hires(recipe) if second else {}),
        "Tile": recipe.get("tile"), **_TILING.get(str(recipe.get("seamless")), {}), "Clip skip": recipe.get("clip_skip"), "Eta": recipe.get("eta"),
        "Shift": recipe.get("shift"),
        "Token merging ratio": recipe.get("approximate", {}).get("token_merging", {}).get("ratio"),
        "CFG Rescale phi": recipe.get("guidance_rescale") or None, "Version": f"latentgen {recipe.get('versions', {}).get('latentgen', '')}".strip(),
    }
    said |= settings_of(recipe.get("guiders") or {})
    said |= _script(recipe.get("grid")) | _template(recipe) | _emphasis(recipe)
    settings = ", ".join(f"{name}: {_quoted(value)}" for name, value in said.items() if value is not None)
    negative = str(recipe.get("negative_prompt", ""))
    return "\n".join([_safe(str(recipe.get("prompt", ""))), *([f"{NEGATIVE} {_safe(negative)}"] if negative else []), settings])


def _emphasis(recipe: Mapping[str, Any]) -> dict[str, str]:
    """How brackets were read, where A1111 has a word for it and would read them otherwise."""
    words = f"{recipe.get('prompt', '')} {recipe.get('negative_prompt', '')}"
    if not any(bracket in words for bracket in "()[]"):
        return {}
    said = "None" if recipe.get("dialect") == "plain" else {"a1111_no_norm": "No norm"}.get(str(recipe.get("weighting")))
    return {"Emphasis": said} if said else {}


def _template(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What the words were made of, by the names that programs with wildcards and styles have for it."""
    said = recipe.get("template") if isinstance(recipe.get("template"), Mapping) else {}
    told = {"Template": said.get("prompt"), "Negative Template": said.get("negative_prompt"),
            "Styles": ", ".join(map(str, recipe.get("styled_with", ())))}
    return {name: str(value) for name, value in told.items() if value}


def read_parameters(text: str) -> Parameters | None:
    """The parts of such a text, None where it has no line of settings. Prompts are kept letter by letter.

    Time grows linearly with the text.
    """
    lines = text.rstrip().split("\n")
    known = ((n, settings) for n in range(len(lines) - 1, -1, -1) if (settings := _settings(lines[n])))
    at, settings = next(known, (0, {}))
    if not settings:
        return None
    split = next((n for n in range(at) if lines[n].lstrip().startswith(NEGATIVE)), at)
    negative = lines[split:at]
    if negative:
        negative[0] = negative[0].lstrip().removeprefix(NEGATIVE).removeprefix(" ")
    return Parameters("\n".join(lines[:split]), "\n".join(negative), settings)


def _hires(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A second pass as A1111 writes it, whose count of its steps is of those that are run."""
    steps = recipe.get("upscale_steps") or upscale_steps(int(recipe.get("steps") or 1), float(recipe.get("upscale_strength") or 1))
    upscaler = WORDS.get(str(recipe.get("upscaler")), recipe.get("upscaler"))
    return {"Hires upscale": recipe.get("upscale"), "Hires steps": steps, "Hires upscaler": upscaler}


def _script(grid: Any) -> dict[str, str]:
    """A sheet's axes as A1111's "X/Y/Z plot" writes them."""
    found = {"Script": "X/Y/Z plot"} if grid else {}
    for letter, (name, values) in zip("XY", grid["axes"] if grid else (), strict=False):
        found |= {f"{letter} Type": _AXES.get(name, name), f"{letter} Values": ", ".join(_quoted(value) for value in values)}
    return found


def _settings(line: str) -> dict[str, str]:
    """The settings of a line that is one: at least three, or the steps first."""
    if ":" not in line or len(line) > MAX_SETTINGS:
        return {}
    found, at = {}, 0
    while match := _SETTING.search(line, at):
        key, value, at = match[1].strip(), match[2].strip(), match.end()
        if value[:1] in ("{", "["):  # hashes and resources are written as bare JSON, with commas and colons of its own
            with suppress(ValueError, RecursionError):
                at = _JSON.raw_decode(line, line.index(value[0], match.start(2)))[1]
                value = line[match.start(2):at].strip()
        found[key] = _unquoted(value)
    first = line.lstrip().startswith("Steps: ")
    return found if found.get("Steps", "").isdigit() and (first or len(found) >= 3) else {}


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def _unquoted(text: str) -> str:
    if text.startswith('"'):
        with suppress(ValueError):
            return str(json.loads(text))
    return text


def _safe(prompt: str) -> str:
    return "\n".join(line.replace(NEGATIVE, "Negative prompt :", 1) if line.lstrip().startswith(NEGATIVE) else line for line in prompt.split("\n"))
