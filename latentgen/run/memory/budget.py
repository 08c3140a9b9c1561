"""A plan that fits a memory: the fastest placement, batching and tiles whose forecast does. Knows plans and forecasts; loads and runs nothing."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from latentgen.errors import RequestError
from latentgen.models.quantise.ways import STORED, WAYS
from latentgen.run.memory.forecast import GB, NAMES
from latentgen.run.memory.ladder import fewer_rows, placed, policies, smaller_tiles
from latentgen.run.residency import GRAPHS, SPEEDS, STREAMING

if TYPE_CHECKING:
    from latentgen.run.memory.forecast import Forecast
    from latentgen.run.plan import Plan
    from latentgen.run.residency import Residency

log = logging.getLogger(__name__)
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": GB, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LEAST = UNITS["MB"]  # a bare number below it is one without its unit
WORTH = 1.1  # how much faster weights in fewer bits must be than streaming them as they are
MARGIN = 1.03  # how much more than predicted is kept free
ROUGHLY = 4096  # bytes for each pixel of a picture, more than any autoencoder takes


def memory_bytes(said: str | int, device: torch.device) -> int:
    """Bytes that were named: "8GB", "7.5 GiB", a number of bytes, or "auto" for what is free on the device.

    Raises:
        RequestError: none of these, or a bare number so small that its unit was forgotten.
    """
    if said == "auto":
        return free_bytes(device)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?\s*", said.lower()) if isinstance(said, str) else None
    whole = isinstance(said, int) and not isinstance(said, bool)
    number = said if whole else None if found is None else int(float(found[1]) * UNITS[(found[2] or "").upper()])
    if number is None or number <= 0:
        raise RequestError(f"memory is {said!r:.60}: expected a size as '8GB' or '7.5GiB', a number of bytes, or 'auto' for what is free")
    if number < LEAST and (found is None or not found[2]):
        raise RequestError(f"memory is {number} bytes, in which no model has room: say the unit, as '{number if number < 1000 else 8}GB'")
    return number


def free_bytes(device: torch.device) -> int:
    """What is free on a device now; in main memory, as far as this process may grow."""
    if device.type == "cuda":  # what this process keeps for its next tensors is free, too
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = _available()
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        most, now = (_number(f"/sys/fs/cgroup/{name}") for name in (limit, used))
        if most is not None and now is not None:
            free = min(free, max(0, most - now))
    return free


def _available() -> int:
    """Of main memory, what could be had without swapping."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        raise RequestError("memory is 'auto' but this system does not tell how much is free: name a size, as memory='8GB'") from None


def _number(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):  # none, or "max"
        return None


def fitted(wish: Plan, foresee: Callable[[Plan], Forecast], budget: int) -> Plan:
    """The fastest plan that fits, as predicted: with weights as they are, or where those would be streamed, in the ways that the plan allows.

    Args:
        foresee: predicts what a plan needs.

    Raises:
        RequestError: none fits: what it needs at least, and what would help.
    """
    tried: list[tuple[int, str, Forecast]] = []
    fit: list[tuple[Plan, Forecast]] = []
    for late in (False, True):  # on a CPU, packing blocks at each of their visits is the last resort
        for way in wish.ways[wish.ways.index(wish.quantise):]:
            chosen = [p for p in (wish.residency, *policies(wish)) if late == (way in WAYS and p in STREAMING and wish.device.startswith("cpu"))]
            found = _first(placed(wish, quantise=way), chosen, foresee, budget, tried)
            fit += [found] if found else []
            if found and found[0].residency not in STREAMING:
                break
        if fit:
            plan, need = min(fit, key=lambda each: sum(each[1].seconds.values()) * (WORTH if each[0].quantise in WAYS else 1))
            return _told(wish, plan, need, budget, foresee, others=[each for each in fit if each[0] is not plan])
    least, policy, need = min(tried, key=lambda each: each[0])
    stage = max(need.stages, key=lambda name: need.stages[name].peak)
    raise RequestError(f"memory is {budget / GB:.3g} GB but this needs at least {least * MARGIN / GB:.3g} GB, "
                       f"for {NAMES[stage]} at {wish.width}x{wish.height} with "
                       f"residency {policy!r}: {_cure(stage, need, wish)}")


def _first(wish: Plan, chosen: Sequence[str], foresee: Callable[[Plan], Forecast], budget: int,
           tried: list[tuple[int, str, Forecast]]) -> tuple[Plan, Forecast] | None:
    """The first plan that fits, going down these policies; all that were tried are added to `tried`."""
    for policy in chosen:
        plan = placed(wish, residency=policy)
        for step in (plan, *fewer_rows(plan)):
            plan = step
            need = foresee(step)
            if _fits(need.peak, budget) or _fits(need.stages["denoiser"].peak, budget):
                break
        for step in (plan, *(smaller_tiles(plan) if plan.request.vae_tile is None else ())):
            need = foresee(step)
            tried.append((need.peak, policy, need))
            if _fits(need.peak, budget):
                return step, need
    return None


def eased(wish: Plan, residency: Residency, *, timed: Callable[[], Callable[[Plan], Forecast]]) -> Plan:
    """A plan for which no memory was named, made to fit what is free: on a GPU as `fitted` does. What does not fit is noted and not refused; on a
    CPU nothing is changed.

    It is run on paper only where it is not plainly small; where that fails, it stays as it is, for nobody asked. Processes that must have one plan
    each have a memory of their own: theirs is left alone.

    Args:
        timed: gives what predicts time, too; asked for where weights may be held in several ways, of which the faster one is taken.
    """
    device, foresee, last = residency.device, wish.foresee, wish.passes[-1]
    if foresee is None or wish.parallel is not None or device.type not in ("cpu", "cuda"):
        return wish
    try:
        free = free_bytes(device) + residency.resident_bytes(device)  # what is held already is this plan's to use
    except RequestError:  # a system that does not tell
        return wish
    if 2 * (sum(wish.weights.values()) + ROUGHLY * last.width * last.height * wish.rows) < free:
        return wish
    try:
        return _eased(wish, free, foresee, timed)
    except Exception as error:
        log.info("what the plan needs could not be predicted: %s", error, exc_info=error)
        return wish


def _eased(wish: Plan, free: int, foresee: Callable[[Plan], Forecast], timed: Callable[[], Callable[[Plan], Forecast]]) -> Plan:
    if wish.device.startswith("cuda") and wish.speed in SPEEDS and wish.speed != GRAPHS:
        try:
            return fitted(wish, timed() if wish.ways[1:] else foresee, free)
        except RequestError:
            pass
    if _fits((need := foresee(wish)).peak, free):
        return wish
    least = f"{int(free / GB)}GB" if free >= GB else f"{max(1, int(free / UNITS['MB']))}MB"
    note = (f"it needs {need.peak / GB:.3g} GB of memory and {free / GB:.3g} GB is free: name what it may take, as "
            f"memory='{least}', or free some")
    return replace(wish, notes=(*wish.notes, note))


def _fits(peak: int, budget: int) -> bool:
    return peak * MARGIN <= budget


def _cure(stage: str, need: Forecast, wish: Plan) -> str:
    if need.stages[stage].weights > need.stages[stage].activations:  # type: ignore[index]
        if not WAYS.keys() & {*wish.ways}:
            return "give it more memory, allow weights in fewer bits with quantise='auto', or use a smaller model"
        return "give it more memory, load it in a dtype of fewer bytes, or use a smaller model"
    return "make the picture smaller, or fewer at once" if stage == "denoiser" else "make the picture smaller"


def _told(wish: Plan, plan: Plan, need: Forecast, budget: int, foresee: Callable[[Plan], Forecast], *,
          others: Sequence[tuple[Plan, Forecast]]) -> Plan:
    """The plan with its forecast, and why it is not as it would be without a limit."""
    changed = []
    if plan.quantise != wish.quantise:
        held = "are left packed as their files have them" if plan.quantise == STORED else f"are held in {plan.quantise}"
        slower = [f"{sum(other.seconds.values()):.2g} s with residency {each.residency!r} and weights " + (each.quantise or "as they are")
                  for each, other in others[:1]]
        changed.append(f"weights {held}" + (f" ({sum(need.seconds.values()):.2g} s predicted, against {slower[0]})" if slower else ""))
    if plan.residency != wish.residency:
        changed.append(f"residency is {plan.residency!r}")
    if plan.rows != wish.rows:
        changed.append(f"{plan.rows} of {wish.rows} pictures are in a call of the network")
    if plan.request.split_guidance != wish.request.split_guidance:
        changed.append("guidance is split")
    if plan.tile != wish.tile:
        changed.append(f"the autoencoder works in tiles of {plan.tile} pixels")
    note = f"to fit {budget / GB:.3g} GB {' and '.join(changed)}: otherwise it would need {foresee(wish).peak / GB:.3g} GB"
    return replace(plan, forecast=replace(need, budget=budget), notes=(*plan.notes, *([note] if changed else [])))
