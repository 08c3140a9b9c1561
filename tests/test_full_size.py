"""The published checkpoints at full size, as files whose data are a hole: known, planned, and every part complete, with no tensor read.

Headers are those of tests/headers. Language models, which are published as folders, are made from the packaged configs.
"""

from __future__ import annotations

import io
import json
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_convert import maker
from test_inspect import LAYOUTS, layout, sparse
from tiny_folders import chat_tokenizer
from tiny_t5 import tiny_t5_tokenizer

import latentgen
from latentgen.errors import ModelError
from latentgen.models import header as header_module
from latentgen.models.card import families, published
from latentgen.models.identify import identify, twins

SIDES = {"sd15": 512, "sd15-inpaint": 512, "sd15-instruct": 512, "sd21": 512, "sd21-v": 768, "sd21-inpaint": 512, "pixart-alpha-512": 512,
         "qwenimage": 1328}  # the others: 1024
WHOLE = ("sd15", "sd21", "sdxl", "sd3-medium")  # published with text encoders and VAE inside
BESIDE = {  # family -> part -> the file that it is taken from: of its own, or another whole checkpoint; "" is made from the packaged config
    "sd15": {"vae": "parts/vae-sd", "text_encoder": "parts/clip-l"},
    "sd21": {"vae": "parts/vae-sd", "text_encoder": "sd21"},
    "sdxl": {"vae": "parts/vae-sdxl", "text_encoder": "parts/clip-l", "text_encoder_2": "sdxl"},
    "sd3": {"vae": "sd3-medium", "text_encoder": "parts/clip-l", "text_encoder_2": "parts/clip-g", "text_encoder_3": "parts/t5xxl"},
    "flux1": {"vae": "parts/vae-flux1", "text_encoder": "parts/clip-l", "text_encoder_2": "parts/t5xxl"},
    "flux2": {"vae": "parts/vae-flux2", "text_encoder": ""},
    "pixart": {"vae": "parts/vae-sd", "text_encoder": "parts/t5xxl"},
    "zimage": {"vae": "parts/vae-flux1", "text_encoder": ""},
    "qwenimage": {"vae": "parts/vae-qwenimage", "text_encoder": ""},
}
TOKENIZERS = {"sd3": ("tokenizer_3", "t5"), "flux1": ("tokenizer_2", "t5"), "pixart": ("tokenizer", "t5"), "flux2": ("tokenizer", "chat"),
              "zimage": ("tokenizer", "chat"), "qwenimage": ("tokenizer", "chat")}  # that are not in the package


def family_of(variant: str) -> str:
    return "sd3" if variant.startswith("sd3") else variant.partition("-")[0]


KNOWN = [name for name in LAYOUTS if family_of(name.removesuffix(".diffusers")) in families()]
SLOW = {name for name in KNOWN if name.endswith(".diffusers") and not name.startswith(("pixart", "sd15.", "sdxl.", "flux1-dev"))} | {"sd35-medium"}
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in KNOWN]
SAME_TENSORS = [name for name in KNOWN if not name.endswith(".diffusers") and name in ("sd21", "flux1-kontext", "zimage-turbo", "qwenimage-edit")]


@pytest.fixture(autouse=True)
def no_tensor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for reader in ("safetensors.safe_open", "safetensors.torch.load_file", "latentgen.models.convert.LazyTensors.__init__", "torch.load"):
        monkeypatch.setattr(reader, lambda *_, **__: pytest.fail("a tensor was read"))


class Shelf:
    """Sparse files by the name of their layout, tokenizers, and language models; each made once."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.file = lru_cache(None)(lambda name: sparse(place / f"{name}.safetensors", layout(name)))
        self.language_model = lru_cache(None)(self._language_model)
        tiny_t5_tokenizer(place / "t5")
        chat_tokenizer(place / "chat")

    def _language_model(self, variant: str) -> Path:
        config = published(variant)["parts"]["text_encoder"]
        folder = self.place / "words" / variant
        state = maker().module_state(config)
        sparse(folder / "model.safetensors", {name: ("BF16", tuple(t.shape)) for name, t in state.items() if name != "lm_head.weight"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def beside(self, variant: str, missing: tuple[str, ...]) -> dict[str, Path]:
        """What `load` must be told of: the missing parts, and the tokenizer that is not in the package."""
        family = family_of(variant)
        files = {part: BESIDE[family][part] for part in missing}
        told = {part: self.file(name) if name else self.language_model(variant) for part, name in files.items()}
        name, kind = TOKENIZERS.get(family, ("", ""))
        return told | ({name: self.place / kind} if name else {})


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("full"))


def opened(path: Path | None, **said: Any) -> Any:
    return latentgen.load(path, dtype="float32", device="cpu", progress=False, **said)


def planned(pipe: Any) -> Any:
    """The plan of a request that says only what it must."""
    picture = {"reference": Image.new("RGB", (64, 64), "teal")} if pipe.family.task == "edit" else {}
    size = {"width": pipe.family.defaults.width, "height": pipe.family.defaults.height} if picture else {}
    return pipe.plan("a cat", seed=0, **picture, **size)


@pytest.mark.parametrize("name", EACH)
def test_a_published_checkpoint_is_known_planned_and_complete(shelf: Shelf, name: str) -> None:
    variant, file = name.removesuffix(".diffusers"), shelf.file(name)
    shapes = {key: shape for key, (_, shape) in layout(name).items()}
    report = latentgen.inspect(file)
    found = identify(shapes)
    assert found is not None and variant in twins(found)
    assert (report.family, report.layout, report.damage) == (family_of(variant), found.layout, "") and report.variant == found.variant
    inside = name != variant + ".diffusers" and (variant.startswith(WHOLE[:3]) or variant == "sd3-medium")
    parts = list(published(variant)["parts"])
    assert (report.kind == "checkpoint") == (inside or (variant.startswith("sd35") and not name.endswith(".diffusers")))
    assert (report.missing == ()) == inside and sorted((*report.parts, *report.missing)) == sorted(parts)
    told = {} if report.variant == variant else {"config": variant}
    pipe = opened(file, **told, **shelf.beside(variant, report.missing))
    assert (pipe.family.name, pipe.checkpoint.variant) == (family_of(variant), variant)
    assert {p.name for p in pipe.family.parts} == set(parts)
    plan = planned(pipe)
    assert (plan.width, plan.height) == (SIDES.get(variant, 1024),) * 2
    assert {key: value for key, value in published(variant)["defaults"].items() if key in ("steps", "sampler", "guidance_scale")}.items() <= {
        "steps": plan.steps, "sampler": plan.sampler, "guidance_scale": pipe.family.defaults.guidance_scale}.items()
    pipe.checkpoint.check()  # no tensor missing, left over or of another shape
    if inside:
        assert 0.99 * file.stat().st_size < pipe.checkpoint.weight_bytes() <= file.stat().st_size


@pytest.mark.parametrize("name", SAME_TENSORS)
def test_what_tensors_do_not_tell_is_noted(shelf: Shelf, name: str) -> None:
    """Two published models with one set of shapes: the report names both, and so does the pipeline."""
    report = latentgen.inspect(shelf.file(name))
    note = next(note for note in report.notes if "do not tell" in note)
    assert name in note and report.variant in note and report.variant != name and "config=" in note
    assert note in opened(shelf.file(name), **shelf.beside(report.variant, report.missing)).checkpoint.notes


def test_three_tasks_of_one_checkpoint_are_planned(shelf: Shelf) -> None:
    pipe = opened(shelf.file("sdxl"))
    assert pipe.plan("a cat", width=1216, height=832, batch=2, negative_prompt="dog").width == 1216
    picture = Image.new("RGB", (1024, 1024), "teal")
    assert pipe.plan("a cat", image=picture, strength=0.5).task == "img2img"
    assert pipe.plan("a cat", image=picture, mask=Image.new("L", (1024, 1024), 255)).task == "inpaint"


def test_a_card_or_a_variant_said_beside_a_file(shelf: Shelf) -> None:
    """What a card says of the run holds for a file that looks like any of its family; a variant brings its own defaults."""
    plain, turbo = opened(shelf.file("sdxl")), opened(shelf.file("sdxl"), card="sdxl-turbo")
    assert (plain.plan("a cat").steps, plain.family.defaults.guidance_scale) == (40, 5.0)
    assert (turbo.plan("a cat").steps, turbo.family.defaults.guidance_scale, turbo.checkpoint.name) == (1, 1.0, "sdxl-turbo")
    assert turbo.plan("a cat", steps=2).steps == 2
    for variant, side, prediction in (("sd21", 512, "epsilon"), ("sd21-v", 768, "v")):
        pipe = opened(shelf.file("sd21"), config=variant)
        assert (pipe.plan("a cat").width, pipe.family.prediction, pipe.checkpoint.notes) == (side, prediction, ())


@pytest.mark.skipif("sd3" not in families(), reason="the family is not there")
def test_what_sd3_can_do_without_is_left_out(shelf: Shelf) -> None:
    """No T5: neither the part nor its tokenizer is asked for."""
    file = shelf.file("sd35-large")
    pipe = opened(file, text_encoder=shelf.file("parts/clip-l"), text_encoder_2=shelf.file("parts/clip-g"))
    assert "text_encoder_3" not in {p.name for p in pipe.family.parts}
    pipe.checkpoint.check()
    with pytest.raises(ModelError, match="tokenizer_3=PATH"):
        opened(file, text_encoder=shelf.file("parts/clip-l"), text_encoder_2=shelf.file("parts/clip-g"), text_encoder_3=shelf.file("parts/t5xxl"))


def test_a_file_that_needs_others_says_which(shelf: Shelf) -> None:
    with pytest.raises(ModelError, match=r"flux1-dev.safetensors has no text_encoder and no text_encoder_2 and no vae: name them, as in load"):
        opened(shelf.file("flux1-dev"))
    named = {name: path for name, path in shelf.beside("flux1-dev", ("text_encoder", "text_encoder_2", "vae")).items() if name != "tokenizer_2"}
    with pytest.raises(ModelError, match="no tokenizer_2 is given.*name it with tokenizer_2=PATH"):
        opened(shelf.file("flux1-dev"), **named)
    assert latentgen.inspect(shelf.file("flux1-dev")).missing == ("text_encoder", "text_encoder_2", "vae")


def test_a_folder_of_shards(shelf: Shelf, tmp_path: Path) -> None:
    """FLUX.1 as a diffusers folder: the transformer in three shards, configs beside, and nothing said of what it is."""
    known, folder = published("flux1-dev"), tmp_path / "flux"
    rows = list(layout("flux1-dev.diffusers").items())
    shards = [f"diffusion_pytorch_model-0000{n + 1}-of-00003.safetensors" for n in range(3)]
    for n, shard in enumerate(shards):
        sparse(folder / "transformer" / shard, dict(rows[n::3]))
    index = {"metadata": {}, "weight_map": {name: shards[i % 3] for i, (name, _) in enumerate(rows)}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    for part in ("vae", "text_encoder", "text_encoder_2"):
        rows = maker().module_state(known["parts"][part])
        sparse(folder / part / "model.safetensors", {name: ("BF16", tuple(t.shape)) for name, t in rows.items()})
    for part, config in known["parts"].items():
        (folder / part / "config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(known["scheduler"]))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    pipe = opened(folder, tokenizer_2=shelf.place / "t5")
    assert (pipe.checkpoint.variant, planned(pipe).width, len(pipe.checkpoint.sources["transformer"].files)) == ("flux1-dev", 1024, 3)
    pipe.checkpoint.check()
    assert pipe.checkpoint.weight_bytes("denoiser") == 2 * 11_901_408_320


def test_only_headers_are_read(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of 34 GB in four files, less than a megabyte: to say what they are, to plan, and to compare every tensor with its module."""
    names = ("flux1-dev", "parts/vae-flux1", "parts/clip-l", "parts/t5xxl")
    files = [sparse(tmp_path / f"{Path(name).name}.safetensors", layout(name)) for name in names]
    seen: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            seen.append(count := super().readinto(buffer))
            return count

    monkeypatch.setattr(header_module, "open", lambda path, mode: io.BufferedReader(Counted(path, "rb")), raising=False)
    assert latentgen.inspect(files[0]).variant == "flux1-dev"
    pipe = opened(files[0], vae=files[1], text_encoder=files[2], text_encoder_2=files[3], tokenizer_2=shelf.place / "t5")
    planned(pipe)
    pipe.checkpoint.check()
    lengths = [struct.unpack("<Q", file.open("rb").read(8))[0] for file in files]
    assert sum(lengths) < sum(seen) < lengths[0] + sum(lengths) + 100_000 and sum(file.stat().st_size for file in files) > 33e9
