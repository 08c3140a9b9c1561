"""Which files of a repository are fetched: from lists of names alone."""

import pytest

from latentgen.errors import ModelError
from latentgen.models.pick import index_parts, pick
from latentgen.models.transfer import File


def listing(*names):
    return [File(name, 1, "") for name in ("model_index.json", *names)]


def shards(folder, variant=""):
    return [f"{folder}/model{variant}-0000{number}-of-00002.safetensors" for number in (1, 2)]


VAE = "vae/diffusion_pytorch_model.safetensors"
PLAIN = ["te/config.json", "te/model.safetensors.index.json", *shards("te")]
HALVES = ["te/model.safetensors.index.fp16.json", *shards("te", ".fp16")]


@pytest.mark.parametrize(("names", "options", "expected"), [
    (["vae/config.json", VAE, VAE.replace(".", ".fp16."), "vae/flax_model.msgpack", "vae/extra.txt"], {}, ["vae/config.json", VAE]),
    (["vae/config.json", "vae/model.fp16.safetensors"], {}, ["vae/config.json", "vae/model.fp16.safetensors"]),
    ([*PLAIN, *HALVES], {},
     PLAIN),
    ([*PLAIN, *HALVES], {"variant": "fp16"},
     ["te/config.json", *HALVES]),
    (["a/config.json", "a/model.safetensors", "b/config.json", "b/model.safetensors", "b/model.fp16.safetensors"], {"variant": "fp16"},
     ["a/config.json", "a/model.safetensors", "b/config.json", "b/model.fp16.safetensors"]),
    (["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/code.py", "a/b/config.json", "x.safetensors"], {},
     ["tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json"]),
    (["old/config.json", "old/model.onnx", "vae/config.json", VAE], {"parts": ["vae"]}, ["vae/config.json", VAE]),
    (["old/config.json", "old/model.onnx", "vae/config.json", VAE], {}, ["old/config.json", "vae/config.json", VAE]),
])
def test_what_a_layout_needs_is_picked(names, options, expected):
    assert pick(listing(*names), **options) == ["model_index.json", *expected]


def test_a_repository_that_is_one_part():
    names = ["config.json", "diffusion_pytorch_model.safetensors", "x.bin"]
    assert pick([File(name, 1, "") for name in names], parts=[""]) == names[:2]


@pytest.mark.parametrize(("names", "options", "says"), [
    (["unet/config.json", "unet/diffusion_pytorch_model.bin"], {}, "only diffusion_pytorch_model.bin and no safetensors.*run code"),
    (["unet/config.json", "unet/model.onnx"], {"parts": ["unet"]}, "only model.onnx"),
    ([*PLAIN[:2], PLAIN[3]], {}, "te lacks shard 1 of 2"), ([PLAIN[0], *PLAIN[2:]], {}, "shards but no index"),
    (PLAIN[:2], {}, "an index but no shards"),
    (["te/config.json", "te/model.safetensors"], {"variant": "fp16"}, "leave variant out"),
    (["te/config.json", "te/model.fp16.safetensors"], {"variant": "fp8"}, "there are fp16"),
    (["vae/config.json"], {"parts": ["unet"]}, "no folder 'unet'"),
    (["te/config.json", "te/model.int8.safetensors", "te/model.ema.safetensors"], {}, "only in the variants ema, int8"),
])
def test_what_cannot_be_picked(names, options, says):
    with pytest.raises(ModelError, match=says):
        pick(listing(*names), **options)


@pytest.mark.parametrize(("index", "says"), [
    (b"[]", "not a JSON object"), (b"{", "not a JSON object"), (b"[" * 100_000, "not a JSON object"), (b"\xff", "not a JSON object"),
    (b"{}", "names no parts"),
    (b'{"_class_name": "P", "a": [null, null], "b": true}', "names no parts"), (b'{"../unet": ["a", "b"]}', "no plain name"),
])
def test_an_index_that_is_none(index, says):
    with pytest.raises(ModelError, match=f"model_index.json of org/name.*{says}|model_index.json of org/name is {says}"):
        index_parts(index, "org/name")


def test_an_index_names_parts():
    index = b'{"_x": ["a", "b"], "unet": ["a", "b"], "text_encoder_3": [null, null], "safety_checker": ["a", "b"], "flag": true, "vae": ["a", "b"]}'
    assert index_parts(index, "org/name") == ["unet", "vae"]
