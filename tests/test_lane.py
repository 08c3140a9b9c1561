"""The order in which streamed blocks come to a GPU, on streams that are made up: what is asked of them is written down, and nothing may hang on luck.

A stream runs its work in order; between two streams only an event that one records and the other waits for tells what comes first. Memory belongs to the
stream on which it was taken, and is taken again as soon as the host has dropped it, whether or not the device is done with it: as torch's allocator does it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentgen.models import streamed
from latentgen.models.streamed import Lane, Side, Stored, on_lane, stream

HERE = torch.device("cpu")


class Device:
    """What was asked of two streams, in the host's order: (stream, what, slot of memory, block)."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, str, int, int]] = []
        self.after: dict[int, list[int]] = {}  # operation -> those that surely came before it
        self.last: dict[Any, int] = {}
        self.free: list[int] = []
        self.slots: dict[int, int] = {}  # address -> slot
        self.taken = self.most = 0
        self.first = FakeStream(self)
        self.current = self.first

    def does(self, at: Any, what: str, slot: int = -1, block: int = -1, *, after: int | None = None) -> int:
        number = len(self.log)
        self.log.append((at, what, slot, block))
        self.after[number] = [n for n in (self.last.get(at), after) if n is not None]
        self.last[at] = number
        return number

    def take(self, like: Tensor) -> Tensor:
        made = torch.zeros(like.shape)
        if self.free:
            slot = self.free.pop()
        else:
            slot, self.taken = self.taken, self.taken + 1
        self.slots[made.data_ptr()] = slot
        weakref.finalize(made, self.free.append, slot)
        self.does(self.current, "fill", slot, int(like.flatten()[0]))
        return made

    def surely_before(self, first: int, then: int) -> bool:
        seen, stack = set(), [then]
        while stack:
            if (n := stack.pop()) == first:
                return True
            if n not in seen:
                seen.add(n)
                stack += self.after[n]
        return False

    def faults(self) -> list[str]:
        """What could go wrong in some order that the device may choose."""
        found = []
        for n, (_, what, slot, block) in enumerate(self.log):
            earlier = [(m, *self.log[m][1:]) for m in range(n) if self.log[m][2] == slot and slot >= 0]
            if what == "run":
                filled = [(m, of) for m, kind, _, of in earlier if kind == "fill"][-1]
                if filled[1] != block or not self.surely_before(filled[0], n):
                    found.append(f"block {block} may run before it is there")
            elif what == "fill":
                found += [f"block {of} may still run when block {block} takes its memory" for m, kind, _, of in earlier if kind == "run" and not self.surely_before(m, n)]
        return found


class FakeStream:
    """As torch.cuda.Stream, as far as it is used."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def record_event(self) -> int:
        return self.device.does(self, "record")

    def wait_event(self, event: int) -> None:
        self.device.does(self, "wait", after=event)

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(other.record_event())


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        before, made.current = made.current, stream
        yield
        made.current = before

    cuda = SimpleNamespace(Stream=lambda device: FakeStream(made), current_stream=lambda device: made.current, stream=on)
    monkeypatch.setattr(streamed, "torch", SimpleNamespace(cuda=cuda, empty_like=lambda t, device: made.take(t)))
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    return made


class Block(nn.Module):
    """Says when it runs, and with which numbers."""

    device: Device

    def __init__(self, device: Device, number: int) -> None:
        super().__init__()
        self.device, self.number = device, number
        self.weight = nn.Parameter(torch.empty(4, device="meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight[0] == self.number
        self.device.does(self.device.first, "run", self.device.slots[self.weight.data_ptr()], self.number)
        return x + self.weight


def network(device: Device, count: int = 4, *, pinned: bool = True) -> nn.Module:
    net = nn.Module()
    net.blocks = nn.ModuleList(Block(device, n) for n in range(count))
    for n in range(count):
        stream(net, Stored(f"blocks.{n}", {"weight": torch.full((4,), float(n))}, lambda name, t: {name: t}, lambda t: None, pinned), Lane(HERE))
    return on_lane(net, Lane(HERE, side=Side(HERE)))


def evaluated(net: nn.Module, which: list[int]) -> Tensor:
    x = torch.zeros(4)
    for n in which:
        x = net.blocks[n](x)
    return x


def test_blocks_are_there_when_they_run_and_stay_until_they_ran(device: Device) -> None:
    net = network(device)
    for _ in range(3):
        assert torch.equal(evaluated(net, [0, 1, 2, 3]), torch.full((4,), 6.0))
    assert not device.faults() and device.taken == 2  # slots of memory, however far the host is ahead


def test_the_next_block_comes_while_one_runs_also_across_evaluations(device: Device) -> None:
    net = network(device)
    for _ in range(3):
        evaluated(net, [0, 1, 2, 3])
    runs = [n for n, entry in enumerate(device.log) if entry[1] == "run"]
    fills = [n for n, entry in enumerate(device.log) if entry[1] == "fill"]
    assert [device.log[n][3] for n in runs] == [0, 1, 2, 3] * 3
    assert [device.log[n][3] for n in fills] == [0, 1, 2, 3] * 3 + [0]  # the first of an evaluation that does not come is sent in vain
    for run, fill in zip(runs[4:], fills[5:], strict=True):  # learnt in the first evaluation: from then on the following one is under way
        assert fill < run and not device.surely_before(run, fill) and not device.surely_before(fill, run)


def test_another_order_is_met_without_a_fault_or_a_third_block(device: Device) -> None:
    """As where an approximation leaves blocks out in some calls."""
    net = network(device)
    for which in ([0, 1, 2, 3], [0, 3], [0, 1, 2, 3], [0, 0, 3], [2, 1]):
        assert evaluated(net, which)[0] == sum(which)
    assert not device.faults() and device.taken == 2


def test_a_block_that_fails_leaves_no_fault(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(device)
    evaluated(net, [0, 1, 2, 3])
    with pytest.raises(TypeError):
        net.blocks[1](None)
    evaluated(net, [0, 1, 2, 3])
    assert not device.faults()


def test_what_lies_in_a_file_is_not_sent_ahead(device: Device) -> None:
    net = network(device, pinned=False)
    for _ in range(2):
        evaluated(net, [0, 1, 2, 3])
    assert [entry[3] for entry in device.log if entry[1] in ("fill", "run")] == [n for n in (0, 1, 2, 3) for _ in "fr"] * 2
    assert not device.faults()


def test_where_no_memory_can_be_locked_the_file_is_read(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Tensor, "pin_memory", refused)
    net = network(device)
    for _ in range(2):
        assert evaluated(net, [0, 1, 2, 3])[0] == 6
    assert not device.faults() and not net.blocks[0].stored.pinned


@pytest.mark.parametrize("fault", ["wait_stream", "wait_event"])
def test_the_streams_tell_of_a_missing_wait(device: Device, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(FakeStream, fault, lambda self, other: None)
    net = network(device)
    for _ in range(3):
        evaluated(net, [0, 1, 2, 3])
    assert device.faults()


@pytest.mark.gpu
def test_on_a_gpu_two_blocks_are_there_and_the_answer_is_right() -> None:
    place, size, count = torch.device("cuda"), 2**22, 12
    net = nn.Module()
    net.blocks = nn.ModuleList(nn.Linear(2048, 2048, bias=False, device="meta") for _ in range(count))
    for n in range(count):
        weight = torch.eye(2048) * (n + 1) / 8
        stream(net, Stored(f"blocks.{n}", {"weight": weight}, lambda name, t: {name: t}, lambda t: None, True), Lane(HERE))
    own, x = on_lane(net.requires_grad_(False), Lane(place)), torch.ones(64, 2048, device=place)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, made = torch.cuda.memory_allocated(), []
    for _ in range(8):
        y = x
        for block in own.blocks:
            y = block(y)
        made.append(y)
    torch.cuda.synchronize()
    wanted = torch.tensor([(n + 1) / 8 for n in range(count)]).prod().item()
    assert all(torch.allclose(y, torch.full_like(y, wanted), rtol=1e-4) for y in made)
    assert torch.cuda.max_memory_allocated() - before < 2.5 * 4 * size + 64 * x.numel() * 4
