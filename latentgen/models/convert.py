"""Tensors of a file to the names that a module has. Knows prefixes, published converters and packed weights; names no family and builds no module.

Every mapping here is lazy: a tensor is read when it is looked up, so one part of a large file costs that part alone. Renaming is done by functions of
`diffusers.loaders.single_file_utils` that families name in `Part.original`; no other function is ever called.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from textwrap import shorten
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from latentgen.errors import ModelError
from latentgen.models.family import Original, Part
from latentgen.models.gguf_header import BLOCKS
from latentgen.models.header import TensorInfo, read_header, where

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
          "I64": "int64",
          "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
INSISTS = {  # converter -> the prefix without which it takes nothing
    "convert_ldm_unet_checkpoint": "model.diffusion_model.", "convert_ldm_clip_checkpoint": "cond_stage_model.transformer.",
}
SURPLUS = re.compile(r"^(loss|model_ema)\.|(^|\.)(position_ids|logit_scale)$|^norm_final\.weight$|^spiece_model$")  # in files, in no module
MOVED = (("encoder.quant_conv.", "quant_conv."), ("decoder.post_quant_conv.", "post_quant_conv."))  # where some autoencoders keep them
MARKS = re.compile(r"(^|\.)(scaled_fp8|scale_input|input_scale|comfy_quant)$")
SPELLINGS = (  # older names of module tensors, as (what stood there, what stands there now)
    (r"^text_model\.", ""), (r"^", "text_model."),
    (r"^visual\.", "model.visual."), (r"^model\.", "model.language_model."),
    (r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."), (r"^", "model."),
    (r"\.query\.", ".to_q."), (r"\.key\.", ".to_k."), (r"\.value\.", ".to_v."), (r"\.proj_attn\.", ".to_out.0."),
)


class _Named(Mapping[str, "Tensor"]):
    """A mapping whose names are known before its tensors are."""

    _names: dict[str, Any]

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class LazyTensors(_Named):
    """Safetensors files (one, or the shards of one part) or a GGUF file as a mapping: a look-up gives that tensor, memory-mapped; nothing is read
    until it is used. Matrices in blocks of ggml are `Packed`.

    Raises:
        ModelError: a file cannot be opened, its header is damaged, a tensor is in two files, or what unpacks its blocks is not installed.
    """

    def __init__(self, *paths: str | Path) -> None:
        self._names: dict[str, tuple[mmap.mmap, TensorInfo]] = {}
        self._maps: list[mmap.mmap] = []
        self._opened: list[tuple[Path, os.stat_result]] = []
        for path in paths:
            header = read_header(path)
            if header.format == "gguf" and any(info.dtype in BLOCKS for info in header.tensors.values()) and not find_spec("gguf"):
                raise ModelError(f'{where(Path(path))} is packed in blocks, which needs the gguf package: pip install "latentgen[gguf]"')
            with open(path, "rb") as file:
                self._opened.append((Path(path), os.fstat(file.fileno())))
                self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))  # private pages: torch wants a buffer that could be written
            if twice := next((name for name in header.tensors if name in self._names), None):
                raise ModelError(f"the tensor {twice!r} is in {where(Path(path))} and in another shard: get the shards again, all of one version")
            self._names |= {name: (self._maps[-1], info) for name, info in header.tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        import torch

        memory, info = self._names[name]
        if info.dtype in BLOCKS:
            return _of_blocks(info, torch.frombuffer(memory, dtype=torch.uint8, count=info.end - info.start, offset=info.start))
        dtype = getattr(torch, DTYPES.get(info.dtype, ""), None)
        if dtype is None:
            raise ModelError(f"the tensor {name!r} is of type {info.dtype}, which is not read: get the file in another precision")
        if info.start == info.end:
            return torch.empty(info.shape, dtype=dtype)
        return torch.frombuffer(memory, dtype=torch.uint8, count=info.end - info.start, offset=info.start).view(dtype).reshape(info.shape)

    def release(self, tensor: Tensor) -> None:
        """Tell the system that a tensor of these files was copied: its pages may leave memory (they would be read again). Others are left alone."""
        from latentgen.models.quantise.packed import pieces

        for memory, first, last in filter(None, map(self._within, pieces(tensor) if hasattr(mmap, "MADV_DONTNEED") else ())):
            start, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                memory.madvise(mmap.MADV_DONTNEED, start, end - start)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in these files, and is no copy."""
        from latentgen.models.quantise.packed import pieces

        return self._within(pieces(tensor)[0]) is not None

    def _within(self, tensor: Tensor) -> tuple[mmap.mmap, int, int] | None:
        """The file's memory in which a tensor lies, and its first byte and the one after its last."""
        import torch

        if not tensor.numel():
            return None
        first = tensor.data_ptr()
        last = first + (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.element_size()
        bases = ((memory, torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()) for memory in self._maps)
        return next(((memory, first - base, last - base) for memory, base in bases if base <= first and last <= base + len(memory)), None)

    def check_same(self) -> None:
        """That the files are still as they were when they were opened. One that was removed, or replaced by another, is read as it was.

        Raises:
            ModelError: one was written to.
        """
        for path, then in self._opened:
            try:
                now = path.stat()
            except OSError:
                continue
            if (now.st_dev, now.st_ino) == (then.st_dev, then.st_ino) and (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
                raise ModelError(f"{where(path)} was changed while its weights were being read: load the model again")


def _of_blocks(info: TensorInfo, data: Tensor) -> Tensor:
    """The bytes of a tensor in blocks of ggml as it is; one whose rows are not whole blocks, or which is no matrix, unpacked in float32."""
    import torch

    from latentgen.models.quantise.packed import Ggml, Packed

    way, (numbers, size, _) = Ggml(info.dtype), BLOCKS[info.dtype]
    if len(info.shape) == 2 and info.shape[1] % numbers == 0:
        return Packed(way, {"codes": data.reshape(len(data) // size * numbers // info.shape[1], -1)}, info.shape)
    return torch.empty(info.shape, device="meta") if data.is_meta else way.unpack({"codes": data.reshape(-1, size)},
                                                                                  torch.float32).reshape(info.shape)


def without_numbers(info: TensorInfo) -> Tensor:
    """A tensor of a file on the meta device, as `LazyTensors` gives it."""
    import torch

    if info.dtype in BLOCKS:
        return _of_blocks(info, torch.empty(info.end - info.start, dtype=torch.uint8, device="meta"))
    return torch.empty(info.shape, dtype=getattr(torch, DTYPES.get(info.dtype, "float32")), device="meta")


def find_prefix(names: Collection[str], original: Original) -> str | None:
    """The prefix under which a file with these names holds the part, None if it does not."""
    for prefix in original.prefixes:
        if (prefix + original.unique in names) if original.unique else any(name.startswith(prefix) for name in names):
            return prefix
    return None


def part_tensors(tensors: Mapping[str, Tensor], part: Part, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The part's tensors out of an original single file, under the module's own names; only they are looked up.

    Views stay views (a joined projection that is split still lies in the file's mapping). What the converter leaves out stays under its own name, so
    that a strict load names it. Works on tensors of any device, "meta" included.

    Raises:
        ModelError: the file does not hold the part, lacks one of its tensors, or they do not fit the published layout.
    """
    if part.original is None:
        raise ModelError(f"no original single-file layout is known for {part.name}: give a folder in diffusers layout, or a file in its names")
    prefix = find_prefix(tensors.keys(), part.original)
    if prefix is None:
        wanted = part.original.prefixes[0] + part.original.unique
        raise ModelError(f"the file holds no {part.name} (there is no {wanted!r}): give that part from its own file")
    picked = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix) and not SURPLUS.search(name.removeprefix(prefix))}
    for old, new in MOVED:
        picked = {new + name.removeprefix(old) if name.startswith(old) else name: source for name, source in picked.items()}
    chosen = {name: tensors[source] for name, source in picked.items()}
    if part.original.convert:
        chosen = _converted(chosen, part, config)
    return _as_clip(chosen, config, projected="Projection" in part.cls) if part.cls.startswith("transformers.CLIPText") else chosen


def _converted(tensors: dict[str, Tensor], part: Part, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Call the declared converter, which empties the dict that it is given."""
    assert part.original is not None
    name = part.original.convert
    convert = _converter(name)
    prefix = INSISTS.get(name, "")
    given = {prefix + key: tensor for key, tensor in tensors.items()}
    offered = {"checkpoint": given, "config": dict(config), "prefix": prefix, "remove_prefix": prefix or None,
               "text_model": SimpleNamespace(config=SimpleNamespace(hidden_size=config.get("hidden_size")))}
    trace = _trace(tensors)
    try:
        with trace:
            made = convert(**{key: offered[key] for key in signature(convert).parameters if key in offered})
    except KeyError as error:
        raise ModelError(f"the {part.name} in this file lacks {error.args[0]!r}: the file is incomplete or of another kind, get it again") from error
    except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        what = shorten(str(error), 160)
        raise ModelError(f"the tensors of the {part.name} do not fit their published layout ({what}): it is damaged or of another kind") from error
    made = {key: tensor for key, tensor in made.items() if tensor is not None}  # converters fetch some names by .get
    used = trace.sources(made.values())
    return made | {key: tensor for key, tensor in tensors.items() if key not in used and key not in made}


def _converter(name: str) -> Callable[..., dict[str, Tensor]]:
    from diffusers.loaders import single_file_utils as published

    function = getattr(published, name, None) if name.startswith("convert_") else None
    if function is None or getattr(function, "__module__", "") != published.__name__:
        raise ModelError(f"the installed diffusers has no converter {name!r}: install a newer diffusers")
    return function


def _trace(tensors: Mapping[str, Tensor]) -> Any:
    """A context in which torch makes no needless copy and it is known which of the tensors each result came from."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Trace(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: dict[int, set[str]] = {}
            self.kept = list(tensors.values())  # an id is only good while its owner lives
            for name, tensor in tensors.items():
                self.names.setdefault(id(tensor), set()).add(name)

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.cat and len(args[0]) == 1:
                return args[0][0]
            if function in (torch.Tensor.clone, torch.Tensor.detach):
                return args[0]
            if function is torch.split and not isinstance(args[1], int):  # sizes spelt out for the published width
                args = (args[0], _in_proportion(args[1], args[0].shape[0]), *args[2:])
            result = function(*args, **(kwargs or {}))
            origin = set().union(*(self.names.get(id(a), set()) for a in _flat(args)))
            for made in _flat(result):
                if isinstance(made, torch.Tensor):
                    self.kept.append(made)
                    self.names[id(made)] = origin
            return result

        def sources(self, results: Collection[Tensor]) -> set[str]:
            return set().union(*(self.names.get(id(tensor), set()) for tensor in results))

    return Trace()


def _flat(values: Any) -> list[Any]:
    """Tensors in arguments or results, one level of nesting deep."""
    values = values if isinstance(values, (tuple, list)) else (values,)
    return [inner for value in values for inner in (value if isinstance(value, (tuple, list)) else (value,))]


def _in_proportion(sizes: Sequence[int], rows: int) -> list[int]:
    """Sizes that fill the rows in the same proportion; as given where they do already or cannot."""
    whole = sum(sizes)
    return [size * rows // whole for size in sizes] if all(size * rows % whole == 0 for size in sizes) else list(sizes)


def _as_clip(tensors: dict[str, Tensor], config: Mapping[str, Any], *, projected: bool) -> dict[str, Tensor]:
    """What a CLIP text class takes: no layer past those that its config counts, a projection only where it has one, and `text_model.` beside that."""
    import torch

    layers, width = config.get("num_hidden_layers"), config.get("hidden_size")
    kept = {}
    for name, tensor in tensors.items():
        layer = re.match(r"(?:text_model\.)?encoder\.layers\.(\d+)\.", name)
        past = layers is not None and layer is not None and int(layer[1]) >= layers
        if past or (name.startswith("text_projection") and not projected):
            log.debug("%s is in the file and of no use to this encoder", name)
            continue
        bare = name.removeprefix("text_model.")
        kept[f"text_model.{bare}" if projected and not bare.startswith("text_projection") else bare] = tensor
    if projected and kept and "text_projection.weight" not in kept and config.get("projection_dim") == width:
        like = next(iter(kept.values()))  # files that leave the projection out mean the identity
        kept["text_projection.weight"] = torch.eye(width, dtype=like.dtype, device=like.device)
    return kept


def as_module_names(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, str]:
    """Older spellings of the names that a module wants (attention of autoencoders, `text_model.`, language models inside vision models).

    Returns:
        name in the module -> name in the file, for every tensor of the file but those that no module has; unknown names stand for themselves.
    """
    wanted = set(wanted)
    found: dict[str, str] = {name: name for name in tensors if name in wanted}
    for name in tensors:
        if name in wanted or SURPLUS.search(name):
            continue
        newer = (re.sub(old, new, name) for old, new in SPELLINGS)
        found[next((n for n in newer if n in wanted and n not in found), name)] = name
    return found


class _Dequantised(_Named):
    """See `dequantised`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._scales: dict[str, str] = {}  # name of a weight -> name of its scale
        for name in tensors:
            stem = name.removesuffix("scale_weight") + "weight" if name.endswith(".scale_weight") else name.removesuffix("_scale")
            if name.endswith((".scale_weight", ".weight_scale")) and stem in tensors:
                self._scales[stem] = name
        hidden = set(self._scales.values())
        self._names = {name: None for name in tensors if name not in hidden and not MARKS.search(name)}

    def __getitem__(self, name: str) -> Tensor:
        import torch

        from latentgen.models.quantise.packed import Packed
        from latentgen.models.quantise.ways import WAYS

        if name not in self._names:
            raise KeyError(name)
        tensor = self._tensors[name]
        small = tensor.is_floating_point() and tensor.element_size() == 1
        if name not in self._scales:
            return tensor if not small else Packed(WAYS["fp8"], {"codes": tensor}, tensor.shape) if tensor.ndim == 2 else tensor.to(torch.float32)
        scale = self._tensors[self._scales[name]].to(torch.float32)
        rows = scale.numel() == scale.shape[0] == tensor.shape[0] if scale.ndim else False
        if tensor.dtype == torch.uint8 or not (scale.numel() == 1 or rows):
            raise ModelError(f"{name!r} is packed as {tensor.dtype} with a scale of shape {tuple(scale.shape)}: expected 8-bit floats with one "
                             "scale, or one for each row; get the file in another precision")
        scale = scale.reshape(-1, *[1] * (tensor.ndim - 1)).expand(len(tensor), *[1] * (tensor.ndim - 1)).contiguous()
        return Packed(WAYS["fp8"], {"codes": tensor, "scale": scale},
                      tensor.shape) if small and tensor.ndim == 2 else tensor.to(torch.float32) * scale


def dequantised(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same tensors, matrices of 8-bit floats `Packed` with their scales (`X.scale_weight` or `X.weight_scale`), and other 8-bit floats unpacked
    to float32; scales and marks are gone.

    Each is computed when it is looked up and not kept. Tensors of 16 bits and more are passed on as they are.

    Raises:
        ModelError: on look-up, of a weight that is packed in another way (4 bits, scales of blocks).
    """
    return _Dequantised(tensors)
