"""recipe, replay, variations and resume: how a picture was made, it or one near it again, the rest of a run. Knows what is printed; run/ works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentgen.cli.options import KEEP, MACHINE, OUTPUT, PARALLEL, opened, takes
from latentgen.errors import OutputError, RequestError

if TYPE_CHECKING:
    from latentgen.run.pipeline import Run
    from latentgen.run.recipe import Foreign, Recipe

EXAMPLES = {
    "recipe": "Example:  latentgen recipe heart.png",
    "replay": "Example:  latentgen replay heart.png",
    "variations": "Example:  latentgen variations heart.png --count 4 --amount 0.15",
    "resume": "Example:  latentgen resume run.state -o heart.png",
}
File = Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP as it was saved.", metavar="PICTURE", show_default=False)]
Kept = Annotated[Path, typer.Argument(help="The file that --save-state named.", metavar="STATE", show_default=False)]
Every = Annotated[int | None, typer.Option("--save-every", help="How many steps lie between two savings. Default: as before.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]
_PICTURES = "What it was made from"
Source = Annotated[Path | None, typer.Option("--image", help="The picture that it was redrawn from.", rich_help_panel=_PICTURES, metavar="FILE")]
Mask = Annotated[Path | None, typer.Option("--mask", help="Its mask.", rich_help_panel=_PICTURES, metavar="FILE")]
Reference = Annotated[list[Path] | None, typer.Option("--reference", help="The picture that the model looked at; may be said several times.",
                                                      rich_help_panel=_PICTURES, metavar="FILE")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Keep the new picture in this file, .png, .jpg or .webp.", metavar="FILE")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; print one word.")]
Count = Annotated[int, typer.Option("--count", "-n", help="How many, 1 to 64.")]
Amount = Annotated[float, typer.Option("--amount", help="How far from it: above 0, the same, to 1, another picture.")]
Words = Annotated[str | None, typer.Option("--prompt", help="Other words than the recipe's, or words for a picture without one.", metavar="TEXT")]
Anyway = Annotated[bool, typer.Option("--anyway", help="Make the nearest picture where another program made this one.")]
_OWN = {"model": None, "device": None, "dtype": None, "speed": None, "residency": None}  # left out, they are as the recipe says
_USUAL = {p.name: p.default for p in MACHINE if p.name in _OWN}
AS_IT_WAS = tuple(p.replace(default=None) if p.name in _OWN else p for p in MACHINE)


def recipe(file: File, as_json: AsJson = False) -> None:
    """Tell how a picture was made, as its file says: by latentgen, or by A1111, Forge, SD.Next, ComfyUI, InvokeAI or diffusers.

    Exit code 0: it says so. 2: it says nothing, or is no picture.
    """
    from latentgen.run.recipe import as_recipe

    found = as_recipe(file)
    typer.echo(json.dumps(_data(found), ensure_ascii=False, indent=1) if as_json else _table(found))


@takes(AS_IT_WAS)
def replay(file: File, image: Source = None, mask: Mask = None, reference: Reference = None, output: Output = None, anyway: Anyway = False,
           as_json: AsJson = False, quiet: Quiet = False, **said: Any) -> None:
    """Make a picture again from the recipe in its file, and say "identical" or what differs.

    Where they are left out, the model (by its card's name), device, number type, speed and how weights are held are those of the recipe. The new
    picture is kept only with -o.
    Exit code 0: identical. 1: different. 2: it has no recipe, or something is wrong with it.
    """
    from latentgen.run.recipe import Foreign, as_recipe
    from latentgen.run.replay import replay as again

    found = as_recipe(file)
    _check_output(output, film="film" in getattr(found, "data", {}))
    if isinstance(found, Foreign) and not anyway:
        raise RequestError(f"{found.tool} made this picture, which cannot be made again exactly: `latentgen recipe` shows what it says, "
                           "and --anyway makes the nearest picture")
    pipe = opened(_as_it_was(said, found), progress=False if quiet else None)
    done = again(pipe, found if isinstance(found, Foreign) else file, anyway=anyway, image=image, mask=mask, reference=reference or None)
    files = [str(f) for f in done.result.save(output)] if done.result is not None and output is not None else []
    if as_json:
        typer.echo(json.dumps({"identical": done.identical, "differences": list(done.differences), "files": files}, ensure_ascii=False, indent=1))
    else:
        lines = str(done).splitlines()
        typer.echo("\n".join([*map(_cell, lines[:1] if quiet else lines), *files]))
    if not done.identical:
        raise typer.Exit(1)


@takes(AS_IT_WAS, PARALLEL, OUTPUT, KEEP)
def variations(file: File, count: Count = 4, amount: Amount = 0.2, prompt: Words = None, image: Source = None, mask: Mask = None,
               reference: Reference = None, *, quality: int | None, save_state: Path | None, save_every: int | None, **said: Any) -> None:
    """Make pictures near to one: by the recipe in its file with other noise, or redrawn where it has none.

    Where they are left out, the model (by its card's name), device and number type are those of the recipe, or the usual ones.
    """
    from latentgen.cli.pictures import check_output, make
    from latentgen.run.many.variations import found_in, plan_variations

    shown = {name: said.pop(name) for name in ("output", "show", "quiet", "as_json")}
    quality = check_output(shown["output"], quality, strict=True)
    sources = {"image": image, "mask": mask, "reference": reference or None, "prompt": prompt}
    sources = {name: given for name, given in sources.items() if given is not None}
    found = found_in(file)
    machine = _as_it_was(said, found) if found is not None else said | {name: said[name] or usual for name, usual in _USUAL.items()}
    loading = machine["model"]

    def begin() -> Run:
        pipe = opened(machine, progress=False if shown["quiet"] else None)
        return pipe.stream(plan_variations(pipe, file, count=count, amount=amount, **sources), save_state=save_state, save_every=save_every)

    make(begin, loading=loading, quality=quality, state=save_state, **shown)


@takes(AS_IT_WAS, OUTPUT)
def resume(state: Kept, save_every: Every = None, *, quality: int | None, **said: Any) -> None:
    """Go on with a run that --save-state kept, to the very picture that it would have made.

    Where they are left out, the model (by its card's or the hub's name), device and number type are those of the run.
    """
    from latentgen.cli.pictures import check_output, make
    from latentgen.run.resume import as_it_was, named_model
    from latentgen.run.state import read_state

    shown = {name: said.pop(name) for name in ("output", "show", "quiet", "as_json")}
    quality = check_output(shown["output"], quality, strict=True)
    found = read_state(state)
    said |= {name: value for name, value in as_it_was(found).items() if said[name] is None}
    said["model"] = said["model"] or named_model(found)
    loading = said["model"]

    def begin() -> Run:
        return opened(said, progress=False if shown["quiet"] else None).stream(found, save_every=save_every)

    make(begin, loading=loading, quality=quality, state=state, **shown)


def _check_output(output: Path | None, *, film: bool) -> None:
    """Find before anything runs what would be found when it is saved."""
    from latentgen.pixels.film import check_film
    from latentgen.pixels.save import SUFFIXES, ending

    if output is not None and film:
        check_film(output, 12)
    elif output is not None and output.suffix.lower() not in SUFFIXES:
        raise RequestError(f"the file name {output.name!r} {ending(output)}: expected .png, .jpg (.jpeg) or .webp")
    if output is not None and not output.parent.is_dir():
        raise OutputError(f"the folder {str(output.parent)!r} does not exist: make it first, or choose another")


def _as_it_was(said: dict[str, Any], found: Recipe | Foreign) -> dict[str, Any]:
    """The options of the machine, with what was left out as the recipe has it.

    Raises:
        RequestError: the recipe's model does not lie beside its card: a picture is not to start a download, and only the user knows where others are.
    """
    from latentgen.models.card import cards
    from latentgen.models.quantise.ways import CHOICES
    from latentgen.run.recipe import speed_of
    from latentgen.run.residency import POLICIES

    data = getattr(found, "data", {})
    if said["model"] is None:
        card = cards().get(found.model)
        if card is None or card.repo:
            weights = f" (weights {data['weights']})" if "weights" in data else ""
            raise RequestError(f"the picture was made with the model {found.model or 'of no name'!r}{weights}: say with --model where that is")
        said["model"] = found.model
    said["dtype"] = said["dtype"] or (data.get("dtype") if data.get("dtype") in ("float32", "bfloat16", "float16") else "auto")
    own = speed_of(data) if data else {"speed": "exact", "compile": False}
    said["speed"], said["compile"] = said["speed"] or own["speed"], said["compile"] or (said["speed"] is None and own["compile"])
    said["attention"] = said["attention"] or own.get("attention")
    said["quantise"] = said["quantise"] or (data.get("quantise") if data.get("quantise") in CHOICES else None)
    said["residency"] = said["residency"] or (data.get("residency") if data.get("residency") in POLICIES else "resident")
    said["device"] = said["device"] or ("cpu" if data.get("device") == "cpu" else "auto")
    return said


def _data(found: Recipe | Foreign) -> dict[str, Any]:
    return {"tool": found.tool, "model": found.model, "fields": dict(found.fields), "needs": list(found.needs), "notes": list(found.notes)} | (
        {"recipe": dict(found.data)} if hasattr(found, "data") else {})


def _table(found: Recipe | Foreign) -> str:
    rows = {"made by": found.tool, "model": found.model or "not told", **found.fields}
    grid = getattr(found, "data", {}).get("grid")
    if isinstance(grid, dict) and isinstance(grid.get("axes"), list):
        rows["sheet of"] = " by ".join(map(_cell, grid["axes"]))
    if isinstance(film := getattr(found, "data", {}).get("film"), dict):
        rows["film of"] = f"{film.get('frames')} frames" + (", a loop" if film.get("loop") else "")
    if found.needs:
        rows["made from"] = ", ".join(found.needs) + " (not in the file)"
    rows |= {key: value for key in ("weights", "dtype", "device") if (value := getattr(found, "data", {}).get(key))}
    return "\n".join(f"{str(name).replace('_', ' '):<18} {_cell(value)}" for name,
                     value in rows.items()) + "".join(f"\n{'note':<18} {_cell(n)}" for n in found.notes)


def _cell(value: Any) -> str:
    """A value on one line, without the control characters that a file could send to a terminal."""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isprintable() else " " for letter in text)
