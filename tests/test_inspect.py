"""inspect: what a file is, by names and shapes alone. Sparse files with real layouts' headers (tests/headers), a family made up here, and damage."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import struct
import subprocess
import sys
import types
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import latentgen
from latentgen.cli import app
from latentgen.errors import ModelError
from latentgen.models import card, identify, inspect, kinds
from latentgen.models import header as header_module
from latentgen.models.family import Family, Original, Part, Signature
from latentgen.models.header import BYTES

HEADERS = Path(__file__).parent / "headers"
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


def sparse(path: Path, tensors: Tensors | Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None) -> Path:
    """A whole .safetensors whose data are a hole: name -> (dtype, shape), or a shape of float16."""
    rows, at = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name, said in tensors.items():
        dtype, shape = said if said and isinstance(said[0], str) else ("F16", said)
        size = prod(shape) * BYTES[dtype]
        rows[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


def layout(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a real layout."""
    raw = json.loads(gzip.decompress((HEADERS / f"{name}.json.gz").read_bytes()))
    return {key: (dtype, tuple(shape)) for key, (dtype, shape) in raw["tensors"].items()}


LAYOUTS = sorted(p.name.removesuffix(".json.gz") for p in HEADERS.glob("*.json.gz"))
SIGNED = {signature.variant: name for name, file in identify.family_files() for signature in file.SIGNATURES}


# A family made up here


class MadeUp(types.ModuleType):
    """A file in pipelines/: a net with several signatures, a text encoder, one that it can do without, and a VAE."""

    SIGNATURES = (
        Signature("toy-wide", "original", {"first.weight": (8, 9), "last.weight": (None, 8)}, prefixes=("", "net.")),
        Signature("toy", "original", {"first.weight": (8, 4), "last.weight": (None, 8)}, absent=("extra.weight",), prefixes=("", "net.")),
        Signature("toy-v", "original", {"first.weight": (8, 4), "last.weight": (None, 8)}, absent=("extra.weight",), prefixes=("", "net.")),
        Signature("toy", "diffusers", {"conv_in.weight": (8, 4), "blocks.0.attn2.to_k.weight": (8, 24)}),
    )
    INDEX = ("ToyPipeline",)
    PARTS = (
        Part("text_encoder", "transformers.CLIPTextModel", ("text",), original=Original(("words.",), unique="in.weight")),
        Part("text_encoder_2", "transformers.T5EncoderModel", ("text",), optional=True, original=Original(("more.",), unique="in.weight")),
        Part("transformer", "diffusers.ToyModel", ("denoiser",), original=Original(("net.", ""), unique="first.weight")),
        Part("vae", "diffusers.AutoencoderKL", ("encoder", "decoder"), original=Original(("vae.",), unique="decoder.conv_in.weight")),
    )

    @staticmethod
    def build(model: Any) -> Family:
        from latentgen.conditioning.tokens import TokenizerSpec

        said = model.config("scheduler").get("prediction_type")
        return Family(name="toy", parts=MadeUp.PARTS, path=None, prediction=said, latent=None, encode=None, predict=None,  # type: ignore[arg-type]
                      tokenizers={"tokenizer": TokenizerSpec("clip", 77), "tokenizer_2": TokenizerSpec("t5", 256),
                                  "tokenizer_3": TokenizerSpec("chat")})


CONFIGS = {"toy": {"scheduler": {"prediction_type": "epsilon"}, "index": {"_class_name": "ToyPipeline"}},
           "toy-v": {"scheduler": {"prediction_type": "v"}, "index": {"_class_name": "ToyVPipeline"}}}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up family is the only one."""
    monkeypatch.setitem(sys.modules, "latentgen.pipelines.toy", MadeUp("latentgen.pipelines.toy"))
    monkeypatch.setattr(card, "families", lambda: ["toy"])
    monkeypatch.setattr(card, "variants", lambda: list(CONFIGS))
    parts = {p.name: {"latent_channels": 4, "cross_attention_dim": 24} for p in MadeUp.PARTS}
    monkeypatch.setattr(card, "published", lambda variant: CONFIGS[variant] | {"parts": parts})
    identify._published.cache_clear()
    yield
    identify._published.cache_clear()


NET = {"first.weight": (8, 4), "last.weight": (3, 8)}
REST = {"words.in.weight": (5, 5), "vae.decoder.conv_in.weight": (8, 4, 3, 3), "vae.encoder.conv_in.weight": (8, 3, 3, 3)}


def under(prefix: str, shapes: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: shape for name, shape in shapes.items()}


@pytest.mark.usefixtures("toy")
def test_signatures_decide_by_names_shapes_and_what_is_absent() -> None:
    found = inspect.identify(NET)
    assert found == inspect.Identified("toy", "toy", "original", "")
    assert inspect.identify(under("net.", NET) | REST) == inspect.Identified("toy", "toy", "original", "net.")
    assert inspect.identify({"conv_in.weight": (8, 4), "blocks.0.attn2.to_k.weight": (8, 24)}).layout == "diffusers"  # type: ignore[union-attr]
    assert inspect.identify({"first.weight": (8, 9), "last.weight": (1, 8)}).variant == "toy-wide"  # type: ignore[union-attr]
    for other in ({}, {"first.weight": (8, 4)}, NET | {"first.weight": (8, 5)}, NET | {"first.weight": (8, 4, 1)}, NET | {"extra.weight": (1,)},
                  under("model.", NET), {"first.weight": (8, 4), "net.last.weight": (3, 8)}):
        assert inspect.identify(other) is None, other


@pytest.mark.usefixtures("toy")
def test_a_file_whose_parts_are_told(tmp_path: Path) -> None:
    report = latentgen.inspect(sparse(tmp_path / "all.safetensors", under("net.", NET) | REST))
    assert (report.kind, report.family, report.layout, report.parts) == ("checkpoint", "toy", "original", ("text_encoder", "transformer", "vae"))
    assert report.missing == ("text_encoder_2",)
    assert report.needs == ("text_encoder_2 (T5EncoderModel), optional", "tokenizer_3 (of the kind chat: its tokenizer.json)")
    alone = latentgen.inspect(sparse(tmp_path / "net.safetensors", NET))
    assert (alone.kind, alone.parts, alone.missing) == ("denoiser", ("transformer",), ("text_encoder", "text_encoder_2", "vae"))
    assert "vae (AutoencoderKL)" in alone.needs and alone.sound


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("marks, metadata, expected", [
    ({}, {}, ("toy", "epsilon", "variant")), ({"v_pred": (0,)}, {}, ("toy-v", "v", "file")), ({"ztsnr": (0,)}, {}, ("toy-v", "v", "file")),
    ({}, {"modelspec.prediction_type": "v"}, ("toy-v", "v", "file")), ({}, {"modelspec.predict_key": "epsilon"}, ("toy", "epsilon", "file")),
    ({}, {"modelspec.prediction_type": "nonsense"}, ("toy", "epsilon", "variant"))])
def test_what_a_file_says_of_its_prediction_decides_between_twins(tmp_path: Path, marks: Any, metadata: Any, expected: tuple[str, ...]) -> None:
    report = latentgen.inspect(sparse(tmp_path / "x.safetensors", NET | marks, metadata))
    assert (report.variant, report.prediction, report.prediction_from) == expected
    assert any("do not tell toy from toy-v" in note for note in report.notes) == (expected[2] == "variant")
    assert report.details.get("noise", "") == ("zero terminal SNR" if "ztsnr" in marks else "")


@pytest.mark.usefixtures("toy")
def test_adapters_of_a_made_up_family(tmp_path: Path) -> None:
    lora = {"unet.blocks.0.attn2.to_k.lora_A.weight": (4, 24), "unet.blocks.0.attn2.to_k.lora_B.weight": (8, 4)}
    assert latentgen.inspect(sparse(tmp_path / "a.safetensors", lora)).family == "toy"
    other = {"unet.blocks.0.attn2.to_k.lora_A.weight": (4, 25), "unet.blocks.0.attn2.to_k.lora_B.weight": (8, 4)}
    report = latentgen.inspect(sparse(tmp_path / "b.safetensors", other))
    assert (report.kind, report.family, report.fits) == ("LoRA", "", ())


# Real layouts


@pytest.mark.parametrize("name", LAYOUTS)
def test_real_layouts(tmp_path: Path, name: str) -> None:
    """A published file is what it is; one of a family that has no signatures here is unknown, never the nearest."""
    variant = name.removesuffix(".diffusers")
    report = latentgen.inspect(sparse(tmp_path / f"{name}.safetensors", layout(name)))
    assert not report.damage
    if variant not in SIGNED and report.kind == "unknown":
        return
    found = identify.identify({key: shape for key, (_, shape) in layout(name).items()})
    assert found is not None and variant in identify.twins(found)
    assert report.variant == found.variant and report.kind in ("checkpoint", "denoiser") and report.prediction
    assert report.layout == found.layout and (found.layout == "diffusers") >= name.endswith(".diffusers")
    every = [p.name for p in identify.parts_of(report.family, report.variant)]
    assert sorted([*report.parts, *report.missing]) == sorted(every)
    assert len(report.needs) >= len(report.missing)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_two_families_claim_a_file(name: str) -> None:
    shapes = {key: shape for key, (_, shape) in layout(name).items()}
    claims = {family for family, file in identify.family_files() for s in file.SIGNATURES for p in s.prefixes if identify._fits(shapes, s, p)}
    assert len(claims) <= 1


@pytest.mark.parametrize("name, kind, details", [
    ("vae-sd", "VAE", {"latent channels": "4"}), ("vae-sdxl", "VAE", {"latent channels": "4"}), ("vae-flux1", "VAE", {"latent channels": "16"}),
    ("vae-flux2", "VAE", {"latent channels": "32"}), ("vae-qwenimage", "VAE", {"latent channels": "16", "sort": "frames, too"}),
    ("clip-l", "text encoder", {"encoder": "CLIP-L"}), ("clip-g", "text encoder", {"encoder": "OpenCLIP-bigG"}),
    ("t5xxl", "text encoder", {"encoder": "T5-XXL"})])
def test_parts_that_are_published_alone(tmp_path: Path, name: str, kind: str, details: dict[str, str]) -> None:
    report = latentgen.inspect(sparse(tmp_path / "x.safetensors", layout(f"parts/{name}")))
    assert report.kind == kind and details.items() <= report.details.items() and report.sound and not report.family


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
def test_a_vae_with_a_prefix(tmp_path: Path, prefix: str) -> None:
    assert latentgen.inspect(sparse(tmp_path / "x.safetensors", under(prefix, layout("parts/vae-sd")))).kind == "VAE"


# Adapters: made of a real layout's own modules


def low_rank(name: str, naming: str, rank: int = 8) -> dict[str, tuple[int, ...]]:
    """A LoRA over the attention of a real denoiser, as the trainers name it."""
    made: dict[str, tuple[int, ...]] = {}
    for key, (_, shape) in layout(name).items():
        module = key.removeprefix("model.diffusion_model.").removesuffix(".weight")
        if len(shape) != 2 or "attn" not in module or not key.endswith("weight"):
            continue
        if naming == "kohya":
            flat = "lora_unet_" + module.replace(".", "_")
            made |= {f"{flat}.lora_down.weight": (rank, shape[1]), f"{flat}.lora_up.weight": (shape[0], rank), f"{flat}.alpha": ()}
        elif naming == "lycoris":
            flat = "lycoris_" + module.replace(".", "_")
            for half in ("hada_w1", "hada_w2"):
                made |= {f"{flat}.{half}_a": (shape[0], rank), f"{flat}.{half}_b": (rank, shape[1])}
        elif naming == "kronecker":
            flat = "lora_unet_" + module.replace(".", "_")
            made |= {f"{flat}.lokr_w1": (4, 2), f"{flat}.lokr_w2_a": (shape[0] // 4, rank), f"{flat}.lokr_w2_b": (rank, shape[1] // 2)}
        elif naming == "old":
            place = "unet." + module.replace(".attn1.", ".attn1.processor.").replace(".attn2.", ".attn2.processor.").replace(".to_out.0", ".to_out")
            made |= {f"{place}_lora.down.weight": (rank, shape[1]), f"{place}_lora.up.weight": (shape[0], rank)}
        else:
            before = {"diffusers": "unet." if "down_blocks" in module or "mid_block" in module or "up_blocks" in module else "transformer.",
                      "PEFT": "base_model.model.", "original": "diffusion_model."}[naming]
            made |= {f"{before}{module}.lora_A.weight": (rank, shape[1]), f"{before}{module}.lora_B.weight": (shape[0], rank)}
    return made


@pytest.mark.parametrize("name, naming, said", [
    ("sd15.diffusers", "kohya", "kohya"), ("sd15.diffusers", "diffusers", "diffusers"), ("sd15.diffusers", "old", "diffusers"),
    ("sd15.diffusers", "lycoris", "lycoris"), ("sd15.diffusers", "kronecker", "kohya"), ("sd21.diffusers", "kohya", "kohya"),
    ("sdxl", "kohya", "kohya"), ("sdxl.diffusers", "PEFT", "PEFT"), ("flux1-dev", "kohya", "kohya"), ("flux1-dev", "original", "original"),
    ("flux1-dev.diffusers", "diffusers", "diffusers")])
def test_low_rank_adapters_and_their_base(tmp_path: Path, name: str, naming: str, said: str) -> None:
    words = {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (8, 768),
             "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": (768, 8)} if naming == "kohya" else {}
    report = latentgen.inspect(sparse(tmp_path / "x.safetensors", low_rank(name, naming) | words, {"ss_base_model_version": "some_base"}))
    assert report.kind == "LoRA" and report.layout == said and report.details["rank"] == "8"
    assert name.split("-")[0].split(".")[0] in (report.family, *report.fits)
    assert report.family == SIGNED[name.removesuffix(".diffusers")]
    assert report.details["changes"] == ("denoiser and text encoder" if words else "denoiser")
    assert report.details["sort"] == {"lycoris": "LoHa", "kronecker": "LoKr"}.get(naming, "LoRA")
    assert any("some_base" in note for note in report.notes) and report.needs


def test_a_low_rank_adapter_of_nothing_known(tmp_path: Path) -> None:
    strange = {"lora_unet_strange.lora_down.weight": (4, 77), "lora_unet_strange.lora_up.weight": (5, 4)}
    report = latentgen.inspect(sparse(tmp_path / "x.safetensors", strange))
    assert (report.kind, report.family, report.fits) == ("LoRA", "", ())


def copied(name: str, prefix: str, *extra: str) -> dict[str, tuple[int, ...]]:
    """The down half of a denoiser, as a ControlNet has it, with further tensors."""
    half = {key: shape for key, (_, shape) in layout(name).items() if key.removeprefix("model.diffusion_model.").startswith(
        ("input_blocks", "middle_block", "time_embed", "label_emb", "down_blocks", "mid_block", "conv_in", "add_embedding"))}
    return {prefix + key.removeprefix("model.diffusion_model."): shape for key, shape in half.items()} | {key: (16, 3, 3, 3) for key in extra}


@pytest.mark.parametrize("shapes, kind, layout_, family", [
    (copied("sd15", "control_model.", "control_model.input_hint_block.0.weight"), "ControlNet", "original", "sd15"),
    (copied("sd15", "", "input_hint_block.0.weight"), "ControlNet", "original", "sd15"),
    (copied("sdxl.diffusers", "", "controlnet_cond_embedding.conv_in.weight"), "ControlNet", "diffusers", "sdxl"),
    (copied("sd21.diffusers", "", "controlnet_cond_embedding.conv_in.weight"), "ControlNet", "diffusers", "sd21"),
    ({"lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight": (32, 640)}, "ControlNet", "LLLite", ""),
    ({"image_proj.proj.weight": (3072, 1024), "ip_adapter.1.to_k_ip.weight": (320, 768)}, "IP-Adapter", "", "sd15"),
    ({"image_proj.latents": (1, 16, 1280), "ip_adapter.1.to_k_ip.weight": (640, 2048)}, "IP-Adapter", "", "sdxl"),
    ({"adapter.conv_in.weight": (320, 192, 3, 3), "adapter.body.0.resnets.0.block1.weight": (320, 320, 3, 3)}, "T2I-Adapter", "diffusers", ""),
    ({"conv_in.weight": (320, 192, 3, 3), "body.0.block1.weight": (320, 320, 3, 3)}, "T2I-Adapter", "original", ""),
    ({"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (320,)}, "motion module", "", ""),
    ({"emb_params": (4, 768)}, "textual-inversion embedding", "A1111", ""), ({"<a-cat>": (768,)}, "textual-inversion embedding", "diffusers", ""),
    ({"clip_l": (4, 768), "clip_g": (4, 1280)}, "textual-inversion embedding", "A1111", ""),
    ({"model.1.sub.0.RDB1.conv1.0.weight": (32, 64, 3, 3)}, "upscaler", "", ""),
    ({"encoder.layers.0.weight": (64, 3, 3, 3), "decoder.layers.0.weight": (64, 4, 3, 3)}, "VAE", "diffusers", ""),
    ({"decoder.conv_in.weight": (512, 16, 3, 3), "decoder.up.0.block.0.conv1.weight": (1, 1, 3, 3)}, "VAE", "original", ""),
    ({"token_embedding.weight": (49408, 1024), "transformer.resblocks.0.attn.in_proj_weight": (3072, 1024)}, "text encoder", "original", ""),
    ({"model.embed_tokens.weight": (151936, 2560), "model.layers.0.self_attn.q_proj.weight": (4096, 2560)}, "text encoder", "diffusers", ""),
    ({"vision_model.embeddings.patch_embedding.weight": (1280, 3, 14, 14)}, "image encoder", "diffusers", ""),
    ({"encoder.conv_in.weight": (8, 3, 3, 3), "something.else": (3,)}, "unknown", "", ""),
    ({"weight": (3, 3)}, "unknown", "", ""), ({}, "unknown", "", ""),
    ({"double_blocks.0.img_attn.qkv.weight": (99, 33)} | {"vae.decoder.conv_in.weight": (8, 4, 3, 3)}, "unknown", "", ""),
    ({f"vector{n}": (768,) for n in range(3)}, "unknown", "", ""), ({"big": (4096, 768)}, "unknown", "", ""),
], ids=lambda value: str(value)[:30])
def test_other_kinds(tmp_path: Path, shapes: Any, kind: str, layout_: str, family: str) -> None:
    report = latentgen.inspect(sparse(tmp_path / "x.safetensors", shapes))
    assert (report.kind, report.layout, report.family) == (kind, layout_, family), str(report)
    assert report.sound == (kind != "unknown") and (kind != "unknown" or report.notes)


def test_a_checkpoint_is_none_of_its_parts() -> None:
    """What tells a LoRA, a VAE or an encoder does not mistake a whole checkpoint for one."""
    for name in LAYOUTS:
        shapes = {key: shape for key, (_, shape) in layout(name).items()}
        assert kinds.adapter(shapes) is None and kinds.component(shapes) is None, name


def test_notes_on_what_cannot_be_loaded(tmp_path: Path) -> None:
    from test_header import gguf

    (tmp_path / "x.gguf").write_bytes(gguf({"double_blocks.0.a.weight": ((256, 2), 16), "b": ((4,), 0)}, {"general.architecture": "net"}))
    notes = " ".join(latentgen.inspect(tmp_path / "x.gguf").notes)
    assert "1 tensors of the type IQ2_XXS" in notes and "'net'" in notes and "a denoiser that fits no family" in notes
    eight = {"double_blocks.0.x.weight": ("F8_E4M3", (4, 4)), "double_blocks.0.x.scale_weight": ("F32", ()), "scaled_fp8": ("F8_E4M3", (2,))}
    assert "fp8 weights with a scale beside each" in latentgen.inspect(sparse(tmp_path / "y.safetensors", eight)).notes
    nf4 = {"double_blocks.0.x.weight": ("U8", (8, 1)), "double_blocks.0.x.weight.quant_state.bitsandbytes__nf4": ("U8", (9,))}
    assert any("bitsandbytes" in note for note in latentgen.inspect(sparse(tmp_path / "z.safetensors", nf4)).notes)


KEYS = ["v_pred", "lora_te_a.lora_down.weight", "lora_unet_a.lora_up.weight", "a.lokr_w1", "a.lokr_w2_a", "a.hada_w1_b", "a.hada_w1_a",
        "emb_params", "<x>",
        "decoder.conv_in.weight", "encoder.conv_out.weight", "encoder.conv_in.weight", "decoder.layers.0.weight", "adapter.conv_in.weight",
        "adapter.body.0.resnets.0.block1.weight", "image_proj.latents", "ip_adapter.1.to_k_ip.weight", "input_hint_block.0.weight", "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight", "token_embd.weight", "vision_model.embeddings.patch_embedding.weight",
        "", ".weight", "a.dora_scale", "control_model.input_hint_block.0.weight", "control_model.attn2.to_k.weight",
        "conv_in.weight", "model.embed_tokens.weight", "unet.x.lora_A.weight"]


SHAPES = st.builds(lambda sides, last: (*sides, *last), st.lists(st.integers(0, 3), max_size=4), st.sampled_from([(), (768,), (1280,)]))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), SHAPES, max_size=8))
def test_any_names_and_shapes_give_a_report(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    shapes.pop("__metadata__", None)
    report = latentgen.inspect(sparse(tmp_path / "x.safetensors", shapes))
    assert not report.damage and json.dumps(report.to_dict()) and str(report) and report.what


def test_it_reads_the_header_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 7 GB file costs the bytes of its header, and no tensor library opens it."""
    path = sparse(tmp_path / "x.safetensors", layout("sdxl"))
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
    seen = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            seen.append(count := super().readinto(buffer))
            return count

    monkeypatch.setattr(header_module, "open", lambda p, mode: io.BufferedReader(Counted(p, "rb")), raising=False)
    for module in ("safetensors.safe_open", "safetensors.torch.load_file", "torch.load"):
        monkeypatch.setattr(module, lambda *_, **__: pytest.fail("a tensor was read"))
    assert latentgen.inspect(path).kind == "checkpoint"
    assert length <= sum(seen) < length + 100_000 and path.stat().st_size > 6e9


# Damage


@pytest.mark.parametrize("data, words", [
    (b"", "is empty"), (b"<html>sign in</html>", "a web page"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (struct.pack("<Q", 2**62) + bytes(99), "byte 0"), (b"PK\x03\x04" + bytes(99), "a zip")])
def test_damage_is_reported_and_not_raised(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    report = latentgen.inspect(tmp_path / "x.safetensors")
    assert words in report.damage and report.kind == "unknown" and not report.sound and report.what == "damaged" and "damage" in str(report)
    assert report.size == len(data)


@pytest.mark.parametrize("name", ["nothing.safetensors", "a\x00b", 3, None])
def test_where_nothing_is(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ModelError, match="there is no file|expected its path"):
        latentgen.inspect(tmp_path / name if isinstance(name, str) else name)


# Folders


def folder(tmp_path: Path, variant: str = "sd15", *, without: tuple[str, ...] = (), **index: Any) -> Path:
    """A model in diffusers layout with empty weights."""
    place = tmp_path / "model"
    place.mkdir()
    said = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "safety_checker": [None, None]}
    (place / "model_index.json").write_text(json.dumps(said | index))
    parts = {"unet/diffusion_pytorch_model": layout(f"{variant}.diffusers"), "vae/diffusion_pytorch_model": {"encoder.conv_in.weight": (8, 3, 3, 3)},
             "text_encoder/model": layout("parts/clip-l")}
    for name, tensors in parts.items():
        if name.split("/")[0] not in without:
            sparse(place / f"{name}.safetensors", tensors)
            (place / name).with_name("config.json").write_text("{}")
    return place


def test_a_folder(tmp_path: Path) -> None:
    place = folder(tmp_path)
    (place / "scheduler").mkdir()
    (place / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    report = latentgen.inspect(place)
    assert (report.kind, report.family, report.variant, report.layout, report.damage) == ("checkpoint", "sd15", "sd15", "diffusers", "")
    assert (report.prediction, report.prediction_from) == ("v", "file")
    assert set(report.parts) == {"unet", "vae", "text_encoder"} and not report.missing and not report.needs
    assert report.tensors == len(layout("sd15.diffusers")) + 1 + len(layout("parts/clip-l")) and report.size > 3e9


def test_a_folder_that_lacks_a_part(tmp_path: Path) -> None:
    report = latentgen.inspect(folder(tmp_path, without=("vae",)))
    assert report.missing == ("vae",) and report.needs == ("vae (AutoencoderKL)",) and report.sound


def test_a_folder_known_by_its_index_alone(tmp_path: Path) -> None:
    place = folder(tmp_path)
    sparse(place / "unet" / "diffusion_pytorch_model.safetensors", {"conv_in.weight": (32, 4, 3, 3)})
    report = latentgen.inspect(place)
    assert (report.kind, report.family, report.variant) == ("checkpoint", "sd15", "") and "no published variant" in report.notes[0]


def test_a_folder_of_no_family(tmp_path: Path) -> None:
    place = folder(tmp_path, _class_name="OtherPipeline")
    sparse(place / "unet" / "diffusion_pytorch_model.safetensors", {"conv_in.weight": (32, 4, 3, 3)})
    report = latentgen.inspect(place)
    assert report.kind == "unknown" and "OtherPipeline" in report.notes[0] and not report.sound


def test_a_folder_with_a_card(tiny_folder: Path) -> None:
    report = latentgen.inspect(tiny_folder)
    assert report.family == "glyph" and report.kind == "checkpoint" and set(report.parts) == {"text_encoder", "unet", "vae"}


def shards(place: Path, names: tuple[str, ...] = ("a.safetensors", "b.safetensors")) -> Path:
    """The U-Net of a folder in two shards, whose index says `names`."""
    tensors = list(layout("sd15.diffusers").items())
    (place / "diffusion_pytorch_model.safetensors").unlink()
    halves = dict(zip(("a.safetensors", "b.safetensors"), (tensors[::2], tensors[1::2]), strict=True))
    for name, half in halves.items():
        sparse(place / name, dict(half))
    said = dict(zip(halves, names, strict=True))
    index = place / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: said[name] for name, half in halves.items() for key, _ in half}}))
    return index


def test_shards(tmp_path: Path) -> None:
    place = folder(tmp_path)
    index = shards(place / "unet")
    assert latentgen.inspect(place).variant == "sd15"
    for path in (index, place / "unet"):
        report = latentgen.inspect(path)
        assert (report.kind, report.variant, report.tensors) == ("denoiser", "sd15", len(layout("sd15.diffusers"))), str(report)


@pytest.mark.parametrize("names, words", [
    (("a.safetensors", "gone.safetensors"), "the shard gone.safetensors, which is not there"),
    (("a.safetensors", "../../out.safetensors"), "shard '../../out"),
    (("a.safetensors", "/etc/passwd"), "shard '/etc/passwd'"), (("a.safetensors", "b.bin"), "shard 'b.bin'")])
def test_absent_and_outside_shards(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    place = folder(tmp_path)
    sparse(tmp_path / "out.safetensors", {"a": (1,)})
    index = shards(place / "unet", names)
    for path in (place, place / "unet", index):
        assert words in latentgen.inspect(path).damage, path


def test_a_link_that_leaves_the_folder(tmp_path: Path) -> None:
    place = folder(tmp_path)
    weights = place / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    assert "links to a file outside" in latentgen.inspect(place).damage


def test_the_hubs_cache_may_link_to_its_own_blobs(tmp_path: Path) -> None:
    place = folder(tmp_path)
    snapshot, blobs = tmp_path / "models--org--name" / "snapshots" / "abc", tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(place, snapshot, ignore=lambda *_: ["diffusion_pytorch_model.safetensors"])
    for part in ("unet", "vae"):
        (place / part / "diffusion_pytorch_model.safetensors").rename(blobs / part)
        (snapshot / part / "diffusion_pytorch_model.safetensors").symlink_to(Path("../../../blobs") / part)
    assert latentgen.inspect(snapshot).damage == "" and latentgen.inspect(snapshot / "unet").variant == "sd15"


def test_a_damaged_part_and_a_pickle_are_named(tmp_path: Path) -> None:
    place = folder(tmp_path)
    (place / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    (place / "text_encoder" / "model.safetensors").rename(place / "text_encoder" / "pytorch_model.bin")
    report = latentgen.inspect(place)
    assert "vae/diffusion_pytorch_model.safetensors is empty" in report.damage and "pytorch_model.bin is a pickle" in report.damage and not report.sound


@pytest.mark.parametrize("index", ["{", "[]", '{"auto_map": {}}', "\xff"])
def test_a_damaged_index(tmp_path: Path, index: str) -> None:
    (tmp_path / "model_index.json").write_text(index, "latin-1")
    assert "model_index.json" in latentgen.inspect(tmp_path).damage


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert "no weights" in latentgen.inspect(tmp_path).notes[0]
    sparse(tmp_path / "some.safetensors", {"a": (1,)})
    assert "some.safetensors: name one of them" in latentgen.inspect(tmp_path).notes[0]


# The command


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["inspect", *arguments])


def test_the_command(tmp_path: Path) -> None:
    path = sparse(tmp_path / "x.safetensors", layout("sdxl"))
    done = command(str(path))
    assert done.exit_code == 0
    assert all(words in done.stdout for words in ("checkpoint", "epsilon (as the variant was published)", "6.94 GB"))
    said = json.loads(command(str(path), "--json").stdout)
    assert said == latentgen.inspect(path).to_dict() and said["variant"] == "sdxl" and said["path"] == "x.safetensors"


def test_the_commands_exit_codes(tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"")
    sparse(tmp_path / "unknown.safetensors", {"a": (1,)})
    damaged, unknown, missing = (command(str(tmp_path / f"{name}.safetensors")) for name in ("damaged", "unknown", "missing"))
    assert damaged.exit_code == 1 and "is empty" in damaged.stdout
    assert unknown.exit_code == 1 and "fit nothing that this version knows" in unknown.stdout
    assert missing.exit_code == 3 and "there is no file" in missing.stderr
    assert json.loads(command(str(tmp_path / "damaged.safetensors"), "--json").stdout)["damage"]


def test_the_command_teaches() -> None:
    said = " ".join(command("--help").stdout.split())
    assert "latentgen inspect model.safetensors" in said and "Exit code 0" in said


def test_inspecting_needs_no_network_library(tmp_path: Path) -> None:
    path = sparse(tmp_path / "x.safetensors", {"emb_params": (4, 768)})
    heavy = ("diffusers", "transformers", "huggingface_hub")
    code = f"import sys, latentgen; r = latentgen.inspect({str(path)!r}); print(r.kind, *(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "textual-inversion embedding", done.stderr


def test_a_file_of_real_tensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"emb_params": torch.zeros(4, 768)}, tmp_path / "x.safetensors")
    report = latentgen.inspect(tmp_path / "x.safetensors")
    assert (report.dtypes, report.tensors, report.details) == ({"F32": 1}, 1, {"vectors": "4 of CLIP-L"})
