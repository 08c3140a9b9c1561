"""Frames to one file: GIF, WebP, animated PNG and MP4, frame by frame, whole or not at all. Knows these formats; no recipe, model or request.

Every frame is packed and forgotten when it comes, so that a film of any length needs the memory of one frame.
GIF89a; the WebP container specification; PNG third edition (acTL, fcTL, fdAT); MP4 through PyAV, which is FFmpeg.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from math import inf
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from PIL import GifImagePlugin, Image, PngImagePlugin

from latentgen.errors import OutputError, RequestError
from latentgen.pixels.image import extended
from latentgen.pixels.mp4 import write_comment
from latentgen.pixels.save import checked_metadata, ending, exif_bytes, whole_file

WEBP_QUALITY = 90
CRF = "16"  # of H.264: 0 exact, 23 what its encoder takes by itself


class Writer(Protocol):
    """What every format has: a frame is added with the moment it begins and ends, in seconds."""

    def add(self, image: Image.Image, begins: Fraction, ends: Fraction) -> None: ...

    def end(self, metadata: Mapping[str, str]) -> None: ...


def check_film(path: str | Path, fps: float) -> Path:
    """The path, where a film of so many frames a second can be written under that name.

    Raises:
        RequestError: another suffix, PyAV is not there for .mp4, or fps is out of range.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITERS:
        raise RequestError(f"the file name {path.name!r} {ending(path)}: expected .gif, .webp, .png (animated) or .mp4")
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0.1 <= fps <= 100:
        raise RequestError(f"fps is {fps!r}: expected a number from 0.1 to 100 frames a second")
    if path.suffix.lower() == ".mp4":
        _av()
    return path


def write_film(path: str | Path, frames: Iterable[Image.Image], *, fps: float, loop: bool, metadata: Callable[[], Mapping[str, str]]) -> Path:
    """Write a film.

    Args:
        path: ends in .gif, .webp, .png or .mp4; its folder exists.
        frames: pictures of one size, taken one by one.
        fps: frames a second, 0.1 to 100. GIF counts in hundredths of a second, and players show none faster than 50.
        loop: begins again at its end (MP4 leaves that to the player).
        metadata: asked for after the last frame: the text to keep in the file.

    Raises:
        RequestError: see `check_film`; no frames, or of several sizes. OutputError: the file cannot be written; nothing partial is left.
    """
    path, rate, writer, size = check_film(path, fps), Fraction(fps).limit_denominator(1000), None, None
    with whole_file(path) as file:
        for n, image in enumerate(frames):
            size = size or image.size
            if image.size != size:
                raise RequestError(f"frame {n + 1} is {image.width}x{image.height} and the first is {size[0]}x{size[1]}: expected frames of one size")
            writer = writer or WRITERS[path.suffix.lower()](file, size, rate, loop)
            writer.add(image.convert("RGB"), n / rate, (n + 1) / rate)
        if writer is None:
            raise RequestError("there are no frames to write: pass at least one")
        writer.end(checked_metadata(metadata()))
    return path


class Gif:
    """A palette of its own for every frame; times in hundredths of a second, rounded so that the whole keeps its length."""

    def __init__(self, file: BinaryIO, size: tuple[int, int], rate: Fraction, loop: bool) -> None:
        self._file = file
        file.write(b"GIF89a" + struct.pack("<HHBBB", *size, 0x70, 0, 0))
        if loop:
            file.write(b"!\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")
        self._body = file.tell()

    def add(self, image: Image.Image, begins: Fraction, ends: Fraction) -> None:
        hundredths = max(2, round(ends * 100) - round(begins * 100))
        for piece in GifImagePlugin.getdata(image.quantize(256), duration=hundredths * 10, include_color_table=True, disposal=1):
            self._file.write(piece)

    def end(self, metadata: Mapping[str, str]) -> None:
        self._file.seek(self._body)  # readers look for a comment before the first frame
        body = self._file.read()
        self._file.seek(self._body)
        text = json.dumps(dict(metadata)).encode("ascii")
        self._file.write(b"!\xfe" + b"".join(bytes([len(text[at:at + 255])]) + text[at:at + 255] for at in range(0, len(text), 255)) + b"\0")
        self._file.write(body + b";")


class Webp:
    """Every frame a still picture of its own in the container's ANMF chunk."""

    def __init__(self, file: BinaryIO, size: tuple[int, int], rate: Fraction, loop: bool) -> None:
        self._file, self._size = file, _u24(size[0] - 1) + _u24(size[1] - 1)
        file.write(b"RIFF\0\0\0\0WEBP" + _riff(b"VP8X", bytes([0x0A, 0, 0, 0]) + self._size))  # flags: animation and EXIF
        file.write(_riff(b"ANIM", b"\xff\xff\xff\xff" + struct.pack("<H", 0 if loop else 1)))

    def add(self, image: Image.Image, begins: Fraction, ends: Fraction) -> None:
        still = io.BytesIO()
        image.save(still, "WEBP", quality=WEBP_QUALITY, method=4, exif=b"")
        chunk = still.getvalue()[12:]  # without the outer header: one VP8 chunk, for a picture without transparency
        milliseconds = max(1, round(ends * 1000) - round(begins * 1000))
        self._file.write(_riff(b"ANMF", bytes(6) + self._size + _u24(milliseconds) + b"\x02" + chunk))  # drawn over the frame before, not mixed

    def end(self, metadata: Mapping[str, str]) -> None:
        self._file.write(_riff(b"EXIF", exif_bytes(dict(metadata), most=inf).removeprefix(b"Exif\0\0")))
        length = self._file.tell()
        self._file.seek(4)
        self._file.write(struct.pack("<I", length - 8))


class Apng:
    """Every frame exact; a program that knows no animated PNG shows the first."""

    def __init__(self, file: BinaryIO, size: tuple[int, int], rate: Fraction, loop: bool) -> None:
        self._file, self._size, self._loop, self._frames, self._number = file, size, loop, 0, 0
        file.write(b"\x89PNG\r\n\x1a\n" + _png(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)))
        self._head = file.tell()
        file.write(_png(b"acTL", bytes(8)))

    def add(self, image: Image.Image, begins: Fraction, ends: Fraction) -> None:
        still = io.BytesIO()
        image.save(still, "PNG")
        data, at, packed = still.getvalue(), 8, []
        while at < len(data):
            length, kind = struct.unpack_from(">I4s", data, at)
            packed += [data[at + 8:at + 8 + length]] if kind == b"IDAT" else []
            at += length + 12
        lasts = (ends - begins).limit_denominator(65535)
        self._file.write(_png(b"fcTL", struct.pack(">IIIIIHHBB", self._next(), *self._size, 0, 0, lasts.numerator, lasts.denominator, 0, 0)))
        for piece in packed:
            self._file.write(_png(b"IDAT", piece) if not self._frames else _png(b"fdAT", struct.pack(">I", self._next()) + piece))
        self._frames += 1

    def end(self, metadata: Mapping[str, str]) -> None:
        text = PngImagePlugin.PngInfo()
        for key, value in metadata.items():
            text.add_text(key, value)
        for kind, data, *_ in text.chunks:
            self._file.write(_png(kind, data))
        self._file.write(_png(b"IEND", b""))
        self._file.seek(self._head)
        self._file.write(_png(b"acTL", struct.pack(">II", self._frames, 0 if self._loop else 1)))

    def _next(self) -> int:
        self._number += 1
        return self._number - 1


class Mp4:
    """H.264 in 4:2:0, which every player knows; odd sizes are filled up by their edge. Kept text: the entries as one JSON comment."""

    def __init__(self, file: BinaryIO, size: tuple[int, int], rate: Fraction, loop: bool) -> None:
        self._file, self._av, self._odd = file, _av(), (size[0] % 2, size[1] % 2)
        self._container = self._av.open(file, "w", format="mp4")
        self._container.metadata["comment"] = "{}"  # which holds its place: it is known when the last frame is
        codec = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
        self._stream = self._container.add_stream(codec, rate=rate, options={"crf": CRF} if codec == "libx264" else {"qscale": "2"})
        self._stream.width, self._stream.height, self._stream.pix_fmt = size[0] + self._odd[0], size[1] + self._odd[1], "yuv420p"

    def add(self, image: Image.Image, begins: Fraction, ends: Fraction) -> None:
        frame = extended(image, left=0, right=self._odd[0], top=0, bottom=self._odd[1]) if any(self._odd) else image
        self._mux(self._av.VideoFrame.from_image(frame))

    def end(self, metadata: Mapping[str, str]) -> None:
        self._mux(None)
        self._container.close()
        write_comment(self._file, json.dumps(dict(metadata)))

    def _mux(self, frame: Any) -> None:
        try:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        except self._av.FFmpegError as error:
            raise OutputError(f"the film cannot be packed as MP4 ({error}): write a .gif, .webp or .png") from error


WRITERS: Mapping[str, Callable[..., Writer]] = {".gif": Gif, ".webp": Webp, ".png": Apng, ".mp4": Mp4}


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise RequestError("an .mp4 is asked for and the package av is not installed: pip install 'latentgen[video]', "
                           "or write a .gif, .webp or .png") from None
    return av


def _png(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _riff(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _u24(number: int) -> bytes:
    return struct.pack("<I", number)[:3]
