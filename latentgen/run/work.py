"""One run of one plan: Plan -> stream of Steps -> Result, one path for every task (DESIGN section 4).

Knows the order of the stages and nothing about any family. All state of a run lives here, so one pipeline may serve many threads.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from latentgen.diffusion.guidance.combine import thresholded
from latentgen.diffusion.guide import masked
from latentgen.diffusion.level import Denoiser, noised, start
from latentgen.diffusion.sample import Step
from latentgen.diffusion.sample import sampler as find_sampler
from latentgen.diffusion.tiles import Window, turned
from latentgen.models.approximate.memory import Tally
from latentgen.models.approximate.table import saved
from latentgen.models.around import around
from latentgen.models.asked import Asked
from latentgen.models.checkpoint import Checkpoint
from latentgen.models.family import Family, Modules, Scene
from latentgen.models.fast.graphs import GRAPHS, Graphs, OnCuda
from latentgen.models.modulation import Tables
from latentgen.models.weaken import weakened
from latentgen.pixels.image import to_images, to_tensor
from latentgen.pixels.latent import decode, encode
from latentgen.pixels.mask import paste_back
from latentgen.pixels.upscale import UPSCALERS, larger_latents, larger_pixels
from latentgen.run.denoising import evaluated, network, worded
from latentgen.run.guard import DenoiserError, Watch, even, flat, named, once_more, pictures_named
from latentgen.run.guiding import OPTIONS
from latentgen.run.memo import Memo
from latentgen.run.parallel import ALONE, Group, Team
from latentgen.run.passes import Pass
from latentgen.run.plan import Plan
from latentgen.run.recipe import make_recipe
from latentgen.run.residency import Residency
from latentgen.run.result import Result
from latentgen.run.shortcuts import approximate, exact, known
from latentgen.run.sizing import source_pixels
from latentgen.run.steering import steered
from latentgen.run.words import Script, Speaker

if TYPE_CHECKING:
    from latentgen.run.denoising import Estimate
    from latentgen.run.state import Predict


@dataclass(frozen=True)
class Work:
    """What one run has at hand.

    Attributes:
        memo: texts and pictures that were encoded before, by value; shared by all runs of a pipeline.
        heard: wraps what a family predicts with, for each call of the network that makes the picture.
        notes: the plan's, and what this run adjusts.
        savings: what its approximations have saved.
        precision: of the denoiser, where it is not that of the pipeline.
        group: of the processes that make each picture together, where there are several; `team` is what this run has of it.
        sampled: the latents that an earlier attempt made, which had no memory left to decode them.
        graphs: what captures calls of the networks, in a pass where that is done.
    """

    family: Family
    checkpoint: Checkpoint
    residency: Residency
    memo: Memo
    plan: Plan
    heard: Callable[[Predict], Predict] = lambda predict: predict
    notes: list[str] = field(default_factory=list)
    savings: dict[str, Tally] = field(default_factory=dict)
    precision: torch.dtype | None = None
    group: Group | None = None
    team: Team = ALONE
    sampled: Tensor | None = None
    graphs: Graphs | None = None

    @property
    def precise(self) -> torch.dtype:
        """In what the denoiser computes."""
        return self.precision or self.residency.dtype

    def run(self) -> Generator[Step, None, Result]:
        """`guarded`, by this process or by several that were given the same."""
        if self.group is None:
            return (yield from self.guarded())
        with self.group.team() as team:
            team.agree(make_recipe(self.plan, self.checkpoint.digest, ()))
            return (yield from replace(self, team=team).guarded())

    def guarded(self) -> Generator[Step, None, Result]:
        """`steps`; where the denoiser overflows in half precision, all of them once more with it in float32."""
        try:
            return (yield from self.steps())
        except DenoiserError as error:
            if self.precise == torch.float32:
                raise
            note = f"all steps were run once more with the denoiser in float32: {error}"
        self.savings.clear()
        plan = replace(self.plan, notes=tuple(dict.fromkeys((*self.notes, note))))
        return (yield from replace(self, precision=torch.float32, plan=plan).steps())

    def steps(self) -> Generator[Step, None, Result]:
        """The one path of every task and pass; a new feature is a wrapper around the denoiser, not a branch here."""
        plan, spec, device, timings = self.plan, self.family.latent, self.residency.device, {}
        self.notes[:] = plan.notes
        began = phase = time.perf_counter()
        self.residency.check()
        scripts = [[self.of(own).scripts(one) for own in plan.pictures or (plan,)] for one in plan.passes]
        timings["text"], phase = _since(phase)
        sources = [self.source_latents(one) for one in plan.passes]
        timings["encode"], phase = _since(phase)
        sample, done, x = find_sampler(plan.sampler).function, 0, self.sampled
        noise = plan.noise.noise(spec.shape(plan.width, plan.height), spec.factor)
        for n, (one, said, z0) in enumerate(zip(plan.passes, scripts, sources, strict=True) if x is None else ()):
            made = None if x is None else self.larger(plan.passes[n - 1], one, x)
            noise = noise if made is None else noise.sized(spec.shape(one.width, one.height))
            eps, watch = _sent(noise.draw(), device), Watch()
            x = self.start(one, z0, eps, made)
            with self.residency.use("denoiser", dtype=self.precision, policy=plan.residency, quantise=plan.quantise) as modules:
                denoise = self.capturing().denoisers(one, modules, said, z0, eps)
                for step in sample(denoise, x, one.levels, noise=lambda noise=noise: _sent(noise.draw(), device), **plan.options):
                    x = step.x
                    watch.see(step.x0, x)
                    yield replace(step, index=done + step.index, total=plan.steps)
            del modules, denoise, step  # with what their views hold
            self.check_finite(watch, done)
            done += one.steps
        self.notes.extend(saved(self.savings))
        timings["sample"], phase = _since(phase)
        try:
            images = self.finish(plan.passes[-1], self.pixels(plan.passes[-1], x))
        except Exception as error:
            error.latents = x  # type: ignore[attr-defined]  # another attempt to decode need not sample them again
            raise
        timings["decode"], _ = _since(phase)
        timings["total"] = time.perf_counter() - began
        self.notes[:] = dict.fromkeys(note for notes in self.team.each(self.notes) for note in notes)
        recipe = make_recipe(plan, self.checkpoint.digest, tuple(self.notes))
        return Result(tuple(images), plan, tuple(self.notes), timings, recipe, x.cpu())

    def of(self, plan: Plan) -> Work:
        """The same run, seen from another plan: of one of its pictures."""
        return replace(self, plan=plan)

    def scripts(self, one: Pass) -> list[Script]:
        """What is said when, as the denoiser of each window hears it: words, and what the family adds of the picture."""
        speaker = Speaker(self.family, self.checkpoint.tokenizers, self.residency, self.memo, self.plan, self.notes)
        windows = one.grid.windows
        if one.source is None or self.family.task != "inpaint":  # windows are of one size, and no network but those for inpainting sees more of them
            return [speaker.script(partial(self.family.inputs, self.scene(one, windows[0])))] * len(windows)
        return [speaker.script(partial(self.family.inputs, self.scene(one, window))) for window in windows]

    def scene(self, one: Pass, window: Window) -> Scene:
        """The picture side of a request, as a family's `inputs` reads it: what lies in one window, as if it were all."""
        plan, source, request, factor = self.plan, one.source, self.plan.request, self.family.latent.factor
        options = {name: value for name in OPTIONS if (value := getattr(request, name)) is not None} | {"guidance_scale": plan.guidance_scale}
        width, height = window.columns.length * factor, window.rows.length * factor
        return Scene(width, height, self.family.latent.shape(width, height), encode=partial(self.latents, one, wrap=one.grid.edgeless),
                     image=None if source is None else window.of(source_pixels(source), unit=factor),
                     mask=None if source is None or source.mask is None else window.of(source.mask, unit=factor),
                     references=tuple(to_tensor(picture) for picture in plan.references), options=options)

    def source_latents(self, one: Pass) -> Tensor | None:
        """z0 of the source picture, (1, c, h, w)."""
        return None if one.source is None else self.latents(one, source_pixels(one.source), wrap=one.grid.wrap)

    def latents(self, one: Pass, pixels: Tensor, *, wrap: tuple[int, ...]) -> Tensor:
        """Pixels (1, 3, H, W) -> native latents (1, c, h, w), remembered. `wrap`: see `encoded`."""
        key = ("image", tuple(pixels.shape), hashlib.sha256(pixels.contiguous().numpy().tobytes()).digest(), one.tile, wrap)
        z0, said = self.memo.get(key, lambda: self.encoded(one, pixels, wrap=wrap), lambda made: [made[0]])
        self.notes.extend(said)
        return z0

    def encoded(self, one: Pass, pixels: Tensor, *, wrap: tuple[int, ...]) -> tuple[Tensor, tuple[str, ...]]:
        """Pixels (1, 3, H, W) -> native latents (1, c, h, w), and a note where the encoder overflows in half precision and they are made in float32.

        wrap: the axes along which the edges of these pixels meet: of a window's not those along which it is a part.
        """

        def computed(dtype: torch.dtype) -> Tensor:
            with self.residency.use("encoder", dtype=dtype, policy=self.plan.residency, quantise=self.plan.quantise) as modules:
                return encode(modules["vae"], pixels, self.family.latent, tile=one.tile, wrap=wrap, call=self.family.vae_encode)

        return once_more("the picture was encoded", computed, self.residency.dtype)

    def larger(self, before: Pass, one: Pass, z: Tensor) -> Tensor:
        """What the pass before made, (B, c, h, w), as latents of this one's size."""
        how, factor = UPSCALERS[one.upscaler], self.family.latent.factor
        if not how.pixels:
            return larger_latents(z, (one.height // factor, one.width // factor), mode=how.mode, wrap=one.grid.wrap)
        pixels = larger_pixels(self.pixels(before, z), (one.height, one.width), mode=how.mode, wrap=one.grid.wrap)
        made = [self.encoded(one, part, wrap=one.grid.wrap) for part in pixels.split(1)]  # of pictures that come once: the memo is for given ones
        self.notes.extend(note for _, notes in made for note in notes)
        return torch.cat([z0 for z0, _ in made])

    def start(self, one: Pass, z0: Tensor | None, eps: Tensor, made: Tensor | None) -> Tensor:
        """x at the first level: what the pass before made or the source, with noise; another run's latents; or noise alone (also where an inpainting
        keeps nothing of the old)."""
        plan, first = self.plan, one.levels[0]
        if made is not None:
            return noised(made, eps, first)
        if plan.request.latents is not None:
            return plan.request.latents.to(eps)
        if z0 is not None and (plan.task == "img2img" or (plan.task == "inpaint" and one.strength < 1)):
            return noised(z0.expand_as(eps), eps, first)
        return start(eps, first)

    def capturing(self) -> Work:
        """The same run, the calls of its networks captured where the plan says so: for one pass, while they stay where they are."""
        if self.plan.speed != GRAPHS:
            return self
        return replace(self, graphs=Graphs(OnCuda(self.residency.device), note=self.notes.append))

    def denoisers(self, one: Pass, modules: Modules, scripts: Sequence[Sequence[Script]], z0: Tensor | None, eps: Tensor) -> Denoiser:
        """One denoiser for all pictures, or where their texts differ, to each picture its own."""
        plans = self.plan.pictures or (self.plan,)
        every = [self.of(plan).denoiser(one, modules, said, z0, own) for plan, said, own in zip(plans, scripts, eps.chunk(len(plans)), strict=True)]
        return every[0] if len(every) == 1 else lambda x, level: torch.cat([own(part, level) for own, part in zip(every, x.split(1), strict=True)])

    def denoiser(self, one: Pass, modules: Modules, scripts: Sequence[Script], z0: Tensor | None, eps: Tensor) -> Denoiser:
        """The network with all that is wrapped around it; `scripts` are what its windows hear."""
        plan, axes = self.plan, one.grid.edgeless
        views = {name: around(net, axes) for name, net in modules.items()} if axes else {}
        modules = {**modules, **{name: net for name, net in views.items() if net is not None}}
        layers = {name: options["layers"] for name, options in plan.guiders.items() if "layers" in options}

        @cache  # a weaker network is a view of the same one, and is told the same of each level
        def looked_up(script: Script) -> dict[str, Tables]:
            return known(self.family, modules, plan=plan, one=one, script=script, device=self.residency.device)

        @cache
        def quick(script: Script, guider: str = "") -> tuple[Modules, Asked]:
            asked, nets = Asked(), weakened(modules, guider=guider, layers=layers[guider]) if guider else modules
            return (nets if plan.speed != "exact" else exact(nets, asked, looked_up(script))), asked

        def placed(estimate: Estimate) -> Estimate:
            """One evaluation, turned where edges are to meet and the network cannot be told so."""
            if not axes or any(net is not None for net in views.values()):
                return estimate
            return turned(estimate, axes=axes, levels=one.levels, unit=self.family.latent.multiple // self.family.latent.factor)

        def window(script: Script) -> Denoiser:
            """One window's, with what remembers the steps before for itself."""
            nets, asked = quick(script)
            nets = approximate(nets, asked, plan=plan, shape=one.seen, tallies=self.savings)
            weaker = {name: placed(self.network(*quick(script, name))) for name in layers}
            evaluate = self.team.dealt(evaluated(plan.rows, apart=plan.request.split_guidance))
            return worded(self.family, placed(self.network(nets, asked)), plan, script, progress=one.progress, evaluate=evaluate, weaker=weaker)

        denoise = one.grid.tiled([window(script) for script in scripts], device=eps.device)
        denoise = thresholded(steered(denoise, plan=plan, family=self.family, progress=one.progress, residency=self.residency), plan.guiders)
        if z0 is not None and one.source is not None and one.source.mask is not None and self.family.task != "inpaint":
            denoise = masked(denoise, z0=z0, mask=_latent_mask(one.source.mask, self.family.latent.factor).to(eps), eps=eps)
        return denoise

    def network(self, modules: Modules, asked: Asked) -> Estimate:
        """One evaluation of these networks, which is heard."""
        modules = self.team.networks(modules) if self.graphs is None else self.graphs.of(modules)
        return network(replace(self.family, predict=self.heard(self.family.predict)), modules, asked)

    def check_finite(self, watch: Watch, done: int) -> None:
        """DenoiserError where a step of this pass, before which `done` were made, gave NaN or infinity."""
        if (found := watch.first()) is not None:
            who = "" if len(self.plan.seeds) == 1 else f" for {pictures_named(found[1], self.plan.seeds)}"
            where = f"in {named(self.precise)}, in step {done + found[0] + 1} of {self.plan.steps}{who}"
            cure = "check its weights and guidance_scale" if self.precise == torch.float32 else "run it in float32"
            raise DenoiserError(f"the denoiser gave NaN or infinity {where}: {cure}")

    def pixels(self, one: Pass, z: Tensor) -> Tensor:
        """Decode one picture at a time, so that none depends on its batch; in float32 once more where half precision overflows."""
        spec = self.family.latent

        def some(which: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
            with self.residency.use("decoder", dtype=dtype, policy=self.plan.residency, quantise=self.plan.quantise) as modules:
                whole = partial(decode, modules["vae"], spec=spec, tile=one.tile, wrap=one.grid.wrap, call=self.family.vae_decode)
                return [whole(z[n:n + 1])[0] for n in which]

        def decoded(dtype: torch.dtype) -> Tensor:
            return torch.stack(self.team.shared(partial(some, dtype=dtype), len(z), z.new_empty(()).expand(3, one.height, one.width))).cpu()

        pixels, said = once_more("the picture was decoded", decoded, self.residency.dtype)
        self.notes.extend(said)
        return self.seen(one, z, pixels, partial(decoded, torch.float32))

    def seen(self, one: Pass, z: Tensor, pixels: Tensor, again: Callable[[], Tensor]) -> Tensor:
        """The pixels; where a picture is one flat colour and should not be, once more in float32, and what stays flat is noted.

        A flat latent, or a flat source, may give a flat picture.
        """
        spread = [True] * len(z) if one.source is None else [not any(flat(source_pixels(one.source)))] * len(z)
        wrong = [n for n, (empty, expected) in enumerate(zip(flat(pixels), spread, strict=True)) if empty and expected and z[n].numel() > len(z[n])]
        if not wrong:
            return pixels
        who, dtype = pictures_named(wrong, self.plan.seeds), self.residency.dtype
        if dtype != torch.float32 and not all(even(z[wrong])):
            self.notes.append(f"{who} came out of the decoder as one flat colour in {named(dtype)} and was decoded once more in float32")
            pixels = again()
            wrong = [n for n in wrong if flat(pixels)[n]]
        for n in wrong:
            why = "its latent is flat, so the denoiser gave nothing" if even(z)[n] else "its latent is not, so the decoder lost it"
            self.notes.append(f"{pictures_named([n], self.plan.seeds)} is one flat colour: {why}; check the weights and options of the model")
        return pixels

    def finish(self, one: Pass, pixels: Tensor) -> list[Image.Image]:
        """Pictures, with kept pixels pasted back exactly and a filled-up size cropped."""
        images = to_images(pixels)
        if one.source is not None and one.source.mask is not None:
            images = [paste_back(one.source.image, image, one.source.mask) for image in images]
        return [image if image.size == one.crop else image.crop((0, 0, *one.crop)) for image in images]


def _since(before: float) -> tuple[float, float]:
    now = time.perf_counter()
    return now - before, now


def _sent(noise: Tensor, device: torch.device) -> Tensor:
    """The noise on a device, without waiting for what that is doing: a GPU reads page-locked memory by itself, in its turn."""
    return noise.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else noise.to(device)


def _latent_mask(mask: Tensor, factor: int) -> Tensor:
    """(1, 1, H, W) -> (1, 1, h, w): a latent is repainted as far as any of its pixels is."""
    return torch.nn.functional.max_pool2d(mask, factor)
