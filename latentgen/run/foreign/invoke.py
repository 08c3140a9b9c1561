"""InvokeAI's metadata, of today and of old, as fields of a request. Knows its names; no files.

Since 3.0 a file holds `invokeai_metadata`; 2.x wrote `sd-metadata`, and 1.x a command line, `Dream`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from latentgen.run.foreign.compel import take_prompts, take_second
from latentgen.run.foreign.fields import Foreign, Found, base_name, number, whole

_NUMBERS = {"steps": ("steps", whole), "seed": ("seed", whole), "width": ("width", whole), "height": ("height", whole),
            "cfg_scale": ("guidance_scale", number),
            "cfg_rescale_multiplier": ("guidance_rescale", number), "strength": ("strength", number)}
_ADDED = {"loras": "LoRA", "controlnets": "ControlNet", "ipAdapters": "IP-Adapter", "t2iAdapters": "T2I-Adapter", "vae": "VAE",
          "refiner_model": "refiner",
          "control_layers": "control layer", "ref_images": "reference picture"}
_READ = {*_NUMBERS, *_ADDED, "positive_prompt", "negative_prompt", "positive_style_prompt", "negative_style_prompt", "guidance", "clip_skip",
         "scheduler",
         "model", "generation_mode", "init_image", "rand_device", "seamless", "seamless_axes", "seamless_x", "seamless_y", "prompt", "sampler",
         "variations",
         "app_version", "created_by", "type", "t5_encoder", "clip_embed_model", "qwen3_encoder"}  # the last are parts of the model
_FLAGS = {"-s": ("steps", whole), "-S": ("seed", whole), "-W": ("width", whole), "-H": ("height", whole), "-C": ("guidance_scale", number),
          "-f": ("strength", number)}


def from_invoke(data: Mapping[str, Any]) -> Foreign | None:
    """`invokeai_metadata`, from 3.0 on; None for an object that says no prompt."""
    if not isinstance(data.get("positive_prompt"), str):
        return None
    found = Found(f"InvokeAI {str(data.get('app_version') or '')[:20]}".strip())
    take_prompts(found, data["positive_prompt"], data.get("negative_prompt"))
    _numbers(found, data)
    guidance = data.get("guidance")
    if guidance is not None and found.take("guidance_scale", guidance, number) and data.get("cfg_scale") not in (None, 1):
        found.take("true_cfg_scale", data["cfg_scale"], number, said="cfg_scale")
    for side in ("positive", "negative"):
        style = data.get(f"{side}_style_prompt")
        if isinstance(style, str) and style and style != data.get(f"{side}_prompt"):
            take_second(found, "prompt_2" if side == "positive" else "negative_prompt_2", style, said=f"{side}_style_prompt")
    if isinstance(data.get("clip_skip"), int) and data["clip_skip"] > 0:
        found.take("clip_skip", data["clip_skip"] + 1)  # there 0 is the model's own layer
    found.take_sampler(data.get("scheduler"), program="InvokeAI")
    found.model = _name(data.get("model"))
    mode = str(data.get("generation_mode", ""))
    if "img2img" in mode or "inpaint" in mode or "outpaint" in mode or data.get("init_image"):
        found.need("image", "it was made from a picture, which the file does not hold: give it as image")
    if "inpaint" in mode or "outpaint" in mode:
        found.need("mask", "it was made with a mask, which the file does not hold: give it as mask")
    if data.get("rand_device", "cpu") != "cpu":
        found.note("its noise was drawn on the GPU, so this seed gives another picture here")
    _seamless(found, data)
    _additions(found, data)
    return found.done()


def from_old_invoke(data: Mapping[str, Any]) -> Foreign | None:
    """`sd-metadata`, of 2.x; None for an object that says no prompt."""
    image = data.get("image")
    if not isinstance(image, dict):
        return None
    said = image.get("prompt")
    parts = said if isinstance(said, list) else [said]
    texts = [part.get("prompt") if isinstance(part, dict) else part for part in parts]
    if not texts or not isinstance(texts[0], str):
        return None
    found = Found(f"InvokeAI {str(data.get('app_version') or '')[:20]}".strip())
    take_prompts(found, *_split(texts[0]))
    if texts[1:]:
        found.note(f"{len(texts) - 1} more prompts, each with a weight of its own, have no equivalent here")
    _numbers(found, image)
    _variations(found, image.get("variations"))
    found.take_sampler(image.get("sampler"), program="InvokeAI")
    found.model = base_name(data.get("model_weights") or data.get("model") or "")
    if image.get("type") == "img2img":
        found.need("image", "it was made from a picture, which the file does not hold: give it as image")
    _seamless(found, image)
    _additions(found, image)
    return found.done()


def from_dream(text: str) -> Foreign | None:
    """`Dream`, of 1.x: a prompt in quotes and options; None where it cannot be taken apart."""
    try:
        prompt, *words = shlex.split(text[:20_000])
    except ValueError:
        return None
    found = Found("InvokeAI")
    take_prompts(found, *_split(prompt))
    at = 0
    while at < len(words):
        flag, value = words[at][:2], words[at][2:]
        if not value and at + 1 < len(words):
            at, value = at + 1, words[at + 1]
        if flag in _FLAGS:
            found.take(_FLAGS[flag][0], value, _FLAGS[flag][1], said=flag)
        elif flag == "-A":
            found.take_sampler(value, program="InvokeAI")
        elif flag == "-I":
            found.need("image", "it was made from a picture, which the file does not hold: give it as image")
        else:
            found.note(f"the option {flag} {value[:60]} has no equivalent here")
        at += 1
    return found.done()


def _split(prompt: str) -> tuple[str, str]:
    """A prompt in which [..] holds what the picture should not show."""
    negative = re.findall(r"\[([^\[\]]*)\]", prompt)
    return re.sub(r"\s*\[[^\[\]]*\]", "", prompt) if negative else prompt, ", ".join(negative)


def _numbers(found: Found, data: Mapping[str, Any]) -> None:
    for name, (field, kind) in _NUMBERS.items():
        if name in data and not (name == "strength" and data.get("generation_mode") in ("txt2img",)):
            found.take(field, data[name], kind, said=name)


def _variations(found: Found, said: Any) -> None:
    """The first seed that the noise was turned to: one alone has an equivalent here, by A1111's rule, which is near to InvokeAI's."""
    each = [one for one in said if isinstance(one, dict)] if isinstance(said, list) else []
    if each and found.take("variation_strength", each[0].get("weight"), number, said="weight of a variation"):
        found.take("variation_seed", each[0].get("seed"), whole, said="seed of a variation")
        found.note("InvokeAI turns the noise as a whole to that of a variation, here it is turned column by column as in A1111: the picture is near, "
                   "not the same")
    if each[1:]:
        found.note(f"{len(each)} variations were combined there: only the first was taken over")


def _seamless(found: Found, data: Mapping[str, Any]) -> None:
    """Which edges meet, in words of today or of old."""
    axes = data.get("seamless_axes") or ["x", "y"]
    found.take_seamless(*(data.get(f"seamless_{axis}") is True or (data.get("seamless") is True and axis in axes) for axis in "xy"))


def _additions(found: Found, data: Mapping[str, Any]) -> None:
    """A note for each network beside the model, and for each option without an equivalent."""
    for key, kind in _ADDED.items():
        several = data.get(key)
        for one in (several if isinstance(several, list) else [several] if several else [])[:20]:
            model = one.get("model") or one.get("lora") or one.get("control_model") or one if isinstance(one, dict) else one
            weight = f" at {one['weight']}" if isinstance(one, dict) and isinstance(one.get("weight"), (int, float)) else ""
            found.note(f"{kind} {_name(model)!r}{weight} was used, which is not loaded here")
    for key, value in data.items():
        if key not in _READ and value not in (None, "", 0, [], {}, False) and "hash" not in str(key):
            found.note(f"{str(key)[:60]}: {str(value)[:120]} has no equivalent here")


def _name(model: Any) -> str:
    if isinstance(model, dict):
        model = model.get("name") or model.get("model_name") or model.get("key") or ""
    return base_name(model) if isinstance(model, str) else ""
