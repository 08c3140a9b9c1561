"""The progress bar of a call: rate and ETA on stderr, in a terminal or a notebook. Knows a plan's length; nothing calls upward."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentgen.diffusion.sample import Step
    from latentgen.run.plan import Plan


class Bar:
    """A context that shows one bar; `shown` None means: only where a person watches."""

    def __init__(self, plan: Plan, shown: bool | None) -> None:
        self._bar: Any = None
        if shown or (shown is None and watched()):
            from tqdm.auto import tqdm

            self._bar = tqdm(total=plan.steps, desc=f"{plan.task} {plan.crop[0]}x{plan.crop[1]}", unit="step", leave=False)

    def step(self, step: Step) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update(1)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()


def watched() -> bool:
    """Whether a person sees stderr: a terminal, or the cell of a running notebook."""
    if sys.stderr is not None and sys.stderr.isatty():
        return True
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None
