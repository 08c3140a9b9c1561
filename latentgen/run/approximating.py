"""Approximations as a request asks for them, checked against what the model is. Knows requests, families and the table; runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from latentgen.errors import RequestError
from latentgen.models.approximate.table import APPROXIMATIONS, KINDS, clashes, kind_of

if TYPE_CHECKING:
    from latentgen.models.family import Family
    from latentgen.run.passes import Pass
    from latentgen.run.request import Request
    from latentgen.run.tuned import Tuned

TURNED = "seamless turns the latent at every level, so that what a transformer's blocks did at an earlier one lies elsewhere in the picture"


def approximations_of(request: Request, family: Family, refuse: Callable[[str], None], *, passes: Sequence[Pass], tuned: Tuned | None,
                      notes: list[str]) -> dict[str, dict[str, Any]]:
    """What the run leaves out: name -> all options, in the order of the table; what the model has no blocks for is refused.

    Args:
        tuned: what is left out where the request says nothing, which is noted.

    Raises:
        RequestError: an unknown name, option or value, or two that do the same work.
    """
    kinds = {kind_of(part.cls) for part in family.parts if "denoiser" in part.stages}
    turned = "transformer" in kinds and any(one.grid.edgeless for one in passes)
    if tuned is not None and request.approximate is None:
        notes.append(f"tuned, but nothing is left out: {TURNED}" if turned and tuned.approximate else str(tuned))
        return {} if turned else APPROXIMATIONS.filled(tuned.approximate)
    said = request.approximate or {}
    APPROXIMATIONS.check(said)
    fit = {}
    for name in said:
        info = APPROXIMATIONS[name]
        if info.kind not in kinds:
            others = ", ".join(other for other, each in APPROXIMATIONS.items() if each.kind in kinds)
            refuse(f"{name} is given but works on {KINDS[info.kind]}, which {family.name} is not: use one of {others}, or leave it out")
        elif turned and info.kind == "transformer":
            refuse(f"{name} is given but {TURNED}: leave {name} or seamless out")
        else:
            fit[name] = said[name]
    if (both := clashes(fit)) is not None:
        raise RequestError(f"{both[0]} and {both[1]} both decide which blocks are left out: give one of them")
    return APPROXIMATIONS.filled(fit)


def decided_alone(approximate: Mapping[str, Mapping[str, Any]], refuse: Callable[[str], None], *, way: str = "cfg") -> dict[str, Mapping[str, Any]]:
    """Approximations without those that look at more than one of several processes sees.

    Args:
        way: in which they make a picture: "cfg", each sees some sides of guidance, or "context", some tokens.
    """
    kept = {name: options for name, options in approximate.items() if way == "cfg" and not APPROXIMATIONS[name].adaptive}
    for name in approximate.keys() - kept.keys():
        sees = "sides of guidance" if way == "cfg" else "tokens"
        refuse(f"{name} is given but looks at all {sees}, of which each process sees some: leave it or parallel out")
    return kept
