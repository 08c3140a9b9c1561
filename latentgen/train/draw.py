"""Icons to pixels: premultiplied RGBA at one size, in a memory-mapped file that a stopped run picks up again.

Drawn by resvg through Node (fast); the few icons that abort it, and machines without Node, fall back to the `resvg_py` package.
"""

from __future__ import annotations

import io
import json
import struct
import subprocess
import threading
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from queue import Queue

import numpy as np
from PIL import Image


def svg_of(body: dict) -> str:
    """An iconify entry as a complete square SVG; `currentColor` becomes dark grey, an oblong view box is centred in a square."""
    left, top, width, height = (body.get(k, d) for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16)))
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    inner = body["body"].replace("currentColor", "#222222")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
            f'width="{side:g}" height="{side:g}">{inner}</svg>')


def draw(bodies: Sequence[dict], out: Path, *, size: int, modules: Path, processes: int = 2,
         progress: Callable[[int], None] = lambda n: None) -> np.ndarray:
    """Draw every body into `out` (uint8, (N, size, size, 4), premultiplied RGBA) and return it memory-mapped.

    Rows already drawn by an earlier, stopped run are kept. `progress` is called with 1 for each finished row.
    """
    shape = (len(bodies), size, size, 4)
    fresh = not out.exists() or np.load(out, mmap_mode="r").shape != shape
    pixels = np.lib.format.open_memmap(out, mode="w+" if fresh else "r+", dtype=np.uint8, shape=shape)
    done_file = out.with_suffix(".done.npy")
    done = np.lib.format.open_memmap(done_file, mode="w+" if fresh or not done_file.exists() else "r+", dtype=np.uint8, shape=(len(bodies),))
    progress(int(done.sum()))

    def put(row: int, rgba: np.ndarray) -> None:
        pixels[row], done[row] = rgba, 1
        progress(1)

    todo = [r for r in range(len(bodies)) if not done[r]]
    failed: Queue[int] = Queue()
    faults: Queue[Exception] = Queue()

    def work(shard: list[int]) -> None:
        try:
            _draw_with_node(shard, bodies, size, modules, put, failed)
        except Exception as error:  # handed over to the caller's thread, or rows would stay blank in silence
            faults.put(error)

    threads = [threading.Thread(target=work, args=(todo[i::processes],), daemon=True)
               for i in range(processes)]  # daemon: Ctrl-C does not wait for them
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not faults.empty():
        raise faults.get()
    while not failed.empty():
        row = failed.get()
        put(row, _draw_with_python(svg_of(bodies[row]), size))
    pixels.flush()
    done.flush()
    return pixels


def _draw_with_node(rows: list[int], bodies: Sequence[dict], size: int, modules: Path, put: Callable[[int, np.ndarray], None],
                    failed: Queue[int]) -> None:
    svgs = []
    for row in rows:
        if "path" in bodies[row]:
            put(row, _picture_file(Path(bodies[row]["path"]), size))
        else:
            svgs.append(row)
    script = resources.files("latentgen.train") / "draw.mjs"
    at = 0
    while at < len(svgs):
        with resources.as_file(script) as path:
            try:
                node = subprocess.Popen(["node", str(path)], cwd=modules.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL)
            except FileNotFoundError:  # no Node here
                for row in svgs[at:]:
                    failed.put(row)
                return
        assert node.stdin is not None and node.stdout is not None
        feeder = threading.Thread(target=_feed, args=(node.stdin, [(r, svg_of(bodies[r])) for r in svgs[at:]], size), daemon=True)
        feeder.start()
        while len(head := node.stdout.read(8)) == 8:
            row, count = struct.unpack("<II", head)
            raw = node.stdout.read(count)
            at += 1
            if len(raw) == size * size * 4:
                put(row, np.frombuffer(raw, np.uint8).reshape(size, size, 4))
            else:
                failed.put(row)
        node.stdout.close()
        node.wait()
        feeder.join()
        if at < len(svgs):  # the process aborted on this one: leave it to the other rasteriser and go on behind it
            failed.put(svgs[at])
            at += 1


def _feed(stdin: io.BufferedWriter, items: list[tuple[int, str]], size: int) -> None:
    try:
        for row, svg in items:
            stdin.write(json.dumps({"row": row, "svg": svg, "size": size}).encode() + b"\n")
        stdin.close()
    except (BrokenPipeError, ConnectionError):
        return


def _draw_with_python(svg: str, size: int) -> np.ndarray:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
    return premultiplied(Image.open(io.BytesIO(bytes(png))))


def _picture_file(path: Path, size: int) -> np.ndarray:
    with Image.open(path) as image:
        return premultiplied(image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS))


def premultiplied(image: Image.Image) -> np.ndarray:
    """A PIL picture as (H, W, 4) uint8 with colour multiplied by alpha."""
    rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
    rgb = (rgba[..., :3] * rgba[..., 3:] + 127) // 255
    return np.concatenate([rgb, rgba[..., 3:]], axis=-1).astype(np.uint8)
