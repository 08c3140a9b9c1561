"""What a person watches on stderr while pictures are made: a phase, or steps with their rate and the time left. Knows a step's index and total only.

In a terminal one bar that disappears; elsewhere (a log, a pipe) a line per phase, for the first step and then at most one every ten seconds.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from latentgen.diffusion.sample import Step

LINE_EVERY = 10.0  # seconds


class Meter:
    """A context; `shown=False` makes it silent."""

    def __init__(self, *, shown: bool) -> None:
        self._shown, self._bar, self._first, self._last, self._from = shown, None, 0.0, 0.0, 0
        self._task: Any = None

    def __enter__(self) -> Meter:
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

            console = Console(stderr=True)
            if console.is_terminal:
                words, numbers = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[text]}"))
                self._bar = Progress(SpinnerColumn(), words, BarColumn(bar_width=24), numbers, console=console, transient=True)
                self._bar.start()
                self._task = self._bar.add_task("", total=None, text="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def phase(self, name: str) -> None:
        """Something without a count has begun."""
        if self._bar is not None:
            self._bar.update(self._task, description=name, total=None, text="")
        elif self._shown:
            typer.echo(name, err=True)

    def step(self, step: Step) -> None:
        """One step is done. The rate leaves the first out, which also loads weights."""
        now, done = time.perf_counter(), step.index + 1
        if not self._from:
            self._first, self._last, self._from = now, now, done
        text = f"{done}/{step.total}"
        if done > self._from and now > self._first:
            seconds = (now - self._first) / (done - self._from)
            text += f", {_rate(seconds)}, {_clock(seconds * (step.total - done))} left"
        if self._bar is not None:
            self._bar.update(self._task, description="step", total=step.total, completed=done, text=text)
        elif self._shown and (done == self._from or now - self._last >= LINE_EVERY):
            typer.echo(f"step {text}", err=True)
            self._last = now


def _rate(seconds: float) -> str:
    return f"{1 / seconds:.1f} steps/s" if seconds < 1 else f"{seconds:.1f} s/step"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02}"
