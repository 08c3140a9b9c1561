"""Pictures to files and the words kept in them. Knows PNG, JPEG and WebP; no recipe, model or request.

PNG keeps each entry as a text chunk, where other programs look for it. JPEG and WebP have one field for text, EXIF UserComment, which holds the
entries as JSON. A file appears whole or not at all.
"""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from PIL import Image, PngImagePlugin

from latentgen.errors import ImageError, OutputError, RequestError
from latentgen.pixels.source import MAX_PIXELS, check_size

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
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
        raise RequestError(f"the file name {path.name!r} ends in {path.suffix!r}: expected .png, .jpg (.jpeg) or .webp")
    if not isinstance(quality, int) or isinstance(quality, bool) or not 1 <= quality <= 100:
        raise RequestError(f"quality is {quality!r}: expected a whole number from 1 to 100")
    _write_whole(path, _encoded(image, kind, _checked(metadata or {}), quality))
    return path


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text kept in a PNG, JPEG or WebP file, as `save_image` was given it; {} if there is none.

    A comment that another program left in EXIF is found under "parameters".

    Raises:
        ImageError: the file is missing or not a picture.
    """
    try:
        with Image.open(path, formats=tuple(set(SUFFIXES.values()))) as image:
            check_size(*image.size, name=f"the picture {str(path)!r}", max_pixels=MAX_PIXELS)
            if isinstance(image, PngImagePlugin.PngImageFile):
                return {str(key): str(value) for key, value in image.text.items()}
            comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise ImageError(f"the picture {str(path)!r} cannot be read ({error}): check the path, or save it again") from error
    text = _comment_text(comment)
    if not text:
        return {}
    with suppress(ValueError):
        entries = json.loads(text)
        if isinstance(entries, dict):
            return {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()}
    return {"parameters": text}


def _checked(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise RequestError(f"metadata[{key!r}] is a {type(value).__name__}: expected text for key and value, so convert it")
        try:
            key_bytes = key.encode("latin-1")
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(f"metadata[{key!r}] cannot be written ({error.reason}): expected a Latin-1 key and valid Unicode text") from error
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
            image.save(buffer, kind, quality=quality, exif=_exif(metadata), **chroma)
    except (OSError, ValueError) as error:
        size = f"{image.width}x{image.height}, mode {image.mode}"
        raise OutputError(f"a picture ({size}, {len(metadata)} metadata entries) cannot be saved as {kind} ({error}): save it as PNG") from error
    return buffer.getvalue()


def _exif(metadata: dict[str, str]) -> bytes:
    if not metadata:
        return b""
    text = json.dumps(metadata, ensure_ascii=False)
    exif = Image.Exif()  # writes big-endian TIFF, whose Unicode text is then UTF-16 BE
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _PLAIN + text.encode("ascii") if text.isascii() else _UNICODE + text.encode("utf-16-be")
    return exif.tobytes()


def _comment_text(comment: bytes | str) -> str:
    if isinstance(comment, str):
        return comment
    marker, body = comment[:8], comment[8:]
    if marker != _UNICODE:
        return (body if marker in (_PLAIN, bytes(8)) else comment).decode("utf-8", "replace").strip("\0")
    little = body[1::2].count(0) > body[0::2].count(0)  # programs disagree on the byte order; in most text one byte of each pair is 0
    return body.decode("utf-16-le" if little else "utf-16-be", "replace").lstrip("\ufeff")


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"  # same folder, so that the rename cannot cross file systems
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        why = error.strerror or str(error)
        raise OutputError(f"{str(path)!r} cannot be written ({why}) and nothing was left behind: make room, or choose a writable folder") from error
