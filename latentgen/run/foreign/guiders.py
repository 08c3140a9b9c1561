"""What other programs call guiders, and their options. Knows those words and ours; knows no file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from latentgen.diffusion.guidance.table import filled
from latentgen.run.foreign.fields import Found, number

_PERCENT = "its start and end are told in the noise path there, and in steps here"
NODES: Mapping[str, tuple[str, Mapping[str, str]]] = {  # ComfyUI's node -> (guider, input -> option)
    "PerturbedAttentionGuidance": ("pag", {"scale": "scale"}),
    "SkipLayerGuidance": ("slg", {"layers": "layers", "double_layers": "layers", "scale": "scale", "start_percent": "start", "end_percent": "end"}),
    "APG": ("apg", {"eta": "eta", "norm_threshold": "norm_threshold", "momentum": "momentum"}),
    "CFGZeroStar": ("cfg_zero", {}), "PerpNeg": ("perp_neg", {"neg_scale": "weight"}),
    "DynamicThresholding": ("mimic", {"mimic_scale": "scale", "threshold_percentile": "percentile"}),
}
_RULE = {"separate_feature_channels": "enable", "scaling_startpoint": "MEAN", "variability_measure": "AD", "interpolate_phi": 1,
         "mimic_mode": "Constant", "cfg_mode": "Constant"}  # of the thresholding that ours is
_TEXT = {"Separate Feature Channels": "True", "Scaling Startpoint": "MEAN", "Variability Measure": "AD", "Interpolate Phi": "1",
         "Mimic mode": "Constant", "CFG mode": "Constant"}  # the same in A1111's words


def known_node(kind: str) -> str | None:
    """The entry of NODES that a class of nodes belongs to, or None."""
    several = ("SkipLayerGuidance", "PerpNeg", "DynamicThresholding")  # classes whose names begin so
    return next((name for name in NODES if kind == name or (name in several and kind.startswith(name))), None)


def take_node(found: Found, kind: str, said: Callable[[str], Any], inputs: Mapping[str, Any]) -> None:
    """A node that guides, as a guider, with a note on what is otherwise there.

    Args:
        said: an input's name -> its value.
    """
    name = known_node(kind) or ""
    guider, words = NODES[name]
    options = {option: value for word, option in words.items() if word in inputs and (value := said(word)) is not None}
    if guider == "slg":
        found.note(f"the node {kind} is the guider slg here: {_PERCENT}")
        singles = [f"single_transformer_blocks.{n}" for n in _numbers(said("single_layers") if "single_layers" in inputs else "")]
        options["layers"] = [*_numbers(options.get("layers", "")), *singles] or "middle"
    elif guider == "cfg_zero":
        options = {"zero_steps": 0}
    others = [f"{word} {said(word)}" for word, usual in _RULE.items() if guider == "mimic" and word in inputs and said(word) != usual]
    if others:
        found.note(f"the node {kind} has {', '.join(others)[:200]}, which has no equivalent here: the guider mimic is the plain rule")
    _take(found, guider, options, kind)


def take_settings(found: Found, settings: Mapping[str, str]) -> set[str]:
    """What A1111's extensions write of guidance; the settings that were read."""
    read: set[str] = set()
    with suppress(ValueError, RecursionError):
        if isinstance(own := json.loads(settings.get("Guiders", "")), dict):  # ours, which say all of the others
            for guider, options in list(own.items())[:20]:
                _take(found, guider, options if isinstance(options, dict) else {}, "Guiders")
            return {"Guiders", "Dynamic thresholding enabled", "Mimic scale", "Threshold percentile", "PAG Active", "PAG Scale"}
    if settings.get("Dynamic thresholding enabled") == "True":
        read |= {"Dynamic thresholding enabled", "Mimic scale", "Threshold percentile", *_TEXT}
        scale, share = (_float(settings.get(name)) for name in ("Mimic scale", "Threshold percentile"))
        options = {"scale": scale, "percentile": share if share is None or share <= 1 else share / 100}
        _take(found, "mimic", {name: value for name, value in options.items() if value is not None}, "Dynamic thresholding")
        if others := [f"{name} {settings[name]}" for name, usual in _TEXT.items() if settings.get(name, usual) not in (usual, f"{usual}.0")]:
            found.note(f"its dynamic thresholding has {', '.join(others)[:200]}, which has no equivalent here: the guider mimic is the plain rule")
    if settings.get("PAG Active") == "True":
        read |= {"PAG Active", "PAG Scale"}
        _take(found, "pag", {} if (scale := _float(settings.get("PAG Scale"))) is None else {"scale": scale}, "PAG")
    return read


def settings_of(guiders: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Our guiders in A1111's words, as far as its extensions have any; all of them under a word of ours."""
    said: dict[str, Any] = {}
    if mimic := guiders.get("mimic"):
        said |= {"Dynamic thresholding enabled": "True", "Mimic scale": mimic.get("scale"), "Threshold percentile": 100 * mimic.get("percentile", 1)}
    if pag := guiders.get("pag"):
        said |= {"PAG Active": "True", "PAG Scale": pag.get("scale")}
    return said | ({"Guiders": json.dumps(guiders)} if guiders else {})


def plus_plus(found: Found) -> None:
    """Where the sampler stands for CFG++ there: what is called the scale of guidance is the paper's lambda."""
    if not found.plus:
        return
    scale = found.fields.get("guidance_scale")
    if scale is not None and 0 <= scale <= 1:
        del found.fields["guidance_scale"]
        _take(found, "cfg_pp", {"scale": scale}, "CFG++")
    else:
        found.note(f"its sampler is one of CFG++ with a scale of {scale}, and the guider cfg_pp takes the paper's, from 0 to 1: "
                   "plain guidance is used")


def _take(found: Found, guider: str, options: Mapping[str, Any], said: str) -> None:
    found.take("guiders", (found.fields.get("guiders") or {}) | {guider: dict(options)}, lambda value: filled(value) and value, said=said)


def _numbers(said: Any) -> list[int]:
    return [int(one) for one in re.findall(r"\d{1,3}", str(said))][:200]


def _float(said: str | None) -> float | None:
    try:
        return None if said is None else number(said)
    except ValueError:
        return None
