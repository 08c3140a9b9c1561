"""DeepCache (Ma et al. 2023): the deep layers of a U-Net, whose answers change slowly from step to step, run in every n-th call only.

Knows U-Nets by their blocks (down, mid, up). Knows no family, prompt or sampler.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from latentgen.models.approximate.memory import Memory, Tally
from latentgen.models.asked import Asked
from latentgen.models.view import StandIn, view


@dataclass
class _Deep:
    """What one set of rows keeps: calls so far, what came up from the deep layers, and the shapes of what they gave."""

    calls: int = 0
    risen: Tensor | None = None
    shapes: dict[str, Any] = field(default_factory=dict)


class _Pace:
    """Shared by the stand-ins of one view: whether the call under way runs the deep layers."""

    def __init__(self, memory: Memory[_Deep], interval: int) -> None:
        self.memory, self.interval = memory, interval
        self.state, self.reusing = _Deep(), False

    def begin(self) -> None:
        self.state = self.memory.now()
        self.reusing = self.state.calls % self.interval != 0
        self.state.calls += 1


class _Begin(StandIn):
    """The first layer: the call begins."""

    def __init__(self, inner: nn.Module, pace: _Pace) -> None:
        super().__init__(inner)
        self.pace = pace

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.pace.begin()
        return self.inner(*args, **kwargs)


class _Held(StandIn):
    """A deep layer: left out, it gives zeros of the right shape, which nothing reads."""

    def __init__(self, inner: nn.Module, pace: _Pace, name: str, tally: Tally) -> None:
        super().__init__(inner)
        self.pace, self.name, self.tally = pace, name, tally

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        pace = self.pace
        self.tally.count(pace.reusing)
        if pace.reusing:
            like = args[0] if args else kwargs["hidden_states"]
            return _zeros(pace.state.shapes[self.name], like)
        answer = self.inner(*args, **kwargs)
        pace.state.shapes[self.name] = _shapes(answer)
        return answer


class _Shallow(StandIn):
    """A layer that runs in every call and counts among all."""

    def __init__(self, inner: nn.Module, tally: Tally) -> None:
        super().__init__(inner)
        self.tally = tally

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.tally.count(False)
        return self.inner(*args, **kwargs)


class _Surface(_Shallow):
    """The first shallow layer on the way up: what comes from below is as it was when the deep layers last ran."""

    def __init__(self, inner: nn.Module, tally: Tally, pace: _Pace, channels: int) -> None:
        super().__init__(inner, tally)
        self.pace, self.channels = pace, channels

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        state = self.pace.state
        if not self.pace.reusing or state.risen is None:
            state.risen = hidden[:, :self.channels]
        else:
            hidden = torch.cat([state.risen, hidden[:, self.channels:]], dim=1)
        return super().forward(hidden, *args, **kwargs)


def deep_cached(net: nn.Module, asked: Asked, tally: Tally, *, interval: int, layers: int) -> nn.Module:
    """A view of a U-Net whose deep layers run in every `interval`-th call.

    Args:
        layers: of the highest resolution on the way up, those that run in every call, counted from the last one; a U-Net has two or more.
        tally: counts layers, each a residual block or its attention (deep blocks count as one).
    """
    up, down = net.up_blocks, net.down_blocks
    most = len(up[-1].resnets)
    top, first = f"up_blocks.{len(up) - 1}", most - layers
    pace = _Pace(Memory(asked, _Deep), interval)
    below = up[-1].resnets[first - 1] if first else up[-2].resnets[-1]
    held = {f"down_blocks.{n}" for n in range(1, len(down))} | {f"up_blocks.{n}" for n in range(len(up) - 1)} | {"mid_block"}
    held |= {f"{top}.{kind}.{n}" for kind in ("resnets", "attentions") for n in range(first)}
    held |= {f"down_blocks.0.{kind}.{n}" for kind in ("resnets", "attentions")
             for n in range(layers - 1, len(down[0].resnets))} | {"down_blocks.0.downsamplers.0"}
    shallow = {f"{top}.{kind}.{n}" for kind in ("resnets", "attentions") for n in range(first, most)}
    shallow |= {f"down_blocks.0.{kind}.{n}" for kind in ("resnets", "attentions") for n in range(layers - 1)}

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if name == "conv_in":
            return _Begin(module, pace)
        if name == f"{top}.resnets.{first}":
            return _Surface(module, tally, pace, below.out_channels)
        return _Held(module, pace, name, tally) if name in held else _Shallow(module, tally) if name in shallow else None

    return view(net, replace)


def _shapes(answer: Any) -> Any:
    return answer.shape if isinstance(answer, Tensor) else tuple(map(_shapes, answer))


def _zeros(shapes: Any, like: Tensor) -> Any:
    if isinstance(shapes, torch.Size):
        return like.new_zeros(()).expand(shapes)  # one number: no memory is filled
    return tuple(_zeros(each, like) for each in shapes)
