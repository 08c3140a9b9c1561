"""What a request means before it is planned: names in our own spelling, styles laid over its texts, wildcards drawn for the seed of each picture.

Knows requests, the tables of names, a file of styles and a folder of word lists; knows no model.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentgen.conditioning.prompt import check_text
from latentgen.conditioning.wildcards import MARKS, chosen_styles, expand, read_styles, styled
from latentgen.diffusion.names import SAMPLER_NAMES, SPACING_NAMES, own
from latentgen.diffusion.sample import SAMPLERS
from latentgen.diffusion.schedule import SPACINGS
from latentgen.errors import RequestError
from latentgen.pixels.image import open_image
from latentgen.run.plan import Machine, Plan, make_plan
from latentgen.run.request import PROMPTS, Request
from latentgen.run.seeding import Seeds, seeds_of
from latentgen.run.sizing import MAX_AREA
from latentgen.run.texts import explain_text

if TYPE_CHECKING:
    from latentgen.conditioning.explain import Explanation
    from latentgen.conditioning.tokens import Tokens
    from latentgen.models.family import Family


def planned(request: Request, family: Family, tokenizers: Mapping[str, Tokens], machine: Machine) -> Plan:
    """Decide everything about a request, its words first: see `make_plan`.

    Raises:
        RequestError, ImageError: input that cannot be honoured; with strict=False contradictions become notes instead.
    """
    notes: list[str] = []
    now = meant(request, notes)
    if _draws(now) and now.seed is None:
        now = now.replace(seed=secrets.randbits(32))  # by which its words are drawn
    plans = [replace(plan, origin=origin) if (origin := _origin(request, plan.request, draws)) else plan
             for one, draws in _pictures(now, family, notes) for plan in (make_plan(_finished(one), family, tokenizers, machine),)]
    notes += [note for plan in plans for note in plan.notes]
    if len(plans) == 1:
        return plans[0] if tuple(notes) == plans[0].notes else replace(plans[0], notes=tuple(dict.fromkeys(notes)))
    return together(plans, now, family, notes)


def together(plans: Sequence[Plan], request: Request, family: Family, notes: Sequence[str]) -> Plan:
    """One plan for pictures with a plan each, whose texts differ.

    Args:
        request: for all of them, with the seeds of all.
    """
    plans = [_sharing(plan, plans[0]) for plan in plans]
    passes = max(plans, key=lambda plan: plan.evaluations).passes
    return replace(plans[0], request=request, noise=seeds_of(request, family.latent, lambda problem: None), rows=1, passes=passes,
                   notes=tuple(dict.fromkeys(notes)), origin={}, pictures=tuple(plans))


def explained(request: Request, family: Family, tokenizers: Mapping[str, Tokens]) -> Explanation:
    """What the prompt of a request says to each encoder, as it is drawn for the request's seed, its first, or 0 where it names none.

    Raises:
        RequestError: as `planned`, as far as the prompt goes; or more text than any request may have.
    """
    notes: list[str] = []
    now = meant(request, notes)
    seed = now.seed[0] if isinstance(now.seed, tuple) else now.seed or 0
    one, draws = drawn_for(now, seed, notes)
    made = explain_text(one, tokenizers, steps=now.steps or family.defaults.steps)
    return replace(made, drawn=draws, notes=tuple(dict.fromkeys((*notes, *made.notes))))


def meant(request: Request, notes: list[str]) -> Request:
    """The request with names as we write them and with its styles laid over its texts; what is odd about its wildcards is noted.

    Raises:
        RequestError: styles that are not there or not sound, or words that contradict each other.
    """
    changes: dict[str, Any] = {
        name: found for name, known, table in (("sampler", SAMPLERS, SAMPLER_NAMES), ("spacing", SPACINGS, SPACING_NAMES))
        if (said := getattr(request, name)) is not None and (found := own(said, known, table)) not in (None, said)}
    if request.styles or request.styles_file is not None:
        changes |= _styled(request) | {"styles": (), "styles_file": None}
    if request.wildcards and request.dialect == "plain":
        _contradiction(request, "wildcards is given but in the dialect 'plain' nothing is syntax: "
                                "use dialect='a1111' or 'comfy', or leave wildcards out", notes)
    return request.replace(**changes) if changes else request


def drawn_for(request: Request, seed: int, notes: list[str]) -> tuple[Request, tuple[str, ...]]:
    """The request with its wildcards drawn for the picture of a seed, and what was drawn; notes are kept once.

    Raises:
        RequestError: a word list that is missing or not sound, or too much text.
    """
    if not _draws(request):
        if request.wildcards:
            _once(notes, "wildcards is given but no text has anything to draw, as __animal__ or {red|blue} would")
        return request, ()
    folder = Path(request.wildcards) if request.wildcards else None
    found = {name: expand(text, seed=seed, folder=folder, name=name) for name, text in _texts(request).items()}
    notes += [note for one in found.values() for note in one.notes if note not in notes]
    texts = {name: check_text(one.text, name=name) for name, one in found.items()}
    return request.replace(**texts) if texts != _texts(request) else request, tuple(draw for one in found.values() for draw in one.drawn)


def _draws(request: Request) -> bool:
    """Whether anything may be drawn in its texts."""
    return request.wildcards is not False and request.dialect != "plain" and any(mark in text for text in _texts(request).values() for mark in MARKS)


def _pictures(request: Request, family: Family, notes: list[str]) -> list[tuple[Request, tuple[str, ...]]]:
    """The request of each picture and what was drawn for it; one for all of a batch where all have the same texts."""
    if not _draws(request):
        return [drawn_for(request, 0, notes)]
    seeds = seeds_of(request, family.latent, lambda problem: None)  # what contradicts them the plan tells
    drawn = [drawn_for(request, seed, notes) for seed in seeds.own]
    if all(_texts(one) == _texts(drawn[0][0]) for one, _ in drawn):
        return drawn[:1]
    opened = {} if request.image is None else {"image": open_image(request.image, max_pixels=MAX_AREA)}  # once for all of them
    drawn = [(one.replace(**opened), draws) for one, draws in drawn]
    return [(_alone(one, seeds, at), draws) for at, (one, draws) in enumerate(drawn)]


def _styled(request: Request) -> dict[str, str]:
    """The texts of a request with its styles laid over them."""
    if request.styles_file is None:
        raise RequestError(f"the style {request.styles[0]!r:.60} is asked for but there is no file of styles: pass styles_file, "
                           "a TOML with a table for each")
    known = read_styles(Path(request.styles_file))
    if not request.styles:
        there = ", ".join(map(repr, sorted(known)))[:200] or "none"
        raise RequestError(f"styles_file is given but no style of it is asked for: pass styles (there is {there}), or leave styles_file out")
    chosen = chosen_styles(request.styles, known)
    both = {name: styled(text, "", chosen)[0] if not name.startswith("negative") else styled("", text, chosen)[1]
            for name, text in ((name, getattr(request, name)) for name in PROMPTS) if text or name in PROMPTS[:2]}
    return {name: check_text(text, name=name) for name, text in both.items()}


def _contradiction(request: Request, problem: str, notes: list[str]) -> None:
    if request.strict:
        raise RequestError(problem)
    _once(notes, f"ignored: {problem}")


def _once(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)


def _texts(request: Request) -> dict[str, str]:
    """Every text that is said, by its field."""
    return {name: text for name in PROMPTS if (text := getattr(request, name)) or name == "prompt"}


def _finished(request: Request) -> Request:
    """A request in which nothing is to be drawn any more: braces in it are text, and it names no folder."""
    wild = request.wildcards is not None or any(mark in text for text in _texts(request).values() for mark in MARKS)
    return request.replace(wildcards=False) if wild and request.wildcards is not False else request


def _alone(request: Request, seeds: Seeds, at: int) -> Request:
    """The request for one picture of its batch."""
    changes: dict[str, Any] = {"seed": seeds.own[at], "batch": 1}
    changes |= {"variation_seed": seeds.variations[at]} if seeds.variations else {}
    changes |= {"latents": request.latents[at:at + 1]} if request.latents is not None else {}
    return request.replace(**changes)


def _sharing(plan: Plan, first: Plan) -> Plan:
    """The plan of one picture with the source pictures of the first one's: all have the same, and a batch may be large."""
    passes = tuple(replace(one, source=its.source) for one, its in zip(plan.passes, first.passes, strict=True))
    return replace(plan, passes=passes, references=first.references)


def _origin(said: Request, now: Request, drawn: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a recipe tells of how a picture's words came about: for information, they stand in it as they are."""
    template = {name: getattr(said, name) for name in PROMPTS if getattr(said, name) != getattr(now, name)}
    told = {"template": template, "styled_with": list(said.styles), "drawn": list(drawn)}
    return {name: value for name, value in told.items() if value}


def origin_told(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe, which may come from a file and say anything, tells of how a picture's words came about; see `Plan.origin`."""
    told = {name: recipe.get(name) for name in ("template", "styled_with", "drawn")}
    return {name: value for name, value in told.items() if isinstance(value, dict if name == "template" else list)
            and all(isinstance(text, str) for text in (value.values() if isinstance(value, dict) else value))}
