"""Calls of a network that are captured once and then replayed by the device (CUDA graphs), within one pass of one run. Knows modules, tensors and
CUDA.

A graph repeats what the device was asked to do, at the same addresses; no Python runs. So everything in which two calls may differ has to come in as
a tensor, and is copied to where the graph reads it; all else that a call is given (numbers, words, which tensors there are, their shapes) is the key
under which its graph is kept. What a network looks up by itself (tables by level, caches, weights that come and go) a graph would freeze: networks
that do are called as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from latentgen.models.elsewhere import Elsewhere
from latentgen.models.streamed import Streamed
from latentgen.models.view import StandIn

log = logging.getLogger(__name__)
GRAPHS = "graphs"  # what a pipeline's speed is called where calls are captured
WARM = 2  # calls of a kind that run as they are before one is captured: kernels are chosen and loaded, and what modules make once is made
MOST = 8  # kinds of calls that are captured in one pass: each holds a graph and its inputs


class Capturing(Protocol):
    """A device that can repeat what it was asked to do."""

    def warm(self, call: Callable[[], Any]) -> Any:
        """The call's answer, computed as it will be captured."""

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What repeats the call, and its answer: tensors that are filled anew each time.

        Raises:
            RuntimeError: the call cannot be captured.
        """


class OnCuda:
    """Capturing by CUDA graphs, all of which share one pool of memory: they never run at the same time, and what one answers is copied before another
    runs."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream, self.pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm(self, call: Callable[[], Any]) -> Any:
        """See `Capturing.warm`: on the stream that will capture, for libraries keep workspaces for each."""
        now = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            answer = call()
        now.wait_stream(self.stream)
        return answer

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See `Capturing.capture`. Other threads may use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            before = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    answer = call()
            finally:
                torch.cuda.set_stream(before)  # older torch leaves its own where capturing fails
        return graph.replay, answer


@dataclass
class _Kind:
    """Calls that differ in the numbers of their tensors alone."""

    seen: int = 0
    inputs: list[Tensor] = field(default_factory=list)
    replay: Callable[[], None] | None = None
    answer: Any = None


class Graphs:
    """The graphs of one pass of one run; given up together, for good, where one cannot be captured.

    Args:
        note: is told why nothing is captured, if so.
    """

    def __init__(self, device: Capturing, *, note: Callable[[str], None]) -> None:
        self.device, self.note = device, note
        self.off = False
        self._made: WeakValueDictionary[int, Replayed] = WeakValueDictionary()  # or graphs would wait for the collector of cycles

    def of(self, modules: Mapping[str, Any]) -> dict[str, Any]:
        """The networks, their calls captured where that can be; of one network always the same."""
        return {name: self._of(net) for name, net in modules.items()}

    def _of(self, net: nn.Module) -> nn.Module:
        if any(isinstance(module, (Streamed, Elsewhere)) for module in net.modules()):
            self.note("calls of the network were not captured as graphs, for its weights come and go: use residency='resident'")
            return net
        if (made := self._made.get(id(net))) is None:  # while it is there, so is the network whose id this is
            made = self._made[id(net)] = Replayed(net, self)
        return made

    def give_up(self, error: Exception) -> None:
        """Capture nothing more, and drop what was."""
        why = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        log.warning("a call of the network could not be captured as a graph, so it runs as it is: %s", why, exc_info=error)
        self.note(f"calls of the network were not captured as graphs: {why}")
        self.off = True
        for made in self._made.values():
            made.kinds.clear()


class Replayed(StandIn):
    """Stands for a network: captures each kind of its calls, and replays it."""

    def __init__(self, inner: nn.Module, graphs: Graphs) -> None:
        super().__init__(inner)
        self.graphs = graphs
        self.kinds: dict[Any, _Kind] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's answer, in memory of its own."""
        tensors: list[Tensor] = []
        key = _taken((args, kwargs), tensors)
        if self.graphs.off or key is None or torch.is_grad_enabled() or (key not in self.kinds and len(self.kinds) >= MOST):
            return self.inner(*args, **kwargs)
        kind = self.kinds.setdefault(key, _Kind())
        if kind.replay is None:
            kind.seen += 1
            if kind.seen <= WARM:
                return self.graphs.device.warm(lambda: self.inner(*args, **kwargs))
            try:
                self._capture(kind, args, kwargs, tensors)
            except RuntimeError as error:  # out of memory, too: without graphs there is more of it
                self.graphs.give_up(error)
                return self.inner(*args, **kwargs)
        for place, tensor in zip(kind.inputs, tensors, strict=True):
            place.copy_(tensor)
        kind.replay()
        return _each(kind.answer, torch.clone)

    def _capture(self, kind: _Kind, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        kind.inputs = [torch.empty_like(tensor).copy_(tensor) for tensor in tensors]
        places = iter(kind.inputs)
        own_args, own_kwargs = _each((args, kwargs), lambda tensor: next(places))
        kind.replay, kind.answer = self.graphs.device.capture(lambda: self.inner(*own_args, **own_kwargs))


def _taken(value: Any, tensors: list[Tensor]) -> Any:
    """A hashable form of what a call is given, with its tensors taken out into a list; None where there is something in it that is not known here."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return Tensor, value.shape, value.dtype, value.device
    if isinstance(value, (list, tuple, dict)) and type(value) in (list, tuple, dict):
        parts = [(key, _taken(each, tensors)) for key, each in (value.items() if isinstance(value, dict) else enumerate(value))]
        return None if any(form is None for _, form in parts) else (type(value), *parts)
    return (type(value), value) if value is None or isinstance(value, (bool, int, float, str)) else None


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a call is given or answers, with every tensor changed, in the order of `_taken`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each(each, change) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_each(each, change) for each in value])
    return value
