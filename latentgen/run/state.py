"""The state of an interrupted run in one file: its recipe, its source pictures, and all that its network answered. Knows recipes; no stage of a run.

To go on, the same plan is made from the recipe and run from its start, and what the network is asked is answered from the record as far as that
reaches. Everything else (noise, a sampler's history, guidance that remembers, masks) comes about again by itself, bit for bit, so no part of a run
knows how to save itself.

The file is safetensors, which holds numbers only; what else is to be known is JSON in its header. It names no path.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentgen.errors import OutputError, RequestError
from latentgen.pixels.image import open_image
from latentgen.pixels.mask import open_mask
from latentgen.pixels.save import write_whole
from latentgen.pixels.source import read_source
from latentgen.run.recipe import Recipe

if TYPE_CHECKING:
    from latentgen.diffusion.level import Level
    from latentgen.diffusion.sample import Step
    from latentgen.models.family import Conditioning, Modules
    from latentgen.run.request import Request
    from latentgen.run.result import Result

    Predict = Callable[[Modules, Tensor, Level, Conditioning], Tensor]

KEY, FORMAT = "latentgen_state", 1
LAST = ".last"  # ends the name of an answer with channels last in memory: sums over it must run in the same order again
EVERY = 5  # steps between two savings where nothing is said
SAME = {"weights": "load those weights", "dtype": "load the model with that dtype", "speed": "load the model with that speed",
        "quantise": "load the model with that", "attention": "load the model with that",
        "residency": "load the model with that", "device": "go on there", "rows": "go on there",
        "levels_sha256": "go on with the version of latentgen that began it"}  # what must be as it was, and the cure


@dataclass(frozen=True)
class State:
    """What a file of a run holds.

    Attributes:
        recipe: see `latentgen.run.recipe.make_recipe`.
        pictures: what it was made from: "image", "mask", "latents", and "reference" (a list), as a `Request` takes them.
        answers: what the network said, in order, each (rows, c, h, w) float32; `asked` has a checksum of what it was asked about.
        steps, total: steps that were done, and those of the whole run.
        every: after how many steps it is saved.
        path: the file, where it is to be saved again.
    """

    recipe: Mapping[str, Any]
    pictures: Mapping[str, Any] = field(default_factory=dict, repr=False)
    answers: tuple[Tensor, ...] = field(default=(), repr=False)
    asked: tuple[int, ...] = field(default=(), repr=False)
    steps: int = 0
    total: int = 1
    every: int = EVERY
    path: Path | None = None

    def given(self, classifier: Any) -> State:
        """The same with what leads the run, which no file holds.

        Raises:
            RequestError: it is missing, or none leads the run.
        """
        led = "classifier" in Recipe(self.recipe).needs
        if (classifier is not None) is led:
            return replace(self, pictures={**self.pictures, "classifier": classifier}) if led else self
        raise RequestError("classifier is missing: give the one that leads the run" if led else
                           "classifier is given but none leads the run: leave it out")

    def check(self, now: Mapping[str, Any]) -> tuple[str, ...]:
        """Whether a run of the recipe `now` is the one that was interrupted; notes on what may change its last bits.

        Raises:
            RequestError: it is another.
        """
        hashes = {name for name in now if name.endswith("_sha256")} - {*SAME}
        cures = SAME | {name: "give the same one" if name == "classifier_sha256" else "the file was altered" for name in hashes}
        for name, cure in cures.items():
            then = self.recipe.get(name)
            if then != now.get(name):
                raise RequestError(f"the run was begun with {name.replace('_', ' ')} {str(then)[:40]} and here it would be "
                                   f"{str(now.get(name))[:40]}: "
                                   f"{cure}, or start it anew")
        old, new = ({**versions} if isinstance(versions := recipe.get("versions"), dict) else {} for recipe in (self.recipe, now))
        return tuple(f"the run was begun with {name} {str(old.get(name))[:80]} and went on with {new[name]}: its last bits may differ"
                     for name in new if old.get(name) != new[name])


class Record:
    """What a network answers, in order: first from the record, then anew and into it. `note` is told of a question that is not the recorded one."""

    def __init__(self, answers: tuple[Tensor, ...] = (), asked: tuple[int, ...] = ()) -> None:
        self.answers, self.asked, self.note = list(answers), list(asked), lambda text: None
        self._at, self._strayed = 0, False

    def heard(self, predict: Predict) -> Predict:
        """A family's `predict` that is recorded."""

        def recorded(modules: Modules, x: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
            at, asked = self._at, zlib.crc32(x.detach().cpu().numpy().tobytes())
            if at == len(self.answers):
                self.answers.append(predict(modules, x, level, conditioning).detach().cpu())
                self.asked.append(asked)
            elif self.answers[at].shape != x.shape:
                raise RequestError(f"the state of the run does not fit: answer {at + 1} has shape {tuple(self.answers[at].shape)} and is to be "
                                   f"{tuple(x.shape)}, so start the run anew")
            elif self.asked[at] != asked and not self._strayed:
                self._strayed = True
                self.note("the run went on from a latent that is not to the last bit the one it was stopped at: so may be the picture")
            self._at += 1
            return self.answers[at].to(x.device)

        return recorded

    def again(self, same: bool) -> None:
        """The run is done again from its start: by these answers, where they are the `same` ones, else by new ones."""
        self._at = 0
        if not same:
            self.answers.clear()
            self.asked.clear()


class Keeper:
    """Keeps a run's state in a file while it runs: after every n-th step, at the end, and where it stops. `done`: steps that were made before."""

    def __init__(self, state: State, recipe: Callable[[], Mapping[str, Any]]) -> None:
        """state: as far as the run has come.  recipe: gives the recipe, asked when it is first saved (it reads weights)."""
        self._state, self._recipe = state, recipe
        self.record = Record(state.answers, state.asked)
        self.done = state.steps
        self._steps, self._saved, self._total = 0, len(state.answers), state.total

    def steps(self, run: Generator[Step, None, Result]) -> Generator[Step, None, Result]:
        """The steps of a run, without those that were done before."""
        try:
            while True:
                try:
                    step = next(run)
                except StopIteration as done:
                    return done.value
                self._steps += 1
                self._total = self._steps + step.total - step.index - 1  # more than planned where all steps are run once more
                if self._steps <= self._state.steps:
                    continue
                if self._steps % self._state.every == 0 or step.index + 1 == step.total:
                    try:
                        self.save()
                    except OutputError as error:  # a full disk is no reason to lose the run
                        self.record.note(f"the state after step {self._steps} was not saved: {error}")
                yield step
        except BaseException:
            run.close()
            with suppress(OutputError):  # what stopped the run is what is told
                self.save()
            raise

    def save(self) -> None:
        """Write the file, whole or not at all, where there is something new.

        Raises:
            OutputError: it cannot be written; an older one is untouched.
        """
        state, record = self._state, self.record
        if state.path is None or len(record.answers) == self._saved:
            return
        tensors = {f"answer.{n:06}{LAST * _is_last(answer)}": answer.contiguous() for n, answer in enumerate(record.answers)}
        for name, given in ((name, given) for name, given in state.pictures.items() if name != "classifier"):
            for n, one in enumerate(given if isinstance(given, list) else [given]):
                tensors[f"{name}.{n:06}"] = torch.from_numpy(np.array(one)) if isinstance(one, Image.Image) else one.detach().cpu().contiguous()
        data = {"format": FORMAT, "recipe": dict(self._recipe()), "steps": max(self._steps, state.steps), "total": self._total,
                "every": state.every, "asked": record.asked}
        from safetensors.torch import save

        write_whole(state.path, save(tensors, {KEY: json.dumps(data, ensure_ascii=False)}))
        self._saved = len(record.answers)


def begun(path: str | Path, request: Request, *, every: int | None, total: int) -> State:
    """The state of a run that has not begun, to be kept in `path` after every `every` steps. For what it raises see `checked_path`,
    `checked_every`."""
    return State({}, _pictures(request), total=total, every=checked_every(EVERY if every is None else every), path=checked_path(path))


def checked_every(every: int) -> int:
    """A number of steps.

    Raises:
        RequestError: it is none.
    """
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise RequestError(f"save_every is {every!r}: expected a whole number of steps, 1 or more")
    return every


def checked_path(path: str | Path) -> Path:
    """Where a state may be written: nothing is there, or the state of a run that was finished.

    Raises:
        RequestError: a file that is no state, or holds a run that was not finished, is there.
        OutputError: its folder is missing or cannot be written.
    """
    if not isinstance(path, (str, Path)) or not str(path):
        raise RequestError(f"save_state is {path!r:.60}: expected the name of a file")
    path = Path(path)
    if path.is_dir():
        raise RequestError(f"save_state is {(path.name or str(path))!r:.60}, which is a folder: name a file in it")
    if os.path.lexists(path):
        old = _header(path) if path.is_file() else None
        if old is None:
            raise RequestError(f"save_state is {path.name!r}, which is there and holds no run: choose another name")
        if old["steps"] < old["total"]:
            raise RequestError(f"save_state is {path.name!r}, which holds a run that stopped after step {old['steps']} of {old['total']}: "
                               "go on with it by resume, remove the file, or choose another name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"the folder of {path.name!r} does not exist or cannot be written: choose another for save_state")
    return path


def read_state(path: str | Path) -> State:
    """The state that a file holds.

    Raises:
        RequestError: no such file, one that holds no run, or it is damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise RequestError(f"there is no file {file.name!r} there: expected one that a run with save_state left")
    from safetensors import safe_open

    said = _header(file)
    if said is None:
        raise RequestError(f"the file {file.name!r} holds no run, or is damaged: expected one that a run with save_state left, whole")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name).clone() for name in sorted(opened.keys())}  # a copy: the file is written again
        answers = tuple(tensor.contiguous(memory_format=torch.channels_last) if name.endswith(LAST) else tensor
                        for name, tensor in tensors.items() if name.startswith("answer."))
        pictures = _given(tensors)
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise RequestError(f"the file {file.name!r} is damaged ({str(error).splitlines()[0]:.200}): start the run anew") from error
    if missing := [name for name in Recipe(said["recipe"]).needs if name not in pictures and name != "classifier"]:
        raise RequestError(f"the file {file.name!r} is damaged (the {missing[0]} is missing): start the run anew")
    if len(answers) != len(said["asked"]):
        raise RequestError(f"the file {file.name!r} is damaged ({len(answers)} of {len(said['asked'])} answers are there): start the run anew")
    return State(said["recipe"], pictures, answers, tuple(said["asked"]), said["steps"], said["total"], said["every"], file)


def _header(path: Path) -> dict[str, Any] | None:
    """What a file's header says of a run; None where it holds none, or not all that there must be."""
    from safetensors import safe_open

    kinds = {"format": int, "recipe": dict, "steps": int, "total": int, "every": int, "asked": list}
    with suppress(Exception):  # a stranger's file makes readers raise nearly anything
        with safe_open(path, framework="pt") as opened:
            said = json.loads((opened.metadata() or {})[KEY])
        whole = all(type(said[name]) is kind for name, kind in kinds.items()) and all(type(one) is int for one in said["asked"])
        if whole and said["format"] == FORMAT and said["steps"] >= 0 and said["total"] >= 1 and said["every"] >= 1:
            return said
    return None


def _pictures(request: Request) -> dict[str, Any]:
    """The pictures of a request as they were read, so that the run does not hang on their files."""
    found: dict[str, Any] = {}
    if request.image is not None:
        found["image"] = open_image(request.image)
    if request.mask is not None:
        mask = read_source(request.mask, name="mask")
        found["mask"] = open_mask(mask, mask.size if isinstance(mask, Image.Image) else (mask.shape[1], mask.shape[0]))
    if request.references:
        found["reference"] = [open_image(picture, name="reference") for picture in request.references]
    if request.latents is not None:
        found["latents"] = request.latents.detach().cpu()
    return found


def _given(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The pictures among the tensors of a file, as a request takes them."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        kind = name.partition(".")[0]
        if kind == "reference":
            found.setdefault(kind, []).append(Image.fromarray(tensor.numpy()))
        elif kind == "image":
            found[kind] = Image.fromarray(tensor.numpy())
        elif kind in ("mask", "latents"):
            found[kind] = tensor
    return found


def _is_last(answer: Tensor) -> bool:
    return answer.ndim == 4 and not answer.is_contiguous() and answer.is_contiguous(memory_format=torch.channels_last)
