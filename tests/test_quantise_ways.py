"""Ways to hold weights in fewer bits: the nearest numbers that a way has, packed weights whose rows are cut and joined, blocks of ggml as its package has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from latentgen.models.cast import NotFinite
from latentgen.models.fast import onednn
from latentgen.models.fast.whole import WholeLinear, pack_whole
from latentgen.models.gguf_header import BLOCKS
from latentgen.models.quantise.held import HeldLinear
from latentgen.models.quantise.packed import Ggml, Packed
from latentgen.models.quantise.ways import WAYS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dice(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_int8_is_the_nearest_of_255_numbers_in_each_row() -> None:
    weight = torch.tensor([[1.27, -0.004, 0.006, 0.635], [0.0, 0.0, 0.0, 0.0], [-254.0, 1.0, 3.1, 127.0]])
    parts = WAYS["int8"].pack(weight)
    assert parts["codes"].tolist() == [[127, 0, 1, 64], [0, 0, 0, 0], [-127, 0, 2, 64]] and parts["codes"].dtype == torch.int8
    torch.testing.assert_close(parts["scale"].squeeze(1), torch.tensor([0.01, 0.0, 2.0]))
    made = dice(50, 30)
    parts = WAYS["int8"].pack(made)
    assert ((WAYS["int8"].unpack(parts, torch.float32) - made).abs() <= parts["scale"] / 2 + 1e-6).all()


def test_fp8_is_within_half_a_step_of_three_bits() -> None:
    made = torch.cat((dice(50, 30), torch.zeros(1, 30)))
    parts = WAYS["fp8"].pack(made)
    back = WAYS["fp8"].unpack(parts, torch.float32)
    assert ((back - made).abs() <= torch.maximum(made.abs() / 16, parts["scale"] / 2**10) * (1 + 1e-5)).all() and not back[50].any()
    torch.testing.assert_close(back.abs().amax(1), made.abs().amax(1))
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(2, 128)[:, :127]
    assert torch.equal(WAYS["fp8"].unpack({"codes": every}, torch.float32), every.float())


def test_int4_is_within_half_a_step_of_16_numbers_in_each_32() -> None:
    made = torch.cat((dice(50, 96), torch.zeros(1, 96)))
    parts = WAYS["int4"].pack(made)
    assert parts["codes"].shape == (51, 48) and parts["scale"].shape == (51, 3)
    step = parts["scale"].float().abs().repeat_interleave(32, 1)
    back = WAYS["int4"].unpack(parts, torch.float32)
    held = (made / torch.where(step > 0, step * parts["scale"].float().sign().repeat_interleave(32, 1), 1.0)) <= 7.5  # the far end has one number less
    assert ((back - made).abs() <= step * 0.51)[held].all() and ((back - made).abs() <= step * 1.04)[~held].all() and held.float().mean() > 0.95
    assert torch.equal(WAYS["int4"].unpack(WAYS["int4"].pack(back), torch.float32), back)  # what it stands for, it stands for


@pytest.mark.parametrize("way", [way for way in WAYS if way != "int8_dynamic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_rounded_weights(way: str, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 80, bias=bias).to(dtype)
    held = HeldLinear(linear, WAYS[way], WAYS[way].pack(linear.weight.data), dtype)
    x = 30 * torch.randn(2, 3, 64).to(dtype)
    exact = nn.functional.linear(x.double(), WAYS[way].unpack(held._buffers, torch.float64), None if linear.bias is None else linear.bias.double())
    torch.testing.assert_close(held(x).double(), exact, rtol=0, atol={torch.float32: 1e-4, torch.bfloat16: 0.6, torch.float16: 0.1}[dtype])
    assert held(x).dtype == held.weight.dtype == dtype and held.weight.shape == (80, 64) and torch.isfinite(held(x)).all()


@pytest.mark.parametrize("kernel", ["packed once", "packed now", "torch's own"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_of_whole_numbers(kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of whole numbers are exact, so that every kernel gives the same bits: those of the rule, written out."""
    way, weight, bias, x = WAYS["int8_dynamic"], dice(81, 70), dice(81, seed=1), torch.cat((30 * dice(2, 4, 70, seed=2), torch.zeros(2, 1, 70)), 1).to(dtype)
    linear = nn.Linear(70, 81)
    linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    held = HeldLinear(linear, way, way.pack(weight), dtype)
    parts = dict(held._buffers)
    scale = x.float().abs().amax(-1, keepdim=True).div(127).clamp(min=1e-30)
    whole = (x.float() / scale).round()
    assert whole.abs().max() == 127 and (whole * scale - x.float()).abs().max() <= scale.max() / 2 * 1.001
    sums = torch.einsum("bni,oi->bno", whole.double(), parts["codes"].double()).float()
    rule = (sums * parts["scale"].squeeze(1) * scale + linear.bias).to(dtype)
    if kernel == "packed once":
        pack_whole(held, device=torch.device("cpu"))
        assert type(held) is (WholeLinear if onednn.whole_available() else HeldLinear)
    if kernel == "torch's own":
        monkeypatch.setattr(onednn, "whole_available", lambda: False)
    assert torch.equal(held(x), rule) and torch.equal(held(x), rule) and held(x).dtype == dtype and held.weight.shape == (81, 70)
    exact = nn.functional.linear(x.double(), weight.double(), linear.bias.double())
    assert (held(x) - exact).norm() / exact.norm() < 0.02
    monkeypatch.setattr("latentgen.models.quantise.ways.PIECE", 200)
    assert torch.equal(held(x), rule)


@pytest.mark.parametrize("way", WAYS)
def test_a_piece_at_a_time_is_the_whole(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = WAYS[way].pack(dice(50, 96))
    whole = WAYS[way].unpack(parts, torch.bfloat16)
    monkeypatch.setattr("latentgen.models.quantise.ways.PIECE", 700)
    assert torch.equal(WAYS[way].unpack(parts, torch.bfloat16), whole)


def blocks(kind: str, rows: int = 3, *, seed: int = 0) -> Tensor:
    """(rows, bytes): random blocks of ggml with finite scales."""
    numbers, size, (start, end) = BLOCKS[kind]
    made = np.random.default_rng(seed).integers(0, 256, (rows * 2, size), dtype=np.uint8)
    made[:, start:end] = np.random.default_rng(1).normal(0, 1, (rows * 2, (end - start) // 2)).astype(np.float16).view(np.uint8)
    return torch.from_numpy(made).reshape(rows, -1)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_ggml(kind: str) -> None:
    """Bit for bit as the gguf package unpacks them; and where a scale is not finite, that is found."""
    gguf = pytest.importorskip("gguf")
    data, way = blocks(kind), Ggml(kind)
    theirs = torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))
    assert torch.equal(way.unpack({"codes": data}, torch.float32), theirs)
    linear = nn.Linear(theirs.shape[1], 3)
    held, x = HeldLinear(linear, way, {"codes": data}, torch.float32), dice(5, theirs.shape[1])
    assert torch.equal(held(x), nn.functional.linear(x, theirs, linear.bias))
    way.check({"codes": data})
    size, (_, end) = BLOCKS[kind][1:]
    data[2, size + end - 2:size + end] = torch.tensor([float("nan")], dtype=torch.float16).view(torch.uint8)
    with pytest.raises(NotFinite):
        way.check({"codes": data})


@pytest.mark.parametrize("number", [0x7F, 0xFF])
def test_8_bit_floats_that_are_none(number: int) -> None:
    codes = torch.zeros(4, 4, dtype=torch.uint8)
    codes[1, 2] = number
    with pytest.raises(NotFinite):
        WAYS["fp8"].check({"codes": codes.view(torch.float8_e4m3fn)})
    codes[1, 2] = number - 1
    WAYS["fp8"].check({"codes": codes.view(torch.float8_e4m3fn), "scale": torch.ones(4, 1)})
    with pytest.raises(NotFinite):
        WAYS["fp8"].check({"codes": codes.view(torch.float8_e4m3fn), "scale": torch.tensor([[float("inf")]])})


def test_rows_are_cut_and_joined_as_they_are_packed() -> None:
    plain = dice(12, 64)
    packed = Packed(WAYS["int4"], WAYS["int4"].pack(plain), plain.shape)
    plain = packed.unpacked(torch.float32)
    assert packed.shape == (12, 64) and packed.is_floating_point() and packed.dtype == torch.float32
    for change in (lambda w: w.chunk(3)[1], lambda w: torch.split(w, [2, 3, 7])[2], lambda w: w[3:9], lambda w: torch.cat([w[6:], w[:6]]),
                   lambda w: torch.cat(w.chunk(2, dim=0)[::-1], dim=0), lambda w: w.detach(), lambda w: w.narrow(0, 1, 4)):
        assert isinstance(change(packed), Packed) and torch.equal(change(packed).unpacked(torch.float32), change(plain))
        assert change(packed.without_numbers()).is_meta and change(packed.without_numbers()).parts["codes"].shape[1:] == (32,)
    for change in (lambda w: w[:, :5], lambda w: w.t(), lambda w: w + 1, lambda w: w.reshape(-1), lambda w: torch.cat([w, plain]), lambda w: w[::2], lambda w: w[3]):
        assert type(change(packed)) is Tensor and torch.equal(change(packed), change(plain))
