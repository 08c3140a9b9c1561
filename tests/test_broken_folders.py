"""Folders that are broken or hostile: configs that no checkpoint has, shards that are absent or lie elsewhere, parts that are missing or not known.

Each one clear sentence, soon, before any tensor is read (see test_broken_files.py, whose rules hold here too).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_broken_files import checked, nothing_is_read, opened, reads, refused  # noqa: F401
from test_convert import maker
from test_inspect import layout, sparse
from tiny_folders import tiny

from latentgen.models.card import families, published

each = pytest.mark.parametrize


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to break."""
    return shutil.copytree(tiny_folder, tmp_path / "broken")


def configured(folder: Path, part: str, **changes: Any) -> None:
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BIG = 2**20


@each("part, changes, words", [
    ("unet", {"block_out_channels": [BIG + 1, 32]}, "sets block_out_channels to 1048577: expected at most 1,048,576"),
    ("unet", {"block_out_channels": [BIG, BIG]}, "broken/unet"), ("unet", {"in_channels": BIG}, "(16, 1048576, 3, 3) is expected"),
    ("unet", {"out_channels": BIG}, "broken/unet"),
    ("unet", {"cross_attention_dim": BIG}, "broken/unet"), ("unet", {"cross_attention_dim": 10**30}, "sets cross_attention_dim to 1000000"),
    ("unet", {"block_out_channels": [-16, 32]}, "sets block_out_channels to -16"), ("unet", {"in_channels": -4}, "sets in_channels to -4"),
    ("unet", {"attention_head_dim": 0}, "does not fit UNet2DConditionModel"), ("unet", {"norm_num_groups": 0}, "does not fit"),
    ("unet", {"layers_per_block": BIG}, "sets layers_per_block"), ("unet", {"layers_per_block": 100}, "broken/unet"),
    ("unet", {"block_out_channels": [16] * 5000}, "sets block_out_channels"), ("unet", {"down_block_types": ["Evil", "DownBlock2D"]}, "does not fit"),
    ("unet", {"_class_name": "EvilModel"}, "describes a EvilModel: expected UNet2DConditionModel"),
    ("unet", {"_class_name": ["os", "system"]}, "expected UNet2DConditionModel"), ("unet", {"auto_map": {"AutoModel": "evil.py"}}, "names no code"),
    ("text_encoder", {"vocab_size": BIG}, "broken/text_encoder"), ("text_encoder", {"hidden_size": BIG}, "broken/text_encoder"),
    ("text_encoder", {"num_hidden_layers": 10**6}, "sets num_hidden_layers"), ("text_encoder", {"hidden_act": "os.system"}, "broken/text_encoder"),
    ("text_encoder", {"max_position_embeddings": BIG}, "broken/text_encoder"),
    ("vae", {"decoder_block_out_channels": [BIG + 1] * 4}, "sets decoder_block_out_channels"),
    ("vae", {"scaling_factor": "1e999"}, "expected a number"),
    ("vae", {"num_decoder_blocks": [10**9] * 4}, "sets num_decoder_blocks")], ids=str)
def test_configs_that_no_checkpoint_has(refused: Any, broken: Path, part: str, changes: dict[str, Any], words: str) -> None:  # noqa: F811
    configured(broken, part, **changes)
    refused(lambda: checked(broken), words)


HOSTILE = {  # a table that the module computes as it is made, as long as its config says, and that lies in the file, too
    "sd3": ("transformer", {"pos_embed_max_size": 2**14}, "pos_embed.pos_embed"),
    "sd15": ("text_encoder", {"max_position_embeddings": 2**20}, "position"),
}


@each("kind", [kind for kind in HOSTILE if kind in families()])
def test_a_config_costs_no_memory_before_it_fits(refused: Any, tmp_path: Path, kind: str) -> None:  # noqa: F811
    """The file is asked first: 32 GB of sines and cosines are never computed."""
    folder, (part, changes, words) = tiny(kind).save(tmp_path / "broken"), HOSTILE[kind]
    configured(folder, part, **changes)
    refused(lambda: checked(folder), f"broken/{part}", "1 of another shape", words)


@each("said", [{"pipeline": ["evil", "Evil"]}, {"unet": ["os", "system"]}, {"_class_name": "../../evil"}], ids=str)
def test_what_an_index_says_of_classes_is_not_looked_up(broken: Path, said: dict[str, Any]) -> None:
    (broken / "model_index.json").write_text(json.dumps(said))
    checked(broken)


# Shards


def sharded(folder: Path, names: list[str] | None = None) -> list[str]:
    """The U-Net cut in three, its index naming `names` instead."""
    place = folder / "unet"
    shutil.rmtree(place)
    rows = list(layout("sd15.diffusers").items())
    own = [f"diffusion_pytorch_model-0000{n + 1}-of-00003.safetensors" for n in range(3)]
    for n, name in enumerate(own):
        sparse(place / name, dict(rows[n::3]))
    said = names or own
    index = {"weight_map": {name: said[i % 3] for i, (name, _) in enumerate(rows)}}
    (place / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (place / "config.json").write_text(json.dumps(published("sd15")["parts"]["unet"]))
    return own


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A folder of SD 1.5 at full size, the other parts from a whole checkpoint beside it."""
    folder = tmp_path / "sd15"
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(published("sd15")["scheduler"]))
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "unet").mkdir()
    sharded(folder)
    return folder


def beside(folder: Path) -> dict[str, Path]:
    """The other parts, in folders with their configs."""
    for part in ("vae", "text_encoder"):
        config = published("sd15")["parts"][part]
        sparse(folder.parent / part / "model.safetensors", {name: tuple(t.shape) for name, t in maker().module_state(config).items()})
        (folder.parent / part / "config.json").write_text(json.dumps(config))
    return {part: folder.parent / part for part in ("vae", "text_encoder")}


def test_whole_shards_are_one_part(full: Path) -> None:
    pipe = opened(full, **beside(full))
    pipe.checkpoint.check()
    assert (pipe.checkpoint.variant, len(pipe.checkpoint.sources["unet"].files)) == ("sd15", 3)


@each("break_, words", [
    (lambda place, own: (place / own[1]).unlink(), "names the shard diffusion_pytorch_model-00002-of-00003.safetensors, which is not there: get it"),
    (lambda place, own: (place / own[2]).write_bytes(b""), "diffusion_pytorch_model-00003-of-00003.safetensors is empty"),
    (lambda place, own: shutil.copy(place / own[0], place / own[1]), "do not fit its UNet2DConditionModel: 229 missing (first "),
    (lambda place, own: (place / f"{own[0][:23]}.safetensors.index.json").write_text("{"), "cannot be read (JSONDecodeError)"),
    (lambda place, own: (place / f"{own[0][:23]}.safetensors.index.json").write_text('{"weight_map": []}'), "expected a weight_map of shards"),
    (lambda place, own: (place / f"{own[0][:23]}.safetensors.index.json").write_text('{"weight_map": {"a": 3}}'), "expected a weight_map of shards"),
    (lambda place, own: (place / f"{own[0][:23]}.safetensors.index.json").write_text('{"weight_map": {}}'), "expected a weight_map of shards"),
], ids=["absent", "empty", "twice", "no JSON", "a list", "numbers", "no shards"])
def test_shards_that_are_not_whole(refused: Any, full: Path, break_: Callable[[Path, list[str]], object], words: str) -> None:  # noqa: F811
    parts, place = beside(full), full / "unet"
    break_(place, sorted(path.name for path in place.glob("*.safetensors")))
    refused(lambda: checked(full, **parts), words)


INSIDE = "expected a .safetensors file in the same folder"


OUTSIDE = ("../outside.safetensors", "/etc/passwd", "/elsewhere/x.safetensors", "sub/x.safetensors", "x.bin", "..", "")


@each("name, words", [*((name, INSIDE) for name in OUTSIDE), ("x\x00.safetensors", "names the shard")])
def test_shards_outside_the_folder(refused: Any, full: Path, name: str, words: str) -> None:  # noqa: F811
    parts, own = beside(full), sorted(path.name for path in (full / "unet").glob("*.safetensors"))
    sparse(full / "outside.safetensors", {"a": (2,)})
    sharded(full, [own[0], name, own[2]])
    refused(lambda: checked(full, **parts), "names the shard", words)


@each("what", ["a shard", "one file", "the part's folder"])
def test_links_that_leave_the_folder(refused: Any, full: Path, what: str) -> None:  # noqa: F811
    parts, place = beside(full), full / "unet"
    own = sorted(place.glob("*.safetensors"))[1]
    if what == "a shard":
        own.rename(full.parent / "elsewhere.safetensors")
        own.symlink_to(full.parent / "elsewhere.safetensors")
    elif what == "one file":
        shutil.rmtree(place)
        sparse(full.parent / "elsewhere.safetensors", layout("sd15.diffusers"))
        place.mkdir()
        (place / "diffusion_pytorch_model.safetensors").symlink_to(full.parent / "elsewhere.safetensors")
        (place / "config.json").write_text(json.dumps(published("sd15")["parts"]["unet"]))
    else:
        place.rename(full.parent / "elsewhere")
        place.symlink_to(full.parent / "elsewhere")
    refused(lambda: checked(full, **parts), "links to a file outside the model's folder: put the file itself there")


def test_the_hubs_cache_links_to_its_own_files(full: Path, tmp_path: Path) -> None:
    """As other programs lay it out; a part given from there, too."""
    snapshot, blobs = tmp_path / "models--org--name" / "snapshots" / ("a" * 40), tmp_path / "models--org--name" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    parts = beside(full)
    full.rename(snapshot)
    for n, file in enumerate(sorted(snapshot.rglob("*.safetensors"))):
        file.rename(blobs / str(n))
        file.symlink_to(blobs / str(n))
    checked(snapshot, **parts)
    whole = sparse(tmp_path / "sd15.safetensors", layout("sd15"))
    assert len(opened(whole, unet=snapshot / "unet").checkpoint.sources["unet"].files) == 3


# Parts that are missing or not known


def test_missing_parts_are_named_with_the_cure(refused: Any, full: Path, tmp_path: Path) -> None:  # noqa: F811
    parts = beside(full)
    refused(lambda: opened(full), "sd15 has no text_encoder and no vae: name them, as in load(..., text_encoder=PATH)")
    refused(lambda: opened(full, vae=parts["vae"]), "sd15 has no text_encoder: name it, as in load(..., text_encoder=PATH)")
    net = sparse(tmp_path / "net.safetensors", layout("sd15.diffusers"))
    refused(lambda: opened(net, text_encoder=parts["text_encoder"]), "net.safetensors has no vae: name it, as in load(..., vae=PATH)")
    refused(lambda: opened(None, denoiser=net), "net.safetensors has no text_encoder and no vae")
    refused(lambda: opened(None, vae=parts["vae"]), "the model is None", "denoiser=")


@each("name, words", [
    ("text_encoder_2", "sd15 has no part 'text_encoder_2': expected one of text_encoder, unet, vae, denoiser, or a tokenizer"),
    ("transformer", "sd15 has no part 'transformer'"), ("controlnet", "sd15 has no part 'controlnet'"), ("vea", "sd15 has no part 'vea'"),
    ("tokenizer_3", "model.safetensors reads no tokenizer_3: expected tokenizer, so leave it out")])
def test_parts_that_the_family_has_not(refused: Any, tmp_path: Path, name: str, words: str) -> None:  # noqa: F811
    file = sparse(tmp_path / "model.safetensors", layout("sd15"))
    refused(lambda: opened(file, **{name: file}), words)


@each("value, words", [("nowhere.safetensors", "vae is 'nowhere.safetensors', which is not there: expected a file or a folder"),
                       (None, "vae is None: expected a file or a folder"), (3, "vae is 3: expected a file or a folder"),
                       ("", "expected a file or a folder"),
                       ("a\x00b", "expected a file or a folder"), ("/dev/null", "is a device or a pipe")])
def test_parts_that_are_not_there(refused: Any, tmp_path: Path, value: Any, words: str) -> None:  # noqa: F811
    file = sparse(tmp_path / "model.safetensors", layout("sd15"))
    refused(lambda: checked(file, vae=value), words)


def test_a_folder_without_a_config(refused: Any, tmp_path: Path) -> None:  # noqa: F811
    file = sparse(tmp_path / "model.safetensors", layout("sd15"))
    sparse(tmp_path / "vae" / "model.safetensors", layout("parts/vae-sd"))
    refused(lambda: opened(file, vae=tmp_path / "vae"), "vae/config.json cannot be read")
    (tmp_path / "empty").mkdir()
    refused(lambda: opened(file, vae=tmp_path / "empty"), "empty has no weights: expected")
    for config in (tmp_path / "empty", tmp_path / "vae"):
        refused(lambda config=config: opened(file, config=config), f"config is '{config.name}'", "expected a folder in diffusers layout")


@each("config, words", [(3, "config is 3: expected a published variant's name or a folder"), ("a/b", "config is 'b', which is no folder"),
                        (Path("sd15"), "config is 'sd15', which is no folder"), ("a\x00b", "expected a published variant's name")])
def test_a_config_that_is_not_there(refused: Any, tmp_path: Path, config: Any, words: str) -> None:  # noqa: F811
    file = sparse(tmp_path / "model.safetensors", layout("sd15"))
    refused(lambda: opened(file, config=config), words)


def test_configs_of_another_family(refused: Any, tmp_path: Path) -> None:  # noqa: F811
    file, folder = sparse(tmp_path / "model.safetensors", layout("sd15")), tiny("sdxl").save(tmp_path / "sdxl")
    refused(lambda: opened(file, config=folder), "model.safetensors is sd15 by its tensors but config= names sdxl, which is of the family sdxl")
    other = tiny("sd21").save(tmp_path / "sd21")
    refused(lambda: opened(other, card="sdxl-turbo"), "sd21 is of the family sd21 but the card 'sdxl-turbo' is of sdxl")


# Parts of different checkpoints: each whole by itself


@each("kind, part, other", [
    ("sd3", "vae", "sd15/vae"), ("flux1", "vae", "sd15/vae"), ("pixart", "vae", "sd3/vae"), ("sd3", "text_encoder_2", "sd21/text_encoder"),
    ("pixart", "text_encoder", "sd3/text_encoder_3"), ("flux2", "text_encoder", "zimage/text_encoder"),
    ("sd15", "vae", "sd3/vae"), ("sd15", "text_encoder", "sd21/text_encoder"), ("sd21", "vae", "sd3/vae"), ("sdxl", "vae", "flux1/vae"),
    ("sdxl", "text_encoder", "sd21/text_encoder"), ("flux1", "text_encoder", "sd21/text_encoder"),
    ("flux1", "text_encoder_2", "sd3/text_encoder_3")])
@pytest.mark.usefixtures("reads")
def test_parts_that_do_not_go_together(refused: Any, tmp_path: Path, kind: str, part: str, other: str) -> None:  # noqa: F811
    own, (donor, name) = tiny(kind).save(tmp_path / kind), other.split("/")
    tiny(donor).save(tmp_path / donor)
    refused(lambda: opened(own, **{part: tmp_path / donor / name}).txt2img("a cat", width=64, height=64, steps=1, seed=0))
