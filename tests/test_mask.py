"""Masks, canvases and pasting back: what is kept is kept byte for byte."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentgen.errors import ImageError, RequestError
from latentgen.pixels.mask import canvas, open_mask, paste_back


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    """A smooth picture whose every pixel and side differs."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 3], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def same(image: Image.Image, expected: object, tolerance: int = 0) -> bool:
    return image.mode == "RGB" and int(np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).max()) <= tolerance


def test_hard_soft_black_and_white_masks() -> None:
    hard = np.zeros((16, 24), np.uint8)
    hard[4:8, 4:8] = 255
    wanted = torch.from_numpy(hard / 255).float()[None, None]
    for source in (hard, hard > 0, Image.fromarray(hard), Image.fromarray(hard).convert("RGB"), Image.fromarray(hard).convert("1"), wanted,
                   Image.fromarray(hard).convert("RGBA"), encoded(Image.fromarray(hard), "PNG"), Image.fromarray(hard.astype(np.uint16) * 257)):
        mask = open_mask(source, (24, 16))
        assert mask.dtype == torch.float32 and mask.shape == (1, 1, 16, 24) and torch.equal(mask, wanted)
    soft = torch.rand(1, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(open_mask(soft, (24, 16)), soft)
    assert open_mask(Image.new("L", (3, 3), 51), (3, 3)).unique().tolist() == pytest.approx([0.2])
    assert not open_mask(Image.new("L", (3, 3)), (3, 3)).any() and bool(open_mask(np.ones((3, 3), bool), (3, 3)).all())


def test_mask_of_another_size() -> None:
    mask = Image.new("L", (512, 512))
    with pytest.raises(ImageError, match="^mask is 512x512 but the image is 768x640: resize the mask, or pass fit='resize'$"):
        open_mask(mask, (768, 640))
    hard = np.zeros((8, 8), bool)
    hard[:, 3:] = True
    assert open_mask(hard, (21, 13), fit="resize").unique().tolist() == [0, 1]
    ramp = open_mask(np.linspace(0, 1, 8)[None].repeat(8, 0), (64, 16), fit="resize")
    assert ramp.shape == (1, 1, 16, 64) and bool((ramp.diff(dim=3) >= -1e-6).all()) and len(ramp.unique()) > 8
    with pytest.raises(RequestError, match="fit is 'crop'"):
        open_mask(mask, (768, 640), fit="crop")


def test_mask_transparency() -> None:
    alpha = Image.fromarray(np.array([[255, 0, 128]], np.uint8))
    white = Image.new("RGB", (3, 1), "white")
    white.putalpha(alpha)
    assert open_mask(white, (3, 1)).flatten().tolist() == pytest.approx([1, 0, 128 / 255])
    for colour in ("black", "red"):
        paint = Image.new("RGB", (3, 1), colour)
        paint.putalpha(alpha)
        with pytest.raises(ImageError, match="^mask has dark or coloured paint"):
            open_mask(paint, (3, 1))
    clear = Image.new("RGBA", (3, 1), (255, 255, 255, 0))  # the same alpha everywhere says nothing: the colour counts
    assert bool((open_mask(clear, (3, 1)) == 1).all())


@pytest.mark.parametrize("source", [np.ones((4, 4), np.uint8), Image.new("L", (4, 4), 1), np.full((4, 4), np.nan), np.ones((4, 4), int),
                                    np.full((4, 4), 255.0), None])
def test_masks_that_say_nothing_clear(source: object) -> None:
    with pytest.raises(ImageError, match="^my mask "):
        open_mask(source, (4, 4), name="my mask")  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "sides", "multiple"), [
    ((24, 16), (8, 0, 0, 8), 8), ((23, 17), (5, 3, 0, 1), 8), ((7, 9), (0, 0, 0, 0), 8), ((24, 16), (0, 0, 0, 0), 8),
    ((13, 5), (1, 2, 3, 4), 64), ((5, 5), (1, 0, 0, 0), 1)])
def test_canvas(size: tuple[int, int], sides: tuple[int, int, int, int], multiple: int) -> None:
    image, (left, right, top, bottom) = gradient(*size), sides
    large, mask = canvas(image, left=left, right=right, top=top, bottom=bottom, multiple=multiple)
    assert large.size == mask.size and large.mode == "RGB" and mask.mode == "L"
    for side, asked in zip(large.size, (size[0] + left + right, size[1] + top + bottom)):
        assert side % multiple == 0 and asked <= side < asked + multiple
    box = (left, top, left + size[0], top + size[1])
    assert same(large.crop(box), image) and not np.asarray(mask.crop(box)).any()
    assert int((np.asarray(mask) == 255).sum()) == large.width * large.height - size[0] * size[1]
    assert large.getpixel((0, 0)) == image.getpixel((0, 0))
    assert large.getpixel((large.width - 1, large.height - 1)) == image.getpixel((size[0] - 1, size[1] - 1))


def test_canvas_feather_and_bad_sides() -> None:
    mask = np.asarray(canvas(gradient(), left=8, feather=3)[1])
    assert mask[5, 6:13].tolist() == [255, 255, 191, 128, 64, 0, 0] and not mask[:, 31].any()
    assert np.asarray(canvas(gradient(), top=8, left=8, feather=99)[1]).min() > 0
    for bad in ({"left": -1}, {"top": 1.5}, {"right": True}, {"multiple": 0}, {"feather": -2}):
        with pytest.raises(ImageError, match=f"^{next(iter(bad))} is"):
            canvas(gradient(), **bad)
    with pytest.raises(ImageError, match="^the canvas is .*over the limit"):
        canvas(gradient(), left=10**8)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_paste_back_is_exact_where_kept(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kept, made = (rng.integers(0, 256, (9, 7, 3), dtype=np.uint8) for _ in range(2))
    mask = rng.choice(np.array([0, 60, 128, 255], np.uint8), (9, 7))
    got = np.asarray(paste_back(Image.fromarray(kept), Image.fromarray(made), Image.fromarray(mask)))
    assert (got[mask == 0] == kept[mask == 0]).all() and (got[mask == 255] == made[mask == 255]).all()
    blend = kept + mask[..., None] / 255 * (made.astype(float) - kept)
    assert np.abs(got - blend).max() <= 0.501
    assert np.array_equal(got, paste_back(Image.fromarray(kept), Image.fromarray(made), open_mask(mask, (7, 9))))


def test_paste_back_refuses_other_sizes() -> None:
    with pytest.raises(ImageError, match="8x8 but the original is 24x16"):
        paste_back(gradient(), Image.new("RGB", (8, 8)), Image.new("L", (24, 16)))
    with pytest.raises(ImageError, match="mask is 8x8"):
        paste_back(gradient(), gradient(), Image.new("L", (8, 8)))
