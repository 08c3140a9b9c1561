"""Wildcards and styles: drawn by seed, from one folder alone, bounded; merged as A1111 merges."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from counting import lines_run
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen.conditioning.wildcards import Expansion, Style, chosen_styles, expand, read_styles, styled
from latentgen.errors import RequestError

STORED = ["e 2", "c 1", "g 2", "f 1", "a 2", "c 2"]
relaxed = settings(max_examples=120, deadline=None)


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words") / "lists"
    (folder / "deep").mkdir(parents=True)
    for name, text in {"animal": "# beasts\ncat\n\n  dog \nred {fox|panda}\n", "deep/two_words": "\ufeffan __animal__\n",
                       "circle": "__circle__\n", "many": "__many2__ " * 40,
                       "many2": "{a|b} " * 40, "empty": "# nothing\n", "wide": "x" * 9000}.items():
        (folder / f"{name}.txt").write_text(text, "utf-8")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder.parent / "secret.txt").write_text("secret", "utf-8")
    (folder / "way.txt").symlink_to(folder.parent / "secret.txt")
    return folder


def drawn(text: str, *, count: int = 400, folder: Path | None = None) -> Counter[str]:
    return Counter(expand(text, seed=seed, folder=folder).text for seed in range(count))


def test_choices() -> None:
    assert set(drawn("a { red |green|} cat")) == {"a red cat", "a green cat", "a  cat"}
    assert set(drawn("{a|{b|c} d}")) == {"a", "b d", "c d"}
    counts = drawn("{3::a|b|0::c|1.5::d}", count=2000)
    assert set(counts) == {"a", "b", "d"} and 0.5 < counts["a"] / 2000 < 0.6 and 0.13 < counts["b"] / 2000 < 0.23
    even = drawn("{a|b|c|d}", count=2000)
    assert set(even) == set("abcd") and all(400 < n < 600 for n in even.values())
    assert set(drawn("{a|b} {a|b}")) == {"a a", "a b", "b a", "b b"}  # each drawn on its own
    told = expand("{a|b} c", seed=0)
    assert told.drawn == (f"{{a|b}} -> {told.text[0]}",) and not told.notes


@pytest.mark.parametrize("text", ["a {b} c", "{", "}", "a|b", "{a|b", "a|b}", "{}", '{"scene": "x"}', "_ __ ___ __a _b__c", "(a:1.2) [b|c]", "a \\| b", "\\"])
def test_what_is_no_wildcard_is_text(text: str) -> None:
    assert expand(text, seed=1) == Expansion(text)


@pytest.mark.parametrize("text, odd, cure, among", [
    ("{2$$a|b|c}", "2$$", "one option is drawn, never several", "2$$a"), ("{1-2$$a|b}", "1-2$$", "one option is drawn, never several", "1-2$$a"),
    ("{-1::a|b}", "-1::", "a weight is a number of 0 or more", "-1::a"), ("{b| x::a}", "x::", "a weight is a number of 0 or more", "x::a")])
def test_what_is_malformed_is_text_and_says_so(text: str, odd: str, cure: str, among: str) -> None:
    assert among in drawn(text, count=60)
    (note,) = expand(text, seed=0).notes
    assert note == f"prompt: {odd!r} in {text.replace('| ', '|')} is read as text: {cure}"


@pytest.mark.parametrize("text", ["{2::a|b}", "{[a::0.4]|b}", "{a :: b|c}", "{$5|b}", "{(x::1)|b}"])
def test_what_is_not_malformed_has_no_note(text: str) -> None:
    assert expand(text, seed=0).notes == ()


def test_braces_that_are_meant() -> None:
    assert expand(r"\{a|b\} {x\}|y\}}", seed=3).text in (r"{a|b} x}", "{a|b} y}")
    assert expand(r"\(a\)", seed=0).text == r"\(a\)"  # another's escapes


def test_lists(lists: Path) -> None:
    assert set(drawn("a __animal__", folder=lists)) == {"a cat", "a dog", "a red fox", "a red panda"}
    assert set(drawn("__deep/two_words__.", folder=lists)) == {"an cat.", "an dog.", "an red fox.", "an red panda."}
    assert expand("__animal__", seed=0, folder=lists).drawn[0].startswith("__animal__ -> ")
    left = expand("a __animal__", seed=0)
    assert left.text == "a __animal__" and left.notes == ("prompt: __animal__ is read as text: give a folder of word lists to draw from",)


@pytest.mark.parametrize(("text", "told"), [
    ("__../secret__", "outside the folder 'lists'"), ("__deep/../../secret__", "outside the folder"), ("__/etc/hostname__", "outside the folder"),
    ("__way__", "outside the folder"), ("__deep/../animal__", "outside the folder"),
    ("__animals__", r"has no list animals.txt in 'lists': did you mean __animal__\?"),
    ("__zzz__", "has no list zzz.txt in 'lists'$"), ("__deep__", "has no list"), ("__circle__", "name each other"), ("__empty__", "empty.txt is empty"),
    ("__latin__", "latin.txt cannot be read as UTF-8"), ("__many__", "draws more than 1,000 wildcards"), ("__wide__ " * 3, "more than 20,000 characters"),
    ("{0::a|0::b}", "all have weight 0")])
def test_what_cannot_be_drawn(text: str, told: str, lists: Path) -> None:
    with pytest.raises(RequestError, match=told) as caught:
        expand(text, seed=0, folder=lists)
    assert str(lists.parent) not in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="^wildcards is 'nowhere', which is no folder"):
        expand("__a__", seed=0, folder=tmp_path / "nowhere")
    (tmp_path / "big.txt").write_text("x\n" * 600_000)
    with pytest.raises(RequestError, match="big.txt has more than 1 MB"):
        expand("__big__", seed=0, folder=tmp_path)


def test_the_seed_decides_in_every_process() -> None:
    """Stored draws: they may never change, or old recipes would draw anew."""
    texts = [expand("{a|b|c|d|e|f|g|h} {1|2|3}", seed=seed, name=name).text for seed in (0, 1, 2**63 - 1) for name in ("prompt", "negative_prompt")]
    code = ("from latentgen.conditioning.wildcards import expand\n"
            "print([expand('{a|b|c|d|e|f|g|h} {1|2|3}', seed=s, name=n).text for s in (0, 1, 2**63 - 1) for n in ('prompt', 'negative_prompt')])")
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert again.stdout.strip() == str(texts) == str(STORED)
    assert len({expand("{a|b|c|d|e|f|g|h}" * 9, seed=5, name=name).text for name in ("prompt", "negative_prompt")}) == 2


@relaxed
@given(st.one_of(st.text(max_size=80), st.lists(st.sampled_from([*"{}|_\\ ab", "2::", "{x|y}", "__animal__", "\\{"]), max_size=40).map("".join)),
       st.integers(0, 2**63 - 1))
def test_any_text_expands(lists: Path, text: str, seed: int) -> None:
    try:
        made = expand(text, seed=seed, folder=lists)
    except RequestError as error:
        assert "has no list" in str(error) or "outside the folder" in str(error) or "weight 0" in str(error)
        return
    assert made == expand(text, seed=seed, folder=lists) and (made.drawn or made.text == text.replace("\\{", "{").replace("\\}", "}") or "\\\\" in text)


@pytest.mark.parametrize("piece", ["{", "{|", "{a|", "{a|b} ", "_", "__a ", "__a.b_", "\\", "}", "|", "a{b|", "2::"])
def test_expansion_takes_work_in_proportion_to_the_text(piece: str) -> None:
    """Also where braces are closed at the end: eight times the text, eight times the lines of Python that are run."""
    for close in ("", "}"):
        small, large = (lines_run(lambda count=count: expand(piece * count + close * count, seed=0)) for count in (110, 880))
        assert large < 8.5 * small + 200


def test_styles(tmp_path: Path) -> None:
    path = tmp_path / "styles.toml"
    path.write_text('[film]\nprompt = "still of {prompt}, grain"\nnegative = "cartoon"\n'
                    '[dark]\nprompt = "night"\n["no people"]\nnegative = "{prompt}, person"\n', "utf-8")
    known = read_styles(path)
    assert known["dark"] == Style("dark", "night", "") and list(known) == ["film", "dark", "no people"]
    assert styled("a cat ", "", chosen_styles(["film", "dark"], known)) == ("still of a cat , grain, night", "cartoon")
    assert styled("a {prompt} cat", " ", chosen_styles(["film"], known)) == ("still of a {prompt} cat, grain", "cartoon")
    assert styled("", "blur", chosen_styles(["dark", "no people"], known)) == ("night", "blur, person") and styled("a", "b", ()) == ("a", "b")
    for name, told in (("flim", "^style 'flim' is not known: did you mean 'film'"), ("zzzz", "there is 'dark', 'film', 'no people'$")):
        with pytest.raises(RequestError, match=told):
            chosen_styles([name], known)
    with pytest.raises(RequestError, match="more than 20,000 characters"):
        styled("x" * 15_000, "", [Style("twice", "{prompt} {prompt} {prompt}")])


@pytest.mark.parametrize(("text", "told"), [
    ("[a", "are no TOML"), ("a = 1", "'a', which is no style"), ("[a]\nprompt = 1", "no style"), ("[a]", "no style"), ('[a]\npromt = "x"', "no style"),
    ("a = " + "[" * 5000, "are no TOML"), (None, "are not there")])
def test_styles_that_are_none(text: str | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "styles.toml"
    if text is not None:
        path.write_text(text, "utf-8")
    with pytest.raises(RequestError, match=f"^the styles 'styles.toml' .*{told}|^the styles 'styles.toml' {told}") as caught:
        read_styles(path)
    assert str(tmp_path) not in str(caught.value)
