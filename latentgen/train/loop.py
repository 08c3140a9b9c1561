"""The one training loop: any model, any loss. Knows optimiser, EMA, budget, checkpoint, log, sheet; does not know glyph.

A run is a folder: `state.safetensors` (weights, EMA, optimiser moments), `state.json` (counters), `loss.csv`, `loss.png`, `sheet.png`.
Killing the process at any moment loses at most `save_minutes` of work: the next call with the same folder goes on from the state.
"""

from __future__ import annotations

import copy
import csv
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from latentgen.errors import TrainingError

log = logging.getLogger(__name__)
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """How long and how fast to learn.

    Attributes:
        minutes: wall-clock minutes of training in all, earlier runs on the same folder counted in.
        lr: peak learning rate (AdamW).
        warmup: steps of linear warm-up.
        decay: the last share of the budget over which the rate falls linearly to 2 % of its peak.
        ema: decay of the exponential moving average of the weights.
        save_minutes: minutes between checkpoints, sheets and plots.
    """

    minutes: float
    lr: float = 6e-4
    warmup: int = 200
    decay: float = 0.3
    ema: float = 0.999
    weight_decay: float = 0.01
    save_minutes: float = 3.0

    def rate(self, step: int, share: float) -> float:
        """Learning rate at a step, `share` of the budget (0 to 1) being used up."""
        tail = min(1.0, max(0.02, (1 - share) / self.decay)) if self.decay else 1.0
        return self.lr * min(1.0, (step + 1) / self.warmup) * tail


def fit(model: nn.Module, loss: Callable[[nn.Module, Batch], Mapping[str, Tensor]], batches: Iterator[Batch], out: Path, budget: Budget, *,
        sheet: Callable[[nn.Module], Image.Image] | None = None, stop: Event | None = None, device: str | torch.device = "cpu", bf16: bool = True,
        label: str = "train") -> nn.Module:
    """Train `model` until the budget is used up, or `stop` is set; return its EMA copy, on the CPU.

    Args:
        loss: (model, batch) -> named scalars; "loss" is minimised, the others are logged.
        batches: endless; drawn ahead in a thread, on the CPU.
        device: where the model learns.
        sheet: EMA model -> a picture of how it does now, saved as `sheet.png` at each checkpoint.

    Raises:
        TrainingError: the loss is not finite for 20 steps in a row.
    """
    out.mkdir(parents=True, exist_ok=True)
    model.to(device).train()
    ema = _copy(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=budget.lr, betas=(0.9, 0.99), weight_decay=budget.weight_decay)
    state = _Run.load(out, model, ema, optimiser)
    feed, closing = _ahead(batches), stop or Event()
    started, saved, bad, mean = time.perf_counter(), time.perf_counter(), 0, math.nan
    used_before = state.seconds
    bar = tqdm(total=round(budget.minutes * 60), initial=round(used_before), desc=label, unit="s",
               bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s {postfix}")
    try:
        while state.seconds < budget.minutes * 60 and not closing.is_set():
            batch = {k: v.to(device, non_blocking=True) for k, v in next(feed).items()}
            for group in optimiser.param_groups:
                group["lr"] = budget.rate(state.step, state.seconds / (budget.minutes * 60))
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=bf16):
                terms = loss(model, batch)
            terms["loss"].backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if torch.isfinite(norm):
                optimiser.step()
                bad = 0
            elif (bad := bad + 1) >= 20:
                raise TrainingError(f"the loss stayed not finite for 20 steps at step {state.step}: lower the learning rate (now {budget.lr:g})")
            state.step += 1
            state.samples += len(next(iter(batch.values())))
            _average(ema, model, min(budget.ema, (1 + state.step) / (10 + state.step)))
            now = time.perf_counter()
            state.seconds = used_before + now - started
            if state.step % 10 == 0:
                row = {k: v.item() for k, v in terms.items()}
                mean = row["loss"] if math.isnan(mean) else 0.8 * mean + 0.2 * row["loss"]
                state.record(row)
                bar.n = round(state.seconds)
                bar.set_postfix_str(f"step {state.step}, {state.samples / state.seconds:.1f} samples/s, loss {mean:.4f}", refresh=False)
                bar.update(0)
            if now - saved > budget.save_minutes * 60:
                state.save(out, model, ema, optimiser, sheet)
                saved = time.perf_counter()
    finally:
        bar.close()
        state.save(out, model, ema, optimiser, sheet)
    return ema.cpu()


class _Run:
    """Counters and the log of one run folder."""

    def __init__(self) -> None:
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self.rows: list[dict[str, float]] = []

    @classmethod
    def load(cls, out: Path, model: nn.Module, ema: nn.Module, optimiser: torch.optim.Optimizer) -> _Run:
        run = cls()
        path = out / "state.safetensors"
        if not (path.exists() and (out / "state.json").exists()):
            return run
        tensors = load_file(path)
        model.load_state_dict(_under(tensors, "model."))
        ema.load_state_dict(_under(tensors, "ema."))
        moments = _under(tensors, "moments.")
        parameters = [p for g in optimiser.param_groups for p in g["params"]]
        optimiser.load_state_dict(optimiser.state_dict() | {"state": {
            i: {"step": moments[f"{i}.step"], "exp_avg": moments[f"{i}.exp_avg"], "exp_avg_sq": moments[f"{i}.exp_avg_sq"]}
            for i in range(len(parameters)) if f"{i}.step" in moments}})
        counters = json.loads((out / "state.json").read_text())
        run.step, run.samples, run.seconds = counters["step"], counters["samples"], counters["seconds"]
        if (out / "loss.csv").exists():  # not there where a run was stopped before its first logged step
            with open(out / "loss.csv", newline="") as file:
                run.rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file) if float(row["step"]) <= run.step]
        log.info("going on from step %d in %s", run.step, out.name)
        return run

    def record(self, terms: dict[str, float]) -> None:
        self.rows.append({"step": self.step, "seconds": round(self.seconds, 1), "samples": self.samples} | {k: round(v, 5) for k, v in terms.items()})

    def save(self, out: Path, model: nn.Module, ema: nn.Module, optimiser: torch.optim.Optimizer,
             sheet: Callable[[nn.Module], Image.Image] | None) -> None:
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"ema.{k}": v for k, v in ema.state_dict().items()}
        for i, slot in optimiser.state_dict()["state"].items():
            tensors |= {f"moments.{i}.{k}": v for k, v in slot.items()}
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, out / "state.part")
        (out / "state.part").replace(out / "state.safetensors")
        _write(out / "state.json", json.dumps({"step": self.step, "samples": self.samples, "seconds": round(self.seconds, 1)}))
        if self.rows:
            names = list(self.rows[-1])
            _write(out / "loss.csv", ",".join(names) + "\n" + "".join(",".join(str(r.get(n, "")) for n in names) + "\n" for r in self.rows))
            plot(out / "loss.csv", out / "loss.png")
        if sheet is not None:
            sheet(ema).save(out / "sheet.part", format="PNG")
            (out / "sheet.part").replace(out / "sheet.png")


def plot(source: Path, target: Path) -> None:
    """Draw loss against wall time from a run's `loss.csv`."""
    from matplotlib.figure import Figure

    with open(source, newline="") as file:
        rows = [{k: float(v or "nan") for k, v in row.items()} for row in csv.DictReader(file)]
    if len(rows) < 3:
        return
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    minutes = [r["seconds"] / 60 for r in rows]
    window = max(1, len(rows) // 60)
    for name in [k for k in rows[0] if k not in ("step", "seconds", "samples")]:
        values = [r[name] for r in rows]
        smooth = [sum(values[max(0, i - window):i + 1]) / len(values[max(0, i - window):i + 1]) for i in range(len(values))]
        axes.plot(minutes, smooth, label=name)
    axes.set(xlabel="minutes of training", ylabel="loss", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(target.with_suffix(".part"), format="png", dpi=110)
    target.with_suffix(".part").replace(target)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}


def _copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def _average(ema: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def _ahead(batches: Iterator[Batch], depth: int = 3) -> Iterator[Any]:
    queue: Queue[Any] = Queue(depth)

    def work() -> None:
        try:
            for batch in batches:
                queue.put(batch)
        except Exception as error:  # handed over to the training thread, which raises it
            queue.put(error)

    Thread(target=work, daemon=True).start()
    while True:
        item = queue.get()
        if isinstance(item, Exception):
            raise item
        yield item


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
