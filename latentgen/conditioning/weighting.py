"""Weights of tokens, applied to what an encoder made of them. Knows states and published rules; knows no encoder, family or prompt.

"a1111"           the states times the weights, then all times old mean / new mean, so that the mean is as it was: AUTOMATIC1111's web UI, "Original"
"a1111_no_norm"   the states times the weights: its "No norm"
"comfy"           states moved along the line from the empty prompt's: empty + weight * (states - empty): ComfyUI

They differ: name the one that is meant. All hold encoder by encoder, before states are joined with another's, and never touch a pooled vector.
A1111's mean is that of one chunk. Where every weight of a chunk is 1, its states come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from latentgen.conditioning.prompt import PromptChunks
from latentgen.errors import RequestError

Rule = Literal["a1111", "a1111_no_norm", "comfy"]
RULES: tuple[Rule, ...] = ("a1111", "a1111_no_norm", "comfy")
Weigh = Callable[[str, Tensor], Tensor]  # (tokenizer's name, states (n, length, width)) -> states with weights
NOUGHT = 1e-6  # of the mean size of states: a mean below it is rounding, and nothing can be scaled to it


def unweighted(reader: str, states: Tensor) -> Tensor:
    """A `Weigh` that leaves states as they are."""
    return states


@dataclass(frozen=True)
class Listener:
    """A `Weigh` that leaves states as they are and keeps them: how the empty prompt's are had.

    Attributes:
        heard: tokenizer's name -> states (n, length, width).
    """

    heard: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, reader: str, states: Tensor) -> Tensor:
        """The states."""
        self.heard[reader] = states
        return states


@dataclass(frozen=True)
class Weighing:
    """A `Weigh` by one of the rules.

    Attributes:
        weights: tokenizer's name -> (n, length); one that is not named is not weighed.
        empty: tokenizer's name -> states of the empty prompt, (1 or n, length, width); needed for "comfy".
        heard: names of those that were weighed, filled as it is called: a weight for any other was not heard.
    """

    rule: Rule
    weights: Mapping[str, Tensor]
    empty: Mapping[str, Tensor] = field(default_factory=dict)
    heard: set[str] = field(default_factory=set)

    def __call__(self, reader: str, states: Tensor) -> Tensor:
        """The states of `reader` with its weights.

        Raises:
            RequestError: see `weighted`.
        """
        self.heard.add(reader)
        return weighted(states, self.weights[reader], self.rule, empty=self.empty.get(reader)) if reader in self.weights else states


def weights_of(chunks: Mapping[str, PromptChunks]) -> dict[str, Tensor]:
    """Tokenizer's name -> weights (n, length), of those prompts that have any but 1."""
    return {reader: torch.tensor(laid.weights) for reader, laid in chunks.items() if laid.weighted}


def weighted(states: Tensor, weights: Tensor, rule: Rule, *, empty: Tensor | None = None) -> Tensor:
    """States with the weights of their tokens.

    Args:
        states: (n, length, width) of n chunks.
        weights: (n, length), 1 for as it is.
        empty: states of the empty prompt, (1 or n, length, width), for "comfy".

    Returns:
        Like `states`; computed in float32.

    Raises:
        RequestError: a rule that is not known, or weights or empty states that do not fit.
    """
    if rule not in RULES:
        raise RequestError(f"weighting is {rule!r:.40}: expected one of {', '.join(map(repr, RULES))}")
    if weights.shape != states.shape[:2]:
        raise RequestError(f"there are {tuple(weights.shape)} weights of tokens and {tuple(states.shape[:2])} states: this prompt cannot be weighed "
                           "here, so leave its weights out")
    touched = (weights != 1).any(dim=1)
    if not bool(touched.any()):
        return states
    z, w = states.float(), weights.to(device=states.device, dtype=torch.float32)[..., None]
    if rule == "comfy":
        if empty is None or empty.shape[1:] != states.shape[1:] or len(empty) not in (1, len(states)):
            raise RequestError("the weights are to be read as ComfyUI does, and the empty prompt's states are not there in the same shape: "
                               "use weighting='a1111'")
        silent = empty.to(z)
        made = torch.where(w == 1, z, silent + w * (z - silent))
    else:
        made = z * w
        if rule == "a1111":
            made = made * _restoring(z, made)
    return torch.where(touched.to(states.device)[:, None, None], made.to(states.dtype), states)


def _restoring(z: Tensor, made: Tensor) -> Tensor:
    """Old mean / new mean of each chunk, (n, 1, 1).

    A last norm without bias leaves a mean of exactly 0, or what rounding makes of it: then 0 / 0 says nothing, and the factor is 1.
    """
    old, new = (t.mean(dim=(1, 2), dtype=torch.float64) for t in (z, made))
    small = NOUGHT * torch.stack([t.abs().mean(dim=(1, 2), dtype=torch.float64) for t in (z, made)])
    lost = (old.abs() <= small[0]) | (new.abs() <= small[1])
    return torch.where(lost, 1.0, old / torch.where(lost, 1.0, new)).to(z.dtype)[:, None, None]
