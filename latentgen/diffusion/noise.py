"""Seeds -> noise.

Knows seeds and shapes. Does not know levels, models or devices: noise is always drawn on the CPU in float32, so that a seed
means the same picture everywhere, and never from the global generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from latentgen.errors import RequestError


class SeededNoise:
    """One stream of unit normal noise for each image of a batch.

    Image i depends on its own seeds alone: its noise is the same in any batch, in any order, at any place. The first draw is
    what diffusers draws for `torch.Generator("cpu").manual_seed(seed)`; later draws (stochastic samplers) follow in order, so a
    run can be taken up again by redrawing what it has used.

    seeds: one whole number in [0, 2**64) for each image.
    shape: of one image's latent, (C, h, w).
    variations: a second seed for each image, towards whose noise the first draw is turned, by the share `strength` in [0, 1].
    origin: (h, w) of another latent, whose noise stands in the middle of the first draw (or, where it is the larger one, the
        middle of it alone is seen); around it is the noise that this shape has of itself.
    Both work as in A1111 (`subseed`, `seed_resize_from`), on the first draw only, and together: the turned noise is placed.
    Raises RequestError for no seeds, one that is not such a number, another number of variations, or a strength out of range.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], *, variations: Sequence[int] = (), strength: float = 0.0,
                 origin: tuple[int, int] | None = None) -> None:
        seeds, variations = _checked(seeds), _checked(variations)
        if not seeds:
            raise RequestError("no seeds were given: give one for each image.")
        if not 0 <= strength <= 1:
            raise RequestError(f"the strength of a variation is {strength}: give a number from 0 to 1.")
        if strength and len(variations) != len(seeds):
            raise RequestError(f"{len(variations)} variation seeds were given for {len(seeds)} seeds: give one for each image.")
        self.shape = tuple(shape)
        self._generators = [_generator(seed) for seed in seeds]
        self._seeds, self._variations, self._strength = seeds, variations, strength
        self._origin = self.shape if origin is None else (*self.shape[:-2], *origin)
        self._begun = False

    def draw(self) -> Tensor:
        """The next noise of every image: (B, *shape), float32, on the CPU, mean 0 and standard deviation 1."""
        draws = [_normal(self.shape, generator) for generator in self._generators]
        if not self._begun and (self._strength or self._origin != self.shape):
            draws = [self._turned(n, own) for n, own in enumerate(draws)]
        self._begun = True
        return torch.stack(draws)

    def sized(self, shape: tuple[int, ...]) -> SeededNoise:
        """The same streams from where they are now, for latents of another shape, (C, h, w)."""
        other = copy(self)
        other.shape = other._origin = tuple(shape)
        other._strength, other._begun = 0.0, True
        return other

    def _turned(self, n: int, own: Tensor) -> Tensor:
        """The first draw of image n, from what its shape and seed give by themselves."""
        placed = self._origin != self.shape
        noise = _normal(self._origin, _generator(self._seeds[n])) if placed else own
        if self._strength:
            noise = slerp(noise, _normal(self._origin, _generator(self._variations[n])), self._strength, dim=-2)
        return centred(noise, own) if placed else noise


def slerp(a: Tensor, b: Tensor, share: float, *, dim: int | tuple[int, ...]) -> Tensor:
    """From a (share 0) to b (share 1) along the sphere (Shoemake 1985): sin((1 - t) w) / sin w * a + sin(t w) / sin w * b, w the angle between them.

    Unlike the straight line this keeps the spread of unit normal noise. Where a and b point the same way, or away from each other, there is no
    such arc and the straight line is taken.

    a, b: of one shape.  dim: the axes that are one vector. A1111 and Forge vary noise with each column of each channel for itself, dim=-2.
    """
    norms = [torch.linalg.vector_norm(one, dim=dim, keepdim=True) for one in (a, b)]
    cosine = ((a * b).sum(dim=dim, keepdim=True) / (norms[0] * norms[1])).clamp(-1, 1)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    arc = torch.sin((1 - share) * angle) / sine * a + torch.sin(share * angle) / sine * b
    return torch.where((cosine.abs() < 1 - 1e-6) & torch.isfinite(arc), arc, torch.lerp(a, b, share))


def centred(noise: Tensor, ground: Tensor) -> Tensor:
    """`ground` (..., h, w) with `noise` (..., h', w') over its middle; of noise that is larger its own middle is taken.

    As A1111 places it: where a difference is odd, one latent nearer to the top and the left; and of noise that is larger by an odd number one
    row (or column) less than would fit.
    """
    out = ground.clone()
    rows, columns = (_overlap(inner, outer) for inner, outer in zip(noise.shape[-2:], ground.shape[-2:], strict=True))
    out[..., rows[0], columns[0]] = noise[..., rows[1], columns[1]]
    return out


def _overlap(inner: int, outer: int) -> tuple[slice, slice]:
    """Where on one axis of `outer` the `inner` lies, and which part of it that is."""
    before = (outer - inner) // 2
    length = inner if before >= 0 else inner + 2 * before
    return slice(max(before, 0), max(before, 0) + length), slice(max(-before, 0), max(-before, 0) + length)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn((1, *shape), generator=generator, dtype=torch.float32, device="cpu")[0]


def _checked(seeds: Sequence[int]) -> list[int]:
    for seed in (seeds := list(seeds)):
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise RequestError(f"seed {seed!r} cannot be used: give a whole number from 0 to 2**64 - 1.")
    return seeds
