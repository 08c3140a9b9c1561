"""Pictures: every kind of input gives the right picture or one ImageError that names its argument."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from latentgen.errors import ImageError, NotFiniteError, RequestError
from latentgen.pixels.image import fit_to, open_image, to_images, to_tensor
from latentgen.pixels.source import FORMATS, known_formats


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    """A smooth picture whose every pixel and side differs."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 3], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, mode: bytes = b"\x08\x02\0\0\0") -> bytes:
    """A PNG whose header promises that size and whose pixels are missing."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">II", width, height) + mode) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def same(image: Image.Image, expected: object, tolerance: int = 0) -> bool:
    return image.mode == "RGB" and int(np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).max()) <= tolerance


# --- colour modes

def test_alpha_is_composited_on_white() -> None:
    pixels = [(200, 0, 0, 255), (200, 0, 0, 0), (0, 0, 0, 128)]
    expected = [[(200, 0, 0), (255, 255, 255), (127, 127, 127)]]
    image = Image.new("RGBA", (3, 1))
    image.putdata(pixels)
    assert same(open_image(image), expected)
    assert same(open_image(image.convert("RGBa")), expected, 1)
    grey = Image.merge("LA", (Image.fromarray(np.array([[9, 9, 0]], np.uint8)), image.getchannel("A")))
    for form in (grey, grey.convert("La")):
        assert same(open_image(form), [[(9, 9, 9), (255, 255, 255), (127, 127, 127)]], 1)


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_palette_with_and_without_transparency(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert same(open_image(image), [[(10, 20, 30), (40, 50, 60)]])
    assert same(open_image(encoded(image, "PNG", transparency=transparency)), [[(10, 20, 30), (255, 255, 255)]])
    alpha = image.convert("PA")
    alpha.putalpha(Image.fromarray(np.array([[255, 0]], np.uint8)))
    assert same(open_image(alpha), [[(10, 20, 30), (255, 255, 255)]])


def test_colour_keys_are_transparent() -> None:
    assert same(open_image(encoded(Image.new("L", (1, 1), 7), "PNG", transparency=7)), [[(255, 255, 255)]])
    assert same(open_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3))), [[(255, 255, 255)]])
    deep = Image.fromarray(np.array([[7, 0x8080]], np.uint16))
    assert same(open_image(encoded(deep, "PNG", transparency=7)), [[(255, 255, 255), (128, 128, 128)]])


@pytest.mark.parametrize(("mode", "value", "grey"), [
    ("1", 1, 255), ("L", 77, 77), ("I;16", 65535, 255), ("I;16", 257 * 100, 100), ("I;16B", 257 * 100, 100), ("I;16L", 257 * 100, 100),
    ("I", 200, 200), ("I", 257 * 100, 100), ("F", 0.2, 51), ("F", 1.0, 255), ("F", 200.0, 200), ("F", 0.0, 0)])
def test_grey_modes_are_scaled_not_clipped(mode: str, value: float, grey: int) -> None:
    assert same(open_image(Image.new(mode, (2, 3), value)), np.full((3, 2, 3), grey))


@pytest.mark.parametrize(("mode", "value"), [("F", float("nan")), ("F", float("inf")), ("F", -3.0), ("F", 900.0), ("I", -1), ("I", 70000)])
def test_deep_values_out_of_range(mode: str, value: float) -> None:
    with pytest.raises(ImageError, match=rf"^photo has mode {mode}"):
        open_image(Image.new(mode, (2, 2), value), name="photo")


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_colour_spaces(mode: str) -> None:
    picture = gradient()
    if mode == "LAB":  # in 8 bits, LAB holds muted colours well and dark saturated ones badly
        picture = picture.point(lambda value: 100 + value // 4)
        source = ImageCms.profileToProfile(picture, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    else:
        source = picture.convert(mode)
    assert same(open_image(source), picture, 12 if mode == "HSV" else 4)


def test_cmyk_jpeg_is_not_inverted() -> None:
    assert same(open_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")), np.full((8, 8, 3), (255, 0, 0)), 3)


def test_embedded_profiles() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert same(open_image(encoded(gradient(), "PNG", icc_profile=srgb)), gradient())
    assert same(open_image(encoded(gradient(), "PNG", icc_profile=b"nonsense" * 40)), gradient())
    assert open_image(encoded(gradient(), "PNG", icc_profile=srgb)).info == {}
    wide = bytearray(srgb)  # a wide-gamut profile made by swapping two primaries: red comes out as green
    red, green = wide.find(b"rXYZ"), wide.find(b"gXYZ")
    wide[red:red + 4], wide[green:green + 4] = b"gXYZ", b"rXYZ"
    wide = wide.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    got = open_image(encoded(Image.new("RGB", (4, 4), (255, 0, 0)), "PNG", icc_profile=bytes(wide)))
    assert same(got, np.full((4, 4, 3), (0, 255, 0)), 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    turns = [None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
             Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270]  # what undoes each orientation's turn
    turn = turns[orientation - 1]
    stored = gradient() if turn is None else gradient().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif, **({"quality": 100} if kind in ("JPEG", "WEBP") else {}))
    assert open_image(data).size == (24, 16)
    assert same(open_image(data), gradient(), 0 if kind in ("PNG", "TIFF") else 12)
    assert same(open_image(open_image(data)), open_image(data))


def test_broken_exif_keeps_the_picture() -> None:
    assert same(open_image(encoded(gradient(), "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff")), gradient())


def test_the_callers_image_is_never_returned_or_changed() -> None:
    mine = gradient()
    mine.info["note"] = "mine"
    got = open_image(mine)
    got.putpixel((0, 0), (1, 1, 1))
    assert mine.getpixel((0, 0)) == (0, 0, 0) and mine.info == {"note": "mine"}


# --- files and bytes

def test_paths_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "ünï.png"
    gradient().save(path)
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        assert same(open_image(source), gradient())


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_every_format(kind: str) -> None:
    if kind != "MPO" and kind not in known_formats():
        pytest.skip("not in this Pillow")
    assert open_image(encoded(gradient(32, 32), kind)).size == (32, 32)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_cut_files_are_refused_or_whole(kind: str) -> None:
    data = encoded(gradient(), kind)
    whole = np.asarray(open_image(data))
    for end in range(0, len(data), 7):
        try:
            assert np.asarray(open_image(data[:end])).shape == whole.shape
        except ImageError as error:
            assert str(error).startswith("image (bytes) is ")
    with pytest.raises(ImageError, match="damaged or cut short|not a picture"):
        open_image(data[:len(data) // 2])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF"]), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6))
def test_spoilt_bytes_never_raise_anything_else(kind: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(encoded(gradient(), kind))
    for where, value in changes:
        data[int(where * len(data))] = value
    try:
        assert open_image(bytes(data), max_pixels=10**6).mode == "RGB"
    except ImageError:
        pass


def test_a_cut_file_opened_by_pil() -> None:
    data = encoded(gradient(64, 64), "PNG")
    with pytest.raises(ImageError, match=r"^photo \(PIL image\) is damaged"):
        open_image(Image.open(io.BytesIO(data[:len(data) // 2])), name="photo")


@pytest.mark.parametrize("source", [b"", b"just some text, not a picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
                                    "no-such-file.png", "", ".", "https://example.org/a.png", "a\0b", "x" * 5000, None, 3,
                                    [gradient()], {"image": 1}])
def test_what_is_not_a_picture(source: object) -> None:
    says = r"\(bytes\) is not a picture that can be read: expected PNG" if isinstance(source, bytes) else "is "
    with pytest.raises(ImageError, match=f"^photo {says}"):
        open_image(source, name="photo")  # type: ignore[arg-type]


def test_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("not a picture")
    with pytest.raises(ImageError, match="not a picture that can be read: expected PNG, JPEG"):
        open_image(tmp_path / "words.png")


def test_bombs_are_refused_by_their_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="image is 9000x9000, over the limit of 67108864 pixels"):
        open_image(png(9000, 9000))
    with pytest.raises(ImageError, match="over Pillow's limit"):
        open_image(png(60000, 60000))
    with pytest.raises(ImageError, match="is 100x100, over the limit of 9999 pixels: make it smaller"):
        open_image(Image.new("L", (100, 100)), max_pixels=9999)
    with pytest.raises(ImageError, match="over the limit"):
        open_image(np.zeros((100, 100, 3), np.uint8), max_pixels=9999)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_empty(size: tuple[int, int]) -> None:
    for source in (Image.new("RGB", size), np.zeros((*size, 3), np.uint8), torch.zeros(3, *size)):
        with pytest.raises(ImageError, match="no pixels"):
            open_image(source)


# --- arrays and tensors

def test_arrays_and_tensors() -> None:
    values = np.asarray(gradient())
    tensor = torch.from_numpy(values.copy()).permute(2, 0, 1)
    unit = tensor / 255
    for source in (values, values / 255, (values / 255).astype(np.float32), tensor, unit, unit[None], unit.double(), unit.requires_grad_(),
                   np.dstack([values, np.full(values.shape[:2], 255, np.uint8)])):
        assert same(open_image(source), values)
    assert same(open_image(unit.detach().bfloat16()), values, 1)
    for grey in (values[..., 0], values[..., :1], tensor[0], tensor[:1]):
        assert same(open_image(grey), np.repeat(values[..., :1], 3, axis=2))
    assert same(open_image(np.array([[True, False]])), [[(255,) * 3, (0,) * 3]])
    assert same(open_image(np.array([[[1.0, 0, 0, 0.5]]])), [[(255, 127, 127)]])


@pytest.mark.parametrize(("source", "says"), [
    (np.zeros(5), "shape"), (np.zeros((4, 4, 2)), "shape"), (np.zeros((3, 8, 8)), "channels last"), (np.zeros((1, 4, 4, 3)), "one picture"),
    (torch.zeros(8, 8, 3), "channels first"), (torch.zeros(2, 3, 8, 8), "one picture"), (torch.zeros(()), "shape"),
    (np.zeros((4, 4, 3), np.int64), "int64"), (torch.zeros(3, 4, 4, dtype=torch.int32), "int32"), (np.zeros((4, 4, 3), complex), "complex"),
    (np.array([["a"]]), "U1"), (np.zeros((2, 2), object), "object"), (np.full((4, 4, 3), np.nan), "NaN"), (torch.full((3, 4, 4), torch.inf), "NaN"),
    (np.full((4, 4, 3), 200.0), "from 200 to 200: expected 0..1"), (-torch.ones(3, 4, 4), "from -1 to -1: expected 0..1")])
def test_bad_arrays(source: object, says: str) -> None:
    with pytest.raises(ImageError, match=rf"^photo .*{says}"):
        open_image(source, name="photo")  # type: ignore[arg-type]


def test_tensors_round_trip_and_round() -> None:
    every = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    tensor = to_tensor(every)
    assert tensor.shape == (1, 3, 16, 16) and tensor.dtype == torch.float32 and tensor.min() == -1 and tensor.max() == 1
    assert same(to_images(tensor)[0], every)
    between = torch.tensor([-9.0, 9.0, -1 + 2 * 99.6 / 255]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert [image.getpixel((0, 0))[0] for image in to_images(between)] == [0, 255, 100]
    with pytest.raises(ImageError, match="shape"):
        to_images(torch.zeros(3, 4, 4))
    with pytest.raises(NotFiniteError):
        to_images(torch.full((1, 3, 2, 2), torch.nan))


# --- sizes

def test_fit_to() -> None:
    image = gradient(24, 16)
    assert fit_to(image, 24, 16, how="exact") is image
    with pytest.raises(ImageError, match="photo is 24x16 but 32x32 is needed"):
        fit_to(image, 32, 32, how="exact", name="photo")
    for how in ("resize", "crop", "pad"):
        for size in ((32, 32), (7, 50), (1, 1), (48, 33)):
            assert fit_to(image, *size, how=how).size == size
            assert fit_to(image.convert("L"), *size, how=how).mode == "L"
    padded = np.asarray(fit_to(image, 24, 20, how="pad"))
    assert (padded[2:18] == np.asarray(image)).all() and (padded[0] == padded[2]).all() and (padded[19] == padded[17]).all()
    assert np.array_equal(fit_to(image, 20, 16, how="crop"), np.asarray(image)[:, 2:22])
    with pytest.raises(RequestError, match="exact, resize, crop, pad"):
        fit_to(image, 8, 8, how="stretch")
    with pytest.raises(ImageError, match="0x8"):
        fit_to(image, 0, 8, how="resize")
