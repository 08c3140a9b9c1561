"""Pictures in a terminal: kitty's graphics protocol, iTerm2's inline images, or half blocks in true colour. Knows escape sequences; no model.

kitty: sw.kovidgoyal.net/kitty/graphics-protocol; iTerm2: iterm2.com/documentation-images.html. A terminal multiplexer swallows both, so half
blocks are drawn there.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = 4096  # kitty takes base64 in pieces of at most this many letters


def protocol(stream: TextIO, environment: Mapping[str, str]) -> str | None:
    """How pictures can be shown on a stream: "kitty", "iterm", "blocks", or None. Read from the environment; the terminal is not asked."""
    if not stream.isatty():
        return None
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "TMUX" not in environment and not term.startswith(("screen", "tmux")):
        if "KITTY_WINDOW_ID" in environment or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
            return "kitty"
        if program in ("iTerm.app", "WezTerm", "mintty") or environment.get("LC_TERMINAL") == "iTerm2":
            return "iterm"
    drawable = (stream.encoding or "").lower().replace("-", "").startswith("utf")
    return "blocks" if drawable and environment.get("COLORTERM", "") in ("truecolor", "24bit") else None


def show(image: Image, *, stream: TextIO | None = None, environment: Mapping[str, str] | None = None) -> bool:
    """Draw a picture where the cursor is; False, and nothing written, where the stream cannot show one."""
    stream = sys.stdout if stream is None else stream
    kind = protocol(stream, os.environ if environment is None else environment)
    if kind is None:
        return False
    columns, lines = shutil.get_terminal_size()
    draw = {"kitty": kitty, "iterm": iterm}.get(kind)
    stream.write(draw(image) if draw else blocks(image, columns=columns, lines=lines - 2))
    stream.flush()
    return True


def kitty(image: Image) -> str:
    """The picture as PNG in kitty's chunks; q=2 asks for no answer, which nobody would read."""
    data = base64.b64encode(_png(image)).decode()
    pieces = [data[at:at + CHUNK] for at in range(0, len(data), CHUNK)]
    last = len(pieces) - 1
    return "".join(f"\x1b_G{'' if n else 'a=T,f=100,q=2,'}m={int(n < last)};{piece}\x1b\\" for n, piece in enumerate(pieces)) + "\n"


def iterm(image: Image) -> str:
    """The picture as PNG in iTerm2's OSC 1337."""
    data = _png(image)
    return f"\x1b]1337;File=inline=1;size={len(data)};preserveAspectRatio=1:{base64.b64encode(data).decode()}\x07\n"


def blocks(image: Image, *, columns: int, lines: int) -> str:
    """The picture in upper half blocks, two pixels to a letter, made small enough for `columns` x `lines` letters."""
    from PIL import Image as Pillow

    scale = min(1.0, max(1, columns) / image.width, 2 * max(1, lines) / image.height)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale / 2)) * 2
    small = image.convert("RGB").resize((width, height), Pillow.Resampling.BOX)
    data = small.tobytes()

    def colour(x: int, y: int) -> str:
        at = 3 * (y * width + x)
        return f"{data[at]};{data[at + 1]};{data[at + 2]}"

    return "".join("".join(f"\x1b[38;2;{colour(x, y)};48;2;{colour(x, y + 1)}m▀" for x in range(width)) + "\x1b[0m\n" for y in range(0, height, 2))


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
