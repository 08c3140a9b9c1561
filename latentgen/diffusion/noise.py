"""Seeds -> noise.

Knows seeds and shapes. Does not know levels, models or devices: noise is always drawn on the CPU in float32, so that a seed
means the same picture everywhere, and never from the global generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentgen.errors import RequestError


class SeededNoise:
    """One stream of unit normal noise for each image of a batch.

    Image i depends on seeds[i] alone: its noise is the same in any batch, at any place. The first draw is what diffusers
    draws for `torch.Generator("cpu").manual_seed(seed)`; later draws (stochastic samplers) follow in order, so a run can be
    taken up again by redrawing what it has used.

    seeds: one whole number in [0, 2**64) for each image.
    shape: of one image's latent, (C, h, w).
    Raises RequestError for no seeds, or one that is not such a number.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...]) -> None:
        seeds = list(seeds)
        if not seeds:
            raise RequestError("no seeds were given: give one for each image.")
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
                raise RequestError(f"seed {seed!r} cannot be used: give a whole number from 0 to 2**64 - 1.")
        self.shape = tuple(shape)
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def draw(self) -> Tensor:
        """The next noise of every image: (B, *shape), float32, on the CPU, mean 0 and standard deviation 1."""
        draws = [torch.randn((1, *self.shape), generator=generator, dtype=torch.float32, device="cpu") for generator in self._generators]
        return torch.cat(draws)
