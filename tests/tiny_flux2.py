"""FLUX.2's parts, tiny and random, and the chat tokenizers of its two text encoders. Knows diffusers, transformers and tokenizers; no latentgen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiny import lively
from tiny_qwen import SPLIT

LINES = ["a red heart, flat", "blurry photo of a blue car", "user assistant system\n", "\n\n\n", "the cat sat on the mat", "naïve café"]
SPECIAL = {"dev": ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]",
                   "[IMG_END]"),
           "klein": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")}
TEMPLATES = {
    "dev": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content[0].text + '[/SYSTEM_PROMPT]' }}"
           "{% else %}{{ '[INST]' }}{% for block in m.content %}{{ block.text }}{% endfor %}{{ '[/INST]' }}{% endif %}{% endfor %}",
    "klein": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
             "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
             "{% endif %}{% endif %}"}


def tokenizer(kind: str, place: Path) -> Any:
    """A byte-level BPE of about 340 tokens as transformers reads it, its tokenizer.json also written to `place`.

    Mistral's is part of a processor for pictures, pads before the text and opens it by itself.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PixtralImageProcessor, PixtralProcessor, PreTrainedTokenizerFast, Qwen2TokenizerFast

    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
                                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(LINES * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL[kind]])
    if kind == "dev":
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))])
    inner.save(str(place))
    if kind == "klein":
        return Qwen2TokenizerFast(tokenizer_object=inner, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=TEMPLATES[kind])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", pad_token="<pad>", padding_side="left", model_max_length=4096)
    return PixtralProcessor(PixtralImageProcessor(), fast, chat_template=TEMPLATES[kind])


def language_model(kind: str) -> nn.Module:
    """Qwen3 ("klein") or Mistral 3 with a small eye ("dev"), deep enough for the layers that are read.

    With weights so large, and not the usual 0.02, its states tell texts apart.
    """
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(2)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 400,
            "initializer_range": 0.3, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if kind == "klein":
        return lively(Qwen3ForCausalLM(Qwen3Config(**size, num_hidden_layers=28)))
    eye = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
           "image_size": 28, "patch_size": 14}
    return lively(Mistral3ForConditionalGeneration(Mistral3Config(
        text_config={"model_type": "mistral", **size, "num_hidden_layers": 31}, vision_config=eye, image_token_index=8, tie_word_embeddings=False)))


def network(*, guided: bool) -> nn.Module:
    """Queries and keys are normalised: with unit weights attention is so even that 500 padding tokens drown the words. Sharper and louder, it hears.

    The embedding of time stays as it is: larger, it would multiply the last bit in which float32 times differ.
    """
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(1)
    net = lively(Flux2Transformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=48,
                                         axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guided))
    for part, gain in (("norm_q", 3), ("norm_k", 3), ("norm_added", 3), ("guidance_embedder", 2), ("attn.to_out", 6)):
        for name, weight in net.named_parameters():
            if part in name:
                weight.mul_(gain)
    return net


def autoencoder() -> nn.Module:
    """Its latents spread about as far as a trained one's, whose statistics are far from 0 and 1."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(0)
    vae = lively(AutoencoderKLFlux2(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, sample_size=64))
    vae.encoder.conv_out.weight.mul_(15)
    vae.bn.running_mean.copy_(0.7 * torch.randn(128))
    vae.bn.running_var.copy_(0.5 + 2 * torch.rand(128))
    return vae
