"""The pipeline object: Request -> Plan -> stream of Steps -> Result, one path for every task.

Knows the order of the stages and nothing about any family. All state of a call lives in the call, so one pipeline may serve many threads.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from latentgen.diffusion.guide import guided, masked
from latentgen.diffusion.level import Denoiser, Level, noised, prediction_row, start
from latentgen.diffusion.noise import SeededNoise
from latentgen.diffusion.sample import Step
from latentgen.diffusion.sample import sampler as find_sampler
from latentgen.errors import ModelError, NotFiniteError, RequestError
from latentgen.models.card import Card, find_card
from latentgen.models.family import Conditioning, Family
from latentgen.models.load import digest, part_config, weight_bytes
from latentgen.pixels.image import to_images
from latentgen.pixels.latent import decode, encode, preview
from latentgen.pixels.mask import paste_back
from latentgen.run.memo import Memo
from latentgen.run.plan import Machine, Plan, make_plan, source_pixels
from latentgen.run.progress import Bar
from latentgen.run.recipe import make_recipe
from latentgen.run.request import Request
from latentgen.run.residency import POLICIES, Residency, choose_device, choose_dtype
from latentgen.run.result import Result

if TYPE_CHECKING:
    from torch import nn

    Modules = dict[str, nn.Module]

OnStep = Callable[[Step], None]


def load(source: str | Path = "glyph", *, device: str = "auto", dtype: str = "auto", residency: str = "resident", progress: bool | None = None) -> Pipeline:
    """Open a model. Reads its card, configs and headers; weights load when a stage first needs them.

    Args:
        source: a card's name (`latentgen models` lists them) or a folder with a card.toml.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        dtype: "auto", "float32", "bfloat16", "float16" of the networks; latents are always float32.
        residency: "resident" keeps every part loaded, "stage" only the part that runs.
        progress: a bar on stderr; None shows one in a terminal or notebook only.

    Raises:
        ModelError: no such model, or a file of it is missing or damaged. RequestError: a bad device, dtype or residency.
    """
    if residency not in POLICIES:
        raise RequestError(f"residency is {residency!r}: expected one of {', '.join(map(repr, POLICIES))}")
    place = choose_device(device)
    return Pipeline(find_card(source), device=place, dtype=choose_dtype(dtype, place), residency=residency, progress=progress)


class Pipeline:
    """A model ready to make pictures: `txt2img`, `img2img`, `inpaint`, `outpaint`, or `plan` and `stream` with a `Request`."""

    def __init__(self, card: Card, *, device: torch.device, dtype: torch.dtype, residency: str = "resident", progress: bool | None = None) -> None:
        self.card = card
        self.family = _with_scale(card.load_family(), card.folder)
        self.residency = Residency(card.folder, self.family, device=device, dtype=dtype, policy=residency)
        self.progress = progress
        self._tokenizer = self.family.tokenizer(card.folder)
        self._memo = Memo()
        weights = {stage: sum(weight_bytes(card.folder, p) for p in self.family.parts if stage in p.stages) for stage in ("text", "denoiser", "decoder")}
        self._machine = Machine(card.name, str(device), str(dtype).removeprefix("torch."), residency, weights)

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

    def plan(self, request: Request | str, **options: Any) -> Plan:
        """Everything that would be done, decided without touching weights. Takes a `Request`, or a prompt with options.

        Raises:
            RequestError, ImageError: input that cannot be honoured.
        """
        return make_plan(_as_request(request, options), self.family, self._tokenizer, self._machine)

    def stream(self, request: Request | str | Plan, **options: Any) -> Run:
        """The request step by step: iterate for `Step`s, then read `.result`. Leave the loop, or `.close()`, to stop within a step."""
        if not isinstance(request, Plan):
            return Run(self, self.plan(request, **options))
        if options:
            raise RequestError(f"a finished plan was given with {', '.join(options)}: a plan takes no options, so give them to `plan`")
        if Machine(request.model, request.device, request.dtype, request.residency, request.weights) != self._machine:
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
        positive, negative = self._conditioning(plan)
        timings["text"] = time.perf_counter() - began
        spec = self.family.latent
        shape = spec.shape(plan.width, plan.height)
        z0 = self._source_latents(plan, notes)
        timings["encode"] = time.perf_counter() - began - timings["text"]
        noise = SeededNoise(plan.seeds, shape)
        device = self.residency.device
        eps = noise.draw().to(device)
        first = plan.levels[0]
        from_source = z0 is not None and plan.task in ("img2img", "inpaint")
        x = noised(z0.expand_as(eps), eps, first) if from_source and z0 is not None else start(eps, first)
        phase = time.perf_counter()
        with self.residency.use("denoiser") as modules:
            denoise = self._denoiser(modules, plan, positive, negative)
            if z0 is not None and plan.source is not None and plan.source.mask is not None:
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
        recipe = make_recipe(plan, digest(self.card.folder, self.family.parts), tuple(notes))
        return Result(tuple(images), plan, tuple(notes), timings, recipe)

    def _conditioning(self, plan: Plan) -> tuple[Conditioning, Conditioning]:
        def encoded(ids: tuple[tuple[int, ...], ...]) -> Conditioning:
            def make() -> Conditioning:
                with self.residency.use("text") as modules:
                    return self.family.encode(modules, torch.tensor(ids, device=self.residency.device))

            return self._memo.get(("text", ids), make, _tensors)

        positive = encoded(plan.prompt.ids)
        return positive, encoded(plan.negative.ids) if plan.batching != "off" else positive

    def _source_latents(self, plan: Plan, notes: list[str]) -> Tensor | None:
        """z0 of the source picture, (1, c, h, w), in float32 once more where the half-precision encoder overflows."""
        source = plan.source
        if source is None:
            return None

        def encoded(dtype: torch.dtype) -> Tensor:
            with self.residency.use("encoder", dtype=dtype) as modules:
                return encode(modules["vae"], source_pixels(source), self.family.latent, tile=plan.tile)

        key = ("image", source.image.size, hashlib.sha256(source.image.tobytes()).digest(), plan.tile)
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

    def _denoiser(self, modules: Modules, plan: Plan, positive: Conditioning, negative: Conditioning) -> Denoiser:
        """(x, level) -> x0 with the words, guided where the plan says so; `plan.rows` pictures per network call."""
        family = self.family

        def estimate(x: Tensor, level: Level, conditioning: Conditioning) -> Tensor:
            a, b = prediction_row(family.prediction, level)
            return a * x + b * family.predict(modules, x, level, conditioning)

        def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            return function(x) if len(x) <= plan.rows else torch.cat([function(part) for part in x.split(plan.rows)])

        def with_words(x: Tensor, level: Level) -> Tensor:
            return by_rows(lambda part: estimate(part, level, _repeated(positive, len(part))), x)

        if plan.batching == "off":
            return with_words

        def both(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
            parts = []
            for part in x.split(plan.rows):
                pair = _joined(_repeated(positive, len(part)), _repeated(negative, len(part)))
                parts.append(estimate(torch.cat([part, part]), level, pair).chunk(2))
            return torch.cat([p for p, _ in parts]), torch.cat([n for _, n in parts])

        return guided(with_words, both, scale=plan.guidance_scale, rescale=plan.guidance_rescale, interval=plan.guidance_interval,
                      position=lambda level: family.path.find(level.half_log_snr))

    def _pixels(self, plan: Plan, z: Tensor, notes: list[str]) -> Tensor:
        """Decode one picture at a time, so that none depends on its batch; in float32 once more where half precision overflows."""

        def decoded(dtype: torch.dtype) -> Tensor:
            with self.residency.use("decoder", dtype=dtype) as modules:
                return torch.cat([decode(modules["vae"], part, self.family.latent, tile=plan.tile).cpu() for part in z.split(1)])

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
}


def _as_request(request: Request | str, options: dict[str, Any]) -> Request:
    if isinstance(request, Request):
        return request.replace(**options) if options else request
    if "on_step" in options:
        raise RequestError("'on_step' belongs to txt2img, img2img, inpaint and outpaint: with `stream`, loop over the steps instead")
    return Request(prompt=request, **options)


def _with_scale(family: Family, folder: Path) -> Family:
    """The family with its VAE's own scaling factor and shift."""
    config = part_config(folder / "vae")
    scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    if not all(isinstance(value, (int, float)) for value in (scale, shift)):
        raise ModelError(f"{folder.name}/vae/config.json has scaling_factor {scale!r:.60} and shift_factor {shift!r:.60}: expected numbers")
    return replace(family, latent=replace(family.latent, scale=float(scale), shift=float(shift)))


def _latent_mask(mask: Tensor, factor: int) -> Tensor:
    """(1, 1, H, W) -> (1, 1, h, w): a latent is repainted as far as any of its pixels is."""
    return torch.nn.functional.max_pool2d(mask, factor)


def _tensors(conditioning: Conditioning) -> list[Tensor]:
    return [t for t in (conditioning.tokens, conditioning.pooled, *conditioning.extra.values()) if t is not None]


def _repeated(c: Conditioning, count: int) -> Conditioning:
    """A conditioning of batch 1 for `count` pictures, without a copy."""

    def grow(t: Tensor) -> Tensor:
        return t.expand(count, *t.shape[1:])

    return Conditioning(grow(c.tokens), None if c.pooled is None else grow(c.pooled), {k: grow(v) for k, v in c.extra.items()})


def _joined(a: Conditioning, b: Conditioning) -> Conditioning:
    pooled = None if a.pooled is None or b.pooled is None else torch.cat([a.pooled, b.pooled])
    return Conditioning(torch.cat([a.tokens, b.tokens]), pooled, {k: torch.cat([v, b.extra[k]]) for k, v in a.extra.items()})
