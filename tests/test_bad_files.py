"""Bad files: a checkpoint that is missing, damaged or hostile, and places where a picture cannot be written. One clear sentence each, nothing left behind."""

import errno
import io
import json
import os
import shutil

import pytest
import torch
from PIL import Image
from test_bad_input import ONE, each, refused

import latentgen
from latentgen.errors import LatentgenError, ModelError, OutputError, RequestError

# Models


@pytest.fixture
def broken(tiny_folder, tmp_path):
    """A copy of the checkpoint to break."""
    return shutil.copytree(tiny_folder, tmp_path / "broken")


def load(source, **options):
    return latentgen.load(source, **{"dtype": "float32", "device": "cpu", "progress": False} | options)


@each("name", ["no such model", "", None, 5, "a\x00b", "../etc", "/nowhere/at/all", b"tiny"])
def test_a_model_that_is_not_there(name):
    refused(lambda: load(name), kind=ModelError)


def test_a_misspelt_model(monkeypatch, tiny_folder):
    from latentgen.models.card import find_card

    monkeypatch.setattr("latentgen.models.card.cards", lambda: {"tiny": find_card(tiny_folder), "glyph": find_card(tiny_folder)})
    refused(lambda: load("glyf"), "there is no model 'glyf': did you mean 'glyph'?", "one of glyph, tiny", kind=ModelError)


@each("options, words", [({"device": "gpu"}, "device is 'gpu'"), ({"device": "cuda:99"}, "'cuda:99'"), ({"device": None}, "device is None"),
                         ({"device": "meta"}, "meta"), ({"dtype": "int8"}, "dtype is 'int8'"),
                         ({"dtype": torch.float16}, "dtype is torch.float16"), ({"residency": "lazy"}, "'resident', 'stage'")])
def test_bad_places(tiny_folder, options, words):
    refused(lambda: load(tiny_folder, **options), words)


CARD = 'name = "x"\nfamily = "glyph"\n'


@each("card, words", [
    ("not toml at all", "cannot be read"), ('family = "glyph"\n', "lacks 'name'"), ('name = "x"\n', "lacks 'family'"),
    (CARD + 'weight = "x"\n', "unknown key 'weight'"),
    (CARD + 'folder = "../outside"\n', "points outside"), (CARD + 'folder = "/etc"\n', "points outside"),
    (CARD + "folder = 3\n", "sets folder to 3: expected str"),
    ('name = "x"\nfamily = "nosuch"\n', "there is no model family 'nosuch'"), ('name = "x"\nfamily = "os.path"\n', "there is no model family"),
    ('name = "x"\nfamily = "__init__"\n', "no model family"),
    ('name = "x"\nfamily = 3\n', "sets family to 3"), ('name = 3\nfamily = "glyph"\n', "sets name to 3"),
    (CARD + "[defaults]\nwidht = 64\n", "unknown default 'widht'"),
    (CARD + '[defaults]\nwidth = "big"\n', "default width to 'big': expected int"), (CARD + "[defaults]\nsteps = true\n", "default steps to True"),
    (CARD + "defaults = 3\n", "sets defaults to 3"),
    (CARD + "preview = 3\n", "sets preview to 3"), (CARD + "preview = [[1, 2]]\n", "rows of 3 numbers"),
    (CARD + "preview = [1, 2, 3]\n", "rows of 3 numbers"), (CARD + "preview = [[0.1, 0.1, 0.1]]\n", "preview"),
    (b'name = "\xff"\n', "cannot be read")])
def test_bad_cards(broken, card, words):
    (broken / "card.toml").write_bytes(card if isinstance(card, bytes) else card.encode())
    refused(lambda: load(broken), words, kind=ModelError)


@each("index, words", [({"_class_name": "Evil"}, "names the pipeline 'Evil'"), ({}, "no model_index.json and no denoiser"), (None, "no model_index.json and no denoiser")])
def test_a_folder_of_unknown_kind(broken, index, words):
    (broken / "card.toml").unlink()
    (broken / "model_index.json").unlink() if index is None else (broken / "model_index.json").write_text(json.dumps(index))
    refused(lambda: load(broken), "'broken' is of no family that this version knows", words, kind=ModelError)


def test_a_card_whose_folder_links_outside(broken, tmp_path):
    (broken / "card.toml").write_text(CARD + 'folder = "parts"\n')
    (broken / "parts").symlink_to(tmp_path)
    refused(lambda: load(broken), "points outside", kind=ModelError)


def only(folder, part):
    return next((folder / part).glob("*.safetensors"))


def pickled(folder):
    only(folder, "unet").unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")


def cut(folder):
    os.truncate(only(folder, "unet"), only(folder, "unet").stat().st_size - 100)


def emptied(folder):
    only(folder, "vae").write_bytes(b"")


def garbled(folder):
    data = bytearray(only(folder, "unet").read_bytes())
    data[8:40] = b"\xff" * 32
    only(folder, "unet").write_bytes(data)


def listed(folder):
    only(folder, "unet").write_bytes((2).to_bytes(8, "little") + b"[]")


def headless(folder):
    only(folder, "unet").write_bytes((12).to_bytes(8, "little") + b'{"a": {"b":1')


def zipped(folder):
    """A pickle that is only named as safetensors."""
    torch.save({"a": torch.zeros(3)}, only(folder, "unet"))


def configured(part, **changes):
    def change(folder):
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def overwritten(path, text):
    return lambda folder: (folder / path).write_text(text)


def merges_from_elsewhere(folder):
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\nzzq qqz\n")


@each("damage, words", [
    (pickled, "a pickle, which can run code"), (cut, "is cut short"), (emptied, "not a safetensors file"), (garbled, "damaged header"),
    (listed, "damaged header"), (headless, "damaged header"),
    (zipped, "not a safetensors file"), (lambda f: only(f, "vae").unlink(), "has no weights"),
    (lambda f: shutil.rmtree(f / "text_encoder"), "broken has no text_encoder: name it"),
    (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"), (merges_from_elsewhere, "tokenizer"),
    (overwritten("tokenizer/vocab.json", "[]"), "tokenizer"),
    (overwritten("tokenizer/vocab.json", '{"<|endoftext|>": 0}'), "tokenizer"),
    (overwritten("tokenizer/tokenizer_config.json", '{"model_max_length": 1}'), "model_max_length is 1"),
    (configured("vae", scaling_factor="big"), "scaling_factor to 'big'"), (configured("vae", auto_map={}), "names no code"),
    (overwritten("vae/config.json", "{"), "cannot be read"),
    (overwritten("vae/config.json", "[]"), "expected a plain object")])
def test_damaged_checkpoints_are_refused_when_opened(broken, damage, words):
    damage(broken)
    refused(lambda: load(broken), words.replace("tiny/", "broken/"), kind=ModelError)


@each("damage, words", [
    (configured("unet", block_out_channels=[16, 64]), "do not fit its UNet2DConditionModel"), (configured("unet", layers_per_block=2), "do not fit its UNet2DConditionModel"),
    (configured("unet", down_block_types=["NoSuchBlock", "DownBlock2D"]), "does not fit UNet2DConditionModel"),
    (configured("unet", block_out_channels="many"), "does not fit"),
    (configured("text_encoder", hidden_size=24), "broken/text_encoder"), (configured("text_encoder", num_hidden_layers=3), "broken/text_encoder"),
    (configured("vae", decoder_block_out_channels=[8, 8]), "broken/vae"), (overwritten("unet/config.json", "{}"), "broken/unet")])
def test_weights_that_do_not_fit_are_refused_when_read(broken, damage, words):
    damage(broken)
    own = load(broken)
    for _ in range(2):
        refused(lambda: own.txt2img("a cat", **ONE), words, kind=ModelError)
    assert all(users == 0 for users in own.residency._users.values())


def test_a_file_that_vanishes_after_opening(broken):
    own = load(broken)
    only(broken, "unet").unlink()
    refused(lambda: own.txt2img("a cat", **ONE), "broken/unet has no weights any more", kind=ModelError)


def test_a_pickle_of_tensors_is_read_when_asked_for(broken, tiny_folder):
    from safetensors.torch import load_file

    tensors = load_file(only(broken, "unet"))
    only(broken, "unet").unlink()
    torch.save(tensors, broken / "unet" / "diffusion_pytorch_model.bin")
    refused(lambda: load(broken), "a pickle, which can run code", "allow_pickle=True", kind=ModelError)
    made, same = (load(folder, **said).txt2img("a cat", **ONE) for folder, said in ((broken, {"allow_pickle": True}), (tiny_folder, {})))
    assert made.image.tobytes() == same.image.tobytes()


def test_a_config_does_not_choose_how_a_network_runs(broken):
    for key in ("_attn_implementation", "attn_implementation"):
        configured("text_encoder", **{key: "someone/kernel"})(broken)
    own = load(broken)
    own.txt2img("a cat", **ONE)
    with own.residency.use("text") as modules:
        assert modules["text_encoder"].config._attn_implementation == "sdpa"


def test_whole_numbers_are_no_weights(broken):
    from safetensors.torch import load_file, save_file

    tensors = load_file(only(broken, "unet"))
    save_file(tensors | {"conv_in.bias": tensors["conv_in.bias"].to(torch.int8)}, only(broken, "unet"))
    refused(lambda: load(broken).txt2img("a cat", **ONE), "'conv_in.bias' of broken/unet is stored as torch.int8", kind=ModelError)


@each("name", ["model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"])
def test_shards_of_a_half_precision_variant(broken, tiny_folder, name):
    (only(broken, "text_encoder")).rename(broken / "text_encoder" / "model.fp16-00001-of-00001.safetensors")
    (broken / "text_encoder" / name).write_text(json.dumps({"weight_map": {"x": "model.fp16-00001-of-00001.safetensors"}}))
    made, same = (load(folder).txt2img("a cat", **ONE).image.tobytes() for folder in (broken, tiny_folder))
    assert made == same


@each("index", [{"unet": None}, {"unet": []}, {"unet": 3}])
def test_an_odd_index_is_no_crash(broken, index):
    (broken / "model_index.json").write_text(json.dumps(index))
    if index["unet"] is None:
        refused(lambda: load(broken), "broken has no unet", kind=ModelError)
    else:
        assert load(broken)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil",))


def test_a_pickle_of_anything_else_is_refused_even_then(broken, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    only(broken, "unet").unlink()
    torch.save({"state_dict": Evil()}, broken / "unet" / "diffusion_pytorch_model.bin")
    refused(lambda: load(broken, allow_pickle=True), "holds more than tensors", kind=ModelError)
    assert not (tmp_path / "evil").exists()


def test_a_folder_name_never_runs_code(broken, tmp_path):
    """The class comes from the family's declaration: what a folder says about classes and modules is not run, and another class is refused."""
    (broken / "model_index.json").write_text(json.dumps({"_class_name": "Evil", "unet": ["os", "system"]}))
    (broken / "unet" / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert load(broken).txt2img("a cat", **ONE).image.size == (64, 64) and not (tmp_path / "ran").exists()
    configured("unet", _class_name="os.system")(broken)
    refused(lambda: load(broken).txt2img("a cat", **ONE), "describes a os.system: expected UNet2DConditionModel", kind=ModelError)


# Output


def left_behind(folder):
    return sorted(p.name for p in folder.rglob("*"))


@each("name, words, kind", [
    ("cat", "has no ending: expected .png", RequestError), ("cat.gif", ".gif", RequestError), ("cat.png.exe", ".exe", RequestError),
    ("", "expected .png", RequestError),
    ("missing/cat.png", "cannot be written", OutputError), ("file/cat.png", "cannot be written", OutputError),
    ("folder.png", "cannot be written", OutputError),
    ("x" * 300 + ".png", "cannot be written", OutputError)])
@each("batch", [1, 2])
def test_places_where_nothing_can_be_written(pipe, tmp_path, name, words, kind, batch):
    """`file` is a file, so a folder under it cannot be written by anybody, root included."""
    (tmp_path / "file").write_text("")
    for folder in ("folder.png", "folder-1.png"):
        (tmp_path / folder).mkdir()
    before = left_behind(tmp_path)
    result = pipe.txt2img("a cat", batch=batch, **ONE)
    refused(lambda: result.save(tmp_path / name if name else ""), words, kind=kind)
    assert left_behind(tmp_path) == before
    assert result.save(tmp_path / "good.png")


@each("options, words", [({"quality": 0}, "quality is 0"), ({"quality": 101}, "quality"), ({"quality": "high"}, "'high'"),
                         ({"quality": True}, "True"), ({"quality": 90.5}, "90.5")])
def test_bad_quality(pipe, tmp_path, options, words):
    refused(lambda: pipe.txt2img("a cat", **ONE).save(tmp_path / "cat.jpg", **options), words, "1 to 100")
    assert left_behind(tmp_path) == []


@each("columns", [0, -1, 2.5, "two"])
def test_a_bad_grid(pipe, columns):
    refused(lambda: pipe.txt2img("a cat", **ONE).grid(columns), "columns is", "1 or more")


@each("fails", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_older_file(pipe, tmp_path, monkeypatch, fails):
    result = pipe.txt2img("a cat", **ONE)
    target = tmp_path / "cat.png"
    target.write_bytes(b"older")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if fails == "write":
            patch.setattr("pathlib.Path.open", lambda *a, **k: Full(io.open(*a, **k)))
        else:
            patch.setattr(os, fails, full)
        refused(lambda: result.save(target), "No space left on device", "nothing was left behind", kind=OutputError)
    assert left_behind(tmp_path) == ["cat.png"] and target.read_bytes() == b"older"
    result.save(target)
    assert left_behind(tmp_path) == ["cat.png"] and Image.open(target).size == (64, 64)


class Full:
    """A file on a disk that fills up half way through what is written."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.file.write(data[:len(data) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_one_word_catches_all():
    assert all(issubclass(getattr(latentgen, name), LatentgenError) for name in latentgen.__all__ if name.endswith("Error"))
