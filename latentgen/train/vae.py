"""glyph's autoencoder: factor 8, 4 latent channels, diffusers' AutoencoderTiny.

Trained on crops of flat art: L1 + L2 + edges (L1 of the finite differences) + masses (L1 of 8x8 means).
Latents are kept near unit variance and get a little noise on the
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


def new_vae(width: int = 64) -> nn.Module:
    """An untrained AutoencoderTiny (factor 8, 4 channels, constant width, no norms: fast on a CPU and exact in tiles).

    It starts as a colour-true thumbnail: three channels carry the picture's red, green and blue down and up again, every block adds nothing yet,
    and training finds the detail on top. From a random start the few latent channels settle on outlines and lose colours.
    """
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(encoder_block_out_channels=(width,) * 4, decoder_block_out_channels=(width,) * 4, num_encoder_blocks=(1, 2, 3, 3),
                          num_decoder_blocks=(4, 3, 2, 1))
    rgb = torch.arange(3)
    smooth = torch.tensor([0.25, 0.5, 0.25])
    with torch.no_grad():
        for half in (vae.encoder.layers, vae.decoder.layers):
            convs = [layer for layer in half if isinstance(layer, nn.Conv2d)]
            for conv in convs:
                rows = rgb[: conv.out_channels]
                conv.weight[rows] = 0
                if conv.stride == (2, 2):
                    conv.weight[rows, rows] = smooth[:, None] * smooth
                else:
                    conv.weight[rows, rows, 1, 1] = 1
                if conv.bias is not None:
                    conv.bias[rows] = 0
            for block in half:
                if hasattr(block, "conv") and hasattr(block, "fuse"):
                    block.conv[-1].weight.zero_()
                    block.conv[-1].bias.zero_()
            first, last = convs[0], convs[-1]
            if half is vae.encoder.layers:  # latent = (colour - 0.75) * 3
                last.weight[rgb, rgb, 1, 1], last.bias[rgb] = 3.0, -2.25
            else:
                first.weight[rgb, rgb, 1, 1], first.bias[rgb] = 1 / 3, 0.75
                last.weight[:, 3:] *= 0.1
    return vae


def encode(vae: nn.Module, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 4, H/8, W/8) latents."""
    return vae.encode(pixels).latents


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
            crop = crop[..., dice.permutation(3)] if dice.random() < 0.3 else crop  # colour must be read, not guessed from the shape
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
    masses = nn.functional.avg_pool2d(error, 8).abs().mean()  # colour and brightness of an area: what edges and pixels alone learn late
    zf = z.float()
    spread = zf.mean((0, 2, 3)).square().mean() + (zf.var((0, 2, 3)) - 1).square().mean()
    total = error.abs().mean() + 2 * mse + 0.5 * edges + 2 * masses + 0.02 * spread
    return {"loss": total, "mse": mse.detach(), "masses": masses.detach(), "spread": spread.detach()}


@torch.no_grad()
def unit_scale(vae: nn.Module, pixels: np.ndarray) -> float:
    """The factor that gives the latents of these pictures ((n, H, W, 3) uint8) unit deviation."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    z = torch.cat([encode(vae, part.contiguous(memory_format=torch.channels_last)).float() for part in x.split(8)])
    return round(1 / float(z.std()), 4)


@torch.no_grad()
def preview_rows(vae: nn.Module, pixels: np.ndarray) -> list[list[float]]:
    """The linear preview of (scaled) latents: 5 rows of RGB in [-1, 1], one per channel and a constant, fitted by least squares.

    Args:
        pixels: (n, H, W, 3) uint8 pictures to fit on.
    """
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    z = torch.cat([encode(vae, part.contiguous(memory_format=torch.channels_last)).float() for part in x.split(8)]) * vae.config.scaling_factor
    flat = z.permute(0, 2, 3, 1).reshape(-1, 4)
    colours = nn.functional.avg_pool2d(x, 8).permute(0, 2, 3, 1).reshape(-1, 3)
    rows = torch.linalg.lstsq(torch.cat([flat, torch.ones(len(flat), 1)], 1), colours).solution
    return [[round(v, 4) for v in row] for row in rows.tolist()]


@torch.no_grad()
def reconstruct(vae: nn.Module, pixels: np.ndarray, *, bf16: bool = True) -> np.ndarray:
    """(n, H, W, 3) uint8 -> the same after encoding and decoding, where the autoencoder is."""
    out, place = [], next(vae.parameters()).device
    for picture in pixels:
        x = torch.from_numpy(picture).to(place).permute(2, 0, 1)[None].float().contiguous(memory_format=torch.channels_last) / 127.5 - 1
        with torch.autocast(place.type, dtype=torch.bfloat16, enabled=bf16):
            y = vae.decode(encode(vae, x)).sample.float().cpu()
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
