"""Parts of another class than a family declares, which do the same work: a small autoencoder in the place of the model's own (TAESD and its kin).

It is taught the model's latents as the denoiser has them, so its own scale holds. Knows declarations and configs; names no family and loads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from latentgen.errors import ModelError
from latentgen.models.family import Config, Family, Part

if TYPE_CHECKING:
    from latentgen.models.load import Source

INSTEAD = {"diffusers.AutoencoderKL": "diffusers.AutoencoderTiny"}  # declared class -> what may stand there where it is given


def stands_in(part: Part, config: Config) -> Part | None:
    """The part as another class that may stand there, None where the config is of its own class."""
    other = INSTEAD.get(part.cls, "")
    return replace(part, cls=other, original=None) if other and config.get("_class_name") == other.partition(".")[2] else None


def with_those(family: Family, sources: Mapping[str, Source]) -> tuple[Family, tuple[str, ...]]:
    """The family with the classes of the parts that were given, and a note for each that is another.

    Raises:
        ModelError: an autoencoder for latents of another shape.
    """
    notes = []
    for part in family.parts:
        config = sources[part.name].config if part.name in sources else {}
        if (other := stands_in(part, config)) is None:
            continue
        channels, latent = config.get("latent_channels", 4), family.latent
        if channels != latent.channels:
            raise ModelError(f"{sources[part.name].label} has latents of {channels!r:.40} channels and this model's have {latent.channels}: "
                             "give the small autoencoder that was made for it")
        scale, shift = (float(config.get(name) or usual) for name, usual in (("scaling_factor", 1.0), ("shift_factor", 0.0)))
        family = replace(family, parts=tuple(other if p.name == part.name else p for p in family.parts),
                         latent=replace(latent, scale=scale, shift=shift))
        notes.append(f"pictures go through {sources[part.name].label}, a small autoencoder, not through the model's own: faster, and less exact")
    return family, tuple(notes)
