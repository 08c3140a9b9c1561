"""A checkpoint: what a name, folder or file turned out to be, before any weight is read. Knows cards, configs and headers; knows no request.

Sources it takes: a card's name, a diffusers folder, a single file in its makers' layout or a denoiser alone, a hub name, and single parts from
files of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentgen.conditioning.tokens import Tokens, read_tokens
from latentgen.errors import ModelError
from latentgen.models.card import Card, family_file, find_card
from latentgen.models.convert import find_prefix
from latentgen.models.family import Config, Family, FamilyFile, Model, Part
from latentgen.models.files import digest
from latentgen.models.found import Found, from_file, from_folder, locate, published_configs, stored
from latentgen.models.instead import stands_in, with_those
from latentgen.models.load import Source, check_fit

if TYPE_CHECKING:
    import torch

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
    own, place = locate(said.pop("denoiser") if alone else source, report)
    if own and as_card and own.family != as_card.family:
        raise ModelError(f"{place.name} is of the family {own.family} but the card {as_card.name!r} is of {as_card.family}: leave card= out")
    if place.is_file() or (alone and not (place / "model_index.json").is_file()):
        found = from_file(place, own or as_card, config, allow_pickle)
    elif config is not None:
        raise ModelError(f"config= is for a file, and {place.name} is a folder with configs of its own: leave config= out, or name a file")
    else:
        found = from_folder(place, own or as_card, allow_pickle)
    fetched = source is not None and not Path(source).exists()  # a hub name: its folder is called after a commit
    called = str(source) if fetched else place.stem if place.is_file() else place.name
    return _assembled(found, as_card or own or Card(name=called, family=found.family, folder=place), said, allow_pickle)


def _assembled(found: Found, card: Card, said: dict[str, str | Path], allow_pickle: bool) -> Checkpoint:
    """Parts and tokenizers that were named laid over what was found; the family built; what is missing named."""
    file = family_file(found.family)
    sources, places, configs = dict(found.sources), dict(found.tokenizers), dict(found.configs)
    if found.variant:
        configs = published_configs(found.variant) | configs
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
    index, published_index = configs.get("model_index", {}), published_configs(found.variant)["model_index"] if found.variant else {}
    # same tensors, but its own index says that it is run otherwise
    other = bool(index) and any(index.get(k) != v for k, v in published_index.items())
    said_defaults = {} if other else {k: v for k, v in configs.get("defaults", {}).items() if k not in decided}
    family, notes = with_those(card.laid_over(replace(built, defaults=replace(built.defaults, **said_defaults))), sources)
    missing = [p.name for p in family.parts if p.name not in sources]
    if missing:
        raise ModelError(f"{found.label} has no {' and no '.join(missing)}: name {'them' if missing[1:] else 'it'}, as in load(..., "
                         f"{missing[0]}=PATH)")
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
            raise ModelError(f"the {name} of {found.label} has {tokens.size:,} tokens but {encoder} knows {words:,}: "
                             "give the tokenizer that belongs to it")
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

    files, own = stored(place, allow_pickle)
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
        raise ModelError(f"{place.name} is {report.what} but is given as {part.name}: expected a {part.cls.rpartition('.')[2]}, "
                         "so name a file with that")
    return source


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `latentgen models NAME` shows: parts with their classes and bytes, beside the card's own data."""
    from dataclasses import asdict

    card, family = checkpoint.card, checkpoint.family
    parts = {p.name: {"class": p.cls, "bytes": checkpoint.sources[p.name].weight_bytes(p)} for p in family.parts}
    return {"name": card.name, "family": family.name, "variant": checkpoint.variant, "summary": card.summary, "licence": card.licence,
            "bytes": sum(part["bytes"] for part in parts.values()), "prediction": family.prediction, "guidance": family.guidance,
            "defaults": asdict(family.defaults), "parts": parts}
