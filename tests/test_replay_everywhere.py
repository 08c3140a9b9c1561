"""Identical bytes in a new process: of every task on the shipped model, of every sampler, and of every family of checkpoints.

All pictures are made here, and made again from their files alone by one other process, which is all that the tests look at.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import hole, picture
from tiny_folders import MAKERS, tiny

import latentgen
from latentgen.diffusion import SAMPLERS
from latentgen.models.card import cards
from latentgen.pixels.save import save_image
from latentgen.run.request import Request

EDITS = ("sd15-instruct",)  # that need a picture to look at
ALSO = ("flux2",)  # that may
TASKS: dict[str, dict[str, Any]] = {
    "txt2img": {"negative_prompt": "dog", "sampler": "euler_ancestral", "width": 64, "height": 48, "batch": 2},
    "img2img": {"image": picture(67, 45), "strength": 0.5, "sampler": "dpmpp_2m_sde"},
    "inpaint": {"image": picture(67, 45), "mask": hole(67, 45, soft=True)},
    "outpaint": {"image": picture(40, 40), "left": 24, "bottom": 4, "feather": 4}}
AGAIN = """
import json, pathlib, sys, latentgen
folder, pipes, told = pathlib.Path(sys.argv[1]), {}, {}
for name, (model, sources) in json.loads((folder / "jobs.json").read_text()).items():
    if model not in pipes:
        pipes.clear()
        pipes[model] = latentgen.load(model, dtype="float32", device="cpu", progress=False)
    done = pipes[model].replay(folder / f"{name}.png", **{key: folder / file for key, file in sources.items()})
    done.result.save(folder / f"{name}-again.png")
    told[name] = [done.identical, list(done.differences)]
(folder / "told.json").write_text(json.dumps(told))
"""


def jobs(tiny_folder: Path, folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of a picture -> model, and what is asked for."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    if "glyph" in cards():
        found |= {f"task {task}": ("glyph", {"steps": 2, **said}) for task, said in TASKS.items()}
    found |= {f"sampler {name}": (str(tiny_folder), {"sampler": name, "steps": 3}) for name in SAMPLERS}
    for kind in MAKERS:
        model = str(tiny(kind).save(folder / kind))
        small = {"steps": 2, "width": 64, "height": 64}
        found |= {f"family {kind}": (model, small | ({"reference": picture(64, 64)} if kind in EDITS else {}))}
        if kind in ALSO:
            found |= {f"family {kind} edit": (model, small | {"reference": picture(64, 64)})}
    return found


@pytest.fixture(scope="module")
def told(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all pictures, and what the other process says of each."""
    folder = tmp_path_factory.mktemp("everywhere")
    pipes: dict[str, Any] = {}
    asked = {}
    for name, (model, said) in jobs(tiny_folder, folder).items():
        if model not in pipes:
            pipes.clear()
            pipes[model] = latentgen.load(model, dtype="float32", device="cpu", progress=False)
        sources = {key: f"{name}-{key}.png" for key in ("image", "mask", "reference") if key in said}
        for key, file in sources.items():
            said[key].save(folder / file)
        result = pipes[model].stream(Request(prompt="a (red:1.2) heart, flat", seed=11, **said)).result
        for at in range(len(result)):
            one = name if len(result) == 1 else f"{name} {at + 1}"
            asked[one] = (model, sources)
            save_image(result.images[at], folder / f"{one}.png", metadata=result.metadata(at))
    (folder / "jobs.json").write_text(json.dumps(asked))
    done = subprocess.run([sys.executable, "-c", AGAIN, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "told.json").read_text())


def check(told: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, found = told
    assert found[name] == [True, []]
    assert (folder / f"{name}-again.png").read_bytes() == (folder / f"{name}.png").read_bytes()


@pytest.mark.skipif("glyph" not in cards(), reason="the model is not packaged with this checkout")
@pytest.mark.parametrize("task", ["txt2img 1", "txt2img 2", "img2img", "inpaint", "outpaint"])
def test_every_task(told, task: str) -> None:
    check(told, f"task {task}")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(told, sampler: str) -> None:
    check(told, f"sampler {sampler}")


@pytest.mark.parametrize("family", [*MAKERS, *(f"{kind} edit" for kind in ALSO)])
def test_every_family(told, family: str) -> None:
    check(told, f"family {family}")
