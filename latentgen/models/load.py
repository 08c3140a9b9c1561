"""Files to modules. Knows safetensors, configs and the classes that families declare; knows no request and moves nothing between devices.

Weights are memory-mapped and assigned to a module whose parameters were made on the meta device, so a part costs its weights once. Nothing from a
folder is executed: the class comes from the family's declaration, the config gives numbers only, and pickles are refused unless they are asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from inspect import signature
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from latentgen.conditioning.prompt import shown
from latentgen.errors import ModelError
from latentgen.models.family import Config, Part
from latentgen.models.header import Header, read_header
from latentgen.models.pickles import is_pickle, pickle_header, pickle_tensors, refuse_pickle

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger(__name__)
LIBRARIES = ("diffusers", "transformers")
MAX_NUMBER, MAX_ITEMS, MAX_LAYERS = 2**20, 4096, 512  # of a config: no published checkpoint comes near
WHOLE = 256 * 2**20  # files up to this size are hashed in full, larger ones by samples
OURS = ("attn_implementation", "experts_implementation", "return_dict", "output_attentions", "output_hidden_states")  # how a network runs is not its config's to say
ALIGNED = 64  # bytes, as torch allocates
NAMES = ("diffusion_pytorch_model", "model")
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
        return [_header(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]

    def weight_bytes(self, part: Part) -> int:
        """Bytes of the part's weights as stored, from the headers alone."""
        tensors = {name: t for h in self.headers() for name, t in h.tensors.items()}
        from latentgen.models.convert import find_prefix

        prefix = find_prefix(tensors, part.original) if self.original and part.original else ""
        return sum(t.end - t.start for name, t in tensors.items() if name.startswith(prefix or ""))


def empty_module(source: Source, part: Part, *, shapes_only: bool = False) -> nn.Module:
    """The part's module with parameters on the meta device. What its class computes and no file holds (rope tables, position ids) is real.

    Args:
        shapes_only: leave that on the meta device, too: the module cannot run, but its `state_dict` has every name and shape.

    Raises:
        ModelError: an unknown class, or a config that does not fit it.
    """
    import torch

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
        with torch.device("meta"):
            module = made()
        if shapes_only or not _computes(module):
            return module
        with _EmptyOnMeta():
            return made()
    except Exception as error:
        raise ModelError(f"the config of {source.label} does not fit {name}: {shorten(str(error), 200)}") from error


def _computes(module: nn.Module) -> bool:
    """Whether a module on the meta device has tensors that its class made and that are not in its `state_dict`, so that no file can fill them."""
    import torch

    kept = module.state_dict()
    buffers = any(name not in kept for name, _ in module.named_buffers())
    return buffers or any(isinstance(item, torch.Tensor) for owner in module.modules() for value in vars(owner).values()
                          for item in (value if isinstance(value, (list, tuple)) else (value,)))


def part_class(declared: str) -> type:
    """The class of a declaration, "diffusers.AutoencoderKL". Declarations are code of this library: no name that a folder brings is ever looked up.

    Raises:
        ModelError: another library, or no network of that name in this version of it.
    """
    library, _, name = declared.partition(".")
    found = getattr(import_module(library), name, None) if library in LIBRARIES else None
    if not isinstance(found, type):
        raise ModelError(f"{declared!r} is not a class that parts may have: expected one of {' or '.join(LIBRARIES)}, so install a version that has it")
    return found


def check_fit(source: Source, part: Part) -> None:
    """Compare every tensor's name and shape with the module's, from headers alone.

    Raises:
        ModelError: tensors are missing, left over or of another shape: how many, and the first.
    """
    import torch

    from latentgen.models.convert import dequantised

    shapes = {name: torch.empty(t.shape, device="meta") for h in source.headers() for name, t in h.tensors.items()}
    module = empty_module(source, part, shapes_only=True)
    _compare(_own_names(dequantised(shapes, torch.float32), source, part, module), module, source.label)


def load_part(source: Source, part: Part, dtype: torch.dtype) -> nn.Module:
    """Build a part in eval mode, without gradients, on the CPU; its convolutions in channels-last.

    Raises:
        ModelError: a file is missing, damaged, a pickle, or does not fit the class; or weights are NaN or infinite.
    """
    from latentgen.models.convert import LazyTensors, dequantised

    module = empty_module(source, part)
    keep = tuple(getattr(module, "_keep_in_fp32_modules", None) or ()) if str(dtype) == "torch.float16" else ()
    stored = _read(source, dtype)
    tensors = _own_names(dequantised(stored, dtype), source, part, module)
    _compare(tensors, module, source.label)
    ready, floating = {}, {name for name, t in module.state_dict().items() if t.is_floating_point()}
    for name in list(tensors):
        tensor = tensors.pop(name)
        if name in floating and not tensor.is_floating_point():
            raise ModelError(f"the tensor {name!r} of {source.label} is stored as {tensor.dtype}: expected floating-point numbers, so get the file in another precision")
        ready[name] = _ready(tensor, dtype, keep=any(k in name.split(".") for k in keep), images=part.cls.startswith("diffusers."))
        if isinstance(stored, LazyTensors) and ready[name].data_ptr() != tensor.data_ptr():
            stored.release(tensor)  # or what was copied as it stands in the file would be in memory twice
    _check_finite(ready, source.label)
    module.load_state_dict(ready, strict=True, assign=True)
    if isinstance(getattr(module, "_tied_weights_keys", None), Mapping):
        module.tie_weights()  # one parameter again, so that moving it does not make two
    lost = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if lost:
        raise ModelError(f"the buffer {lost[0]!r} of {source.label} is in no file: the checkpoint is incomplete")
    return module.eval().requires_grad_(False)


def _read(source: Source, dtype: torch.dtype) -> Mapping[str, Tensor]:
    from latentgen.models.convert import LazyTensors, gguf_tensors

    first = source.files[0]
    if source.headers()[0].format == "gguf":
        return gguf_tensors(first, dtype)
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


def _ready(tensor: Tensor, dtype: torch.dtype, *, keep: bool, images: bool) -> Tensor:
    """A tensor as the module keeps it: in its dtype, convolution weights in channels-last; itself where nothing changes (it stays memory-mapped, unless it is misaligned)."""
    import torch

    if not tensor.is_floating_point():
        return tensor
    layout = torch.channels_last if images and tensor.ndim == 4 else torch.preserve_format
    ready = tensor.to(dtype=torch.float32 if keep else dtype, memory_format=layout)
    if ready is tensor and ready.dtype == torch.float32 and ready.data_ptr() % ALIGNED:
        return tensor.clone()  # float32 products round by where a tensor begins: the same weights in another file must give the same picture
    return ready


def _check_finite(tensors: Mapping[str, Tensor], label: str) -> None:
    import torch

    bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t.sum(dtype=torch.float32)))]
    bad = [name for name in bad if not bool(torch.isfinite(tensors[name]).all())]  # a sum may overflow where no weight does
    if bad:
        raise ModelError(f"{len(bad)} tensors of {label} have NaN or infinite weights (first {bad[0]!r}): get the file again")


def _EmptyOnMeta() -> Any:  # noqa: N802 - a class, made when torch is there
    """A mode in which `torch.empty`, which parameters are made by, gives meta tensors; all that a module computes stays real. Of this thread alone."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.empty and kwargs.get("device") is None:
                kwargs = {**kwargs, "device": "meta"}
            return func(*args, **kwargs)

    return Mode()


def _init_arguments(cls: type, config: Config) -> dict[str, Any]:
    """What of a diffusers config the class takes; the rest (written by other versions) is logged."""
    known = signature(cls.__init__).parameters
    if extra := [k for k in config if k not in known and not k.startswith("_")]:
        log.info("config keys that %s does not take: %s", cls.__name__, ", ".join(extra))
    return {k: v for k, v in config.items() if k in known}


def check_config(config: Config, label: str) -> None:
    """Bounds on what a config may say, so that a hostile one costs no memory and no time.

    Raises:
        ModelError: a scaling factor that is no number, a whole number below -1 or above 2**20, more than 512 layers, or a list of more than 4,096.
    """
    for name in ("scaling_factor", "shift_factor"):
        value = config.get(name) or 0.0
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e6:
            raise ModelError(f"the config of {label} sets {name} to {shown(value)}: expected a number")
    for name, value in _numbers(config):
        limit = MAX_LAYERS if "layers" in name or "blocks" in name else MAX_NUMBER
        if not -1 <= value <= limit:
            raise ModelError(f"the config of {label} sets {name} to {shown(value)}: expected at most {limit:,}, so it is damaged or not of a real checkpoint")


def _numbers(value: Any, name: str = "it") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping) or isinstance(value, (list, tuple)):
        if len(value) > MAX_ITEMS:
            yield name, float(len(value)) * MAX_NUMBER
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _numbers(item, str(key) if isinstance(value, Mapping) else name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def part_config(place: Path, name: str = "config.json") -> dict[str, Any]:
    """A config file of a part, numbers and names only.

    Raises:
        ModelError: missing, not a JSON object, or one that names code.
    """
    try:
        config = json.loads((place / name).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ModelError(f"{place.parent.name}/{place.name}/{name} cannot be read ({type(error).__name__}): the folder needs a diffusers layout") from error
    if not isinstance(config, dict) or "auto_map" in config:
        raise ModelError(f"{place.parent.name}/{place.name}/{name} is refused: expected a plain object that names no code")
    return config


def weights_files(place: Path, *, root: Path | None = None, allow_pickle: bool = False) -> tuple[Path, ...]:
    """The safetensors of a part's folder: one file, or the shards that its index names.

    Args:
        root: the folder that no file may lie outside of, links followed; None for `place` itself.
        allow_pickle: take a pickle where there is nothing else.

    Raises:
        ModelError: none there, a pickle in its place, an absent shard, or one outside the folder.
    """
    root = (root or place).resolve()
    for variant, name in [(v, n) for v in ("", ".fp16", ".bf16") for n in NAMES]:
        one = place / f"{name}{variant}.safetensors"
        if one.is_file():
            return (_inside(one, root),)
        for index in (f"{name}.safetensors.index{variant}.json", f"{name}{variant}.safetensors.index.json"):  # both spellings are written
            if (place / index).is_file():
                return _shards(place / index, root)
    where = f"{place.parent.name}/{place.name}"
    pickles = [p for p in sorted(place.glob("*")) if is_pickle(p)]
    if pickles and not allow_pickle:
        refuse_pickle(pickles[0])
    if pickles:
        return (_inside(pickles[0], root),)
    raise ModelError(f"{where} has no weights: expected diffusion_pytorch_model.safetensors or model.safetensors")


def _shards(index: Path, root: Path) -> tuple[Path, ...]:
    where = f"{index.parent.name}/{index.name}"
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        paths = [index.parent / name for name in names]
        if not names:
            raise LookupError("an empty weight_map")
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{where} cannot be read ({type(error).__name__}): expected a weight_map of shards, so get it again") from error
    for name, path in zip(names, paths, strict=True):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{where} names the shard {name!r:.100}: expected a .safetensors file in the same folder")
        if not path.is_file():
            raise ModelError(f"{where} names the shard {name}, which is not there: get it ({len(paths)} shards are expected)".replace("\x00", "?"))
    return tuple(_inside(path, root) for path in paths)


def _inside(path: Path, root: Path) -> Path:
    if not path.resolve().is_relative_to(root):
        raise ModelError(f"{path.parent.name}/{path.name} links to a file outside the model's folder: put the file itself there")
    return path


@lru_cache(maxsize=64)
def _header(path: str, size: int, changed: int) -> Header:
    return pickle_header(Path(path)) if is_pickle(Path(path)) else read_header(Path(path))


@lru_cache(maxsize=64)
def _digest(path: str, size: int, changed: int) -> str:
    """sha256 of a file; of one above 256 MB, of its size and of 64 pieces of 1 MB spread over it, the header among them."""
    with open(path, "rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        whole = hashlib.sha256(str(size).encode())
        for n in range(64):
            file.seek(n * (size - 2**20) // 63)
            whole.update(file.read(2**20))
        return whole.hexdigest()


def digest(files: tuple[Path, ...]) -> str:
    """One short hash over weight files (sha256, 16 hex digits), computed once per file version.

    Raises:
        ModelError: a file is gone or cannot be read.
    """
    whole = hashlib.sha256()
    for path in files:
        try:
            stat = path.stat()
            whole.update(_digest(str(path), stat.st_size, stat.st_mtime_ns).encode())
        except OSError as error:
            raise ModelError(f"{path.parent.name}/{path.name} cannot be read any more ({type(error).__name__}): put it back, or load the model again") from None
    return whole.hexdigest()[:16]
