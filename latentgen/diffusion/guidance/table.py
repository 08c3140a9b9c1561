"""The table of guiders: what each does, takes and costs, and what other programs call them. Knows names and numbers; runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from latentgen.diffusion.guidance.progress import Progress
from latentgen.diffusion.level import Level
from latentgen.diffusion.option import Option
from latentgen.diffusion.table import Chosen, Table
from latentgen.errors import RequestError

Acts = Literal["away", "direction", "scale", "range", "weak", "slope", "threshold"]


@dataclass(frozen=True)
class GuiderInfo:
    """A guider and what to know before using it.

    acts: on what, which is also the order in which several act. "away": what is guided away from; "direction": from there to the prompt's estimate;
        "scale": how far along it; "range": of the result; these four need classifier-free guidance. "weak": a weaker network's estimate is left
        behind; "slope": a gradient is followed; "threshold": the result is kept within bounds.
    options: its own; defaults: their values when they are left alone.
    evaluations: of the network, beside those that guidance makes anyway.
    """

    about: str
    paper: str
    acts: Acts
    options: Mapping[str, Option] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    evaluations: int = 0

    @property
    def needs_cfg(self) -> bool:
        """Whether it changes classifier-free guidance, and so says nothing without it."""
        return self.acts in ("away", "direction", "scale", "range")


START, END = Option("share of the steps before it begins", 0, 1), Option("share of the steps after which it ends", 0, 1)
LIMIT = Option("the largest value that latents should have, where 1 is their usual spread", 0.01, 1000)
PERCENTILE = Option("share of the values that stay as they are", 0.5, 1)
LAYERS = Option("which layers", layers=True)

_ELSEWHERE = {  # what papers and other programs call them
    "adaptive_projected_guidance": "apg", "cfg++": "cfg_pp", "cfgpp": "cfg_pp", "cfg_zero_star": "cfg_zero", "cfg_zero*": "cfg_zero",
    "classifier_free_zero_star_guidance": "cfg_zero", "perp_neg_guider": "perp_neg", "perturbed_attention_guidance": "pag",
    "skip_layer_guidance": "slg", "skip_layer_guidance_dit": "slg", "dynamic_thresholding": "dynamic_threshold", "dynthres": "mimic",
    "dynamic_thresholding_full": "mimic", "dynamic_thresholding_simple": "mimic", "thresholding": "dynamic_threshold", "clip": "classifier",
    "clip_guidance": "classifier", "rescale_cfg": "guidance_rescale",
}

GUIDERS = Table("guider", {
    "cfg_zero": GuiderInfo(
        "the negative estimate is scaled to lie nearest to the positive one, and the first steps of a flow stand still",
        "Fan et al. 2025 (CFG-Zero*)",
        "away", {"zero_steps": Option("first steps of a run in which nothing moves", 0, 100, True)}, {"zero_steps": 1}),
    "perp_neg": GuiderInfo(
        "the negative words take nothing from what the prompt says, too", "Armandpour et al. 2023 (Perp-Neg)", "away",
        {"weight": Option("of the negative prompt", 0, 20)}, {"weight": 1.0}, 1),
    "apg": GuiderInfo(
        "only what stands upright on the estimate is guided, in steps of bounded length", "Sadat et al. 2024 (APG)", "direction",
        {"momentum": Option("of earlier steps; below 0 it leads away from them", -0.99, 0.99),
         "eta": Option("share of what lies along the estimate", 0, 1),
         "norm_threshold": Option("longest step, 0 for any", 0, 10_000)}, {"momentum": -0.5, "eta": 0.0, "norm_threshold": 15.0}),
    "cfg_pp": GuiderInfo(
        "the noise that stays is the negative estimate's", "Chung et al. 2024 (CFG++)", "scale",
        {"scale": Option("the paper's lambda, in place of guidance_scale", 0, 1)}, {"scale": 0.6}),
    "mimic": GuiderInfo(
        "the range of a lower guidance scale, channel by channel", "sd-dynamic-thresholding", "range",
        {"scale": Option("the lower guidance scale", 0, 100), "percentile": PERCENTILE}, {"scale": 4.0, "percentile": 1.0}),
    "pag": GuiderInfo(
        "away from the network with self-attention that looks at nothing else", "Ahn et al. 2024 (PAG)", "weak",
        {"scale": Option("how far away", 0, 100), "layers": LAYERS, "start": START, "end": END},
        {"scale": 3.0, "layers": "middle", "start": 0.0, "end": 1.0}, 1),
    "slg": GuiderInfo(
        "away from the network with some blocks left out", "Stability AI 2024 (Stable Diffusion 3.5)", "weak",
        {"scale": Option("how far away", 0, 100), "layers": LAYERS, "start": START, "end": END},
        {"scale": 2.8, "layers": "middle", "start": 0.01, "end": 0.2}, 1),
    "classifier": GuiderInfo(
        "up the slope of a classifier that is given as classifier=", "Dhariwal & Nichol 2021", "slope",
        {"scale": Option("1 is Bayes' rule", 0, 1e6), "through": Option("how x0 becomes the pixels that CLIP sees", choices=("preview", "decoder")),
         "start": START, "end": END}, {"scale": 1.0, "through": "preview", "start": 0.0, "end": 1.0}),
    "static_threshold": GuiderInfo("x0 is clamped", "Saharia et al. 2022 (Imagen)", "threshold", {"limit": LIMIT}, {"limit": 4.0}),
    "dynamic_threshold": GuiderInfo(
        "x0 is clamped at its own percentile and shrunk", "Saharia et al. 2022 (Imagen)", "threshold", {"percentile": PERCENTILE, "limit": LIMIT},
        {"percentile": 0.995, "limit": 3.0}),
}, elsewhere=_ELSEWHERE)


def filled(said: Chosen | None) -> dict[str, dict[str, Any]]:
    """Guiders as they were asked for, in the order in which they act, with all their options.

    Raises:
        RequestError: an unknown name, an option that it does not have or a value that the option does not take, a share that ends before it starts,
            or two that cannot act together.
    """
    made = GUIDERS.filled(said or {})
    for name, options in made.items():
        if options.get("start", 0) >= options.get("end", 1):
            raise RequestError(f"{name} starts at {options['start']:g} and ends at {options['end']:g}: expected the start before the end.")
    for kind in ("away", "threshold"):
        several = [name for name in made if GUIDERS[name].acts == kind]
        if len(several) > 1:
            raise RequestError(f"{' and '.join(several)} are given but both say {WHAT[kind]}: leave one of them out.")
    return made


def weaker(guiders: Chosen, progress: Progress, level: Level) -> int:
    """How many of these guiders leave a weaker network behind at a level."""
    return sum(progress.within(level, options["start"], options["end"]) for name, options in guiders.items() if GUIDERS[name].acts == "weak")


def still(guiders: Chosen, progress: Progress, level: Level) -> bool:
    """Whether nothing moves at a level, so that no network need be asked."""
    return "cfg_zero" in guiders and progress.step(level) < guiders["cfg_zero"]["zero_steps"]


WHAT = {"away": "what is guided away from", "threshold": "how x0 is kept within bounds"}
