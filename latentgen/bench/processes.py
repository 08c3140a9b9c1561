"""Loading, the first picture and the memory of both, each side in a process of its own. Knows folders and processes; prints nothing itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

START = """
import json, sys, time
def held(key): return next((int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key)), None)
folder, side, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
import torch
torch.set_num_threads(threads)
"""
CODE = {
    "latentgen": """
import latentgen, diffusers, transformers, latentgen.run.pipeline
from transformers import CLIPTextModel
from diffusers import UNet2DConditionModel, AutoencoderKL
began, before = time.perf_counter(), held("VmRSS")
pipe = latentgen.load(folder, device="cpu", dtype="bfloat16", progress=False)
for stage in ("text", "denoiser", "decoder"):
    with pipe.residency.use(stage): pass
loaded, peak = time.perf_counter() - began, held("VmHWM")
pipe.txt2img("a red heart", steps=1, seed=0, width=side, height=side)
""",
    "diffusers": """
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel
began, before = time.perf_counter(), held("VmRSS")
pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, local_files_only=True, safety_checker=None,
                                               requires_safety_checker=False)
for part in (pipe.unet, pipe.vae): part.to(memory_format=torch.channels_last)
loaded, peak = time.perf_counter() - began, held("VmHWM")
pipe.set_progress_bar_config(disable=True)
pipe("a red heart", num_inference_steps=1, width=side, height=side)
""",
}
END = """
print(json.dumps({"seconds": loaded, "picture": time.perf_counter() - began, "before": before, "loaded": peak, "running": held("VmHWM")}))
"""


def loading(folder: Path, *, side: int, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds and bytes by side, medians over rounds in turns: imports are done before the clock starts; then load, and a picture of one step.

    "seconds" are those until the model is loaded, "picture" those until the first picture is there, for what one side does while it loads
    another does when weights are first used. "loaded" and "running" are the most memory of the process up to there, less what it held before it
    loaded anything.
    """
    found: dict[str, list[Mapping[str, float]]] = {side_: [] for side_ in CODE}
    for n in range(rounds):
        for name in list(CODE)[:: -1 if n % 2 else 1]:
            done = subprocess.run([sys.executable, "-c", START + CODE[name] + END, str(folder), str(side), str(threads)], capture_output=True,
                                  text=True,
                                  env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=False)
            if done.returncode == 0:
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {name: _medians(runs) for name, runs in found.items()}


def _medians(runs: list[Mapping[str, float]]) -> dict[str, float]:
    if not runs:
        return {"failed": 1.0}
    return {name: round(median(run[name] for run in runs), 3) for name in ("seconds", "picture")} | {
        f"{name}_mb": round(median((run[name] or 0) - (run["before"] or 0) for run in runs) / 1e6) for name in ("loaded", "running")}
