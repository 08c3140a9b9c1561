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
SAID = ("width", "height", "left", "right", "top", "bottom", "feather", "shift", "fit", "batch")


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
    recipe |= {n: getattr(request, n) for n in SAID if getattr(request, n) and n not in recipe}
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
