"""Going on with an interrupted run: which model it needs, and whether a pipeline is that. Knows states and the public face of a pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentgen.errors import RequestError
from latentgen.models.quantise.ways import CHOICES
from latentgen.run.meaning import origin_told, together
from latentgen.run.memory.ladder import holding
from latentgen.run.recipe import Recipe, make_recipe, speed_of
from latentgen.run.residency import POLICIES
from latentgen.run.state import Keeper, State, begun, checked_every, checked_path, read_state

if TYPE_CHECKING:
    from latentgen.run.pipeline import OnStep, Pipeline
    from latentgen.run.plan import Plan
    from latentgen.run.result import Result


def resume(state: State | str | Path, *, on_step: OnStep | None = None, save_every: int | None = None, classifier: Any = None,
           progress: bool | None = None, **loading: Any) -> Result:
    """Load the model of an interrupted run by its name, and go on to the very bytes that the run would have ended with.

    Args:
        state: the file that `save_state=` named.
        on_step, save_every, classifier, progress: see `Pipeline.resume`; the file is written on.
        loading: see `latentgen.load`; device and dtype are those of the run where they are left out.

    Raises:
        RequestError: the file is damaged, or its model was a folder or file, which it does not name: load that and call `pipe.resume`.
        ModelError: see `latentgen.load`.
    """
    from latentgen.run.pipeline import load

    found = state if isinstance(state, State) else read_state(state)
    pipe = load(named_model(found), progress=progress, **as_it_was(found) | loading)
    return pipe.resume(found, on_step=on_step, save_every=save_every, classifier=classifier)


def named_model(state: State) -> str:
    """What to load: the name of a card or of a repository on the hub.

    Raises:
        RequestError: the run's model was a folder or file, and a state names no paths.
    """
    from latentgen.models import hub
    from latentgen.models.card import cards

    name = str(state.recipe.get("model", ""))
    if name in cards() or hub.parse(name) is not None:
        return name
    raise RequestError(f"the run was begun with the model {name[:80]!r} (weights {str(state.recipe.get('weights'))[:40]}), which no card names: "
                       "load it from where it is and call pipe.resume(state), or name it with --model")


def as_it_was(state: State) -> dict[str, Any]:
    """Device, dtype, speed, and how weights were held and where, in the run, as `load` takes them."""
    dtype = state.recipe.get("dtype")
    known = dtype in ("float32", "bfloat16", "float16")
    way, residency = state.recipe.get("quantise"), state.recipe.get("residency")
    return {"device": "cpu" if state.recipe.get("device") == "cpu" else "auto", "dtype": str(dtype) if known else "auto", **speed_of(state.recipe),
            "quantise": way if way in CHOICES else None, "residency": residency if residency in POLICIES else "resident"}


def kept(pipe: Pipeline, plan: Plan, path: str | Path, every: int | None) -> Keeper:
    """What keeps the state of a run of this plan in a file.

    Raises:
        RequestError: the plan leaves things out that a network remembers from step to step, which no file keeps, or its pictures have different
            texts and latents each of their own. And see `begun`.
    """
    if plan.approximate:
        raise RequestError(f"save_state is given with approximate ({', '.join(plan.approximate)}), whose memory of earlier steps cannot be kept: "
                           "leave one of them out")
    if plan.pictures and plan.request.latents is not None:
        raise RequestError("save_state is given but wildcards draw different texts for the latents of this batch: make them one by one, "
                           "or leave it out")
    return Keeper(begun(path, plan.request, every=every, total=plan.steps), lambda: make_recipe(plan, pipe.checkpoint.digest, ()))


def resumed(pipe: Pipeline, state: State, path: str | Path | None, every: int | None) -> tuple[Plan, Keeper]:
    """The plan of an interrupted run, with notes on what is no longer as it was, and what answers for it as far as it came.

    Raises:
        RequestError: the pipeline is another one, or the file was altered.
    """
    plan = holding(_planned(pipe, state), state.recipe.get("quantise"))
    notes = state.check(make_recipe(plan, pipe.checkpoint.digest, ()))
    state = replace(state, every=checked_every(state.every if every is None else every), path=state.path if path is None else checked_path(path))
    return replace(plan, notes=(*plan.notes, *notes)), Keeper(state, lambda: state.recipe)


def _planned(pipe: Pipeline, state: State) -> Plan:
    """The plan of a state's recipe: of one request, or of pictures with texts of their own."""
    cells = Recipe(state.recipe).cells
    plans = [replace(pipe.plan(cell.request(**state.pictures)), origin=origin_told(cell.data)) for cell in cells or (Recipe(state.recipe),)]
    if not cells:
        return plans[0]
    noise = [plan.noise for plan in plans]
    varied = tuple(seed for one in noise for seed in one.variations) or None
    whole = plans[0].request.replace(batch=len(plans), seed=tuple(seed for one in noise for seed in one.own), variation_seed=varied)
    return together(plans, whole, pipe.family, [note for plan in plans for note in plan.notes])
