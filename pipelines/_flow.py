"""What families on a rectified flow share: 2x2 patches of a latent as tokens and the shift of levels by a picture's size.

Knows scheduler configs as diffusers writes them. Knows no checkpoint, no tensor names and no engine.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from latentgen.models.family import Config

DYNAMIC: Config = {  # what a scheduler config that leaves them out means
    "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15, "shift": 1.0, "use_dynamic_shifting": False}


def packed(x: Tensor) -> Tensor:
    """(B, c, h, w) -> tokens (B, h/2 * w/2, 4c): each 2x2 patch is one token."""
    return pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, h: int, w: int) -> Tensor:
    """Tokens (B, h/2 * w/2, 4c) -> (B, c, h, w)."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (h // 2, w // 2)), 2)


def dynamic_shift(width: int, height: int, steps: int, *, patch: int, scheduler: Config) -> float:
    """Shift of the levels of a picture: exp(mu), with mu linear in the number of its tokens.

    Args:
        width, height: of the picture, pixels; patch: pixels along a side of a token.
        scheduler: with every key of `DYNAMIC`.
    """
    span = scheduler["max_image_seq_len"] - scheduler["base_image_seq_len"]
    slope = (scheduler["max_shift"] - scheduler["base_shift"]) / span
    mu = scheduler["base_shift"] + slope * ((width // patch) * (height // patch) - scheduler["base_image_seq_len"])
    return float(mu) if scheduler.get("time_shift_type") == "linear" else math.exp(mu)
