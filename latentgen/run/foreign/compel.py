"""InvokeAI's ways to join prompts, ("a", "b").blend(0.3, 0.7) and ("a", "b").and(), in this engine's words. Knows compel's syntax; no files.

A blend there is the mean of the texts' states by weights that are brought to the sum 1; a conjunction is their states one after the other, each text
in chunks of its own, which is what BREAK does.
"""

from __future__ import annotations

import math
import re
from typing import Any

from latentgen.run.foreign.fields import Found, number

_QUOTED = r'"(?:[^"\\]|\\.)*"'
_JOINED = re.compile(rf"\s*\(\s*({_QUOTED}(?:\s*,\s*{_QUOTED})*)\s*,?\s*\)\s*\.\s*(blend|and)\s*\(([^()]*)\)\s*", re.DOTALL)
_CALL = re.compile(r"\)\s*\.\s*(?:blend|and|swap)\s*\(|\w\.swap\(")
_WEIGHTS = re.compile(r'[\w)](?:\+|-){1,8}(?=[\s,.)"]|$)|\)\d*\.\d')
_SYNTAX = re.compile(r"([\\()\[\]])")
_WORDS = re.compile(r"\b(?:AND|BREAK)\b")
_MOST = 20_000  # letters of a prompt that are looked through


def take_prompts(found: Found, prompt: str, negative: Any) -> None:
    """Both prompts; two that are blended as a blend, those of a conjunction with BREAK between them, and what can be neither with a note."""
    parts, how, weights = _parts(prompt)
    if how == "blend" and len(parts) == 2 and (share := _share(weights)) is not None:
        found.take_prompts(parts[0], negative)
        if found.take("blend", share) and found.take("blend_prompt", parts[1]):
            found.note("its texts were mixed along the straight line, here they are along the sphere: the picture is near, not the same")
        prompt = ""
    elif how == "and" and _alike(weights) and not any(_WORDS.search(text) for text in (*parts, str(negative))):
        found.take("dialect", "a1111")
        found.take_prompts(" BREAK ".join(map(_escaped, parts)), _escaped(negative) if isinstance(negative, str) else None)
        prompt = ""
    else:
        found.take_prompts(prompt, negative)
    texts = [text[:_MOST] for text in (prompt, negative) if isinstance(text, str)]
    if any(_WEIGHTS.search(text) for text in texts):
        found.note("the prompt is weighted as InvokeAI weights, word++ or (words)1.2, which is not read here as weights")
    if any(_CALL.search(text) for text in texts):
        found.note('prompts are joined as InvokeAI joins them, ("a", "b").blend(0.3, 0.7), .and() or .swap(), which is read here as text')


def take_second(found: Found, name: str, text: str, *, said: str) -> None:
    """Words for a further encoder, in the dialect that the first were taken in."""
    found.take(name, _escaped(text) if found.fields.get("dialect") == "a1111" else text, said=said)


def _parts(prompt: str) -> tuple[list[str], str, list[str]]:
    """The texts of a joined prompt, how they are joined and by what; [] and "" where it is not joined, or not of plain texts."""
    match = _JOINED.fullmatch(prompt) if len(prompt) <= _MOST else None
    texts = [re.sub(r"\\(.)", r"\1", quoted[1:-1]) for quoted in re.findall(_QUOTED, match[1])] if match else []
    if match is None or any(_WEIGHTS.search(text) or _CALL.search(text) for text in texts):
        return [], "", []
    return texts, match[2], [one.strip() for one in match[3].split(",") if one.strip()]


def _share(weights: list[str]) -> float | None:
    """How much of the second text is in a blend of two; None where that is no mean."""
    try:
        first, second = map(number, weights or (1, 1))
    except ValueError:  # another number of them, or "no_normalize"
        return None
    return second / (first + second) if min(first, second) >= 0 and 0 < first + second < math.inf else None


def _alike(weights: list[str]) -> bool:
    """Whether every text of a conjunction counts once."""
    try:
        return all(number(weight) == 1 for weight in weights)
    except ValueError:
        return False


def _escaped(text: str) -> str:
    """Text that a dialect with brackets reads as it is."""
    return _SYNTAX.sub(r"\\\1", text)
