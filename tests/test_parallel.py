"""One picture by two processes over gloo: the evaluations dealt out, the picture that of one process; and what each is told when they do not agree."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny
from tiny_folders import tiny

import latentgen
from latentgen.cli.together import joined
from latentgen.errors import RequestError
from latentgen.run import parallel
from latentgen.run.approximating import decided_alone
from latentgen.run.denoising import evaluated
from latentgen.run.parallel import ALONE, Parallel, Several, Team, blocks, join_group, own_device
from latentgen.run.tuned import Tuned

HERE = Path(__file__).parent
gloo = pytest.mark.skipif(not hasattr(os, "fork") or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
                          reason="torch was built without gloo, or there is no fork")
SAID = {"steps": 3, "seed": 1, "width": 64, "height": 64, "negative_prompt": "a blue car", "guidance_scale": 4.0}
# name: (model, what is said beside SAID, network calls of each process). The pair in one call, three sides, texts of different lengths, AND, a guider's empty
# prompt, a weaker network, guidance for a part of the path only, and pictures instead of sides
RUNS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "pair": ("tiny", {}, (3, 3)),
    "pictures": ("tiny", {"batch": 2}, (3, 3)),
    "three pictures": ("tiny", {"batch": 3}, (6, 6)),
    "no guidance": ("tiny", {"batch": 2, "guidance_scale": 1.0, "negative_prompt": ""}, (3, 3)),
    "one evaluation": ("tiny", {"guidance_scale": 1.0, "negative_prompt": ""}, (3, 0)),
    "and": ("tiny", {"prompt": "a red heart AND a green tree"}, (3, 3)),
    "perp_neg": ("tiny", {"guiders": ["perp_neg"]}, (3, 3)),
    "pag": ("tiny", {"guiders": ["pag"]}, (3, 3)),
    "interval": ("tiny", {"guidance_interval": (0.0, 0.5), "guidance_rescale": 0.5}, (3, 1)),
    "ancestral": ("tiny", {"sampler": "euler_ancestral", "batch": 2, "upscale": 1.5}, (4, 4)),
    "img2img": ("tiny", {"image": "teal", "strength": 0.6}, (1, 1)),
    "edit": ("sd15-instruct", {"reference": "teal"}, (3, 3)),
    "lengths": ("zimage", {}, (3, 3)),
    "flux1": ("flux1/context", {"negative_prompt": "", "height": 96}, (3, 3)),
    "flux2": ("flux2/context", {"negative_prompt": "", "batch": 2, "height": 96}, (6, 6)),
    "qwenimage": ("qwenimage/context", {"prompt": "a red heart and a green tree", "negative_prompt": "", "guidance_scale": 1.0, "height": 96}, (3, 3)),
}
EXACT = ("pictures", "no guidance", "one evaluation", "ancestral")  # the same evaluations in the same calls

WORKER = """
import os, pickle, sys
import torch, torch.distributed as dist, latentgen
from datetime import timedelta
from PIL import Image
from latentgen.run import parallel
folder, runs, said = sys.argv[1], *pickle.loads(bytes.fromhex(sys.argv[2]))
torch.set_num_threads(1)

def loaded(kind, **how):
    kind, _, way = kind.partition("/")
    how = {name: way or value for name, value in how.items()} | ({"speed": "plain"} if way else {})
    return latentgen.load(f"{folder}/{kind}", dtype="float32", device="cpu", progress=False, **how)

def asked(own):
    own = {**said, "prompt": "a red heart", **own}
    return own | {name: Image.new("RGB", (64, 64), own[name]) for name in ("image", "reference") if name in own}

alone = {kind: loaded(kind) for kind in dict.fromkeys(kind for kind, _, _ in runs.values())}
single = {name: alone[kind].stream(latentgen.Request(**asked(own))).result for name, (kind, own, _) in runs.items()}
rank = 0 if os.fork() else 1  # what is imported is imported once
torch.cuda.is_available = lambda: False  # which asks the driver, and that must not be before a fork
dist.init_process_group("cpu:gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
pipes, told = {kind: loaded(kind, parallel="cfg") for kind in alone}, {}
for name, (kind, own, _) in runs.items():
    calls = []
    with pipes[kind].residency.use("denoiser") as modules:
        hook = next(iter(modules.values())).register_forward_hook(lambda *_: calls.append(1))
        made = pipes[kind].stream(latentgen.Request(**asked(own))).result
        hook.remove()
    told[name] = dict(latents=made.latents, alone=single[name].latents, calls=len(calls), notes=made.notes, images=[i.tobytes() for i in made.images],
                      images_alone=[i.tobytes() for i in single[name].images], versions=made.recipe["versions"])

def tried(act):
    try:
        return act()
    except latentgen.LatentgenError as error:
        return f"{type(error).__name__}: {error}"

pipe, say = pipes["tiny"], {**said, "prompt": "a red heart"}
drawn = pipe.stream(latentgen.Request(**{**say, "seed": None, "variation_strength": 0.1})).result
told["drawn"] = drawn.seeds + drawn.plan.noise.variations, torch.equal(drawn.latents, pipe.txt2img("a red heart", **{**said, "seed": drawn.seeds[0],
    "variation_seed": drawn.plan.noise.variations[0], "variation_strength": 0.1}).latents)
told["odd"] = [tried(lambda: pipes["qwenimage/context"].stream(latentgen.Request(**{**say, "prompt": words, "negative_prompt": "", "guidance_scale": 1.0, "height": 96})).result)
               for words in ("a red heart and a green tree", "a red heart", "a red heart 2", "a red heart 22")]
told["plain"] = tried(lambda: latentgen.load(f"{folder}/flux1", device="cpu", dtype="float32", progress=False, parallel="context"))
told["no plan"] = tried(lambda: loaded("tiny/context", parallel="x"))
told["approximate"] = tried(lambda: pipes["flux1/context"].plan("a cat", approximate="first_block"))
told["different"] = tried(lambda: pipe.stream(latentgen.Request(**{**say, "steps": 3 + rank, "seed": rank})).result)

def stopped():
    for step in (run := pipe.stream(latentgen.Request(**say))):
        if rank == 0 and step.index == 1:
            run.close()
            return "closed"
    return "done"

told["stopped"] = tried(stopped)
first = pipe.stream(latentgen.Request(**say))
next(first)
told["second"] = tried(lambda: pipe.stream(latentgen.Request(**say)).result)
told["after"] = torch.equal(first.result.latents, told["pair"]["latents"])
told["kept"] = tried(lambda: pipe.txt2img("a red heart", save_state=f"{folder}/run.state"))
told["unknown"] = tried(lambda: loaded("tiny", parallel="sequence"))
parallel.TIMEOUT = timedelta(seconds=1)
told["absent"] = tried(lambda: pipe.stream(latentgen.Request(**say)).result) if rank == 0 else "absent"
pickle.dump(told, open(f"{folder}/told-{rank}", "wb"))
if rank == 0:
    os.wait()
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("parallel")
    make_tiny(folder / "tiny")
    for kind in ("zimage", "sd15-instruct", "flux1", "flux2", "qwenimage"):
        tiny(kind).save(folder / kind)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
    done = subprocess.run([sys.executable, "-c", WORKER, str(folder), pickle.dumps((RUNS, SAID)).hex()], env=environment, capture_output=True, text=True,
                          timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [pickle.loads((folder / f"told-{rank}").read_bytes()) for rank in range(2)]


@gloo
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_make_the_picture_of_one(told: list[dict[str, Any]], name: str) -> None:
    first, second = told[0][name], told[1][name]
    assert torch.equal(first["latents"], second["latents"]) and first["images"] == second["images"] and first["notes"] == second["notes"]
    alone = first["alone"]
    if name in EXACT:
        assert torch.equal(first["latents"], alone) and first["images"] == first["images_alone"]
    assert (first["latents"] - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert (first["calls"], second["calls"]) == RUNS[name][2]
    assert first["versions"]["parallel"] == f"by 2 processes ({'context' if 'context' in RUNS[name][0] else 'cfg'})"
    assert any("deal out to 2 processes" in note for note in first["notes"]) is (name == "one evaluation")


@gloo
def test_seeds_that_are_not_given_are_the_same_for_all(told: list[dict[str, Any]]) -> None:
    assert told[0]["drawn"] == told[1]["drawn"] and told[0]["drawn"][1]
    seed, variation = told[0]["drawn"][0]
    assert seed != variation


@gloo
def test_processes_that_do_not_agree_say_so(told: list[dict[str, Any]]) -> None:
    for one in told:
        assert one["different"].startswith("RequestError: ") and "(levels_sha256, seed, steps)" in one["different"]
        assert one["second"].startswith("RequestError: another run of this pipeline is under way")
        assert "each of which knows a part of the run only" in one["kept"] and one["unknown"].startswith("RequestError: parallel is 'sequence'")


@gloo
def test_what_processes_that_share_tokens_cannot_do_is_said(told: list[dict[str, Any]]) -> None:
    for one in told:
        assert any(isinstance(said, str) and said.startswith("RequestError: the tokens of the words or the picture cannot be parted evenly") for said in one["odd"])
        assert not all(isinstance(said, str) for said in one["odd"])  # a letter more or less
        assert "pass speed='plain'" in one["plain"] and "looks at all tokens" in one["approximate"]
        assert "nothing tells how to part the tokens of a UNet2DConditionModel" in one["no plan"]


@gloo
def test_one_that_is_stopped_does_not_leave_the_other_waiting(told: list[dict[str, Any]]) -> None:
    assert told[0]["stopped"] == "closed" and told[1]["stopped"].startswith("ParallelError: another process was stopped")
    assert told[0]["after"] and told[1]["after"]  # and the next picture is made by both
    assert told[0]["absent"].startswith("ParallelError: ") and "within 1 s" in told[0]["absent"] and told[1]["absent"] == "absent"


class Wire(Team):
    """Process `rank` of `size`, played alone: what it does not compute stays zero."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def shared(self, compute: Callable[[Sequence[int]], Sequence[torch.Tensor]], count: int, like: torch.Tensor) -> list[torch.Tensor]:
        self._told = lambda part: [part if rank == self.rank else torch.zeros_like(part) for rank in range(self.size)]  # type: ignore[method-assign]
        return Several.shared(self, compute, count, like)  # type: ignore[arg-type]


@pytest.mark.parametrize(("pictures", "sides", "size"), [(1, 2, 2), (3, 2, 2), (2, 3, 2), (1, 3, 2), (1, 1, 2), (5, 2, 4), (2, 2, 3)])
def test_each_evaluation_is_computed_once(pictures: int, sides: int, size: int) -> None:
    x, asked = torch.arange(pictures * 4.0).view(pictures, 1, 2, 2), []

    def evaluate(x: torch.Tensor, level: Any, sides: Sequence[Any], together: bool, first: int = 0) -> tuple[torch.Tensor, ...]:
        asked.extend((first + n, side) for n in range(len(x)) for side in sides)
        return tuple((x + 1) * (side + 1) for side in sides)

    whole = ALONE.dealt(evaluate)(x, None, range(sides), True)
    asked.clear()
    parts = [Wire(rank, size).dealt(evaluate)(x, None, range(sides), True) for rank in range(size)]
    assert sorted(asked) == [(n, side) for n in range(pictures) for side in range(sides)]
    assert all(torch.equal(sum(part[side] for part in parts), whole[side]) for side in range(sides))


def test_what_can_be_asked_at_once_is() -> None:
    assert blocks(range(6), 2) == [([0, 1, 2], (0, 1))]
    assert blocks(range(1, 6), 2) == [([0], (1,)), ([1, 2], (0, 1))]
    assert blocks(range(2, 4), 3) == [([0], (2,)), ([1], (0,))]


def test_sides_of_several_networks_are_asked_in_order() -> None:
    from latentgen.models.family import Conditioning

    one, other = (Conditioning(torch.full((1, 2, 3), float(n))) for n in (1, 2))
    calls: list[tuple[str, int]] = []

    def net(name: str) -> Callable[..., torch.Tensor]:
        return lambda x, level, c: (calls.append((name, len(x))), x * c.tokens.mean((1, 2)).view(-1, 1, 1, 1))[1]

    strong, weak, x = net("strong"), net("weak"), torch.ones(3, 1, 2, 2)
    x0s = evaluated(2)(x, None, [(strong, one), (strong, other), (weak, one)], True)  # type: ignore[arg-type]
    assert calls == [("strong", 4), ("strong", 2), ("weak", 2), ("weak", 1)]
    assert [x0.unique().tolist() for x0 in x0s] == [[1.0], [2.0], [1.0]] and all(x0.shape == x.shape for x0 in x0s)


def test_approximations_that_look_at_all_sides_are_refused() -> None:
    problems: list[str] = []
    assert decided_alone({"first_block": {}, "token_merging": {}}, problems.append) == {"token_merging": {}}
    assert len(problems) == 1 and problems[0].startswith("first_block is given but looks at all sides")
    assert Parallel("cfg", 2).idle(2) == [] and len(Parallel("cfg", 4).idle(2)) == 1


def test_what_a_pipeline_is_tuned_to_is_no_reason_to_refuse(tiny_folder: Path) -> None:
    """Nobody asked for it in this request: left alone with a note; asked for, it is refused."""
    pipe = latentgen.load(tiny_folder, device="cpu", dtype="float32", progress=False)
    pipe._machine = replace(pipe._machine, parallel=Parallel("context", 2), tuned=Tuned({"token_merging": {}}, 0.9, 1.2))
    plan = pipe.plan("a cat", steps=2)
    assert plan.approximate == {} and any(note.startswith("tuned, but left alone: token_merging") for note in plan.notes)
    with pytest.raises(RequestError, match="token_merging is given but looks at all tokens"):
        pipe.plan("a cat", steps=2, approximate="token_merging")


def test_without_a_group_it_is_refused(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    with pytest.raises(RequestError, match="torchrun"):
        latentgen.load(tiny_folder, device="cpu", parallel="cfg", progress=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    with pytest.raises(RequestError, match="one process only"):
        join_group("cfg", torch.device("cpu"))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(RequestError, match="device='cpu'"):
        join_group("cfg", torch.device("mps"))


def test_each_process_has_the_device_that_torchrun_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (own_device("auto"), own_device("cuda"), own_device("cuda:0"), own_device("cpu")) == ("cuda:1", "cuda:1", "cuda:0", "cpu")


def test_on_gpus_nothing_is_left_to_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """nccl's barrier makes a tensor, diffusers asks for the current device: both are to be this process's own."""
    import torch.distributed as dist

    asked: list[Any] = []
    monkeypatch.setattr(dist, "barrier", lambda group, device_ids=None: asked.append(device_ids))
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: None)
    for device in ("cuda:1", "cpu"):
        Several(1, 2, "group", torch.device(device)).leave(done=True)
    assert asked == [[1], None]
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(parallel, "Group", lambda way, device: device)
    assert join_group("cfg", torch.device("cuda:1")) == asked.pop() == torch.device("cuda:1")


TWO_GPUS = """
import os, sys, torch, torch.distributed as dist, latentgen
rank = int(os.environ["RANK"])
dist.init_process_group(rank=rank, world_size=2)
said = dict(seed=3, steps=3, width=64, height=64, negative_prompt="a dog", guidance_scale=4.0)
pipe = latentgen.load(sys.argv[1], parallel="cfg", dtype="float32", progress=False)
assert str(pipe.residency.device) == f"cuda:{rank}" and torch.cuda.current_device() == rank
made = [pipe.txt2img("a red heart", **said).latents for _ in range(2)]
alone = latentgen.load(sys.argv[1], device=f"cuda:{rank}", dtype="float32", progress=False).txt2img("a red heart", **said).latents
assert all((one - alone).abs().max() < 1e-4 * alone.abs().max() for one in made)
dist.destroy_process_group()
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_make_the_picture_of_one(tiny_folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        around = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    workers = [subprocess.Popen([sys.executable, "-c", TWO_GPUS, str(tiny_folder)], env=around | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]


def test_a_command_of_one_process_is_not_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert joined({}) is None and joined({"parallel": None}) is None and joined({"parallel": "cfg"}) == "cfg"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RequestError, match="of one: start it without"):
        joined({"model": "glyph"})


@gloo
def test_the_command_line_writes_one_file(tiny_folder: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "latentgen", "txt2img", "a red heart", "--model", str(tiny_folder), "--device", "cpu", "--steps", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # as torchrun has it
    environment |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    workers = [subprocess.Popen(command, cwd=tmp_path, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True) for rank in range(2)]
    said = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    files = list(tmp_path.iterdir())
    assert len(files) == 1 and files[0].suffix == ".png" and files[0].name in said[0][0] and said[1][0] == "" and "step" not in said[1][1]
    recipe = latentgen.read_recipe(files[0])
    assert recipe.data["versions"]["parallel"] == "by 2 processes (cfg)"
