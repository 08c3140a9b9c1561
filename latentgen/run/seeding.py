"""Which seeds each picture of a batch has. Knows requests and a LatentSpec; draws no noise (`diffusion.noise` does).

Without a variation picture i has seed + i. With one, as in A1111, the seed stays and the variation seed counts up: the batch holds variations of one
picture. A list says each picture's own.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentgen.diffusion.noise import SeededNoise
from latentgen.errors import RequestError

if TYPE_CHECKING:
    from latentgen.pixels.latent import LatentSpec
    from latentgen.run.request import Request


@dataclass(frozen=True)
class Seeds:
    """The seeds of a plan.

    Attributes:
        own: one of each picture.
        variations: a second one of each picture, () without a variation; `strength` is how far its noise is turned to that, 0 to 1.
        size: (width, height) in pixels of the picture whose noise is placed in this one's middle, None for its own.
    """

    own: tuple[int, ...]
    variations: tuple[int, ...] = ()
    strength: float = 0.0
    size: tuple[int, int] | None = None

    def noise(self, shape: tuple[int, int, int], factor: int) -> SeededNoise:
        """The noise of all pictures; shape: (c, h, w) of the latent, factor: pixels per latent."""
        origin = None if self.size is None else (self.size[1] // factor, self.size[0] // factor)
        return SeededNoise(self.own, shape, variations=self.variations, strength=self.strength, origin=origin)

    def __str__(self) -> str:
        own = ", ".join(map(str, self.own))
        varied = f", varied by {self.strength:g} towards {', '.join(map(str, self.variations))}" if self.variations else ""
        return own + varied + (f", noise of {self.size[0]}x{self.size[1]}" if self.size else "")


def seeds_of(request: Request, spec: LatentSpec, refuse: Callable[[str], None]) -> Seeds:
    """The seeds of a request, those drawn that it leaves open; `refuse` is given what cannot be honoured.

    Raises:
        RequestError: lists of another length than the batch, numbers past the last seed, or a size that the model's latents do not have.
    """
    strength, size = request.variation_strength or 0.0, _size(request, spec)
    if request.variation_seed is not None and not strength:
        refuse("variation_seed is given but variation_strength is 0: pass variation_strength above 0 and up to 1, or leave it out")
    if request.latents is not None and (strength or size):
        refuse("variation_strength or seed_width is given but the run starts from latents, which hold their noise: leave it out")
        strength, size = 0.0, None
    own = _each("seed", request.seed, request.batch, counting=not strength)
    return Seeds(own, _each("variation_seed", request.variation_seed, request.batch) if strength else (), strength, size)


def _each(name: str, said: int | tuple[int, ...] | None, batch: int, *, counting: bool = True) -> tuple[int, ...]:
    """One seed of each picture, counted up from the one that was said or drawn."""
    if isinstance(said, tuple):
        if len(said) != batch:
            asked = "1 picture is" if batch == 1 else f"{batch} pictures are"
            raise RequestError(f"{name} holds {len(said)} seeds but {asked} asked for: give one for each picture, and leave batch out")
        return said
    first = secrets.randbits(32) if said is None else said
    if counting and first + batch > 2**63:
        raise RequestError(f"{name} is {first} with a batch of {batch}: picture i has {name} + i, "
                           "which may not pass 2**63 - 1, so give a smaller one")
    return tuple(range(first, first + batch)) if counting else (first,) * batch


def _size(request: Request, spec: LatentSpec) -> tuple[int, int] | None:
    """What was said of the size whose noise is used."""
    sides = {"seed_width": request.seed_width, "seed_height": request.seed_height}
    said = {name: side for name, side in sides.items() if side is not None}
    if not said:
        return None
    if len(said) == 1:
        raise RequestError(f"{next(iter(said))} is given alone: expected seed_width and seed_height, so give both")
    for name, side in said.items():
        if side % spec.factor:
            below = side // spec.factor * spec.factor
            raise RequestError(f"{name} is {side}: expected a multiple of {spec.factor}, so use {below or spec.factor} or {below + spec.factor}")
    return said["seed_width"], said["seed_height"]
