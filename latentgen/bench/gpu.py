"""The cases that need a CUDA device: whole calls against diffusers, eager and compiled, and peaks of memory under a cap.
Knows architectures, sides and what a device tells; prints nothing.

One side after the other has the device for itself: it is loaded, called once for what is done only once (kernels, compiling, capturing), measured,
and dropped. The host waits for the device where a clock is read, and nowhere between. All of it runs on a CPU too,
where tests do that, with no peaks.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from latentgen.bench import limit
from latentgen.bench.run import quiet
from latentgen.bench.sides import NEGATIVE, OURS, Took
from latentgen.bench.weights import Architecture, shallower, write

if TYPE_CHECKING:
    import torch

    Call = Callable[[Callable[[], None], str, int, int], Any]  # (marks the end of a step, prompt, seed, steps) -> picture

GRAPHS, EAGER, COMPILED = "latentgen graphs", "diffusers eager", "diffusers compiled"
FULL = 20  # steps that are reported
WARM = 4  # of the call before
GB = 10**9
SD15 = Architecture("sd15", "sd15")
SDXL = Architecture("sdxl", "sdxl")
SD3 = Architecture("sd3-medium", "sd3", {"text_encoder_3": None})
FLUX1 = Architecture("flux1-dev", "flux1")
CAPS: Sequence[tuple[Architecture, tuple[int, ...]]] = ((FLUX1, (24, 16, 12, 8)), (SDXL, (8, 6, 4)), (SD15, (3,)))  # GB


class Meter:
    """What a device tells of time and memory; of a CPU no memory."""

    def __init__(self, device: str) -> None:
        import torch

        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done all that was asked of it."""
        import torch

        if self.cuda:
            torch.cuda.synchronize(self.device)

    def reset(self) -> None:
        """Peaks count from here."""
        import torch

        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        """The most bytes of tensors that were on the device at once."""
        import torch

        return torch.cuda.max_memory_allocated(self.device) if self.cuda else None

    def cap(self, size: int | None) -> None:
        """Let this process have no more bytes of the device than that; None for all."""
        import torch

        if self.cuda:
            whole = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(1.0 if size is None else min(1.0, size / whole), self.device)


def timed(call: Call, meter: Meter, *, prompt: str, seed: int, steps: int) -> Took:
    """One call. A step is what lies between the first and the last, shared evenly: waiting for each would leave the device idle between them."""
    marks: list[float] = []
    made = 0

    def mark() -> None:
        nonlocal made
        made += 1
        if made in (1, steps):
            meter.wait()
            marks.append(time.perf_counter())

    meter.wait()
    began, work = time.perf_counter(), time.process_time()
    image = call(mark, prompt, seed, steps)
    meter.wait()
    total, work = time.perf_counter() - began, time.process_time() - work
    step = (marks[-1] - marks[0]) / (steps - 1) if steps > 1 else marks[0] - began
    return Took(total, step, work, steps, image)


def ours(folder: Path, device: str, said: Mapping[str, Any], **how: Any) -> Call:
    """This engine as it comes, or loaded in another way."""
    from latentgen.run.pipeline import load

    pipe = load(folder, device=device, progress=False, **how)
    return lambda mark, prompt, seed, steps: pipe.txt2img(prompt, seed=seed, steps=steps, on_step=lambda step: mark(), **said).image


def theirs(folder: Path, device: str, said: Mapping[str, Any], *, compiled: bool = False) -> Call:
    """diffusers' pipeline in bfloat16: as it comes, or its network compiled by region as its documentation has it."""
    import torch
    from diffusers import DiffusionPipeline

    kind = json.loads((folder / "model_index.json").read_text("utf-8"))["_class_name"]
    missing = {"StableDiffusion3Pipeline": {"text_encoder_3": None, "tokenizer_3": None},
               "StableDiffusionPipeline": {"safety_checker": None, "requires_safety_checker": False}}.get(kind, {})
    with quiet():
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, local_files_only=True, **missing)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    net = getattr(pipe, "transformer", None) or pipe.unet
    if compiled and getattr(net, "_repeated_blocks", None):
        net.compile_repeated_blocks(fullgraph=True)
    elif compiled:
        net.compile()

    def call(mark: Callable[[], None], prompt: str, seed: int, steps: int) -> Any:
        def at_end(pipeline: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            mark()
            return kwargs

        return pipe(prompt, num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(seed), callback_on_step_end=at_end,
                    **said).images[0]

    return call


def taken(make: Callable[[], Call], meter: Meter, *, steps: int, rounds: int) -> dict[str, float] | None:
    """Medians of one side, seconds for FULL steps and its peak; None where the device's memory is too small for it."""
    import torch

    call: Call | None = None
    try:
        meter.reset()
        call = make()
        call(lambda: None, "warm", 0, min(steps, WARM))
        took = [timed(call, meter, prompt=f"a red heart, number {n + 1}", seed=n + 1, steps=steps) for n in range(rounds)]
        peak = meter.peak()
    except torch.OutOfMemoryError:
        return None
    finally:
        del call
        meter.reset()
    numbers = {"call": median(t.at(FULL) for t in took), "step": median(t.step for t in took), "rest": median(t.at(0) for t in took)}
    return {name: round(value, 4) for name, value in numbers.items()} | ({} if peak is None else {"peak_mb": round(peak / 1e6)})


def speed(architecture: Architecture, *, side: int, scale: float, negative: bool = True, device: str = "cuda",
          compiled: bool = True) -> Callable[..., dict[str, Any]]:
    """The measuring of one architecture at one size. negative: there are negative words. compiled: diffusers compiled is a side, too."""
    said = {"width": side, "height": side, "guidance_scale": scale} | ({"negative_prompt": NEGATIVE} if negative else {})

    def measure(work: Path, steps: int, rounds: int, threads: int, depth: float = 1.0) -> dict[str, Any]:
        folder, meter = written(architecture, work, depth), Meter(device)
        sides: dict[str, Callable[[], Call]] = {OURS: lambda: ours(folder, device, said), EAGER: lambda: theirs(folder, device, said)}
        if meter.cuda:
            sides[GRAPHS] = lambda: ours(folder, device, said, speed="graphs")
        if compiled:
            sides[COMPILED] = lambda: theirs(folder, device, said, compiled=True)
        found = {name: taken(make, meter, steps=steps, rounds=rounds) for name, make in sides.items()}
        seconds = {name: numbers for name, numbers in found.items() if numbers is not None}
        made = {"seconds": seconds, "failed": [name for name, numbers in found.items() if numbers is None], "ratios": {},
                "asked": {**said, "steps_run": steps, "steps_reported": FULL, "rounds": rounds, "depth": depth}}
        if OURS in seconds:
            own = seconds[OURS]["call"]
            made["ratios"] = {name: round(numbers["call"] / own, 2) for name, numbers in seconds.items() if name != OURS}
            made["limit"] = roofline(folder, device, said, took=own)
        return made

    return measure


def roofline(folder: Path, device: str, said: Mapping[str, Any], *, took: float) -> dict[str, float]:
    """What the request would take at the device's fastest product, or where that is longer, at its fastest reading of the weights in every step."""
    import torch

    from latentgen.run.pipeline import load

    pipe = load(folder, device=device, progress=False)
    plan = pipe.plan("a red heart", steps=FULL, seed=0, **said)
    count, place = limit.flops(pipe, plan), torch.device(device)
    read = plan.weights["denoiser"] * plan.steps + plan.weights["text"] + plan.weights["decoder"]
    speed, width = limit.matrix_speed(place), limit.bandwidth(place)
    least = max(count / speed, read / width)
    return {"tflop": round(count / 1e12, 3), "gflops_a_second": round(speed / 1e9), "gbytes_a_second": round(width / 1e9, 1),
            "seconds": round(least, 4), "times_the_limit": round(took / least, 2), "share_of_roofline": round(least / took, 4)}


def memory(caps: Sequence[tuple[Architecture, tuple[float, ...]]] = CAPS, *, device: str = "cuda") -> Callable[..., dict[str, Any]]:
    """The measuring of peaks: each model in each cap (GB), planned for it and run in it, the prediction beside what the device counted."""

    def measure(work: Path, steps: int, rounds: int, threads: int, depth: float = 1.0) -> dict[str, Any]:
        meter = Meter(device)
        rows = [capped(written(architecture, work, depth), meter, architecture.variant, int(cap * GB), steps=steps)
                for architecture, sizes in caps for cap in sizes]
        return {"memory": rows, "ratios": {}, "asked": {"steps_run": steps, "depth": depth}}

    return measure


def capped(folder: Path, meter: Meter, name: str, cap: int, *, steps: int) -> dict[str, Any]:
    """One model planned for a cap and run in it."""
    import torch

    from latentgen.errors import OutOfMemoryError, RequestError
    from latentgen.run.pipeline import load

    row: dict[str, Any] = {"model": name, "cap_gb": cap / GB}
    meter.cap(cap)
    try:
        pipe = load(folder, device=str(meter.device), memory=cap, progress=False)
        plan = pipe.plan("a red heart", steps=steps, seed=0)
        row |= {"residency": plan.residency, "predicted_gb": round(plan.memory.peak / GB, 3)}
        meter.reset()
        result = pipe.stream(plan).result
        peak = meter.peak()
        row |= {"measured_gb": None if peak is None else round(peak / GB, 3), "notes": list(result.notes)}
        del result
    except (OutOfMemoryError, RequestError, torch.OutOfMemoryError) as error:
        row["failed"] = str(error).splitlines()[0][:200]
    finally:
        pipe = plan = None
        meter.reset()
        meter.cap(None)
    return row


def written(architecture: Architecture, work: Path, depth: float) -> Path:
    """The checkpoint with a share of its layers."""
    return write(shallower(architecture, depth), work / (architecture.variant if depth == 1 else f"{architecture.variant}-{depth:g}"))
