"""Files that are broken, of another kind, or do not belong together: each one clear sentence, soon, before any tensor is read, and nothing changed.

Files of real layouts are headers of tests/headers over a hole. What a header's bytes can be is in test_header.py, and folders that lost a file are in
test_bad_files.py; here everything goes through `latentgen.load`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from counting import bytes_read
from safetensors.torch import load_file, save_file
from test_bad_input import sentence
from test_inspect import copied, layout, low_rank, sparse

import latentgen
from latentgen.errors import ModelError
from latentgen.models import header

each = pytest.mark.parametrize
UNET = "model.diffusion_model."


def opened(source: Path | str | None, **said: Any) -> Any:
    return latentgen.load(source, **{"dtype": "float32", "device": "cpu", "progress": False} | said)


def checked(source: Path | str | None, **said: Any) -> None:
    opened(source, **said).checkpoint.check()


@pytest.fixture(autouse=True)
def nothing_is_read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "reads" not in request.fixturenames:
        for reader in ("safetensors.safe_open", "latentgen.models.convert.LazyTensors.__init__", "torch.load", "pickle.load", "pickle.loads"):
            monkeypatch.setattr(reader, lambda *_, **__: pytest.fail("a tensor was read"))


def state_of(place: Path) -> list[tuple[str, int, int]]:
    return sorted((path.relative_to(place).as_posix(), path.lstat().st_size, path.lstat().st_mtime_ns) for path in place.rglob("*"))


@contextmanager
def untouched(place: Path) -> Iterator[None]:
    before = state_of(place)
    yield
    assert state_of(place) == before


@pytest.fixture
def refused(tmp_path: Path, tiny_folder: Path) -> Callable[..., str]:
    """The message of the one error that a call must end in: before anything large is read or built, with the folder as it was, and with the next model
    loading as ever."""
    register = torch.nn.Module.register_parameter

    def run(call: Callable[[], object], *words: str) -> str:
        built: list[int] = []

        def built_so(module: torch.nn.Module, name: str, value: torch.nn.Parameter | None) -> None:
            built.append(0 if value is None or value.is_meta else value.numel())
            register(module, name, value)

        with untouched(tmp_path), bytes_read(header) as read, patch.object(torch.nn.Module, "register_parameter", built_so):
            with pytest.raises(ModelError) as raised:
                call()
        assert sum(read) < 1_000_000 and sum(built) < 200_000  # bytes of headers; numbers in modules, of which a tiny part may have some
        text = sentence(raised.value)
        for word in words:
            assert word in text, f"{word!r} is not in {text!r}"
        assert str(tmp_path) not in text
        opened(tiny_folder)
        return text

    return run


# Bytes


def safetensors(header: Any, data: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def row(start: int, end: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    return buffer.getvalue()


BYTES = {
    "empty": (b"", "is empty (0 bytes)"), "8 bytes": (b"\x10" + bytes(7), "it has 8 bytes"),
    "truncated": (safetensors({"a": row(0, 8), "b": row(8, 16)}, 12), "is cut short"),
    "header cut": (safetensors({"a": row(0, 8)}, 8)[:40], "not even its header is whole"),
    "length 2^62": (struct.pack("<Q", 2**62) + b"{}" + bytes(100), "says that its header has 4,611,686,018,427,387,904 bytes"),
    "not JSON": (safetensors(b'{"a": {"dtype": "F32" "shape"', 8), "it is not JSON"), "a list": (safetensors(b'{"a"}     '), "it is not JSON"),
    "duplicate keys": (safetensors(b"{" + b", ".join([b'"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}'] * 2) + b"}", 8),
                       "the name 'a' is there twice"),
    "overlap": (safetensors({"a": row(0, 8), "b": row(4, 12)}, 12), "tensor 'b' overlaps 'a'"),
    "outside": (safetensors({"a": row(0, 8), "b": row(800, 808)}, 8), "tensor 'b' lies outside the file"),
    "a gap": (safetensors({"a": row(0, 8), "b": row(12, 20)}, 20), "belong to no tensor"),
    "wrong size": (safetensors({"a": row(0, 8, (3,))}, 8), "needs 12 bytes but has 8"),
    "2^80 values": (safetensors({"a": row(0, 8, (2**40, 2**40))}, 8), "but has 8"),
    "negative": (safetensors({"a": row(0, 8, (-2,))}, 8), "has the shape"),
    "dtype": (safetensors({"a": row(0, 8, dtype="Q9")}, 8), "the unknown dtype 'Q9'"),
    "web page": (b"<!DOCTYPE html><html><title>Sign in</title></html>" * 40, "a web page"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n", "git lfs pull"),
    "zip": (torch_zip(), "a zip, as torch.save writes its pickles, which can run code"),
    "pickle": (pickle.dumps({"a": [1.0] * 99}), "a pickle, which can run code"),
    "refusal": (b'{"error":"Invalid username or password."}' + b" " * 40, "perhaps the answer of a server that refused"),
}
AGAIN, FILE_AGAIN = "get it again", "get the file again"


@each("name", BYTES)
@each("where", ["the file", "a part", "a folder"])
def test_bytes_that_are_no_weights(refused: Any, tiny_folder: Path, tmp_path: Path, name: str, where: str) -> None:
    data, words = BYTES[name]
    if where == "a folder":
        folder = shutil.copytree(tiny_folder, tmp_path / "broken")
        file = next((folder / "unet").glob("*.safetensors"))
    else:
        folder, file = tiny_folder, tmp_path / "model.safetensors"
    file.write_bytes(data)
    call = {"the file": lambda: opened(file), "a part": lambda: checked(folder, vae=file), "a folder": lambda: checked(folder)}[where]
    assert file.name in refused(call, words)


def test_a_header_of_100_megabytes(refused: Any, tmp_path: Path) -> None:
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 100 * 2**20) + b'{"a":')
        file.truncate(200 * 2**20)
    refused(lambda: opened(tmp_path / "model.safetensors"), "104,857,600 bytes", "at most 16,777,216", AGAIN)


@each("name", ["model.ckpt", "v1-5.CKPT", "diffusion.bin", "model.pt", "model.pth"])
def test_pickles_are_refused_by_name(refused: Any, tmp_path: Path, tiny_folder: Path, name: str) -> None:
    """Whatever is in them: the name is enough, and nothing is opened."""
    (tmp_path / name).write_bytes(torch_zip())
    for call in (lambda: opened(tmp_path / name), lambda: opened(tiny_folder, vae=tmp_path / name), lambda: opened(None, denoiser=tmp_path / name)):
        refused(call, f"{name} is a pickle, which can run code when it is opened", "get it as .safetensors", "allow_pickle=True")


# Tensors that do not fit


def without(tensors: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: said for name, said in tensors.items() if name not in names}


def attentions(tensors: dict[str, Any], start: str = "") -> list[str]:
    """Ten tensors of the denoiser that no signature asks for."""
    return [name for name in tensors if name.startswith(start) and ".attn1.to_out.0.bias" in name][:10]


@each("change, count, first", [
    ("missing", "10 missing (first ", "transformer_blocks.0.attn1.to_out.0.bias'"), ("extra", "10 left over (first ", "more.0.weight'"),
    ("reshaped", "10 of another shape (first ", "transformer_blocks.0.attn1.to_out.0.bias', (7,) where (")])
@each("name", ["sd15", "sd15.diffusers", "sdxl"])
def test_ten_tensors(refused: Any, tmp_path: Path, name: str, change: str, count: str, first: str) -> None:
    """Of an original file they are told by the module's names, in which they will be missed."""
    tensors, start = layout(name), "" if "." in name else UNET
    ten = attentions(tensors, start)
    more = {f"{start}more.{n}.weight": ("F16", (3,)) for n in range(10)}
    made = {"missing": without(tensors, ten), "extra": tensors | more, "reshaped": tensors | {n: ("F16", (7,)) for n in ten}}[change]
    file = sparse(tmp_path / "model.safetensors", made)
    beside = {"vae": "parts/vae-sd", "text_encoder": "parts/clip-l"} if not start else {}
    pipe = opened(file, **{part: sparse(tmp_path / f"{part}.safetensors", layout(other)) for part, other in beside.items()})
    said = refused(pipe.checkpoint.check, "model.safetensors", "do not fit its UNet2DConditionModel", count, first, FILE_AGAIN)
    assert refused(lambda: pipe.txt2img("a cat"), count) == said  # the first picture says the same, before it reads anything


@each("part, prefix, words", [
    ("vae", "first_stage_model.encoder.", "(vae)"), ("text_encoder", "cond_stage_model.transformer.text_model.encoder.", "(text_encoder)")])
def test_parts_inside_a_file_that_are_cut(refused: Any, tmp_path: Path, part: str, prefix: str, words: str) -> None:
    tensors = layout("sd15")
    names = [name for name in tensors if name.startswith(prefix) and name.endswith("bias")][-10:]
    file = sparse(tmp_path / "model.safetensors", without(tensors, names))
    refused(lambda: checked(file), f"model.safetensors {words}", "10 missing")


@each("names", [("middle_block.1.proj_in.weight",), ("input_blocks.4.1.transformer_blocks.0.norm1.weight", "out.0.weight")])
def test_a_tensor_that_the_published_layout_rests_on(refused: Any, tmp_path: Path, names: tuple[str, ...]) -> None:
    file = sparse(tmp_path / "model.safetensors", without(layout("sd15"), [UNET + name for name in names]))
    refused(lambda: checked(file), "model.safetensors", "unet")


@pytest.fixture
def reads() -> None:
    """For a test in which tensors are read."""


@pytest.mark.usefixtures("reads")
@each("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(refused: Any, tiny_folder: Path, tmp_path: Path, bad: float) -> None:
    """Only reading tells: they are counted, and the first is named."""
    folder = shutil.copytree(tiny_folder, tmp_path / "broken")
    file = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    for name in ("conv_out.bias", "mid_block.resnets.0.norm1.weight", "time_embedding.linear_2.weight"):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = bad
    save_file(tensors, file)
    pipe = opened(folder)
    for _ in range(2):
        said = refused(lambda: pipe.txt2img("a cat", steps=1, seed=0, width=64, height=64),
                       "3 tensors of broken/unet have NaN or infinite weights", FILE_AGAIN)
        assert any(f"first '{name}'" in said for name in ("conv_out.bias", "mid_block.resnets.0.norm1.weight", "time_embedding.linear_2.weight"))


# Files of another kind


OTHERS = {
    "LoRA": (low_rank("sd15.diffusers", "kohya"), "a LoRA for sd15", "load the checkpoint that it was made for"),
    "LoRA of SDXL": (low_rank("sdxl.diffusers", "PEFT"), "a LoRA for sdxl", "load the checkpoint that it was made for"),
    "ControlNet": (copied("sd15", "control_model.", "control_model.input_hint_block.0.weight"), "a ControlNet for sd15", "load the checkpoint"),
    "embedding": ({"emb_params": (4, 768)}, "a textual-inversion embedding", "load the checkpoint"),
    "IP-Adapter": ({"image_proj.proj.weight": (3072, 1024), "ip_adapter.1.to_k_ip.weight": (320, 768)}, "an IP-Adapter", "load the checkpoint"),
    "VAE": (layout("parts/vae-sd"), "a VAE", "name the file beside it, as vae="),
    "text encoder": (layout("parts/clip-l"), "a text encoder (CLIP-L)", "name the file beside it, as text_encoder="),
    "upscaler": ({"model.1.sub.0.RDB1.conv1.0.weight": (32, 64, 3, 3)}, "an upscaler", "`latentgen inspect` tells more"),
    "nothing known": ({"weight": (3, 3), "bias": (3,)}, "of an unknown kind (its tensors fit nothing that", "`latentgen inspect` tells more"),
    "no tensor": ({}, "of an unknown kind (it holds no tensor)", "`latentgen inspect` tells more"),
    "pruned U-Net": ({name: s for name, s in layout("sd15").items() if "middle_block" not in name},
                     "of an unknown kind (it has a denoiser that fits no family of this version", "`latentgen inspect` tells more"),
}


@each("name", OTHERS)
@each("keyword", [False, True])
def test_a_file_that_is_no_checkpoint(refused: Any, tmp_path: Path, name: str, keyword: bool) -> None:
    tensors, what, cure = OTHERS[name]
    file = sparse(tmp_path / "file.safetensors", tensors)
    call = (lambda: opened(None, denoiser=file)) if keyword else (lambda: opened(file))
    refused(call, f"file.safetensors is {what}", "expected a checkpoint or a denoiser", cure)


@each("name", ["LoRA", "ControlNet", "embedding", "text encoder"])
def test_what_is_no_vae(refused: Any, tmp_path: Path, name: str) -> None:
    whole, file = sparse(tmp_path / "model.safetensors", layout("sd15")), sparse(tmp_path / "file.safetensors", OTHERS[name][0])
    refused(lambda: opened(whole, vae=file), f"file.safetensors is {OTHERS[name][1]}", "but is given as vae: expected a AutoencoderKL")


@each("part, name, words", [
    ("vae", "parts/vae-flux1", "of another shape"), ("vae", "parts/vae-qwenimage", "do not fit its AutoencoderKL"),
    ("text_encoder", "parts/clip-g", "of another shape"), ("text_encoder", "parts/t5xxl", "do not fit its CLIPTextModel"),
    ("unet", "sdxl.diffusers", "do not fit its UNet2DConditionModel"), ("unet", "sd15-inpaint", "(320, 9, 3, 3) where (320, 4, 3, 3) is expected"),
    ("denoiser", "flux1-dev", "do not fit its UNet2DConditionModel")])
def test_a_part_of_another_family(refused: Any, tmp_path: Path, part: str, name: str, words: str) -> None:
    whole, file = sparse(tmp_path / "model.safetensors", layout("sd15")), sparse(tmp_path / "part.safetensors", layout(name))
    refused(lambda: checked(whole, **{part: file}), "part.safetensors", words)


def test_a_vae_where_the_unet_belongs(refused: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """Its weights alone, and its config with them."""
    folder = shutil.copytree(tiny_folder, tmp_path / "broken")
    shutil.copy(next((folder / "vae").glob("*.safetensors")), next((folder / "unet").glob("*.safetensors")))
    refused(lambda: checked(folder), "the weights of broken/unet do not fit its UNet2DConditionModel", "missing (first", "left over (first",
            FILE_AGAIN)
    shutil.copy(folder / "vae" / "config.json", folder / "unet" / "config.json")
    refused(lambda: checked(folder), "the config of broken/unet describes a AutoencoderTiny: expected UNet2DConditionModel")


@each("name, said, words", [
    ("sdxl", {"card": "sd15"}, "is of the family sdxl but the card 'sd15' is of sd15: leave card= out"),
    ("sdxl", {"config": "sd15"}, "is sdxl by its tensors but config= says sd15: leave config= out"),
    ("sd15", {"config": "sdxl"}, "is sd15 by its tensors but config= says sdxl"),
    ("sdxl-refiner", {"card": "sdxl-base"}, "is sdxl-refiner by its tensors but card= says sdxl: leave card= out"),
    ("sdxl-refiner", {"config": "sdxl"}, "is sdxl-refiner by its tensors but config= says sdxl"),
    ("sdxl", {"card": "sdxl-inpaint"}, "is sdxl by its tensors but card= says sdxl-inpaint"),
    ("sd15", {"card": "sd15-inpaint"}, "is sd15 by its tensors but card= says sd15-inpaint"),
    ("flux1-schnell", {"card": "flux1-dev"}, "is flux1-schnell by its tensors but card= says flux1-dev"),
    ("sd15", {"card": "sdxl-trubo"}, "there is no model 'sdxl-trubo': did you mean 'sdxl-turbo'?"),
    ("sd15", {"config": "sd15-inpant"}, "there is no variant 'sd15-inpant': did you mean 'sd15-inpaint'?")])
def test_one_checkpoint_as_another(refused: Any, tmp_path: Path, name: str, said: dict[str, str], words: str) -> None:
    file = sparse(tmp_path / "model.safetensors", layout(name))
    refused(lambda: opened(file, **said), words)


def test_what_tensors_do_not_tell_may_be_said(tmp_path: Path) -> None:
    file = sparse(tmp_path / "model.safetensors", layout("sd21"))
    assert opened(file).family.prediction == "v" and opened(file, config="sd21").family.prediction == "epsilon"
    assert opened(file, card="sd-turbo").checkpoint.variant == "sd21"
