"""A tiny T5: encoder and tokenizer as the large checkpoints carry them, made on the spot. Knows transformers and tokenizers; no latentgen.

The tokenizer file is laid out as the published one: Unigram pieces after <pad>, </s> and <unk>, then a hundred sentinels counted down.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from tiny import lively

TEXT = (
    "a red heart, flat", "blue car, top view", "a green tree under a yellow sun", "the cat sat on the mat", "two dogs run over the hill",
    "oil painting of a city at night", "make the sky purple and add three birds", "blurry, low quality, watermark",
    "photo of an astronaut riding a horse", "The quick brown fox jumps over the lazy dog.", "Naïve café, 日本語, 2024's best!",
    "0 1 2 3 4 5 6 7 8 9",
)
SENTINELS = 100
SPECIAL = ("<pad>", "</s>", "<unk>")


def tiny_t5(*, width: int = 32, seed: int = 0) -> nn.Module:
    """A T5EncoderModel of two layers over `tiny_t5_tokenizer`'s vocabulary, with the gated feed-forward of T5 1.1."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(vocab_size=len(_pieces()), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
                      dropout_rate=0.0, tie_word_embeddings=False, is_encoder_decoder=False, use_cache=False)
    return lively(T5EncoderModel(config), seed=seed)


def tiny_t5_tokenizer(folder: Path, *, length: int = 512) -> Path:
    """Write tokenizer.json and tokenizer_config.json (with `model_max_length`) into a folder; the folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    inner = Tokenizer(models.Unigram(list(_pieces()), unk_id=2, byte_fallback=False))
    space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    inner.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, *sentinels)])
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": length, "extra_ids": SENTINELS, "additional_special_tokens": sentinels,
              "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")
    return folder


@lru_cache(maxsize=1)
def _pieces() -> tuple[tuple[str, float], ...]:
    """(piece, log probability) of the whole vocabulary, in the order of ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=160, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False)
    learner.train_from_iterator(TEXT, trainer)
    learnt = json.loads(learner.to_str())["model"]["vocab"]
    assert tuple(piece for piece, _ in learnt[:3]) == SPECIAL
    return (*((piece, float(score)) for piece, score in learnt), *((f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))))
