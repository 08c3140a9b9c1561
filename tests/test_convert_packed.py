"""Files as mappings: safetensors in shards, 8-bit floats with scales and GGUF, against what was stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentgen.errors import ModelError
from latentgen.models.convert import LazyTensors, dequantised, part_tensors
from latentgen.models.family import Original, Part
from latentgen.models.quantise.packed import Packed


def test_lazy_tensors_are_those_of_the_files(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4.0)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(2, dtype=torch.float16)}, tmp_path / "2.safetensors")
    both = LazyTensors(tmp_path / "1.safetensors", tmp_path / "2.safetensors")
    assert list(both) == ["a", "b"] and len(both) == 2 and "a" in both and "c" not in both
    assert torch.equal(both["a"], torch.arange(4.0)) and both["b"].dtype == torch.float16
    with pytest.raises(KeyError):
        both["c"]
    with pytest.raises(ModelError, match="the tensor 'a' is in .*1.safetensors and in another"):
        LazyTensors(tmp_path / "1.safetensors", tmp_path / "1.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"<html>")
    with pytest.raises(ModelError, match="bad.safetensors"):
        LazyTensors(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(("scale", "mark"), [("scale_weight", "scaled_fp8"), ("weight_scale", "a.comfy_quant")])
def test_scaled_fp8(scale: str, mark: str) -> None:
    fp8 = torch.float8_e4m3fn
    plain, rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 0.5, 4.0, 0.125])
    tensors = {"a.weight": (plain / 0.03).to(fp8), f"a.{scale}": torch.tensor(0.03), "b.weight": plain.to(fp8),
               "b.bias": torch.ones(3, dtype=torch.float16), "c.weight": plain.to(fp8), f"c.{scale}": rows,
               mark: torch.zeros(2, dtype=torch.uint8), "a.scale_input": torch.ones(())}
    found = dequantised(tensors)
    assert sorted(found) == ["a.weight", "b.bias", "b.weight", "c.weight"] and len(found) == 4 and f"a.{scale}" not in found
    a, b, c = (found[f"{name}.weight"].unpacked(torch.bfloat16) for name in "abc")
    assert torch.equal(a, ((plain / 0.03).to(fp8).float() * 0.03).to(torch.bfloat16))
    assert float((a.float() - plain).abs().max()) < 0.07 * float(plain.abs().max())
    assert torch.equal(b, plain.to(fp8).to(torch.bfloat16)) and found["b.bias"] is tensors["b.bias"]
    assert torch.equal(c, (plain.to(fp8).float() * rows[:, None]).to(torch.bfloat16))
    with pytest.raises(KeyError):
        found[f"a.{scale}"]


def test_other_packings_are_refused() -> None:
    blocks = dequantised({"a.weight": torch.zeros(4, 6, dtype=torch.float8_e4m3fn), "a.weight_scale": torch.ones(4, 3)})
    with pytest.raises(ModelError, match="'a.weight' is packed as .*scale of shape .4, 3."):
        blocks["a.weight"]
    with pytest.raises(ModelError, match="packed as torch.uint8"):
        dequantised({"a.weight": torch.zeros(4, 3, dtype=torch.uint8), "a.weight_scale": torch.ones(())})["a.weight"]


def test_scales_go_before_weights_are_split() -> None:
    """A joined projection with one scale: its parts are those of the unpacked weight."""
    original = Original(("model.diffusion_model.",), "convert_z_image_transformer_checkpoint_to_diffusers", "layers.0.attention.qkv.weight")
    stored = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    start = "model.diffusion_model.layers.0.attention.qkv."
    mark = {"model.diffusion_model.scaled_fp8": torch.empty(0, dtype=stored.dtype)}
    packed = {f"{start}weight": stored, f"{start}scale_weight": torch.tensor(0.125)} | mark
    found = part_tensors(dequantised(packed), Part("transformer", "diffusers.X", ("denoiser",), original=original), {})
    assert sorted(found) == [f"layers.0.attention.to_{letter}.weight" for letter in "kqv"]
    for index, letter in enumerate("qkv"):
        assert torch.equal(found[f"layers.0.attention.to_{letter}.weight"].unpacked(torch.float32), stored[4 * index:4 * index + 4].float() * 0.125)


def k_block(scales: list[int], mins: list[int], codes: Tensor) -> bytes:
    """A Q4_K block of 256 weights with d = 0.5 and dmin = 0.25: eight scales and minima below 16, and 4-bit codes (8, 32)."""
    import numpy as np

    head = np.array([0.5, 0.25], dtype=np.float16).tobytes()
    low = bytes(scales[:4]) + bytes(mins[:4]) + bytes(s | m << 4 for s, m in zip(scales[4:], mins[4:], strict=True))
    pairs = codes.reshape(4, 2, 32)
    return head + low + (pairs[:, 0] | pairs[:, 1] << 4).to(torch.uint8).numpy().tobytes()


def test_gguf(tmp_path: Path) -> None:
    """Each packing within half a step of what was packed (Q4_K: exactly what its bytes say), axes in torch's order."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    kinds = gguf.GGMLQuantizationType
    values = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    scales, mins = [1, 2, 3, 4, 5, 6, 7, 15], [0, 1, 2, 3, 4, 5, 6, 9]
    codes = torch.randint(0, 16, (8, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "any")
    for name in ("Q4_0", "Q5_0", "Q8_0", "F16", "BF16"):
        writer.add_tensor(name, gguf.quants.quantize(values.numpy(), kinds[name]), raw_dtype=kinds[name])
    writer.add_tensor("F32", values.numpy())
    writer.add_tensor("Q4_K", np.frombuffer(k_block(scales, mins, codes), dtype=np.uint8).reshape(1, -1), raw_dtype=kinds.Q4_K)
    writer.add_tensor("conv", values.numpy())
    writer.add_array("comfy.gguf.orig_shape.conv", [3, 4, 8, 8])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    stored = LazyTensors(tmp_path / "x.gguf")
    found = {name: plain(stored[name]) for name in stored}
    assert sorted(found) == ["BF16", "F16", "F32", "Q4_0", "Q4_K", "Q5_0", "Q8_0", "conv"]
    assert torch.equal(found["F32"], values) and torch.equal(found["conv"], values.reshape(3, 4, 8, 8))
    assert torch.equal(found["F16"], values.half().float()) and torch.equal(found["BF16"], values.bfloat16().float())
    largest = values.reshape(3, 8, 32).abs().amax(-1, keepdim=True)
    for name, steps in (("Q4_0", 8), ("Q5_0", 16), ("Q8_0", 127)):
        error = (found[name] - values).reshape(3, 8, 32).abs()
        assert bool((error <= 1.02 * largest / steps).all()) and bool((error > 0).any()), name
    wanted = 0.5 * torch.tensor(scales)[:, None] * codes - 0.25 * torch.tensor(mins)[:, None]
    assert torch.equal(found["Q4_K"], wanted.reshape(1, 256))
    assert torch.equal(stored["Q8_0"].unpacked(torch.bfloat16), found["Q8_0"].to(torch.bfloat16))
    with pytest.raises(KeyError):
        stored["absent"]


def plain(tensor: Tensor) -> Tensor:
    return tensor.unpacked(torch.float32) if isinstance(tensor, Packed) else tensor.float()


def test_gguf_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_header import gguf

    (tmp_path / "x.gguf").write_bytes(gguf({"a": ((32, 2), 2)}))
    monkeypatch.setattr("latentgen.models.convert.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r'x.gguf is packed in blocks, which needs the gguf package: pip install "latentgen\[gguf\]"'):
        LazyTensors(tmp_path / "x.gguf")
    (tmp_path / "y.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError, match="y.gguf"):
        LazyTensors(tmp_path / "y.gguf")
