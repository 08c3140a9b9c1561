"""Weaker views of a network, to guide away from: self-attention that looks at nothing else, or blocks that do nothing.

Knows how diffusers builds attention and blocks. Knows no family, request or device, and changes nothing of the network itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from latentgen.errors import ModelError, RequestError
from latentgen.models.fast.swap import undo
from latentgen.models.streamed import Streamed, streamed_class
from latentgen.models.view import view

STACKS = ("transformer_blocks", "blocks", "layers")  # what a transformer's main blocks are called; the first that a network has counts
USUAL = "middle"


def weakened(modules: Mapping[str, Any], *, guider: str, layers: Sequence[str]) -> dict[str, Any]:
    """The modules of a stage with these layers weakened: by "pag" their self-attention, by "slg" their blocks. A view, for one run.

    Args:
        layers: dotted names, as `chosen` gives them.
    """
    made = dict(modules)
    for part, network in modules.items():
        whole = getattr(network, "_orig_mod", network)  # not its compiled form
        names = _under(_found(whole, guider), layers)
        if names:
            change = _looks_at_itself if guider == "pag" else _does_nothing
            made[part] = view(whole, lambda name, own, names=names, change=change: change(own) if name in names else None)
    if all(made[part] is network for part, network in modules.items()):
        raise ModelError(f"{guider} found none of {', '.join(layers)[:200]} in the network as it is loaded: leave {guider} out")
    return made


def chosen(network: nn.Module, *, guider: str, said: Any) -> list[str]:
    """The dotted names of the layers that were asked for: "middle" is the middle block of a U-Net, else one (pag) or three (slg) of the stack.

    Args:
        network: may be on the meta device.
        said: a name, a number in the network's stack of blocks, or a list of them.

    Raises:
        RequestError: the network has no such layer, or none that could be weakened.
    """
    found, kind = _found(network, guider), type(network).__name__
    what = "self-attention" if guider == "pag" else "blocks that could be left out"
    if not found:
        raise RequestError(f"{guider} is given but this network ({kind}) has no {what}: leave {guider} out")
    stack = next((name for name in STACKS if any(one.startswith(f"{name}.") for one in found)), "")
    made: list[str] = []
    for one in said if isinstance(said, (list, tuple)) else [said]:
        wanted = _middle(network, found, stack, guider) if one == USUAL else [f"{stack}.{one}" if stack and str(one).isdigit() else str(one)]
        for name in wanted:
            if not _under(found, [name]):
                raise RequestError(f"{guider}'s layer is {one!r} but there this network ({kind}) has no {what}: choose among {_places(found)}")
            made += [name] if name not in made else []
    return made


def broad(network: nn.Module, *, guider: str, layers: Sequence[str]) -> str:
    """A note where these layers are half or more of all that could be weakened.

    Args:
        layers: dotted names, as `chosen` gives them.
    """
    every = _found(network, guider)
    weak = len(_under(every, layers))
    does, what = ("weakens", "self-attentions") if guider == "pag" else ("leaves out", "blocks")
    said = f"{guider} {does} {weak} of this network's {len(every)} {what}: what is left knows little of the picture, so name fewer"
    return said if 2 * weak >= len(every) > 2 else ""


def _middle(network: nn.Module, found: Sequence[str], stack: str, guider: str) -> list[str]:
    if any(name.startswith("mid_block") for name in found):
        return ["mid_block"]
    if not stack:
        return [found[len(found) // 2].rpartition(".")[0]]
    count = len(network.get_submodule(stack))  # type: ignore[arg-type]
    first = count // 2 if guider == "pag" else min(round(0.3 * count), count - 1)  # of 24 blocks 7 to 9, as Stable Diffusion 3.5 medium has it
    return [f"{stack}.{first + n}" for n in range(3 if guider == "slg" and count >= 10 else 1)]


def _places(found: Sequence[str]) -> str:
    """Names short enough to choose among: of numbered blocks with their number."""
    numbered = ("down_blocks", "up_blocks", *STACKS)
    return ", ".join(sorted({".".join(name.split(".")[:2 if name.startswith(numbered) else 1]) for name in found}))[:300]


def _under(found: Sequence[str], layers: Sequence[str]) -> set[str]:
    return {name for name in found if any(f"{name}.".startswith(f"{layer}.") for layer in layers)}


def _found(network: nn.Module, guider: str) -> list[str]:
    """Dotted names of all self-attention of a network, or of the blocks that it stands in."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    every = {name: module for name, module in network.named_modules() if isinstance(module, (Attention, AttentionModuleMixin))}
    own = [name for name, module in every.items() if not getattr(module, "is_cross_attention", False)]
    if guider == "pag":
        return own
    blocks = dict.fromkeys(name.rpartition(".")[0] for name in own)
    return [name for name in blocks if name and not isinstance(network.get_submodule(name), torch.nn.ModuleList)]


def _looks_at_itself(own: nn.Module) -> nn.Module:
    undo(own)
    own.__class__ = _changed(type(own), Itself)
    return own


def _does_nothing(own: nn.Module) -> nn.Module:
    own.__class__ = _changed(type(own), Nothing)
    return own


def _plain(cls: type) -> type:
    """A module's own class, also of one whose weights are streamed."""
    return cls.__mro__[2] if issubclass(cls, Streamed) else cls


@lru_cache
def _changed(cls: type, change: type) -> type:
    """A module's class with another `forward`. A class, not an attribute: what copies the module, such as a block that is filled for a call, keeps
    it."""
    made = type(f"{change.__name__}{_plain(cls).__name__}", (change, _plain(cls)), {})
    return streamed_class(made) if issubclass(cls, Streamed) and change is Itself else made  # what does nothing needs no weights


class Itself(nn.Module):
    """Attention whose map is the identity, together with its own class: every token gets its own value (Ahn et al. 2024, section 4.1)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The attention's answer, with values for what it would have looked at."""
        with _Identity() as mode:
            out = super().forward(*args, **kwargs)
        if not mode.met:
            raise ModelError(f"{type(self).__mro__[2].__name__} did not compute self-attention by torch's scaled_dot_product_attention, "
                             "so pag cannot "
                             "weaken it: leave pag out")
        return out


class Nothing(nn.Module):
    """A block that gives what it is given, together with its own class. Where words run through it beside the picture it gives both, words first."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The picture's tokens, or both."""
        from diffusers.models.attention_processor import Attention

        said = inspect.signature(super().forward).bind(*args, **kwargs).arguments
        picture, words = said.get("hidden_states", said.get("x")), said.get("encoder_hidden_states")
        looked_at = any(isinstance(module, Attention) and module.is_cross_attention for module in self.modules())  # words that are, are not given on
        return picture if looked_at or words is None else (words, picture)


class _Identity(TorchFunctionMode):
    """Within it, attention from as many tokens to as many gives their values. Of this thread alone, as every such mode."""

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = (kwargs[key] if key in kwargs else args[n] for n, key in enumerate(("query", "key", "value")))
            if query.shape[-2] == value.shape[-2]:
                self.met = True
                return value if value.shape[1] == query.shape[1] else value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return func(*args, **kwargs)
