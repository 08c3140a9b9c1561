"""The words of a request, planned: read in their dialect, laid out for every encoder, by step. Knows tokenizers and steps; runs no encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from latentgen.conditioning.dialect import Parsed, parse
from latentgen.conditioning.explain import Explanation
from latentgen.conditioning.explain import explain as explained
from latentgen.conditioning.prompt import LaidSpan, PromptChunks, laid_spans, level_spans
from latentgen.errors import RequestError

if TYPE_CHECKING:
    from latentgen.conditioning.tokens import Tokens
    from latentgen.conditioning.weighting import Rule
    from latentgen.models.family import Family
    from latentgen.run.request import Request

SHOWN = 8  # stretches of steps that a plan prints
SHORT = 60  # letters of a prompt that it prints of each


@dataclass(frozen=True)
class PlannedText:
    """A text as every encoder will read it.

    Attributes:
        text: what was said, letter by letter.
        parsed: how it was read.
        spans: what is said when; steps are counted over the whole run, of which an edit runs the last ones.
        towards: another text, towards which this one is turned by `share`, above 0 and below 1; None for most.
    """

    text: str
    parsed: Parsed
    spans: tuple[LaidSpan, ...]
    towards: PlannedText | None = None
    share: float = 0.0

    @property
    def chunks(self) -> Mapping[str, PromptChunks]:
        """Tokenizer name -> chunks of token ids of the first prompt that is said; for most texts the only one."""
        return self.spans[0].conjuncts[0].chunks

    @property
    def ids(self) -> tuple[tuple[int, ...], ...]:
        """Chunks of the first tokenizer."""
        return next(iter(self.chunks.values())).ids

    @property
    def tokens(self) -> int:
        """How many ids of the first tokenizer are words."""
        return next(iter(self.chunks.values())).tokens

    @property
    def weighted(self) -> bool:
        """Whether any word has a weight."""
        return any(chunks.weighted for span in self.spans for one in span.conjuncts for chunks in one.chunks.values())

    @property
    def composed(self) -> int:
        """How many prompts AND joins, 1 for most."""
        return len(self.spans[0].conjuncts)

    def at(self, step: int) -> LaidSpan:
        """What is said in a step, counted from 1; before the first and after the last as in these."""
        return next((span for span in self.spans if step <= span.last), self.spans[-1])

    def __str__(self) -> str:
        """"5 tokens in 1 chunk(s)", or what is said when."""
        if self.towards is not None:
            return f"{replace(self, towards=None)}, turned by {self.share:g} towards {_said((1, next(iter(self.towards.chunks.values()))))}"
        if len(self.spans) == self.composed == 1:
            return f"{self.tokens} tokens in {len(self.ids)} chunk(s)"
        rows = []
        for span in self.spans[:SHOWN]:
            when = f"step {span.first}" if span.first == span.last else f"steps {span.first} to {span.last}"
            rows.append(f"{when}: " + " AND ".join(map(_said, ((one.weight, next(iter(one.chunks.values()))) for one in span.conjuncts))))
        more = len(self.spans) - SHOWN
        return "; ".join(rows + ([f"and {more} more"] if more > 0 else []))


def resolved(request: Request) -> Rule:
    """The rule by which weights are read: as said, else that of the dialect's own program."""
    return request.weighting or ("comfy" if request.dialect == "comfy" else "a1111")  # type: ignore[return-value]


def plan_texts(request: Request, family: Family, tokenizers: Mapping[str, Tokens], *, steps: int, guided: bool, refuse: Callable[[str], None],
               notes: list[str], empty: bool = False) -> tuple[PlannedText, PlannedText, PlannedText | None]:
    """Both texts as every encoder reads them, with as many chunks of one as of the other where both are used, and the empty one where it is asked
    for.

    Args:
        steps: of the whole run, of which an edit runs the last ones.
        guided: there is a second evaluation, with the negative prompt.
        refuse: is given what cannot be honoured.
        empty: there is a third evaluation, with nothing said.

    Raises:
        RequestError: a text that is too long, or texts that do not fit to each other.
    """
    others = _others(request, family, tokenizers, refuse)

    def read(side: str, text: str) -> PlannedText:
        joined = side != "negative_prompt"
        parsed = parse(text, request.dialect, name=side, composed=joined)  # type: ignore[arg-type]
        if len(parsed.parts) > 1 and not guided:
            refuse(f"{side} joins {len(parsed.parts)} prompts by AND but guidance is off, and they are weighed against the negative prompt: "
                   "raise guidance_scale (true_cfg_scale where guidance is built in), or write one prompt")
            joined = False
            parsed = parse(text, request.dialect, name=side, composed=False)  # type: ignore[arg-type]
        own = _own(request, "prompt" if side == "blend_prompt" else side, others, composed=joined and len(parsed.parts) > 1)
        notes.extend(note for one in (parsed, *own.values()) for note in one.notes)
        return PlannedText(text, parsed, laid_spans(parsed, tokenizers, steps=steps, name=side, texts=own, strict=request.strict, notes=notes))

    prompt, negative = read("prompt", request.prompt), read("negative_prompt", request.negative_prompt)
    share = _share(request, refuse)
    towards = read("blend_prompt", request.blend_prompt or "") if share else None
    if share == 1:  # the other end, exactly as if it were said alone
        prompt, towards = towards, None
    nothing = parse("", request.dialect)  # type: ignore[arg-type]
    silence = PlannedText("", nothing,
                          laid_spans(nothing, tokenizers, steps=steps, name="the empty prompt", strict=request.strict, notes=[])) if empty else None
    used = [prompt, *([negative] if guided else []), *([silence] if silence else []), *([towards] if towards else [])]
    used = [replace(text, spans=spans) for text, spans in zip(used, level_spans([text.spans for text in used], tokenizers), strict=True)]
    prompt, negative, silence = used[0], used[1] if guided else negative, used[2] if silence else None
    if towards is not None:
        _check_blend(prompt, used[-1])
        prompt = replace(prompt, towards=used[-1], share=share)
    if not request.prompt.strip():
        notes.append("the prompt is empty: the picture is unconditional")
    if len(prompt.ids) > 1:
        notes.append(f"the prompt has {prompt.tokens} tokens and is read in {len(prompt.ids)} chunks of {len(prompt.ids[0]) - 2}")
    return prompt, negative, silence


def _share(request: Request, refuse: Callable[[str], None]) -> float:
    """How far the prompt is turned towards blend_prompt."""
    if request.blend_prompt is None:
        if request.blend is not None:
            refuse(f"blend is {request.blend:g} but there is no blend_prompt to turn the prompt towards: give one, or leave blend out")
        return 0.0
    return 0.5 if request.blend is None else request.blend


def _check_blend(prompt: PlannedText, towards: PlannedText) -> None:
    """RequestError where there is no way between two texts."""
    if prompt.composed > 1 or towards.composed > 1:
        raise RequestError("prompt or blend_prompt joins prompts by AND, and only one text can be turned towards one: write them without AND, "
                           "or leave blend_prompt out")
    lengths = [{reader: {len(row) for row in chunks.ids} for span in text.spans for reader, chunks in span.conjuncts[0].chunks.items()}
               for text in (prompt, towards)]
    for reader, own in lengths[0].items():
        if own != lengths[1][reader]:
            raise RequestError(f"prompt has {max(own)} tokens for {reader} and blend_prompt {max(lengths[1][reader])}, "
                               "and this model reads each text at its own "
                               "length, so that no token of one stands for one of the other: write texts of as many tokens, "
                               "or leave blend_prompt out")


def explain_text(request: Request, tokenizers: Mapping[str, Tokens], *, steps: int) -> Explanation:
    """What the prompt of a request says to each encoder.

    Raises:
        RequestError: more text than any request may have, or texts that do not fit to each other.
    """
    parsed = parse(request.prompt, request.dialect)  # type: ignore[arg-type]
    own = _own(request, "prompt", [name for name in tokenizers if name != next(iter(tokenizers))], composed=len(parsed.parts) > 1)
    return explained(parsed, tokenizers, steps=steps, texts=own)


def _others(request: Request, family: Family, tokenizers: Mapping[str, Tokens], refuse: Callable[[str], None]) -> list[str]:
    """The tokenizers that a second or third text is for."""
    others = [name for name in (f"tokenizer_{n}" for n in (2, 3)) if name in list(tokenizers)[1:]]  # the first reads the prompt itself
    for n in (2, 3):
        for field in (f"prompt_{n}", f"negative_prompt_{n}"):
            if getattr(request, field) and f"tokenizer_{n}" not in others:
                refuse(f"{field} is given but {family.name} here has no text encoder that would read it: leave it out")
    if request.clip_skip > family.clip_skip:
        problem = f"clip_skip is {request.clip_skip} but {family.name}"
        refuse(f"{problem} reads no layer of CLIP that could be chosen: leave it out" if family.clip_skip == 1 else
               f"{problem} here has layers for 1 to {family.clip_skip}: give one of these")
    return others


def _own(request: Request, side: str, readers: list[str], *, composed: bool) -> dict[str, Parsed]:
    """Tokenizer name -> what it hears instead of the first text."""
    fields = {reader: side + reader.removeprefix("tokenizer") for reader in readers}
    return {reader: parse(text, request.dialect, name=field, composed=composed)  # type: ignore[arg-type]
            for reader, field in fields.items() if (text := getattr(request, field, ""))}


def _said(one: tuple[float, PromptChunks]) -> str:
    weight, chunks = one
    return ("" if weight == 1 else f"{weight:g} ") + f"{short(chunks.text)} ({chunks.tokens} tokens)"


def short(text: str) -> str:
    """A text in one line, in quotes, cut where it is long."""
    text = " ".join(text.split())
    return repr(text if len(text) <= SHORT else text[:SHORT - 3] + "...")
