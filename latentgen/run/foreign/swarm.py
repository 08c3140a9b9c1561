"""SwarmUI's JSON as fields of a request. Knows its names; no files. Its samplers and schedules are ComfyUI's, which it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentgen.run.foreign.fields import Foreign, Found, base_name, number, whole

_NUMBERS = {"steps": ("steps", whole), "cfgscale": ("guidance_scale", number), "seed": ("seed", whole), "width": ("width", whole),
            "height": ("height", whole),
            "sigmashift": ("shift", number), "initimagecreativity": ("strength", number), "variationseedstrength": ("variation_strength", number)}
_SEAMLESS = {"true": "both", "x-only": "x", "y-only": "y"}
_READ = {*_NUMBERS, "prompt", "negativeprompt", "model", "sampler", "scheduler", "comfyuisampler", "comfyuischeduler", "variationseed",
         "clipstopatlayer",
         "seamlesstileable", "fluxguidancescale", "initimage", "maskimage", "loras", "loraweights"}
_SILENT = {"swarm_version", "date", "generation_time", "aspectratio", "automaticvae", "images", "nopreviews", "imageformat", "donotsave", "batchsize",
           "wildcardseed", "outputintermediateimages"}  # they say nothing of one picture


def from_swarm(data: Mapping[str, Any]) -> Foreign | None:
    """`sui_image_params`; None for an object without it."""
    said = data.get("sui_image_params")
    if not isinstance(said, dict) or not isinstance(said.get("prompt"), str):
        return None
    found = Found(f"SwarmUI {str(said.get('swarm_version') or '')[:20]}".strip())
    found.take_prompts(said["prompt"], said.get("negativeprompt"))
    for name, (field, kind) in _NUMBERS.items():
        found.take(field, said.get(name), kind, said=name)
    if "variation_strength" in found.fields:
        found.take("variation_seed", said.get("variationseed"), whole, said="variationseed")
    if found.take("guidance_scale", said.get("fluxguidancescale"), number, said="fluxguidancescale") and said.get("cfgscale") not in (None, 1):
        found.take("true_cfg_scale", said["cfgscale"], number, said="cfgscale")
    layer = said.get("clipstopatlayer")
    found.take("clip_skip", None if layer is None else -layer if isinstance(layer, int) else layer, whole, said="clipstopatlayer")
    found.take_sampler(said.get("sampler") or said.get("comfyuisampler"), said.get("scheduler") or said.get("comfyuischeduler"), program="ComfyUI")
    if str(said.get("seamlesstileable", "false")).lower() != "false":
        found.take("seamless", _SEAMLESS.get(str(said["seamlesstileable"]).lower()), said="seamlesstileable")
    found.model = base_name(said.get("model") or "")
    for name, picture in (("initimage", "image"), ("maskimage", "mask")):
        if said.get(name):
            found.need(picture, f"it was made from a picture ({name}), which the file does not hold: give it as {picture}")
    _rest(said, found)
    return found.done()


def _rest(said: Mapping[str, Any], found: Found) -> None:
    """A note on each network beside the model, and on each setting without an equivalent."""
    loras, weights = (said.get(name) if isinstance(said.get(name), list) else [said[name]] if said.get(name) else []
                      for name in ("loras", "loraweights"))
    for at, name in enumerate(loras[:20]):
        found.note(f"LoRA {base_name(name)!r} at {str(weights[at] if at < len(weights) else 1)[:20]} was used, which is not loaded here")
    for name, value in said.items():
        if name not in _READ | _SILENT and value not in (None, "", [], {}, False):
            found.note(f"{name}: {str(value)[:120]} has no equivalent here")
