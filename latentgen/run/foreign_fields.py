"""What another program's file comes to here: fields of a Request, and notes on the rest. Knows names and units; no file format.

A value is taken over only where a `Request` takes it; what is left out, and why, is always a note.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from latentgen.diffusion.sample import SAMPLERS
from latentgen.diffusion.schedule import SPACINGS
from latentgen.errors import RequestError
from latentgen.run.request import Request

_NETWORKS = re.compile(r"<(lora|lyco|hypernet):([^:<>]{1,200})(?::[^<>]{0,80})?>")
_RAMPS = ("karras", "exponential")
_SAMPLERS = {  # spelt as `_plain` does, without the words that name a spacing
    "eulera": "euler_ancestral", "keuler": "euler", "keulera": "euler_ancestral", "eulerdiscrete": "euler", "eulerancestraldiscrete": "euler_ancestral",
    "flowmatcheulerdiscrete": "euler", "heundiscrete": "heun", "kheun": "heun", "dpm2m": "dpmpp_2m", "dpmsolvermultistep": "dpmpp_2m", "kdpmpp2m": "dpmpp_2m",
    "dpmpp2msdegpu": "dpmpp_2m_sde", "flow": "euler",
}
_SPACINGS = {"uniform": "linspace", "normal": "linspace", "sgmuniform": "trailing", "ddimuniform": "leading", "ddim": "leading"}


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
        return Request(**({"prompt": ""} | dict(self.fields) | changes))

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

    def take(self, name: str, value: Any, kind: Callable[[Any], Any] | None = None, *, said: str = "") -> bool:
        """Take a value over as the field `name`, converted by `kind`; False, with a note, where a request would not take it.

        said: what the other program calls it, for the note.
        """
        if value is None:
            return False
        try:
            if name not in Request.model_fields:
                raise RequestError("this latentgen has no equivalent")
            value = kind(value) if kind is not None else value
            Request(**({"prompt": ""} | {name: value}))
        except (RequestError, ValueError, TypeError, OverflowError) as error:
            why = str(error).removeprefix(f"{name} is ") if isinstance(error, RequestError) else "it is not a number"
            self.note(f"{said or name} {_short(value)} was not taken over: {why}")
            return False
        self.fields[name] = value
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

    def take_sampler(self, name: Any, spacing: Any = None, *, usual: str | None = None) -> None:
        """Take over a sampler, and its spacing where one is named, in it or beside it; `usual` is the program's own spacing where none is."""
        if not isinstance(name, str) or not name.strip():
            return
        sampler, inside = foreign_sampler(name)
        if sampler is None:
            self.note(f"sampler {_short(name)} has no equivalent here: the model's own is used")
        else:
            self.take("sampler", sampler)
        said = spacing if isinstance(spacing, str) and spacing.strip() and _plain(spacing) != "automatic" else None
        chosen = foreign_spacing(said) if said else inside or usual
        if said and chosen is None:
            self.note(f"schedule {_short(said)} has no equivalent here: the model's own spacing is used")
        elif chosen is not None:
            self.take("spacing", chosen)

    def take_prompts(self, prompt: Any, negative: Any = None) -> None:
        """Both prompts, letter by letter, with a note on each network and embedding that they call."""
        for name, text in (("prompt", prompt), ("negative_prompt", negative)):
            if isinstance(text, str) and (text or name == "prompt") and self.take(name, text):
                for kind, network in _NETWORKS.findall(text)[:50]:
                    self.note(f"the {name.replace('_', ' ')} calls the {kind} {_short(network)}, which is not loaded")

    def done(self) -> Foreign:
        """What was gathered."""
        return Foreign(self.tool, dict(self.fields), tuple(self.notes), self.model, tuple(self.needs))


def foreign_sampler(name: str) -> tuple[str | None, str | None]:
    """(sampler, spacing) that another program's name for a sampler means here; None for what it does not tell or we do not have."""
    plain = _plain(name)
    spacing = next((word for word in _RAMPS if word in plain), None)
    plain = plain.removesuffix("scheduler")
    for word in _RAMPS:
        plain = plain.replace(word, "")
    if name.lower().endswith("_k"):  # InvokeAI's mark of Karras' spacing
        plain, spacing = plain.removesuffix("k"), "karras"
    ours = {_plain(own): own for own in SAMPLERS}
    return ours.get(plain) or _SAMPLERS.get(plain), spacing


def foreign_spacing(name: str) -> str | None:
    """The spacing that another program's name for a schedule means here, None for one that we do not have."""
    plain = _plain(name)
    ours = {_plain(own): own for own in SPACINGS}
    found = ours.get(plain) or _SPACINGS.get(plain)
    return found if found in SPACINGS else None


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


def base_name(name: Any) -> str:
    """The last part of a path of any system: what may be shown."""
    return re.split(r"[\\/]", str(name))[-1][:120]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower().replace("+", "p") if letter.isalnum())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
