"""Approximations as a request asks for them, checked against what the model is. Knows requests, families and the table; runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from latentgen.errors import RequestError
from latentgen.models.approximate.table import APPROXIMATIONS, KINDS, approximation, clashes, filled, kind_of

if TYPE_CHECKING:
    from latentgen.models.family import Family
    from latentgen.run.request import Request


def approximations_of(request: Request, family: Family, refuse: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """What the run leaves out: name -> all options, in the order of the table; what the model has no blocks for is refused.

    Raises:
        RequestError: an unknown name, option or value, or two that do the same work.
    """
    said = request.approximate or {}
    for name, options in said.items():
        approximation(name).check(name, options)
    kinds = {kind_of(part.cls) for part in family.parts if "denoiser" in part.stages}
    fit = {}
    for name in said:
        info = APPROXIMATIONS[name]
        if info.kind in kinds:
            fit[name] = said[name]
        else:
            others = ", ".join(other for other, each in APPROXIMATIONS.items() if each.kind in kinds)
            refuse(f"{name} is given but works on {KINDS[info.kind]}, which {family.name} is not: use one of {others}, or leave it out")
    if (both := clashes(fit)) is not None:
        raise RequestError(f"{both[0]} and {both[1]} both decide which blocks are left out: give one of them")
    return filled(fit)


def decided_alone(approximate: Mapping[str, Mapping[str, Any]], refuse: Callable[[str], None]) -> dict[str, Mapping[str, Any]]:
    """Approximations without those that decide by all sides of guidance, for processes that see some of them each."""
    kept = {name: options for name, options in approximate.items() if not APPROXIMATIONS[name].adaptive}
    for name in approximate.keys() - kept.keys():
        refuse(f"{name} is given but decides by what all sides of guidance have in common, of which each process sees some: leave it or parallel out")
    return kept
