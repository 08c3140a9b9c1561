"""The options of the picture commands, as data. Knows their names, ranges and words; checks nothing (the Request and the Plan do) and runs nothing.

A command takes groups of them with `@takes(...)`; they arrive as keyword arguments under the names that `Request` and `load` use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature, signature
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from latentgen.cli.together import joined
from latentgen.errors import RequestError
from latentgen.importing import uncollected

if TYPE_CHECKING:
    from latentgen.run.pipeline import Pipeline

Group = Sequence[Parameter]
MODELS_OWN = "Default: the model's own."


def _option(panel: str, name: str, kind: Any, flags: str, text: str, *, default: Any = None, metavar: str | None = None) -> Parameter:
    info = typer.Option(*flags.split(), help=escape(text), rich_help_panel=panel, metavar=metavar, show_default=default is not None)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def takes(*groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of the groups, as keywords: those it names itself and, in `**said`, the others."""

    def wrap(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in signature(function, eval_str=True).parameters.values() if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
        every = [*own, *chain.from_iterable(groups)]
        function.__signature__ = Signature(every)  # type: ignore[attr-defined]  # what typer reads
        function.__annotations__ = {p.name: p.annotation for p in every}
        return function

    return wrap


_P = "Picture"
DIALECT: Group = (
    _option(_P, "dialect", str, "--dialect", "How prompts are read: a1111 ((word:1.3), [from:to:0.4], AND), "
                                             "comfy ((word:1.3)) or plain (as they stand).",
            default="a1111", metavar="NAME"),
    _option(_P, "styles", list[str] | None, "--style", "A style of --styles-file, laid over the words; may be said several times.", metavar="NAME"),
    _option(_P, "styles_file", Path | None, "--styles-file", "Saved prompt templates: TOML, a table with prompt and negative for each.",
            metavar="FILE"),
    _option(_P, "wildcards", Path | None, "--wildcards", "The folder of word lists that __name__ draws from, "
                                                         "by each picture's seed ({a|b} needs none).",
            metavar="FOLDER"),
)
OTHERS: Group = tuple(
    _option(_P, f"prompt_{n}", str, f"--prompt-{n}", f"Other words for the model's {nth} text encoder.", default="", metavar="TEXT")
    for n, nth in ((2, "second"), (3, "third")))
SEED: Group = (
    _option(_P, "seed", list[str] | None, "--seed", "A whole number from 0 to 2**63 - 1; the same seed gives the same picture. Several, as 3,7,11, "
                                                    "give one "
            "picture each. Default: a new one, which is reported.", metavar="N"),
)
WORDS: Group = (
    _option(_P, "negative_prompt", str | None, "--negative --negative-prompt", "What the picture should not show. Needs guidance above 1.",
            metavar="TEXT"),
    *OTHERS,
    *(_option(_P, f"negative_prompt_{n}", str, f"--negative-prompt-{n}", f"As --prompt-{n}, for the negative side.", default="", metavar="TEXT")
      for n in (2, 3)),
    _option(_P, "blend_prompt", str | None, "--blend-prompt", "Other words, towards which PROMPT is turned by --blend.", metavar="TEXT"),
    _option(_P, "blend", float | None, "--blend", "0 (PROMPT) to 1 (--blend-prompt). Default: 0.5.", metavar="SHARE"),
    *DIALECT,
    _option(_P, "weighting", str | None, "--weighting", "By which rule weights in a prompt hold: a1111, a1111_no_norm or comfy. Default: "
                                                        "the dialect's.",
            metavar="NAME"),
    _option(_P, "clip_skip", int, "--clip-skip", "Which layer of CLIP is read: 1 the model's own, 2 the one before it.", default=1),
    *SEED,
    _option(_P, "variation_strength", float | None, "--variation-strength",
            "0 to 1: how far the noise is turned to that of --variation-seed. A batch then has one seed, and varies it.", metavar="SHARE"),
    _option(_P, "variation_seed", list[str] | None, "--variation-seed",
            "As --seed; picture i of a batch uses it + i. Default: a new one, which is reported.",
            metavar="N"),
    *(_option(_P, f"seed_{side}", int | None, f"--seed-{side}",
              f"The {side} that the seed's noise is drawn for, and placed in this picture's middle.",
              metavar="PIXELS") for side in ("width", "height")),
    _option(_P, "batch", int | None, "--batch", "How many pictures, 1 to 64; picture i uses seed + i. Default: 1, or one of each seed."),
)
SIZE: Group = (
    _option(_P, "width", int | None, "--width",
            "Pixels, 8 to 8192, a multiple of the model's unit (8 for most). Default: the model's own, or the image's."),
    _option(_P, "height", int | None, "--height", "As --width."),
    _option(_P, "upscale", float | None, "--upscale", "1.05 to 4: a second pass at this many times the size.", metavar="FACTOR"),
    _option(_P, "upscaler", str | None, "--upscaler", "How it is enlarged: latent, latent_bicubic, latent_nearest, lanczos or nearest. Default: "
                                                      "latent.",
            metavar="NAME"),
    _option(_P, "upscale_strength", float | None, "--upscale-strength",
            "Share of the levels that the second pass runs, above 0 to 1. Default: 0.6 of latents, 0.45 of pixels.", metavar="SHARE"),
    _option(_P, "upscale_steps", int | None, "--upscale-steps", "How many steps it makes. Default: that share of --steps."),
    _option(_P, "seamless", str | None, "--seamless", "x, y or both: left and right edges meet, top and bottom ones, or all.", metavar="AXES"),
    _option(_P, "tile", int | None, "--tile", "Pixels: denoise in overlapping windows of this side. Default: "
                                              "only a second pass that is far too large.",
            metavar="PIXELS"),
)
_T = "What the model is told of size and beauty"
TOLD: Group = (
    *(_option(_T, f"{side}{name}", tuple[int, int] | None, f"--{side}{name}".replace("_", "-"), text, metavar=metavar)
      for side in ("", "negative_") for name, text, metavar in (
          ("original_size", "Of the picture that it should look like, in pixels. SDXL; default: the picture's.", "HEIGHT WIDTH"),
          ("crop_top_left", "Where that was cropped. Default: 0 0.", "Y X"),
          ("target_size", "What it was cropped to. Default: the picture's size.", "HEIGHT WIDTH"))),
    _option(_T, "aesthetic_score", float | None, "--aesthetic-score", "0 to 10. SDXL's refiner; default: 6."),
    _option(_T, "negative_aesthetic_score", float | None, "--negative-aesthetic-score", "0 to 10, for the negative side. Default: 2.5."),
)

_E = "The edit"
STRENGTH: Group = (
    _option(_E, "strength", float | None, "--strength",
            "Share of the steps that run, above 0 to 1: low keeps the picture, 1 redraws it. Default: the model's own for img2img, 1 for inpaint."),
    _option(_E, "fit", str | None, "--fit",
            "'resize' lets a picture or mask of another size be resized. Default: a wrong size is an error.", metavar="resize"),
)
SIDES: Group = (
    *(_option(_E, side, int, f"--{side}", f"Pixels to add {where}, 0 to 4096.", default=0)
      for side, where in (("left", "at the left"), ("right", "at the right"), ("top", "on top"), ("bottom", "below"))),
    _option(_E, "feather", int, "--feather", "Pixels, 0 to 512, over which old and new are blended.", default=0),
)
SOURCE: Group = (
    _option(_E, "image", Path | None, "--image", "The picture to edit. Default: none, which is txt2img.", metavar="FILE"),
    _option(_E, "mask", Path | None, "--mask", "What to repaint: white. Makes it inpaint.", metavar="FILE"),
    _option(_E, "reference", list[Path] | None, "--reference", "A picture for a model that edits by instruction; may be said several times.",
            metavar="FILE"),
)

_S = "Sampling"
STEPS: Group = (
    _option(_S, "steps", int | None, "--steps", f"How often the network looks at the picture, 1 to 1000; more is slower and finer. {MODELS_OWN}"),
)
SAMPLING: Group = (
    *STEPS,
    _option(_S, "guidance_scale", float | None, "--guidance --guidance-scale",
            f"How closely to follow the words, 0 to 100; 1 turns it off and is twice as fast. {MODELS_OWN}"),
    _option(_S, "true_cfg_scale", float | None, "--true-cfg",
            "Guidance by a second evaluation, 1 (off) to 100, for models with guidance built in; a negative prompt needs it."),
    _option(_S, "image_guidance_scale", float | None, "--image-guidance",
            f"How far an edit by instruction holds to its picture, 0 to 100. {MODELS_OWN}"),
    _option(_S, "sampler", str | None, "--sampler", f"One of those that `latentgen samplers` lists. {MODELS_OWN}",
            metavar="NAME"),
    _option(_S, "spacing", str | None, "--spacing",
            f"Which noise levels are visited: trailing, karras or another that `latentgen samplers` lists. {MODELS_OWN}", metavar="NAME"),
    _option(_S, "sampler_options", list[str] | None, "--sampler-option", "What the sampler takes beside, as s_churn=10; may be said several times.",
            metavar="NAME=VALUE"),
    _option(_S, "eta", float | None, "--eta", "Fresh noise per step of ddim and the ancestral samplers, 0 (none) to 1. Default: the sampler's own."),
    _option(_S, "shift", float | None, "--shift", f"Moves the levels of a rectified-flow model towards noise, 0.01 to 100; 1 is none. {MODELS_OWN}"),
    _option(_S, "guidance_rescale", float | None, "--guidance-rescale", f"0 to 1; tames the contrast that strong guidance adds. {MODELS_OWN}"),
    _option(_S, "guidance_interval", tuple[float, float] | None, "--guidance-interval",
            "Guide only in this part of the path, 0 (clean) to 1 (noise). Default: all of it.", metavar="LOW HIGH"),
    _option(_S, "guiders", list[str] | None, "--guider", "One of those that `latentgen guiders` lists, alone or as apg:eta=0.2,momentum=0; "
                                                         "may be said several times.",
            metavar="NAME[:OPTION=VALUE,...]"),
    _option(_S, "vae_tile", int | None, "--vae-tile", "Side in pixels of the tiles in which the autoencoder works. Default: 768 above a megapixel.",
            metavar="PIXELS"),
    _option(_S, "split_guidance", bool, "--split-guidance", "The evaluations of guidance one after the other: slower, in less memory.",
            default=False),
    _option(_S, "approximate", list[str] | None, "--approximate",
            "What to leave out for speed: one of those that `latentgen approximations` lists, alone or "
            "as first_block:threshold=0.1; may be said several times. none: nothing, whatever --tuned says.", metavar="NAME[:OPTION=VALUE,...]"),
    _option(_S, "strict", bool, "--strict/--no-strict", "Whether an option that the model cannot honour is an error, or only a note.", default=True),
)

_M = "Model and machine"
MACHINE: Group = (
    _option(_M, "model", str, "--model -m", "A name that `latentgen models` lists, a folder, a .safetensors or .gguf file, or a hub name (org/name).",
            default="glyph", metavar="NAME"),
    _option(_M, "card", str | None, "--card", "A card whose defaults hold for a file that does not tell what it is, as sdxl-turbo.", metavar="NAME"),
    _option(_M, "config", str | None, "--config", "Configs for a file: a published variant, or a folder in diffusers layout.", metavar="NAME"),
    _option(_M, "part", list[str] | None, "--part", "A part from a file of its own, as vae=my-vae.safetensors; may be said several times.",
            metavar="NAME=FILE"),
    _option(_M, "allow_pickle", bool, "--allow-pickle", "Read .ckpt, .bin and .pt files, too: their tensors alone. Only of makers whom you trust.",
            default=False),
    _option(_M, "device", str, "--device", "auto (the GPU if there is one), cpu, cuda, cuda:1 or mps.", default="auto", metavar="NAME"),
    _option(_M, "dtype", str, "--dtype", "Numbers of the networks: auto, float32, bfloat16 or float16.", default="auto", metavar="NAME"),
    _option(_M, "quantise", str | None, "--quantise", "int8, int8_dynamic, fp8, int4: weights in so many bits; "
            "stored: packed as their file has them; auto: where memory asks for it.", metavar="NAME"),
    _option(_M, "attention", str | None, "--attention", "On a CUDA device: flash, cudnn, efficient, math, or measured (the fastest, kept). "
                                                        "Default: torch chooses.", metavar="NAME"),
    _option(_M, "tuned", bool, "--tuned", "Take the approximations that `latentgen tune` found for this model here; the notes say which.",
            default=False),
    _option(_M, "memory", str | None, "--memory", "Plan for this much memory on the device, as 8GB, or auto for what is free: placement, "
                                                  "tiles and batching "
            "follow, and the plan tells memory and time.", metavar="SIZE"),
    _option(_M, "residency", str, "--residency", "resident keeps every part in memory, stage only the one that runs, "
                                                 "stream and disk only one block of it.",
            default="resident", metavar="NAME"),
    _option(_M, "speed", str, "--speed", "exact (faster networks, the same picture up to rounding), plain, or on a CUDA device graphs.",
            default="exact", metavar="NAME"),
    _option(_M, "compile", bool, "--compile", "Compile the networks: the first picture takes a minute or more, later ones of the same process less.",
            default=False),
)


PARALLEL: Group = (
    _option(_M, "parallel", str | None, "--parallel", "How the processes that torchrun started make one picture: cfg, "
                                                      "the evaluations of each step are dealt out, or context, their tokens. "
            "Default under torchrun: cfg.", metavar="NAME"),
)


def opened(said: dict[str, Any], *, progress: bool | None) -> Pipeline:
    """The model that the options name; they are taken out of `said`. progress: of a download; None shows it in a terminal.

    Raises:
        RequestError: a --part without a name, or a command of one process that torchrun started. ModelError: see `latentgen.load`.
    """
    with uncollected():
        from latentgen.run.pipeline import load

    way, parts = joined(said), {}
    for text in said.pop("part") or ():
        name, _, path = text.partition("=")
        if not (name.isidentifier() and path):
            raise RequestError(f"--part is {text!r}: expected NAME=FILE, as vae=my-vae.safetensors")
        parts[name] = path
    machine = {name: said.pop(name)
               for name in ("device", "dtype", "residency", "speed", "compile", "card", "config", "allow_pickle", "quantise", "attention",
                            "tuned", "memory")}
    return load(said.pop("model"), progress=progress, parallel=way, **machine, **parts)


_O = "Output"
JSON: Group = (_option(_O, "as_json", bool, "--json", "Print everything as JSON on stdout, for scripts.", default=False),)
OUTPUT: Group = (
    _option(_O, "output", Path | None, "--output -o",
            "The file, .png, .jpg or .webp (a batch gets -1, -2 ... before the suffix), or a folder. "
            "Default: the words and the seed, a-red-heart-1234.png, never over a file that is there.", metavar="FILE"),
    _option(_O, "quality", int | None, "--quality", "Of a .jpg or .webp, 1 to 100. Default: 95."),
    _option(_O, "show", bool, "--show", "Show the picture in the terminal, where it can.", default=False),
    _option(_O, "quiet", bool, "--quiet -q", "No progress and no notes; print only the file's name.", default=False),
    *JSON,
)
KEEP: Group = (
    _option(_O, "save_state", Path | None, "--save-state", "Keep the run in this file, "
                                                           "so that `latentgen resume FILE` goes on with it should it be stopped.",
            metavar="FILE"),
    _option(_O, "save_every", int | None, "--save-every", "How many steps lie between two savings. Default: 5; Ctrl-C saves, too."),
)
