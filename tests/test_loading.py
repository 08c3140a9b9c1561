"""Weights on their way from a file into a network: the same bits as the plain way, made when they are used, looked through, and in memory once."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import MAKERS, tiny
from torch import nn

import latentgen
from latentgen.errors import ModelError
from latentgen.importing import uncollected
from latentgen.models import cast
from latentgen.models.cast import NotFinite, check_finite, recast
from latentgen.models.convert import LazyTensors
from latentgen.models.empty import Empty
from latentgen.models.fast import onednn, swap
from latentgen.models.fast.layers import Kernel, PackedConv2d, PackedLinear
from latentgen.models.load import load_part
from latentgen.models.promised import Promised

KINDS = ("sd15", "sd3", "flux1", "pixart", "qwenimage")
packed_here = pytest.mark.skipif(not onednn.available(), reason="this torch or processor has no packed bf16 products")
every = torch.arange(-(2**15), 2**15).to(torch.int16)


def dice(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("piece", [2**18, 1000])
@pytest.mark.parametrize(("stored", "dtype"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float16, torch.float32)])
def test_every_half_number_is_cast_as_torch_casts_it(stored: torch.dtype, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cast, "PIECE", piece)
    numbers = every.view(stored)
    numbers = numbers[numbers.to(dtype).isfinite()]
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(recast(numbers, dtype).view(whole), numbers.to(dtype).view(whole)) and len(numbers) > 2**15


@pytest.mark.parametrize("piece", [2**18, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_shapes_and_orders_come_out_as_torch_has_them(stored: torch.dtype, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cast, "PIECE", piece)
    weight = dice(12, 5, 3, 3).to(stored)
    for tensor in (weight, weight[4:9], weight[:, 2:4], weight.transpose(0, 1), dice(7, 4, 1, 1).to(stored)):
        made, wanted = recast(tensor, dtype, layout=torch.channels_last), tensor.to(dtype).contiguous(memory_format=torch.channels_last)
        assert torch.equal(made, wanted) and made.is_contiguous(memory_format=torch.channels_last) and made.dtype == dtype
    for tensor in (dice(40, 30).to(stored), dice(40, 30).to(stored)[3:30], dice(40, 30).to(stored).t(), dice(1).to(stored)[0], dice(0, 3).to(stored)):
        made = recast(tensor, dtype)
        assert torch.equal(made, tensor.to(dtype)) and made.stride() == tensor.to(dtype).stride()
        assert made.data_ptr() != tensor.data_ptr() or not made.numel()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e6])
def test_one_bad_number_in_any_piece_is_found(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cast, "PIECE", 64)
    for at in (0, 333, 719):
        weight = dice(16, 5, 3, 3)
        weight.view(-1)[at] = bad
        for layout in (torch.channels_last, torch.preserve_format):
            with pytest.raises(NotFinite):
                recast(weight, torch.float16, layout=layout)  # in which 1e6 is infinite
        assert recast(weight, torch.float16, check=False).view(-1)[at].isfinite().item() is False
        if bad != 1e6:
            with pytest.raises(NotFinite):
                check_finite(weight)
    recast(dice(16, 5, 3, 3), torch.float16)


def test_which_tensors_lie_in_a_file(tmp_path: Path) -> None:
    save_file({"a": dice(6, 4), "b": dice(3)}, tmp_path / "one.safetensors")
    tensors = LazyTensors(tmp_path / "one.safetensors")
    assert tensors.holds(tensors["a"]) and tensors.holds(tensors["a"][2:]) and tensors.holds(tensors["a"].t())
    assert not tensors.holds(tensors["a"].clone()) and not tensors.holds(dice(3)) and not tensors.holds(tensors["a"][:0])


@packed_here
def test_a_promised_weight_is_made_once_by_whoever_comes_first() -> None:
    told: list[str] = []
    stored = dice(64, 48).half()

    def ready(tensor: torch.Tensor) -> torch.Tensor:
        told.append("made")
        return recast(tensor, torch.bfloat16)

    promised = Promised(torch.empty(64, 48, dtype=torch.bfloat16, device="meta"), stored, ready=ready, release=lambda tensor: told.append("released"))
    kernel = Kernel(promised)
    assert (kernel.shape, kernel.dtype, kernel.bytes) == ((64, 48), torch.bfloat16, 0)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: kernel.get(None, onednn.pack_linear), range(32)))
    assert told == ["made", "released"] and len({id(f) for f in found}) == 1 and kernel.bytes == 2 * 64 * 48
    assert torch.equal(onednn.unpacked(found[0]), stored.bfloat16())
    assert torch.equal(promised.rows(slice(8, 16)).made(), stored[8:16].bfloat16()) and promised.rows(slice(8, 16)).shape == (8, 48)
    assert torch.equal(Kernel(promised).any, stored.bfloat16())


def test_what_a_weight_takes_may_be_asked_while_another_thread_packs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "order", lambda packed: b"one")
    monkeypatch.setattr(onednn, "unpacked", lambda packed: packed)
    kernel, often = Kernel(torch.zeros(4, 2)), sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(1) as pool:
            packing = pool.submit(lambda: [kernel.get(size, lambda plain: plain) for size in range(20000)])
            while not packing.done():
                assert kernel.bytes == 4 * 4 * 2
            packing.result()
    finally:
        sys.setswitchinterval(often)


# networks

@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny(kind).save(tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


def halved(place: Path, new: Path) -> Path:
    """A checkpoint with its weights in float16."""
    shutil.copytree(place, new)
    for file in new.rglob("*.safetensors"):
        save_file({name: t.half() if t.is_floating_point() else t for name, t in load_file(file).items()}, file, {"format": "pt"})
    return new


load = partial(latentgen.load, device="cpu", dtype="bfloat16", progress=False)


def draw(pipe: Any) -> Any:
    return pipe.txt2img("a red heart", steps=1, seed=1, width=64, height=64)


@packed_here
@pytest.mark.parametrize(("kind", "halves"), [("sd15", False), *((kind, True) for kind in KINDS)])
def test_a_promised_network_makes_the_very_picture_of_one_that_was_cast_at_once(kind: str, halves: bool, folder: Any, tmp_path: Path,
                                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    place = halved(folder(kind), tmp_path / "half") if halves else folder(kind)
    made = draw(load(place))
    monkeypatch.setattr("latentgen.run.residency.promised", lambda module, **machine: ())
    at_once = draw(load(place))
    assert torch.equal(made.latents, at_once.latents) and made.image.tobytes() == at_once.image.tobytes()


@packed_here
def test_8_bit_floats_are_promised_likewise(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = shutil.copytree(folder("flux1"), tmp_path / "eight")
    file = next((place / "transformer").glob("*.safetensors"))
    save_file({name: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for name, t in load_file(file).items()}, file, {"format": "pt"})
    pipe = load(place)
    with pipe.residency.use("denoiser") as modules:
        kernels = [m.kernel for m in modules["transformer"].modules() if isinstance(m, PackedLinear)]
        assert kernels and all(isinstance(kernel.plain, Promised) for kernel in kernels)
    made = draw(pipe)
    monkeypatch.setattr("latentgen.run.residency.promised", lambda module, **machine: ())
    assert torch.equal(made.latents, draw(load(place)).latents)


@packed_here
def test_by_stage_it_is_promised_anew(folder: Any) -> None:
    pipe, resident = load(folder("sd15"), residency="stage"), load(folder("sd15"))
    for _ in range(2):
        assert torch.equal(draw(pipe).latents, draw(resident).latents) and pipe.residency.resident_bytes() == 0


@packed_here
def test_loading_makes_no_weight_that_is_packed_later(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(folder("sd15"))
    with pipe.residency.use("denoiser") as modules, pipe.residency.use("decoder") as more:
        held = pipe.residency.resident_bytes()
        kernels = [m.kernel for net in (*modules.values(), *more.values()) for m in net.modules() if isinstance(m, (PackedLinear, PackedConv2d))]
        assert kernels and all(isinstance(kernel.plain, Promised) for kernel in kernels)
        assert not any(p.is_meta for net in (*modules.values(), *more.values()) for p in (*net.parameters(), *net.buffers()))
    draw(pipe)
    assert pipe.residency.resident_bytes() > 5 * held
    with pipe.residency.use("decoder") as more:
        encoder = [m.kernel for m in more["vae"].encoder.modules() if isinstance(m, (PackedLinear, PackedConv2d))]
    assert encoder and all(isinstance(kernel.plain, Promised) for kernel in encoder), "which no picture from words asks for"


@pytest.mark.parametrize("said", [{"dtype": "float32"}, {"speed": "plain"}, {"residency": "disk"}])
def test_where_nothing_is_packed_nothing_is_promised(said: dict[str, Any], folder: Any) -> None:
    pipe = load(folder("sd15"), **said)
    with pipe.residency.use("denoiser") as modules:
        assert not any(isinstance(p, Promised) for p in modules["unet"].parameters())


@packed_here
def test_a_bad_number_is_found_when_its_weight_is_made(folder: Any, tmp_path: Path) -> None:
    place = halved(folder("sd15"), tmp_path / "bad")
    file = next((place / "unet").glob("*.safetensors"))
    weights = load_file(file)
    weights["conv_out.weight"].view(-1)[5] = float("nan")
    save_file(weights, file, {"format": "pt"})
    pipe = load(place)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"1 tensors of .*unet have NaN or infinite weights \(first 'conv_out.weight'\): get the file again"):
            draw(pipe)


@packed_here
def test_a_file_that_is_written_to_is_refused_and_one_that_is_replaced_is_not(folder: Any, tmp_path: Path) -> None:
    place = halved(folder("sd15"), tmp_path / "own")
    wanted = draw(load(place))
    for change in ("replace", "remove", "write"):
        pipe = load(place)
        for stage in ("text", "encoder", "denoiser", "decoder"):
            with pipe.residency.use(stage):
                pass
        pipe.residency.check()
        file = next((place / "unet").glob("*.safetensors"))
        if change == "write":
            with open(file, "r+b") as handle:
                handle.truncate(file.stat().st_size // 2)
            with pytest.raises(ModelError, match=r"unet/diffusion_pytorch_model.safetensors was changed while its weights were being read: load the model again"):
                draw(pipe)
            continue
        kept = shutil.copy(file, tmp_path / "kept")
        file.unlink()
        if change == "replace":
            file.write_bytes(b"another file")
        assert torch.equal(draw(pipe).latents, wanted.latents)
        os.replace(kept, file)


@packed_here
def test_a_part_that_could_not_be_made_fast_is_loaded_anew(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(module: Any, **machine: Any) -> Any:
        if type(module).__name__.startswith("UNet"):
            raise RuntimeError("no more of this")
        return swap.prepare(module, **machine)

    pipe = load(folder("sd15"))
    with monkeypatch.context() as change, pytest.raises(RuntimeError, match="no more of this"):
        change.setattr("latentgen.run.residency.prepare", prepare)
        draw(pipe)
    assert torch.equal(draw(pipe).latents, draw(load(folder("sd15"))).latents)


@packed_here
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="what is in memory is read from Linux")
def test_pages_of_the_file_leave_memory_when_a_weight_was_made(tmp_path: Path) -> None:
    def resident() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        return sum(int(next(row for row in lines[n:] if row.startswith("Rss:")).split()[1]) for n, line in enumerate(lines) if line.endswith(str(file)))

    file = tmp_path / "one.safetensors"
    save_file({"weight": dice(1024, 1024).half()}, file)
    tensors = LazyTensors(file)
    promised = Promised(torch.empty(1024, 1024, dtype=torch.bfloat16, device="meta"), tensors["weight"], ready=lambda t: recast(t, torch.bfloat16),
                        release=tensors.release)
    assert promised.made().shape == (1024, 1024) and resident() > 2000  # kB
    Kernel(promised).get(None, onednn.pack_linear)
    assert resident() < 200


# modules without numbers

def test_a_module_is_made_blank_and_draws_nothing() -> None:
    """What is computed is real, also where it is computed by the functions that fill parameters."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.conv, self.norm, self.words = nn.Linear(4, 4), nn.Conv2d(2, 2, 3), nn.GroupNorm(1, 4), nn.Embedding(9, 4)
            self.token = nn.Parameter(torch.randn(3))
            nn.init.trunc_normal_(self.linear.weight, std=0.02)
            nn.init.xavier_uniform_(self.conv.weight)
            self.table = torch.arange(4.0)
            self.register_buffer("ones", nn.init.constant_(torch.zeros(3), 2.0), persistent=False)

    before = torch.get_rng_state()
    with Empty():
        made = Own()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.is_meta and isinstance(p, nn.Parameter) for p in made.parameters())
    assert made.table.tolist() == [0, 1, 2, 3] and made.ones.tolist() == [2, 2, 2]
    assert not nn.Linear(2, 2).weight.is_meta


def test_other_threads_make_whole_modules_meanwhile() -> None:
    inside, done = Event(), Event()

    def blank() -> nn.Module:
        with Empty():
            inside.set()
            assert done.wait(20)
            return nn.Linear(3, 3)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(blank)
        assert inside.wait(20)
        whole = nn.Linear(3, 3)
        done.set()
        assert other.result().weight.is_meta and not whole.weight.is_meta and whole.weight.abs().sum() > 0


@pytest.mark.parametrize("kind", MAKERS)
def test_loading_draws_no_random_number_and_gives_what_the_files_hold(kind: str, folder: Any) -> None:
    pipe = latentgen.load(folder(kind), device="cpu", dtype="float32", speed="plain", progress=False)
    before = torch.get_rng_state()
    for part in pipe.family.parts:
        source = pipe.checkpoint.sources[part.name]
        module = load_part(source, part, torch.float32)
        stored = LazyTensors(*source.files)
        assert not any(t.is_meta for t in (*module.parameters(), *module.buffers()))
        assert all(torch.equal(tensor, stored[name]) for name, tensor in module.state_dict().items() if name in stored)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_collector_waits_for_imports_and_no_longer() -> None:
    assert gc.isenabled()
    with pytest.raises(ImportError), uncollected():
        assert not gc.isenabled()
        with uncollected():  # in another thread, say
            pass
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert {id(one) for one in made} <= {id(one) for one in gc.get_objects(generation=2)}
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled(), "the program's own choice"
    finally:
        gc.enable()
