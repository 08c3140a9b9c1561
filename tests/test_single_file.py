"""Where weights come from makes no difference: single files, separate parts, shards, packed weights and the hub against the diffusers folder they
were made of. Every comparison is of a picture's bytes and of final latents, through `latentgen.load`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import NEW, OLD, server  # noqa: F401
from layouts import LAYOUTS, to_original
from PIL import Image
from tiny_folders import MAKERS, Tiny, tiny, written
from torch import Tensor

import latentgen
from latentgen.errors import ModelError
from latentgen.models.card import families
from latentgen.models.paper import paper_part
from latentgen.models.quantise.held import HeldLinear
from latentgen.models.streamed import weight_bytes

PROMPT = "a red heart, flat"
DENOISERS = ("unet", "transformer")


def there(kind: str) -> bool:
    return kind.split("-")[0] in families()


KINDS = [kind for kind in MAKERS if there(kind)]
Folders = Callable[[str], Path]


def opened(source: Path | str | None, **said: Any) -> Any:
    return latentgen.load(source, **{"dtype": "float32", "device": "cpu", "progress": False} | said)


def drawn(pipe: Any, prompt: str = PROMPT) -> tuple[Tensor, bytes]:
    """Final latents and the bytes of one small picture, by the task that the checkpoint was made for."""
    said: dict[str, Any] = {"steps": 2, "seed": 3, "sampler": "euler"}
    dice = np.random.default_rng(5)
    picture = Image.fromarray(dice.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64))
    if pipe.family.task == "edit":
        result = pipe.edit(prompt, picture, **said)
    elif pipe.family.task == "inpaint":
        result = pipe.inpaint(prompt, picture, Image.new("L", (64, 64), 255), **said)
    else:
        result = pipe.txt2img(prompt, width=64, height=64, **said)
    assert np.asarray(result.image).std() > 1 and result.latents.std() > 0.1
    return result.latents, result.image.tobytes()


def equal(ours: tuple[Tensor, bytes], theirs: tuple[Tensor, bytes]) -> bool:
    return ours[0].equal(theirs[0]) and ours[1] == theirs[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """kind -> its diffusers folder."""
    place = tmp_path_factory.mktemp("folders")
    return lru_cache(None)(lambda kind: tiny(kind).save(place / kind))


@pytest.fixture(scope="module")
def expected(folders: Folders) -> Callable[[str], tuple[Tensor, bytes]]:
    """kind -> what the folder draws."""
    return lru_cache(None)(lambda kind: drawn(opened(folders(kind))))


def missing_in(kind: str) -> list[str]:
    """Parts that the makers' single file does not hold."""
    return [name for name in tiny(kind).modules if name not in LAYOUTS[tiny(kind).layout]]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if tiny(kind).layout and kind != "sd15-instruct"])
def test_a_single_file_is_its_folder(folders: Folders, expected: Any, tmp_path: Path, kind: str) -> None:
    """Without the folder's weights: they are not there."""
    file = written(tiny(kind).original(), tmp_path / "one.safetensors")
    configs = shutil.copytree(folders(kind), tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    pipe = opened(file, config=configs, **{name: folders(kind) / name for name in missing_in(kind)})
    pipe.checkpoint.check()
    assert equal(drawn(pipe), expected(kind))


def test_a_prompt_and_every_part_are_heard(folders: Folders, expected: Any, tmp_path: Path) -> None:
    """What the comparisons rest on: another prompt, or one tensor of any part changed, is another picture."""
    assert not equal(drawn(opened(folders("sdxl")), "a blue car"), expected("sdxl"))
    whole = tiny("sdxl").original()
    for name in ("model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_out.bias",
                 "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.bias", "conditioner.embedders.1.model.text_projection"):
        changed = written(whole | {name: whole[name] + 0.3}, tmp_path / "changed.safetensors")
        assert not equal(drawn(opened(changed, config=folders("sdxl"))), expected("sdxl")), name


def part(kind: str, name: str, *, prefix: str | None = None) -> dict[str, Tensor]:
    """One part under its makers' names, bare or with their prefix."""
    own, (layout, place) = tiny(kind), LAYOUTS[tiny(kind).layout][name]
    return to_original(layout, own.states()[name], own.configs()[name], prefix=place if prefix is None else prefix)


@pytest.mark.parametrize(("kind", "bare", "keyword"), [row for row in (("sd15", True, False), ("sdxl", False, False), ("sd3", True, True),
                                                                        ("flux1", False, True)) if there(row[0])])
def test_every_part_from_a_file_of_its_own(folders: Folders, expected: Any, tmp_path: Path, kind: str, bare: bool, keyword: bool) -> None:
    files = {name: written(part(kind, name, prefix="" if bare else None), tmp_path / f"{name}.safetensors") for name in tiny(kind).modules}
    denoiser = files.pop(next(name for name in files if name in DENOISERS))
    tokenizers = {name: folders(kind) / name for name in tiny(kind).tokenizers}
    source, said = (None, {"denoiser": denoiser}) if keyword else (denoiser, {})
    assert equal(drawn(opened(source, config=folders(kind), **said, **files, **tokenizers)), expected(kind))


@pytest.mark.parametrize("kind", [kind for kind in ("sd15", "flux1", "pixart") if there(kind)])
def test_a_denoiser_in_diffusers_names(folders: Folders, expected: Any, tmp_path: Path, kind: str) -> None:
    """With the rest from folders; pixart has no other names."""
    name = next(name for name in tiny(kind).modules if name in DENOISERS)
    file = written(tiny(kind).states()[name], tmp_path / "net.safetensors")
    rest = {other: folders(kind) / other for other in tiny(kind).modules if other != name}
    assert equal(drawn(opened(file, config=folders(kind), **rest)), expected(kind))
    opened(None, denoiser=file, config=folders(kind), **rest).checkpoint.check()


def test_one_part_in_place_of_the_folders(folders: Folders, expected: Any, tmp_path: Path) -> None:
    """A VAE from a file, from a folder, and from inside another checkpoint, all with other weights than the folder's."""
    other = {name: t + 0.1 if name.endswith("decoder.conv_out.bias") else t for name, t in tiny("sd15").original().items()}
    start = "first_stage_model."
    bare = written({name.removeprefix(start): t for name, t in other.items() if name.startswith(start)}, tmp_path / "vae.safetensors")
    whole = written(other, tmp_path / "whole.safetensors")
    state = tiny("sd15").states()["vae"]
    folder = shutil.copytree(folders("sd15") / "vae", tmp_path / "vae")
    written(state | {"decoder.conv_out.bias": state["decoder.conv_out.bias"] + 0.1}, folder / "diffusion_pytorch_model.safetensors")
    latents, picture = drawn(opened(folders("sd15"), vae=bare))
    assert latents.equal(expected("sd15")[0]) and picture != expected("sd15")[1]
    for place in (whole, folder):
        assert equal(drawn(opened(folders("sd15"), vae=place)), (latents, picture))
    with pytest.raises(ModelError, match="sd15 has no part 'transformer': expected one of text_encoder, unet, vae, denoiser, or a tokenizer"):
        opened(folders("sd15"), transformer=bare)


def test_a_part_in_a_folder_brings_its_config(folders: Folders, tmp_path: Path) -> None:
    """A bare file is measured by the checkpoint's config, a folder by its own; a denoiser's folder needs nothing else."""
    state = {name: t for name, t in tiny("sd15").states()["text_encoder"].items() if ".layers.2." not in name}
    bare = written(state, tmp_path / "short.safetensors")
    with pytest.raises(ModelError, match=r"short.safetensors do not fit its CLIPTextModel: 16 missing \(first 'encoder.layers.2"):
        opened(folders("sd15"), text_encoder=bare).checkpoint.check()
    folder = tmp_path / "words"
    written(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(tiny("sd15").configs()["text_encoder"] | {"num_hidden_layers": 2}))
    short = opened(folders("sd15"), text_encoder=folder)
    made = drawn(short)
    rest = {"vae": folders("sd15") / "vae", "text_encoder": folder}
    assert equal(drawn(opened(None, denoiser=folders("sd15") / "unet", config=folders("sd15"), **rest)), made)
    with pytest.raises(ModelError, match="config= is for a file, and sd15 is a folder with configs of its own"):
        opened(folders("sd15"), config=folders("sd15"))


def test_a_denoiser_in_place_of_a_folders_own(folders: Folders, expected: Any, tmp_path: Path) -> None:
    state = tiny("sd15").states()["unet"]
    file = written(state | {"conv_out.bias": state["conv_out.bias"] + 0.3}, tmp_path / "net.safetensors")
    made = drawn(opened(folders("sd15"), denoiser=file))
    assert not equal(made, expected("sd15")) and equal(made, drawn(opened(folders("sd15"), unet=file)))


def test_shards(folders: Folders, expected: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folders("sd15"), tmp_path / "sharded")
    for name, size in (("unet", "100KB"), ("text_encoder", "2MB")):
        shutil.rmtree(folder / name)
        tiny("sd15").modules[name].save_pretrained(folder / name, max_shard_size=size)
        assert len(list((folder / name).glob("*-of-*.safetensors"))) > 1 and (folder / name).glob("*.index.json")
    assert equal(drawn(opened(folder)), expected("sd15"))


def test_older_names_inside_a_folder(folders: Folders, expected: Any, tmp_path: Path) -> None:
    """As transformers 4 and older diffusers wrote them, in a half-precision file beside nothing else."""
    folder = shutil.copytree(folders("sd15"), tmp_path / "older")
    words = {f"text_model.{name}": t for name, t in tiny("sd15").states()["text_encoder"].items()}
    written(words | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, folder / "text_encoder" / "model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = tiny("sd15").states()["vae"]
    for new, name in old.items():
        vae = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): t for key, t in vae.items()}
    assert "encoder.mid_block.attentions.0.query.weight" in vae
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    written(vae, folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert equal(drawn(opened(folder)), expected("sd15"))


# Packed weights


def changed(kind: str, name: str, change: Callable[[str, Tensor], Tensor], place: Path) -> Path:
    """A folder of the kind in which a part has other weights."""
    own = tiny(kind)
    folder = own.save(place)
    written({key: change(key, t) for key, t in own.states()[name].items()}, folder / name / "diffusion_pytorch_model.safetensors")
    return folder


def near(ours: tuple[Tensor, bytes], theirs: tuple[Tensor, bytes], *, least: float, most: float) -> None:
    """Pictures whose mean difference, as a share of the range, is within bounds: packed weights are others, but not far."""
    a, b = (np.frombuffer(picture, dtype=np.uint8).astype(float) for _, picture in (ours, theirs))
    assert least < np.abs(a - b).mean() / 255 < most


def linear(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name.endswith("weight")


@pytest.mark.parametrize("scaled", [True, False])
def test_eight_bit_floats(folders: Folders, expected: Any, tmp_path: Path, scaled: bool) -> None:
    """Equal to a folder of the unpacked weights; joined projections have one scale for their three parts."""
    fp8, original = torch.float8_e4m3fn, tiny("flux1").original()
    net = {name: t for name, t in original.items() if name.startswith("model.diffusion_model.") and linear(name, t)}
    scales = {name: t.abs().max().float() / 448 if scaled else torch.tensor(1.0) for name, t in net.items()}
    packed = {name: (t / scales[name]).to(fp8) for name, t in net.items()}
    marks = {name.removesuffix("weight") + "scale_weight": scale for name, scale in scales.items()} | {"scaled_fp8": torch.zeros(2).to(fp8)}
    file = written(original | packed | (marks if scaled else {}), tmp_path / "packed.safetensors")
    unpacked = original | {name: t.float() * scales[name] for name, t in packed.items()}
    plain = written(unpacked, tmp_path / "plain.safetensors")
    assert max(float((unpacked[name] - t).abs().max() / t.abs().max()) for name, t in net.items()) > 0.01
    made = drawn(opened(file, config=folders("flux1")))
    assert equal(made, drawn(opened(plain, config=folders("flux1"))))
    near(made, expected("flux1"), least=0, most=0.1)
    kept_packed(file, made, config=folders("flux1"))


def kept_packed(file: Path, made: tuple[Tensor, bytes], **said: Any) -> None:
    """Left as the file has them, packed weights draw the same bytes wherever they lie, in less memory than unpacked."""
    for policy in ("resident", "stage", "stream", "disk"):
        pipe = opened(file, quantise="stored", residency=policy, **said)
        assert equal(made, drawn(pipe)), policy
    held, whole = (opened(file, quantise=way, **said) for way in ("stored", None))
    with held.residency.use("denoiser") as small, whole.residency.use("denoiser") as large:
        (net,), (plain,) = small.values(), large.values()
        kinds = [module for module in net.modules() if isinstance(module, HeldLinear)]
        assert len(kinds) > 10 and weight_bytes(net) < 0.5 * weight_bytes(plain)
        stage = next(part for part in held.checkpoint.family.parts if part.stages == ("denoiser",))
        on_paper = paper_part(held.checkpoint.sources[stage.name], stage, torch.float32, quantise="stored")
        assert {name: (t.shape, t.dtype) for name, t in on_paper.state_dict().items()} == {name: (t.shape, t.dtype) for name, t in net.state_dict().items()}


@pytest.mark.parametrize("packing", ["Q8_0", "Q4_0"])
def test_gguf(folders: Folders, expected: Any, tmp_path: Path, packing: str) -> None:
    """A denoiser alone: equal to a folder of the weights as the gguf package unpacks them."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[packing]
    net = part("flux1", "transformer", prefix="")
    writer = gguf.GGUFWriter(tmp_path / "net.gguf", "flux")
    unpacked = {}
    for name, tensor in net.items():
        values = tensor.numpy()
        if linear(name, tensor) and tensor.shape[1] % 32 == 0:
            data = gguf.quants.quantize(values, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
            unpacked[name] = torch.from_numpy(gguf.quants.dequantize(data, kind))
        else:
            writer.add_tensor(name, values)
            unpacked[name] = tensor
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    assert sum(not unpacked[name].equal(t) for name, t in net.items()) > 10
    rest = {name: folders("flux1") / name for name in ("vae", "text_encoder", "text_encoder_2")}
    pipe = opened(tmp_path / "net.gguf", config=folders("flux1"), **rest)
    pipe.checkpoint.check()
    plain = written(unpacked, tmp_path / "plain.safetensors")
    made = drawn(pipe)
    assert equal(made, drawn(opened(plain, config=folders("flux1"), **rest)))
    near(made, expected("flux1"), least=0, most=0.02 if packing == "Q8_0" else 0.2)
    kept_packed(tmp_path / "net.gguf", made, config=folders("flux1"), **rest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(folders: Folders, expected: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    """The same halves in a single file and in a folder are the same picture, whatever the networks run in."""
    whole = written({name: t.to(dtype) if t.is_floating_point() else t for name, t in tiny("sd15").original().items()}, tmp_path / "half.safetensors")
    folder = changed("sd15", "unet", lambda _, t: t.to(dtype), tmp_path / "half")
    for name in ("vae", "text_encoder"):
        path = next((folder / name).glob("*.safetensors"))
        written({key: t.to(dtype) for key, t in tiny("sd15").states()[name].items()}, path)
    for run in ("float32", str(dtype).removeprefix("torch.")) if dtype == torch.bfloat16 else ("float32",):
        made = drawn(opened(whole, config=folder, dtype=run))
        assert equal(made, drawn(opened(folder, dtype=run)))
        near(made, expected("sd15"), least=0, most=0.05)


# The hub


@pytest.fixture
def hub(server: Any, folders: Folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:  # noqa: F811
    """A server whose org/model is the sd15 folder, with the single file beside it and things that are never fetched."""
    files = {path.relative_to(folders("sd15")).as_posix(): path.read_bytes() for path in folders("sd15").rglob("*") if path.is_file()}
    files |= {"one.safetensors": written(tiny("sd15").original(), tmp_path / "one.safetensors").read_bytes(), "unet/pytorch_model.bin": b"pickle"}
    server.commits[OLD] = files
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return server


def test_a_hub_name(hub: Any, expected: Any) -> None:
    pipe = opened("org/model")
    assert equal(drawn(pipe), expected("sd15"))
    asked = {path.rpartition("/")[2] for path, _ in hub.seen}
    assert not asked & {"one.safetensors", "pytorch_model.bin"}
    before = len(hub.seen)
    hub.commits[NEW], hub.branches["main"] = {}, NEW  # the repository moves on: the name stays at the commit that it was resolved to
    assert equal(drawn(opened("org/model")), expected("sd15"))
    assert len(hub.seen) == before


def test_a_file_of_a_repository(hub: Any, folders: Folders, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert equal(drawn(opened(f"org/model@{OLD}:one.safetensors", config=folders("sd15"))), expected("sd15"))
    assert [path for path, _ in hub.seen if "/resolve/" in path] == [f"/org/model/resolve/{OLD}/one.safetensors"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert equal(drawn(opened(f"org/model@{OLD}:one.safetensors", config=folders("sd15"))), expected("sd15"))
    with pytest.raises(ModelError, match="not in the cache, and offline mode is on"):
        opened("org/other")


def test_a_download_that_breaks_off_leaves_nothing_half(hub: Any, expected: Any) -> None:
    """The error says so; the next call goes on where it stopped."""
    name = "text_encoder/model.safetensors"
    hub.cuts[name] = 1000
    with pytest.raises(ModelError, match="model.safetensors"):
        opened("org/model")
    assert equal(drawn(opened("org/model")), expected("sd15"))
    ranges = [headers.get("Range") for path, headers in hub.seen if path.endswith(name)]
    assert ranges[-1] == "bytes=1000-"


def test_a_card_whose_files_lie_on_the_hub(hub: Any, expected: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from latentgen.models import card

    text = 'name = "mine"\nfamily = "sd15"\nrepo = "org/model"\n[defaults]\nsteps = 7\n'
    (tmp_path / "mine.toml").write_text(text)
    mine = card.read_card(tmp_path / "mine.toml")
    monkeypatch.setattr(card, "cards", lambda: {"mine": mine})
    pipe = opened("mine")
    assert pipe.plan(PROMPT, seed=0).steps == 7 and pipe.checkpoint.name == "mine" and equal(drawn(pipe), expected("sd15"))


# Cards and configs said beside a file


def test_a_card_beside_a_folder(folders: Folders) -> None:
    pipe = opened(folders("sdxl"), card="sdxl-turbo")
    assert (pipe.plan(PROMPT, seed=0).steps, pipe.family.defaults.guidance_scale, pipe.checkpoint.name) == (1, 1.0, "sdxl-turbo")
    assert opened(folders("sdxl")).plan(PROMPT, seed=0).steps != 1


def test_tokenizers_from_elsewhere(folders: Folders, expected: Any, tmp_path: Path) -> None:
    """Named beside a file: a folder, or tokenizer.json itself. Without one, CLIP's is the packaged one."""
    own: Tiny = tiny("flux1")
    bare = shutil.copytree(folders("flux1"), tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    file = written(own.original(), tmp_path / "one.safetensors")
    with pytest.raises(ModelError, match="no tokenizer_2 is given.*name it with tokenizer_2=PATH"):
        opened(file, config=bare)
    for place in (folders("flux1") / "tokenizer_2", folders("flux1") / "tokenizer_2" / "tokenizer.json"):
        assert equal(drawn(opened(file, config=bare, tokenizer_2=place)), expected("flux1"))
    with pytest.raises(ModelError, match="tokenizer_2 is 'nowhere', which is not there"):
        opened(file, config=bare, tokenizer_2="nowhere")
