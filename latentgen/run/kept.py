"""What was measured on this machine and is kept for later runs: small JSON files in the user's config folder. Knows that folder; no model and no
request."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentgen.errors import OutputError
from latentgen.pixels.save import write_whole

if TYPE_CHECKING:
    import torch

MAX_BYTES = 2**20


def config_folder() -> Path:
    """LATENTGEN_CONFIG, else "latentgen" in XDG_CONFIG_HOME, in APPDATA on Windows, or in ~/.config."""
    if own := os.environ.get("LATENTGEN_CONFIG"):
        return Path(own).expanduser()
    home = os.environ.get("APPDATA") if sys.platform == "win32" else os.environ.get("XDG_CONFIG_HOME")
    return Path(home or "~/.config").expanduser() / "latentgen"


def read_kept(name: str) -> dict[str, Any]:
    """What is kept under a name; {} where nothing is, or nothing that can be read."""
    file = config_folder() / f"{name}.json"
    try:
        found = json.loads(file.read_text("utf-8")) if file.stat().st_size <= MAX_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def keep(name: str, key: str, value: Any) -> None:
    """Keep a value beside the others of that name, whole or not at all.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = config_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the config folder {folder.name!r} cannot be made ({error.strerror or type(error).__name__}): "
                          "set LATENTGEN_CONFIG to a folder that can be written") from error
    write_whole(folder / f"{name}.json", json.dumps(read_kept(name) | {key: value}, ensure_ascii=False, indent=1).encode())


def once(name: str, key: str, *, valid: Callable[[dict[str, Any]], bool], measure: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """What is kept under a key, else measured now and kept; and why it could not be kept, "" where it is.

    Args:
        valid: whether what was found there is what is kept here.
    """
    found = read_kept(name).get(key)
    if isinstance(found, dict) and valid(found):
        return found, ""
    made = measure()
    try:
        keep(name, key, made)
    except OutputError as error:
        return made, str(error)
    return made, ""


def device_name(device: torch.device) -> str:
    """Under which what was measured on a device is kept: a GPU's own name, else its kind."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
