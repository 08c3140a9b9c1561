"""Files to modules. Knows safetensors, configs and the classes that families declare; knows no request and moves nothing between devices.

Weights are memory-mapped and assigned to a module whose parameters were made on the meta device, so a part costs its weights once. Nothing from a
folder is executed: the class comes from the family's declaration, the config gives numbers only, and pickles are refused unless they are asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import signature
from math import prod
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from latentgen.errors import ModelError
from latentgen.importing import uncollected
from latentgen.models.family import Config, Part
from latentgen.models.files import check_config, header_of
from latentgen.models.gguf_header import BLOCKS
from latentgen.models.header import Header
from latentgen.models.pickles import is_pickle, pickle_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from latentgen.models.form import Form
    from latentgen.models.streamed import Lane, Stored

log = logging.getLogger(__name__)
LIBRARIES = ("diffusers", "transformers")
# how a network runs is not its config's to say
OURS = ("attn_implementation", "experts_implementation", "return_dict", "output_attentions", "output_hidden_states")
WHOLE_NUMBERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")  # which no dtype of a network changes
GENERAL = "Transformer2DModel"  # what configs call a class that got a name of its own only after they were published


@dataclass(frozen=True)
class Source:
    """Where one part comes from.

    Attributes:
        label: "folder/part" or "file", for messages.
        files: its safetensors (several shards), or one GGUF file.
        config: as a config.json has it.
        original: the files have the names of `part.original`, and maybe other parts beside it.
    """

    label: str
    files: tuple[Path, ...]
    config: Config
    original: bool = False

    def headers(self) -> list[Header]:
        """Checked headers of all files.

        Raises:
            ModelError: a file is damaged, or gone since the checkpoint was opened.
        """
        for file in self.files:
            if not file.is_file():
                raise ModelError(f"{self.label} has no weights any more: {file.name} is gone, so get it again")
        return [header_of(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]

    @property
    def packing(self) -> dict[str, str]:
        """How its files have tensors packed, by their names: blocks of GGUF and 8-bit floats."""
        return {name: t.dtype for h in self.headers() for name, t in h.tensors.items() if t.dtype in BLOCKS or t.dtype.startswith("F8_")}

    def weight_bytes(self, part: Part, *, dtype: torch.dtype | None = None) -> int:
        """Bytes of the part's weights, from the headers alone: as stored, or as they are held in a dtype."""
        tensors = {name: t for h in self.headers() for name, t in h.tensors.items()}
        from latentgen.models.convert import find_prefix

        prefix = find_prefix(tensors, part.original) if self.original and part.original else ""
        own = [t for name, t in tensors.items() if name.startswith(prefix or "")]
        return sum(t.end - t.start if dtype is None or t.dtype in WHOLE_NUMBERS else prod(t.shape) * dtype.itemsize for t in own)


def empty_module(source: Source, part: Part, *, shapes_only: bool = False) -> nn.Module:
    """The part's module with parameters on the meta device. What its class computes and no file holds (rope tables, position ids) is real.

    Args:
        shapes_only: leave that on the meta device, too: the module cannot run, but its `state_dict` has every name and shape.

    Raises:
        ModelError: an unknown class, or a config that does not fit it.
    """
    import torch

    from latentgen.models.empty import Empty

    library, name = part.cls.split(".")
    cls = part_class(part.cls)
    check_config(source.config, source.label)
    said = source.config.get("_class_name", name)
    if said != name and not (said == GENERAL and name.endswith(GENERAL)):
        raise ModelError(f"the config of {source.label} describes a {shorten(str(said), 60)}: expected {name}, so another part's files may lie there")

    def made() -> nn.Module:
        if library == "diffusers":
            return cls.from_config(_init_arguments(cls, source.config))
        said = {k: v for k, v in source.config.items() if not k.startswith("_") and k not in OURS}
        return cls(cls.config_class(**said, attn_implementation="sdpa"))

    try:
        with torch.device("meta") if shapes_only else nullcontext(), Empty():
            return made()
    except Exception as error:
        raise ModelError(f"the config of {source.label} does not fit {name}: {shorten(str(error), 200)}") from error


def part_class(declared: str) -> type:
    """The class of a declaration, "diffusers.AutoencoderKL". Declarations are code of this library: no name that a folder brings is ever looked up.

    Raises:
        ModelError: another library, or no network of that name in this version of it.
    """
    library, _, name = declared.partition(".")
    with uncollected():
        found = getattr(import_module(library), name, None) if library in LIBRARIES else None
    if not isinstance(found, type):
        raise ModelError(f"{declared!r} is not a class that parts may have: expected one of {' or '.join(LIBRARIES)}, "
                         "so install a version that has it")
    return found


def check_fit(source: Source, part: Part) -> None:
    """Compare every tensor's name and shape with the module's, from headers alone.

    Raises:
        ModelError: tensors are missing, left over or of another shape: how many, and the first.
    """
    module = empty_module(source, part, shapes_only=True)
    _compare(tensors_on_paper(source, part, module), module, source.label)


def tensors_on_paper(source: Source, part: Part, module: nn.Module) -> dict[str, Tensor]:
    """The part's tensors by the module's names, without numbers, as its files have them: from headers alone.

    Raises:
        ModelError: see `part_tensors`; or a tensor is packed in a way that is not read.
    """
    from latentgen.models.convert import dequantised, without_numbers

    stored = {name: without_numbers(t) for header in source.headers() for name, t in header.tensors.items()}
    return _own_names(dequantised(stored), source, part, module)


def load_part(source: Source, part: Part, dtype: torch.dtype, *, leave: Callable[[nn.Module], Collection[str]] | None = None,
              later: Callable[[nn.Module], Collection[str]] | None = None, lane: Lane | None = None, pinned: bool = False,
              quantise: str | None = None) -> nn.Module:
    """Build a part in eval mode, without gradients, on the CPU; its convolutions in channels-last.

    Args:
        leave: tells, of the module without numbers, the names of children whose weights stay in the file (see `models.elsewhere`).
        later: tells likewise the names of weights that are promised only, where a file that is mapped into memory has them (see `models.promised`).
        lane: by which the weights of blocks come when they are called (see `models.streamed`), from the file, or from page-locked memory where
            `pinned`; None has them all here.
        quantise: how the weights of linears are held, one of `models.quantise.ways.WAYS` or "stored"; None unpacks all.

    Raises:
        ModelError: a file is missing, damaged, a pickle, or does not fit the class; or weights are NaN or infinite (promised ones, when they are
            made).
    """
    from latentgen.models.convert import dequantised
    from latentgen.models.form import Form, kept_precise
    from latentgen.models.quantise.held import hold
    from latentgen.models.streamed import stream

    module = empty_module(source, part)
    stored = _read(source)
    tensors = _own_names(dequantised(stored), source, part, module)
    _compare(tensors, module, source.label)
    form = Form(source.label, dtype, kept_precise(module, dtype), part.cls.startswith("diffusers."),
                 frozenset(name for name, t in module.state_dict().items() if t.is_floating_point()))
    release = getattr(stored, "release", None) or (lambda tensor: None)
    form = replace(form, held=hold(module, quantise, tensors, form.dtype_of))
    _leave(module, () if leave is None else leave(module), tensors, form=form, release=release)
    apart = _apart(module, tensors, form, release, pinned=pinned) if lane is not None else []
    ready = {own: t for block in apart for name, packed in block.tensors.items() for own, t in form.alike(f"{block.name}.{name}", packed).items()}
    ready |= _promised(() if later is None else later(module), tensors, stored, form)
    ready |= _numbers(tensors, release, form)
    module.load_state_dict(ready, strict=True, assign=True)
    if isinstance(getattr(module, "_tied_weights_keys", None), Mapping):
        module.tie_weights()  # one parameter again, so that moving it does not make two
    for block in apart:
        stream(module, block, lane)
    lost = [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in ready]
    if lost:
        raise ModelError(f"the buffer {lost[0]!r} of {source.label} is in no file: the checkpoint is incomplete")
    return module.eval().requires_grad_(False)


def _numbers(tensors: dict[str, Tensor], release: Callable[[Tensor], None], form: Form) -> dict[str, Tensor]:
    """All tensors that are left, as the part keeps them; each leaves `tensors` as it is made."""
    from latentgen.models.cast import NotFinite

    ready: dict[str, Tensor] = {}
    bad = []
    for name in list(tensors):
        tensor = tensors.pop(name)
        try:
            made = form.numbers(name, tensor)
        except NotFinite:
            bad.append(name)
            continue
        ready |= made
        if all(t.data_ptr() != tensor.data_ptr() for t in made.values()):
            release(tensor)  # or what was copied as it stands in the file would be in memory twice
    if bad:
        raise form.refused(bad)
    return ready


def _promised(names: Collection[str], tensors: dict[str, Tensor], stored: Mapping[str, Tensor], form: Form) -> dict[str, Tensor]:
    """Those of the named tensors that lie in a mapped file, to be made when they are used, taken out of `tensors`."""
    from latentgen.models.convert import LazyTensors
    from latentgen.models.promised import Promised

    if not isinstance(stored, LazyTensors):
        return {}

    def ready(name: str) -> Callable[[Tensor], Tensor]:
        def made(tensor: Tensor) -> Tensor:
            stored.check_same()
            return form.checked(name, tensor)

        return made

    own = {name: tensors.pop(name) for name in names if name in tensors and stored.holds(tensors[name])}
    return {name: Promised(form.alike(name, tensor)[name], tensor, ready=ready(name), release=stored.release) for name, tensor in own.items()}


def _leave(module: nn.Module, names: Collection[str], tensors: dict[str, Tensor], *, form: Form, release: Callable[[Tensor], None]) -> None:
    """Put children whose weights stay in the file in the place of these, and take their tensors out."""
    from latentgen.models.elsewhere import Elsewhere

    form = replace(form, precise=(), images=False, floating=frozenset())
    for child in names:
        own = {name.removeprefix(f"{child}."): tensors.pop(name) for name in list(tensors) if name.startswith(f"{child}.")}
        shell = module.get_submodule(child).eval().requires_grad_(False)
        module.set_submodule(child, Elsewhere(shell, own, ready=form.within(child), release=release))


def _apart(module: nn.Module, tensors: dict[str, Tensor], form: Form, release: Callable[[Tensor], None], *, pinned: bool) -> list[Stored]:
    """The blocks of a module without numbers, with their tensors taken out of `tensors`."""
    from latentgen.models.streamed import LARGEST, Stored, blocks

    found = []
    for block in blocks(module, largest=LARGEST * 4 // form.dtype.itemsize):  # whose parameters are float32 as they were made
        own = {name.removeprefix(f"{block}."): tensors.pop(name) for name in list(tensors) if name.startswith(f"{block}.")}
        found.append(Stored(block, own, form.within(block), release, pinned))
    return found


def _read(source: Source) -> Mapping[str, Tensor]:
    from latentgen.models.convert import LazyTensors

    first = source.files[0]
    return pickle_tensors(first) if is_pickle(first) else LazyTensors(*source.files)


def _own_names(tensors: Mapping[str, Tensor], source: Source, part: Part, module: nn.Module) -> dict[str, Tensor]:
    """The part's tensors by the module's own names: converted from the original layout, older spellings renewed, and tied ones filled in."""
    from latentgen.models.convert import as_module_names, part_tensors

    found: Mapping[str, Tensor] = part_tensors(tensors, part, source.config) if source.original else tensors
    wanted = module.state_dict()
    named = {new: found[old] for new, old in as_module_names(found, wanted).items()}
    tied = getattr(module, "_tied_weights_keys", None)
    for name, same in (tied.items() if isinstance(tied, Mapping) else ()):
        if name in wanted and name not in named and same in named:
            named[name] = named[same]
    return named


def _compare(tensors: Mapping[str, Tensor], module: nn.Module, label: str) -> None:
    wanted = module.state_dict()
    missing, extra = [k for k in wanted if k not in tensors], [k for k in tensors if k not in wanted]
    wrong = [k for k in wanted if k in tensors and tensors[k].shape != wanted[k].shape]
    said = [f"{len(names)} {what} (first {names[0]!r}{more(names[0])})" for names, what, more in (
        (missing, "missing", lambda k: ""), (extra, "left over", lambda k: ""),
        (wrong, "of another shape", lambda k: f", {tuple(tensors[k].shape)} where {tuple(wanted[k].shape)} is expected")) if names]
    if said:
        raise ModelError(f"the weights of {label} do not fit its {type(module).__name__}: {', '.join(said)} of {len(wanted)} tensors; "
                         "get the file again, or give the config that belongs to it")


def _init_arguments(cls: type, config: Config) -> dict[str, Any]:
    """What of a diffusers config the class takes; the rest (written by other versions) is logged."""
    known = signature(cls.__init__).parameters
    if extra := [k for k in config if k not in known and not k.startswith("_")]:
        log.info("config keys that %s does not take: %s", cls.__name__, ", ".join(extra))
    return {k: v for k, v in config.items() if k in known}
