"""A checkpoint: what a name, folder or file turned out to be, before any weight is read. Knows cards, configs and headers; knows no request.

Sources it takes: a card's name, a diffusers folder, a single file in its makers' layout or a denoiser alone, a hub name, and single parts from
files of their own. What a file is, its tensors' names and shapes tell; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentgen.conditioning.tokens import Tokens, read_tokens
from latentgen.errors import ModelError
from latentgen.models.card import Card, families, family_file, find_card, published, read_card
from latentgen.models.convert import find_prefix
from latentgen.models.family import Config, Family, FamilyFile, Model, Part
from latentgen.models.files import check_config, digest, part_config, weights_files
from latentgen.models.header import regular_file
from latentgen.models.instead import stands_in, with_those
from latentgen.models.load import Source, check_fit
from latentgen.models.pickles import refuse_pickle

if TYPE_CHECKING:
    import torch

    from latentgen.models.identify import Identified
    from latentgen.models.inspect import Report

KINDS = {"text": ("text encoder", "image encoder"), "denoiser": ("denoiser", "checkpoint"), "encoder": ("VAE",), "decoder": ("VAE",)}


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights, ready to be loaded part by part.

    Attributes:
        card: its name, licence and defaults (of a file or folder without one, made of its name).
        family: the family as this checkpoint's configs shape it.
        variant: the published variant that it is, "" where it fits none.
        sources: part name -> where it comes from.
        tokenizers: tokenizer name -> tokenizer.
        notes: what the files did not tell, and what was taken for it.
    """

    card: Card
    family: Family
    variant: str
    sources: Mapping[str, Source]
    tokenizers: Mapping[str, Tokens] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What plans and recipes call it."""
        return self.card.name

    def check(self) -> None:
        """Compare every part's tensors with its config, from headers alone.

        Raises:
            ModelError: a part does not fit.
        """
        for part in self.family.parts:
            check_fit(self.sources[part.name], part)

    def weight_bytes(self, stage: str | None = None, *, dtype: torch.dtype | None = None) -> int:
        """Bytes of weights, of one stage or of all: as stored, or as they are held in a dtype."""
        return sum(self.sources[p.name].weight_bytes(p, dtype=dtype) for p in self.family.parts if stage is None or stage in p.stages)

    @cached_property
    def digest(self) -> str:
        """A short hash over all weights, 16 hex digits."""
        files = [f for part in self.family.parts for f in self.sources[part.name].files]
        return digest(tuple(dict.fromkeys(files)))


def open_checkpoint(source: str | Path | None = None, *, card: str | None = None, config: str | Path | None = None,
                    parts: Mapping[str, str | Path] | None = None, allow_pickle: bool = False,
                    report: Callable[[int, int, str], object] | None = None) -> Checkpoint:
    """Find out what a checkpoint is and where its parts lie; reads configs and headers.

    Args:
        source: a card's name, a folder, a file, or "org/name" on the hub; None where `parts` name the denoiser.
        card: a card whose family, configs and defaults hold where the files do not tell ("sdxl-turbo" for a file that looks like any SDXL).
        config: configs for a single file: a published variant, or a folder in diffusers layout (its weights are not read).
        parts: part or tokenizer name -> file or folder; "denoiser" stands for the part of that stage.
        allow_pickle: read .ckpt, .bin and .pt files, too: their tensors alone, by torch's restricted unpickler.
        report: told (bytes done, bytes in all, file) of a download; what it raises stops it.

    Raises:
        ModelError: nothing there, damaged, unknown, of another kind, or parts are missing.
    """
    said = dict(parts or {})
    alone = source is None and "denoiser" in said
    as_card = None if card is None else find_card(card)
    own, place = _locate(said.pop("denoiser") if alone else source, report)
    if own and as_card and own.family != as_card.family:
        raise ModelError(f"{place.name} is of the family {own.family} but the card {as_card.name!r} is of {as_card.family}: leave card= out")
    if place.is_file() or (alone and not (place / "model_index.json").is_file()):
        found = _from_file(place, own or as_card, config, allow_pickle)
    elif config is not None:
        raise ModelError(f"config= is for a file, and {place.name} is a folder with configs of its own: leave config= out, or name a file")
    else:
        found = _from_folder(place, own or as_card, allow_pickle)
    fetched = source is not None and not Path(source).exists()  # a hub name: its folder is called after a commit
    called = str(source) if fetched else place.stem if place.is_file() else place.name
    return _assembled(found, as_card or own or Card(name=called, family=found.family, folder=place), said, allow_pickle)


@dataclass(frozen=True)
class _Found:
    """What a folder or file gave: family and variant, configs of all parts that exist, sources of those that are here, tokenizers' places."""

    family: str
    variant: str
    configs: dict[str, Config]
    sources: dict[str, Source]
    tokenizers: dict[str, Path]
    label: str
    notes: tuple[str, ...] = ()
    scheduled: bool = True  # with a scheduler config of its own, which decides spacing, offset and shift


def _locate(source: str | Path | None, report: Callable[[int, int, str], object] | None) -> tuple[Card | None, Path]:
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
    """What no file of a folder may lie outside of: itself, or the part of the hub's cache that it is in, whose snapshots link to files beside them."""
    return next((near.parent.parent for near in (folder, folder.parent) if near.parent.name == "snapshots"), folder)


def _from_folder(folder: Path, card: Card | None, allow_pickle: bool) -> _Found:
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
    sources = {p.name: Source(f"{folder.name}/{p.name}", weights_files(folder / p.name, root=root, allow_pickle=allow_pickle), configs[p.name]) for p in here}
    tokenizers = {p.name: p for p in sorted(folder.glob("*token*")) if p.is_dir()} | {p.name: p for p in sorted(folder.glob("processor")) if p.is_dir()}
    return _Found(family, variant, configs, sources, tokenizers, folder.name)


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
    raise ModelError(f"the folder {folder.name!r} is of no family that this version knows ({what}): add a card.toml that names its family, one of {', '.join(families())}")


def _from_file(path: Path, card: Card | None, config: str | Path | None, allow_pickle: bool) -> _Found:
    """A single file: the denoiser, and whatever lies beside it. Or the folder of a denoiser alone."""
    from latentgen.models.identify import identify
    from latentgen.models.inspect import inspect, said_prediction, told_variant

    files, own = _stored(path, allow_pickle)
    headers = Source(path.name, files, {}).headers()
    shapes = {name: t.shape for h in headers for name, t in h.tensors.items()}
    found = identify(shapes)
    given = None if config is None else _config_folder(config)
    if found is None and given is None:
        raise _not_a_denoiser(inspect(path), path)
    notes: tuple[str, ...] = ()
    if given is not None:
        whole = _from_folder_configs(given)
        if found is not None and found.family != whole.family:
            raise ModelError(f"{path.name} is {found.variant} by its tensors but config= names {given.name}, which is of the family {whole.family}: "
                             "leave config= out")
        if card is not None and card.family != whole.family:
            raise ModelError(f"config= names {given.name}, which is of the family {whole.family}, but the card {card.name!r} is of {card.family}: leave one of them out")
        family, variant, configs, tokenizers = whole.family, whole.variant, whole.configs, whole.tokenizers
    else:
        assert found is not None
        family, tokenizers = found.family, {}
        variant, notes = told_variant(found, said_prediction(shapes, headers[0].metadata))
        if card is not None and card.family != family:
            raise ModelError(f"{path.name} is of the family {family} but the card {card.name!r} is of {card.family}: leave card= out, or give the file that it is for")
        if config is not None or (card and card.variant):
            variant, notes = str(config) if config is not None else card.variant if card else "", ()
        configs = _published_configs(variant)
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
    return _Found(family, variant, configs, sources, tokenizers, path.name, notes, scheduled=given is not None)


def _stored(place: Path, allow_pickle: bool) -> tuple[tuple[Path, ...], Config | None]:
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
    return ModelError(f"{path.name} is {report.what}{why}: {expected}; `latentgen inspect` tells more, config= names a folder with configs for one of "
                      "an unusual size")


def _check_variant(path: Path, found: Identified, variant: str, said: str) -> None:
    """
    Raises:
        ModelError: the tensors are those of another published variant than the one that was said.
    """
    from latentgen.models.identify import family_files, twins

    signed = {signature.variant for _, file in family_files() for signature in file.SIGNATURES}
    if variant in signed and variant not in twins(found):
        raise ModelError(f"{path.name} is {found.variant} by its tensors but {said} says {variant}: leave {said} out, or give the file that it is for")


def _config_folder(config: str | Path) -> Path | None:
    """The folder that `config` names, None where it is a variant's name."""
    if not isinstance(config, (str, Path)) or "\x00" in str(config):
        raise ModelError(f"config is {config!r:.60}: expected a published variant's name or a folder in diffusers layout")
    if Path(config).is_dir():
        return Path(config)
    if isinstance(config, Path) or Path(config).name != config:
        raise ModelError(f"config is {Path(config).name!r}, which is no folder: expected a published variant's name or a folder in diffusers layout")
    return None


def _from_folder_configs(folder: Path) -> _Found:
    """Configs and tokenizers of a folder in diffusers layout whose weights, if any, are left alone."""
    card = read_card(folder / "card.toml") if (folder / "card.toml").is_file() else None
    index = part_config(folder, "model_index.json") if (folder / "model_index.json").is_file() else {}
    fitting = [card.family] if card else [name for name in families() if index.get("_class_name") in family_file(name).INDEX]
    if not fitting:
        raise ModelError(f"config is {folder.name!r}, which has no card.toml and no model_index.json of a known pipeline: expected a folder in diffusers layout")
    configs: dict[str, Config] = {p.name: part_config(folder / p.name) for p in family_file(fitting[0]).PARTS if (folder / p.name / "config.json").is_file()}
    scheduler = folder / "scheduler"
    configs |= {"model_index": index, "scheduler": part_config(scheduler, "scheduler_config.json") if scheduler.is_dir() else {}}
    tokenizers = {p.name: p for p in sorted(folder.glob("*token*")) if p.is_dir()}
    return _Found(fitting[0], card.variant if card else "", configs, {}, tokenizers, folder.name)


def _published_configs(variant: str) -> dict[str, Config]:
    known = published(variant)
    return {**known["parts"], "scheduler": known.get("scheduler", {}), "model_index": known.get("index", {}), "tokenizers": known.get("tokenizers", {}),
            "defaults": known.get("defaults", {})}


def _assembled(found: _Found, card: Card, said: dict[str, str | Path], allow_pickle: bool) -> Checkpoint:
    """Parts and tokenizers that were named laid over what was found; the family built; what is missing named."""
    file = family_file(found.family)
    sources, places, configs = dict(found.sources), dict(found.tokenizers), dict(found.configs)
    if found.variant:
        configs = _published_configs(found.variant) | configs
    for name, path in said.items():
        part = _named_part(file, name, found.family)
        if part is None:
            places[name] = _there(path, name)
        else:
            sources[part.name] = _part_source(_there(path, name), part, configs.get(part.name), allow_pickle)
            configs |= {} if stands_in(part, sources[part.name].config) else {part.name: sources[part.name].config}
    for part in file.PARTS:
        if part.name not in sources:
            configs.pop(part.name, None)
    built = file.build(Model(found.variant, configs))
    decided = ("width", "height", "spacing", "offset", "shift", "sampler") if found.scheduled else ()
    index, published_index = configs.get("model_index", {}), _published_configs(found.variant)["model_index"] if found.variant else {}
    other = bool(index) and any(index.get(k) != v for k, v in published_index.items())  # same tensors, but its own index says that it is run otherwise
    said_defaults = {} if other else {k: v for k, v in configs.get("defaults", {}).items() if k not in decided}
    family, notes = with_those(card.laid_over(replace(built, defaults=replace(built.defaults, **said_defaults))), sources)
    missing = [p.name for p in family.parts if p.name not in sources]
    if missing:
        raise ModelError(f"{found.label} has no {' and no '.join(missing)}: name {'them' if missing[1:] else 'it'}, as in load(..., {missing[0]}=PATH)")
    if odd := [name for name in said if name.startswith("tokenizer") and name not in family.tokenizers]:
        raise ModelError(f"{found.label} reads no {odd[0]}: expected {' or '.join(family.tokenizers)}, so leave it out")
    tokenizers = {name: read_tokens(spec if spec.pad else replace(spec, pad=_pad(configs, name)), places.get(name), name=name)
                  for name, spec in family.tokenizers.items()}
    for name, tokens in tokenizers.items():
        encoder = name.replace("tokenizer", "text_encoder")
        config = configs.get(encoder, {})
        nested = config.get("text_config")
        words = config.get("vocab_size") or (nested.get("vocab_size") if isinstance(nested, Mapping) else None)
        if isinstance(words, int) and tokens.size > words:
            raise ModelError(f"the {name} of {found.label} has {tokens.size:,} tokens but {encoder} knows {words:,}: give the tokenizer that belongs to it")
    return Checkpoint(card, family, found.variant, sources, tokenizers, found.notes + notes)


def _pad(configs: Mapping[str, Config], tokenizer: str) -> str | None:
    """The padding token of the packaged tokenizer, as the published variant has it (used where no tokenizer files are given)."""
    return configs.get("tokenizers", {}).get(tokenizer, {}).get("pad")


def _named_part(file: FamilyFile, name: str, family: str) -> Part | None:
    """The part that a keyword of `load` means, None for a tokenizer."""
    for part in file.PARTS:
        if part.name == name or (name == "denoiser" and "denoiser" in part.stages):
            return part
    if name.startswith("tokenizer"):
        return None
    raise ModelError(f"{family} has no part {name!r}: expected one of {', '.join(p.name for p in file.PARTS)}, denoiser, or a tokenizer")


def _there(path: str | Path, name: str) -> Path:
    if not isinstance(path, (str, Path)) or not str(path) or "\x00" in str(path):
        raise ModelError(f"{name} is {path!r:.60}: expected a file or a folder")
    place = Path(path)
    if not place.exists():
        raise ModelError(f"{name} is {place.name!r}, which is not there: expected a file or a folder")
    return place


def _part_source(place: Path, part: Part, config: Config | None, allow_pickle: bool) -> Source:
    """A part from a file or folder of its own; its config from that folder, else the published one."""
    from latentgen.models.inspect import inspect

    files, own = _stored(place, allow_pickle)
    if own is not None:
        return Source(f"{place.parent.name}/{place.name}", files, own)
    if config is None:
        raise ModelError(f"{place.name} is given as {part.name}, whose config is not known: put it into a folder with its config.json and name that")
    source = Source(place.name, files, config)
    names = {name for h in source.headers() for name in h.tensors}
    if part.original is not None and find_prefix(names, part.original) is not None:
        return replace(source, original=True)
    report = inspect(place)
    if report.kind != "unknown" and report.kind not in {kind for stage in part.stages for kind in KINDS[stage]}:
        raise ModelError(f"{place.name} is {report.what} but is given as {part.name}: expected a {part.cls.rpartition('.')[2]}, so name a file with that")
    return source


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `latentgen models NAME` shows: parts with their classes and bytes, beside the card's own data."""
    from dataclasses import asdict

    card, family = checkpoint.card, checkpoint.family
    parts = {p.name: {"class": p.cls, "bytes": checkpoint.sources[p.name].weight_bytes(p)} for p in family.parts}
    return {"name": card.name, "family": family.name, "variant": checkpoint.variant, "summary": card.summary, "licence": card.licence,
            "bytes": sum(part["bytes"] for part in parts.values()), "prediction": family.prediction, "guidance": family.guidance,
            "defaults": asdict(family.defaults), "parts": parts}
