"""What the user said, nothing else. Knows names and ranges; knows no model, so it cannot tell whether a model honours them (the plan does)."""

from __future__ import annotations

import difflib
import math
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from latentgen.conditioning.prompt import check_text, shown
from latentgen.diffusion.sample import SAMPLERS
from latentgen.diffusion.table import spread
from latentgen.errors import RequestError

SEED = "a whole number from 0 to 2**63 - 1, or a list of 1 to 64 of them"
EXPECTED = {
    "width": "a whole number of pixels from 8 to 8192", "height": "a whole number of pixels from 8 to 8192",
    "steps": "a whole number from 1 to 1000", "guidance_scale": "a number from 0 to 100 (1 turns guidance off)",
    "guidance_rescale": "a number from 0 to 1", "guidance_interval": "two numbers, low and high, 0 <= low < high <= 1 (1 is noise)",
    "strength": "a number above 0 and up to 1", "eta": "a number from 0 to 1", "shift": "a number from 0.01 to 100",
    "seed": SEED, "variation_seed": SEED, "variation_strength": "a number from 0 (off) to 1",
    "batch": "a whole number from 1 to 64", "sampler": "a sampler's name", "spacing": "a spacing's name",
    "true_cfg_scale": "a number from 1 (off) to 100", "image_guidance_scale": "a number from 0 to 100",
    "clip_skip": "a whole number from 1 (off) to 12",
    "denoising_start": "a number above 0 and below 1", "denoising_end": "a number above 0 and below 1",
    "aesthetic_score": "a number from 0 to 10", "negative_aesthetic_score": "a number from 0 to 10",
    "guiders": "a guider's name, several in a list, or names with options, as {'apg': {'eta': 0.2}}",
    "classifier": "something to call, as (x, level) -> log p of each picture",
    "sampler_options": "names with numbers or words, as {'s_churn': 10}",
    "approximate": "names of approximations, alone or with options, as 'deep_cache' or {'first_block': {'threshold': 0.1}}",
    "latents": "a tensor (batch, channels, height, width) of finite numbers, such as another result's .latents",
    "dialect": "'a1111', 'comfy' or 'plain' (nothing is syntax)", "weighting": "'a1111', 'a1111_no_norm' or 'comfy'",
    "blend": "a number from 0 (prompt) to 1 (blend_prompt)",
    "styles": "names of styles, as ['cinematic']", "styles_file": "a TOML file with a table for each style",
    "wildcards": "a folder of word lists, or False to draw nothing",
    "upscale": "a number from 1.05 to 4", "upscaler": "an upscaler's name", "upscale_strength": "a number above 0 and up to 1",
    "upscale_steps": "a whole number from 1 to 1000", "tile": "a whole number of pixels from 16 to 8192",
    "seamless": "'x', 'y' or 'both'",
    "vae_tile": "a whole number of pixels from 64 to 4096", "split_guidance": "True or False",
    "feather": "a whole number of pixels from 0 to 512", "strict": "True or False", "fit": "'resize' or nothing",
} | {side: "a whole number of pixels from 0 to 4096" for side in ("left", "right", "top", "bottom")}
EXPECTED |= {side: "a whole number of pixels from 8 to 8192, a multiple of the model's latents" for side in ("seed_width", "seed_height")}
PAIRS = ("original_size", "crop_top_left", "target_size", "negative_original_size", "negative_crop_top_left", "negative_target_size")
EXPECTED |= {name: "two whole numbers, height and width (or y and x), from 0 to 16384" for name in PAIRS}
SEEDS = ("seed", "variation_seed")
PROMPTS = ("prompt", "negative_prompt", "blend_prompt", "prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3")

ALIASES = {  # what diffusers, A1111, ComfyUI and InvokeAI call it
    "num_inference_steps": "steps", "sampling_steps": "steps", "cfg": "guidance_scale", "cfg_scale": "guidance_scale", "guidance": "guidance_scale",
    "n_iter": "batch", "batch_size": "batch", "num_images_per_prompt": "batch", "num_images": "batch", "n": "batch", "iterations": "batch",
    "denoising_strength": "strength", "denoise": "strength", "sampler_name": "sampler", "sampler_index": "sampler", "scheduler": "sampler",
    "positive": "prompt", "positive_prompt": "prompt", "text": "prompt", "negative": "negative_prompt", "init_image": "image", "input_image": "image",
    "init_images": "image", "mask_image": "mask", "generator": "seed", "noise_seed": "seed", "seeds": "seed", "all_seeds": "seed",
    "subseed": "variation_seed", "subseed_strength": "variation_strength", "variation_amount": "variation_strength",
    "with_variations": "variation_seed",
    "all_subseeds": "variation_seed", "variation_seed_strength": "variation_strength", "seed_resize_from_w": "seed_width",
    "seed_resize_from_h": "seed_height",
    "sigmas": "spacing", "timestep_spacing": "spacing",
    "cfg_rescale": "guidance_rescale", "rescale_cfg": "guidance_rescale", "w": "width", "h": "height", "size": "width", "resolution": "width",
    "hr_scale": "upscale", "upscale_by": "upscale", "scale_by": "upscale", "upscale_factor": "upscale", "enable_hr": "upscale",
    "hires_fix": "upscale",
    "hr_upscaler": "upscaler", "upscale_method": "upscaler", "hires_upscaler": "upscaler", "hr_second_pass_steps": "upscale_steps",
    "hires_steps": "upscale_steps",
    "hr_denoising_strength": "upscale_strength", "hires_strength": "upscale_strength", "tile_size": "tile", "tile_width": "tile",
    "tile_height": "tile",
    "tiling": "seamless", "tileable": "seamless", "seamless_x": "seamless", "seamless_y": "seamless", "circular": "seamless",
    "seamless_axes": "seamless",
    "callback": "on_step", "callback_on_step_end": "on_step", "clipskip": "clip_skip", "crops_coords_top_left": "crop_top_left",
    "reference_image": "reference", "ip_image": "reference", "control_image": "reference", "high_noise_frac": "denoising_end",
    "true_cfg": "true_cfg_scale",
    "guider": "guiders", "clip_guidance": "classifier", "cond_fn": "classifier", "pag_scale": "guiders", "pag_applied_layers": "guiders",
    "skip_guidance_layers": "guiders",
    "skip_layer_guidance_scale": "guiders", "apg_momentum": "guiders", "apg_eta": "guiders", "use_cfg_zero_star": "guiders",
    "thresholding": "guiders",
    "image_cfg_scale": "image_guidance_scale", "parser": "dialect", "emphasis": "weighting", "conditioning_to_strength": "blend",
    "conditioning_to": "blend_prompt", "prompt_to": "blend_prompt", "prompt_weighting": "weighting", "distilled_guidance": "guidance_scale",
    "distilled_cfg_scale": "guidance_scale",
    "cache": "approximate", "cache_config": "approximate", "first_block_cache": "approximate", "teacache": "approximate", "taylorseer": "approximate",
    "deepcache": "approximate", "tome": "approximate", "tome_ratio": "approximate", "token_merging_ratio": "approximate",
}

_NOT_YET = ("lora", "loras", "lora_weights", "lora_scale", "lora_path", "controlnet", "control_net", "controlnet_conditioning_scale", "ip_adapter",
            "ip_adapter_image", "ip_adapter_image_embeds", "ip_adapter_scale", "freeu", "embeddings", "embedding", "textual_inversion",
            "hypernetwork", "hypernetworks", "t2i_adapter")
_LOAD = "it is of the model, so pass it to latentgen.load(...)"
_RUNS = "it belongs to the calls that make pictures of one request, and to `stream`, so leave it out here"
_WORDS = "texts are encoded here, so pass prompt and negative_prompt"
ELSEWHERE = dict.fromkeys(("device", "dtype", "torch_dtype", "quantise", "quantize", "tuned", "speed", "compile", "cuda_graphs", "attention",
                           "attention_backend", "residency", "model",
                           "checkpoint", "vae"), _LOAD) | {
    "memory": "it is of latentgen.load(...) and pipe.plan(...), so pass it there",
    "prompt_embeds": _WORDS, "negative_prompt_embeds": _WORDS, "pooled_prompt_embeds": _WORDS, "negative_pooled_prompt_embeds": _WORDS,
    "output_type": "a result has .images and .latents both, so leave it out", "return_dict": "a result is always an object, so leave it out",
    **dict.fromkeys(_NOT_YET, "latentgen does not have it yet, so leave it out"),
    "save_state": _RUNS, "save_every": _RUNS, "fps": "it is of the film that is saved, so pass it to film.save(...)",
}


class Request(BaseModel):
    """Everything a caller may say about one picture (or one batch). Frozen; change it with `request.replace(steps=30)`.

    Fields left at None take the model's default. Sizes are in pixels. Without an image it is txt2img; with one img2img; with a mask inpaint;
    with any of left/right/top/bottom outpaint; with a reference alone edit.

    Attributes:
        prompt, negative_prompt: any length; long ones are read in chunks, never cut.
        width, height: multiples of the model's unit; by default the image's size, or the model's.
        steps: how many levels the denoiser visits.
        guidance_scale: classifier-free guidance; 1 is off (Ho and Salimans 2022).
        guidance_rescale: 0 to 1 (Lin et al. 2023). guidance_interval: part of the path, 0 clean to 1 noise (Kynkaanniemi et al. 2024).
        guiders: what acts beside the plain rule of guidance (`latentgen guiders` lists them): "apg", ["apg", "slg"] or {"apg": {"eta": 0.2}}.
        classifier: (x, level) -> log p(y | x), (B,), differentiable, for the guider of that name (Dhariwal and Nichol 2021). x is noisy latents (B,
            c, h, w); with an attribute `of` = "x0" the clean estimate, "pixels" what that looks like, (B, 3, H, W) in [-1, 1]. See
            `latentgen.clip_guidance`.
        sampler_options: what the sampler takes beside (`latentgen samplers NAME` lists it), as {"s_churn": 10}.
        eta: noise of the DDIM sampler and the ancestral ones, 0 to 1. shift: shift of the levels (1 is none).
        seed: picture i of a batch uses seed + i, or a list says each; None draws one and reports it.
        variation_strength: 0 to 1, how far the noise is turned to that of `variation_seed` (A1111's variation seed). Then all pictures of a batch
            have the same seed, and picture i the variation seed + i, or a list says each.
        seed_width, seed_height: another size, whose noise stands in the middle of this picture's (A1111's seed resize), which keeps something of the
            picture that the seed gives there.
        image, mask: PIL picture, path, bytes, array or tensor; white in the mask is repainted.
        strength: share of the steps that an edit runs, above 0 to 1.
        left, right, top, bottom: pixels that outpaint adds. feather: soft rim of the outpaint mask.
        dialect: how prompts are read: "a1111" ((word:1.3), [from:to:0.4], [a|b], AND, BREAK), "comfy" ((word:1.3)) or "plain" (nothing is syntax).
        styles: saved prompt templates of `styles_file` (TOML, a table with `prompt` and `negative` for each), laid over the texts in this order.
        wildcards: the folder of the word lists that __name__ draws a line of. {a|b} is drawn without one; False leaves both as text. Each picture of
            a batch draws by its own seed, in the dialects a1111 and comfy.
        weighting: by which rule weights hold: "a1111", "a1111_no_norm" or "comfy"; None takes that of the dialect.
        blend_prompt: words towards which those of `prompt` are turned, by the share `blend`, 0 to 1 (0.5 where none is said): every token's state,
            and the pooled vector, along the sphere. Schedules are kept on both sides; AND is not.
        prompt_2, prompt_3, negative_prompt_2, negative_prompt_3: other words for a model's second and third text encoder.
        clip_skip: 1 is the layer that the model uses, 2 the one before it (A1111's count).
        reference: a picture, or several, that a model for editing by instruction looks at.
        true_cfg_scale: classifier-free guidance beside the guidance that a distilled model has built in; 1 is off.
        image_guidance_scale: how far an edit by instruction holds to its picture (Brooks et al. 2023).
        original_size, crop_top_left, target_size (and negative_...): size and crop that the model is told, (height, width) or (y, x) (Podell et al.
        2023).
        aesthetic_score, negative_aesthetic_score: what a refiner is told.
        denoising_end: stop where this share of the noise path is done and leave the rest to another model; its `latents` and the same number as
            `denoising_start` go on from there.
        latents: (batch, c, h, w), the start of a run with denoising_start.
        approximate: what is left out for speed, never by default: "deep_cache", a list, or {"first_block": {"threshold": 0.1}} (docs/approximate.md);
            {} for nothing, where a pipeline was loaded with tuned=True.
        upscale: 1.05 to 4, a second pass at this many times the size: what the first one made is enlarged, noised and denoised once more.
        upscaler: how it is enlarged: "latent" (in latent space, linearly), "latent_bicubic", "latent_nearest", "lanczos" or "nearest" (decoded, as a
            picture, and encoded again). upscale_strength: share of the levels that the second pass runs, above 0 to 1. upscale_steps: how many levels
            it visits; None takes that share of `steps`.
        tile: side in pixels of overlapping windows in which a larger picture is denoised, each a picture of its own to the network (Bar-Tal et al.
            2023). None: the whole picture at once, unless a second pass is more than 4 times the model's own area.
        seamless: "x", "y" or "both": the picture's left and right edges, its top and bottom ones, or all meet, so that copies of it lie side by side.
        vae_tile: side in pixels of the tiles in which the autoencoder works; by default tiles of 768 above a megapixel.
        split_guidance: the evaluations of guidance one after the other, not in one call: slower, in less memory.
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
    guiders: dict[str, dict[str, Any]] | None = None
    classifier: Any = None
    sampler: str | None = Field(None, min_length=1)
    spacing: str | None = Field(None, min_length=1)
    sampler_options: dict[str, float | int | str] | None = None
    eta: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    shift: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    seed: int | tuple[int, ...] | None = None
    variation_seed: int | tuple[int, ...] | None = None
    variation_strength: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    seed_width: int | None = Field(None, ge=8, le=8192)
    seed_height: int | None = Field(None, ge=8, le=8192)
    batch: int = Field(1, ge=1, le=64)
    image: Any = None
    mask: Any = None
    strength: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    left: int = Field(0, ge=0, le=4096)
    right: int = Field(0, ge=0, le=4096)
    top: int = Field(0, ge=0, le=4096)
    bottom: int = Field(0, ge=0, le=4096)
    feather: int = Field(0, ge=0, le=512)
    upscale: float | None = Field(None, ge=1.05, le=4, allow_inf_nan=False)
    upscaler: str | None = Field(None, min_length=1)
    upscale_strength: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    upscale_steps: int | None = Field(None, ge=1, le=1000)
    tile: int | None = Field(None, ge=16, le=8192)
    seamless: str | None = Field(None, pattern="^(x|y|both)$")
    fit: str | None = Field(None, pattern="^resize$")
    dialect: str = Field("a1111", pattern="^(a1111|comfy|plain)$")
    weighting: str | None = Field(None, pattern="^(a1111|a1111_no_norm|comfy)$")
    blend_prompt: str | None = None
    blend: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    styles: tuple[str, ...] = ()
    styles_file: str | Path | None = None
    wildcards: str | Path | bool | None = None
    prompt_2: str = ""
    prompt_3: str = ""
    negative_prompt_2: str = ""
    negative_prompt_3: str = ""
    clip_skip: int = Field(1, ge=1, le=12)
    reference: Any = None
    true_cfg_scale: float | None = Field(None, ge=1, le=100, allow_inf_nan=False)
    image_guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    original_size: tuple[int, int] | None = None
    crop_top_left: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crop_top_left: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    aesthetic_score: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    negative_aesthetic_score: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    denoising_start: float | None = Field(None, gt=0, lt=1, allow_inf_nan=False)
    denoising_end: float | None = Field(None, gt=0, lt=1, allow_inf_nan=False)
    latents: Any = None
    approximate: dict[str, dict[str, float | int | str]] | None = None
    vae_tile: int | None = Field(None, ge=64, le=4096)
    split_guidance: bool = False
    strict: bool = True

    def __init__(self, **said: Any) -> None:
        said = {name: value.item() if isinstance(value, np.generic) else value for name, value in said.items()}  # np.int64(20) is 20
        listed = {len(said[name]) for name in SEEDS if isinstance(said.get(name), (list, tuple, range))}
        if len(listed) == 1 and "batch" not in said:
            said["batch"] = listed.pop()
        for name in PROMPTS:
            if said.get(name) is not None or name == "prompt" or (name in said and name != "blend_prompt"):
                check_text(said.get(name), name=name)
        try:
            super().__init__(**said)
        except ValidationError as error:
            raise RequestError(_sentence(error)) from None

    @field_validator(*SEEDS, mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        if value is None:
            return None
        several = isinstance(value, (list, tuple, range))
        each = tuple(one.item() if isinstance(one, np.integer) else one for one in (value if several else [value]))
        if not 1 <= len(each) <= 64 or not all(type(one) is int and 0 <= one < 2**63 for one in each):
            raise ValueError("not seeds")
        return each if several else each[0]

    @field_validator("styles", mode="before")
    @classmethod
    def _styles(cls, value: Any) -> Any:
        names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else None
        if names is None or not all(isinstance(name, str) and name for name in names):
            raise ValueError("no names")
        return names

    @field_validator("wildcards", "styles_file", mode="before")
    @classmethod
    def _place(cls, value: Any) -> Any:
        if value is True or (isinstance(value, str) and not value.strip()):
            raise ValueError("no place")
        return value

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

    @field_validator("guiders", mode="before")
    @classmethod
    def _guiders(cls, value: Any) -> Any:
        return None if value is None else spread(value)

    @field_validator("classifier", mode="before")
    @classmethod
    def _classifier(cls, value: Any) -> Any:
        if value is not None and not callable(value):
            raise ValueError("not callable")
        return value

    @field_validator(*PAIRS, mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(type(v) is int and 0 <= v <= 16384 for v in value):
            raise ValueError("not two whole numbers")
        return tuple(value)

    @field_validator("approximate", mode="before")
    @classmethod
    def _approximations(cls, value: Any) -> Any:
        return value if value in (None, {}) else spread(value)

    @field_validator("latents", mode="before")
    @classmethod
    def _latents(cls, value: Any) -> Any:
        if value is not None and (getattr(value, "ndim", 0) != 4 or not hasattr(value, "is_floating_point")):
            raise ValueError("not a tensor of four axes")
        if value is not None and not (value.is_floating_point() and bool(value.isfinite().all())):
            raise ValueError("not finite numbers")
        return value

    @property
    def references(self) -> tuple[Any, ...]:
        """`reference` as a tuple, empty where none is given."""
        if self.reference is None:
            return ()
        return tuple(self.reference) if isinstance(self.reference, (list, tuple)) else (self.reference,)

    @property
    def task(self) -> str:
        """"txt2img", "img2img", "inpaint", "outpaint" or "edit"."""
        if any((self.left, self.right, self.top, self.bottom)):
            return "outpaint"
        if self.mask is not None:
            return "inpaint"
        if self.image is not None:
            return "img2img"
        return "edit" if self.reference is not None else "txt2img"

    def replace(self, **changes: Any) -> Request:
        """A copy with some fields changed, checked again."""
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        if any(name in changes and isinstance(getattr(self, name), tuple) for name in SEEDS):
            kept.pop("batch", None)  # which the list was as long as
        return Request(**kept | changes)


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"{name!r} is not a known option: {suggestion(name)}"
    return f"{name} is {shown(first['input'])}: expected {EXPECTED.get(name, first['msg'])}"


def suggestion(name: str) -> str:
    """What an unknown option was probably meant to be."""
    meant = ALIASES.get(name.lower())
    if meant is None and (place := ELSEWHERE.get(name.lower())):
        return place
    if meant is None and any(name.lower() in sampler.options for sampler in SAMPLERS.values()):
        return f"it is of some samplers, so pass sampler_options={{{name.lower()!r}: ...}}"
    if meant is None:
        near = difflib.get_close_matches(name.lower(), [*Request.model_fields, *ALIASES], n=1, cutoff=0.7)
        meant = ALIASES.get(near[0], near[0]) if near else None
    options = ", ".join(name for name in Request.model_fields if not name.startswith("negative_") or name == "negative_prompt")
    return f"did you mean {meant!r}?" if meant else f"the options are {options}, and negative_ forms of some: help(latentgen.Request) tells of each"
