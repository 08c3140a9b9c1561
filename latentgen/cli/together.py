"""Commands that torchrun started several times to make one picture. Knows the environment that it sets; the work is in run/parallel.py."""

from __future__ import annotations

import atexit
import os

from latentgen.errors import RequestError


def processes() -> int:
    """How many processes torchrun started, of which this is one; 1 where it was not torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def speaks() -> bool:
    """Whether this process is the one that prints and writes files."""
    return processes() == 1 or os.environ["RANK"] == "0"


def joined(said: dict[str, object]) -> str | None:
    """The way in which the processes make a picture, None for one; taken out of `said`. They are brought together here.

    Raises:
        RequestError: torchrun started a command that is of one process.
    """
    takes, way = "parallel" in said, said.pop("parallel", None)
    if processes() == 1:
        return way  # `load` refuses what is not None
    if not takes:
        raise RequestError(f"torchrun started {processes()} processes of a command that is of one: start it without, or use one that has --parallel")
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
    return way or "cfg"
