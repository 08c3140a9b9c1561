"""Where glyph's training pictures and names come from. Knows package names, licences and the npm client; draws nothing.

Only permissive licences (MIT, Apache-2.0, CC-BY-4.0 with attribution): no share-alike, no trade-mark sets, no flags.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from latentgen.errors import TrainingError


@dataclass(frozen=True)
class PictureSet:
    """One icon set: its npm package and version, licence, credit line and the neutral style phrase used in captions."""

    name: str
    package: str
    version: str
    licence: str
    credit: str
    style: str
    emoji: bool = True  # False: an interface icon set without codepoints


PICTURE_SETS: tuple[PictureSet, ...] = (
    PictureSet("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0", "Noto Emoji, Google", "soft shaded"),
    PictureSet("twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twemoji, Twitter and contributors", "crisp flat"),
    PictureSet("fluent-emoji-flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Fluent Emoji, Microsoft", "flat"),
    PictureSet("fluent-emoji", "@iconify-json/fluent-emoji", "1.2.7", "MIT", "Fluent Emoji, Microsoft", "glossy gradient"),
    PictureSet("fluent-3d", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "Fluent Emoji, Microsoft; packed by LobeHub", "3d render"),
    PictureSet("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "EmojiOne 2 (EmojiTwo)", "cartoon"),
    PictureSet("noto-v1", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Noto Emoji (first version), Google", "blob"),
    PictureSet("fxemoji", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "FxEmojis, Mozilla", "rounded"),
    PictureSet("streamline-emojis", "@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0", "Streamline Emojis, Streamline",
               "outlined cartoon"),
    PictureSet("flat-color-icons", "@iconify-json/flat-color-icons", "1.2.3", "MIT", "Flat Color Icons, Icons8", "flat icon", emoji=False),
    PictureSet("fluent-color", "@iconify-json/fluent-color", "1.2.21", "MIT", "Fluent System Color Icons, Microsoft", "colour icon",
               emoji=False),
    PictureSet("streamline-ultimate-color", "@iconify-json/streamline-ultimate-color", "1.2.2", "CC-BY-4.0",
               "Streamline Ultimate Color, Streamline", "line colour icon", emoji=False),
)

NAME_PACKAGES: dict[str, str] = {"emojibase-data": "17.0.0", "emojilib": "4.0.3"}  # both MIT; labels and tags follow Unicode's CLDR
RASTERISER = ("@resvg/resvg-js", "2.6.2")


def fetch(folder: Path) -> Path:
    """Install the packages with the npm client into `folder` and return its node_modules.

    Packages that are already there in the right version are kept, so a second call needs no network.

    Raises:
        TrainingError: npm is missing, or could not install.
    """
    folder.mkdir(parents=True, exist_ok=True)
    modules = folder / "node_modules"
    wanted = {s.package: s.version for s in PICTURE_SETS} | NAME_PACKAGES | dict([RASTERISER])
    if all(_installed(modules / name) == version for name, version in wanted.items()):
        return modules
    npm = shutil.which("npm")
    if npm is None:
        raise TrainingError("building the training set needs Node.js: `npm` was not found; install Node.js 18 or newer and run this again")
    (folder / "package.json").write_text('{"private": true}\n')
    every = [f"{name}@{version}" for name, version in wanted.items()]  # all of them: npm removes what it is not told about
    done = subprocess.run([npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", *every], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if line.strip()), f"exit status {done.returncode}")  # npm says what is wrong first
        raise TrainingError(f"npm could not install the picture sets ({said.strip()}): check the network and the disk, then run this again")
    return modules


def _installed(package: Path) -> str | None:
    try:
        return json.loads((package / "package.json").read_text("utf-8"))["version"]
    except (OSError, ValueError, KeyError):
        return None
