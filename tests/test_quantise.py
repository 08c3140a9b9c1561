"""Networks whose weights are held in fewer bits: they answer nearly as before, wherever the weights lie, in fewer bytes; told in plan and recipe."""

import pytest
import torch
from tiny_folders import tiny
from torch import nn

import latentgen
from latentgen.errors import ModelError, RequestError
from latentgen.models.quantise import held
from latentgen.models.quantise.held import HeldLinear, hold
from latentgen.models.quantise.ways import WAYS

KINDS = ("sd15", "sdxl", "sd3", "flux1", "flux2", "zimage", "qwenimage", "pixart")


def test_only_linears_of_blocks_are_held_so():
    net = tiny("flux1").modules["transformer"]
    from latentgen.models.view import view

    names = hold(shell := view(net, lambda name, module: None), "int8", {}, lambda name: torch.float32)
    kinds = {name: type(module) for name, module in shell.named_modules()}
    assert names and all(name.startswith(("transformer_blocks.0.", "single_transformer_blocks.0.")) for name in names)
    assert {name.removesuffix(".weight") for name in names} == {name for name, kind in kinds.items() if kind is HeldLinear}
    assert kinds["x_embedder"] is nn.Linear and kinds["proj_out"] is nn.Linear


FAR = {"int8": 0.2, "int8_dynamic": 0.3, "fp8": 0.4, "int4": 1.0}  # of the largest latent, after two steps of networks whose weights are random


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_answers_nearly_as_before(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(held, "LEAST", 1)
    folder = tiny(kind).save(tmp_path / kind)
    said = {"steps": 2, "seed": 1, "width": 64, "height": 64}
    exact = latentgen.load(folder, dtype="float32", device="cpu", progress=False).txt2img("a red heart", **said)
    for way in WAYS:
        pipe = latentgen.load(folder, dtype="float32", device="cpu", progress=False, quantise=way)
        made = pipe.txt2img("a red heart", **said)
        far = (made.latents - exact.latents).abs().max() / exact.latents.abs().max()
        assert 0 < far < FAR[way], (way, far)
        assert torch.equal(pipe.txt2img("a red heart", **said).latents, made.latents)


@pytest.mark.parametrize(("kind", "way"), [("flux1", "int8_dynamic"), ("flux1", "int4"), ("sd3", "fp8")])
def test_where_they_lie_changes_nothing(kind, way, tmp_path, monkeypatch):
    """Streamed blocks come packed."""
    monkeypatch.setattr(held, "LEAST", 1)
    folder = tiny(kind).save(tmp_path / kind)
    said = {"steps": 2, "seed": 1, "width": 64, "height": 64}
    first, *rest = (latentgen.load(folder, dtype="float32", device="cpu", progress=False, quantise=way, residency=policy)
                    .txt2img("a red heart", **said).latents for policy in ("resident", "stage", "stream"))
    assert all(torch.equal(each, first) for each in rest)


def test_it_takes_a_quarter_of_float32_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(held, "LEAST", 1)
    folder = tiny("flux1").save(tmp_path / "flux1")
    whole, small = (latentgen.load(folder, dtype="float32", device="cpu", progress=False, quantise=way) for way in (None, "int8"))
    with whole.residency.use("denoiser") as nets:
        (net,) = nets.values()
        linears = sum(m.weight.numel() for name, m in net.named_modules() if type(m) is nn.Linear and "blocks" in name)
        rows = sum(m.out_features for name, m in net.named_modules() if type(m) is nn.Linear and "blocks" in name)
        with small.residency.use("denoiser"):
            assert whole.residency.resident_bytes() - small.residency.resident_bytes() == 3 * linears - 4 * rows
    plan = small.plan("a cat")
    assert "weights in int8" in str(plan) and " in float32, less in int8" in str(plan) and "int8" not in str(whole.plan("a cat"))
    ready = latentgen.load(folder, dtype="float32", device="cpu", progress=False, quantise="auto")
    assert "weights in fewer bits where memory lacks" in str(ready.plan("a cat")) and "fewer bits" not in str(plan) + str(whole.plan("a cat"))
    made = small.txt2img("a cat", steps=2, width=64, height=64, seed=1)
    assert made.recipe["quantise"] == "int8"
    (file,) = made.save(tmp_path / "cat.png")
    assert small.replay(file).identical
    assert any(factor.startswith("quantise: int8 then") for factor in whole.replay(file).differences)
    with pytest.raises(RequestError, match="not this pipeline"):
        whole.stream(plan)


def test_a_weight_that_is_not_finite_is_found(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr(held, "LEAST", 1)
    folder = tiny("flux1").save(tmp_path / "flux1")
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["transformer_blocks.0.attn.to_q.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ModelError, match="NaN"):
        latentgen.load(folder, dtype="float32", device="cpu", progress=False, quantise="int8").txt2img("a cat", steps=1, width=64, height=64)


def test_what_cannot_be_is_refused(tiny_folder):
    with pytest.raises(RequestError, match="quantise is 'int3': expected 'int8', 'int8_dynamic', 'fp8', 'int4', 'stored', 'auto', or None"):
        latentgen.load(tiny_folder, quantise="int3")
    with pytest.raises(RequestError, match="quantise is 'stored' but the files of .* have nothing packed"):
        latentgen.load(tiny_folder, quantise="stored")
