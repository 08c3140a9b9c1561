"""The table of approximations: what each is called, takes, and which networks have what it needs. Knows networks' kinds by their classes; no
family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from latentgen.diffusion.option import Option
from latentgen.diffusion.table import Chosen, Table
from latentgen.models.approximate import deep, merge, stack
from latentgen.models.approximate.memory import Tally
from latentgen.models.asked import Asked

Kind = Literal["unet", "transformer"]
KINDS: Mapping[Kind, str] = {"unet": "U-Nets", "transformer": "transformers"}


@dataclass(frozen=True)
class Setting:
    """What an approximation is told of its run: what the network is asked, (h, w) of the latent, and where it counts what it saves."""

    asked: Asked
    shape: tuple[int, int]
    tally: Tally


@dataclass(frozen=True)
class Approximation:
    """An approximation and what to know before running it.

    apply: (network, setting, options by name) -> a view of the network.  about, paper: one line each.  kind: of the networks that it works on.
    counts: what its tally counts, in words.  group: two of one group do the same work, so that only one of them can.
    adaptive: what it leaves out depends on the picture, so pictures of a batch go one at a time.
    """

    apply: Callable[..., nn.Module]
    about: str
    paper: str
    kind: Kind
    counts: str
    group: str
    options: Mapping[str, Option]
    adaptive: bool = False

    @property
    def defaults(self) -> dict[str, Any]:
        """The values of its options when they are left alone."""
        keywords = self.apply.__kwdefaults__ or {}
        return {name: keywords[name] for name in self.options}


def _first_block(net: nn.Module, setting: Setting, *, threshold: float = 0.08) -> nn.Module:
    return stack.skipping(net, setting.asked, lambda: stack.Steady(threshold), setting.tally)


def _tea_cache(net: nn.Module, setting: Setting, *, threshold: float = 0.15) -> nn.Module:
    return stack.skipping(net, setting.asked, lambda: stack.Drifting(threshold), setting.tally)


def _taylor(net: nn.Module, setting: Setting, *, interval: int = 3, order: int = 1, warmup: int = 3) -> nn.Module:
    return stack.skipping(net, setting.asked, lambda: stack.Foretold(setting.asked, interval, order, warmup), setting.tally)


def _deep_cache(net: nn.Module, setting: Setting, *, interval: int = 3, layers: int = 1) -> nn.Module:
    return deep.deep_cached(net, setting.asked, setting.tally, interval=interval, layers=layers)


def _token_merging(net: nn.Module, setting: Setting, *, ratio: float = 0.5, deepest: int = 1) -> nn.Module:
    return merge.merged(net, setting.tally, shape=setting.shape, ratio=ratio, deepest=deepest)


INTERVAL = Option("of this many calls one is computed in full", 1, 20, whole=True)
_ELSEWHERE = {  # what other programs call them
    "tome": "token_merging", "tomesd": "token_merging", "tomeratio": "token_merging", "tokenmergingratio": "token_merging",
    "teacache": "tea_cache", "fbcache": "first_block", "fbc": "first_block", "firstblockcache": "first_block", "wavespeed": "first_block",
    "paracache": "first_block", "deepcache": "deep_cache", "taylorseer": "taylor", "taylorseercache": "taylor",
}
APPROXIMATIONS = Table("approximation", {
    "first_block": Approximation(
        _first_block, "all blocks but the first are left out where that one changes its input nearly as before", "Cheng et al. 2025 (ParaAttention)",
        "transformer", "block passes", "stack", {"threshold": Option("relative change under which the rest is left out; 0 leaves nothing out", 0, 1)},
        True),
    "tea_cache": Approximation(
        _tea_cache, "all blocks are left out until what the first reads has drifted far enough; without the paper's fitted polynomials",
        "Liu et al. 2024 (TeaCache)", "transformer", "block passes", "stack",
        {"threshold": Option("sum of relative changes at which the blocks run again; 0 leaves nothing out", 0, 2)}, True),
    "taylor": Approximation(
        _taylor, "blocks run in every n-th call, and a Taylor polynomial in time foretells between", "Liu et al. 2025 (TaylorSeer)", "transformer",
        "block passes", "stack", {"interval": INTERVAL, "order": Option("of the polynomial; 0 keeps what was", 0, 4, whole=True),
                                  "warmup": Option("first calls that are computed in full", 0, 100, whole=True)}),
    "deep_cache": Approximation(
        _deep_cache, "the deep layers run in every n-th call", "Ma et al. 2023 (DeepCache)", "unet", "layer passes", "layers",
        {"interval": INTERVAL, "layers": Option("layers at the highest resolution that run in every call", 1, 2, whole=True)}),
    "token_merging": Approximation(
        _token_merging, "self-attention reads tokens that are alike as one", "Bolya and Hoffman 2023 (ToMe for SD)", "unet",
        "tokens of self-attention", "tokens", {"ratio": Option("share of the tokens that is merged; 0 merges none", 0, 0.75),
                                               "deepest": Option("merge where the grid is at most so much smaller than the "
                                                                 "largest that has attention", 1, 8, whole=True)}),
}, elsewhere=_ELSEWHERE)


def kind_of(cls: str) -> Kind:
    """The kind of network that a declared class is, "diffusers.UNet2DConditionModel"."""
    return "unet" if "UNet" in cls else "transformer"


def approximated(net: nn.Module, chosen: Chosen, asked: Asked, *, shape: tuple[int, int], tallies: dict[str, Tally]) -> nn.Module:
    """A view of a network with approximations, in the order of the table.

    Args:
        asked: is told of each call. shape: (h, w) of the latent.
        tallies: name -> where it counts what it saves, filled in where it is missing; a run has one of each name, whatever it makes views of.
    """
    for name, info in APPROXIMATIONS.items():
        if name in chosen:
            net = info.apply(net, Setting(asked, shape, tallies.setdefault(name, Tally())), **chosen[name])
    return net


def saved(tallies: Mapping[str, Tally]) -> list[str]:
    """A sentence about what each approximation has saved so far."""
    return [f"{name}: {tally.saved} of {tally.asked} {(info := APPROXIMATIONS[name]).counts} were "
            + ("merged away" if info.group == "tokens" else "reused")
            for name, tally in tallies.items()]


def clashes(names: Iterable[str]) -> tuple[str, str] | None:
    """Two that do the same work, if there are."""
    seen: dict[str, str] = {}
    for name in names:
        group = APPROXIMATIONS[name].group
        if group in seen:
            return seen[group], name
        seen[group] = name
    return None
