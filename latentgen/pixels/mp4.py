"""The comment of an MP4: read, and written anew. Knows boxes (ISO/IEC 14496-12, and the metadata list within "udta"); no frames and no codec.

What is read is untrusted: boxes are looked through in place, so many of them at most, and no more than a comment's length is ever held.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

PATH = (b"moov", b"udta", b"meta", b"ilst", b"\xa9cmt", b"data")
MOST_BOXES = 1000  # beside each other
HEAD = 8  # bytes: length and kind of a box; and of "data" as many again that say what kind of text follows


def is_mp4(file: BinaryIO) -> bool:
    """Whether a file begins as an MP4 does."""
    file.seek(0)
    return file.read(8)[4:] == b"ftyp"


def read_comment(file: BinaryIO, *, most: int) -> str:
    """The comment, "" where there is none, or one of more than `most` bytes."""
    boxes = _boxes(file)
    if not boxes:
        return ""
    begin, end = boxes[-1]
    if not 0 <= end - begin - 2 * HEAD <= most:
        return ""
    file.seek(begin + 2 * HEAD)
    return file.read(end - begin - 2 * HEAD).decode("utf-8", "replace")


def write_comment(file: BinaryIO, text: str) -> None:
    """Put a comment in the place of the one that is there. What describes the film must lie behind its frames, whose places do not change then.

    Raises:
        ValueError: there is no comment.
    """
    boxes, new = _boxes(file), text.encode("utf-8")
    if not boxes:
        raise ValueError("the film has no comment")
    begin, end = boxes[-1]
    file.seek(end)
    rest = file.read()
    file.seek(begin + 2 * HEAD)
    file.write(new + rest)
    file.truncate()
    more = len(new) - (end - begin - 2 * HEAD)
    for begin, end in boxes:
        file.seek(begin)
        file.write(struct.pack(">I", end - begin + more))


def _boxes(file: BinaryIO) -> list[tuple[int, int]]:
    """Where each box on the way to the comment begins and ends; [] where one of them is missing."""
    begin, end, found = 0, file.seek(0, os.SEEK_END), []
    for kind in PATH:
        for _ in range(MOST_BOXES):
            file.seek(begin)
            head = file.read(2 * HEAD)
            if begin + HEAD > end or len(head) < HEAD:
                return []
            length, name = struct.unpack_from(">I4s", head)
            if length == 1 and len(head) == 2 * HEAD:  # too long to be counted in 32 bits
                length = struct.unpack_from(">Q", head, HEAD)[0]
            length = length or end - begin  # 0: all that is left
            if length < HEAD or begin + length > end:
                return []
            if name == kind:
                break
            begin += length
        else:
            return []
        found.append((begin, begin + length))
        begin, end = begin + HEAD + 4 * (kind == b"meta"), begin + length
    return found
