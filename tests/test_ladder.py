"""Memory that runs out, injected in every stage: the run goes down one ladder, says so, frees what it held, and makes the picture of that placement."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import tiny

import latentgen
from latentgen.errors import OutOfMemoryError
from latentgen.models.load import load_part
from latentgen.pixels.latent import decode
from latentgen.run.memory.ladder import lower, ran_out
from latentgen.run.memory.ledger import Ledger

SAID = {"steps": 4, "width": 512, "height": 512, "seed": 3, "guidance_scale": 4.0}
ERRORS = (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), MemoryError(),
          RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes."))
GPU, PYTHON, CPU = ERRORS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("sdxl").save(tmp_path_factory.mktemp("ladder") / "sdxl")


@pytest.fixture
def pipe(folder: Path) -> Any:
    return latentgen.load(folder, device="cpu", dtype="float32", progress=False)


def failing(function: Callable[..., Any], error: Exception, *calls: int) -> Callable[..., Any]:
    """The function, except that these calls of it (counted from 1) raise."""
    count = [0]

    def called(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] in calls:
            raise type(error)(*error.args)
        return function(*args, **kwargs)

    return called


def network(predict: Callable[..., Any], error: Exception, *calls: int) -> Callable[..., Any]:
    """The same of a family's `predict`; calls of zeros, which tables are made from, do not count."""
    fails = failing(predict, error, *calls)
    return lambda modules, x, *rest: (fails if x.any() else predict)(modules, x, *rest)


def run(pipe: Any, **said: Any) -> tuple[Any, list[int]]:
    """The result, and the steps that were told."""
    made = pipe.stream("a cat", **(SAID | said))
    return made.result if not (told := [step.index for step in made]) else made.result, told


def notes(result: Any) -> list[str]:
    return [note for note in result.notes if "memory ran out" in note]


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "python", "cpu"])
def test_in_the_middle_of_sampling(pipe: Any, error: Exception) -> None:
    undisturbed = pipe.txt2img("a cat", **SAID, split_guidance=True)
    pipe.family = replace(pipe.family, predict=network(pipe.family.predict, error, 3))
    result, told = run(pipe)
    assert notes(result) == ["memory ran out while denoising: done again with guidance split"] and told == [0, 1, 2, 3]
    assert torch.equal(result.latents, undisturbed.latents) and result.image.tobytes() == undisturbed.image.tobytes()
    assert result.plan.request.split_guidance and not notes(pipe.txt2img("a cat", **SAID))


def test_while_words_are_encoded(pipe: Any) -> None:
    plain = pipe.txt2img("a cat", **SAID)
    pipe._memo.clear()
    pipe.family = replace(pipe.family, encode=failing(pipe.family.encode, PYTHON, 1, 2))
    result, told = run(pipe)
    assert [note.rpartition(" ")[2] for note in notes(result)] == ["'stage'", "'stream'"] and told == [0, 1, 2, 3]
    assert torch.equal(result.latents, plain.latents) and result.plan.residency == "stream"


def test_while_decoding(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller tiles, and the latents are not sampled again."""
    undisturbed = pipe.txt2img("a cat", **SAID, vae_tile=256)
    monkeypatch.setattr("latentgen.run.work.decode", failing(decode, GPU, 1, 2))
    seen: list[int] = []
    pipe.family = replace(pipe.family, predict=lambda *args, predict=pipe.family.predict: seen.extend([1] * bool(args[1].any())) or predict(*args))
    result, told = run(pipe)
    assert notes(result) == [f"memory ran out while decoding: done again with the autoencoder in tiles of {side} pixels" for side in (384, 256)]
    assert result.image.tobytes() == undisturbed.image.tobytes() and told == [0, 1, 2, 3]
    assert len(seen) == 4 and result.plan.tile == 256  # not a second time


def test_while_loading(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentgen.run.residency.load_part", failing(load_part, CPU, 2))
    result, told = run(pipe)
    assert notes(result) == ["memory ran out while encoding words: done again with residency 'stage'"] and told == [0, 1, 2, 3]
    assert pipe.residency.resident_bytes() == 0
    monkeypatch.undo()
    assert torch.equal(result.latents, pipe.txt2img("a cat", **SAID).latents)


def test_at_the_bottom_it_says_so_and_the_next_request_works(pipe: Any) -> None:
    """Nothing of the failed run is held."""
    own = pipe.family
    pipe.family = replace(own, predict=lambda *args: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(OutOfMemoryError, match="memory ran out while denoising 512x512 with residency 'disk' and nothing left to save: make the picture smaller"):
        run(pipe)
    gc.collect()
    assert pipe.residency.resident_bytes() == 0
    pipe.family = own
    assert not notes(pipe.txt2img("a cat", **SAID))


def test_what_was_held_is_freed_before_the_next_attempt(pipe: Any) -> None:
    pipe.txt2img("a cat", **SAID)
    live: list[int] = []
    with Ledger() as ledger:
        def predict(*args: Any, real: Any = pipe.family.predict) -> Any:
            if not args[1].any():
                return real(*args)
            live.append(ledger.live)
            if len(live) == 3:
                kept = torch.zeros(10**7)  # noqa: F841 - what a failing network holds
                raise MemoryError
            return real(*args)

        pipe.family = replace(pipe.family, predict=predict)
        run(pipe)
    assert len(live) == 3 + 8 and max(live[3:]) < 2 * max(live[:3]) + 10**6 < 4 * 10**7


def test_with_a_state_what_was_answered_is_not_asked_again(pipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where only the placement changes, the answers of the network are the same bits: the run goes on from the step that it had reached."""
    plain = pipe.txt2img("a cat", **SAID, split_guidance=True)
    at = [0]

    def predict(*args: Any, real: Any = pipe.family.predict) -> Any:
        if not args[1].any():
            return real(*args)
        at[0] += 1
        if at[0] == 6:
            raise MemoryError
        return real(*args)

    pipe.family = replace(pipe.family, predict=predict)
    result = pipe.txt2img("a cat", **SAID, split_guidance=True, save_state=tmp_path / "run.state", save_every=1)
    assert notes(result) == ["memory ran out while denoising: done again with residency 'stage'"]
    assert torch.equal(result.latents, plain.latents) and at[0] == 6 + 3  # of eight evaluations, five were answered before
    assert torch.equal(pipe.resume(tmp_path / "run.state").latents, plain.latents)


def test_other_errors_stay_what_they_are(pipe: Any) -> None:
    pipe.family = replace(pipe.family, predict=network(pipe.family.predict, RuntimeError("shapes do not match"), 3))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(pipe)
    assert not ran_out(RuntimeError("shapes")) and not ran_out(ValueError("out of memory")) and all(map(ran_out, ERRORS))


def test_the_rungs(pipe: Any) -> None:
    """From the first to the last, wherever it may be that memory ran out."""
    plan, words = replace(pipe.plan("a cat", **SAID), rows=3), []
    while (step := lower(plan, None)) is not None:
        plan = step[0]
        words.append(step[1])
    assert words == ["2 pictures in a call of the network", "1 pictures in a call of the network", "guidance split",
                     "the autoencoder in tiles of 384 pixels", "the autoencoder in tiles of 256 pixels", "residency 'stage'", "residency 'stream'",
                     "residency 'disk'"]
    assert plan.seeds == (3,) and "vae_tile=256" in repr(plan.request)
    assert lower(plan, None) is None  # for nobody allowed weights in fewer bits
    plan, words = replace(plan, ways=(None, "stored", "int8", "int4")), []
    assert lower(plan, "decoder") is None
    while (step := lower(plan, "denoiser")) is not None:
        plan = step[0]
        words.append(step[1])
    assert words == ["weights in 'stored'", "weights in 'int8'", "weights in 'int4'"] and plan.quantise == "int4"


def test_the_last_rung(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in fewer bits, where that is allowed and nothing else is left; the recipe says so, and makes the same picture again."""
    monkeypatch.setattr("latentgen.models.quantise.held.LEAST", 1)
    pipe = latentgen.load(folder, device="cpu", dtype="float32", progress=False, quantise="auto", residency="stream")
    assert pipe.plan("a cat", **SAID).quantise is None
    pipe.family = replace(pipe.family, predict=network(pipe.family.predict, PYTHON, 2, 4, 5))
    result, told = run(pipe)
    assert [note.partition("done again with ")[2] for note in notes(result)] == ["guidance split", "residency 'disk'", "weights in 'int8'"]
    assert told == [0, 1, 2, 3] and result.recipe["quantise"] == "int8"
    wished = latentgen.load(folder, device="cpu", dtype="float32", progress=False, quantise="int8").txt2img("a cat", **SAID, split_guidance=True)
    assert torch.equal(result.latents, wished.latents) and wished.latents.abs().max() > 0
    (file,) = result.save(tmp_path / "cat.png")
    again = pipe.replay(file)
    assert again.identical and not again.differences
    assert pipe.plan("a cat", **SAID).quantise is None and not notes(pipe.txt2img("a cat", **SAID))
