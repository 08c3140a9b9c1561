"""Cards: the TOML that describes a checkpoint, and where its files are. Knows files and names; loads no tensor and asks no network."""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import dataclass, field, fields, replace
from importlib import import_module, resources
from pathlib import Path
from typing import Any, cast

from latentgen.errors import ModelError
from latentgen.models.family import Defaults, Family, FamilyFile

_TYPES = {"name": str, "family": str, "variant": str, "repo": str, "folder": str, "summary": str, "licence": str, "defaults": dict, "preview": list}


@dataclass(frozen=True)
class Card:
    """One checkpoint.

    Attributes:
        name: what `load` takes.
        family: the file in `pipelines/` that runs it.
        folder: where its parts lie (a diffusers layout), unless `repo` says that they lie on the hub.
        variant: which published configs it has, where its files do not tell.
        repo: "org/name" on the hub; fetched when the card is loaded by its name.
        summary, licence: for `latentgen models`.
        defaults: overrides of the family's defaults.
        preview: rows of RGB per latent channel and a constant, for live previews; empty means none.
    """

    name: str
    family: str
    folder: Path
    variant: str = ""
    repo: str = ""
    summary: str = ""
    licence: str = ""
    defaults: dict[str, Any] = field(default_factory=dict)
    preview: tuple[tuple[float, ...], ...] = ()

    def laid_over(self, family: Family) -> Family:
        """The family with this checkpoint's defaults and preview laid over it.

        Raises:
            ModelError: a default that the family does not have.
        """
        known = {f.name: type(f.default) for f in fields(Defaults)}
        for name, value in self.defaults.items():
            if name not in known:
                raise ModelError(f"the card {self.name!r} sets the unknown default {name!r}: the known ones are {', '.join(sorted(known))}")
            if type(value) is not known[name] and not (known[name] is float and type(value) is int):
                raise ModelError(f"the card {self.name!r} sets the default {name} to {value!r:.60}: expected {known[name].__name__}")
        latent = family.latent
        if self.preview:
            latent = replace(latent, rgb=self.preview[:-1], rgb_bias=self.preview[-1])
        return replace(family, defaults=replace(family.defaults, **self.defaults), latent=latent)


def cards() -> dict[str, Card]:
    """Every packaged card, by name."""
    found: dict[str, Card] = {}
    root = Path(str(resources.files("latentgen.weights")))
    for path in sorted([*root.glob("*.toml"), *root.glob("*/card.toml")]):
        card = read_card(path)
        found[card.name] = card
    return found


def find_card(source: str | Path) -> Card:
    """The card of a name or of a folder that holds a `card.toml`.

    Raises:
        ModelError: neither; the message lists the names that exist.
    """
    if not isinstance(source, (str, Path)):
        raise ModelError(f"the model is a {type(source).__name__}: expected a name that `latentgen models` lists, a folder, a file or a hub name")
    path = Path(source)
    if (path / "card.toml").is_file():
        return read_card(path / "card.toml")
    known = cards()
    if str(source) in known:
        return known[str(source)]
    if path.suffix.lower() in (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".bin"):
        raise ModelError(f"there is no file {path.name!r} there: check its folder and its name")
    near = difflib.get_close_matches(str(source), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ModelError(f"there is no model {str(source)!r}: {hint}expected a folder, a .safetensors file, "
                     f"a hub name (org/name) or one of {', '.join(sorted(known))}")


def read_card(path: Path) -> Card:
    """Read one TOML card.

    Raises:
        ModelError: not TOML, a key missing or unknown, or a folder outside the card's own.
    """
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ModelError(f"the card {path.name!r} in {path.parent.name!r} cannot be read: {error}") from error
    allowed = {f.name for f in fields(Card)}
    if unknown := set(raw) - allowed:
        raise ModelError(f"the card {path.parent.name}/{path.name} has the unknown key {sorted(unknown)[0]!r}: expected {', '.join(sorted(allowed))}")
    if missing := {"name", "family"} - set(raw):
        raise ModelError(f"the card {path.parent.name}/{path.name} lacks {sorted(missing)[0]!r}: add it")
    for key, kind in _TYPES.items():
        if not isinstance(raw.get(key, kind()), kind):
            raise ModelError(f"the card {path.parent.name}/{path.name} sets {key} to {raw[key]!r:.60}: expected {kind.__name__}")
    if not all(isinstance(row, list) and len(row) == 3 and all(isinstance(v, (int, float)) for v in row) for row in raw.get("preview", ())):
        raise ModelError(f"the card {path.parent.name}/{path.name} has a preview that is not rows of 3 numbers: "
                         "one per latent channel and a constant")
    if "\x00" in raw.get("folder", ""):
        raise ModelError(f"the card {path.parent.name}/{path.name} names a folder with a NUL character: correct it")
    folder = (path.parent / raw.pop("folder", ".")).resolve()
    if not folder.is_relative_to(path.parent.resolve()):
        raise ModelError(f"the card {path.parent.name}/{path.name} points outside its own folder: move the parts under it")
    return Card(folder=folder, preview=tuple(tuple(row) for row in raw.pop("preview", ())), **raw)


def family_file(name: str) -> FamilyFile:
    """The file in `pipelines/` of this name.

    Raises:
        ModelError: no such family.
    """
    if name not in families():
        raise ModelError(f"there is no model family {name!r}: this version knows {', '.join(families())}")
    return cast(FamilyFile, import_module(f"latentgen.pipelines.{name}"))


def published(variant: str) -> dict[str, Any]:
    """The packaged configs of a published variant: summary, defaults, index, scheduler, parts, tokenizers.

    Raises:
        ModelError: no such variant.
    """
    path = Path(str(resources.files("latentgen.pipelines"))) / "configs" / f"{variant}.json"
    if variant not in variants():
        near = difflib.get_close_matches(variant, variants(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ModelError(f"there is no variant {variant!r}: {hint}expected one of {', '.join(variants())}")
    return json.loads(path.read_text("utf-8"))


def variants() -> list[str]:
    """Names of all published variants whose configs are packaged."""
    return sorted(p.stem for p in (Path(str(resources.files("latentgen.pipelines"))) / "configs").glob("*.json"))


def families() -> list[str]:
    """Names of all families, from the files in `pipelines/`."""
    root = Path(str(resources.files("latentgen.pipelines")))
    return sorted(p.stem for p in root.glob("*.py") if not p.stem.startswith("_"))
