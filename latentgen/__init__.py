"""latentgen: words to pictures with latent diffusion.

    import latentgen
    pipe = latentgen.load("glyph")
    pipe.txt2img("a red heart").save("heart.png")

Names are resolved when first used, so `import latentgen` itself imports neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from latentgen.importing import uncollected

if TYPE_CHECKING:
    from latentgen.models.card import cards
    from latentgen.models.clip import clip_guidance
    from latentgen.models.inspect import Report, inspect
    from latentgen.run.pipeline import Pipeline, load
    from latentgen.run.plan import Plan
    from latentgen.run.recipe import Recipe, read_recipe
    from latentgen.run.replay import Replayed
    from latentgen.run.request import Request
    from latentgen.run.result import Result
    from latentgen.run.resume import resume
    from latentgen.run.state import State, read_state

_HOMES = {
    "load": "latentgen.run.pipeline:load", "Pipeline": "latentgen.run.pipeline:Pipeline", "Request": "latentgen.run.request:Request",
    "Plan": "latentgen.run.plan:Plan", "Result": "latentgen.run.result:Result", "cards": "latentgen.models.card:cards",
    "read_recipe": "latentgen.run.recipe:read_recipe", "Recipe": "latentgen.run.recipe:Recipe",
    "resume": "latentgen.run.resume:resume", "read_state": "latentgen.run.state:read_state", "State": "latentgen.run.state:State",
    "Replayed": "latentgen.run.replay:Replayed",
    "clip_guidance": "latentgen.models.clip:clip_guidance", "inspect": "latentgen.models.inspect:inspect",
    "Report": "latentgen.models.inspect:Report",
    **{name: f"latentgen.errors:{name}"
       for name in ("LatentgenError", "RequestError", "ImageError", "ModelError", "OutputError", "NotFiniteError", "ParallelError")},
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("latentgen")
    if name not in _HOMES:
        raise AttributeError(f"module 'latentgen' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    with uncollected():
        value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
