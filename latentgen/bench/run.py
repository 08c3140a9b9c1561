"""Speed and memory of a whole call, in turns with diffusers' stock pipeline on the same files. Knows the pipeline and the clock; prints nothing.

Rounds alternate between the sides and reverse their order each time, so that a machine that slows down slows all of them. Every round has a
new prompt and seed: nothing is answered from a memory of the round before.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from latentgen.errors import ModelError, RequestError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from latentgen.run.pipeline import Pipeline
    from latentgen.run.plan import Plan

    Call = Callable[[str, int], Image.Image]  # (prompt, seed) -> picture

OURS = "latentgen"
REFERENCES = ("diffusers",)
REFERENCE_DTYPES = ("float32", "bfloat16")  # its default, and the fast one
PATIENCE = 900.0  # seconds after which a cold start is given up
LAUNCHER = """
import json, os, subprocess, sys, threading, time
quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
began = time.perf_counter()
child = subprocess.Popen(sys.argv[2:], **quiet)
timer = threading.Timer(float(sys.argv[1]), child.kill)
timer.start()
if hasattr(os, "wait4"):
    _, raw, usage = os.wait4(child.pid, 0)
    peak, status = usage.ru_maxrss, os.waitstatus_to_exitcode(raw)
    child.returncode = status
else:
    peak, status = None, child.wait()
took = time.perf_counter() - began
timer.cancel()
print(json.dumps([took, peak, status]))
"""  # a small process starts the measured one: Linux counts the starter's memory into the peak of what it starts


def bench(model: str | Path = "glyph", *, width: int = 256, height: int = 256, steps: int = 20, rounds: int = 5, against: str | None = "diffusers",
          threads: int | None = None, cold: bool = True) -> dict[str, Any]:
    """Time whole txt2img calls, warm, and the start of the command line, cold.

    Args:
        model: a card's name or folder.
        against: "diffusers" (StableDiffusionPipeline on the same files, in float32 and bfloat16, same steps and guidance), or None or "none".
        threads: of torch, for the time of the measurement; None leaves them as they are.
        cold: also time new processes.

    Returns:
        Plain numbers without machine paths. "seconds": median, min and max of a call by side; "stages": this engine's medians; "ratios": how many
        times longer the reference takes (above 1: this engine is faster); "rms_levels": how far the last round's pictures are apart, of 255;
        "peak_rss_mb": the most this process had held before a reference was loaded; "cold", "environment", "asked".

    Raises:
        RequestError: a value out of range. ModelError: no such model, or one that the reference cannot run.
    """
    import torch

    from latentgen.run.pipeline import load

    if against not in (None, "none", *REFERENCES):
        raise RequestError(f"against is {against!r}: expected {', '.join(map(repr, REFERENCES))} or 'none'")
    for name, value in (("rounds", rounds), ("threads", 1 if threads is None else threads)):
        if not isinstance(value, int) or not 1 <= value <= 1000:
            raise RequestError(f"{name} is {value!r}: expected a whole number from 1 to 1000")
    with with_threads(threads):
        pipe = load(model, progress=False)
        options = {"width": width, "height": height, "steps": steps}
        plan = pipe.plan("a red heart", seed=0, **options)
        stages: list[Mapping[str, float]] = []
        calls: dict[str, Call] = {OURS: _ours(pipe, options, stages)}
        calls[OURS]("warm", 0)
        memory = _peak_rss()
        for dtype in REFERENCE_DTYPES if against == "diffusers" else ():
            calls[f"{against} {dtype}"] = _diffusers(pipe, plan, getattr(torch, dtype))
            calls[f"{against} {dtype}"]("warm", 0)
        stages.clear()
        taken, pictures = in_turns(calls, rounds)
        report = _report(plan, rounds, taken, stages) | {"rms_levels": _differences(pictures), "peak_rss_mb": memory, "environment": environment()}
    if cold:
        report["cold"] = cold_starts(model, options, rounds=min(rounds, 3), threads=threads)
    return report


def in_turns(calls: Mapping[str, Call], rounds: int) -> tuple[dict[str, list[float]], dict[str, Image.Image]]:
    """Seconds of every call by side, and the pictures of the last round. Each round has its own prompt and seed, the same for all sides."""
    taken: dict[str, list[float]] = {side: [] for side in calls}
    pictures: dict[str, Image.Image] = {}
    for n in range(rounds):
        for side in list(calls)[:: -1 if n % 2 else 1]:
            began = time.perf_counter()
            pictures[side] = calls[side](f"a red heart, number {n + 1}", n)
            taken[side].append(time.perf_counter() - began)
    return taken, pictures


def _ours(pipe: Pipeline, options: Mapping[str, Any], stages: list[Mapping[str, float]]) -> Call:
    def call(prompt: str, seed: int) -> Image.Image:
        result = pipe.txt2img(prompt, seed=seed, **options)
        stages.append(result.timings)
        return result.image

    return call


def _diffusers(pipe: Pipeline, plan: Plan, dtype: torch.dtype) -> Call:
    """diffusers' StableDiffusionPipeline on the checkpoint's own files, as a user would put it together."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.schedulers import DPMSolverMultistepScheduler
    from transformers import CLIPTokenizer

    from latentgen.models.load import part_class

    family, sources = pipe.family, pipe.checkpoint.sources
    folder = sources["unet"].files[0].parent.parent if "unet" in sources else Path()
    predictions = {"v": "v_prediction", "epsilon": "epsilon"}
    if {p.name for p in family.parts} != {"text_encoder", "unet", "vae"} or family.prediction not in predictions:
        raise ModelError(f"diffusers' StableDiffusionPipeline cannot run the family {family.name!r}: use against='none'")
    with quiet():
        parts = {p.name: part_class(p.cls).from_pretrained(folder / p.name, torch_dtype=dtype, local_files_only=True) for p in family.parts}
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=predictions[family.prediction],
        timestep_spacing="trailing", steps_offset=1, rescale_betas_zero_snr=family.path.at(1.0).alpha == 0)
    stock = StableDiffusionPipeline(**parts, tokenizer=tokenizer, scheduler=scheduler, safety_checker=None, feature_extractor=None,
                                    requires_safety_checker=False)
    stock.to(pipe.residency.device)
    stock.set_progress_bar_config(disable=True)

    def call(prompt: str, seed: int) -> Image.Image:
        return stock(prompt, width=plan.width, height=plan.height, num_inference_steps=plan.steps, guidance_scale=plan.guidance_scale,
                     generator=torch.Generator("cpu").manual_seed(seed)).images[0]

    return call


def _report(plan: Plan, rounds: int, taken: Mapping[str, Sequence[float]], stages: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    seconds = {side: {"median": round(median(s), 4), "min": round(min(s), 4), "max": round(max(s), 4)} for side, s in taken.items()}
    ours = median(taken[OURS])
    return {
        "model": plan.model,
        "asked": {"width": plan.width, "height": plan.height, "steps": plan.steps, "rounds": rounds, "guidance_scale": plan.guidance_scale,
                  "sampler": plan.sampler, "dtype": plan.dtype, "device": plan.device.split(":")[0]},
        "seconds": seconds, "stages": {stage: round(median(t[stage] for t in stages), 4) for stage in stages[0]},
        "ratios": {side: round(median(s) / ours, 3) for side, s in taken.items() if side != OURS}}


def _differences(pictures: Mapping[str, Image.Image]) -> dict[str, float]:
    """Root mean square distance of each side's picture from this engine's, in levels of 255: near 0 where both did the same work."""
    ours = np.asarray(pictures[OURS], np.float64)
    return {side: round(float(np.sqrt(np.mean((np.asarray(p, np.float64) - ours) ** 2))), 3) for side, p in pictures.items() if side != OURS}


def environment() -> dict[str, Any]:
    """What the numbers depend on: processor, threads and versions. No names of machines, users or folders."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("diffusers", "transformers"):
        if name in sys.modules:
            versions[name] = sys.modules[name].__version__
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {"system": platform.system(), "cpu": _processor(), "usable_cores": usable, "threads": torch.get_num_threads(), **versions}
    if hasattr(os, "getloadavg"):
        facts["load_of_last_minute"] = round(os.getloadavg()[0], 2)
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cold_starts(model: str | Path, options: Mapping[str, int], *, rounds: int = 3, threads: int | None = None) -> dict[str, Any]:
    """Whole new processes: one picture from the command line, its help, and a bare import; medians of seconds, and the most memory of any round."""
    run = [sys.executable, "-m", "latentgen"]
    with tempfile.TemporaryDirectory() as folder:
        sizes = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        output = str(Path(folder) / "heart.png")
        picture = [*run, "txt2img", "a red heart", "--model", str(model), *sizes, "--seed", "0", "--quiet", "--output", output]
        commands = {"txt2img": picture, "help": [*run, "--help"], "import": [sys.executable, "-c", "import latentgen"]}
        return {name: _cold(command, rounds, threads) for name, command in commands.items()}


def _cold(command: Sequence[str], rounds: int, threads: int | None) -> dict[str, Any]:
    seconds, peaks = [], []
    for _ in range(rounds):
        took, peak, status = _process(command, threads)
        if status:
            return {"failed": f"exit status {status}"}
        seconds.append(took)
        peaks.append(peak)
    known = [p for p in peaks if p is not None]
    return {"seconds": round(median(seconds), 3)} | ({"peak_rss_mb": max(known)} if known else {})


def _process(command: Sequence[str], threads: int | None) -> tuple[float, float | None, int]:
    """Seconds, peak memory in MB (None where the system does not say) and exit status of one process."""
    surroundings = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    starter = [sys.executable, "-c", LAUNCHER, str(PATIENCE)]
    launched = subprocess.run([*starter, *command], stdin=subprocess.DEVNULL, capture_output=True, env=surroundings, check=False)
    try:
        took, peak, status = json.loads(launched.stdout)
    except ValueError:
        return 0.0, None, launched.returncode or 1
    return took, None if peak is None else _megabytes(peak), status


def _peak_rss() -> float | None:
    """The most memory this process has held, in MB; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6, 1)
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return _megabytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _megabytes(maxrss: int) -> float:
    return round(maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024), 1)  # macOS counts bytes, others KiB


@contextmanager
def with_threads(count: int | None) -> Iterator[None]:
    """torch with `count` threads for as long as the block runs."""
    import torch

    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """No loading bars and no remarks about configs from diffusers and transformers while the block runs."""
    from diffusers.utils import logging as theirs
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), theirs.get_verbosity()
    logging.disable_progress_bar()
    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        theirs.enable_progress_bar()
        if shown:
            logging.enable_progress_bar()
