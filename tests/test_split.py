"""One picture by two processes over gloo: each side of guidance on its own, the picture the same as one process makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_folders import tiny

import latentgen
from latentgen.errors import RequestError
from latentgen.run.split import Split

KINDS = ("sd15", "sd15-instruct", "zimage")  # a pair in one call, three sides, and texts of different lengths, which go one by one
SAID = {"steps": 3, "seed": 1, "width": 64, "height": 64, "negative_prompt": "a blue car"}
WORKER = """
import sys, torch, torch.distributed as dist, latentgen
from PIL import Image
rank, store, folder, kinds = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4].split(",")
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
for kind in kinds:
    pipe = latentgen.load(f"{folder}/{kind}", dtype="float32", device="cpu", progress=False).split()
    calls = []
    with pipe.residency.use("denoiser") as modules:
        next(iter(modules.values())).register_forward_hook(lambda *_: calls.append(1))
    said = dict(steps=3, seed=1, width=64, height=64, negative_prompt="a blue car", guidance_scale=4.0)
    made = pipe.edit("a red heart", Image.new("RGB", (64, 64), "teal"), **said) if "instruct" in kind else pipe.txt2img("a red heart", **said)
    torch.save({"latents": made.latents, "calls": len(calls), "notes": made.notes}, f"{folder}/{kind}-{rank}.pt")
dist.destroy_process_group()
"""


def single(folder: Path, kind: str) -> torch.Tensor:
    from PIL import Image

    pipe = latentgen.load(folder / kind, dtype="float32", device="cpu", progress=False)
    if kind == "sd15-instruct":
        return pipe.edit("a red heart", Image.new("RGB", (64, 64), "teal"), guidance_scale=4.0, **SAID).latents
    return pipe.txt2img("a red heart", guidance_scale=4.0, **SAID).latents


@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_make_the_picture_of_one(tmp_path: Path) -> None:
    for kind in KINDS:
        tiny(kind).save(tmp_path / kind)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"} if sys.platform == "linux" else dict(os.environ)
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store"), str(tmp_path), ",".join(KINDS)], env=environment,
                                stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for worker in workers:
        _, said = worker.communicate(timeout=300)
        assert worker.returncode == 0, said
    for kind in KINDS:
        first, second = (torch.load(tmp_path / f"{kind}-{rank}.pt") for rank in range(2))
        assert torch.equal(first["latents"], second["latents"])
        alone = single(tmp_path, kind)
        assert (first["latents"] - alone).abs().max() <= 1e-5 * alone.abs().max()
        assert first["notes"][-1].startswith("process 1 of 2") and second["notes"][-1].startswith("process 2 of 2")
        assert (first["calls"], second["calls"]) == (3, 3)  # one call a step in each


def test_every_side_is_computed_by_one_process_and_told_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sides, two processes, played one after the other with the wire written down."""
    import torch.distributed as dist

    wire: dict[int, torch.Tensor] = {}
    sides = [torch.full((1, 2), float(side)) for side in range(3)]
    for rank in (1, 0, 1):  # the last time, all has been told
        seen: list[int] = []

        def broadcast(tensor: torch.Tensor, src: int, rank: int = rank, seen: list[int] = seen) -> None:
            side = len(seen)
            seen.append(src)
            if src == rank:
                wire[side] = tensor.clone()
            elif side in wire:
                tensor.copy_(wire[side])

        monkeypatch.setattr(dist, "broadcast", broadcast)
        asked: list[int] = []
        made = Split(rank, 2).shared(lambda own, asked=asked: [asked.append(side) or sides[side] for side in own], 3, like=sides[0])
        assert seen == [0, 1, 0] and asked == [side for side in range(3) if side % 2 == rank]
    assert all(torch.equal(a, b) for a, b in zip(made, sides, strict=True))


def test_all_processes_must_draw_the_same_noise(pipe: latentgen.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    for name, answer in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(dist, name, lambda answer=answer: answer)
    shared = pipe.split()
    with pytest.raises(RequestError, match="seed is not given"):
        shared.plan("a cat")
    assert shared.plan("a cat", seed=1).notes[-1] == "process 2 of 2, which share the sides of guidance"
    assert "no sides of guidance to share" in shared.plan("a cat", seed=1, guidance_scale=1.0).notes[-1]
    assert not any("process" in note for note in pipe.plan("a cat", seed=1).notes)


def test_without_a_group_it_is_refused(pipe: latentgen.Pipeline) -> None:
    with pytest.raises(RequestError, match="torchrun"):
        pipe.split()
    with pytest.raises(RequestError, match="expected 'cfg'"):
        pipe.split("sequence")
