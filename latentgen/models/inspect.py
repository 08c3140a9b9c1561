"""What a file or folder is, told from headers alone. Knows headers, kinds and signatures; reads no tensor and names no family.

    print(latentgen.inspect("model.safetensors"))

An unknown file is said to be unknown, and a damaged one is reported with the damage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from latentgen.errors import ModelError
from latentgen.models.card import read_card
from latentgen.models.convert import find_prefix
from latentgen.models.family import Part
from latentgen.models.gguf_header import LOADABLE
from latentgen.models.header import Header, read_header, regular_file
from latentgen.models.identify import Identified as Identified
from latentgen.models.identify import bases, built, configs, family_of_index, fitting, parts_of, twins
from latentgen.models.identify import identify as identify
from latentgen.models.kinds import DENOISERS, Kind, adapter, component
from latentgen.models.files import part_config, weights_files

PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v_prediction": "v", "v-prediction": "v", "v": "v", "sample": "x0", "flow": "flow"}
ADAPTERS = ("LoRA", "ControlNet", "T2I-Adapter", "IP-Adapter", "motion module", "textual-inversion embedding")
METADATA = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")  # where files' makers write it
ABOUT = ("modelspec.title", "modelspec.architecture", "ss_base_model_version", "general.architecture", "general.name")


@dataclass(frozen=True)
class Report:
    """What `inspect` found.

    Attributes:
        path: name of the file or folder, without the folders above it.
        kind: "checkpoint", "denoiser", "LoRA", "VAE", "ControlNet", "T2I-Adapter", "IP-Adapter", "textual-inversion embedding", "text encoder",
            "image encoder", "motion module", "upscaler" or "unknown".
        family: the file in `pipelines/` that runs it or that it is for, "" where that is not certain.
        variant: which published variant it is.
        layout: whose tensor names it has: "original", "diffusers", "kohya" ...
        prediction: "epsilon", "v", "flow" ...; `prediction_from` is "file" where it says so, "variant" where that is how the variant was published.
        dtypes: name -> number of tensors.
        parts, missing: of the family's parts, which are here and which are not.
        needs: what must be given beside it before it can run.
        fits: families that it could be for, where there are several.
        size: bytes of all files; tensors: their number.
        details: further facts by name (rank, latent channels ...).
        notes: sentences for people.
        damage: what is wrong and at which byte, "" where it is sound.
    """

    path: str
    kind: str = "unknown"
    family: str = ""
    variant: str = ""
    layout: str = ""
    prediction: str = ""
    prediction_from: str = ""
    dtypes: Mapping[str, int] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    fits: tuple[str, ...] = ()
    size: int = 0
    tensors: int = 0
    details: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    damage: str = ""

    @property
    def sound(self) -> bool:
        """Known and undamaged."""
        return self.kind != "unknown" and not self.damage

    @property
    def what(self) -> str:
        """The kind in a few words, with its article: "a LoRA for ..."."""
        if self.kind == "unknown":
            return "damaged" if self.damage else "of an unknown kind"
        whose = f" of {self.variant or self.family}" if self.kind in ("checkpoint", "denoiser") and self.family else ""
        target = " or ".join(self.fits or ([self.family] if self.family else []))
        named = self.details.get("encoder", "")
        return f"{'an' if self.kind[0] in 'IUiu' else 'a'} {self.kind}{f' ({named})' if named else ''}{whose or (f' for {target}' if target else '')}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        by = "the file says so" if self.prediction_from == "file" else "as the variant was published"
        size = f"{self.size / 1e9:.2f} GB" if self.size >= 1e9 else f"{self.size / 1e6:.1f} MB" if self.size >= 1e6 else f"{self.size:,} bytes"
        rows = [("file", self.path), ("kind", self.kind), ("family", self.family), ("fits", ", ".join(self.fits)), ("variant", self.variant),
                ("layout", self.layout), ("prediction", self.prediction and f"{self.prediction} ({by})"),
                ("dtype", ", ".join(f"{name} ({count:,})" for name, count in self.dtypes.items())), *self.details.items(),
                ("parts", ", ".join(self.parts)), ("missing", ", ".join(self.missing)), ("needs", "; ".join(self.needs)), ("size", size),
                ("tensors", f"{self.tensors:,}"), *(("note", note) for note in self.notes), ("damage", self.damage)]
        shown = [(name, value) for name, value in rows if value]
        width = max(len(name) for name, _ in shown) + 2
        return "\n".join(f"{name:<{width}}{value}" for name, value in shown)


def inspect(path: str | Path) -> Report:
    """Tell what a .safetensors or .gguf file, a shard index, or a model folder is; reads headers and configs only.

    Raises:
        ModelError: nothing is there, or it is a device. (Damage is in the report.)
    """
    place = Path(path) if isinstance(path, (str, Path)) else path
    try:
        if place.is_dir():
            return _folder(place)
    except (AttributeError, OSError, ValueError):  # not a path, or one that no file can have: regular_file tells
        pass
    place = regular_file(place)
    try:
        if place.name.endswith(".index.json"):
            return _files(place.name, tuple(read_header(f) for f in weights_files(place.parent, root=_root(place.parent))))
        return _files(place.name, (read_header(place, any_type=True),))
    except ModelError as error:
        return Report(place.name, size=place.stat().st_size, damage=str(error))


def said_prediction(names: Collection[str], metadata: Mapping[str, str]) -> str | None:
    """What a file itself says of what its denoiser predicts: by the marker tensors that trainers add, else in its metadata; None if nothing."""
    if "v_pred" in names or "ztsnr" in names:
        return "v"
    if metadata.get("ss_v_parameterization", metadata.get("ss_v_parametrization")) == "True":
        return "v"
    return next((PREDICTIONS[said] for key in METADATA if (said := metadata.get(key, "").lower()) in PREDICTIONS), None)


def _files(name: str, headers: tuple[Header, ...]) -> Report:
    """One file, or the shards of one."""
    shapes = {key: info.shape for h in headers for key, info in h.tensors.items()}
    metadata = {key: value for h in headers for key, value in h.metadata.items()}
    dtypes = Counter(info.dtype for h in headers for info in h.tensors.values())
    report = Report(name, dtypes=dict(dtypes.most_common()), size=sum(h.size for h in headers), tensors=len(shapes),
                    notes=_notes(shapes, metadata, headers))
    if kind := adapter(shapes):
        return _of_kind(report, kind, said_prediction((), metadata))
    if found := identify(shapes):
        return _denoiser(report, found, shapes, said_prediction(shapes.keys(), metadata))
    if kind := component(shapes):
        return _of_kind(report, kind, None)
    if not shapes:
        return replace(report, notes=(*report.notes, "it holds no tensor"))
    denoiser = any(name.startswith(DENOISERS) for name in shapes)
    also = "it has a denoiser that fits no family of this version" if denoiser else "its tensors fit nothing that this version knows"
    return replace(report, notes=(*report.notes, f"{also} (the first is {next(iter(shapes))!r:.80})"))


def _notes(shapes: Collection[str], metadata: Mapping[str, str], headers: tuple[Header, ...]) -> tuple[str, ...]:
    notes = []
    if said := [f"{key.rpartition('.')[2]} {metadata[key]!r:.60}" for key in ABOUT if metadata.get(key)]:
        notes.append(f"its metadata says {', '.join(said)}")
    if any(name.endswith(("scaled_fp8", ".scale_weight", ".weight_scale")) for name in shapes):
        notes.append("fp8 weights with a scale beside each")
    if any("bitsandbytes" in name or name.endswith(".quant_map") for name in shapes):
        notes.append("quantised by bitsandbytes, which cannot be loaded: get a file that is not")
    odd = Counter(t.dtype for h in headers if h.format == "gguf" for t in h.tensors.values() if t.dtype not in LOADABLE)
    if odd:
        said_odd = ", ".join(f"{count} tensors of the type {name}" for name, count in odd.items())
        notes.append(f"cannot be loaded, as it has {said_odd}: get one with {', '.join(LOADABLE)} only")
    return tuple(notes)


def _of_kind(report: Report, kind: Kind, predicted: str | None) -> Report:
    """An adapter or a part: which families it is for."""
    fits = bases(kind.modules, kind.width) if kind.modules or kind.width else fitting(*kind.fits) if kind.fits else ()
    alone = fits[0] if len(fits) == 1 and not kind.fits else ""  # a part does not belong to the one family that has such a part
    needs = ("a checkpoint that it fits",) if kind.kind in ADAPTERS else ()
    return replace(report, kind=kind.kind, family=alone, fits=() if alone else fits, layout=kind.layout, details=kind.details, needs=needs,
                   prediction=predicted or "", prediction_from="file" if predicted else "")


def _denoiser(report: Report, found: Identified, shapes: Mapping[str, tuple[int, ...]], said: str | None) -> Report:
    """A single file with a denoiser, alone or with other parts beside it."""
    variant, notes = told_variant(found, said)
    family = built(found.family, variant)
    parts = family.parts if family else parts_of(found.family, variant)
    present = tuple(p for p in parts if "denoiser" in p.stages or (found.layout == "original" and _lies_in(shapes, p)))
    predicted = said or (family.prediction if family else "")
    return replace(report, kind="checkpoint" if len(present) > 1 else "denoiser", family=found.family, variant=variant, layout=found.layout,
                   prediction=predicted, prediction_from="file" if said else "variant" if predicted else "",
                   details={"noise": "zero terminal SNR"} if "ztsnr" in shapes else {}, notes=(*report.notes, *notes),
                   **_absent(found.family, variant, parts, present, ()))


def _lies_in(names: Collection[str], part: Part) -> bool:
    """Whether a file in the original layout holds the part beside its denoiser."""
    found = find_prefix(names, part.original) if part.original else None
    return bool(found) or (found == "" and bool(part.original and part.original.unique))  # "" and no name of its own would be any file


def told_variant(found: Identified, said: str | None) -> tuple[str, tuple[str, ...]]:
    """The variant, by what the file says where tensors do not tell; a note where nothing tells."""
    same = twins(found)
    if len(same) == 1:
        return found.variant, ()
    if said is not None:
        return next((v for v in same if (family := built(found.family, v)) and family.prediction == said), found.variant), ()
    return found.variant, (f"its tensors do not tell {' from '.join(same)}: taken as {same[0]}, unless config= names another when it is loaded",)


def _absent(family: str, variant: str, parts: tuple[Part, ...], present: tuple[Part, ...],
            tokenizers: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Which parts are here and missing, and what that means for whoever wants to run it. The package has CLIP's tokenizer, no other."""
    lacking = [p for p in parts if p not in present]
    needs = [f"{p.name} ({p.cls.rpartition('.')[2]}){', optional' if p.optional else ''}" for p in lacking]
    unused = {p.name for p in lacking if p.optional}
    whole = built(family, variant)
    for name, spec in (whole.tokenizers if whole else {}).items():
        if spec.kind != "clip" and name not in tokenizers and name.replace("tokenizer", "text_encoder") not in unused:
            needs.append(f"{name} (of the kind {spec.kind}: its tokenizer.json)")
    return {"parts": tuple(p.name for p in present), "missing": tuple(p.name for p in lacking), "needs": tuple(needs)}


# Folders


def _root(folder: Path) -> Path:
    """What no file may lie outside of: the folder, or the hub's cache that it is part of, which links to files beside its snapshots."""
    near = (folder, *folder.parents)[:3]
    return next((above.parent.parent for above in near if above.parent.name == "snapshots"), folder)


def _folder(folder: Path) -> Report:
    """A diffusers layout, one part of it, or a folder that holds something else."""
    blank = Report(folder.name)
    try:
        own = read_card(folder / "card.toml") if (folder / "card.toml").is_file() else None
        index = part_config(folder, "model_index.json") if (folder / "model_index.json").is_file() else {}
        if own is None and not index:
            return _single_part(folder)
    except ModelError as error:
        return replace(blank, damage=str(error))
    names = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and index.get(p.name, [1]) != [None, None] and _has_weights(p)]
    headers, damage = _headers(folder, {*names, *_declared(index)})
    of_denoiser = {key: info.shape for part in ("unet", "transformer") for h in headers.get(part, ()) for key, info in h.tensors.items()}
    found = identify(of_denoiser)
    family = own.family if own else found.family if found else family_of_index(index.get("_class_name")) or ""
    every = [h for part in headers.values() for h in part]
    dtypes = Counter(info.dtype for h in every for info in h.tensors.values())
    report = replace(blank, kind="checkpoint" if family else "unknown", family=family, layout="diffusers", size=sum(h.size for h in every),
                     damage="; ".join(damage), dtypes=dict(dtypes.most_common()), tensors=sum(len(h.tensors) for h in every))
    if not family:
        said = f"no family of this version takes its pipeline {index.get('_class_name')!r:.60} or its denoiser"
        return replace(report, notes=(said,), parts=tuple(headers))
    scheduler = folder_scheduler(folder)
    variant, notes = folder_variant(own.variant if own else "", found, index, scheduler)
    said = _scheduler_prediction(scheduler)
    whole = built(family, variant)
    parts = tuple(p for p in (whole.parts if whole else parts_of(family, variant)) if not (p.optional and index.get(p.name) == [None, None]))
    present = tuple(p for p in parts if p.name in headers)
    predicted = said or (whole.prediction if whole else "")
    tokenizers = [p.name for p in folder.iterdir() if p.is_dir() and p.name.startswith(("tokenizer", "processor"))]
    return replace(report, variant=variant, prediction=predicted, prediction_from="file" if said else "variant" if predicted else "", notes=notes,
                   **_absent(family, variant, parts, present, tokenizers))


def folder_variant(own: str, found: Identified | None, index: Mapping[str, Any], scheduler: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """A card's word, else the denoiser's tensors, and where those are of several variants the one whose pipeline the index names.

    Several of one pipeline are told apart by the scheduler: the one of which it says most.
    """
    if own or found is None:
        return own, () if own else ("a model of a size of its own, no published variant: its own configs hold",)
    named = [v for v in twins(found) if configs(v).get("model_index", {}).get("_class_name") == index.get("_class_name")]
    return max(named, key=lambda v: sum(scheduler.get(k) == x for k, x in configs(v)["scheduler"].items()), default=found.variant), ()


def folder_scheduler(folder: Path) -> Mapping[str, Any]:
    """The scheduler's config of a diffusers layout, {} where none can be read."""
    place = folder / "scheduler"
    try:
        return part_config(place, "scheduler_config.json") if (place / "scheduler_config.json").is_file() else {}
    except ModelError:
        return {}


def _has_weights(place: Path) -> bool:
    return any(p.suffix in (".safetensors", ".bin", ".pt", ".ckpt") or p.name.endswith(".safetensors.index.json") for p in place.iterdir())


def _declared(index: Mapping[str, Any]) -> set[str]:
    """Parts with weights that a model_index.json names."""
    pairs = {name: value[1] for name, value in index.items() if isinstance(value, list) and len(value) == 2 and Path(name).name == name}
    weightless = ("Tokenizer", "Scheduler", "Processor", "Extractor", "TokenizerFast")
    return {name for name, cls in pairs.items() if isinstance(cls, str) and not cls.endswith(weightless) and "SafetyChecker" not in cls}


def _headers(folder: Path, names: set[str]) -> tuple[dict[str, tuple[Header, ...]], list[str]]:
    """Checked headers per part, and what is wrong with the others."""
    headers, damage = {}, []
    for name in sorted(names):
        if not (folder / name).is_dir():
            continue  # absent, which is not damage: it is listed as missing
        try:
            headers[name] = tuple(read_header(f) for f in weights_files(folder / name, root=_root(folder)))
        except ModelError as error:
            damage.append(str(error))
    return headers, damage


def _scheduler_prediction(config: Mapping[str, Any]) -> str | None:
    flow = str(config.get("_class_name", "")).startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"
    return "flow" if flow else PREDICTIONS.get(str(config.get("prediction_type")))


def _single_part(folder: Path) -> Report:
    """A part's folder by itself, or one that names no model."""
    loose = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf"))
    try:
        return _files(folder.name, tuple(read_header(f) for f in weights_files(folder, root=_root(folder))))
    except ModelError as error:
        if (folder / "config.json").is_file() or any(p.name.endswith(".safetensors.index.json") for p in folder.iterdir()):
            return Report(folder.name, damage=str(error))
    said = f"it has the files {', '.join(loose[:5])}: name one of them" if loose else "it has no model_index.json, no card.toml and no weights"
    return Report(folder.name, notes=(said,))
