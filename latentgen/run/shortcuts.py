"""What a run computes once instead of in every step, and what it leaves out where that was asked for: views of the networks for one plan.

Moves nothing and names no family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from latentgen.diffusion.sample import asked as levels_asked
from latentgen.models.approximate.memory import Tally
from latentgen.models.approximate.table import approximated
from latentgen.models.asked import Asked
from latentgen.models.family import Family, Modules
from latentgen.models.heard import heard
from latentgen.models.modulation import Key, Tables, modulated, tables
from latentgen.models.shared import shared
from latentgen.run.batch import repeated
from latentgen.run.passes import Pass
from latentgen.run.plan import Plan
from latentgen.run.words import Script


def known(family: Family, modules: Modules, *, plan: Plan, one: Pass, script: Script, device: torch.device) -> dict[str, Tables]:
    """Of each network what is known before the first step of a pass, which holds for every view of it."""
    return {name: tables(net, _calls(family, modules, name, plan, one, script, device)) for name, net in modules.items()}


def exact(modules: Modules, asked: Asked, looked_up: Mapping[str, Tables]) -> Modules:
    """The networks of one pass, exact up to rounding: what is `known` looked up, what both sides of guidance share and what is made of the words
    computed once."""
    return {name: heard(shared(modulated(net, asked, looked_up[name]), asked), asked) for name, net in modules.items()}


def approximate(modules: Modules, asked: Asked, *, plan: Plan, shape: tuple[int, int], tallies: dict[str, Tally]) -> Modules:
    """The networks of a run with the approximations of its plan; shape: (h, w) of the latent that they see; tallies: of the run."""
    return {name: approximated(net, plan.approximate, asked, shape=shape, tallies=tallies) for name, net in modules.items()}


def _calls(family: Family, modules: Modules, name: str, plan: Plan, one: Pass, script: Script,
           device: torch.device) -> list[tuple[Key, Callable[[nn.Module], Any]]]:
    """A call of the network for each level that the sampler will ask about and each conditioning that is heard there."""
    x = torch.zeros(1, family.latent.channels, *one.seen, device=device)

    def call(net: nn.Module, level: Any, conditioning: Any) -> None:
        with torch.no_grad():
            family.predict({**modules, name: net}, x, level, conditioning)

    levels = dict.fromkeys(levels_asked(plan.sampler, one.levels, plan.options))
    pairs = [(level, c) for level in levels for c in script.at(level).every]
    return [((level.time, c), partial(call, level=level, conditioning=repeated(c, 1))) for level, c in pairs]
