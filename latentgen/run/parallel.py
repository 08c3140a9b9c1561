"""One picture by several processes, each with its own device: each computes some of a step's evaluations, and all are told what came of all.

Knows torch.distributed, tensors and how evaluations are asked for; knows no family, prompt or sampler. Every process is given the same request and
goes the same way, so latents, samplers, masks, guiders and passes need to know nothing of the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentgen.errors import ParallelError, RequestError

if TYPE_CHECKING:
    from latentgen.models.family import Modules
    from latentgen.run.denoising import Evaluate
    from latentgen.run.request import Request

WAYS = {"cfg": "the evaluations of each step are dealt out", "context": "the tokens of each evaluation are"}
TIMEOUT = timedelta(minutes=10)  # how long a process waits for the others; the first step loads weights
DIFFERENT = ("versions", "notes")  # what a recipe says that processes may each have their own of


@dataclass(frozen=True)
class Parallel:
    """How several processes make a picture.

    Attributes:
        way: "cfg", the evaluations of each step are dealt out; "context", the tokens of each evaluation are.
        processes: how many there are.
    """

    way: str
    processes: int

    def __str__(self) -> str:
        return f"by {self.processes} processes ({self.way})"

    def idle(self, evaluations: int) -> list[str]:
        """A note where there are more processes than evaluations in a step."""
        if evaluations >= self.processes or self.way == "context":
            return []
        return [f"a step has {evaluations} evaluation(s) to deal out to {self.processes} processes: the others wait, "
                "so a batch or guidance would be faster"]


class Team:
    """The processes that make one picture, and which of them this one is; by itself a team of one."""

    rank, size = 0, 1

    def shared(self, compute: Callable[[Sequence[int]], Sequence[Tensor]], count: int, like: Tensor) -> list[Tensor]:
        """`count` tensors, of which every process computes its share, told to all.

        Args:
            compute: numbers -> their tensors, in that order; called for this process's own, if there are any.
            like: a tensor of the shape, dtype and device of each.

        Raises:
            ParallelError: another process is gone.
        """
        return list(compute(range(count)))

    def each(self, data: Any) -> list[Any]:
        """What every process says, in order; plain data."""
        return [data]

    def networks(self, modules: Modules) -> Modules:
        """The networks as this process runs its share of them."""
        return modules

    def dealt(self, evaluate: Evaluate) -> Evaluate:
        """An evaluation of pictures from several sides, of which every process computes its share.

        They are dealt picture by picture, so that where there are as many pictures as processes, each has whole ones.
        """
        if self.size == 1:
            return evaluate

        def every(x: Tensor, level: Any, sides: Sequence[Any], together: bool, first: int = 0) -> tuple[Tensor, ...]:
            count = len(sides)

            def own(numbers: Sequence[int]) -> list[Tensor]:
                made = []
                for pictures, some in blocks(numbers, count):
                    x0s = evaluate(x[pictures[0]:pictures[-1] + 1], level, [sides[side] for side in some], together, first + pictures[0])
                    made += [x0 for picture in zip(*x0s, strict=True) for x0 in picture]
                return made

            whole = self.shared(own, len(x) * count, x[0])
            return tuple(torch.stack(whole[side::count]) for side in range(count))

        return every


ALONE = Team()


class Several(Team):
    """A team of more than one, with a group of torch.distributed that ends with the run."""

    def __init__(self, rank: int, size: int, group: Any, device: torch.device, shared: Any = None) -> None:
        """shared: how the processes share tokens, where they do that; see `latentgen.models.context`."""
        self.rank, self.size, self._group, self._device, self._tokens = rank, size, group, device, shared

    def shared(self, compute: Callable[[Sequence[int]], Sequence[Tensor]], count: int, like: Tensor) -> list[Tensor]:
        """See `Team.shared`. The parts are those of one row of numbers, cut as evenly as can be."""
        each = -(-count // self.size)
        own = range(count)[self.rank * each:(self.rank + 1) * each]
        part = like.new_zeros((each, *like.shape))  # of one layout everywhere, or sums over it might differ in their last bits
        for at, made in enumerate(compute(own) if own else ()):
            part[at] = made
        return [tensor for told in self._told(part) for tensor in told][:count]

    def dealt(self, evaluate: Evaluate) -> Evaluate:
        """See `Team.dealt`. Where tokens are shared, all processes evaluate together, and each first makes sure that the others are there."""
        if self._tokens is None:
            return super().dealt(evaluate)

        def together(x: Tensor, level: Any, sides: Sequence[Any], together: bool, first: int = 0) -> tuple[Tensor, ...]:
            self._told(x.new_zeros(1))
            try:
                return evaluate(x, level, sides, together, first)
            except AssertionError as error:  # diffusers', in all processes alike
                raise RequestError(f"the tokens of the words or the picture cannot be parted evenly among {self.size} processes on this device: "
                                   "use another number of them, another size, or parallel='cfg'") from error

        return together

    def networks(self, modules: Modules) -> Modules:
        """See `Team.networks`."""
        if self._tokens is None:
            return modules
        from latentgen.models.context import parted

        return {name: parted(net, self._tokens) for name, net in modules.items()}

    def agree(self, said: Mapping[str, Any]) -> None:
        """Whether all processes were given the same; `said` is plain data.

        Raises:
            RequestError: they were not, told by all of them.
        """
        theirs = self.each({name: hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
                            for name, value in said.items() if name not in DIFFERENT})
        names = sorted(name for name in set().union(*theirs) if any(other.get(name) != theirs[0].get(name) for other in theirs))
        if names:
            raise RequestError(f"the processes that are to make one picture were given different requests ({', '.join(names)}): give each the same")

    def each(self, data: Any) -> list[Any]:
        """See `Team.each`."""
        text = torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8, device=self._device)
        lengths = [int(length) for length in self._told(torch.tensor([len(text)], device=self._device))]
        padded = text.new_zeros(max(lengths))
        padded[:len(text)] = text
        return [json.loads(bytes(told[:length].tolist())) for told, length in zip(self._told(padded), lengths, strict=True)]

    def leave(self, *, done: bool) -> None:
        """The end of the run; done: wait for the others to come there, too. Otherwise those that wait for this process are told by the loss of it."""
        import torch.distributed as dist

        group, self._group = self._group, None
        try:
            if done:
                with _lost():
                    # or nccl takes the first GPU for all
                    dist.barrier(group, device_ids=[self._device.index] if self._device.type == "cuda" else None)
        finally:
            dist.destroy_process_group(group)

    def _told(self, part: Tensor) -> list[Tensor]:
        """The part of every process, in order; all of one shape."""
        import torch.distributed as dist

        parts = [torch.empty_like(part) for _ in range(self.size)]
        with _lost():
            dist.all_gather(parts, part, group=self._group)
        return parts


class Group:
    """The processes that torch.distributed has brought together, for any number of runs, one at a time."""

    def __init__(self, way: str, device: torch.device) -> None:
        import torch.distributed as dist

        self.parallel = Parallel(way, dist.get_world_size())
        self._rank, self._device = dist.get_rank(), device
        self._runs, self._under_way, self._tokens = 0, threading.Lock(), None
        if way == "context":
            from latentgen.models.context import context

            self._tokens = context(self._rank, self.parallel.processes, device)
        with self.team() as team:
            self._drawn = team.each(secrets.randbits(62))[0]

    def seeded(self, request: Request) -> Request:
        """The request with the seeds that it leaves open: of 0 to 2**32 - 1, from a number that the first process drew, so the same everywhere."""
        wanted = ["seed"] + (["variation_seed"] if request.variation_strength else [])
        drawn = {name: hashlib.sha256(f"{self._drawn} {self._runs} {name} {request.prompt}".encode()).digest()
                 for name in wanted if getattr(request, name) is None}
        return request.replace(**{name: int.from_bytes(one[:4], "big") for name, one in drawn.items()}) if drawn else request

    @contextmanager
    def team(self) -> Generator[Several, None, None]:
        """The processes for one run, which all of them must begin. Where one leaves before its end, the others fail rather than wait for ever.

        Raises:
            RequestError: a run of this process is not done. ParallelError: another process is gone.
        """
        import torch.distributed as dist

        if not self._under_way.acquire(blocking=False):
            raise RequestError("another run of this pipeline is under way, and several processes make one after the other: "
                               "finish or close that one first")
        try:
            self._runs += 1
            with _lost():
                group = dist.new_group(timeout=TIMEOUT, backend="nccl" if self._device.type == "cuda" else "gloo")
            team, done = Several(self._rank, self.parallel.processes, group, self._device, self._tokens), False
            del group  # or it would outlive its end, and the others wait for it
            try:
                yield team
                done = True
            finally:
                team.leave(done=done)
        finally:
            self._under_way.release()


def blocks(numbers: Sequence[int], sides: int) -> list[tuple[list[int], tuple[int, ...]]]:
    """Evaluations that can be asked for at once: (neighbouring pictures, the sides of each). Number n is side n % sides of picture n // sides."""
    each = [(picture, tuple(n % sides for n in some)) for picture, some in groupby(numbers, lambda n: n // sides)]
    return [([picture for picture, _ in some], seen) for seen, some in groupby(each, lambda one: one[1])]


def own_device(name: str) -> str:
    """The device that `torchrun` means for this process, where a name leaves open which of several."""
    local = os.environ.get("LOCAL_RANK", "0")
    return f"cuda:{local}" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else name


def join_group(way: str, device: torch.device) -> Group:
    """The group of processes that torch.distributed has begun, for pictures that they make together.

    Raises:
        RequestError: an unknown way, no group or one process, or a device of which none can be made. ParallelError: the others did not join.
    """
    if way not in WAYS:
        raise RequestError(f"parallel is {way!r}: expected {' or '.join(f'{name!r} ({what})' for name, what in WAYS.items())}")
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise RequestError("parallel is given but this process is in no group: start it with torchrun, "
                           "and call torch.distributed.init_process_group first")
    if dist.get_world_size() == 1:
        raise RequestError("parallel is given but there is one process only: start more (torchrun --nproc-per-node 2), or leave it out")
    if device.type not in ("cpu", "cuda"):
        raise RequestError(f"parallel is given but torch's processes cannot share what is on {device.type}: use device='cpu', or leave it out")
    if device.type == "cuda":
        # as every program under torchrun: what nccl and diffusers make for themselves is made on this process's own GPU
        torch.cuda.set_device(device)
    return Group(way, device)


@contextmanager
def _lost() -> Generator[None, None, None]:
    """What torch.distributed raises, as ours."""
    try:
        yield
    except RuntimeError as error:  # a lost connection or a timeout, in each backend another
        raise ParallelError(f"another process was stopped, failed, or did not come within {TIMEOUT.total_seconds():.0f} s, so this one cannot go on: "
                            f"see what became of it, and give all of them the request again ({str(error).splitlines()[0]:.150})") from error
