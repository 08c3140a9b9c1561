"""What another program's file comes to here: fields of a Request, and notes on the rest. Knows names and units; no file format.

A value is taken over only where a `Request` takes it; what is left out, and why, is always a note.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from latentgen.diffusion.names import CFG_PP, SPACING_NAMES, Ours, foreign, from_diffusers, plain
from latentgen.diffusion.sample import SAMPLERS
from latentgen.diffusion.schedule import SPACINGS
from latentgen.errors import RequestError
from latentgen.run.request import Request

_NETWORKS = re.compile(r"<(lora|lyco|hypernet):([^:<>]{1,200})(?::[^<>]{0,80})?>")
DIALECTS = {"ComfyUI": "comfy", "SwarmUI": "comfy", "diffusers": "plain", "InvokeAI": "plain"}  # how a program read its prompts; others as A1111
SAMPLER_OPTIONS = "sampler_options"  # the field for what only some samplers take


@dataclass(frozen=True)
class Foreign:
    """What a picture's file says of how another program made it.

    Attributes:
        tool: the program, as far as the file tells.
        fields: fields of a `Request` that came over, each checked.
        notes: what has no equivalent, or was not understood.
        model: what the model was called there.
        needs: pictures that it was made from: "image", "mask", "reference".
    """

    tool: str
    fields: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    model: str = ""
    needs: tuple[str, ...] = ()

    def request(self, **changes: Any) -> Request:
        """The nearest request of ours, with source pictures, and whatever is to be different, in `changes`.

        Raises:
            RequestError: a change is wrong.
        """
        program = self.tool.partition(" ")[0]
        return Request(**({"prompt": "", "dialect": DIALECTS.get(program, "a1111"), "wildcards": False} | dict(self.fields) | changes))

    def noted(self, note: str) -> Foreign:
        """The same with one more note."""
        return replace(self, notes=(*self.notes, note))


@dataclass
class Found:
    """A `Foreign` while it is gathered. `take` what a request has a name for, `note` the rest."""

    tool: str
    fields: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    model: str = ""
    needs: list[str] = field(default_factory=list)
    plus: bool = False  # its sampler stands for CFG++ too

    def take(self, name: str, value: Any, kind: Callable[[Any], Any] | None = None, *, said: str = "") -> bool:
        """Take a value over as the field `name`, converted by `kind`; False, with a note, where a request would not take it.

        said: what the other program calls it, for the note.
        """
        if value is None:
            return False
        try:
            if name not in Request.model_fields:
                raise RequestError(f"{name}: there is no equivalent here")
            read = kind(value) if kind is not None else value
            Request(**({"prompt": ""} | {name: read}))
        except (RequestError, ValueError, TypeError, OverflowError) as error:
            why = str(error).partition(": ")[2] if isinstance(error, RequestError) else "it is not a number"
            self.note(f"{said or name} {_short(value)} was not taken over: {why}")
            return False
        self.fields[name] = read
        return True

    def note(self, note: str) -> None:
        """Say something, once, and no more than fifty things."""
        if note not in self.notes and len(self.notes) < 50:
            self.notes.append(note)

    def need(self, picture: str, note: str) -> None:
        """It was made from a picture, which the file does not hold."""
        if picture not in self.needs:
            self.needs.append(picture)
        self.note(note)

    def take_sampler(self, name: Any, spacing: Any = None, *, program: str | None = None, usual: str | None = None) -> None:
        """Take over a sampler, and the spacing that is named in it or beside it.

        Args:
            name: as the program calls it, or a scheduler's config as diffusers writes it.
            program: whose names they are, as `latentgen.diffusion.names` calls it.
            usual: the program's own spacing, where it names none and the sampler brings none.
        """
        ours, said = foreign_sampler(name, program), name.get("_class_name") if isinstance(name, dict) else name
        if ours is None or ours.sampler is None:
            if said:
                self.note(f"sampler {_short(said)} has no equivalent here ({ours.note if ours else 'it is not known'}): the model's own is used")
            ours = Ours()
        else:
            self.take("sampler", ours.sampler)
            self._take_options(ours)
            self.plus = ours.note == CFG_PP
            if ours.note and not self.plus:
                self.note(f"sampler {_short(said)} is {ours.sampler} here: {ours.note}")
        self._take_spacing(spacing, ours, program, usual if ours.sampler else None)

    def _take_options(self, ours: Ours) -> None:
        options = dict(ours.options)
        if "eta" in options:
            self.take("eta", options.pop("eta"), number)
        if options and SAMPLER_OPTIONS in Request.model_fields:
            self.take(SAMPLER_OPTIONS, options)
        elif options:
            self.note(f"sampler {ours.sampler} runs there with " + ", ".join(f"{name} {value}" for name, value in options.items()))

    def _take_spacing(self, said: Any, ours: Ours, program: str | None, usual: str | None) -> None:
        said = said[:80] if isinstance(said, str) and said.strip() else ""
        automatic = plain(said) == "automatic"
        found = None if automatic or not said else foreign_spacing(said, program)
        if found is not None and found.spacing is not None:
            self.take("spacing", found.spacing)
            if found.note:
                self.note(f"schedule {_short(said)} is {found.spacing} here: {found.note}")
        elif said and not automatic:
            why = found.note if found is not None else "it is not known"
            self.note(f"schedule {_short(said)} has no equivalent here ({why}): the model's own spacing is used")
        elif chosen := (ours.automatic if automatic else None) or ours.spacing or usual:
            self.take("spacing", chosen)

    def take_seamless(self, x: Any, y: Any) -> None:
        """Take over which edges meet: the left and right ones (x), the top and bottom ones (y)."""
        if x or y:
            self.take("seamless", "both" if x and y else "x" if x else "y")

    def take_prompts(self, prompt: Any, negative: Any = None) -> None:
        """Both prompts, letter by letter, with a note on each network and embedding that they call."""
        for name, text in (("prompt", prompt), ("negative_prompt", negative)):
            if isinstance(text, str) and (text or name == "prompt") and self.take(name, text):
                for kind, network in _NETWORKS.findall(text)[:50]:
                    self.note(f"the {name.replace('_', ' ')} calls the {kind} {_short(network)}, which is not loaded")

    def done(self) -> Foreign:
        """What was gathered."""
        return Foreign(self.tool, dict(self.fields), tuple(self.notes), self.model, tuple(self.needs))


def foreign_sampler(name: Any, program: str | None = None) -> Ours | None:
    """What another program's name for a sampler, or a scheduler's config, means here; None where it is not known."""
    if isinstance(name, dict):
        return from_diffusers(name)
    if not isinstance(name, str) or not name.strip():
        return None
    found = foreign(name[:80], program) or foreign(name[:80])
    return found or next((Ours(own) for own in SAMPLERS if plain(own) == plain(name[:80])), None)


def foreign_spacing(name: str, program: str | None = None) -> Ours | None:
    """What another program's name for a schedule means here; None where it is not known."""
    tables = sorted(SPACING_NAMES.items(), key=lambda pair: pair[0] != program)
    found = next((ours for _, table in tables for known, ours in table.items() if plain(known) == plain(name)), None)
    return found or next((Ours(spacing=own) for own in SPACINGS if plain(own) == plain(name)), None)


def whole(value: Any) -> int:
    """A whole number, from a number or text.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    return int(value)


def number(value: Any) -> float:
    """A number, from a number or text.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, bool):
        raise ValueError(value)
    return float(value)


def merging(value: Any) -> dict[str, dict[str, float]] | None:
    """A ratio of token merging as `approximate` has it; above 0.75 there is nothing left to merge.

    Raises:
        ValueError: no number.
    """
    ratio = min(number(value), 0.75)
    return {"token_merging": {"ratio": ratio}} if ratio > 0 else None


def base_name(name: Any) -> str:
    """The last part of a path of any system: what may be shown."""
    return re.split(r"[\\/]", str(name))[-1][:120]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
