"""glyph's autoencoder: factor 8, 4 latent channels, diffusers' AutoencoderKL or AutoencoderTiny at small width.

Trained on crops of flat art: L1 + L2 + edges (L1 of the finite differences). Latents are kept near unit variance and get a little noise on the
way to the decoder, so that it forgives what a denoiser gets wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from latentgen.train.data import PictureSetReader
from latentgen.train.loop import Batch

LATENT_NOISE = 0.05


def new_vae(kind: str = "tiny", width: int = 64) -> nn.Module:
    """An untrained autoencoder: "tiny" (AutoencoderTiny, constant width, no norms: fast on a CPU) or "kl" (AutoencoderKL)."""
    if kind == "tiny":
        from diffusers import AutoencoderTiny

        return AutoencoderTiny(encoder_block_out_channels=(width,) * 4, decoder_block_out_channels=(width,) * 4, num_encoder_blocks=(1, 2, 3, 3),
                               num_decoder_blocks=(4, 3, 2, 1))
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(width // 2, width, 2 * width, 3 * width), down_block_types=("DownEncoderBlock2D",) * 4,
                         up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=16, latent_channels=4,
                         mid_block_add_attention=False)


def encode(vae: nn.Module, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 4, H/8, W/8) raw latents (the mean, no draw)."""
    out = vae.encode(pixels)
    return out.latents if hasattr(out, "latents") else out.latent_dist.mean


def crops(reader: PictureSetReader, *, side: int = 96, batch: int = 8, seed: int = 0) -> Iterator[Batch]:
    """Endless random crops with something on them: half at full size, half from pictures at half size; a fifth on a pastel background."""
    dice = np.random.default_rng(seed)
    rows = np.array(reader.rows("train"))
    while True:
        out = np.empty((batch, side, side, 3), np.uint8)
        for i in range(batch):
            back = np.full((1, 3), 255, np.uint8) if dice.random() < 0.8 else dice.integers(150, 256, (1, 3), dtype=np.uint8)
            picture = reader.on_white([dice.choice(rows)], background=back)[0]
            if dice.random() < 0.5:
                picture = picture.reshape(picture.shape[0] // 2, 2, picture.shape[1] // 2, 2, 3).mean((1, 3)).astype(np.uint8)
            for _ in range(4):
                y, x = dice.integers(0, picture.shape[0] - side + 1, 2)
                crop = picture[y:y + side, x:x + side]
                if crop.std() > 12:
                    break
            out[i] = crop[:, ::-1] if dice.random() < 0.5 else crop
        yield {"pixels": torch.from_numpy(out).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)}


def loss(vae: nn.Module, batch: Batch, *, train_encoder: bool = True) -> Mapping[str, Tensor]:
    """Reconstruction loss of a batch of uint8 pixels; also logs the PSNR in dB over the range [-1, 1]."""
    pixels = batch["pixels"].float() / 127.5 - 1
    with torch.set_grad_enabled(train_encoder):
        z = encode(vae, pixels)
    made = vae.decode(z + LATENT_NOISE * torch.randn_like(z)).sample.float()
    error = made - pixels
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    mse = error.square().mean()
    zf = z.float()
    spread = zf.mean((0, 2, 3)).square().mean() + (zf.var((0, 2, 3)) - 1).square().mean()
    total = error.abs().mean() + 2 * mse + 0.5 * edges + 0.02 * spread
    return {"loss": total, "mse": mse.detach(), "spread": spread.detach()}


@torch.no_grad()
def reconstruct(vae: nn.Module, pixels: np.ndarray, *, bf16: bool = True) -> np.ndarray:
    """(n, H, W, 3) uint8 -> the same after encoding and decoding."""
    out = []
    for picture in pixels:
        x = torch.from_numpy(picture).permute(2, 0, 1)[None].float().contiguous(memory_format=torch.channels_last) / 127.5 - 1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            y = vae.decode(encode(vae, x)).sample.float()
        out.append(((y[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).round().byte().numpy())
    return np.stack(out)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures."""
    return 10 * math.log10(255**2 / max(float(np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2)), 1e-9))


def sheet(reader: PictureSetReader, rows: list[int]):  # noqa: ANN201
    """A function that draws originals over reconstructions, for the training loop."""
    originals = reader.on_white(rows)

    def draw(vae: nn.Module) -> Image.Image:
        made = reconstruct(vae, originals)
        return Image.fromarray(np.concatenate([np.concatenate(list(originals), 1), np.concatenate(list(made), 1)], 0))

    return draw
