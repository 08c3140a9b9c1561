"""Weights in 8 bits: the nearest of 255 numbers a row, a network that answers nearly as before, and half the bytes; told in plan and recipe."""

import pytest
import torch
from tiny_folders import tiny
from torch import nn

import latentgen
from latentgen.errors import ModelError, RequestError
from latentgen.models import quantise
from latentgen.models.quantise import Int8Linear, hold, quantised

KINDS = ("sd15", "sdxl", "sd3", "flux1", "flux2", "zimage", "qwenimage", "pixart")


def test_weights_are_the_nearest_of_255_numbers_in_each_row():
    weight = torch.tensor([[1.27, -0.004, 0.006, 0.635], [0.0, 0.0, 0.0, 0.0], [-254.0, 1.0, 3.1, 127.0]])
    whole, scale = quantised(weight)
    assert whole.tolist() == [[127, 0, 1, 64], [0, 0, 0, 0], [-127, 0, 2, 64]] and whole.dtype == torch.int8
    torch.testing.assert_close(scale.squeeze(1), torch.tensor([0.01, 0.0, 2.0]))
    made = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    whole, scale = quantised(made)
    assert ((whole * scale - made).abs() <= scale / 2 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_rounded_weights(dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(64, 80, bias=bias).to(dtype)
    held = Int8Linear(linear)
    held.weight, held.scale = quantised(linear.weight.data)
    x = 30 * torch.randn(2, 3, 64).to(dtype)
    exact = nn.functional.linear(x.double(), held.weight.double() * held.scale.double(), None if linear.bias is None else linear.bias.double())
    torch.testing.assert_close(held(x).double(), exact, rtol=0, atol={torch.float32: 1e-4, torch.bfloat16: 0.6, torch.float16: 0.1}[dtype])
    assert held(x).dtype == dtype and torch.isfinite(held(x)).all()


def test_only_linears_of_blocks_are_held_so():
    net = tiny("flux1").modules["transformer"]
    from latentgen.models.view import view

    names = hold(shell := view(net, lambda name, module: None))
    kinds = {name: type(module) for name, module in shell.named_modules()}
    assert names and all(name.startswith(("transformer_blocks.0.", "single_transformer_blocks.0.")) for name in names)
    assert {name.removesuffix(".weight") for name in names} == {name for name, kind in kinds.items() if kind is Int8Linear}
    assert kinds["x_embedder"] is nn.Linear and kinds["proj_out"] is nn.Linear


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["resident", "stage"])
def test_every_family_answers_nearly_as_before(kind, policy, tmp_path, monkeypatch):
    monkeypatch.setattr(quantise, "LEAST", 1)
    folder = tiny(kind).save(tmp_path / kind)
    said = {"steps": 2, "seed": 1, "width": 64, "height": 64}
    exact = latentgen.load(folder, dtype="float32", device="cpu", progress=False).txt2img("a red heart", **said)
    pipe = latentgen.load(folder, dtype="float32", device="cpu", progress=False, quantise="int8", residency=policy)
    made = pipe.txt2img("a red heart", **said)
    far = (made.latents - exact.latents).abs().max() / exact.latents.abs().max()
    assert 0 < far < 0.2, far
    assert torch.equal(pipe.txt2img("a red heart", **said).latents, made.latents)


def test_it_takes_a_quarter_of_float32_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(quantise, "LEAST", 1)
    folder = tiny("flux1").save(tmp_path / "flux1")
    whole, small = (latentgen.load(folder, dtype="float32", device="cpu", progress=False, quantise=way) for way in (None, "int8"))
    with whole.residency.use("denoiser") as nets:
        (net,) = nets.values()
        linears = sum(m.weight.numel() for name, m in net.named_modules() if type(m) is nn.Linear and "blocks" in name)
        rows = sum(m.out_features for name, m in net.named_modules() if type(m) is nn.Linear and "blocks" in name)
        with small.residency.use("denoiser"):
            assert whole.residency.resident_bytes() - small.residency.resident_bytes() == 3 * linears - 4 * rows
    plan = small.plan("a cat")
    assert "weights in int8" in str(plan) and "int8" not in str(whole.plan("a cat"))
    made = small.txt2img("a cat", steps=2, width=64, height=64, seed=1)
    assert made.recipe["quantise"] == "int8"
    (file,) = made.save(tmp_path / "cat.png")
    assert small.replay(file).identical
    assert any(factor.startswith("quantise: int8 then") for factor in whole.replay(file).differences)
    with pytest.raises(RequestError, match="not this pipeline"):
        whole.stream(plan)


def test_a_weight_that_is_not_finite_is_found(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr(quantise, "LEAST", 1)
    folder = tiny("flux1").save(tmp_path / "flux1")
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["transformer_blocks.0.attn.to_q.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ModelError, match="NaN"):
        latentgen.load(folder, dtype="float32", device="cpu", progress=False, quantise="int8").txt2img("a cat", steps=1, width=64, height=64)


def test_what_cannot_be_is_refused(tiny_folder):
    with pytest.raises(RequestError, match="quantise is 'int3': expected 'int8'"):
        latentgen.load(tiny_folder, quantise="int3")
    with pytest.raises(RequestError, match="residency='stream'"):
        latentgen.load(tiny_folder, quantise="int8", residency="stream")
