"""The progress bars of a call and of a download: rate and ETA on stderr, in a terminal or a notebook. Knows lengths; nothing calls upward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentgen.diffusion.sample import Step
    from latentgen.run.plan import Plan


class Bar:
    """A context that shows one bar; `shown` None means: only where a person watches. total: steps, where they are not those of the plan alone.
    done: of them, made before."""

    def __init__(self, plan: Plan, shown: bool | None, *, total: int | None = None, done: int = 0) -> None:
        self._bar: Any = None
        if shown or (shown is None and watched()):
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total or plan.steps, initial=done, desc=f"{plan.task} {plan.crop[0]}x{plan.crop[1]}", unit="step", leave=False)

    def step(self, step: Step) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update(1)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def download_bar(shown: bool | None) -> Iterator[Callable[[int, int, str], object] | None]:
    """What a download reports to: (bytes done, bytes in all, file). The bar appears with the first report; None where nobody watches."""
    if not (shown or (shown is None and watched())):
        yield None
        return
    bars: list[Any] = []

    def report(done: int, total: int, file: str) -> None:
        from tqdm.auto import tqdm

        if not bars:
            bars.append(tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, leave=False))
        bars[0].set_description(file, refresh=False)
        bars[0].update(done - bars[0].n)

    try:
        yield report
    finally:
        for bar in bars:
            bar.close()


def watched() -> bool:
    """Whether a person sees stderr: a terminal, or the cell of a running notebook."""
    if sys.stderr is not None and sys.stderr.isatty():
        return True
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None
