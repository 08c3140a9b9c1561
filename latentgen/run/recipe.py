"""The recipe: everything that reproduces a picture, as plain data for its file. Knows plans; no paths and no secrets go in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL import Image

    from latentgen.run.plan import Plan

KEY = "latentgen"
SAID = ("width", "height", "left", "right", "top", "bottom", "feather", "shift", "fit", "batch", "prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3",
        "true_cfg_scale", "image_guidance_scale", "original_size", "crop_top_left", "target_size", "negative_original_size", "negative_crop_top_left",
        "negative_target_size", "aesthetic_score", "negative_aesthetic_score", "denoising_start", "denoising_end")


def make_recipe(plan: Plan, digest: str, notes: tuple[str, ...]) -> dict[str, Any]:
    """The request with every default filled in, the model's digest, versions and notes; JSON-ready. Source pictures are named by hash only.

    Every key that a `Request` has too may be given back to one as it is: with the same pictures, that makes the same picture.
    """
    request = plan.request
    recipe: dict[str, Any] = {
        "task": plan.task, "model": plan.model, "weights": digest, "prompt": request.prompt, "negative_prompt": request.negative_prompt,
        "steps": plan.asked_steps, "sampler": plan.sampler, "spacing": plan.spacing, "guidance_scale": plan.guidance_scale,
        "guidance_rescale": plan.guidance_rescale, "guidance_interval": list(plan.guidance_interval), "seed": plan.seeds[0], **plan.options}
    recipe |= {"width": plan.width, "height": plan.height} if plan.source is None else {}
    recipe |= {n: list(v) if isinstance(v, tuple) else v for n in SAID if (v := getattr(request, n)) is not None and v != 0 and v != "" and n not in recipe}
    recipe |= {"clip_skip": request.clip_skip} if request.clip_skip > 1 else {}
    recipe |= {"reference_sha256": [_hash(picture) for picture in plan.references]} if plan.references else {}
    recipe |= {"latents_sha256": hashlib.sha256(request.latents.float().cpu().numpy().tobytes()).hexdigest()} if request.latents is not None else {}
    if not request.strict:
        recipe["strict"] = False  # what was ignored with a note would else be refused
    if plan.source is not None:
        recipe |= {"image_sha256": _hash(plan.source.image)} | ({} if plan.task == "outpaint" else {"strength": plan.strength})
        if plan.source.mask is not None:
            recipe["mask_sha256"] = hashlib.sha256(plan.source.mask.numpy().tobytes()).hexdigest()
    try:
        ours = version("latentgen")
    except PackageNotFoundError:
        ours = "source"
    recipe |= {"dtype": plan.dtype, "device": plan.device.split(":")[0], "versions": {"latentgen": ours, "torch": torch.__version__}, "notes": list(notes)}
    return recipe


def metadata(recipe: Mapping[str, Any], seed: int) -> dict[str, str]:
    """What goes into one picture's file: the recipe with that picture's own seed and a batch of one."""
    own = {k: v for k, v in recipe.items() if k != "batch"} | {"seed": seed}
    return {KEY: json.dumps(own, ensure_ascii=False, sort_keys=True)}


def _hash(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
