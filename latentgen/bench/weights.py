"""Checkpoints of published architectures with random weights, as diffusers folders, to measure speed without a download. Knows configs; knows no
clock.

Weights are float16, scaled so that activations stay near one through the depth of a network: kernels that are faster on zeros, or slow on numbers
too small to be normal, would tell nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentgen.conditioning.vocabulary import packaged_clip
from latentgen.models.card import published
from latentgen.models.load import Source, empty_module

if TYPE_CHECKING:
    from torch import Tensor

    from latentgen.models.family import Part

SEED = 0
DEPTHS = ("num_layers", "num_single_layers", "transformer_layers_per_block")  # in configs
T5 = "T5TokenizerFast"


@dataclass(frozen=True)
class Architecture:
    """What is made.

    Attributes:
        variant: whose configs.
        file: the family's file in `pipelines/`.
        changes: part -> entries of its config that are different (depth); a part that is None is left out.
    """

    variant: str
    file: str
    changes: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """part -> its config."""
        known = published(self.variant)["parts"]
        return {name: config | dict(self.changes.get(name) or {}) for name, config in known.items() if self.changes.get(name, {}) is not None}


def shallower(architecture: Architecture, share: float) -> Architecture:
    """The same with a share of the layers of its denoiser and its language models, one of each kind at least; CLIP's are few and stay."""
    if share == 1:
        return architecture
    changes = {name: dict(change) if change is not None else None for name, change in architecture.changes.items()}
    for name, config in architecture.configs.items():
        for key in DEPTHS:
            if (layers := config.get(key)) is not None:
                fewer = [max(1, round(one * share)) for one in (layers if isinstance(layers, list) else [layers])]
                changes[name] = {**(changes.get(name) or {}), key: fewer if isinstance(layers, list) else fewer[0]}
    return replace(architecture, changes=changes)


def write(architecture: Architecture, folder: Path) -> Path:
    """The checkpoint as a folder; itself where it is there already. SD 1.5 takes about half a minute and 2 GB."""
    if (folder / "model_index.json").is_file():
        return folder
    from importlib import import_module

    from safetensors.torch import save_file

    known, configs = published(architecture.variant), architecture.configs
    parts: dict[str, Part] = {part.name: part for part in import_module(f"latentgen.pipelines.{architecture.file}").PARTS}
    for number, (name, config) in enumerate(configs.items()):
        part, place = parts[name], folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(config), "utf-8")
        module = empty_module(Source(name, (), config), part, shapes_only=True)
        tensors = {key: _random(key, value, SEED + number) for key, value in module.state_dict().items() if value.is_floating_point()}
        stem = "model" if part.cls.startswith("transformers") else "diffusion_pytorch_model"
        save_file(tensors, place / f"{stem}.safetensors", {"format": "pt"})
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(known["scheduler"]), "utf-8")
    for name, said in known["tokenizers"].items():
        if f"text_encoder{name.removeprefix('tokenizer')}" in configs:
            if said["pad"] == "<pad>":
                _write_t5_tokenizer(folder / name, length=said["model_max_length"])
            else:
                _write_tokenizer(folder / name, pad=said["pad"])
    index = dict(known["index"]) | {name: part.cls.split(".") for name, part in parts.items() if name in configs}
    index |= {name: ["transformers", T5 if said["pad"] == "<pad>" else "CLIPTokenizer"]
              for name, said in known["tokenizers"].items() if (folder / name).is_dir()}
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", known["scheduler"]["_class_name"]]}), "utf-8")
    return folder


def _random(name: str, like: Tensor, seed: int) -> Tensor:
    """Weights of a product keep the size of what goes through them; norms are near one, biases near zero."""
    import torch

    dice = torch.Generator().manual_seed(seed * 1_000_003 + sum(map(ord, name)))
    noise = torch.randn(like.shape, generator=dice)
    if like.ndim == 1:
        return (1 + 0.02 * noise if "norm" in name and name.endswith("weight") else 0.02 * noise).half()
    return noise.mul_(0.7 / like[0].numel() ** 0.5).half()


def _write_tokenizer(folder: Path, *, pad: str) -> None:
    """CLIP's tokenizer as checkpoints carry it, from the packaged vocabulary."""
    clip = packaged_clip()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(clip.vocab, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in clip.merges), "utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}), "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), "utf-8")


def _write_t5_tokenizer(folder: Path, *, length: int) -> None:
    """A tokenizer of T5's kind that knows letters alone: as many tokens are read as there are letters, up to the padding, which is always full."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    special = ("<pad>", "</s>", "<unk>")
    letters = ("\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789,.")
    inner = Tokenizer(models.Unigram([*((name, 0.0) for name in special), *((letter, -1.0) for letter in letters)], unk_id=2, byte_fallback=False))
    space = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    inner.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": length, "extra_ids": 0, "pad_token": "<pad>", "eos_token": "</s>",
              "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
