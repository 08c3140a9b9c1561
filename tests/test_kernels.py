"""Attention kernels by a table: which one is taken, what it computes, how the table is measured and kept, and that recipes name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_gpu
import pytest
import torch
from conftest import make_tiny
from fake_gpu import GPU
from tiny_folders import tiny
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

import latentgen
from latentgen.errors import RequestError
from latentgen.models.fast.kernels import KERNELS, attend_by, by_table, kind_of, kinds, plain, takes
from latentgen.run import attention
from latentgen.run.attention import attention_of, fastest, measured
from latentgen.run.kept import read_kept
from latentgen.run.pipeline import Pipeline
from latentgen.run.recipe import speed_of

CPU, HALF = torch.device("cpu"), torch.bfloat16
ALL = dict.fromkeys(kinds(), "math")


def tensors(n: int = 6, m: int = 9, d: int = 8, *, dtype: torch.dtype = torch.float32, heads: int = 2, device: Any = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    dice = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, count, heads, d, generator=dice).to(device, dtype).transpose(1, 2) for count in (n, m, m))  # as networks lay them out


def test_kinds_are_told_by_shapes() -> None:
    assert len(kinds()) == 6
    for shapes, kind in (((4096, 77, 40), "64 short"), ((4096, 4096, 64), "64 long"), ((64, 512, 65), "128 long"), ((64, 511, 129), "256 short"), ((64, 64, 512), None)):
        n, m, d = shapes
        assert kind_of(torch.empty(1, 1, n, d, device="meta"), torch.empty(1, 1, m, d, device="meta")) == kind


@pytest.mark.parametrize("scale", [None, 0.3])
def test_plain_is_attention(scale: float | None) -> None:
    q, k, v = tensors()
    assert torch.allclose(plain(q, k, v, scale), scaled_dot_product_attention(q, k, v, scale=scale), atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shapes", [(64, 77, 40), (64, 64, 64), (16, 16, 128)], ids=str)
def test_every_kernel_is_called_as_torch_declares_it(kernel: str, shapes: tuple[int, int, int]) -> None:
    """On a device that is made up: the private names are there, take what they are given, and answer in the right shape and dtype."""
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.empty(2, count, 8, shapes[2], device=GPU, dtype=HALF).transpose(1, 2) for count in (shapes[0], shapes[1], shapes[1]))
        assert takes(kernel, q, k, v)
        made = KERNELS[kernel](q, k, v, 0.2)
        assert made.shape == q.shape and made.dtype == q.dtype and made.device == GPU


def test_a_kernel_is_not_given_what_it_cannot_take() -> None:
    good = tensors(d=16, dtype=HALF)
    assert all(takes(kernel, *good) for kernel in KERNELS)
    odd, single, wide, deep = tensors(d=20, dtype=HALF), tensors(d=16), tensors(d=160, dtype=HALF), tensors(d=264, dtype=HALF)
    apart = tuple(t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in good)
    grouped = good[0], good[1][:, :1], good[2][:, :1]
    only = {name: {kernel for kernel in KERNELS if takes(kernel, *given)} for name, given in
            {"odd": odd, "single": single, "wide": wide, "deep": deep, "apart": apart, "grouped": grouped, "one": tensors(n=1, d=16, dtype=HALF)}.items()}
    assert only == {"odd": {"math"}, "single": {"math", "efficient"}, "wide": {"math", "flash", "efficient"}, "deep": {"math"}, "apart": {"math"}, "grouped": set(), "one": {"math"}}
    assert by_table({}, *good) is None and by_table({"64 short": "cudnn"}, *good) is KERNELS["cudnn"] and by_table({"64 short": "cudnn"}, *odd) is None
    assert by_table(ALL, *tensors(d=512)) is None


def clock(times: dict[str, float]) -> Any:
    """Seconds by the name of the kernel that runs, without running it; the kinds in order, four kernels after PyTorch's own choice."""
    def seconds(call: Any, device: torch.device) -> float:
        kernel = (call.__defaults__ or ())[2:]
        return times[next((name for name, one in KERNELS.items() if kernel and one is kernel[0]), "own")]

    return seconds


@pytest.mark.parametrize("times, best", [({"own": 1.0, "flash": 1.0, "cudnn": 0.6, "efficient": 2.0, "math": 9.0}, "cudnn"),
                                         ({"own": 1.0, "flash": 0.97, "cudnn": 1.2, "efficient": 2.0, "math": 9.0}, None),
                                         ({"own": 5.0, "flash": 7.0, "cudnn": 7.0, "efficient": 2.0, "math": 9.0}, "efficient")])
def test_the_fastest_is_taken_where_it_is_clearly_faster(times: dict[str, float], best: str | None) -> None:
    table = fastest(CPU, HALF, seconds=clock(times))
    wide = dict.fromkeys(("256 short", "256 long"), None if best == "cudnn" else best)  # no head of cuDNN's is so wide
    assert table == {kind: name for kind in kinds() if (name := wide.get(kind, best)) is not None}


def test_a_table_is_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATENTGEN_CONFIG", str(tmp_path / "config"))
    made = [{"64 long": "cudnn"}, {"64 long": "flash"}]
    monkeypatch.setattr(attention, "fastest", lambda device, dtype: made.pop(0))
    assert measured(CPU, HALF) == measured(CPU, HALF) == {"64 long": "cudnn"} and len(made) == 1
    (key,) = read_kept("attention")
    assert "bfloat16" in key and torch.__version__ in key
    assert measured(CPU, torch.float16) == {"64 long": "flash"}
    (tmp_path / "config" / "attention.json").write_text('{"%s": {"64 long": "sage"}}' % key)
    made.append({})
    assert measured(CPU, HALF) == {}  # what no kernel is called is measured again


def test_what_cannot_be_kept_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATENTGEN_CONFIG", str(tmp_path / "file" / "config"))
    monkeypatch.setattr(attention, "fastest", lambda device, dtype: {"64 long": "cudnn"})
    assert measured(CPU, HALF) == {} and "cannot be kept" in caplog.text


def test_kernels_that_a_build_does_not_have_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, which has none but the plain one: by the clock itself."""
    monkeypatch.setattr(attention, "PICTURE", 16)
    monkeypatch.setattr(attention, "WORDS", 8)
    assert set(fastest(CPU, HALF).values()) <= {"math"}


def test_what_was_said_is_a_table_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert attention_of(None, CPU, HALF, alone=True) == {} and attention_of("flash", gpu, HALF, alone=True) == dict.fromkeys(kinds(), "flash")
    assert attention_of({"64 long": "cudnn"}, gpu, HALF, alone=True) == {"64 long": "cudnn"}
    monkeypatch.setattr(attention, "measured", lambda device, dtype: {"64 short": "efficient"})
    assert attention_of("measured", gpu, HALF, alone=True) == {"64 short": "efficient"}
    for said, device, alone, words in (("sage", gpu, True, "'flash', 'cudnn'"), ({"32 long": "flash"}, gpu, True, "64 short"), (3, gpu, True, "attention is 3"),
                                       ("flash", CPU, True, "this is for cpu"), ("flash", gpu, False, "choose for themselves")):
        with pytest.raises(RequestError, match=words):
            attention_of(said, device, HALF, alone=alone)  # type: ignore[arg-type]


def test_a_run_takes_the_table_and_its_recipe_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plainly = latentgen.load(make_tiny(tmp_path / "tiny"), dtype="float32", device="cpu", progress=False)
    said, calls = {"steps": 2, "seed": 0, "width": 64, "height": 64}, []
    other = Pipeline(plainly.checkpoint, device=CPU, dtype=torch.float32, attention=ALL, progress=False)
    monkeypatch.setitem(KERNELS, "math", lambda *given: calls.append(given) or plain(*given))  # type: ignore[arg-type]
    first, second = (pipe.txt2img("a cat", **said) for pipe in (plainly, other))
    assert calls and torch.allclose(first.latents, second.latents, atol=1e-4)
    assert second.recipe["attention"] == ALL and "attention" not in first.recipe and "64 short math" in str(second.plan)
    assert "attention" not in speed_of(second.recipe)  # here is no device that could take it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert speed_of(second.recipe)["attention"] == ALL
    with pytest.raises(RequestError, match="plan it here"):
        other.stream(plainly.plan("a cat", **said))


@pytest.mark.parametrize("kind, heads", [("sdxl", 32), ("sd3", 6), ("flux1", 4), ("zimage", 16), ("pixart", 2)])
def test_whole_networks_reach_the_kernel_on_a_device_that_is_made_up(kind: str, heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps in bfloat16: every attention without a mask is given to it, in a layout that it takes, and no step waits for it."""
    calls: list[Tensor] = []
    real, copied = KERNELS["flash"], fake_gpu.deepcopy
    monkeypatch.setitem(KERNELS, "flash", lambda q, k, v, scale=None: (calls.append(q), real(q, k, v, scale))[1])  # type: ignore[arg-type]
    monkeypatch.setattr(fake_gpu, "deepcopy", lambda net: attend_by(copied(net), dict.fromkeys(kinds(), "flash")))
    pipe = latentgen.load(tiny(kind).save(tmp_path / kind), dtype="bfloat16", device="cpu", speed="plain", progress=False)
    _, second = fake_gpu.waited(pipe, pipe.plan("a cat", steps=2, seed=0, width=64, height=64))
    assert len(calls) == heads and all(q.device == GPU and q.dtype == HALF for q in calls) and not second


def test_networks_keep_their_processors_names() -> None:
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(sample_size=8, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
                               down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    before = {name: type(one).__name__ for name, one in net.attn_processors.items()}
    assert {name: type(one).__name__ for name, one in attend_by(net, ALL).attn_processors.items()} == before


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shapes", [(256, 77, 40), (1024, 1024, 64), (512, 512, 128)], ids=str)
def test_on_a_gpu_all_kernels_answer_alike(kernel: str, shapes: tuple[int, int, int]) -> None:
    if kernel == "cudnn" and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("cuDNN's attention needs Ampere or later")
    q, k, v = tensors(*shapes, dtype=HALF, heads=4, device="cuda")
    exact = plain(*(t.double() for t in (q, k, v)))
    assert (KERNELS[kernel](q, k, v, None).double() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.gpu
def test_on_a_gpu_a_table_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATENTGEN_CONFIG", str(tmp_path))
    table = measured(torch.device("cuda"), torch.float16)
    assert set(table) <= set(kinds()) and set(table.values()) <= set(KERNELS) and measured(torch.device("cuda"), torch.float16) == table
