"""glyph's denoiser: a small U-Net with cross-attention on cached latents and cached text states.

v-prediction on a zero-terminal-SNR scaled-linear schedule (Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps Are Flawed"),
so that the last level is pure noise and a pure white background can be learnt. Trained at 128 px first; for 256 px the network grows an outer
level (after Karras et al. 2018, "Progressive Growing of GANs"), so that the trained levels work on the grid they know and a step costs little more.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from latentgen.diffusion.schedule import scaled_linear, zero_terminal_snr
from latentgen.errors import TrainingError
from latentgen.train import text as text_training
from latentgen.train.captions import Icon
from latentgen.train.data import PictureSetReader
from latentgen.train.loop import Batch
from latentgen.train.vae import encode

TRAIN_STEPS, BETA_START, BETA_END = 1000, 0.00085, 0.012
DROPOUT = 0.1  # share of samples trained without words, for classifier-free guidance


def new_unet(*, text_width: int = text_training.TEXT_WIDTH, sample_size: int = 32) -> nn.Module:
    """The untrained network: three levels of width 96, 192, 256, one layer each, cross-attention at the two lower ones."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=sample_size, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(96, 192, 256), norm_num_groups=16,
        cross_attention_dim=text_width, attention_head_dim=32, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))


OUTER = 48  # channels of the level that `grown` adds


def grown(inner: nn.Module, *, channels: int = OUTER) -> nn.Module:
    """The network for pictures of twice the side: `inner` with one more level of few channels and no attention around it.

    A step costs about a third more than before, where running `inner` itself on four times the positions costs four times as much. What fits is
    taken over; the new level, the first convolutions of the old one and the ends of the network start untrained.

    Raises:
        TrainingError: `channels` is not half of the outermost width, which the time embedding is taken over by.
    """
    from diffusers import UNet2DConditionModel

    old = {k: v for k, v in inner.config.items() if not k.startswith("_")}  # "_use_default_values" would undo what is changed
    outermost = old["block_out_channels"][0]
    if 2 * channels != outermost:
        raise TrainingError(f"the new level has {channels} channels: expected {outermost // 2}, half of the outermost level's")
    tensors = {re.sub(r"^down_blocks\.(\d+)", lambda m: f"down_blocks.{int(m[1]) + 1}", k): v for k, v in inner.state_dict().items()}
    known = tensors.pop("time_embedding.linear_1.weight")  # cosines, then sines, of falling frequencies: half as many are every second one
    unet = UNet2DConditionModel.from_config({**old, "sample_size": 2 * old["sample_size"],
                                             "block_out_channels": (channels, *old["block_out_channels"]),
        "time_embedding_dim": known.shape[0], "down_block_types": ("DownBlock2D", *old["down_block_types"]),
        "up_block_types": (*old["up_block_types"], "UpBlock2D")})
    fresh = unet.state_dict()
    fits = {k: v for k, v in tensors.items() if k in fresh and fresh[k].shape == v.shape and not k.startswith("conv_")}
    unet.load_state_dict(fits | {"time_embedding.linear_1.weight": known.unflatten(1, (-1, 2)).sum(-1)}, strict=False)
    return unet


def explicit_attention(unet: nn.Module) -> None:
    """Softmax attention written out: on a CPU in bf16 the fused kernel's backward pass is very slow."""
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())


def alphas_bar() -> Tensor:
    """(1000,) cumulative alpha^2 of the schedule, last exactly 0."""
    return torch.tensor(zero_terminal_snr(scaled_linear(TRAIN_STEPS, BETA_START, BETA_END)), dtype=torch.float64).float()


@dataclass(frozen=True)
class Cache:
    """Everything a step needs, computed once: latents of every training picture and text states of every caption.

    Attributes:
        latents: (N, 4, h, w) float16, scaled by the autoencoder's factor.
        states: (M, 32, width) float16; row 0 is the empty prompt.
        choices: for each picture the rows of `states` it may be trained with, and their weights.
        weights: (N,) sampling weights.
    """

    latents: np.ndarray
    states: np.ndarray
    choices: list[tuple[np.ndarray, np.ndarray]]
    weights: np.ndarray


def training_rows(reader: PictureSetReader, *, core: bool = False) -> list[int]:
    """Rows of the training split; `core` leaves out those that are drawn less often (skin tones, interface icons), for a short run."""
    rows = reader.rows("train")
    return [r for r in rows if _share(reader.icons[r]) == 1] if core else rows


def _share(icon: Icon) -> float:
    """How often a drawing is used, beside 1 for a plain one."""
    if "skin tone" in icon.name:
        return 0.4
    return 0.5 if icon.set in ("streamline-ultimate-color", "fluent-color", "flat-color-icons") else 1.0


def cache_latents(reader: PictureSetReader, rows: list[int], vae: nn.Module, out: Path, *, size: int, batch: int = 8) -> np.ndarray:
    """Encode pictures on white at `size` px into `out` (raw latents, float16); what a stopped run encoded already is kept.

    Raises:
        TrainingError: the set was not drawn at a whole multiple of `size`.
    """
    drawn = reader.pixels.shape[1]
    if size > drawn or drawn % size or size % 8:
        raise TrainingError(f"size is {size} but the set was drawn at {drawn} px: expected {drawn} or a half or a quarter of it")
    shape = (len(rows), 4, size // 8, size // 8)
    fresh = not out.exists() or np.load(out, mmap_mode="r").shape != shape
    z = np.lib.format.open_memmap(out, mode="w+" if fresh else "r+", dtype=np.float16, shape=shape)
    shrink = drawn // size
    place = next(vae.parameters()).device
    with torch.no_grad(), torch.autocast(place.type, dtype=torch.bfloat16):
        for at in tqdm(range(0, len(rows), batch), desc=f"latents at {size} px", unit="batch"):
            if np.any(z[min(at + batch, len(rows)) - 1]):
                continue
            pixels = torch.from_numpy(reader.on_white(rows[at:at + batch])).to(place).permute(0, 3, 1, 2).float()
            if shrink > 1:
                pixels = nn.functional.avg_pool2d(pixels, shrink)
            z[at:at + batch] = encode(vae, (pixels / 127.5 - 1).contiguous(memory_format=torch.channels_last)).float().cpu().numpy()
    z.flush()
    return z


def cache_text(reader: PictureSetReader, rows: list[int], encoder: nn.Module, tokenizer: Path, *, keywords: int = 2,
               seed: int = 0) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Text states of every caption, and per picture which ones it may use (name with style 0.6, name 0.25, a keyword 0.15)."""
    captions: dict[str, int] = {"": 0}
    choices = []
    for row in rows:
        icon = reader.icons[row]
        dice = random.Random(f"{icon.name}{seed}")
        loose = dice.sample(icon.keywords, min(keywords, len(icon.keywords)))
        lines = [f"{icon.name}, {icon.style}", icon.name, *(f"{word}, {icon.style}" for word in loose)]
        weights = np.array([0.6, 0.25] + [0.15 / max(1, len(loose))] * len(loose), np.float32)
        choices.append((np.array([captions.setdefault(line, len(captions)) for line in lines]), weights / weights.sum()))
    tokens = torch.from_numpy(text_training.tokens_of(list(captions), tokenizer))
    states = np.empty((len(tokens), tokens.shape[1], encoder.config.hidden_size), np.float16)
    place = next(encoder.parameters()).device
    with torch.no_grad(), torch.autocast(place.type, dtype=torch.bfloat16):
        for at in tqdm(range(0, len(tokens), 256), desc="text states", unit="batch"):
            states[at:at + 256] = encoder(tokens[at:at + 256].to(place)).last_hidden_state.float().cpu().numpy()
    return states, choices


def weights(reader: PictureSetReader, rows: list[int]) -> np.ndarray:
    """(n,) how often each picture is drawn, summing to 1: skin tones and interface icons less, recolours 22 % of all."""
    icons = [reader.icons[r] for r in rows]
    w = np.array([_share(i) for i in icons])
    made = np.array([i.id.startswith("recolour/") for i in icons])
    if made.any() and not made.all():
        w[made] = w[~made].sum() * 0.22 / 0.78 / made.sum()
    return w / w.sum()


def batches(cache: Cache, *, batch: int, seed: int) -> Iterator[Batch]:
    """Endless (latents, text states) pairs, words dropped in a tenth of them."""
    dice = np.random.default_rng(seed)
    while True:
        rows = dice.choice(len(cache.latents), size=batch, p=cache.weights)
        captions = [0 if dice.random() < DROPOUT else dice.choice(cache.choices[r][0], p=cache.choices[r][1]) for r in rows]
        yield {"latents": torch.from_numpy(cache.latents[rows]), "states": torch.from_numpy(cache.states[captions])}


def loss_function(*, device: str | torch.device = "cpu") -> Callable[[nn.Module, Batch], Mapping[str, Tensor]]:
    """Mean squared error of v = alpha * eps - sigma * x0 (Salimans and Ho 2022), time stratified over the batch."""
    table = alphas_bar().to(device)

    def loss(unet: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        x0 = batch["latents"].float().contiguous(memory_format=torch.channels_last)
        n = len(x0)
        time = ((torch.arange(n, device=x0.device) + torch.rand(n, device=x0.device)) / n * TRAIN_STEPS).long().clamp(max=TRAIN_STEPS - 1)
        alpha, sigma = (t.sqrt()[:, None, None, None] for t in (table[time], 1 - table[time]))
        eps = torch.randn_like(x0)
        out = unet(alpha * x0 + sigma * eps, time, batch["states"].float()).sample.float()
        return {"loss": nn.functional.mse_loss(out, alpha * eps - sigma * x0)}

    return loss


@torch.no_grad()
def sample(unet: nn.Module, states: Tensor, empty: Tensor, *, size: int, steps: int = 20, scale: float = 4.0, seed: int = 0) -> Tensor:
    """A DDIM loop for the training sheet only (the product samples through `pipe`): (n, 32, width) states -> (n, 4, size/8, size/8)."""
    table = alphas_bar().to(states)
    x = torch.randn(len(states), 4, size // 8, size // 8, generator=torch.Generator().manual_seed(seed)).to(states)
    times = torch.linspace(TRAIN_STEPS - 1, -1, steps + 1).round().long()[:-1].to(states.device)
    both = torch.cat([empty.expand_as(states), states])
    for i, time in enumerate(times):
        alpha, sigma = table[time].sqrt(), (1 - table[time]).sqrt()
        following = table[times[i + 1]] if i + 1 < steps else torch.tensor(1.0)
        without, words = unet(torch.cat([x, x]), time.expand(2 * len(x)), both).sample.float().chunk(2)
        v = without + scale * (words - without)
        x0, eps = alpha * x - sigma * v, sigma * x + alpha * v
        x = following.sqrt() * x0 + (1 - following).sqrt() * eps
    return x


def sheet(vae: nn.Module, encoder: nn.Module, tokenizer: Path, prompts: list[str], *, size: int, scale: float) -> Callable[[nn.Module], Image.Image]:
    """A function that draws the prompts with the network as it is, for the training loop, where the other two parts are. `scale`: of the latents."""
    place = next(encoder.parameters()).device
    with torch.no_grad():
        states = encoder(torch.from_numpy(text_training.tokens_of(["", *prompts], tokenizer)).to(place)).last_hidden_state.float()

    def draw(unet: nn.Module) -> Image.Image:
        with torch.no_grad(), torch.autocast(place.type, dtype=torch.bfloat16):
            z = sample(unet, states[1:], states[:1], size=size) / scale
            pixels = vae.decode(z.contiguous(memory_format=torch.channels_last)).sample.float().cpu()
        tiles = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        rows = [np.concatenate(list(tiles[at:at + 6]), 1) for at in range(0, len(tiles) - 5, 6)]
        return Image.fromarray(np.concatenate(rows, 0))

    return draw
