"""Text encoders: token ids in, hidden states out. Knows tokenizers and transformers' text models; knows no denoiser.

`tokenizers` is used directly (0.04 s to import) and builds CLIP's byte-level BPE from vocab.json and merges.txt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentgen.errors import ModelError

CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class ClipTokens:
    """CLIP's tokenizer (lower case, byte-level BPE).

    Attributes:
        start, end: ids that open and close every chunk; the end id also pads.
        length: ids in one chunk, start and end included (77 for CLIP, 32 for glyph).
    """

    inner: Any
    start: int
    end: int
    length: int

    @classmethod
    def read(cls, folder: Path) -> ClipTokens:
        """Read vocab.json, merges.txt and tokenizer_config.json from a folder.

        Raises:
            ModelError: a file is missing or damaged.
        """
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        try:
            vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
            lines = (folder / "merges.txt").read_text("utf-8").splitlines()
            config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
            merges = [(a, b) for a, b in (line.split(" ") for line in lines if line and not line.startswith("#version"))]
            start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
            inner = Tokenizer(models.BPE(vocab, merges, unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
            length = int(config.get("model_max_length", 77))
            if not 3 <= length <= 4096:
                raise ValueError(f"model_max_length is {length}")
        except Exception as error:  # `tokenizers` raises Exception itself for merges that the vocabulary lacks
            raise ModelError(f"the tokenizer in {folder.name!r} cannot be read ({error}): it needs vocab.json, merges.txt and tokenizer_config.json") from error
        inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
        return cls(inner, start, end, length)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without start and end; any length."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def words(self, ids: list[int]) -> list[str]:
        """What each id stands for, `</w>` shown as a closing space."""
        return [(self.inner.id_to_token(i) or "").replace("</w>", " ") for i in ids]
