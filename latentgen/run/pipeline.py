"""The pipeline object: Request -> Plan -> stream of Steps -> Result, one path for every task.

Knows the order of the stages and nothing about any family. All state of a call lives in the call, so one pipeline may serve many threads.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from latentgen.conditioning.explain import Explanation
from latentgen.diffusion.compose import composed
from latentgen.diffusion.guide import guided, image_guidance, masked
from latentgen.diffusion.level import Denoiser, Level, noised, prediction_row, start
from latentgen.diffusion.noise import SeededNoise
from latentgen.diffusion.sample import Step
from latentgen.diffusion.sample import sampler as find_sampler
from latentgen.errors import NotFiniteError, RequestError
from latentgen.models.checkpoint import Checkpoint, open_checkpoint
from latentgen.models.family import Conditioning, Scene
from latentgen.pixels.image import to_images, to_tensor
from latentgen.pixels.latent import decode, encode, preview
from latentgen.pixels.mask import paste_back
from latentgen.run.batch import joined, repeated
from latentgen.run.memo import Memo
from latentgen.run.plan import OPTIONS, Machine, Plan, make_plan, source_pixels
from latentgen.run.progress import Bar, download_bar
from latentgen.run.recipe import make_recipe
from latentgen.run.request import Request
from latentgen.run.residency import POLICIES, Residency, choose_device, choose_dtype
from latentgen.run.result import Result
from latentgen.run.texts import explain_text
from latentgen.run.words import Script, Speaker

if TYPE_CHECKING:
    from torch import nn

    from latentgen.run.replay import Replayed

    Modules = dict[str, nn.Module]

OnStep = Callable[[Step], None]


def load(source: str | Path | None = "glyph", *, device: str = "auto", dtype: str = "auto", residency: str = "resident", progress: bool | None = None,
         card: str | None = None, config: str | Path | None = None, allow_pickle: bool = False, **parts: str | Path) -> Pipeline:
    """Open a model. Reads its card, configs and headers; weights load when a stage first needs them.

    Args:
        source: a card's name (`latentgen models` lists them), a folder in diffusers layout, a .safetensors file (a whole checkpoint or a denoiser
            alone), a .gguf file, or a hub name ("org/name", fetched once and then kept to one commit); None where denoiser= is given.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        dtype: "auto", "float32", "bfloat16", "float16" of the networks; latents are always float32.
        residency: "resident" keeps every part loaded, "stage" only the part that runs.
        progress: a bar on stderr; None shows one in a terminal or notebook only.
        card: a card whose defaults and configs hold where a file does not tell, as card="sdxl-turbo".
        config: configs for a file: a published variant's name, or a folder in diffusers layout.
        allow_pickle: read .ckpt, .bin and .pt files, too, their tensors alone; without it they are refused.
        parts: files or folders of single parts and tokenizers, as vae=, text_encoder=, text_encoder_2=, tokenizer_2=, or denoiser=.

    Raises:
        ModelError: no such model, or a file of it is missing, damaged or of another kind. RequestError: a bad device, dtype or residency.
    """
    if residency not in POLICIES:
        raise RequestError(f"residency is {residency!r}: expected one of {', '.join(map(repr, POLICIES))}")
    place = choose_device(device)
    chosen = choose_dtype(dtype, place)
    with download_bar(progress) as report:
        checkpoint = open_checkpoint(source, card=card, config=config, parts=parts, allow_pickle=allow_pickle, report=report)
    return Pipeline(checkpoint, device=place, dtype=chosen, residency=residency, progress=progress)


class Pipeline:
    """A model ready to make pictures: `txt2img`, `img2img`, `inpaint`, `outpaint`, `edit`, or `plan` and `stream` with a `Request`."""

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, residency: str = "resident", progress: bool | None = None) -> None:
        self.checkpoint = checkpoint
        self.card = checkpoint.card
        self.family = checkpoint.family
        self.residency = Residency(checkpoint, device=device, dtype=dtype, policy=residency)
        self.progress = progress
        self._memo = Memo()
        weights = {stage: checkpoint.weight_bytes(stage) for stage in ("text", "denoiser", "decoder")}
        self._machine = Machine(checkpoint.name, str(device), str(dtype).removeprefix("torch."), residency, weights, checkpoint.notes)

    def __repr__(self) -> str:
        m = self._machine
        return f"<Pipeline {m.model}: {m.dtype} on {m.device}, {m.residency}, {sum(m.weights.values()) / 1e6:.0f} MB of weights>"

    def txt2img(self, prompt: str, *, on_step: OnStep | None = None, **options: Any) -> Result:
        """Words to pictures.

        Args:
            prompt: what to draw; any length.
            on_step: called after each step; raise in it to stop (nothing is left behind).
            options: the fields of `Request` (negative_prompt, width, height, steps, guidance_scale, sampler, seed, batch ...).

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
        """A picture changed as the words instruct, by a model made for it; `reference` is the picture, or several where the model looks at several."""
        return self._run("edit", on_step, prompt=prompt, reference=reference, **options)

    def replay(self, made: Any, /, *, anyway: bool = False, **pictures: Any) -> Replayed:
        """A picture made again from the recipe in its file: identical, or what differs. See `latentgen.run.replay.replay`."""
        from latentgen.run.replay import replay

        return replay(self, made, anyway=anyway, **pictures)

    def plan(self, request: Request | str, **options: Any) -> Plan:
        """Everything that would be done, decided without touching weights. Takes a `Request`, or a prompt with options.

        Raises:
            RequestError, ImageError: input that cannot be honoured.
        """
        return make_plan(_as_request(request, options), self.family, self.checkpoint.tokenizers, self._machine)

    def explain(self, request: Request | str, **options: Any) -> Explanation:
        """What a prompt says to each encoder: tokens, chunks, weights, the schedule by step, what is not heard. Loads no weights; print it.

        Takes a `Request`, or a prompt with options, of which dialect, steps, prompt_2 and prompt_3 count.

        Raises:
            RequestError: see `Request`; or more text than any request may have.
        """
        said = _as_request(request, options)
        return explain_text(said, self.checkpoint.tokenizers, steps=said.steps or self.family.defaults.steps)

    def stream(self, request: Request | str | Plan, **options: Any) -> Run:
        """The request step by step: iterate for `Step`s, then read `.result`. Leave the loop, or `.close()`, to stop within a step."""
        if not isinstance(request, Plan):
            return Run(self, self.plan(request, **options))
        if options:
            raise RequestError(f"a finished plan was given with {', '.join(options)}: a plan takes no options, so give them to `plan`")
        if Machine(request.model, request.device, request.dtype, request.residency, request.weights, self._machine.notes) != self._machine:
            raise RequestError(f"the plan is for {request.model} in {request.dtype} on {request.device}, which is not this pipeline: plan it here")
        return Run(self, request)

    def _run(self, task: str, on_step: OnStep | None, **said: Any) -> Result:
        request = _as_request(said.pop("prompt"), said)
        if request.task != task:
            raise RequestError(f"{task} was called with the input of {request.task}: " + _TASK_NEEDS[task])
        run = self.stream(request)
        with closing(run), Bar(run.plan, self.progress) as bar:  # closed, or a traceback would keep the run and its modules alive
            for step in run:
                bar.step(step)
                if on_step is not None:
                    on_step(step)
            return run.result

    def _steps(self, plan: Plan) -> Generator[Step, None, Result]:
        """The one path of every task (DESIGN section 4); a new feature is a wrapper around the denoiser, not a branch here."""
        timings: dict[str, float] = {}
        notes = list(plan.notes)
        began = time.perf_counter()
        self.residency.check()
        script = self._script(plan, notes)
        timings["text"] = time.perf_counter() - began
        spec = self.family.latent
        shape = spec.shape(plan.width, plan.height)
        z0 = self._source_latents(plan, notes)
        timings["encode"] = time.perf_counter() - began - timings["text"]
        noise = SeededNoise(plan.seeds, shape)
        device = self.residency.device
        eps = noise.draw().to(device)
        x = self._start(plan, z0, eps)
        phase = time.perf_counter()
        with self.residency.use("denoiser") as modules:
            denoise = self._denoiser(modules, plan, script)
            if z0 is not None and plan.source is not None and plan.source.mask is not None and self.family.task != "inpaint":
                denoise = masked(denoise, z0=z0, mask=_latent_mask(plan.source.mask, spec.factor).to(device), eps=eps)
            sample = find_sampler(plan.sampler).function
            for step in sample(denoise, x, plan.levels, noise=lambda: noise.draw().to(device), **plan.options):
                x = step.x
                yield step
        if not bool(torch.isfinite(x).all()):
            cure = "check its weights and guidance_scale" if plan.dtype == "float32" else "load the model with dtype='float32'"
            raise NotFiniteError(f"the denoiser gave NaN or infinity in {plan.dtype}: {cure}")
        timings["sample"] = time.perf_counter() - phase
        phase = time.perf_counter()
        images = self._finish(plan, self._pixels(plan, x, notes))
        timings["decode"] = time.perf_counter() - phase
        timings["total"] = time.perf_counter() - began
        recipe = make_recipe(plan, self.checkpoint.digest, tuple(notes))
        return Result(tuple(images), plan, tuple(notes), timings, recipe, x.cpu())

    def _start(self, plan: Plan, z0: Tensor | None, eps: Tensor) -> Tensor:
        """x at the first level: the source with noise, another run's latents, or noise alone (also where an inpainting keeps nothing of the old)."""
        first = plan.levels[0]
        if plan.request.latents is not None:
            return plan.request.latents.to(eps)
        if z0 is not None and (plan.task == "img2img" or (plan.task == "inpaint" and plan.strength < 1)):
            return noised(z0.expand_as(eps), eps, first)
        return start(eps, first)

    def _script(self, plan: Plan, notes: list[str]) -> Script:
        """What is said when, as the denoiser hears it: words, and what the family adds of the picture."""
        speaker = Speaker(self.family, self.checkpoint.tokenizers, self.residency, self._memo, plan, notes)
        return speaker.script(partial(self.family.inputs, self._scene(plan, notes)))

    def _scene(self, plan: Plan, notes: list[str]) -> Scene:
        """The picture side of a request, as a family's `inputs` reads it."""
        source, request = plan.source, plan.request
        options = {name: value for name in OPTIONS if (value := getattr(request, name)) is not None} | {"guidance_scale": plan.guidance_scale}
        return Scene(plan.width, plan.height, self.family.latent.shape(plan.width, plan.height),
                     encode=lambda pixels: self._latents(pixels, plan.tile, notes),
                     image=None if source is None else source_pixels(source), mask=None if source is None else source.mask,
                     references=tuple(to_tensor(picture) for picture in plan.references), options=options)

    def _source_latents(self, plan: Plan, notes: list[str]) -> Tensor | None:
        """z0 of the source picture, (1, c, h, w)."""
        return None if plan.source is None else self._latents(source_pixels(plan.source), plan.tile, notes)

    def _latents(self, pixels: Tensor, tile: int | None, notes: list[str]) -> Tensor:
        """Pixels (1, 3, H, W) -> native latents (1, c, h, w), remembered; in float32 once more where the half-precision encoder overflows."""

        def encoded(dtype: torch.dtype) -> Tensor:
            with self.residency.use("encoder", dtype=dtype) as modules:
                return encode(modules["vae"], pixels, self.family.latent, tile=tile, call=self.family.vae_encode)

        key = ("image", tuple(pixels.shape), hashlib.sha256(pixels.contiguous().numpy().tobytes()).digest(), tile)
        z0, said = self._memo.get(key, lambda: self._finite("encoded", encoded), lambda made: [made[0]])
        notes.extend(said)
        return z0

    def _finite(self, what: str, compute: Callable[[torch.dtype], Tensor]) -> tuple[Tensor, tuple[str, ...]]:
        """compute(dtype) in the pipeline's dtype, or where that overflows once more in float32, with a note about it."""
        try:
            return compute(self.residency.dtype), ()
        except NotFiniteError as error:
            if self.residency.dtype == torch.float32:
                raise
            return compute(torch.float32), (f"the picture was {what} once more in float32: {error}",)

    def _denoiser(self, modules: Modules, plan: Plan, script: Script) -> Denoiser:
        """(x, level) -> x0 with the words, guided where the plan says so; `plan.rows` pictures per network call."""
        family = self.family

        def estimate(x: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
            a, b = prediction_row(family.prediction, level)
            with torch.no_grad():
                return a * x + b * family.predict(modules, x, level, conditioning)

        def with_words(x: Tensor, level: Level) -> Tensor:
            said = script.at(level)
            if len(said.prompts) > 1:
                return every(x, level)[0]
            parts = [estimate(part, level, repeated(said.prompts[0], len(part))) for part in x.split(plan.rows)]
            return torch.cat(parts) if parts[1:] else parts[0]

        def every(x: Tensor, level: Level) -> tuple[Tensor, ...]:
            said, rows = script.at(level), []
            for part in x.split(plan.rows):
                each = [repeated(c, len(part)) for c in said.every]
                if said.together:
                    rows.append(estimate(torch.cat([part] * len(each)), level, joined(each)).chunk(len(each)))
                else:  # encoders without padding give the texts different lengths
                    rows.append(tuple(estimate(part, level, c) for c in each))
            x0s = tuple(torch.cat(sides) if sides[1:] else sides[0] for sides in zip(*rows, strict=True))
            count = len(said.prompts)
            return x0s if count == 1 else (composed(x0s[:count], x0s[count], said.weights), *x0s[count:])

        if plan.batching == "off":
            return with_words
        combine: Callable[..., Tensor] | None = None
        if family.guidance == "image" and plan.references:
            def combine(x: Tensor, level: Level, x0s: tuple[Tensor, ...]) -> Tensor:
                return image_guidance(*x0s, scale=plan.cfg_scale, image_scale=plan.image_guidance_scale)
        elif family.combine is not None:
            def combine(x: Tensor, level: Level, x0s: tuple[Tensor, ...]) -> Tensor:
                return family.combine(x, level, *x0s, plan.cfg_scale)
        return guided(with_words, every, scale=plan.cfg_scale, rescale=plan.guidance_rescale, interval=plan.guidance_interval, combine=combine,
                      position=lambda level: family.path.find(level.half_log_snr))

    def _pixels(self, plan: Plan, z: Tensor, notes: list[str]) -> Tensor:
        """Decode one picture at a time, so that none depends on its batch; in float32 once more where half precision overflows."""

        def decoded(dtype: torch.dtype) -> Tensor:
            with self.residency.use("decoder", dtype=dtype) as modules:
                return torch.cat([decode(modules["vae"], part, self.family.latent, tile=plan.tile, call=self.family.vae_decode).cpu() for part in z.split(1)])

        pixels, said = self._finite("decoded", decoded)
        notes.extend(said)
        return pixels

    def _finish(self, plan: Plan, pixels: Tensor) -> list[Image.Image]:
        """Pictures, with kept pixels pasted back exactly and a filled-up size cropped."""
        images = to_images(pixels)
        if plan.source is not None and plan.source.mask is not None:
            images = [paste_back(plan.source.image, image, plan.source.mask) for image in images]
        return [image if image.size == plan.crop else image.crop((0, 0, *plan.crop)) for image in images]

    def preview(self, step: Step) -> list[Image.Image]:
        """What the pictures look like after a step, one pixel per latent, without decoding.

        Raises:
            RequestError: the model's card has no preview matrix.
        """
        return preview(step.x0, self.family.latent)


class Run:
    """One request under way. Iterate it for `Step`s; `result` runs what is left and gives the `Result`."""

    def __init__(self, pipeline: Pipeline, plan: Plan) -> None:
        self.plan = plan
        self._pipeline = pipeline
        self._steps = pipeline._steps(plan)
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
    "inpaint": "it needs an image and a mask, and no left/right/top/bottom", "outpaint": "it needs an image and at least one of left, right, top, bottom",
    "edit": "it takes a reference and no image, mask or sides",
}


def _as_request(request: Request | str, options: dict[str, Any]) -> Request:
    if isinstance(request, Request):
        return request.replace(**options) if options else request
    if "on_step" in options:
        raise RequestError("'on_step' belongs to txt2img, img2img, inpaint and outpaint: with `stream`, loop over the steps instead")
    if "prompt" in options:
        raise RequestError("prompt is given twice: pass the words once")
    return Request(prompt=request, **options)


def _latent_mask(mask: Tensor, factor: int) -> Tensor:
    """(1, 1, H, W) -> (1, 1, h, w): a latent is repainted as far as any of its pixels is."""
    return torch.nn.functional.max_pool2d(mask, factor)
