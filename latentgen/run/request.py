"""What the user said, nothing else. Knows names and ranges; knows no model, so it cannot tell whether a model honours them (the plan does)."""

from __future__ import annotations

import difflib
import math
from numbers import Real
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from latentgen.conditioning.prompt import check_text, shown
from latentgen.errors import RequestError

EXPECTED = {
    "width": "a whole number of pixels from 8 to 8192", "height": "a whole number of pixels from 8 to 8192",
    "steps": "a whole number from 1 to 1000", "guidance_scale": "a number from 0 to 100 (1 turns guidance off)",
    "guidance_rescale": "a number from 0 to 1", "guidance_interval": "two numbers, low and high, 0 <= low < high <= 1 (1 is noise)",
    "strength": "a number above 0 and up to 1", "eta": "a number from 0 to 1", "shift": "a number from 0.01 to 100",
    "seed": "a whole number from 0 to 2**63 - 1", "batch": "a whole number from 1 to 64", "sampler": "a sampler's name", "spacing": "a spacing's name",
    "feather": "a whole number of pixels from 0 to 512", "strict": "True or False", "fit": "'resize' or nothing",
} | {side: "a whole number of pixels from 0 to 4096" for side in ("left", "right", "top", "bottom")}

ALIASES = {  # what diffusers, A1111, ComfyUI and InvokeAI call it
    "num_inference_steps": "steps", "sampling_steps": "steps", "cfg": "guidance_scale", "cfg_scale": "guidance_scale", "guidance": "guidance_scale",
    "n_iter": "batch", "batch_size": "batch", "num_images_per_prompt": "batch", "num_images": "batch", "n": "batch", "iterations": "batch",
    "denoising_strength": "strength", "denoise": "strength", "sampler_name": "sampler", "sampler_index": "sampler", "scheduler": "sampler",
    "positive": "prompt", "positive_prompt": "prompt", "text": "prompt", "negative": "negative_prompt", "init_image": "image", "input_image": "image",
    "init_images": "image", "mask_image": "mask", "generator": "seed", "noise_seed": "seed", "sigmas": "spacing", "timestep_spacing": "spacing",
    "cfg_rescale": "guidance_rescale", "rescale_cfg": "guidance_rescale", "w": "width", "h": "height", "size": "width", "resolution": "width",
    "callback": "on_step", "callback_on_step_end": "on_step",
}


class Request(BaseModel):
    """Everything a caller may say about one picture (or one batch). Frozen; change it with `request.replace(steps=30)`.

    Fields left at None take the model's default. Sizes are in pixels. Without an image it is txt2img; with one img2img; with a mask inpaint;
    with any of left/right/top/bottom outpaint.

    Attributes:
        prompt, negative_prompt: any length; long ones are read in chunks, never cut.
        width, height: multiples of the model's unit; by default the image's size, or the model's.
        steps: how many levels the denoiser visits.
        guidance_scale: classifier-free guidance; 1 is off (Ho and Salimans 2022).
        guidance_rescale: 0 to 1 (Lin et al. 2023). guidance_interval: part of the path, 0 clean to 1 noise (Kynkaanniemi et al. 2024).
        eta: noise of the DDIM sampler, 0 to 1. shift: shift of the levels (1 is none).
        seed: picture i of a batch uses seed + i; None draws one and reports it.
        image, mask: PIL picture, path, bytes, array or tensor; white in the mask is repainted.
        strength: share of the steps that an edit runs, above 0 to 1.
        left, right, top, bottom: pixels that outpaint adds. feather: soft rim of the outpaint mask.
        fit: "resize" lets a mask or image of another size be resized.
        strict: False turns what a model cannot honour into a note.

    Raises:
        RequestError: an unknown name (with a suggestion) or a value out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    prompt: str
    negative_prompt: str = ""
    width: int | None = Field(None, ge=8, le=8192)
    height: int | None = Field(None, ge=8, le=8192)
    steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    guidance_rescale: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    guidance_interval: tuple[float, float] | None = None
    sampler: str | None = Field(None, min_length=1)
    spacing: str | None = Field(None, min_length=1)
    eta: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    shift: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    batch: int = Field(1, ge=1, le=64)
    image: Any = None
    mask: Any = None
    strength: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    left: int = Field(0, ge=0, le=4096)
    right: int = Field(0, ge=0, le=4096)
    top: int = Field(0, ge=0, le=4096)
    bottom: int = Field(0, ge=0, le=4096)
    feather: int = Field(0, ge=0, le=512)
    fit: str | None = Field(None, pattern="^resize$")
    strict: bool = True

    def __init__(self, **said: Any) -> None:
        said = {name: value.item() if isinstance(value, np.generic) else value for name, value in said.items()}  # np.int64(20) is 20
        for name in ("prompt", "negative_prompt"):
            if name in said or name == "prompt":
                check_text(said.get(name), name=name)
        try:
            super().__init__(**said)
        except ValidationError as error:
            raise RequestError(_sentence(error)) from None

    @field_validator("guidance_interval", mode="before")
    @classmethod
    def _interval(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(v, Real) and not isinstance(v, bool) for v in value):
            raise ValueError("not two numbers")
        low, high = value
        if not (math.isfinite(low) and math.isfinite(high) and 0 <= low < high <= 1):
            raise ValueError("out of range")
        return (float(low), float(high))

    @property
    def task(self) -> str:
        """"txt2img", "img2img", "inpaint" or "outpaint"."""
        if any((self.left, self.right, self.top, self.bottom)):
            return "outpaint"
        if self.mask is not None:
            return "inpaint"
        return "img2img" if self.image is not None else "txt2img"

    def replace(self, **changes: Any) -> Request:
        """A copy with some fields changed, checked again."""
        return Request(**{name: getattr(self, name) for name in self.model_fields_set} | changes)


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"{name!r} is not a known option: {suggestion(name)}"
    return f"{name} is {shown(first['input'])}: expected {EXPECTED.get(name, first['msg'])}"


def suggestion(name: str) -> str:
    """What an unknown option was probably meant to be."""
    meant = ALIASES.get(name.lower())
    if meant is None:
        near = difflib.get_close_matches(name.lower(), Request.model_fields, n=1, cutoff=0.6)
        meant = near[0] if near else None
    options = ", ".join(Request.model_fields)
    return f"did you mean {meant!r}?" if meant else f"the options are {options}"
