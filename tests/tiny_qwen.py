"""Tiny Qwen language models and their tokenizer, as the large checkpoints carry them. Knows transformers and tokenizers; no latentgen.

The tokenizer is a byte-level BPE with Qwen's way of cutting a text, its special tokens after the vocabulary and its template for one turn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiny import lively

TEXT = (
    "a red heart, flat", "blue car, top view", "a green tree under a yellow sun", "the cat sat on the mat", "blurry photo of a blue car",
    "user\n", "assistant\n", "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:",
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how the user's text instruction "
    "should alter or modify the image. Generate a new image that meets the user's requirements while maintaining consistency with the original "
    "input where appropriate.",
)
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (  # of Qwen3, for messages of one role each
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)


def tiny_qwen_tokenizer(folder: Path) -> Any:
    """A PreTrainedTokenizerFast of about 500 tokens, also written into a folder."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
                                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    inner.train_from_iterator(TEXT * 3, trainer)
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    theirs = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=SPECIAL[0], eos_token="<|im_end|>", chat_template=TEMPLATE,
                                     padding_side="right")
    theirs.save_pretrained(folder)
    return theirs


def louder(module: Any) -> Any:
    """With attention that is far from even, so that every token is told apart from its neighbours."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "embed_tokens.weight", "qkv.weight", "patch_embed.proj.weight")):
                weight.mul_(8)
    return lively(module)


def tiny_qwen3(tokenizer: Any, *, width: int = 32) -> nn.Module:
    """A Qwen3ForCausalLM of three layers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(2)
    return louder(Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, tie_word_embeddings=True)))


def tiny_qwen_vl(tokenizer: Any, *, width: int = 32) -> nn.Module:
    """A Qwen2_5_VLForConditionalGeneration: two layers of words, and an eye of two, the first of which sees windows of 2x2 tokens."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(2)
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
                   tokenizer.convert_tokens_to_ids([*SPECIAL[3:5], *SPECIAL[6:]]), strict=True))
    words = {"vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": None,
             "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}, "rope_theta": 1e6}
    eye = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": width, "window_size": 56,
           "fullatt_block_indexes": [1]}
    return louder(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=words, vision_config=eye, tie_word_embeddings=False, **ids)))
