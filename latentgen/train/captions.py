"""Names for icons: slugs and codepoints to natural captions. Knows the packages' files; draws nothing.

The four steps: read every set's icon list, find each icon's codepoints, give it a natural name with keywords, and mark which icons
are held out (never trained on) or dropped (text, flags, size variants).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from latentgen.train.sources import PICTURE_SETS, PictureSet

TONES = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark"}
KEPT_TONES = {"1f3fb", "1f3ff"}  # light and dark: two of the five are enough
DROPPED_SUBGROUPS = {"keycap", "alphanum", "skin-tone", "hair-style", "country-flag", "subdivision-flag"}
TRADE_MARKS = re.compile(r"\blogo|amazon|pinterest|skype|snapchat|facebook|twitter|google|apple-|android|windows-|chrome|safari|firefox")
_TONE_WORDS = re.compile(r"-(?:medium-light|medium-dark|light|medium|dark)(?:-skin-tone)?(?=-|$)|-tone[1-5]")


@dataclass
class Icon:
    """One picture of the set. `split` is "train" or the held-out split it belongs to."""

    id: str
    set: str
    slug: str
    name: str
    style: str
    split: str = "train"
    codes: str = ""
    subgroup: str = ""
    keywords: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True)
class HeldOut:
    """The splits that training must never see, as kept in the model's held-out.json."""

    ids: dict[str, str]
    names: dict[str, str]
    recolours: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> HeldOut:
        raw = json.loads(path.read_text("utf-8"))
        ids = {i: split for split in ("comp", "tone", "style", "concept", "train_drop") for i in raw[split]}
        names = {n.lower(): split for split in ("comp", "concept") for n in raw[f"{split}_names"]}
        return cls(ids, names, frozenset(n.lower() for n in raw["recolor_heldout"]))


def natural(label: str) -> str:
    """A Unicode label as a person would say it: "man: red hair" -> "man with red hair".

    >>> natural("family: man, woman, girl")
    'family of man, woman, girl'
    """
    head, _, tail = label.replace("\u2019", "'").partition(": ")
    if not tail:
        return head
    parts = tail.split(", ")
    tones = [p for p in parts if p.endswith("skin tone")]
    tail, tone_text = ", ".join(p for p in parts if p not in tones), "".join(f", {t}" for t in tones)
    if not tail:
        return head + tone_text
    if head in ("family", "kiss", "couple with heart"):
        return f"{head} of {tail}{tone_text}"
    if tail in ("bald", "blond"):
        return f"{tail} {head}{tone_text}"
    return f"{head} with {'a ' if tail == 'beard' else ''}{tail}{tone_text}"


def icons(modules: Path, held_out: HeldOut) -> tuple[list[Icon], dict[str, dict]]:
    """Every icon worth drawing, with its name, and the iconify body of those that are SVGs (by id; webp icons carry their path).

    Args:
        modules: the node_modules folder that `sources.fetch` filled.
        held_out: ids and names that get another split than "train".
    """
    emoji = _emoji_table(modules)
    by_label = {_slug(row["name"]): code for code, row in emoji.items()}
    slug_codes = _slug_codes(modules) | by_label
    vocabulary = {w for row in emoji.values() for w in re.findall(r"[a-z]+", row["name"].lower())} | {"2", "ii"}
    kept: list[Icon] = []
    bodies: dict[str, dict] = {}
    for picture_set in PICTURE_SETS:
        seen: set[str] = set()
        for slug, codes, body in _listing(modules, picture_set):
            icon = _icon(picture_set, slug, codes or slug_codes.get(slug, ""), emoji, by_label, vocabulary)
            if icon is None or (picture_set.name == "fluent-color" and icon.name in seen):
                continue
            seen.add(icon.name)
            icon.split = held_out.ids.get(icon.id) or held_out.names.get(icon.name.lower()) or "train"
            icon.keywords = [word for word in icon.keywords if word not in held_out.names]  # a held-out name is no caption of another picture either
            kept.append(icon)
            bodies[icon.id] = body
    _hold_out_variants(kept)
    return [i for i in kept if i.split != "train_drop"], bodies


def _hold_out_variants(listed: list[Icon]) -> None:
    """What is held out as a whole (comp, concept) is so in every skin tone and direction too: decided by codepoints, not by names."""
    def bare(codes: str) -> str:
        return "-".join(p for p in codes.removesuffix("-200d-27a1").split("-") if p not in TONES)

    whole = {bare(i.codes): i.split for i in listed if i.codes and i.split in ("comp", "concept")}
    for icon in listed:
        if icon.split == "train" and icon.codes:
            icon.split = whole.get(bare(icon.codes), "train")


def _emoji_table(modules: Path) -> dict[str, dict]:
    """codes -> {name, keywords, subgroup, tone}; codes are lower-case hex joined by "-", without fe0f."""
    raw = json.loads((modules / "emojibase-data/en/data.json").read_text("utf-8"))
    groups = {s["order"]: s["key"] for s in json.loads((modules / "emojibase-data/en/messages.json").read_text("utf-8"))["subgroups"]}
    loose = json.loads((modules / "emojilib/dist/emoji-en-US.json").read_text("utf-8"))
    table: dict[str, dict] = {}
    for row in raw:
        if "subgroup" not in row:
            continue
        words = [k.replace("_", " ") for k in loose.get(row["emoji"], [])] + list(row.get("tags", []))
        keywords = sorted({w.lower() for w in words if re.fullmatch(r"[A-Za-z][A-Za-z' -]{2,30}", w)})
        for skin in [row, *row.get("skins", [])]:
            table[_codes(skin["hexcode"])] = {"name": natural(skin["label"]), "keywords": keywords, "subgroup": groups[row["subgroup"]]}
    return table


def _slug_codes(modules: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for picture_set in PICTURE_SETS:
        path = modules / picture_set.package / "chars.json"
        if picture_set.emoji and picture_set.name != "fxemoji" and path.exists():
            for code, slug in json.loads(path.read_text("utf-8")).items():
                found.setdefault(slug, _codes(code))
    return found


def _listing(modules: Path, picture_set: PictureSet) -> Iterator[tuple[str, str, dict]]:
    folder = modules / picture_set.package
    if picture_set.name == "fluent-3d":
        for path in sorted((folder / "assets").glob("*.webp")):
            if not path.stem.startswith("00"):  # doubled files: 0023-... and 23-...
                yield path.stem, _codes(path.stem), {"path": str(path)}
        return
    data = json.loads((folder / "icons.json").read_text("utf-8"))
    codes: dict[str, str] = {}
    if (folder / "chars.json").exists():
        for code, slug in json.loads((folder / "chars.json").read_text("utf-8")).items():
            codes.setdefault(slug, _codes(code))
    defaults = {k: data[k] for k in ("left", "top", "width", "height") if k in data}
    order = sorted(data["icons"], reverse=True) if picture_set.name == "fluent-color" else list(data["icons"])  # largest size first
    for slug in order:
        if not data["icons"][slug].get("hidden"):
            yield slug, codes.get(slug, ""), defaults | data["icons"][slug]


def _icon(picture_set: PictureSet, slug: str, codes: str, emoji: dict[str, dict], by_label: dict[str, str], words: set[str]) -> Icon | None:
    row = emoji.get(codes)
    if row is None and picture_set.name == "fluent-3d":
        return None
    plain = re.sub(r"-\d+$", "", slug)
    if row is None and picture_set.emoji:
        row = emoji.get(by_label.get(plain, ""))
    icon_id = f"{picture_set.name}/{slug}"
    tones = [t for t in codes.split("-") if t in TONES]
    if row is not None:
        if row["subgroup"] in DROPPED_SUBGROUPS or len(tones) > 1 or not set(tones) <= KEPT_TONES:
            return None
        return Icon(icon_id, picture_set.name, slug, row["name"], picture_set.style, codes=codes, subgroup=row["subgroup"], keywords=row["keywords"])
    if picture_set.emoji and (_TONE_WORDS.search(slug) or slug.startswith(("flag-", "keycap", "digit-", "letter-", "regional")) or len(plain) < 3):
        return None
    if TRADE_MARKS.search(slug):
        return None
    name = _segment(plain, words) if picture_set.name == "fxemoji" else plain.replace("-", " ")
    return Icon(icon_id, picture_set.name, slug, name, picture_set.style) if name else None


def _segment(text: str, words: set[str]) -> str | None:
    """A run-together slug in words ("alarmclock" -> "alarm clock"), fewest words first; None where the words do not cover it."""
    best: list[list[str] | None] = [[]] + [None] * len(text)
    for end in range(1, len(text) + 1):
        for start in range(max(0, end - 16), end):
            head, word = best[start], text[start:end].strip("-")
            if head is not None and (word in words or not word) and (best[end] is None or len(head) + 1 < len(best[end] or [])):
                best[end] = [*head, word] if word else head
    found = best[-1]
    return " ".join(found) if found and all(len(w) > 1 or w in "a2" for w in found) else None


def _codes(text: str) -> str:
    return "-".join(p.lstrip("0") for p in text.lower().split("-") if p != "fe0f")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("'", "").replace("’", "")).strip("-")
