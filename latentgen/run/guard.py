"""Numbers that went wrong: found, named by stage, step and picture, and computed once more in float32 where that is the known cure.

Knows tensors. Knows no request, family or sampler. Nothing here waits for a device before a stage is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from latentgen.errors import NotFiniteError

T = TypeVar("T")
FLAT = 2 / 255  # of pixels in [-1, 1]: a byte to either side of one colour


class DenoiserError(NotFiniteError):
    """The denoiser gave NaN or infinity."""


def once_more(what: str, compute: Callable[[torch.dtype], T], dtype: torch.dtype) -> tuple[T, tuple[str, ...]]:
    """compute(dtype), or where that gives NaN or infinity compute(float32), with a note about it.

    what: what is done, as "the picture was decoded".

    Raises:
        NotFiniteError: in float32 as well.
    """
    try:
        return compute(dtype), ()
    except NotFiniteError as error:
        if dtype == torch.float32:
            raise
        note = f"{what} once more in float32: {error}"
    return compute(torch.float32), (note,)


class Watch:
    """Which step of a denoiser first gave NaN or infinity, of which picture. A step costs a reduction on its device; reading waits for it, once."""

    def __init__(self) -> None:
        self._finite: list[Tensor] = []

    def see(self, *tensors: Tensor) -> None:
        """One step is done: what came of it, each (B, ...)."""
        fine = [torch.isfinite(tensor).flatten(1).all(1) for tensor in tensors]
        self._finite.append(torch.stack(fine).all(0))

    def first(self) -> tuple[int, tuple[int, ...]] | None:
        """The first such step, from 0, and its pictures, from 0; None where all is finite."""
        if not self._finite:
            return None
        bad = (~torch.stack(self._finite)).cpu()
        steps = bad.any(1).nonzero().flatten().tolist()
        return (steps[0], tuple(bad[steps[0]].nonzero().flatten().tolist())) if steps else None


def check_words(heard: Mapping[str, Tensor], tokens: Tensor, pooled: Tensor | None, dtype: torch.dtype) -> None:
    """NotFiniteError where a text encoder's answer is not finite, which names the encoders.

    heard: tokenizer -> states of its encoder, as far as they are known apart.  tokens, pooled: what all of them made together.
    """
    if all(bool(torch.isfinite(t).all()) for t in (tokens, pooled) if t is not None):
        return
    wrong = [name.replace("tokenizer", "text_encoder") for name, states in heard.items() if not bool(torch.isfinite(states).all())]
    named_parts = f" ({', '.join(wrong)})" if wrong else ""
    raise NotFiniteError(f"the text encoder{named_parts} gave NaN or infinity in {named(dtype)}: expected finite numbers, so run it in float32")


def flat(pictures: Tensor) -> list[bool]:
    """Of pictures (B, 3, H, W) in [-1, 1]: whether all that can be seen of one is a single colour, to a byte."""
    seen = pictures.detach().clamp(-1, 1).flatten(2)
    return ((seen.amax(2) - seen.amin(2)).amax(1) <= 2 * FLAT).tolist()


def even(z: Tensor) -> list[bool]:
    """Of latents (B, c, h, w): whether each channel of one has the same number everywhere, so that a flat picture is what it says."""
    values = z.detach().flatten(2)
    return ((values.amax(2) - values.amin(2)).amax(1) <= 1e-3 * values.abs().amax((1, 2)).clamp(min=1e-6)).tolist()


def pictures_named(which: Sequence[int], seeds: Sequence[int]) -> str:
    """"the picture", or of several "picture 2 (seed 8)"."""
    return "the picture" if len(seeds) == 1 else "picture " + ", ".join(f"{n + 1} (seed {seeds[n]})" for n in which)


def named(dtype: torch.dtype) -> str:
    """"float16"."""
    return str(dtype).removeprefix("torch.")
