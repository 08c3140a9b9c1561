"""The recipe: everything that reproduces a picture, as plain data for its file, and back. Knows plans and requests; no paths and no secrets go in.

A picture's file holds it as JSON under "latentgen", and beside it A1111's `parameters` text for other programs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentgen.conditioning.wildcards import MARKS
from latentgen.errors import ImageError, RequestError
from latentgen.pixels.save import PARAMETERS, read_metadata
from latentgen.run.foreign.read import Foreign, read_foreign
from latentgen.run.parameters import write_parameters
from latentgen.run.request import PROMPTS, Request
from latentgen.run.residency import GRAPHS, SPEEDS
from latentgen.run.steering import digest_of

if TYPE_CHECKING:
    from PIL import Image

    from latentgen.run.plan import Plan

KEY = "latentgen"
PICTURES = ("image", "mask", "reference", "latents", "classifier")  # fields of a request that no file carries: a recipe knows their hashes
WHOLE = ("cells", "grid", "film", "pixels_sha256")  # what a sheet's or film's recipe says of the whole
PLACES = ("styles", "styles_file", "wildcards")  # where words came from: a recipe has the words
ALWAYS = ("prompt", "negative_prompt", "batch")  # said even where they are as they would be anyway


@dataclass(frozen=True)
class Recipe:
    """What a picture's file says of how latentgen made it.

    Attributes:
        data: see `make_recipe`, with the seed of this picture and the `pixels_sha256` that it had.
    """

    data: Mapping[str, Any]

    @property
    def tool(self) -> str:
        """"latentgen" and its version."""
        return f"latentgen {_table(self.data, 'versions').get('latentgen', '')}".strip()

    @property
    def model(self) -> str:
        """What the model was called; what it is, `data["weights"]` tells."""
        return str(self.data.get("model", ""))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was adjusted while it was made."""
        notes = self.data.get("notes")
        return tuple(map(str, notes)) if isinstance(notes, list) else ()

    @property
    def fields(self) -> dict[str, Any]:
        """What a `Request` takes, without pictures, and without places on this machine: a file may name none that is then read."""
        return {name: value for name, value in self.data.items() if name in Request.model_fields and name not in (*PICTURES, *PLACES)}

    @property
    def cells(self) -> tuple[Recipe, ...]:
        """The recipes of the pictures of which a sheet or a film is made; () for a picture."""
        cells = self.data.get("cells")
        if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
            return ()
        base = {name: value for name, value in self.data.items() if name not in WHOLE}
        return tuple(Recipe({**base, **cell}) for cell in cells)

    @property
    def needs(self) -> tuple[str, ...]:
        """The pictures that it was made from: of "image", "mask", "reference" and "latents"."""
        drawn = self.data.get("task") == "outpaint"  # its mask follows from the sides
        return tuple(name for name in PICTURES if f"{name}_sha256" in self.data and not (name == "mask" and drawn))

    def request(self, **changes: Any) -> Request:
        """The request that made it, with its source pictures, and anything else that is to be different, in `changes`.

        Raises:
            RequestError: the recipe was altered and says what no request can, or a change is wrong.
        """
        first = {"prompt": "", "dialect": "plain", "wildcards": False,  # the first recipes name no dialect: in their prompts nothing was syntax
                 "approximate": {}}  # where none is told none was taken, whatever this pipeline is tuned to
        return Request(**(first | self.fields | changes))


def make_recipe(plan: Plan, digest: str, notes: tuple[str, ...]) -> dict[str, Any]:
    """The request with every default filled in, the model's digest, versions and notes; JSON-ready. Source pictures are named by hash only.

    Every key that a `Request` has too may be given back to one as it is: with the same pictures, that makes the same picture. `batch` is the number
    of pictures that were made (where wildcards gave them different texts, "cells" has what each says by itself); `rows`, where it is above 1, how
    many of them the network saw at once, which may change the last bits on a GPU.
    """
    if plan.pictures:
        recipes = [make_recipe(picture, digest, notes) for picture in plan.pictures]
        return joined_recipe([{name: value for name, value in recipe.items() if name != "batch"} for recipe in recipes])
    request = plan.request
    recipe: dict[str, Any] = {
        "task": plan.task, "model": plan.model, "weights": digest, "prompt": request.prompt, "negative_prompt": request.negative_prompt,
        "dialect": request.dialect, "weighting": plan.weighting,
        "steps": plan.asked_steps, "sampler": plan.sampler, "spacing": plan.spacing, "guidance_scale": plan.guidance_scale,
        "guidance_rescale": plan.guidance_rescale, "guidance_interval": list(plan.guidance_interval), **_seeds(plan),
        **{name: value for name, value in plan.options.items() if name in Request.model_fields}}
    recipe |= {"guiders": {name: dict(options) for name, options in plan.guiders.items()}} if plan.guiders else {}
    recipe |= {"classifier_sha256": digest_of(request.classifier)} if "classifier" in plan.guiders else {}
    recipe |= {"width": plan.width, "height": plan.height} if plan.source is None else {}
    recipe |= {"approximate": {name: dict(options) for name, options in plan.approximate.items()}} if plan.approximate else {}
    if "cfg_pp" in plan.guiders:  # has a scale of its own, beside which no other can be said; what is built into the model stays
        recipe = {name: value for name, value in recipe.items() if name != "guidance_scale" or value != 1}
    elif plan.cfg_scale != plan.guidance_scale:
        recipe["true_cfg_scale"] = plan.cfg_scale  # the model has guidance built in
    wild = request.dialect != "plain" and any(mark in getattr(request, name) for name in PROMPTS if getattr(request, name) for mark in MARKS)
    recipe |= {**plan.origin, **({"wildcards": False} if wild else {})}  # what had to be drawn was drawn: what looks like it is text
    recipe |= {"upscaler": plan.passes[1].upscaler, "upscale_strength": plan.passes[1].strength} if plan.passes[1:] else {}
    recipe |= {name: value for name, value in _said(request).items() if name not in recipe}
    recipe |= {"reference_sha256": [picture_hash(picture) for picture in plan.references]} if plan.references else {}
    recipe |= {"latents_sha256": hashlib.sha256(request.latents.float().cpu().numpy().tobytes()).hexdigest()} if request.latents is not None else {}
    if plan.source is not None:
        recipe |= {"image_sha256": picture_hash(plan.source.image)} | ({} if plan.task == "outpaint" else {"strength": plan.strength})
        if plan.source.mask is not None:
            recipe["mask_sha256"] = hashlib.sha256(plan.source.mask.numpy().tobytes()).hexdigest()
    levels = " ".join(f"{level.alpha:.9g},{level.sigma:.9g}" for one in plan.passes for level in one.levels)
    recipe |= {"levels_sha256": hashlib.sha256(levels.encode()).hexdigest()[:16]} | ({"rows": plan.rows} if plan.rows > 1 else {})
    recipe |= ({"quantise": plan.quantise} if plan.quantise else {}) | ({"attention": dict(plan.attention)} if plan.attention else {})
    if plan.speed == "exact" and plan.dtype == "bfloat16" and plan.residency in ("stream", "disk"):
        recipe["residency"] = plan.residency  # streamed blocks are plain, so that the last bits may be others
    return recipe | {"dtype": plan.dtype, "speed": plan.speed, "device": plan.device.split(":")[0], "versions": _versions(plan), "notes": list(notes)}


def speed_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """`speed` and `compile` of a recipe, and where there is a CUDA device `attention`, as `load` takes them.

    Without such a device graphs are the plain networks that they are of. The first recipes name no speed: their networks were plain.
    """
    said, cuda = recipe.get("speed", "plain"), torch.cuda.is_available()
    speed = "plain" if said == GRAPHS and not cuda else said if said in SPEEDS else "exact"
    return {"speed": speed, "compile": said == "compiled"} | ({"attention": recipe["attention"]} if recipe.get("attention") and cuda else {})


def joined_recipe(recipes: Sequence[Mapping[str, Any]], **about: Any) -> dict[str, Any]:
    """One recipe for several pictures: what all say alike, `about` them, and under "cells" what each says beside; `Recipe.cells` parts them again."""
    own = "pixels_sha256"  # the whole has one of its own
    base = {name: value for name, value in recipes[0].items() if name != own and all(name in recipe and recipe[name] == value for recipe in recipes)}
    return {**base, **about, "cells": [{name: value for name, value in recipe.items() if name not in base} for recipe in recipes]}


def metadata(recipe: Mapping[str, Any], seed: int | None = None, image: Image.Image | None = None, *,
             variation_seed: int | None = None) -> dict[str, str]:
    """What goes into one picture's file: the recipe with that picture's own seeds and a batch of one, and the same for other programs.

    Args:
        seed: of one of several pictures; None where the recipe tells it.
        image: the picture itself. Its hash lets a file that is not exact (JPEG, WebP) be checked when it is made again.
    """
    own = {k: v for k, v in recipe.items() if k != "batch"} | {k: v for k, v in (("seed", seed), ("variation_seed", variation_seed)) if v is not None}
    own |= {} if image is None else {"pixels_sha256": picture_hash(image)}
    size = None if image is None else image.size
    return {KEY: json.dumps(own, ensure_ascii=False, sort_keys=True), PARAMETERS: write_parameters(own, size=size)}


def read_recipe(source: Image.Image | str | Path | bytes) -> Recipe | Foreign | None:
    """What a picture's file says of how it was made, by latentgen or another program; None where it says nothing.

    Nothing that a file says is run or opened: it is text, at most `save.MAX_TEXT` letters of an entry, and what it claims is checked when a
    `Request` is made.

    Args:
        source: a PNG, JPEG or WebP file, a film, its bytes, or an image opened from one.

    Raises:
        ImageError: no picture, or it says something, and all of that is damaged.
    """
    texts = read_metadata(source)
    damage = ""
    if KEY in texts:
        try:
            data = json.loads(texts[KEY])
            if isinstance(data, dict):
                return Recipe(data)
            damage = f"it is a {type(data).__name__}"
        except (ValueError, RecursionError) as error:
            damage = str(error) or type(error).__name__
    found = read_foreign(texts)
    if damage and found is None:
        raise ImageError(f"the picture's recipe is damaged ({damage}): take the file as it was saved, or say the request in words")
    return found.noted(f"the recipe of latentgen in the file is damaged ({damage})") if damage and found is not None else found


def as_recipe(made: Any) -> Recipe | Foreign:
    """`read_recipe` for what must have one; a `Recipe` or `Foreign` comes back as it is.

    Raises:
        ImageError: no picture, or one that says nothing of how it was made. RequestError: neither a picture nor a recipe.
    """
    if isinstance(made, (Recipe, Foreign)):
        return made
    if not hasattr(made, "getexif") and not isinstance(made, (str, Path, bytes)):
        raise RequestError(f"a {type(made).__name__} was given: expected a picture's file, its bytes, or an image opened from it")
    found = read_recipe(made)
    if found is None:
        raise ImageError("the picture says nothing of how it was made: take the file as it was saved, for editors and web pages often drop the text")
    return found


def picture_hash(image: Image.Image) -> str:
    """SHA-256 of a picture's size and pixels."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def _said(request: Request) -> dict[str, Any]:
    """What the request says that is not as it would be anyway. Paths and objects stay out, whatever the field."""
    found = {}
    for name, field in Request.model_fields.items():
        value = getattr(request, name)
        if name in (*PICTURES, *PLACES) or not isinstance(value, (str, int, float, bool, tuple, list, dict)):
            continue
        if name in ALWAYS or (value != field.default and value != {}):
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def _seeds(plan: Plan) -> dict[str, Any]:
    """The seeds as they were said, or the first where they count up, those drawn among them."""
    noise, request = plan.noise, plan.request
    each = {"seed": (request.seed, noise.own), "variation_seed": (request.variation_seed, noise.variations)}
    return {name: list(used) if isinstance(said, tuple) else used[0] for name, (said, used) in each.items() if used}


def _versions(plan: Plan) -> dict[str, str]:
    """What may change the last bits of a picture: versions, and the arithmetic of the processor. No names of machines."""
    try:
        ours = version("latentgen")
    except PackageNotFoundError:
        ours = "source"
    processor = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
    kernels = torch.cuda.get_device_name(plan.device) if plan.device.startswith("cuda") else processor
    return {"latentgen": ours, "torch": torch.__version__, "kernels": kernels} | ({"parallel": str(plan.parallel)} if plan.parallel else {})


def _table(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = data.get(name)
    return value if isinstance(value, dict) else {}
