"""A network whose tokens several processes share (context parallelism), as diffusers' plan for its class parts them: a view, so that the network
itself stays whole. Knows modules and a group of torch.distributed; knows no family or request."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from latentgen.errors import RequestError
from latentgen.models.view import view


def check_context(net: nn.Module, processes: int) -> None:
    """Whether the tokens of a network can be shared by so many processes; one without numbers will do.

    Raises:
        RequestError: they cannot.
    """
    heads = getattr(net.config, "num_attention_heads", 0)
    if getattr(net, "_cp_plan", None) is None:
        raise RequestError(f"parallel is 'context' but nothing tells how to part the tokens of a {type(net).__name__}: use 'cfg'")
    if heads % processes:
        raise RequestError(f"parallel is 'context' but the {heads} heads of this model cannot be dealt to {processes} processes: use another number, "
                           "or 'cfg'")


def context(rank: int, processes: int, device: torch.device) -> Any:
    """What the views of a run share: every process has some tokens, and in attention some heads of all tokens (Jacobs et al. 2023,
    DeepSpeed-Ulysses).
    """
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (1, processes), mesh_dim_names=("ring", "ulysses"))
    uneven = device.type == "cuda"  # gloo gathers parts of one size only
    made = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=processes, ulysses_anything=uneven))
    made.setup(rank, processes, device, mesh=mesh)
    return made


def parted(net: nn.Module, shared: Any) -> nn.Module:
    """A view of a network that computes this process's tokens and answers with all; others than `check_context` takes stay as they are.

    Args:
        shared: see `context`.
    """
    plan = getattr(net, "_cp_plan", None)
    if plan is None:
        return net
    from diffusers.hooks.context_parallel import apply_context_parallel

    def told(name: str, module: nn.Module) -> None:
        if hasattr(processor := getattr(module, "processor", None), "_parallel_config"):
            module.processor = copy.copy(processor)  # that of the network serves other runs
            module.processor._parallel_config = shared

    own = view(net, told)
    apply_context_parallel(own, shared.context_parallel_config, plan)
    return own
