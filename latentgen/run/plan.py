"""Every choice about a request, made before weights are touched. Knows families, tokenizers, pictures and levels; runs no network.

All errors about input are raised here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from latentgen.diffusion.guidance.progress import Progress
from latentgen.diffusion.guidance.table import still, weaker
from latentgen.diffusion.level import Level
from latentgen.diffusion.sample import asked as levels_asked
from latentgen.diffusion.table import in_words
from latentgen.errors import RequestError
from latentgen.models.approximate.table import APPROXIMATIONS
from latentgen.models.family import Family
from latentgen.models.fast.graphs import GRAPHS
from latentgen.models.quantise.ways import RUNGS
from latentgen.run.approximating import approximations_of, decided_alone
from latentgen.run.guiding import OPTIONS, check_moves, guidance_of, idle
from latentgen.run.levels import levels_of
from latentgen.run.parallel import Parallel
from latentgen.run.passes import Pass, grid_of, second_pass, whole, wrap_of
from latentgen.run.seeding import Seeds, seeds_of
from latentgen.run.sizing import Source, check_references, open_references, sized
from latentgen.run.texts import SHOWN, PlannedText, plan_texts, resolved, short
from latentgen.run.tuned import Tuned

if TYPE_CHECKING:
    from latentgen.conditioning.tokens import Tokens
    from latentgen.run.memory.forecast import Forecast
    from latentgen.run.request import Request

TOLD = ("shift", "clip_skip", "denoising_start", "denoising_end", "fit", "feather", "split_guidance", "vae_tile", *OPTIONS)  # shown as they were said
SIDES = {"cfg": 2, "image": 3}  # how often a guided evaluation sees a picture


@dataclass(frozen=True)
class Plan:
    """What will be done, in full. Print it.

    Attributes:
        request: what was said, with styles laid over its texts and wildcards drawn.
        passes: size, levels and source picture of each way through the levels; most times one. What has only one of them is that of the first
            (`width`, `height`, `levels`, `asked_steps`, `first_step`, `strength`, `source`), and the finished picture's that of the last
            (`crop`, `tile`).
        guiders: name -> options of those that act beside the plain rule, in the order in which they do.
        prompt, negative: what is said when, as token chunks, as many of one as of the other where both are used.
        empty: the empty prompt, likewise, where a guider asks for it.
        weighting: the rule by which weights in them are read.
        cfg_scale: weight of the evaluations against each other: guidance_scale, or true_cfg_scale where the model has guidance built in; 1 is off.
        batching: how a guided evaluation runs: "pair", "triple" or, where AND joins prompts, "several" (in one call), or "off" (no guidance).
        noise: the seeds of the pictures and of their variations; `seeds` are the former.
        references: pictures for editing by instruction, as given.
        rows: pictures per network call. 1 on a CPU, and where an approximation looks at the picture, so that a picture never depends on its batch.
        approximate: what is left out for speed, because it was asked for: name -> all its options.
        ways: how weights may be held, from the first to what is left where memory lacks (see `latentgen.models.quantise.ways.allowed`).
        quantise: how weights are held where it is not as the networks compute with them: "int8", "fp8", "int4", or "stored" for as the file has them.
        attention: kinds of shapes -> attention kernel, where PyTorch does not choose; see `latentgen.models.fast.kernels`.
        parallel: how several processes make it together, where they do.
        weights: bytes of weights per stage, from the files' headers.
        origin: the texts as they were said, the styles and what was drawn, where styles and wildcards made the request's texts of them.
        foresee: predicts what this plan needs; `forecast` is what it said where the plan was made for a memory, `memory` asks it otherwise.
        pictures: where wildcards gave the pictures of a batch different texts, the plan of each; () for most. Then `prompt` and `negative` are those
            of the first, and `evaluations` the most that any has.
    """

    request: Request
    model: str
    task: str
    passes: tuple[Pass, ...]
    noise: Seeds
    sampler: str
    spacing: str
    options: Mapping[str, float | str]
    guidance_scale: float
    cfg_scale: float
    image_guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[float, float]
    guiders: Mapping[str, Mapping[str, Any]]
    prompt: PlannedText
    negative: PlannedText
    empty: PlannedText | None
    weighting: str
    batching: str
    rows: int
    dtype: str
    device: str
    residency: str
    speed: str
    weights: Mapping[str, int]
    notes: tuple[str, ...]
    approximate: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parallel: Parallel | None = None
    ways: tuple[str | None, ...] = (None,)
    quantise: str | None = None
    attention: Mapping[str, str] = field(default_factory=dict)
    references: tuple[Image.Image, ...] = field(default=(), repr=False, compare=False)
    origin: Mapping[str, Any] = field(default_factory=dict)
    foresee: Callable[[Plan], Forecast] | None = field(default=None, repr=False, compare=False)
    forecast: Forecast | None = field(default=None, compare=False)
    pictures: tuple[Plan, ...] = field(default=(), repr=False)

    @property
    def width(self) -> int:
        """Pixels."""
        return self.passes[0].width

    @property
    def height(self) -> int:
        """Pixels."""
        return self.passes[0].height

    @property
    def levels(self) -> tuple[Level, ...]:
        """Those visited, the clean one last."""
        return self.passes[0].levels

    @property
    def asked_steps(self) -> int:
        """Steps of the whole path."""
        return self.passes[0].asked_steps

    @property
    def first_step(self) -> int:
        """The first that is run of them, counted from 1."""
        return self.passes[0].first_step

    @property
    def strength(self) -> float:
        """The share of them that is run."""
        return self.passes[0].strength

    @property
    def source(self) -> Source | None:
        """The picture that an edit starts from."""
        return self.passes[0].source

    @property
    def crop(self) -> tuple[int, int]:
        """Width and height of the finished picture."""
        return self.passes[-1].crop

    @property
    def tile(self) -> int | None:
        """Side of an autoencoder's tile in pixels, None where it sees the picture whole."""
        return self.passes[-1].tile

    @property
    def seeds(self) -> tuple[int, ...]:
        """One of each picture."""
        return self.noise.own

    @property
    def steps(self) -> int:
        """Levels that the denoiser visits in all passes, after strength."""
        return sum(one.steps for one in self.passes)

    @property
    def evaluations(self) -> int:
        """How often the network sees one picture in all passes, exactly."""
        return sum(one.evaluations for one in self.passes)

    @property
    def memory(self) -> Forecast:
        """What it needs, by stage; from shapes alone, which takes some seconds the first time.

        Raises:
            RequestError: the plan was not made by a pipeline.
        """
        if self.forecast is None and self.foresee is None:
            raise RequestError("the memory of this plan is not known: make it with pipe.plan")
        return self.forecast or self.foresee(self)  # type: ignore[misc]

    @property
    def _guidance(self) -> str:
        """"7.5 (pair), rescale 0.7, from 0.2 to 0.8", as far as there is something to say."""
        scale = "of cfg_pp" if "cfg_pp" in self.guiders else f"{self.cfg_scale:g}"
        built_in = f"{self.guidance_scale:g} (built in)" if self.guidance_scale not in (1, self.cfg_scale) else ""
        said = [f"{scale} ({self.batching})"] if self.batching != "off" else [] if built_in else ["off"]
        said += [built_in] if built_in else []
        said += [f"{self.image_guidance_scale:g} of the picture"] if self.batching == "triple" and self.empty is None else []
        said += [f"rescale {self.guidance_rescale:g}"] if self.guidance_rescale else []
        said += [f"from {self.guidance_interval[0]:g} to {self.guidance_interval[1]:g}"] if self.guidance_interval != (0, 1) else []
        return ", ".join(said)

    @property
    def _held(self) -> str:
        """", weights in int8", as far as there is something to say."""
        if self.quantise is None and {*self.ways} & {*RUNGS}:
            return ", weights in fewer bits where memory lacks"
        return f", weights in {self.quantise}" if self.quantise else ""

    def __str__(self) -> str:
        first = self.passes[0]
        rows = {
            "model": self.model, "task": self.task, "size": first.size, "seeds": str(self.noise),
            "steps": f"{first.steps}, {self.sampler}, {self.spacing}, {first.way}" + "".join(f", {k} {v}" for k, v in self.options.items()),
            **{"then": str(one) for one in self.passes[1:]},
            "guidance": self._guidance, "prompt": str(self.prompt) + (f", weights as {self.weighting}" if self.prompt.weighted else ""),
            "negative": ("none" if not self.negative.text else str(self.negative) if len(self.negative.spans) > 1 else
                         f"{self.negative.tokens} tokens"),
            "compute": f"{self.dtype} on {self.device}, {self.residency}{self._held}, "
                       f"speed {self.speed}, "
                       f"{self.evaluations} network evaluations a picture" + (f", {self.parallel}" if self.parallel else ""),
            "weights": ", ".join(f"{stage} {count / 1e6:.0f} MB" for stage, count in self.weights.items()) + (
                f" in {self.dtype}, less in {self.quantise}" if self.quantise else ""),
        }
        if self.forecast is not None:
            rows |= {"memory": str(self.forecast), "time": self.forecast.time}
        fields = type(self.request).model_fields
        if told := [f"{name} {value}" for name in TOLD if (value := getattr(self.request, name)) != fields[name].default]:
            rows["told"] = ", ".join(told)
        if self.attention:
            rows["attention"] = ", ".join(f"{kind} {kernel}" for kind, kernel in self.attention.items())
        if self.guiders:
            rows["guiders"] = in_words(self.guiders)
        if self.approximate:
            rows["approx"] = in_words(self.approximate)
        if self.pictures:
            rows["prompt"] = "; ".join(f"seed {plan.seeds[0]}: {short(plan.prompt.text)}, {plan.prompt}" for plan in self.pictures[:SHOWN])
            rows["prompt"] += f"; and {len(self.pictures) - SHOWN} more" if self.pictures[SHOWN:] else ""
        elif self.origin:
            rows["text"] = "; ".join([short(self.prompt.text), *self.origin.get("drawn", ())])
        if self.task != "txt2img":
            rows["strength"] = f"{self.strength:g}"
        return "\n".join(f"{name:<9} {text}" for name, text in rows.items()) + "".join(f"\nnote      {n}" for n in self.notes)


@dataclass(frozen=True)
class Machine:
    """What the pipeline was loaded with, as far as planning needs it; `notes` are what its files did not tell.

    layers: (guider, layers as they were asked for) -> their names in the denoiser, or RequestError, and a note or ""; see
        `latentgen.models.weaken.chosen` and `broad`.
    tuned: what requests do that say no approximation of their own.
    ways: how weights may be held, the first where memory suffices.
    attention: kinds of shapes -> attention kernel, where PyTorch does not choose.
    parallel: how several processes make each picture together.
    """

    model: str
    device: str
    dtype: str
    residency: str
    speed: str
    weights: Mapping[str, int]
    notes: tuple[str, ...] = ()
    layers: Callable[[str, Any], tuple[list[str], str]] | None = field(default=None, repr=False, compare=False)
    tuned: Tuned | None = None
    parallel: Parallel | None = None
    ways: tuple[str | None, ...] = (None,)
    attention: Mapping[str, str] = field(default_factory=dict)


def make_plan(request: Request, family: Family, tokenizers: Mapping[str, Tokens], machine: Machine) -> Plan:
    """Decide everything about a request.

    Raises:
        RequestError, ImageError: input that cannot be honoured; with strict=False contradictions become notes instead.
    """
    notes, defaults = list(machine.notes), family.defaults

    def refuse(problem: str) -> None:
        if request.strict:
            raise RequestError(problem)
        notes.append(f"ignored: {problem}")

    references = open_references(request, family)
    source, width, height, crop = sized(request, family, references)
    if (request.vae_tile or 0) % family.latent.factor:
        fits = request.vae_tile // family.latent.factor * family.latent.factor
        raise RequestError(f"vae_tile is {request.vae_tile}: expected a multiple of {family.latent.factor}, so use {fits}")
    native = defaults.width * defaults.height
    if not native / 5 < width * height < native * 5:
        notes.append(f"{width}x{height} is far from this model's own {defaults.width}x{defaults.height}: expect a weaker picture")
    guiding = guidance_of(request, family, refuse, layers=machine.layers, notes=notes)
    guided, guiders = guiding.pair, guiding.guiders
    full, levels, strength, options = levels_of(request, family, (width, height), refuse, notes)
    prompt, negative, empty = plan_texts(request, family, tokenizers, steps=len(full) - 1, guided=guided, refuse=refuse, notes=notes,
                                         empty="perp_neg" in guiders)
    if source is not None and source.mask is not None and not source.mask.any():
        notes.append("the mask is all black: the picture comes back as it was")
    low, high = (request.guidance_interval if guiding.any else None) or (0.0, 1.0)
    rescale = defaults.guidance_rescale if request.guidance_rescale is None else request.guidance_rescale
    sides = SIDES["image"] if family.guidance == "image" and references else SIDES["cfg"]
    several = prompt.composed > 1  # which is composed outside the interval, too
    sides += prompt.composed - 1 + (empty is not None)

    def evaluations(levels: tuple[Level, ...], first: int, total: int) -> int:
        asked = levels_asked(request.sampler or defaults.sampler, levels, options)
        progress = Progress(levels, first=first, total=total)
        inside = [low <= family.path.find(level.half_log_snr) <= high for level in asked]
        return sum((sides if several or (guided and here) else 1) + here * prompt.composed * weaker(guiders, progress, level)
                   for level, here in zip(asked, inside, strict=True) if not (here and still(guiders, progress, level)))

    total, skipped = request.steps or defaults.steps, full.index(levels[0])
    if "classifier" in guiders:
        notes.append("a classifier leads it, which no file holds: to make it again, give the same one")
    wrap = wrap_of(request, family, (width, height), crop, refuse)
    grid = grid_of(request, family, (width, height), wrap=wrap, later=False, refuse=refuse, notes=notes)
    first = Pass(width, height, crop, total, skipped + 1, levels, strength, evaluations(levels, skipped, total) * len(grid.windows), grid,
                 source=source, vae_tile=request.vae_tile)
    second = second_pass(request, family, first, count=evaluations, refuse=refuse, notes=notes)
    passes = (first,) if second is None else (first, second)
    check_references(references, family, ((one.width, one.height) for one in passes))
    acting = guiders, [one.progress for one in passes], lambda level: low <= family.path.find(level.half_log_snr) <= high
    check_moves(*acting)
    notes += whole(request, passes) + idle(*acting)
    approximate = approximations_of(request, family, refuse, passes=passes, tuned=machine.tuned, notes=notes)
    if machine.parallel is not None:
        if machine.parallel.way == "context" and (weak := [name for name, options in guiders.items() if "layers" in options]):
            raise RequestError(f"{weak[0]} is given but changes attention, whose tokens the processes share: leave it or parallel out")
        tuned = request.approximate is None  # what was not asked for is no reason to refuse a request
        approximate = decided_alone(approximate, (lambda problem: notes.append(f"tuned, but left alone: {problem}")) if tuned else refuse,
                                    way=machine.parallel.way)
        notes += machine.parallel.idle(request.batch * (sides if guided else prompt.composed))
    if machine.speed == GRAPHS and approximate:
        problem = ("approximate is given but speed is 'graphs', which repeats whole calls of the network: "
                   "load the model with another speed, or leave approximate out")
        refuse(problem) if request.approximate is not None else notes.append(f"tuned, but left alone: {problem}")
        approximate = {}
    together = request.batch if machine.device != "cpu" and not any(APPROXIMATIONS[name].adaptive for name in approximate) else 1
    image_scale = defaults.image_guidance_scale if request.image_guidance_scale is None else request.image_guidance_scale
    return Plan(
        request=request, model=machine.model, task=request.task, passes=passes,
        noise=seeds_of(request, family.latent, refuse), sampler=request.sampler or defaults.sampler,
        spacing=request.spacing or defaults.spacing, options=options, guidance_scale=guiding.scale, cfg_scale=guiding.cfg,
        image_guidance_scale=image_scale,
        guidance_rescale=rescale if guiding.any else 0.0, guidance_interval=(low, high), guiders=guiders, prompt=prompt, negative=negative,
        empty=empty,
        weighting=resolved(request), batching="off" if not guided else "several" if several else {2: "pair", 3: "triple"}[sides],
        rows=together, dtype=machine.dtype, device=machine.device, residency=machine.residency, speed=machine.speed, weights=machine.weights,
        notes=tuple(notes), approximate=approximate, parallel=machine.parallel, ways=machine.ways, quantise=machine.ways[0],
        attention=machine.attention, references=references)
