"""Adaptive layer norms of transformers (Peebles and Xie 2023, DiT) and what residual blocks of U-Nets are told of the level, evaluated once for all
levels of a run instead of in every step.

What they compute (shift, scale and gate of every block; a vector for each residual block) depends on the level, the pooled words and the guidance
alone, all known before the first step. So their weights, about a quarter of a transformer, are read once and need not be there while it samples.

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
from latentgen.models.view import Ended, StandIn, ending, replaced

EMBEDDERS = ("time_text_embed", "time_guidance_embed", "t_embedder", "adaln_single")  # children that make of a level what the blocks are told
TIMED, FIRST_BLOCK = "time_embedding", "down_blocks.0"  # of U-Nets: what embeds the time, and who is told first of all that is added to that
ADDED = ("add_embedding", "class_embedding", "time_embed_act")  # of U-Nets: what comes to it between the two
PROJECTION = "time_emb_proj"  # of a residual block
WHOLE = ("adaLN_modulation", "img_mod", "txt_mod")  # a Sequential with a linear in it, told the embedding itself
Key = tuple[float, Conditioning]
Tables = Mapping[str, Mapping[Key, Any]]  # module's name -> (time, conditioning) -> its answer of batch 1


class Known(StandIn):
    """Stands for a module whose answers are in a table; asks the module itself about what is not.

    Attributes:
        table: (time, conditioning) -> the answer of batch 1, a tensor or a tuple of them; the same one where it is the same for several.
    """

    def __init__(self, inner: nn.Module, asked: Asked, table: Mapping[Key, Any]) -> None:
        super().__init__(inner)
        self.asked, self.table = asked, table

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if (same := self.same) is not None:
            return same.expand(len(args[0]), *same.shape[1:])  # also where only some of the rows are asked for
        answers = self.answers()
        if len(answers) != len(args[0]):
            return self.inner(*args, **kwargs)
        if isinstance(answers[0], tuple):
            return tuple(_joined(each) for each in zip(*answers, strict=True))
        return _joined(answers)

    @property
    def same(self) -> Tensor | None:
        """The one answer (1, m) to all rows of the call under way, where it is known and no other."""
        answers = self.answers()
        return answers[0] if answers and isinstance(answers[0], Tensor) and all(answer is answers[0] for answer in answers) else None

    def answers(self) -> list[Any]:
        """What is known for each row of the call under way; nothing where that of any row is not."""
        level, rows = self.asked.level, self.asked.rows
        if level is None:
            return []
        found = [self.table.get((level.time, words)) for words, _ in rows]
        return [] if any(answer is None for answer in found) else found


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


@dataclass(frozen=True)
class Modulations:
    """The modules of one network that depend on the level alone, by name.

    Attributes:
        end: where a call may end that is made for the sake of the embedding which all others read: at what makes it, or, where more is added to
            that, at the first block, which is told it as `temb`.
        heads: each computes of it what a block is told.
        activated: those of them that see it after SiLU (their owner applies that).
        timed: the embedding depends on the time alone, not on words or guidance.
    """

    end: str
    heads: dict[str, nn.Module] = field(repr=False)
    activated: frozenset[str]
    timed: bool = False

    def embedding(self, child: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The embedding, of what `end` is called with."""
        return kwargs["temb"] if self.end == FIRST_BLOCK else child(*args, **kwargs)


def find_modulations(net: nn.Module) -> Modulations | None:
    """What of a network depends on the level alone, or None where there is nothing of the kind."""
    embedder = next((name for name in EMBEDDERS if isinstance(getattr(net, name, None), nn.Module)), None)
    if embedder is None:
        return _of_unet(net) if isinstance(getattr(net, TIMED, None), nn.Module) and hasattr(net, FIRST_BLOCK.partition(".")[0]) else None
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


def _of_unet(net: nn.Module) -> Modulations:
    owners = {f"{name}.{PROJECTION}": module for name, module in net.named_modules() if isinstance(getattr(module, PROJECTION, None), nn.Module)}
    plain = {name: owner for name, owner in owners.items() if isinstance(getattr(owner, "nonlinearity", None), nn.SiLU)}
    timed = all(getattr(net, name, None) is None for name in ADDED)
    activated = frozenset(name for name, owner in plain.items() if not getattr(owner, "skip_time_act", False))
    return Modulations(TIMED if timed else FIRST_BLOCK, {name: getattr(owner, PROJECTION) for name, owner in plain.items()}, activated, timed)


def modulation_names(net: nn.Module) -> tuple[str, ...]:
    """Names of the children that a network can do without once their answers are known."""
    found = find_modulations(net)
    return () if found is None else tuple(found.heads)


def tables(net: nn.Module, calls: Sequence[tuple[Key, Callable[[nn.Module], Any]]]) -> Tables:
    """What a network's modulations come to, by name; {} where it has none, or tells more than one row of each call.

    Args:
        calls: of every level and conditioning of the run, (time, conditioning) and a function that calls a network with them, on one picture.
            The calls end before the first block.
    """
    found = find_modulations(net)
    if found is None or not calls:
        return {}
    embedded = _embedded(found, net, calls)
    if not embedded or any(len(row) != 1 for answer in embedded.values() for row in (answer if isinstance(answer, tuple) else (answer,))):
        return {}
    made: dict[str, dict[Key, Any]] = {} if found.end == FIRST_BLOCK else {found.end: embedded}
    each = {id(answer): answer[-1] if isinstance(answer, tuple) else answer for answer in embedded.values()}
    stacked = torch.cat(list(each.values()))
    for name, head in found.heads.items():
        told = dict(zip(each, _answers(head, stacked, activated=name in found.activated), strict=True))
        made[name] = {key: told[id(answer)] for key, answer in embedded.items()}
    return made


def modulated(net: nn.Module, asked: Asked, known: Tables) -> nn.Module:
    """A view of a network, or of a view of it, that looks its modulations up; itself where nothing is known."""
    return replaced(net, known, lambda name, module: Known(module, asked, known[name])) if known else net


def _embedded(found: Modulations, net: nn.Module, calls: Sequence[tuple[Key, Callable[[nn.Module], Any]]]) -> dict[Key, Any]:
    """The embedding of every level and conditioning; the same one of all conditionings where it depends on the time alone."""
    short = ending(net, found.end, found.embedding)
    embedded: dict[Key, Any] = {}
    made: dict[Any, Any] = {}
    for key, call in calls:
        if (kind := key[0] if found.timed else key) not in made:
            try:
                call(short)
            except Ended as ended:
                made[kind] = ended.answer
        if kind in made:  # a call that came to its end otherwise tells nothing
            embedded[key] = made[kind]
    return embedded


def _answers(head: nn.Module, embedded: Tensor, *, activated: bool) -> tuple[Tensor, ...]:
    """(n, width) embeddings -> n answers (1, m), all by one product, so that the weights are read once."""
    with torch.no_grad():
        return head(nn.functional.silu(embedded) if activated else embedded).split(1)
