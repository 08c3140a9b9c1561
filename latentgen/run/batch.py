"""Conditionings as batches: repeated for several pictures, joined for several evaluations, and between two texts.
Knows tensors' shapes and nothing of what they mean."""

from __future__ import annotations

import hashlib

import torch
from PIL import Image
from torch import Tensor

from latentgen.diffusion.noise import slerp
from latentgen.models.family import Conditioning


def tensors(conditioning: Conditioning) -> list[Tensor]:
    """All that a conditioning holds, for counting its bytes."""
    return [t for t in (conditioning.tokens, conditioning.pooled, *conditioning.extra.values()) if t is not None]


def repeated(c: Conditioning, count: int, *, first: int = 0) -> Conditioning:
    """A conditioning of batch 1 for `count` pictures, of which the first has the number `first`, without a copy."""

    def grow(t: Tensor) -> Tensor:
        return t.expand(count, *t.shape[1:])

    rows = tuple((c, first + n) for n in range(count))
    return Conditioning(grow(c.tokens), None if c.pooled is None else grow(c.pooled), {k: grow(v) for k, v in c.extra.items()}, rows)


def joined(several: list[Conditioning]) -> Conditioning:
    """Several conditionings as one batch."""
    pooled = [c.pooled for c in several if c.pooled is not None]
    extra = {name: torch.cat([c.extra[name] for c in several]) for name in several[0].extra}
    rows = tuple(row for c in several for row in c.rows)
    return Conditioning(torch.cat([c.tokens for c in several]), torch.cat(pooled) if pooled else None, extra, rows)


def alike(several: list[Conditioning]) -> bool:
    """Whether conditionings can be one batch: the same tensors of the same shapes."""
    shapes = [(c.tokens.shape, None if c.pooled is None else c.pooled.shape, {name: t.shape for name, t in c.extra.items()}) for c in several]
    return all(shape == shapes[0] for shape in shapes)


def blended(a: Conditioning, b: Conditioning, share: float) -> Conditioning:
    """Between two conditionings of the same shapes, from a (share 0) to b (share 1).

    Each token's state, and the pooled vector, goes along the sphere (`slerp` over its last axis): encoders end in a norm, so that states lie near
    a sphere, and the middle of a straight line between two of them is shorter than both, which attention reads as words half said. Of masks, a
    token is heard that either side hears.
    """

    def between(one: Tensor, other: Tensor) -> Tensor:
        if one is other:
            return one
        if not one.is_floating_point():
            return torch.maximum(one, other)
        return slerp(one.float(), other.float(), share, dim=-1).to(one.dtype)

    pooled = None if a.pooled is None or b.pooled is None else between(a.pooled, b.pooled)
    return Conditioning(between(a.tokens, b.tokens), pooled, {name: between(value, b.extra[name]) for name, value in a.extra.items()})


def fingerprint(image: Image.Image) -> bytes:
    """A hash of a picture's size and pixels."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
