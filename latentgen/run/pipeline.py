"""The pipeline object: what a person calls. Knows requests, plans and runs; the stages of a run are in `work`, and nothing here knows a family.

All state of a call lives in the call, so one pipeline may serve many threads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from latentgen.conditioning.explain import Explanation
from latentgen.diffusion.sample import Step
from latentgen.errors import RequestError
from latentgen.models.checkpoint import Checkpoint, open_checkpoint
from latentgen.models.context import check_context
from latentgen.models.fast.graphs import GRAPHS
from latentgen.models.load import empty_module
from latentgen.pixels.latent import preview
from latentgen.run.attention import attention_of
from latentgen.run.meaning import explained, planned
from latentgen.run.memo import Memo
from latentgen.run.memory.budget import eased, fitted, memory_bytes
from latentgen.run.memory.forecast import forecast
from latentgen.run.memory.ladder import enduring
from latentgen.run.memory.speed import speeds
from latentgen.run.parallel import Group, join_group, own_device
from latentgen.run.plan import Machine, Plan
from latentgen.run.progress import Bar, download_bar
from latentgen.run.request import Request
from latentgen.run.residency import COMPILED, POLICIES, SPEEDS, STREAMING, Residency, check_graphs, choose_device, choose_dtype, ways_of
from latentgen.run.result import Result
from latentgen.run.resume import kept, resumed
from latentgen.run.state import Keeper, State, read_state
from latentgen.run.work import Work

if TYPE_CHECKING:
    from torch import nn

    from latentgen.run.many.grid import Axis, Grid
    from latentgen.run.many.interpolate import Film
    from latentgen.run.replay import Replayed

OnStep = Callable[[Step], None]


def load(source: str | Path | None = "glyph", *, device: str = "auto", dtype: str = "auto", residency: str = "resident", speed: str = "exact",
         compile: bool = False, progress: bool | None = None, card: str | None = None, config: str | Path | None = None, allow_pickle: bool = False,
         quantise: str | None = None, attention: str | Mapping[str, str] | None = None, tuned: bool = False, memory: str | int | None = None,
         parallel: str | None = None, **parts: str | Path) -> Pipeline:
    """Open a model. Reads its card, configs and headers; weights load when a stage first needs them.

    Args:
        source: a card's name (`latentgen models` lists them), a folder in diffusers layout, a .safetensors file (a whole checkpoint or a denoiser
            alone), a .gguf file, or a hub name ("org/name", fetched once and then kept to one commit); None where denoiser= is given.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        dtype: "auto", "float32", "bfloat16", "float16" of the networks; latents are always float32.
        residency: "resident" keeps every part loaded, "stage" only the part that runs, "stream" and "disk" only the block that runs, from main
            memory or from the file (docs/memory.md).
        speed: "exact" (networks made faster on this machine, the same picture up to rounding; see docs/speed.md) "plain" (as diffusers has
            them) or, on a CUDA device, "graphs" (plain, each kind of call captured once in a run and replayed as a CUDA graph).
        compile: compile the blocks of the networks with torch.compile instead: a minute or more for the first picture, faster after it.
        progress: a bar on stderr; None shows one in a terminal or notebook only.
        card: a card whose defaults and configs hold where a file does not tell, as card="sdxl-turbo".
        config: configs for a file: a published variant's name, or a folder in diffusers layout.
        allow_pickle: read .ckpt, .bin and .pt files, too, their tensors alone; without it they are refused.
        quantise: "int8", "fp8" or "int4" holds the weights of text encoders and denoiser in so many bits: less memory, a little slower, another
            picture of the same kind (docs/approximate.md); "int8_dynamic" computes in 8 bits, too. "stored" leaves packed what a GGUF or fp8 file
            has packed: the picture is the same.
            "auto" holds them so, or in 8 or 4 bits, only where memory= asks for it or memory runs out.
        attention: on a CUDA device, the kernel that computes it: "flash", "cudnn", "efficient" or "math", "measured" for the fastest of each kind of
            shapes (measured once, then kept), or a table as recipes hold it; None leaves the choice to PyTorch.
        tuned: take the approximations that `latentgen tune` found here for this model, wherever a request says none; plans and results say so.
        memory: "8GB", a number of bytes, or "auto" for what is free: every plan is made to fit it, see `Pipeline.plan`.
        parallel: "cfg" or "context" where several processes, each of which loads the model so, make every picture together: they share the
            evaluations of a step, or the tokens of each (docs/parallel.md).
        parts: files or folders of single parts and tokenizers, as vae=, text_encoder=, text_encoder_2=, tokenizer_2=, or denoiser=.

    Raises:
        ModelError: no such model, or a file of it is missing, damaged or of another kind. RequestError: a bad device, dtype, residency or speed,
            tuned without a finding, or parallel outside a group of processes. ParallelError: the other processes did not come.
    """
    if speed not in SPEEDS:
        raise RequestError(f"speed is {speed!r}: expected one of {', '.join(map(repr, SPEEDS))}")
    if residency not in POLICIES:
        raise RequestError(f"residency is {residency!r}: expected one of {', '.join(map(repr, POLICIES))}")
    place = choose_device(own_device(device) if parallel is not None else device)
    if speed == GRAPHS:
        check_graphs(place, residency, alone=parallel is None and not compile)
    chosen = choose_dtype(dtype, place)
    with download_bar(progress) as report:
        checkpoint = open_checkpoint(source, card=card, config=config, parts=parts, allow_pickle=allow_pickle, report=report)
    table = attention_of(attention, place, chosen, alone=not compile and parallel != "context")
    group = None if parallel is None else join_group(parallel, place)
    made = Pipeline(checkpoint, device=place, dtype=chosen, residency=residency, speed=COMPILED if compile else speed,
                    quantise=quantise, attention=table, progress=progress, memory=memory, group=group)
    if parallel == "context":
        if made._machine.speed != "plain" or residency in STREAMING:
            raise RequestError("parallel is 'context', which parts networks as they are: pass speed='plain' and residency='resident' or 'stage'")
        check_context(made._outline, group.parallel.processes)
    return made.tuned() if tuned else made


class Pipeline:
    """A model ready to make pictures: `txt2img`, `img2img`, `inpaint`, `outpaint`, `edit`, or `plan` and `stream` with a `Request`."""

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, residency: str = "resident", speed: str = "exact",
                 quantise: str | None = None, attention: Mapping[str, str] | None = None, progress: bool | None = None,
                 memory: str | int | None = None, group: Group | None = None) -> None:
        self.checkpoint = checkpoint
        self.card = checkpoint.card
        self.family = checkpoint.family
        ways = ways_of(checkpoint, quantise)
        self.residency = Residency(checkpoint, device=device, dtype=dtype, policy=residency, speed=speed, quantise=ways[0], attention=attention)
        self.progress, self.memory = progress, memory
        if memory is not None:
            memory_bytes(memory, device)
        self._memo, self._group = Memo(), group
        weights = {stage: checkpoint.weight_bytes(stage, dtype=dtype) for stage in ("text", "denoiser", "decoder")}
        self._machine = Machine(checkpoint.name, str(device), str(dtype).removeprefix("torch."), residency, speed, weights, checkpoint.notes,
                                self._layers, ways=ways, attention=attention or {},
                                parallel=None if group is None else group.parallel)

    def _layers(self, guider: str, said: Any) -> tuple[list[str], str]:
        """See `latentgen.models.weaken.chosen` and `broad`."""
        from latentgen.models.weaken import broad, chosen

        names = chosen(self._outline, guider=guider, said=said)
        return names, broad(self._outline, guider=guider, layers=names)

    @cached_property
    def _outline(self) -> nn.Module:
        """The denoiser as its config describes it, without numbers."""
        part = next(part for part in self.family.parts if part.stages == ("denoiser",))
        return empty_module(self.checkpoint.sources[part.name], part, shapes_only=True)

    def __repr__(self) -> str:
        m = self._machine
        return f"<Pipeline {m.model}: {m.dtype} on {m.device}, {m.residency}, {sum(m.weights.values()) / 1e6:.0f} MB of weights>"

    def tuned(self) -> Pipeline:
        """This pipeline with the approximations that `latentgen tune` found for it on this machine, wherever a request says none.

        Raises:
            RequestError: nothing was found yet.
        """
        from latentgen.run.tuned import read_tuned, tuned_key

        machine = self._machine
        other = copy(self)  # weights and memory are shared
        other._machine = replace(machine, tuned=read_tuned(tuned_key(self.checkpoint.digest, machine.device, machine.dtype), machine.model))
        return other

    def txt2img(self, prompt: str, *, on_step: OnStep | None = None, **options: Any) -> Result:
        """Words to pictures.

        Args:
            prompt: what to draw; any length.
            on_step: called after each step; raise in it to stop (nothing is left behind).
            options: the fields of `Request` (negative_prompt, width, height, steps, guidance_scale, sampler, seed, batch ...), and, of every
                picture call, save_state= and save_every=: see `stream`.

        Raises:
            RequestError: input that cannot be honoured, before any weights load.
        """
        return self._run("txt2img", on_step, prompt=prompt, **options)

    def img2img(self, prompt: str, image: Any, *, on_step: OnStep | None = None, **options: Any) -> Result:
        """A picture redrawn towards the words; `strength` (0 to 1) is the share of the steps that run."""
        return self._run("img2img", on_step, prompt=prompt, image=image, **options)

    def inpaint(self, prompt: str, image: Any, mask: Any, *, on_step: OnStep | None = None, **options: Any) -> Result:
        """The white part of the mask repainted; every other pixel comes back byte for byte."""
        return self._run("inpaint", on_step, prompt=prompt, image=image, mask=mask, **options)

    def outpaint(self, prompt: str, image: Any, *, on_step: OnStep | None = None, **options: Any) -> Result:
        """The picture continued by `left`, `right`, `top`, `bottom` pixels; the old pixels come back byte for byte."""
        return self._run("outpaint", on_step, prompt=prompt, image=image, **options)

    def edit(self, prompt: str, reference: Any, *, on_step: OnStep | None = None, **options: Any) -> Result:
        """A picture changed as the words instruct, by a model made for it; `reference` is a picture, or several where it looks at several."""
        return self._run("edit", on_step, prompt=prompt, reference=reference, **options)

    def grid(self, prompt: Request | str = "", *, x: Axis, y: Axis | None = None, cell: int | None = None, on_step: OnStep | None = None,
             **options: Any) -> Grid:
        """One request in many versions on a labelled sheet, as x={"guidance_scale": [1, 4, 8]}. See `latentgen.run.many.grid.make_grid`."""
        from latentgen.run.many.grid import make_grid

        return make_grid(self, _as_request(prompt, options), x=x, y=y, cell=cell, on_step=on_step)

    def interpolate(self, keys: Sequence[Request | str], *, frames: int = 24, loop: bool = False, folder: str | Path | None = None,
                    on_step: OnStep | None = None, **options: Any) -> Film:
        """A film from one request to the next, as interpolate(["a cat", "a dog"]).save("x.gif"). See `latentgen.run.many.interpolate.plan_film`."""
        from latentgen.run.many.interpolate import plan_film

        return plan_film(self, keys, frames=frames, loop=loop, folder=folder, on_step=on_step, **options)

    def variations(self, made: Any, /, *, count: int = 4, amount: float = 0.2, on_step: OnStep | None = None, save_state: str | Path | None = None,
                   save_every: int | None = None, **options: Any) -> Result:
        """Pictures near to one, from the recipe in its file, or redrawn where it has none. See `latentgen.run.many.variations.plan_variations`."""
        from latentgen.run.many.variations import plan_variations

        plan = plan_variations(self, made, count=count, amount=amount, **options)
        return self._finished(self.stream(plan, save_state=save_state, save_every=save_every), on_step)

    def replay(self, made: Any, /, *, anyway: bool = False, **pictures: Any) -> Replayed:
        """A picture made again from the recipe in its file: identical, or what differs. See `latentgen.run.replay.replay`."""
        from latentgen.run.replay import replay

        return replay(self, made, anyway=anyway, **pictures)

    def resume(self, state: State | str | Path, *, on_step: OnStep | None = None, save_every: int | None = None, classifier: Any = None) -> Result:
        """An interrupted run made to its end, with the very bytes that it would have had. The file is written on, and holds the whole run in the end.

        Args:
            state: the file that `save_state=` named, or what `latentgen.read_state` read from it.
            on_step: called after each step that was not yet made.
            save_every: steps; None as it was.
            classifier: that which leads the run, where one does; no file holds it.

        Raises:
            RequestError: the file is damaged or not the state of a run of this pipeline.
        """
        found = state if isinstance(state, State) else read_state(state)
        return self._finished(self.stream(found, save_every=save_every, classifier=classifier), on_step)

    def plan(self, request: Request | str | None = None, *, memory: str | int | None = None, **options: Any) -> Plan:
        """Everything that would be done, decided without touching weights. Takes a `Request`, or a prompt with options.

        Args:
            memory: "8GB", a number of bytes, or "auto" for what is free on the device: the fastest placement, batching and tiles that fit, with what
                each stage will need and how long it will take. None takes that of `load`, most times none: then what does not fit
                is on a GPU made to, and where that cannot be, or on a CPU, noted.

        Raises:
            RequestError, ImageError: input that cannot be honoured, or too little memory.
        """
        memory = self.memory if memory is None else memory
        said = _as_request(request, options)
        if memory is None:
            return eased(self._unlimited(said), self.residency, timed=self._timed)
        held = self.residency.resident_bytes(self.residency.device) if memory == "auto" else 0
        return fitted(self._unlimited(said), self._timed(), memory_bytes(memory, self.residency.device) + held)

    def _timed(self) -> Callable[[Plan], Any]:
        """What predicts the need of a plan and its time, at this machine's speeds."""
        return partial(forecast, self.checkpoint, self.family, speeds=speeds(self.residency.device, self.residency.dtype))

    def _unlimited(self, request: Request) -> Plan:
        request = request if self._group is None else self._group.seeded(request)
        made = planned(request, self.family, self.checkpoint.tokenizers, self._machine)
        return replace(made, foresee=partial(forecast, self.checkpoint, self.family))

    def explain(self, request: Request | str | None = None, **options: Any) -> Explanation:
        """What a prompt says to each encoder: tokens, chunks, weights, the schedule by step, what is not heard. Loads no weights; print it.

        Takes a `Request`, or a prompt with options, of which dialect, steps, prompt_2, prompt_3, styles and wildcards count, and the seed that these
        are drawn for (0 where none is given).

        Raises:
            RequestError: see `Request`; or more text than any request may have.
        """
        return explained(_as_request(request, options), self.family, self.checkpoint.tokenizers)

    def stream(self, request: Request | str | Plan | State | None = None, *, save_state: str | Path | None = None, save_every: int | None = None,
               **options: Any) -> Run:
        """The request step by step: iterate for `Step`s, then read `.result`. Leave the loop, or `.close()`, to stop within a step.

        Args:
            request: a `Request`, a prompt with options, a finished plan, or an interrupted run (`latentgen.read_state`) of which the rest is made.
            save_state: a file that keeps the run for `resume`: written after every `save_every` steps (5), at the end and where it stops.
        """
        if save_every is not None and save_state is None and not isinstance(request, State):
            raise RequestError("save_every is given without save_state: name the file that keeps the run, or leave it out")
        if self._group is not None and (save_state is not None or isinstance(request, State)):
            raise RequestError("save_state or resume is asked of several processes, each of which knows a part of the run only: use one, "
                               "or leave it out")
        if isinstance(request, State):
            led = request.given(options.pop("classifier", None))
            _alone("an interrupted run", options)
            return self._started(*resumed(self, led, save_state, save_every))
        plan = self._planned(request, options)
        return self._started(plan, None if save_state is None else kept(self, plan, save_state, save_every))

    def _planned(self, request: Request | str | Plan | None, options: dict[str, Any]) -> Plan:
        if not isinstance(request, Plan):
            return self.plan(request, **options)
        _alone("a finished plan", options)
        own = self._machine
        theirs, ours = ((m.model, m.device, m.dtype, m.ways, m.attention, m.speed, m.weights, m.parallel) for m in (request, own))
        if theirs != ours:
            raise RequestError(f"the plan is for {request.model} in {request.dtype} on {request.device}, which is not this pipeline: plan it here")
        return request

    def _started(self, plan: Plan, keeper: Keeper | None = None) -> Run:
        if keeper is None:
            work = Work(self.family, self.checkpoint, self.residency, self._memo, plan, group=self._group)
            alone = self._group is None  # the others of a group would wait for one that goes down the ladder
            return Run(self, work, enduring(work) if alone else work.run())
        work = Work(self.family, self.checkpoint, self.residency, self._memo, plan, keeper.record.heard)
        keeper.record.note = work.notes.append
        return Run(self, work, keeper.steps(enduring(work, again=keeper.record.again)), done=keeper.done)

    def _run(self, task: str, on_step: OnStep | None, *, save_state: str | Path | None = None, save_every: int | None = None, **said: Any) -> Result:
        request = _as_request(said.pop("prompt"), said)
        if request.task != task:
            raise RequestError(f"{task} was called with the input of {request.task}: " + _TASK_NEEDS[task])
        return self._finished(self.stream(request, save_state=save_state, save_every=save_every), on_step)

    def _finished(self, run: Run, on_step: OnStep | None) -> Result:
        with closing(run), Bar(run.plan, self.progress, done=run.done) as bar:  # closed, or a traceback would keep the run and its modules alive
            for step in run:
                bar.step(step)
                if on_step is not None:
                    on_step(step)
            return run.result

    def preview(self, step: Step) -> list[Image.Image]:
        """What the pictures look like after a step, one pixel per latent, without decoding.

        Raises:
            RequestError: the model's card has no preview matrix.
        """
        return preview(step.x0, self.family.latent)


class Run:
    """One request under way. Iterate it for `Step`s; `result` runs what is left and gives the `Result`. `done`: steps that were made before."""

    def __init__(self, pipeline: Pipeline, work: Work, steps: Generator[Step, None, Result], *, done: int = 0) -> None:
        self.plan, self.done = work.plan, done
        self._pipeline, self._work, self._steps = pipeline, work, steps
        self._result: Result | None = None

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        try:
            return next(self._steps)
        except StopIteration as done:
            if done.value is not None:
                self._result = done.value
            raise StopIteration from None

    @property
    def result(self) -> Result:
        """The finished pictures.

        Raises:
            RequestError: the run was closed, or failed, before it was done.
        """
        for _ in self:
            continue
        if self._result is None:
            raise RequestError("this run was stopped before it was done, so it has no result: start it again")
        return self._result

    def preview(self, step: Step) -> list[Image.Image]:
        """See `Pipeline.preview`."""
        return self._pipeline.preview(step)

    def close(self) -> None:
        """Stop; what the run held is freed."""
        self._steps.close()


_TASK_NEEDS = {
    "txt2img": "leave image, mask and left/right/top/bottom out, or call that method", "img2img": "it takes an image and no mask or sides",
    "inpaint": "it needs an image and a mask, and no left/right/top/bottom",
    "outpaint": "it needs an image and at least one of left, right, top, bottom",
    "edit": "it takes a reference and no image, mask or sides",
}


def _alone(what: str, options: dict[str, Any]) -> None:
    if options:
        raise RequestError(f"{what} was given with {', '.join(options)}: it takes no options, for all was said when it was planned")


def _as_request(request: Request | str | None, options: dict[str, Any]) -> Request:
    if request is None and "prompt" in options:  # the words by their name, as in plan(prompt="a cat")
        request = options.pop("prompt")
    if isinstance(request, Request):
        return request.replace(**options) if options else request
    if "on_step" in options:
        raise RequestError("'on_step' belongs to txt2img, img2img, inpaint and outpaint: with `stream`, loop over the steps instead")
    if "save_state" in options or "save_every" in options:
        raise RequestError("'save_state' belongs to the calls that make pictures of one request, and to `stream`: leave it out here")
    if "prompt" in options:
        raise RequestError("prompt is given twice: pass the words once")
    return Request(prompt=request, **options)
