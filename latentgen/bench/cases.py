"""The cases of the speed table: what is run, by whom, and what of it is reported. Knows architectures, sides and rounds; prints nothing.

Every side does the same request: same files, steps, guidance and size, new words and a new seed in each round, sides in turns and their order
reversed each round. Weights are random, in the published sizes unless a case says less. A side that runs fewer steps than are reported has its own
steps continued at their median time, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from latentgen.bench import gpu, limit, run
from latentgen.bench.processes import loading
from latentgen.bench.sides import OURS, STOCK, TUNED, Took, ours, theirs
from latentgen.bench.weights import Architecture, write
from latentgen.errors import RequestError

if TYPE_CHECKING:
    from latentgen.bench.sides import Call

FULL = 20  # steps that are reported
SHORT_CLIP = {"num_hidden_layers": 2}
SD15 = Architecture("sd15", "sd15")
SDXL = Architecture("sdxl", "sdxl", {"unet": {"transformer_layers_per_block": [1, 1, 2]}, "text_encoder": SHORT_CLIP, "text_encoder_2": SHORT_CLIP})
SD3 = Architecture("sd3-medium", "sd3",
                   {"transformer": {"num_layers": 4}, "text_encoder": SHORT_CLIP, "text_encoder_2": SHORT_CLIP, "text_encoder_3": None})


@dataclass(frozen=True)
class Case:
    """One row or more of the table.

    Attributes:
        about: what it is, for people.
        measure: (folder for checkpoints, steps that are run, rounds, threads) -> plain numbers.
        gpu: it needs a CUDA device, and takes `depth` beside.
    """

    about: str
    measure: Callable[..., dict[str, Any]]
    gpu: bool = False


def in_turns(calls: Mapping[str, Call], *, steps: int, rounds: int) -> dict[str, list[Took]]:
    """What each side took. Every side is called once before, with one step, for what is done only once (packing, caches of kernels)."""
    for call in calls.values():
        call("warm", 0, 1)
    taken: dict[str, list[Took]] = {side: [] for side in calls}
    for n in range(rounds):
        for side in list(calls)[:: -1 if n % 2 else 1]:
            taken[side].append(calls[side](f"a red heart, number {n + 1}", n + 1, steps))
    return taken


def summed_up(taken: Mapping[str, list[Took]], *, full: int = FULL) -> dict[str, Any]:
    """Medians by side, and how many times longer each side takes than this engine, from words to pixels, for `full` steps."""
    seconds = {side: {"call": round(median(t.at(full) for t in took), 3), "step": round(median(t.step for t in took), 3),
                      "rest": round(median(t.at(0) for t in took), 3), "processor": round(median(t.work for t in took), 3)}
               for side, took in taken.items()}
    own = seconds[OURS]
    return {"seconds": seconds, "ratios": {side: round(said["call"] / own["call"], 2) for side, said in seconds.items() if side != OURS},
            "processor_ratios": {side: round(said["processor"] / own["processor"], 2) for side, said in seconds.items() if side != OURS}}


def _pipelines(architecture: Architecture, *, side: int, scale: float, stock: bool) -> Callable[[Path, int, int, int], dict[str, Any]]:
    def measure(work: Path, steps: int, rounds: int, threads: int) -> dict[str, Any]:
        folder = write(architecture, work / architecture.variant)
        calls = {OURS: ours(folder, side=side, scale=scale), TUNED: theirs(folder, side=side, scale=scale, tuned=True)}
        if stock:
            calls[STOCK] = theirs(folder, side=side, scale=scale, tuned=False)
        found = summed_up(in_turns(calls, steps=steps, rounds=rounds))
        return found | {"asked": {"side": side, "guidance_scale": scale, "steps_run": steps, "steps_reported": FULL, "rounds": rounds},
                        "limit": _limit(folder, side=side, scale=scale, took=found["seconds"][OURS]["call"])}

    return measure


def _limit(folder: Path, *, side: int, scale: float, took: float) -> dict[str, float]:
    """The fastest bf16 matrix product of this machine, the request's arithmetic, what that takes at that speed, and how far this engine is from
    it."""
    from latentgen.run.pipeline import load

    pipe = load(folder, device="cpu", progress=False)
    count = limit.flops(pipe, pipe.plan("a red heart", negative_prompt="blurry", steps=FULL, guidance_scale=scale, width=side, height=side, seed=0))
    speed = limit.matrix_speed()
    return {"tflop": round(count / 1e12, 2), "gflops_a_second": round(speed / 1e9), "seconds": round(count / speed, 2),
            "times_the_limit": round(took * speed / count, 2)}


def _glyph(work: Path, steps: int, rounds: int, threads: int) -> dict[str, Any]:
    found = run.bench("glyph", width=256, height=256, steps=FULL, rounds=max(rounds, 3), against="diffusers", threads=threads, cold=False)
    return {"seconds": {side: {"call": said["median"]} for side, said in found["seconds"].items()},
            "ratios": {side: round(value, 2) for side, value in found["ratios"].items()},
            "asked": {"side": 256, "guidance_scale": found["asked"]["guidance_scale"], "steps_run": FULL, "steps_reported": FULL,
                      "rounds": max(rounds, 3)}}


def _loading(work: Path, steps: int, rounds: int, threads: int) -> dict[str, Any]:
    found = loading(write(SD15, work / SD15.variant), side=512, rounds=rounds, threads=threads)
    first, other = found["latentgen"], found["diffusers"]
    return {"loading": found,
            "ratios": {name: round(other[name] / first[name], 2)
                       for name in ("seconds", "picture", "loaded_mb", "running_mb") if name in first and name in other},
            "asked": {"side": 512, "steps_run": 1, "rounds": rounds}}


CASES: Mapping[str, Case] = {
    "sd15": Case("SD 1.5, 512x512, guided", _pipelines(SD15, side=512, scale=7.5, stock=True)),
    "glyph": Case("glyph, 256x256, guided", _glyph),
    "sdxl": Case("SDXL at reduced depth, 1024x1024, guided", _pipelines(SDXL, side=1024, scale=5.0, stock=False)),
    "sd3": Case("SD3-medium at reduced depth, 512x512, guided", _pipelines(SD3, side=512, scale=7.0, stock=False)),
    "load": Case("SD 1.5 loaded, and its first picture in one step", _loading),
    **{f"gpu-{name}-{side}": Case(f"{label}, {side}x{side}, on a GPU", gpu.speed(architecture, side=side, scale=scale, negative=negative), gpu=True)
       for name, label, architecture, scale, negative in (("sd15", "SD 1.5", gpu.SD15, 7.5, True), ("sdxl", "SDXL", gpu.SDXL, 5.0, True),
                                                          ("sd3", "SD3-medium without T5", gpu.SD3, 7.0, True),
                                                          ("flux1", "FLUX.1-dev", gpu.FLUX1, 3.5, False)) for side in (512, 1024)},
    "gpu-memory": Case("peaks on a GPU under a cap", gpu.memory(), gpu=True),
}


def measure(names: list[str], *, work: Path, steps: int = 3, rounds: int = 3, threads: int | None = None, depth: float = 1.0) -> dict[str, Any]:
    """Run cases, one after the other.

    Args:
        names: keys of CASES, or ["all"], which are those that need no GPU, or ["gpu"], those that do.
        work: a folder for checkpoints with random weights (8 GB for all, on a GPU 50 GB); what is there is used again.
        depth: of cases on a GPU, the share of each model's layers, above 0 and at most 1.
        steps: that each side runs in each round; 3 are enough to tell a step, 20 leave nothing to be continued.

    Returns:
        {"cases": {name: numbers}, "environment": ...}, JSON-ready and without machine paths.

    Raises:
        RequestError: an unknown case, numbers out of range, or a case that needs a GPU where there is none.
    """
    import torch

    wanted = [name for name, case in CASES.items() if case.gpu == (names == ["gpu"])] if names in (["all"], ["gpu"]) else names
    if unknown := [name for name in wanted if name not in CASES]:
        raise RequestError(f"there is no case {unknown[0]!r}: expected all, gpu, {', '.join(CASES)}")
    if (on_gpu := [name for name in wanted if CASES[name].gpu]) and not torch.cuda.is_available():
        raise RequestError(f"the case {on_gpu[0]!r} needs a CUDA device, and this machine has none: leave it out, or run it on one that has")
    if not 0 < depth <= 1:
        raise RequestError(f"depth is {depth:g}: expected a share of each model's layers, above 0 and at most 1")
    for what, value in (("rounds", rounds), ("steps", steps), ("threads", 1 if threads is None else threads)):
        if not 1 <= value <= 1000:
            raise RequestError(f"{what} is {value}: expected a whole number from 1 to 1000")
    work.mkdir(parents=True, exist_ok=True)
    with run.with_threads(threads):
        found = {}
        for name in wanted:
            more = {"depth": depth} if CASES[name].gpu else {}
            found[name] = {"about": CASES[name].about} | CASES[name].measure(work, steps, rounds, torch.get_num_threads(), **more)
        return {"cases": found, "environment": run.environment()}
