"""What `latentgen tune` found fastest for a model on this machine, as a pipeline uses it where the user said so. Knows the file of such findings;
runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentgen.diffusion.table import in_words
from latentgen.errors import RequestError
from latentgen.models.approximate.table import APPROXIMATIONS
from latentgen.run.kept import keep, read_kept

NAME = "tuned"


@dataclass(frozen=True)
class Tuned:
    """What held the quality that was asked for.

    Attributes:
        approximate: as a request has it; empty where nothing faster held.
        quality: that was asked for, 0 to 1; speedup: of sampling, as it was measured.
    """

    approximate: Mapping[str, Mapping[str, Any]]
    quality: float
    speedup: float

    def __str__(self) -> str:
        what = in_words(self.approximate) or "nothing"
        return (f"tuned on this machine: {what}, {self.speedup:.2f} times as fast at a quality of {self.quality:g}; "
                "pass approximate={} for the exact picture")


def tuned_key(digest: str, device: str, dtype: str) -> str:
    """Under which a finding is kept: for these weights, this kind of device and these numbers."""
    return f"{digest} {device.split(':')[0]} {dtype}"


def read_tuned(key: str, model: str) -> Tuned:
    """The finding of that key.

    Raises:
        RequestError: there is none, or it says what no request can.
    """
    found = read_kept(NAME).get(key)
    cure = f"run `latentgen tune` on {model} first, in this dtype on this device, or leave tuned out"
    if found is None:
        raise RequestError(f"tuned is given but nothing is known of {model} here: {cure}")
    try:
        made = Tuned(dict(found["approximate"]), float(found["quality"]), float(found["speedup"]))
        APPROXIMATIONS.check(made.approximate)
    except (KeyError, TypeError, ValueError, RequestError) as error:
        raise RequestError(f"what was kept of tuning {model} cannot be read ({type(error).__name__}): {cure}") from error
    return made


def keep_tuned(key: str, found: Tuned) -> None:
    """Keep a finding in the place of an older one.

    Raises:
        OutputError: the user's config folder cannot be written.
    """
    keep(NAME, key, {"approximate": {name: dict(options) for name, options in found.approximate.items()}, "quality": found.quality,
                     "speedup": round(found.speedup, 4)})
