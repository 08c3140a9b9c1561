"""Pictures to files and the words kept in them. Knows PNG, JPEG, WebP and EXIF, and reads films' words; no recipe, model or request.

PNG keeps each entry as a text chunk, where other programs look for it. JPEG and WebP have EXIF: the entry "parameters" is its UserComment, as
A1111 writes it and others read it; the other entries are its ImageDescription, as JSON. A file appears whole or not at all.

What is read back is untrusted: no more than MAX_TEXT letters of an entry, and Pillow's own limits on what a packed chunk may grow to.
"""

from __future__ import annotations

import io
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from PIL import Image, PngImagePlugin

from latentgen.errors import ImageError, OutputError, RequestError
from latentgen.pixels.mp4 import is_mp4, read_comment
from latentgen.pixels.source import MAX_PIXELS, check_size

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
KINDS = ("PNG", "JPEG", "WEBP", "GIF")  # of pictures that are read; films may be GIFs
PARAMETERS = "parameters"  # the entry that other programs read
MAX_TEXT = 2**20  # letters of one entry, written or read
_EXIF_IFD, _USER_COMMENT, _DESCRIPTION = 0x8769, 0x9286, 0x010E
_TEXT_TAGS = (_DESCRIPTION, 0x010F, 0x0110)  # description, maker and model: where ComfyUI's savers put "workflow:{...}" and "prompt:{...}"
_JPEG_EXIF = 65533 - len(b"Exif\0\0")  # bytes: one segment, whose length is counted in 16 bits and counts itself
_PLAIN, _UNICODE = b"ASCII\0\0\0", b"UNICODE\0"  # EXIF 2.32, table 9: the first 8 bytes of UserComment say how the rest is written


def save_image(image: Image.Image, path: str | Path, *, metadata: Mapping[str, str] | None = None, quality: int = 95) -> Path:
    """Write a picture, whole or not at all: an older file of that name stays until the new one is complete on the disk.

    Args:
        image: PIL image (JPEG takes no transparency).
        path: ends in .png, .jpg, .jpeg or .webp; its folder exists.
        metadata: text to keep in the file; keys of 1 to 79 Latin-1 letters (what PNG allows), values any text.
        quality: 1..100 for JPEG and WebP. PNG is always exact.

    Returns:
        The path written.

    Raises:
        RequestError: an unknown suffix, bad metadata or a bad quality; nothing was written.
        OutputError: the file cannot be encoded or written; nothing partial is left and an older file is untouched.
    """
    path = Path(path)
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise RequestError(f"the file name {path.name!r} {ending(path)}: expected .png, .jpg (.jpeg) or .webp")
    if not isinstance(quality, int) or isinstance(quality, bool) or not 1 <= quality <= 100:
        raise RequestError(f"quality is {quality!r}: expected a whole number from 1 to 100")
    write_whole(path, _encoded(image, kind, checked_metadata(metadata or {}), quality))
    return path


def ending(path: Path) -> str:
    """What is said of a file name whose ending is none that was expected."""
    return f"ends in {path.suffix!r}" if path.suffix else "has no ending"


def read_metadata(source: Image.Image | str | Path | bytes) -> dict[str, str]:
    """The text kept in a PNG, JPEG, WebP, GIF or MP4, as `save_image` was given it; {} if there is none.

    A comment that another program left in EXIF is found under "parameters". Entries of more than MAX_TEXT letters are left out.

    Args:
        source: a path, encoded bytes, or an image that was opened from a file (a copy of one may have lost its text).

    Raises:
        ImageError: the file is missing, not a picture, or its text is damaged or packed too tightly.
    """
    named = "the image" if isinstance(source, Image.Image) else "the picture" + ("" if isinstance(source, bytes) else f" {str(source)!r}")
    try:
        if isinstance(source, Image.Image):
            found = _entries(source)
        else:
            with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
                found = _object(read_comment(file, most=4 * MAX_TEXT)) if is_mp4(file) else _opened(file, named)
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        why = getattr(error, "strerror", None) or error
        raise ImageError(f"{named} cannot be read ({why}): check the path, or save it again") from error
    return {key: value for key, value in found.items() if len(value) <= MAX_TEXT}


def _opened(file: BinaryIO, named: str) -> dict[str, str]:
    with Image.open(file, formats=KINDS) as image:
        check_size(*image.size, name=named, max_pixels=MAX_PIXELS)
        return _entries(image)


def _entries(image: Image.Image) -> dict[str, str]:
    if isinstance(image, PngImagePlugin.PngImageFile):
        return {str(key): str(value) for key, value in image.text.items()}
    found = {str(key): value for key, value in image.info.items() if isinstance(value, str)}  # of a PNG's copy
    comment = image.info.get("comment")  # of a GIF, or a JPEG
    found |= _object(comment.decode("ascii", "replace")) if isinstance(comment, bytes) else {}
    exif = image.getexif()
    for tag in _TEXT_TAGS:
        found |= _described(exif.get(tag))
    text = _comment_text(exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT, b""))
    return found | (_object(text) or {PARAMETERS: text} if text else {})


def _described(text: object) -> dict[str, str]:
    """Entries of one of EXIF's own texts: ours, all in one JSON object, or ComfyUI's, whose JSON follows its name and a colon."""
    if not isinstance(text, str):
        return {}
    name, _, rest = text.partition(":")
    name = name.strip().lower()
    return {name: rest.strip()} if name in ("prompt", "workflow") else _object(text)


def _object(text: str) -> dict[str, str]:
    """The entries of a JSON object of texts, {} for anything else."""
    with suppress(ValueError, RecursionError):
        entries = json.loads(text) if len(text) <= 4 * MAX_TEXT else None
        if isinstance(entries, dict) and all(isinstance(value, str) for value in entries.values()):
            return entries
    return {}


def checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata that every kind of file can keep, or RequestError."""
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise RequestError(f"metadata[{key!r}] is a {type(value).__name__}: expected text for key and value, so convert it")
        try:
            key_bytes = key.encode("latin-1")
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(f"metadata[{key!r}] cannot be written ({error.reason}): expected a Latin-1 key and valid Unicode text") from error
        if len(value) > MAX_TEXT:
            raise RequestError(f"metadata[{key!r}] has {len(value):,} letters: at most {MAX_TEXT:,} are read back, so shorten it")
        if not 1 <= len(key_bytes) <= 79 or not key.isprintable():
            raise RequestError(f"metadata has the key {key!r}: expected 1 to 79 printable letters")
    return dict(metadata)


def _encoded(image: Image.Image, kind: str, metadata: dict[str, str], quality: int) -> bytes:
    buffer = io.BytesIO()
    try:
        if kind == "PNG":
            text = PngImagePlugin.PngInfo()
            for key, value in metadata.items():
                text.add_text(key, value)
            image.save(buffer, "PNG", pnginfo=text)
        else:
            chroma = {"subsampling": 0 if quality >= 90 else 2} if kind == "JPEG" else {"method": 4}
            image.save(buffer, kind, quality=quality, exif=exif_bytes(metadata, most=_JPEG_EXIF if kind == "JPEG" else math.inf), **chroma)
    except (OSError, ValueError) as error:
        size = f"{image.width}x{image.height}, mode {image.mode}"
        raise OutputError(f"a picture ({size}, {len(metadata)} metadata entries) cannot be saved as {kind} ({error}): save it as PNG") from error
    return buffer.getvalue()


def exif_bytes(metadata: dict[str, str], *, most: float) -> bytes:
    """The entries as EXIF; "parameters", which repeats for others what the rest says, only where both fit into `most` bytes."""
    if not metadata:
        return b""
    exif = Image.Exif()  # writes big-endian TIFF, whose Unicode text is then UTF-16 BE
    others = {key: value for key, value in metadata.items() if key != PARAMETERS}
    if others:
        exif[_DESCRIPTION] = json.dumps(others)  # ASCII alone, as that field demands
    if PARAMETERS in metadata:
        exif[_EXIF_IFD] = {_USER_COMMENT: _UNICODE + metadata[PARAMETERS].encode("utf-16-be")}
    written = exif.tobytes()
    return exif_bytes(others, most=most) if len(written) > most and others and PARAMETERS in metadata else written


def _comment_text(comment: bytes | str) -> str:
    if isinstance(comment, str):
        return comment
    marker, body = comment[:8], comment[8:8 + 4 * MAX_TEXT]
    if marker != _UNICODE:
        return (body if marker in (_PLAIN, bytes(8)) else comment).decode("utf-8", "replace").strip("\0")
    little = body[1::2].count(0) > body[0::2].count(0)  # programs disagree on the byte order; in most text one byte of each pair is 0
    return body.decode("utf-16-le" if little else "utf-16-be", "replace").lstrip("\ufeff")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: see `whole_file`."""
    with whole_file(path) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write (and read and seek) that appears under its name once the block ends well; else nothing partial is left and an older file stays.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"  # same folder, so that the rename cannot cross file systems
    try:
        with temporary.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError) or isinstance(error, OutputError):
            raise
        why = error.strerror or str(error)
        raise OutputError(f"{str(path)!r} cannot be written ({why}) and nothing was left behind: make room, or choose a writable folder") from error
