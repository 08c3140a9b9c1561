"""Captured calls of networks: what they answer is what the networks would, though no Python runs when they are replayed.

A tape stands for CUDA's graphs: it writes down every operation on tensors while a call runs, and repeats those, on the tensors as they are then. So a number that
Python knew, or a tensor that was looked up, is frozen in it as it is in a graph.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny
from PIL import Image
from tiny_folders import MAKERS, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import latentgen
from latentgen.errors import RequestError
from latentgen.models.elsewhere import Elsewhere
from latentgen.models.fast.graphs import MOST, WARM, Graphs, Replayed
from latentgen.run import work
from latentgen.run.recipe import speed_of
from latentgen.run.residency import check_graphs

TEAL = Image.new("RGB", (64, 64), "teal")


class Tape(TorchDispatchMode):
    """What was asked of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        answer = func(*args, **(kwargs or {}))
        self.asked.append((func, args, kwargs or {}, answer))
        return answer


class Taping:
    """Stands for `OnCuda`."""

    def __init__(self) -> None:
        self.warmed, self.captured, self.replayed = 0, 0, 0

    def warm(self, call: Callable[[], Any]) -> Any:
        self.warmed += 1
        return call()

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with Tape() as tape:
            answer = call()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            now: dict[int, Any] = {}

            def known(value: Any) -> Any:
                return now.get(id(value), value)

            for func, args, kwargs, made in tape.asked:
                again = func(*tree_map(known, args), **tree_map(known, kwargs))
                now.update({id(a): b for a, b in zip(tree_flatten(made)[0], tree_flatten(again)[0], strict=True) if isinstance(a, Tensor)})
            for place in tree_flatten(answer)[0]:
                place.copy_(now[id(place)])

        for place in tree_flatten(answer)[0]:
            place.fill_(float("nan"))  # a capture computes nothing
        return replay, answer


class Net(nn.Module):
    """Takes tensors in every place where a network is given some, and a word."""

    level = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]), requires_grad=False)

    def forward(self, x: Tensor, time: Tensor, *, added: dict[str, Tensor], many: list[Tensor], way: str = "plain") -> tuple[Tensor, dict[str, Tensor]]:
        y = x * self.weight + time[:, None] + added["ids"] + sum(many)
        return (y if way == "plain" else -y).relu_(), {"y": y}


def said(n: float, **more: Any) -> dict[str, Any]:
    return {"x": torch.full((1, 2), n), "time": torch.tensor([10 * n]), "added": {"ids": torch.full((1, 2), 100 * n)}, "many": [torch.full((1, 2), n)] * 2} | more


def of(net: nn.Module, **how: Any) -> tuple[Replayed, Taping, list[str]]:
    device, notes = Taping(), []
    made = Graphs(device, note=notes.append).of({"unet": net})["unet"]
    return made, device, notes


@torch.no_grad()
def test_answers_are_those_of_the_network_whatever_its_tensors_say() -> None:
    net, (made, device, notes) = Net(), of(Net())
    kept = [made(**said(n)) for n in range(7)]
    assert (device.warmed, device.captured, device.replayed) == (WARM, 1, 7 - WARM) and not notes
    for n, (first, second) in enumerate(kept):  # looked at afterwards: none was written over by a later one
        wanted, other = net(**said(n))
        assert torch.equal(first, wanted) and torch.equal(second["y"], other["y"])


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4])
@torch.no_grad()
def test_an_input_that_is_not_copied_would_be_seen(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that replays have: each tensor in turn stays as it was captured, and the answer is then wrong."""
    net, (made, _, _) = Net(), of(Net())
    for n in range(WARM + 1):
        made(**said(float(n)))
    (kind,) = made.kinds.values()
    assert len(kind.inputs) == 5
    stale, calls = kind.inputs[place], said(9.0)
    real = Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda self, other, *more: self if self is stale else real(self, other, *more))
    assert not torch.equal(made(**calls)[0], net(**calls)[0])
    monkeypatch.undo()
    assert torch.equal(made(**calls)[0], net(**calls)[0])


@torch.no_grad()
def test_what_is_no_tensor_has_a_graph_of_its_own() -> None:
    net, (made, device, _) = Net(), of(Net())
    for n in range(2 * WARM + 4):
        word = ("plain", "turned")[n % 2]
        assert torch.equal(made(**said(n, way=word))[0], net(**said(n, way=word))[0])
    wide = said(3.0) | {"x": torch.ones(4, 2)}
    assert made(**wide)[0].shape == (4, 2)
    assert device.captured == 2 and len(made.kinds) == 3
    for n in range(20):
        made(**said(1.0, way=f"{n}"))
    assert len(made.kinds) == MOST


@torch.no_grad()
def test_what_python_knows_is_frozen() -> None:
    """Why networks that look something up by level are not captured: the tape, as a graph, does not look again."""

    class Hidden(Net):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.level

    net = Hidden()
    made, _, _ = of(net)
    x = torch.ones(2)
    for _ in range(WARM + 1):
        made(x)
    net.level = 5.0
    assert torch.equal(made(x), x) and torch.equal(net(x), 5 * x)


@torch.no_grad()
def test_where_capturing_fails_the_network_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    net = Asks()
    made, device, notes = of(net)
    for n in range(6):
        assert torch.equal(made(torch.full((2,), float(n))), torch.full((2,), 2.0 * n))
    assert device.warmed == WARM and not device.captured and not made.kinds
    assert notes == ["calls of the network were not captured as graphs: operation not permitted when stream is capturing"] and "as a graph" in caplog.text


def test_calls_that_hold_anything_else_or_need_gradients_run_as_they_are() -> None:
    net = Net()
    made, device, _ = of(net)
    for _ in range(5):
        made(**said(1.0))  # with gradients
        with torch.no_grad():
            made(**said(1.0, way=Path()))
    assert not device.warmed and made.weight is net.weight and made.level == 1.0  # what the network has, it has


def test_networks_whose_weights_come_and_go_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(2, 2), Elsewhere(nn.Linear(2, 2), {}, ready=lambda name, t: t, release=lambda t: None))
    made, _, notes = of(net)
    assert made is net and "residency='resident'" in notes[0]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def load(kind: str) -> Any:
        place = tmp_path_factory.mktemp(kind)
        folder = make_tiny(place) if kind == "glyph" else tiny(kind).save(place / kind)
        return latentgen.load(folder, dtype="float32", device="cpu", speed="plain", progress=False)

    return load


def both(pipe: Any, monkeypatch: pytest.MonkeyPatch, **more: Any) -> tuple[Any, Any, Taping]:
    """The plain picture, and that of captured calls; on the CPU, where `load` would refuse it."""
    device = Taping()
    monkeypatch.setattr(work, "OnCuda", lambda place: device)
    options = {"steps": 6, "width": 64, "height": 64, "seed": 3} | ({"reference": TEAL} if pipe.family.task == "edit" else {}) | more
    plain = pipe.stream("a red heart", **options).result
    pipe._machine = replace(pipe._machine, speed="graphs")
    return plain, pipe.stream("a red heart", **options).result, device


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("sd15-inpaint", "sd21", "sdxl-refiner"))) for kind in (*MAKERS, "glyph")])
def test_every_family_makes_the_same_picture(load: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, made, device = both(load(kind), monkeypatch)
    assert torch.equal(plain.latents, made.latents) and device.captured and device.replayed == device.captured * (6 - WARM), made.notes
    assert not any("graph" in note for note in made.notes) and made.recipe["speed"] == "graphs" and "speed graphs" in str(made.plan)


def test_graphs_go_with_their_pass(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the collector of cycles: they hold memory of the device."""
    made: list[Any] = []
    real = Replayed.__init__
    monkeypatch.setattr(Replayed, "__init__", lambda self, *given: (made.append(weakref.ref(self)), real(self, *given))[1])
    gc.disable()
    try:
        _, result, device = both(load("sd15"), monkeypatch, tile=48)
        assert device.captured and len(made) == 1 and made[0]() is None and result.images
    finally:
        gc.enable()


@pytest.mark.parametrize("more", [{"guidance_interval": (0.3, 1.0), "steps": 9}, {"guiders": "pag"}, {"batch": 2, "seamless": "both"}, {"split_guidance": True},
                                  {"tile": 48}, {"sampler": "euler_ancestral"}], ids=str)
def test_ways_of_guiding_are_kinds_of_calls(load: Any, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, made, device = both(load("sd15"), monkeypatch, **more)
    assert torch.equal(plain.latents, made.latents) and device.captured and device.replayed


def test_graphs_are_asked_for_by_name_and_refused_where_they_cannot_be(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="needs a CUDA device"):
        latentgen.load(make_tiny(tmp_path), device="cpu", speed="graphs", progress=False)
    gpu = torch.device("cuda")
    check_graphs(gpu, "resident", alone=True)
    for how, words in (({"residency": "stream", "alone": True}, "come and go"), ({"residency": "resident", "alone": False}, "leave those out")):
        with pytest.raises(RequestError, match=words):
            check_graphs(gpu, **how)
    pipe = load("sd15")
    pipe._machine = replace(pipe._machine, speed="graphs")
    with pytest.raises(RequestError, match="approximate is given but speed is 'graphs'"):
        pipe.plan("a cat", approximate="deep_cache")
    plan = pipe.plan("a cat", approximate="deep_cache", strict=False)
    assert not plan.approximate and "graphs" in plan.notes[-1]
    assert speed_of({"speed": "compiled"}) == {"speed": "exact", "compile": True}
    for there, speed in ((True, "graphs"), (False, "plain")):  # a picture that was made with graphs can be made again without a GPU
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert speed_of({"speed": "graphs"}) == {"speed": speed, "compile": False}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*MAKERS, "glyph"])
def test_on_a_gpu_every_family_makes_the_same_picture(kind: str, tmp_path: Path) -> None:
    folder = make_tiny(tmp_path) if kind == "glyph" else tiny(kind).save(tmp_path / kind)
    options: dict[str, Any] = {"steps": 6, "width": 64, "height": 64, "seed": 3} | ({"reference": TEAL} if kind == "sd15-instruct" else {})
    made = [latentgen.load(folder, device="cuda", speed=speed, progress=False).stream("a red heart", **options).result for speed in ("plain", "graphs")]
    assert torch.allclose(made[0].latents, made[1].latents, rtol=1e-3, atol=1e-3) and not any("graph" in note for note in made[1].notes)
