"""What a request means where its own words leave that to tables: names in our own spelling. Knows requests and those tables; knows no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from latentgen.diffusion.names import SAMPLER_NAMES, SPACING_NAMES, own
from latentgen.diffusion.sample import SAMPLERS
from latentgen.diffusion.schedule import SPACINGS

if TYPE_CHECKING:
    from latentgen.run.request import Request


def meant(request: Request) -> Request:
    """The request with a sampler and a spacing as we write them, where it has their names in another case."""
    spelt = {name: found for name, known, table in (("sampler", SAMPLERS, SAMPLER_NAMES), ("spacing", SPACINGS, SPACING_NAMES))
             if (said := getattr(request, name)) is not None and (found := own(said, known, table)) not in (None, said)}
    return request.replace(**spelt) if spelt else request
