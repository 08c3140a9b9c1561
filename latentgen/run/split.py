"""One picture on several devices: each process of a group evaluates some sides of guidance, and all share what came out.

Knows a torch.distributed group and tensors; knows no family, prompt or sampler. Every process runs the same request, so all end with the same picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentgen.errors import RequestError

WAYS = ("cfg",)


@dataclass(frozen=True)
class Split:
    """This process's place in the group: number `rank` of `world`."""

    rank: int
    world: int

    def shared(self, compute: Callable[[Sequence[int]], Sequence[Tensor]], count: int, like: Tensor) -> tuple[Tensor, ...]:
        """The estimates of `count` sides, each computed by one process and told to the others.

        Args:
            compute: numbers of sides -> their estimates, in that order; called for this process's own alone.
            like: a tensor of the shape and dtype of one estimate.
        """
        import torch.distributed as dist

        own = [side for side in range(count) if side % self.world == self.rank]
        made = dict(zip(own, compute(own) if own else (), strict=True))
        whole = tuple(made[side].contiguous() if side in made else torch.empty_like(like) for side in range(count))
        for side, x0 in enumerate(whole):
            dist.broadcast(x0, src=side % self.world)
        return whole


def join_group(way: str) -> Split:
    """This process's place in the group that torch.distributed has begun.

    Raises:
        RequestError: an unknown way, or no group of processes was begun.
    """
    if way not in WAYS:
        raise RequestError(f"split is {way!r}: expected 'cfg' (each process evaluates some sides of guidance)")
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise RequestError("split is given but this process is in no group: start it with torchrun, and call torch.distributed.init_process_group first")
    return Split(dist.get_rank(), dist.get_world_size())
