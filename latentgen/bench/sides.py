"""Who is measured: this engine, and diffusers' pipelines on the same files, as they come and tuned by hand. Knows the clock between steps; prints
nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from latentgen.bench.run import quiet

if TYPE_CHECKING:
    from PIL import Image

    Call = Callable[[str, int, int], "Took"]  # (prompt, seed, steps)

OURS, STOCK, TUNED = "latentgen", "diffusers float32", "diffusers tuned"
NEGATIVE = "blurry"


@dataclass(frozen=True)
class Took:
    """One call.

    Attributes:
        total: seconds of all of it, from words to pixels.
        step: seconds of one step, the median between steps (of one step, its own).
        work: seconds of processor time of all of it, all threads together: hardly disturbed by what else runs.
        steps: how many there were; image: what came out.
    """

    total: float
    step: float
    work: float
    steps: int
    image: Image.Image

    def at(self, steps: int) -> float:
        """Seconds that a call of `steps` would take: its own, with steps like these added."""
        return self.total + (steps - self.steps) * self.step


def timed(call: Callable[[Callable[[], None]], Any], steps: int) -> Took:
    """Run call(mark), which marks the end of each step and returns a picture."""
    marks: list[float] = []
    began, work = time.perf_counter(), time.process_time()
    image = call(lambda: marks.append(time.perf_counter()))
    total, work = time.perf_counter() - began, time.process_time() - work
    between = [b - a for a, b in zip(marks, marks[1:], strict=False)] or [marks[0] - began]
    return Took(total, median(between), work, steps, image)


def ours(folder: Path, *, side: int, scale: float) -> Call:
    """This engine, as `load` has it by default."""
    from latentgen.run.pipeline import load

    pipe = load(folder, device="cpu", progress=False)

    def call(prompt: str, seed: int, steps: int) -> Took:
        return timed(lambda mark: pipe.txt2img(prompt, negative_prompt=NEGATIVE, seed=seed, steps=steps, guidance_scale=scale, width=side,
                                               height=side,
                                               on_step=lambda step: mark()).image, steps)

    return call


def theirs(folder: Path, *, side: int, scale: float, tuned: bool) -> Call:
    """diffusers' own pipeline: as it comes (float32), or with what its documentation advises for CPUs with bf16: bfloat16 and channels-last."""
    import torch
    from diffusers import DiffusionPipeline

    with quiet():
        missing = {"text_encoder_3": None, "tokenizer_3": None} if (folder / "transformer").is_dir() else {}
        missing |= {"safety_checker": None, "requires_safety_checker": False} if not (folder / "text_encoder_2").is_dir() else {}
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16 if tuned else torch.float32, local_files_only=True, **missing)
    pipe.set_progress_bar_config(disable=True)
    if tuned:
        for part in ("unet", "transformer", "vae"):
            if getattr(pipe, part, None) is not None:
                getattr(pipe, part).to(memory_format=torch.channels_last)

    def call(prompt: str, seed: int, steps: int) -> Took:
        def run(mark: Callable[[], None]) -> Any:
            def at_end(pipeline: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
                mark()
                return kwargs

            return pipe(prompt, negative_prompt=NEGATIVE, num_inference_steps=steps, guidance_scale=scale, width=side, height=side,
                        generator=torch.Generator("cpu").manual_seed(seed), callback_on_step_end=at_end).images[0]

        return timed(run, steps)

    return call
