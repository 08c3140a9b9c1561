"""Another program's second pass at a larger size, as fields of a request. Knows A1111's words and names of ways to enlarge; no file and no graph."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from latentgen.diffusion.names import plain
from latentgen.pixels.upscale import UPSCALERS
from latentgen.run.foreign.fields import Found, number, whole

WORDS = {"latent": "Latent", "latent_bicubic": "Latent (bicubic)", "latent_nearest": "Latent (nearest-exact)", "lanczos": "Lanczos",
         "nearest": "Nearest"}  # ours -> A1111's
_NAMES = {plain(theirs): (ours, "") for ours, theirs in WORDS.items()} | {  # theirs -> (ours, what differs)
    "latentantialiased": ("latent", ""), "latentbicubicantialiased": ("latent_bicubic", "by another cubic curve"),
    "latentnearest": ("latent_nearest", ""),
    "none": ("lanczos", "")}
_LATENT = {"bilinear": ("latent", ""), "nearestexact": ("latent_nearest", ""), "bicubic": ("latent_bicubic", ""),
           "area": ("latent_nearest", "it takes the mean of areas"),
           "bislerp": ("latent", "it goes along the sphere")}  # ComfyUI's, for latents
_PIXELS = {"lanczos": ("lanczos", ""), "nearestexact": ("nearest", "")}  # and for pictures
_READ = ("Hires upscale", "Hires resize", "Hires upscaler", "Hires steps")


def hires(settings: Mapping[str, str], found: Found) -> bool:
    """A1111's settings of a second pass; False where there is none. "Denoising strength" is then the second pass's."""
    said = {name: value for name, value in settings.items() if name.startswith("Hires") and not value.startswith("Use same")}
    if not said:
        return False
    size = re.fullmatch(r"(\d{1,6})x(\d{1,6})", said.get("Hires resize", ""))
    sides = [found.fields.get("width"), found.fields.get("height")]
    factor = said.get("Hires upscale") if size is None else same_factor(sides, [int(size[1]), int(size[2])])
    if factor is None or not found.take("upscale", factor, number, said="Hires upscale"):
        whole_of_it = ", ".join(f"{name}: {settings[name]}" for name in (*said, "Denoising strength") if name in settings)
        found.note(f"a second pass at a larger size ({whole_of_it[:200]}) was not taken over: this is the first pass")
        return True
    take_upscaler(found, said.get("Hires upscaler", "Latent"))
    found.take("upscale_strength", settings.get("Denoising strength"), number, said="Denoising strength")
    steps = said.get("Hires steps", "0")
    found.take("upscale_steps", found.fields.get("steps") if steps == "0" else steps, whole, said="Hires steps")
    for name, value in said.items():
        if name not in _READ:
            found.note(f"{name}: {value[:120]} has no equivalent here: the second pass is as the first")
    return True


def take_upscaler(found: Found, name: Any, *, of: str = "a1111") -> None:
    """Take over a way to enlarge, with a note where ours is another.

    Args:
        of: whose name it is: "a1111", or of ComfyUI "latents" or "pixels".
    """
    table, other = {"a1111": (_NAMES, "lanczos"), "latents": (_LATENT, "latent"), "pixels": (_PIXELS, "lanczos")}[of]
    ours, differs = table.get(plain(str(name)[:80]),
                              (other, "it is a network of its own, which is not loaded" if of == "a1111" else "it is another filter"))
    found.take("upscaler", ours)
    if differs:
        found.note(f"upscaler {str(name)[:60]!r} is {ours} here ({UPSCALERS[ours].about}): {differs}")


def same_factor(before: list[Any], after: list[Any]) -> float | None:
    """By how much sides grew, None where they did not grow alike or are not known."""
    if not all(isinstance(side, int) and side > 0 for side in (*before, *after)):
        return None
    factors = [new / old for old, new in zip(before, after, strict=True)]
    return round(factors[0], 4) if abs(factors[0] - factors[1]) < 0.01 else None
