"""Guidance as a request asks for it: scales, and what contradicts them. Knows requests and the contract of families; runs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentgen.models.family import Family
    from latentgen.run.request import Request

OPTIONS = ("original_size", "crop_top_left", "target_size", "negative_original_size", "negative_crop_top_left", "negative_target_size", "aesthetic_score",
           "negative_aesthetic_score")


def guidance_of(request: Request, family: Family, refuse: Callable[[str], None]) -> tuple[float, float]:
    """The guidance scale as the model takes it, and the weight of classifier-free guidance, with contradictions found."""
    scale = family.defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
    said = request.guidance_scale is not None
    if family.guidance in ("cfg", "image"):
        cfg, off = scale, "guidance_scale is 1, which turns guidance off: raise guidance_scale"
        if request.true_cfg_scale is not None:
            refuse(f"true_cfg_scale is given but {family.name} has no guidance built in: use guidance_scale")
    else:
        cfg, off = request.true_cfg_scale or 1.0, f"{family.name} here is distilled, and without true_cfg_scale runs no classifier-free guidance: pass true_cfg_scale above 1"
        if family.guidance == "none" and scale != 1:
            if said:
                refuse(f"guidance_scale is {scale:g} but {family.name} here has no guidance to scale: leave it out")
            scale = 1.0
    off_too = cfg == 1 and family.guidance != "image"  # where a picture guides, the negative words count at 1, too
    if off_too and any((request.negative_prompt, request.negative_prompt_2, request.negative_prompt_3)):
        refuse(f"negative_prompt is given but {off}, or leave the negative prompt out")
    if off_too and (request.guidance_rescale or request.guidance_interval not in (None, (0.0, 1.0))):
        refuse(f"guidance_rescale or guidance_interval is given but {off}, or leave them out")
    if request.image_guidance_scale is not None and family.guidance != "image":
        refuse(f"image_guidance_scale is given but {family.name} here weighs no picture against the words: leave it out")
    for name in OPTIONS:
        if getattr(request, name) is not None and name not in family.options:
            refuse(f"{name} is given but {family.name} here is not told it: leave it out")
        elif getattr(request, name) is not None and name.startswith("negative_") and off_too:
            refuse(f"{name} is given but {off}, or leave it out")
    return scale, cfg
