"""Latents: encode and decode are the module's own call, tiles are seamless, and what is not finite is never handed on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from latentgen.errors import ModelError, NotFiniteError, RequestError
from latentgen.pixels.image import to_tensor
from latentgen.pixels.latent import LatentSpec, decode, encode, preview

SPEC = LatentSpec(channels=4, factor=4, scale=0.7, shift=0.2, multiple=8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kl() -> nn.Module:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoencoderKL(block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                             latent_channels=4, norm_num_groups=4, layers_per_block=1).eval()


def tiny() -> nn.Module:
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng():
        torch.manual_seed(2)
        return AutoencoderTiny(encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
                               num_decoder_blocks=(1, 1, 1), latent_channels=4).eval()


@pytest.fixture(scope="module", params=[kl, tiny])
def vae(request: pytest.FixtureRequest) -> nn.Module:
    return request.param()


def own_encode(vae: nn.Module, pixels: Tensor) -> Tensor:
    out = vae.encode(pixels)
    return out.latent_dist.mean if hasattr(out, "latent_dist") else out.latents


def test_encode_and_decode_are_the_modules_own_call(vae: nn.Module) -> None:
    pixels, z = random(2, 3, 24, 40).clamp(-1, 1), random(2, 4, 6, 10)
    with torch.no_grad():
        assert torch.equal(encode(vae, pixels, SPEC), (own_encode(vae, pixels) - 0.2) * 0.7)
        assert torch.equal(decode(vae, z, SPEC), vae.decode(z / 0.7 + 0.2).sample)
    made = decode(vae, z, SPEC)
    assert made.shape == (2, 3, 24, 40) and made.dtype == torch.float32 and not made.requires_grad and not made.is_inference()
    assert SPEC.shape(40, 24) == (4, 6, 10)


def test_half_precision_modules_take_and_give_float32() -> None:
    half, full, seen = kl().bfloat16(), kl(), []
    half.decoder.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    z, pixels = random(1, 4, 8, 8), random(1, 3, 32, 32).clamp(-1, 1)
    made = decode(half, z, SPEC)
    assert made.dtype == torch.float32 and seen[0].dtype == torch.bfloat16 and seen[0].is_contiguous(memory_format=torch.channels_last)
    assert next(half.parameters()).is_contiguous()  # the module is as it was
    assert (made - decode(full, z, SPEC)).abs().max() < 0.05
    got = encode(half, pixels, SPEC)
    assert got.dtype == torch.float32 and (got - encode(full, pixels, SPEC)).abs().max() < 0.05


@pytest.mark.parametrize("spec", [SPEC, LatentSpec(scale=0.13025), LatentSpec(channels=16, scale=0.3611, shift=0.1159)])
def test_scale_and_shift_round_trip(spec: LatentSpec) -> None:
    raw = random(2, spec.channels, 4, 4).double()
    assert torch.allclose(spec.to_raw(spec.to_model(raw)), raw, rtol=0, atol=1e-14)
    assert torch.allclose(spec.to_model(raw), (raw - spec.shift) * spec.scale)


@pytest.mark.parametrize(("height", "width"), [(48, 40), (52, 20), (44, 92)])
def test_tiles_are_exact_without_norms(height: int, width: int) -> None:
    """The tiny decoder here reaches 9 latents at most; overlap 36 drops 9 of them: even the seams equal the whole."""
    module, z = tiny(), random(2, 4, height, width)
    whole, tiled = decode(module, z, SPEC), decode(module, z, SPEC, tile=160, overlap=144)
    assert torch.allclose(tiled, whole, rtol=0, atol=2e-6)
    pixels = random(1, 3, height * 4, width * 4).clamp(-1, 1)
    assert torch.allclose(encode(module, pixels, SPEC, tile=160, overlap=144), encode(module, pixels, SPEC), rtol=0, atol=2e-6)


def test_small_tiles_are_exact_away_from_the_seams() -> None:
    module, z = tiny(), random(1, 4, 24, 60)
    whole, tiled = decode(module, z, SPEC), decode(module, z, SPEC, tile=160, overlap=32)
    error = (whole - tiled).abs().amax(dim=(0, 1, 2))
    assert error.max() > 1e-6  # starts 0 and 20: the seam, around latents 20 to 40, is approximate
    assert error[:11 * 4].max() < 2e-6 and error[-11 * 4:].max() < 2e-6


def test_tiles_with_norms_are_close_and_seamless() -> None:
    module, z = kl(), random(1, 4, 24, 24)
    whole, tiled = decode(module, z, SPEC), decode(module, z, SPEC, tile=64)
    assert (whole - tiled).abs().mean() < 0.15 * whole.std()
    flat = torch.ones(1, 4, 24, 24)
    steps, own = (decode(module, flat, SPEC, tile=tile)[..., 16:80, 16:80].diff(dim=3).abs().max() for tile in (64, None))
    assert steps < own + 0.05


def test_a_tile_as_large_as_the_picture_is_the_whole(vae: nn.Module) -> None:
    z = random(1, 4, 8, 6)
    assert torch.equal(decode(vae, z, SPEC, tile=32), decode(vae, z, SPEC))


@pytest.mark.parametrize("axes", [(2,), (3,), (2, 3)])
@pytest.mark.parametrize("tiles", [{}, {"tile": 160, "overlap": 144}])
def test_edges_that_meet(axes: tuple[int, ...], tiles: dict[str, int]) -> None:
    """Of three pictures side by side the middle one has no edge; so has one whose edges are joined. What the tiny decoder reaches past 8 latents is nothing."""
    height, width = 24, 32
    module, z, sides = tiny(), random(1, 4, height, width), [3 if axis in axes else 1 for axis in (2, 3)]

    def middle(x: Tensor) -> Tensor:
        return x.unflatten(3, (sides[1], -1))[..., sides[1] // 2, :].unflatten(2, (sides[0], -1))[..., sides[0] // 2, :, :]

    whole = decode(module, z.tile(1, 1, *sides), SPEC)
    pixels = decode(module, z, SPEC, wrap=axes, **tiles)
    torch.testing.assert_close(pixels, middle(whole), rtol=0, atol=1e-4)
    torch.testing.assert_close(encode(module, pixels, SPEC, wrap=axes, **tiles), middle(encode(module, pixels.tile(1, 1, *sides), SPEC)), rtol=0, atol=1e-4)


class Stub(nn.Module):
    """An autoencoder that gives back what it is told to."""

    def __init__(self, sample: Tensor) -> None:
        super().__init__()
        self.weight, self.sample = nn.Parameter(torch.zeros(1)), sample

    def decode(self, z: Tensor) -> Stub:
        return self

    def encode(self, x: Tensor) -> Stub:
        self.latents = self.sample
        return self


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_an_error(value: float) -> None:
    pixels = torch.zeros(2, 3, 16, 16)
    pixels[1, 2, 3, 4] = value
    with pytest.raises(NotFiniteError, match="decoder gave NaN or infinity in float32"):
        decode(Stub(pixels), torch.zeros(2, 4, 4, 4), SPEC)
    with pytest.raises(NotFiniteError, match="encoder gave"):
        encode(Stub(torch.full((1, 4, 4, 4), value)), torch.zeros(1, 3, 16, 16), SPEC)
    with pytest.raises(NotFiniteError, match="the latent holds NaN or infinity before"):
        decode(tiny(), torch.full((1, 4, 4, 4), value), SPEC) if value != value else decode(Stub(pixels), torch.full((2, 4, 4, 4), value), SPEC)


def test_overflow_in_half_precision_is_found_in_tiles() -> None:
    module = tiny()
    module.decoder.layers[-1].weight.data.mul_(1e38)
    module.decoder.layers[-1].weight.data[:] = torch.inf
    with pytest.raises(NotFiniteError):
        decode(module, random(1, 4, 24, 24), SPEC, tile=48)


def test_a_wrong_spec_is_found() -> None:
    with pytest.raises(ModelError, match="decoder gave shape .* latent spec"):
        decode(tiny(), random(1, 4, 4, 4), LatentSpec(factor=8))
    with pytest.raises(ModelError, match="encoder gave shape"):
        encode(tiny(), random(1, 3, 16, 16), LatentSpec(channels=16, factor=4))
    for bad in ({"scale": 0.0}, {"channels": 0}, {"rgb": ((1.0, 0, 0),)}, {"rgb": ((1.0, 0),) * 4}):
        with pytest.raises(ModelError):
            LatentSpec(**bad)


@pytest.mark.parametrize(("width", "height", "says"), [(515, 512, "width is 515: expected a multiple of 16, so use 512 or 528"),
                                                       (512, 8, "height is 8.*use 16"), (0, 16, "width is 0")])
def test_shape_says_which_sizes_are_right(width: int, height: int, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        LatentSpec(multiple=16).shape(width, height)
    assert LatentSpec(multiple=16).shape(512, 768) == (4, 96, 64)


@pytest.mark.parametrize("options", [{"tile": 30}, {"tile": 0}, {"tile": 64.0}, {"tile": 64, "overlap": 64}, {"tile": 64, "overlap": 3},
                                     {"tile": 64, "overlap": -4}])
def test_bad_tiles(options: dict) -> None:
    with pytest.raises(RequestError, match=f"^{list(options)[-1]} is"):
        decode(tiny(), random(1, 4, 4, 4), SPEC, **options)


def test_bad_shapes() -> None:
    for z in (random(4, 4, 4), random(1, 3, 4, 4), random(0, 4, 4, 4)):
        with pytest.raises(RequestError, match="the latent has shape"):
            decode(tiny(), z, SPEC)
    for pixels in (random(3, 8, 8), random(1, 4, 8, 8), random(1, 3, 8, 9), random(1, 3, 0, 8)):
        with pytest.raises(RequestError, match="pixels have shape"):
            encode(tiny(), pixels, SPEC)


def test_preview_is_the_matrix() -> None:
    spec = LatentSpec(channels=2, rgb=((0.5, 0.0, -0.5), (0.0, 1.0, 0.25)), rgb_bias=(0.0, 0.1, 0.0))
    z = random(3, 2, 5, 7)
    images = preview(z, spec)
    assert [image.size for image in images] == [(7, 5)] * 3
    expected = torch.stack([0.5 * z[:, 0], z[:, 1] + 0.1, -0.5 * z[:, 0] + 0.25 * z[:, 1]], dim=1).clamp(-1, 1)
    assert (torch.cat([to_tensor(image) for image in images]) - expected).abs().max() <= 1.01 / 255
    assert preview(torch.full((1, 2, 2, 2), torch.nan), spec)[0].getpixel((0, 0)) == (0, 0, 0)
    with pytest.raises(RequestError, match="no preview matrix"):
        preview(z, LatentSpec(channels=2))
    with pytest.raises(RequestError, match="shape"):
        preview(z[:, :1], spec)
