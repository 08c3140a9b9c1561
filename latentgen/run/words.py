"""What a planned text becomes for the denoiser: encoded, weighed and chosen by level.

Knows texts and conditionings; knows no family and no sampler.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from latentgen.conditioning.prompt import PromptChunks, silent
from latentgen.conditioning.weighting import Listener, Weigh, Weighing, unweighted, weights_of
from latentgen.models.family import Conditioning, Side, Words
from latentgen.pixels.image import to_tensor
from latentgen.run.batch import alike, blended, fingerprint, tensors
from latentgen.run.guard import check_words, once_more

if TYPE_CHECKING:
    from latentgen.conditioning.tokens import Tokens
    from latentgen.diffusion.level import Level
    from latentgen.models.family import Family
    from latentgen.run.memo import Memo
    from latentgen.run.plan import Plan
    from latentgen.run.residency import Residency

SIDES: Mapping[str, tuple[Side, ...]] = {"off": ("positive",), "pair": ("positive", "negative"), "triple": ("positive", "negative", "none")}


@dataclass(frozen=True)
class Said:
    """What the evaluations of a step are given.

    Attributes:
        prompts: those that AND joins, most times one, each of batch 1; `weights` of them.
        others: then the negative prompt, and where a picture guides too, neither words nor picture, or the empty prompt where a guider asks for it.
    """

    prompts: tuple[Conditioning, ...]
    weights: tuple[float, ...]
    others: tuple[Conditioning, ...]

    @property
    def every(self) -> list[Conditioning]:
        """All, in the order in which they are evaluated."""
        return [*self.prompts, *self.others]

    @cached_property
    def together(self) -> bool:
        """Whether they can be one batch."""
        return alike(self.every)


@dataclass(frozen=True)
class Script:
    """What is said when: the `Said` of each planned step of the first pass, chosen by noise level, so that a denoiser stays a function of x and
    level.

    A sampler that looks between two levels hears what is said at the noisier of them.
    """

    marks: tuple[float, ...]  # half log-SNR of the planned levels, rising
    steps: tuple[Said, ...]

    def at(self, level: Level) -> Said:
        """What is said at a level."""
        return self.steps[max(0, bisect_right(self.marks, level.half_log_snr) - 1)]


@dataclass(frozen=True)
class Speaker:
    """Encodes the texts of one plan; what it was told is remembered in `memo` by value."""

    family: Family
    tokenizers: Mapping[str, Tokens]
    residency: Residency
    memo: Memo
    plan: Plan
    notes: list[str]

    def script(self, inputs: Callable[[Side], Mapping[str, Tensor]]) -> Script:
        """Every text that is said in the steps of the first pass, encoded; later passes, which have other inputs, say it at the same noise.

        Args:
            inputs: side -> further entries of `Conditioning.extra`.
        """
        plan, run = self.plan, self.plan.passes[0]
        guides = "triple" if self.family.guidance == "image" and plan.references else "pair"
        sides: tuple[Side | Literal["empty"], ...] = SIDES["off" if plan.batching == "off" else guides]
        sides += ("empty",) if plan.empty is not None else ()
        texts = {"positive": plan.prompt, "empty": plan.empty or plan.negative}
        said = {side: texts.get(side, plan.negative) for side in sides}
        spans = [tuple(text.at(run.first_step + n) for text in said.values()) for n in range(run.steps)]
        towards = [plan.prompt.towards.at(run.first_step + n) if plan.prompt.towards else None for n in range(run.steps)]
        heard = {(side, id(one)): one for row in spans for side, span in zip(sides, row, strict=True) for one in span.conjuncts}
        heard |= {("positive", id(one)): one for span in towards if span for one in span.conjuncts}
        worded = {key: self.encoded(one.chunks, key[0]) for key, one in heard.items()}
        for side in sides:
            extra = {name: tensor.to(self.residency.device) for name, tensor in inputs("negative" if side == "empty" else side).items()}
            worded |= {key: replace(c, extra={**c.extra, **extra}) for key, c in worded.items() if key[0] == side and extra}
        made: dict[tuple[int, ...], Said] = {}
        steps = []
        for row, other in zip(spans, towards, strict=True):
            key = (*map(id, row), id(other))
            if key not in made:
                first, *others = row
                prompts = tuple(worded["positive", id(one)] for one in first.conjuncts)
                if other is not None:
                    prompts = (blended(prompts[0], worded["positive", id(other.conjuncts[0])], plan.prompt.share),)
                made[key] = Said(prompts, tuple(one.weight for one in first.conjuncts),
                                 tuple(worded[side, id(span.conjuncts[0])] for side, span in zip(sides[1:], others, strict=True)))
            steps.append(made[key])
        return Script(tuple(level.half_log_snr for level in run.levels[:-1]), tuple(steps))

    def encoded(self, chunks: Mapping[str, PromptChunks], side: Side | Literal["empty"]) -> Conditioning:
        """One text through the encoders with its weights, or from the memo; a weight that no states went through is noted.

        The side "empty" is a negative one beside the negative prompt, on which nothing was said.
        """
        said: Side = "positive" if side == "positive" else "negative"
        weights, rule = weights_of(chunks), self.plan.weighting
        request = self.plan.request
        empty = said == "negative" and (side == "empty" or not any((request.negative_prompt, request.negative_prompt_2, request.negative_prompt_3)))

        def make() -> tuple[Conditioning, tuple[str, ...]]:
            if not weights:
                return self._encode(chunks, said, empty, unweighted)
            weigh = Weighing(rule, weights, self._silence(chunks, said) if rule == "comfy" else {})  # type: ignore[arg-type]
            made, notes = self._encode(chunks, said, empty, weigh)
            deaf = (f"weights say nothing to {reader}, whose pooled vector alone is used" for reader in weights if reader not in weigh.heard)
            return made, (*notes, *deaf)

        weighed = (rule, tuple((reader, laid.weights) for reader, laid in chunks.items())) if weights else None
        made, notes = self.memo.get((*self._key("text", chunks, said), empty, weighed), make, lambda value: tensors(value[0]))
        self.notes.extend(note for note in notes if note not in self.notes)
        return made

    def _silence(self, chunks: Mapping[str, PromptChunks], said: Side) -> Mapping[str, Tensor]:
        """Tokenizer name -> states of the empty prompt, which ComfyUI weighs against."""
        none = {reader: silent(laid, self.tokenizers[reader]) for reader, laid in chunks.items()}

        def make() -> dict[str, Tensor]:
            listener = Listener()
            self._encode(none, said, False, listener)
            return listener.heard

        return self.memo.get(self._key("silence", none, said), make, lambda heard: list(heard.values()))

    def _key(self, kind: str, chunks: Mapping[str, PromptChunks], said: Side) -> tuple[object, ...]:
        ids = tuple((reader, laid.ids) for reader, laid in chunks.items())
        return kind, ids, said, self.plan.quantise, self._skip, tuple(map(fingerprint, self._seen))

    @property
    def _skip(self) -> int:
        """clip_skip, where the encoder has such a layer; the plan has noted it where not."""
        skip = self.plan.request.clip_skip
        return skip if skip <= self.family.clip_skip else 1

    @property
    def _seen(self) -> Sequence[object]:
        """The pictures that the text encoder looks at."""
        return self.plan.references if self.family.reads_pictures else ()

    def _encode(self, chunks: Mapping[str, PromptChunks], said: Side, empty: bool, weigh: Weigh) -> tuple[Conditioning, tuple[str, ...]]:
        """One text through the encoders, in float32 once more where they overflow, with a note about that."""
        device = self.residency.device
        ids = {name: torch.tensor(laid.ids, device=device) for name, laid in chunks.items()}
        mask = {name: torch.tensor(laid.mask, device=device) for name, laid in chunks.items()}
        seen = tuple(to_tensor(picture) for picture in self._seen)

        def encoded(dtype: torch.dtype) -> Conditioning:
            heard: dict[str, Tensor] = {}

            def listened(reader: str, states: Tensor) -> Tensor:
                heard[reader] = states
                return weigh(reader, states)

            with self.residency.use("text", dtype=dtype, policy=self.plan.residency, quantise=self.plan.quantise) as modules, torch.no_grad():
                made = self.family.encode(modules, Words(ids, mask, said, empty, self._skip, seen, listened))
            check_words(heard, made.tokens, made.pooled, dtype)
            return made

        return once_more("the words were encoded", encoded, self.residency.dtype)
