"""Which family a set of tensors belongs to, by names and shapes alone. Knows how to compare signatures; the signatures are in `pipelines/`.

What fits no signature is unknown: nothing here takes the nearest one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from latentgen.models import card
from latentgen.models.family import Family, FamilyFile, Model, Part, Signature

Shapes = Mapping[str, tuple[int, ...]]
Modules = Mapping[str, tuple[int, int]]  # name with "_" for "." -> (values out, values in)


@dataclass(frozen=True)
class Identified:
    """A denoiser that is known: its family (a file in `pipelines/`), variant and layout of the signature that fits, and the prefix of its names."""

    family: str
    variant: str
    layout: str
    prefix: str


def family_files() -> Iterator[tuple[str, FamilyFile]]:
    """Every file in `pipelines/` that declares signatures, by name."""
    for name in card.families():
        file = card.family_file(name)
        if hasattr(file, "SIGNATURES"):
            yield name, file


def identify(shapes: Shapes) -> Identified | None:
    """The denoiser among these tensors (name -> shape in torch's order), None if no signature fits."""
    for name, file in family_files():
        for signature in file.SIGNATURES:
            for prefix in signature.prefixes:
                if _fits(shapes, signature, prefix):
                    return Identified(name, signature.variant, signature.layout, prefix)
    return None


def twins(found: Identified) -> tuple[str, ...]:
    """Variants of the family whose tensors are the same in name and shape, the found one first: only configs tell them apart."""
    signatures = getattr(card.family_file(found.family), "SIGNATURES", ())
    own = next((s for s in signatures if s.variant == found.variant and s.layout == found.layout and found.prefix in s.prefixes), None)
    same = [s.variant for s in signatures if own is not None and (s.layout, s.shapes, s.absent) == (own.layout, own.shapes, own.absent)]
    return tuple(dict.fromkeys([found.variant, *same]))


def _fits(shapes: Shapes, signature: Signature, prefix: str) -> bool:
    for name, wanted in signature.shapes.items():
        shape = shapes.get(prefix + name)
        if shape is None or len(shape) != len(wanted) or any(side not in (None, is_) for side, is_ in zip(wanted, shape, strict=True)):
            return False
    return bool(signature.shapes) and not any(prefix + name in shapes for name in signature.absent)


def configs(variant: str) -> dict[str, Any]:
    """The packaged configs of a variant as `Model.configs` has them, {} where none are packaged."""
    known = _published(variant) if variant else None
    return {} if known is None else {**known["parts"], "scheduler": known.get("scheduler", {}), "model_index": known.get("index", {})}


@lru_cache(maxsize=64)
def _published(variant: str) -> dict[str, Any] | None:
    return card.published(variant) if variant in card.variants() else None


def built(family: str, variant: str) -> Family | None:
    """The family as the variant's packaged configs shape it, None where none are packaged."""
    file, known = card.family_file(family), configs(variant)
    return file.build(Model(variant, known)) if known and hasattr(file, "build") else None


def parts_of(family: str, variant: str) -> tuple[Part, ...]:
    """The parts of a variant by its packaged configs; every part of the family where none are packaged."""
    known, every = configs(variant), tuple(getattr(card.family_file(family), "PARTS", ()))
    return tuple(p for p in every if p.name in known) if known else every


def family_of_index(pipeline: Any) -> str | None:
    """The family that takes a model_index.json of this class."""
    return next((name for name, file in family_files() if pipeline in getattr(file, "INDEX", ())), None)


def bases(modules: Modules, width: int | None = None) -> tuple[str, ...]:
    """The families whose denoiser has these modules: what an adapter fits. Several where they do not tell, none where nothing is known.

    Args:
        modules: of a denoiser, as an adapter names them, with "_" for ".".
        width: of the cross-attention, where the names do not tell.
    """
    widths = {width} if width else {side for name, (_, side) in modules.items() if name.endswith("attn2_to_k")}
    exact, alike = set(), set()
    worn = {_pattern(name): size for name, size in modules.items()}
    by_width = set()
    for family, file in family_files():
        for signature in file.SIGNATURES:
            rows = {_flat(name): (shape[0], shape[1]) for name, shape in signature.shapes.items() if len(shape) >= 2 and name.endswith("weight")}
            if _agree(rows, modules):
                exact.add(family)
            if _agree({_pattern(name): size for name, size in rows.items()}, worn):
                alike.add(family)
            if len(widths) == 1 and widths <= _widths(signature):
                by_width.add(family)
    if len(widths) == 1:
        return tuple(sorted(exact & by_width or by_width))
    return tuple(sorted(exact or alike))


def _flat(name: str) -> str:
    return name.removesuffix(".weight").replace(".", "_")


def _pattern(name: str) -> str:
    """The name with every number of a block replaced, so that block 3 is like block 0."""
    return re.sub(r"_\d+(?=_)", "_#", name)


def _agree(wanted: Mapping[str, tuple[int | None, int | None]], found: Modules) -> bool:
    """At least one module is in both, and none differs in size."""
    both = [(wanted[name], found[name]) for name in wanted.keys() & found.keys()]
    return bool(both) and all(side in (None, is_) for sizes, have in both for side, is_ in zip(sizes, have, strict=True))


def _widths(signature: Signature) -> set[int | None]:
    """Of the cross-attention: from the signature, else from the packaged config."""
    said = {shape[1] for name, shape in signature.shapes.items() if name.endswith("attn2.to_k.weight")}
    return said or {config.get("cross_attention_dim") for config in configs(signature.variant).values() if isinstance(config, Mapping)} - {None}


def fitting(part: str, key: str, value: Any) -> tuple[str, ...]:
    """The families of which a variant has a part whose name begins with `part` and whose config says `value` under `key`."""
    found = set()
    for name, file in family_files():
        for variant in {signature.variant for signature in file.SIGNATURES}:
            if any(p.startswith(part) and isinstance(c, Mapping) and c.get(key) == value for p, c in configs(variant).items()):
                found.add(name)
    return tuple(sorted(found))
