"""Where modules are while a request runs. The only place that moves a module between devices or drops one; knows no request.

Policies, from the fastest to the smallest:
- "resident" keeps every part on the device once it was needed.
- "stage" has a part there only while its stage runs: on a GPU it waits in main memory, on a CPU it is read again from its memory-mapped file.
- "stream" brings the blocks of denoiser and text encoders one after the other, the next while one computes; they wait in main memory.
- "disk" reads each block from its memory-mapped file and drops it. On a CPU, whose memory is main memory, "stream" is the same.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

import torch

from latentgen.errors import RequestError
from latentgen.models.checkpoint import Checkpoint
from latentgen.models.family import Part, Stage
from latentgen.models.fast.graphs import GRAPHS
from latentgen.models.fast.kernels import Table, attend_by
from latentgen.models.fast.swap import held_bytes, prepare, promised
from latentgen.models.load import load_part
from latentgen.models.modulation import modulation_names
from latentgen.models.quantise.ways import CHOICES, STORED, allowed
from latentgen.models.streamed import Lane, on_lane

if TYPE_CHECKING:
    from torch import nn

POLICIES = ("resident", "stage", "stream", "disk")
STREAMING = ("stream", "disk")
QUANTISED: frozenset[Stage] = frozenset(("text", "denoiser"))  # stages whose parts are held in fewer bits where that is asked for
STREAMED: tuple[Stage, ...] = ("text", "denoiser")  # stages whose parts are worth streaming
Key = tuple[str, torch.dtype, bool, str | None]  # name of a part, dtype, whether its blocks are streamed, how the weights of its linears are held
OWN = "own"  # as the pipeline was loaded
SPEEDS = ("exact", "plain", GRAPHS)
COMPILED = "compiled"  # what a pipeline's speed is instead where the networks are compiled


class Residency:
    """The parts of one checkpoint on one device."""

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, policy: str = "resident", speed: str = "plain",
                 quantise: str | None = None, attention: Table | None = None) -> None:
        self.checkpoint, self.device, self.dtype, self.policy, self.speed, self.quantise = checkpoint, device, dtype, policy, speed, quantise
        self.attention = attention or {}
        self._here: dict[Key, nn.Module] = {}
        self._users: dict[Key, int] = {}
        self._lock = Lock()
        self._checked = False

    def check(self) -> None:
        """Once, before the first weights are read: every part's tensors fit its config, from headers alone.

        Raises:
            ModelError: a part does not fit.
        """
        with self._lock:
            if not self._checked:
                self.checkpoint.check()
                # now, so that the recipe names these weights and a finished picture cannot be lost to a file that went
                self.checkpoint.digest  # noqa: B018
                self._checked = True

    @contextmanager
    def use(self, stage: Stage, *, dtype: torch.dtype | None = None, policy: str | None = None,
            quantise: str | None = OWN) -> Iterator[dict[str, nn.Module]]:
        """The modules of a stage, on the device, for as long as the block runs. Several threads may be in the same block.

        Args:
            policy, quantise: others than the pipeline's own, for this once.
        """
        dtype, policy = dtype or self.dtype, policy or self.policy
        way = self.quantise if quantise == OWN else quantise
        if dtype != self.dtype and policy not in STREAMING and stage in STREAMED and not self.room(stage, dtype):
            policy = "stream"  # a second copy, of larger numbers, comes block by block
        parts: dict[Part, Key] = {p: (p.name, dtype, policy in STREAMING and stage in STREAMED, way if QUANTISED & {*p.stages} else None)
                                  for p in self.checkpoint.family.parts if stage in p.stages}
        if policy != "resident":
            self._retire(policy, but=frozenset(parts.values()))
        self._drop_others(parts.values())
        taken: list[Key] = []
        modules: dict[str, nn.Module] = {}
        try:
            for part, key in parts.items():
                modules[part.name] = self._take(part, key, policy)
                taken.append(key)
            yield modules
        except Exception as error:
            if not hasattr(error, "stage"):
                error.stage = stage  # type: ignore[attr-defined]  # where memory ran out, if that it was
            raise
        finally:
            for key in taken:
                self._release(key, policy)

    def _take(self, part: Part, key: Key, policy: str) -> nn.Module:
        with self._lock:
            if fresh := key not in self._here:
                self._here[key] = self._loaded(part, key, policy)
            if not self._users.get(key) and (fresh or self.device.type != "cpu"):  # what never left a CPU need not be looked through
                self._here[key].to(self.device)
            self._users[key] = self._users.get(key, 0) + 1
            return on_lane(self._here[key], Lane(self.device)) if key[2] else self._here[key]

    def _loaded(self, part: Part, key: Key, policy: str) -> nn.Module:
        _, dtype, streamed, way = key
        once = policy != "resident" and self.speed == "exact"  # a run asks for their answers once, before its first step
        module = load_part(self.checkpoint.sources[part.name], part, dtype, leave=modulation_names if once else None,
                           later=None if streamed else partial(promised, speed=self.speed, device=self.device, dtype=dtype),
                           lane=Lane(self.device) if streamed else None, pinned=policy == "stream" and self.device.type == "cuda", quantise=way)
        if not streamed:  # streamed weights come and go as they lie in their file
            module = prepare(module, speed=self.speed, device=self.device)
        return attend_by(module, self.attention) if self.attention and part.cls.startswith("diffusers.") else module

    def _release(self, key: Key, policy: str) -> None:
        with self._lock:
            self._users[key] -= 1
            if not self._users[key] and not (policy == "resident" and key[1] == self.dtype):
                self._away(key, policy)

    def _away(self, key: Key, policy: str) -> None:
        """Off the device: into main memory where that is another, else dropped, for its file has it. A copy in another dtype is never kept."""
        if self.device.type == "cpu" or key[1] != self.dtype or policy == "disk":
            del self._here[key]
        else:
            self._here[key].to("cpu")

    def _retire(self, policy: str, but: Collection[Key]) -> None:
        """Take off the device what nobody uses and other policies left there."""
        with self._lock:
            for key in [key for key in self._here if not self._users.get(key) and key not in but]:
                self._away(key, policy)

    def _drop_others(self, wanted: Collection[Key]) -> None:
        """Drop what nobody uses of these parts and holds their weights in another way."""
        with self._lock:
            for key in [key for key in self._here if not self._users.get(key) and any(key[:2] == w[:2] and key[3] != w[3] for w in wanted)]:
                del self._here[key]

    def clear(self) -> None:
        """Drop what nobody uses, from all memory."""
        with self._lock:
            for key in [key for key in self._here if not self._users.get(key)]:
                del self._here[key]
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def room(self, stage: Stage, dtype: torch.dtype) -> bool:
        """Whether the weights of a stage fit once more in that dtype beside what is there: of a GPU, whose memory is told; elsewhere it is tried."""
        if self.device.type != "cuda":
            return True
        stored = torch.finfo(self.dtype).bits // 8
        with self._lock:
            here = {key[0]: sum(p.numel() for p in module.parameters()) for key, module in self._here.items() if key[1] == self.dtype}
        parts = [part for part in self.checkpoint.family.parts if stage in part.stages]
        numbers = sum(here.get(part.name) or self.checkpoint.sources[part.name].weight_bytes(part) // stored for part in parts)
        spare = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return numbers * torch.finfo(dtype).bits // 8 <= torch.cuda.mem_get_info(self.device)[0] + spare

    def resident_bytes(self, device: torch.device | None = None) -> int:
        """Bytes of the weights held right now, on one device or on any."""
        with self._lock:
            there = [m for m in self._here.values() if device is None or next((p.device.type for p in m.parameters()), None) == device.type]
            return sum(map(held_bytes, there))


def check_graphs(device: torch.device, residency: str, *, alone: bool) -> None:
    """Whether calls of networks can be captured in such a pipeline; alone: nothing is compiled, and no other process makes the picture too.

    Raises:
        RequestError: they cannot.
    """
    if device.type != "cuda":
        raise RequestError(f"speed is 'graphs', which needs a CUDA device, and this is for {device.type}: use speed='exact'")
    if residency in STREAMING:
        raise RequestError(f"speed is 'graphs' with residency={residency!r}, whose weights come and go: use 'resident', or speed='exact'")
    if not alone:
        raise RequestError("speed is 'graphs' with compile or parallel: expected networks as they are and one process, so leave those out")


def ways_of(checkpoint: Checkpoint, said: str | None) -> tuple[str | None, ...]:
    """The ways in which the weights of a checkpoint may be held, of what was asked for (see `latentgen.models.quantise.ways.allowed`).

    Raises:
        RequestError: no such way, or there is nothing to leave packed.
    """
    if said not in (None, *CHOICES):
        raise RequestError(f"quantise is {said!r}: expected {', '.join(map(repr, CHOICES))}, or None")
    packed = any(checkpoint.sources[part.name].packing for part in checkpoint.family.parts if QUANTISED & {*part.stages})
    if said == STORED and not packed:
        raise RequestError(f"quantise is 'stored' but the files of {checkpoint.name} have nothing packed: leave it out, or say 'int8'")
    return allowed(said, packed=packed)


def choose_device(name: str) -> torch.device:
    """"auto" (cuda, then mps, then cpu) or a torch device name.

    Raises:
        RequestError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(str(name))
    except RuntimeError:
        raise RequestError(f"device is {name!r}: expected 'auto', 'cpu', 'cuda', 'cuda:0' or 'mps'") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(device.type, 0)
    if (device.index or 0) >= count:
        raise RequestError(f"device is {name!r}, which this machine does not have: use 'auto' or 'cpu'")
    return torch.device("cpu") if device.type == "cpu" else device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """"auto" or float32, bfloat16, float16. Auto: bf16 where the hardware multiplies it fast, else fp16 on a GPU and fp32 on a CPU.

    Raises:
        RequestError: another name.
    """
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name in names:
        return names[name]
    if name != "auto":
        raise RequestError(f"dtype is {name!r}: expected 'auto', {', '.join(map(repr, names))}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu":
        fast = any(getattr(torch.cpu, probe, bool)() for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        return torch.bfloat16 if fast else torch.float32
    return torch.float16
