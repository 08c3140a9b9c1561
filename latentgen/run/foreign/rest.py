"""A1111's settings beside the usual ones: how weights were read, what a sampler was told, where the words came from; and a note for every other.

Knows the words of that program, its kin and the extensions that write into its line; no file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from latentgen.conditioning.dialect import Parsed, parse
from latentgen.diffusion.sample import SAMPLERS
from latentgen.errors import RequestError
from latentgen.run.foreign.fields import Found, base_name, number, whole
from latentgen.run.foreign.guiders import plus_plus, take_settings

_SAMPLING = {"Sigma churn": ("s_churn", number), "Sigma tmin": ("s_tmin", number), "Sigma tmax": ("s_tmax", number),
             "Sigma noise": ("s_noise", number),
             "UniPC order": ("order", whole), "UniPC variant": ("variant", str)}  # setting -> (option of some samplers, its kind)
_WORDS = {"Template": "the prompt is", "Negative Template": "the negative prompt is", "Wildcard prompt": "the prompt is", "Styles": "the text is"}
_AS_HERE = {"Pad conds": "True", "Noise Schedule": "Default", "Tiling": "False"}  # settings that say what is so here
_SILENT = ("Created Date", "Backend", "Pipeline", "User", "Operations", "Parser", "Hashes", "RNG",
           "Civitai metadata")  # nothing more about the picture
_LOADED = ("Lora hashes", "TI hashes", "TI", "Hypernet", "Hypernet strength", "VAE", "VAE Encoder", "VAE Decoder", "Refiner", "Refiner switch at",
           "Hypernet hash")


def rest(settings: Mapping[str, str], found: Found, read: set[str]) -> None:
    """Take over what there is a word for, and say what there is none for.

    Args:
        found: with prompts and sampler taken over.
        read: the settings that were read before.
    """
    _emphasis(settings.get("Emphasis"), found)
    _sampling(settings, found)
    if settings.get("Tiling", "False") != "False":
        found.take("seamless", "both", said="Tiling")
    _group(settings, found)
    plus_plus(found)
    _resources(settings.get("Civitai resources", ""), found)
    done = {*read, *take_settings(found, settings), *_SAMPLING, *_WORDS, *_SILENT, "Emphasis", "Tiling", "Civitai resources"}
    for name, value in settings.items():
        if name in done or _AS_HERE.get(name) == value or name.startswith("Hires") or (name.endswith("hash") and name not in _LOADED):
            continue
        if name in _LOADED or name.startswith(("ControlNet", "Module ")):
            found.note(f"{name}: {value[:120]} was used, which is not loaded here")
        else:
            found.note(f"{name}: {value[:120]} has no equivalent here")


def _emphasis(said: str | None, found: Found) -> None:
    """How brackets were read: "Original" and "No norm" are rules here too; "None" made them text, "Ignore" read them and let them weigh nothing."""
    rule = {"original": "a1111", "no norm": "a1111_no_norm"}.get((said or "original").lower())
    if said is None or rule is not None and found.take("weighting", rule, said="Emphasis"):
        return
    prompts = [parse(text) for name in ("prompt", "negative_prompt") if (text := found.fields.get(name))]
    if not any(map(_weighted, prompts)):
        return  # then every rule is the same
    if said.lower() == "none" and not any(one.scheduled or one.breaks or len(one.parts) > 1 for one in prompts):
        found.take("dialect", "plain")
    else:
        what = {"none": "brackets were text there, and weigh words here", "ignore": "weights were left out there, and hold here"}.get(said.lower())
        found.note(f"Emphasis: {said[:40]}: {what or 'this rule for weights is not known'}")


def _weighted(prompt: Parsed) -> bool:
    return any(fragment.weight != 1 for span in prompt.spans(20) for one in span.conjuncts for fragment in one.fragments)


def _sampling(settings: Mapping[str, str], found: Found) -> None:
    """What the sampler was told, where ours takes it, too."""
    options: dict[str, Any] = dict(found.fields.get("sampler_options") or {})
    known = SAMPLERS[found.fields["sampler"]].options if "sampler" in found.fields else {}
    for name, (option, kind) in _SAMPLING.items():
        if name not in settings:
            continue
        try:
            value = kind(settings[name])
            known[option].check(option, value)
            options[option] = value
        except (KeyError, ValueError, OverflowError, RequestError):
            found.note(f"{name}: {settings[name][:60]} has no equivalent for this sampler")
    if options:
        found.take("sampler_options", options)


def _group(settings: Mapping[str, str], found: Found) -> None:
    """Settings that mean one thing together, each with one note."""
    for name, what in _WORDS.items():
        if settings.get(name):
            found.note(f"{name}: {settings[name][:120]}: {what} taken over as it came of that")


def _resources(said: str, found: Found) -> None:
    """Networks that a service of models lists as JSON."""
    with suppress(ValueError, RecursionError):
        listed = json.loads(said) if said else []
        for one in (listed if isinstance(listed, list) else [])[:20]:
            if isinstance(one, dict) and one.get("type") not in ("checkpoint", "model"):
                name, weight = one.get("modelName") or one.get("modelVersionId") or "", f" at {one['weight']}" if "weight" in one else ""
                found.note(f"the {str(one.get('type'))[:20]} {base_name(name)!r}{weight[:20]} was used, which is not loaded here")
