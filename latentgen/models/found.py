"""What a folder or a file holds: family and variant, configs, where each part's tensors lie.

Knows cards, published configs and headers; builds no family. What a file is, its tensors' names and shapes tell; nothing is
guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latentgen.errors import ModelError
from latentgen.models.card import Card, families, family_file, find_card, published, read_card
from latentgen.models.convert import find_prefix
from latentgen.models.family import Config
from latentgen.models.files import check_config, part_config, weights_files
from latentgen.models.header import regular_file
from latentgen.models.load import Source
from latentgen.models.pickles import refuse_pickle

if TYPE_CHECKING:
    from latentgen.models.identify import Identified
    from latentgen.models.inspect import Report


@dataclass(frozen=True)
class Found:
    """What a folder or file gave: family and variant, configs of all parts that exist, sources of those that are here, tokenizers' places."""

    family: str
    variant: str
    configs: dict[str, Config]
    sources: dict[str, Source]
    tokenizers: dict[str, Path]
    label: str
    notes: tuple[str, ...] = ()
    scheduled: bool = True  # with a scheduler config of its own, which decides spacing, offset and shift


def locate(source: str | Path | None, report: Callable[[int, int, str], object] | None) -> tuple[Card | None, Path]:
    """The card, if the source has one, and the folder or file."""
    if not isinstance(source, (str, Path)) or not str(source).strip() or "\x00" in str(source) or len(Path(source).name) > 255:
        raise ModelError(f"the model is {source!r:.60}: expected a name that `latentgen models` lists, a folder, a file, a hub name, "
                         "or denoiser=PATH")
    path = Path(source)
    if path.is_file():
        return None, path
    if path.is_dir() and not (path / "card.toml").is_file():
        return None, path
    from latentgen.models import hub

    name = None if path.exists() else hub.parse(str(source))
    card = None if name is not None else find_card(source)
    if card is not None and not card.repo:
        return card, card.folder
    if card is not None and (name := hub.parse(card.repo)) is None:
        raise ModelError(f"the card {card.name!r} names the repo {card.repo!r}: expected org/name")
    assert name is not None
    snapshot = hub.resolve(name)
    if name.file is not None:
        return card, hub.fetch(snapshot, name.file, progress=report) / name.file
    return card, hub.fetch_pipeline(snapshot, progress=report)


def _root(folder: Path) -> Path:
    """What no file of a folder may lie outside of: itself, or the part of the hub's cache that it is in, whose snapshots link to files beside
    them."""
    return next((near.parent.parent for near in (folder, folder.parent) if near.parent.name == "snapshots"), folder)


def from_folder(folder: Path, card: Card | None, allow_pickle: bool) -> Found:
    """A diffusers layout: parts in folders of their own, each with a config.json."""
    index = part_config(folder, "model_index.json") if (folder / "model_index.json").is_file() else {}
    family, variant = (card.family, card.variant) if card else _family_of_folder(folder, index, allow_pickle)
    parts = family_file(family).PARTS
    root = _root(folder)
    absent = {name for name, said in index.items() if said is None or (isinstance(said, (list, tuple)) and said and said[0] is None)}
    here = [p for p in parts if (folder / p.name).is_dir() and p.name not in absent]
    configs: dict[str, Config] = {p.name: part_config(folder / p.name) for p in here}
    for name, config in configs.items():
        check_config(config, f"{folder.name}/{name}")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    configs |= {"model_index": index, "scheduler": part_config(scheduler.parent, scheduler.name) if scheduler.is_file() else {}}
    sources = {p.name: Source(f"{folder.name}/{p.name}", weights_files(folder / p.name, root=root, allow_pickle=allow_pickle), configs[p.name])
               for p in here}
    tokenizers = {p.name: p for p in sorted(folder.glob("*token*")) if p.is_dir()} | {p.name: p
                                                                                      for p in sorted(folder.glob("processor")) if p.is_dir()}
    return Found(family, variant, configs, sources, tokenizers, folder.name)


def _family_of_folder(folder: Path, index: Config, allow_pickle: bool) -> tuple[str, str]:
    """Family and variant of a folder without a card: by its denoiser's tensors, else by the pipeline class that its index names."""
    from latentgen.models.identify import identify
    from latentgen.models.inspect import folder_scheduler, folder_variant

    for name in ("unet", "transformer"):
        if (folder / name).is_dir():
            source = Source(f"{folder.name}/{name}", weights_files(folder / name, root=_root(folder), allow_pickle=allow_pickle), {})
            found = identify({k: t.shape for h in source.headers() for k, t in h.tensors.items()})
            if found is not None:
                return found.family, folder_variant("", found, index, folder_scheduler(folder))[0]
    said = index.get("_class_name")
    fitting = [name for name in families() if said in family_file(name).INDEX]
    if fitting:
        return fitting[0], ""
    what = f"its model_index.json names the pipeline {said!r:.60}" if said else "it has no model_index.json and no denoiser whose tensors are known"
    raise ModelError(f"the folder {folder.name!r} is of no family that this version knows ({what}): add a card.toml that names its family, "
                     f"one of {', '.join(families())}")


def from_file(path: Path, card: Card | None, config: str | Path | None, allow_pickle: bool) -> Found:
    """A single file: the denoiser, and whatever lies beside it. Or the folder of a denoiser alone."""
    from latentgen.models.identify import identify
    from latentgen.models.inspect import inspect, said_prediction, told_variant

    files, own = stored(path, allow_pickle)
    headers = Source(path.name, files, {}).headers()
    shapes = {name: t.shape for h in headers for name, t in h.tensors.items()}
    found = identify(shapes)
    given = None if config is None else _config_folder(config)
    if found is None and given is None:
        raise _not_a_denoiser(inspect(path), path)
    notes: tuple[str, ...] = ()
    if given is not None:
        whole = folder_configs(given)
        if found is not None and found.family != whole.family:
            raise ModelError(f"{path.name} is {found.variant} by its tensors but config= names {given.name}, which is of the family {whole.family}: "
                             "leave config= out")
        if card is not None and card.family != whole.family:
            raise ModelError(f"config= names {given.name}, which is of the family {whole.family}, but the card {card.name!r} is of {card.family}: "
                             "leave one of them out")
        family, variant, configs, tokenizers = whole.family, whole.variant, whole.configs, whole.tokenizers
    else:
        assert found is not None
        family, tokenizers = found.family, {}
        variant, notes = told_variant(found, said_prediction(shapes, headers[0].metadata))
        if card is not None and card.family != family:
            raise ModelError(f"{path.name} is of the family {family} but the card {card.name!r} is of {card.family}: leave card= out, "
                             "or give the file that it is for")
        if config is not None or (card and card.variant):
            variant, notes = str(config) if config is not None else card.variant if card else "", ()
        configs = published_configs(variant)
        _check_variant(path, found, variant, "config=" if config is not None else "card=")
    denoiser = next((p.name for p in family_file(family).PARTS if "denoiser" in p.stages and p.name in configs), "")
    if own is not None and denoiser:
        configs = {**configs, denoiser: own}
    sources = {}
    for part in family_file(family).PARTS:
        if part.name not in configs:
            continue
        if part.name == denoiser and (own is not None or (found is not None and found.layout == "diffusers")):
            sources[part.name] = Source(path.name, files, configs[part.name])
        elif part.original is not None and find_prefix(shapes, part.original) is not None:
            sources[part.name] = Source(f"{path.name} ({part.name})", files, configs[part.name], original=True)
    if not sources and denoiser:  # only where a folder says what it is: a denoiser of an unusual size, in the names of its own module
        if (report := inspect(path)).kind != "unknown":
            raise _not_a_denoiser(report, path)
        sources[denoiser] = Source(path.name, files, configs[denoiser])
    return Found(family, variant, configs, sources, tokenizers, path.name, notes, scheduled=given is not None)


def stored(place: Path, allow_pickle: bool) -> tuple[tuple[Path, ...], Config | None]:
    """The files of a part from elsewhere, and its config where it has one beside it: from its folder, or a file of its own."""
    if place.is_dir():
        return weights_files(place, root=_root(place), allow_pickle=allow_pickle), part_config(place)
    if not allow_pickle:
        refuse_pickle(place)
    return (regular_file(place),), None


def _not_a_denoiser(report: Report, path: Path) -> ModelError:
    """What to do with a file that is something else."""
    from latentgen.models.inspect import ADAPTERS

    expected = f"expected a checkpoint or a denoiser of one of {', '.join(families())}"
    if report.kind in ADAPTERS:
        return ModelError(f"{path.name} is {report.what}: {expected}, so load the checkpoint that it was made for")
    if report.kind in ("VAE", "text encoder"):
        keyword = "vae=" if report.kind == "VAE" else "text_encoder="
        return ModelError(f"{path.name} is {report.what}: {expected}, so load one of these and name the file beside it, as {keyword}")
    why = f" ({report.notes[-1]})" if report.kind == "unknown" and report.notes else ""
    return ModelError(f"{path.name} is {report.what}{why}: {expected}; `latentgen inspect` tells more, "
                      "config= names a folder with configs for one of "
                      "an unusual size")


def _check_variant(path: Path, found: Identified, variant: str, said: str) -> None:
    """
    Raises:
        ModelError: the tensors are those of another published variant than the one that was said.
    """
    from latentgen.models.identify import family_files, twins

    signed = {signature.variant for _, file in family_files() for signature in file.SIGNATURES}
    if variant in signed and variant not in twins(found):
        raise ModelError(f"{path.name} is {found.variant} by its tensors but {said} says {variant}: leave {said} out, "
                         "or give the file that it is for")


def _config_folder(config: str | Path) -> Path | None:
    """The folder that `config` names, None where it is a variant's name."""
    if not isinstance(config, (str, Path)) or "\x00" in str(config):
        raise ModelError(f"config is {config!r:.60}: expected a published variant's name or a folder in diffusers layout")
    if Path(config).is_dir():
        return Path(config)
    if isinstance(config, Path) or Path(config).name != config:
        raise ModelError(f"config is {Path(config).name!r}, which is no folder: expected a published variant's name or a folder in diffusers layout")
    return None


def folder_configs(folder: Path) -> Found:
    """Configs and tokenizers of a folder in diffusers layout whose weights, if any, are left alone."""
    card = read_card(folder / "card.toml") if (folder / "card.toml").is_file() else None
    index = part_config(folder, "model_index.json") if (folder / "model_index.json").is_file() else {}
    fitting = [card.family] if card else [name for name in families() if index.get("_class_name") in family_file(name).INDEX]
    if not fitting:
        raise ModelError(f"config is {folder.name!r}, which has no card.toml and no model_index.json of a known pipeline: "
                         "expected a folder in diffusers layout")
    configs: dict[str, Config] = {p.name: part_config(folder / p.name)
                                  for p in family_file(fitting[0]).PARTS if (folder / p.name / "config.json").is_file()}
    scheduler = folder / "scheduler"
    configs |= {"model_index": index, "scheduler": part_config(scheduler, "scheduler_config.json") if scheduler.is_dir() else {}}
    tokenizers = {p.name: p for p in sorted(folder.glob("*token*")) if p.is_dir()}
    return Found(fitting[0], card.variant if card else "", configs, {}, tokenizers, folder.name)


def published_configs(variant: str) -> dict[str, Config]:
    known = published(variant)
    return {**known["parts"], "scheduler": known.get("scheduler", {}), "model_index": known.get("index", {}),
            "tokenizers": known.get("tokenizers", {}),
            "defaults": known.get("defaults", {})}
