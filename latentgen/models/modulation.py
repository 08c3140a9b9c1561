"""Adaptive layer norms of transformers, evaluated once for all levels of a run instead of in every step (Peebles and Xie 2023, DiT).

What they compute (shift, scale and gate of every block) depends on the level, the pooled words and the guidance alone, all known before the first
step. So their weights, about a quarter of such a network, are read once and need not be there while it samples.

Knows modules by what they have: a part of the network that embeds the time, and behind it linears that read nothing else. Knows no family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from latentgen.models.asked import Asked
from latentgen.models.elsewhere import Elsewhere
from latentgen.models.family import Conditioning
from latentgen.models.view import Ended, StandIn, ending, view

EMBEDDERS = ("time_text_embed", "time_guidance_embed", "t_embedder", "adaln_single")  # children that make of a level what the blocks are told
WHOLE = ("adaLN_modulation", "img_mod", "txt_mod")  # a Sequential with a linear in it, told the embedding itself
Key = tuple[float, Conditioning]
Tables = Mapping[str, Mapping[Key, Any]]  # module's name -> (time, conditioning) -> its answer of batch 1


class Known(StandIn):
    """Stands for a module whose answers are in a table; asks the module itself about what is not.

    Attributes:
        table: (time, conditioning) -> the answer of batch 1, a tensor or a tuple of them.
    """

    def __init__(self, inner: nn.Module, asked: Asked, table: Mapping[Key, Any]) -> None:
        super().__init__(inner)
        self.asked, self.table = asked, table

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        level, rows = self.asked.level, self.asked.rows
        if level is None or not rows or any((level.time, words) not in self.table for words, _ in rows):
            return self.inner(*args, **kwargs)
        answers = [self.table[level.time, words] for words, _ in rows]
        if isinstance(answers[0], tuple):
            return tuple(_joined(each) for each in zip(*answers, strict=True))
        return _joined(answers)


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


@dataclass(frozen=True)
class Modulations:
    """The modules of one network that depend on the level alone, by name.

    Attributes:
        embedder: makes the embedding that all the others read.
        heads: each computes of it what a block is told.
        activated: those of them that see it after SiLU (their owner applies that).
    """

    embedder: str
    heads: dict[str, nn.Module] = field(repr=False)
    activated: frozenset[str]


def find_modulations(net: nn.Module) -> Modulations | None:
    """What of a network depends on the level alone, or None where there is nothing of the kind."""
    embedder = next((name for name in EMBEDDERS if isinstance(getattr(net, name, None), nn.Module)), None)
    if embedder is None:
        return None
    heads: dict[str, nn.Module] = {}
    activated = set()
    for name, module in net.named_modules():
        if name.split(".")[0] == embedder:
            continue
        activation = getattr(module, "silu", None) or getattr(module, "act_fn", None)
        if isinstance(activation, nn.SiLU) and isinstance(getattr(module, "linear", None), nn.Module) and getattr(module, "emb", None) is None:
            heads[f"{name}.linear"] = module.linear
            activated.add(f"{name}.linear")
        elif name.rpartition(".")[2] in WHOLE and isinstance(module, (nn.Sequential, Elsewhere)):
            heads[name] = module
    return Modulations(embedder, heads, frozenset(activated))


def modulation_names(net: nn.Module) -> tuple[str, ...]:
    """Names of the children that a network can do without once their answers are known."""
    found = find_modulations(net)
    return () if found is None else tuple(found.heads)


def tables(net: nn.Module, calls: Sequence[tuple[Key, Callable[[nn.Module], Any]]]) -> Tables:
    """What a network's modulations come to, by name; {} where it has none, or tells more than one row of each call.

    Args:
        calls: of every level and conditioning of the run, (time, conditioning) and a function that calls a network with them, on one picture.
            The calls end at the embedder, so no block runs.
    """
    found = find_modulations(net)
    if found is None:
        return {}
    short = ending(net, found.embedder, lambda embedder, *args, **kwargs: embedder(*args, **kwargs))
    embedded: dict[Key, Any] = {}
    for key, call in calls:
        if key not in embedded:
            try:
                call(short)
            except Ended as ended:
                embedded[key] = ended.answer
    if not embedded or any(len(row) != 1 for answer in embedded.values() for row in (answer if isinstance(answer, tuple) else (answer,))):
        return {}
    made = {found.embedder: embedded}
    if found.heads:
        stacked = torch.cat([answer[-1] if isinstance(answer, tuple) else answer for answer in embedded.values()])
        made |= {name: dict(zip(embedded, _answers(head, stacked, activated=name in found.activated), strict=True))
                 for name, head in found.heads.items()}
    return made


def modulated(net: nn.Module, asked: Asked, known: Tables) -> nn.Module:
    """A view of a network, or of a view of it, that looks its modulations up; itself where nothing is known."""
    return view(net, lambda name, module: Known(module, asked, known[name]) if name in known else None) if known else net


def _answers(head: nn.Module, embedded: Tensor, *, activated: bool) -> tuple[Tensor, ...]:
    """(n, width) embeddings -> n answers (1, m), all by one product, so that the weights are read once."""
    with torch.no_grad():
        return head(nn.functional.silu(embedded) if activated else embedded).split(1)
