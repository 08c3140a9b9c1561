"""Prompt dialects against their published rules: examples, an oracle written from the rules, and any text at all."""

from __future__ import annotations

import re

import pytest
from counting import lines_run
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen.conditioning.dialect import DIALECTS, LIMIT, Fragment, parse
from latentgen.errors import RequestError

relaxed = settings(max_examples=150, deadline=None)
syntax = st.lists(st.sampled_from([*"()[]:|\\ ab", ":1.3)", ":0.5]", ":3]", "BREAK", " AND ", "(a:2)", "[x|y]", "\n", "é"]), max_size=40).map("".join)


def said(text: str, dialect: str = "a1111", *, step: int = 1, steps: int = 10) -> list[tuple[str, float]]:
    """(text, weight) of a prompt's fragments in a step."""
    span = next(span for span in parse(text, dialect).spans(steps) if step <= span.last)
    assert len(span.conjuncts) == 1
    return [(f.text, f.weight) for f in span.conjuncts[0].fragments]


def by_step(text: str, steps: int = 10) -> list[tuple[int, str]]:
    """(last step, words) as A1111 lists schedules."""
    return [(span.last, span.conjuncts[0].text) for span in parse(text).spans(steps)]


@pytest.mark.parametrize(("text", "expected"), [
    ("normal text", [("normal text", 1.0)]), ("", [("", 1.0)]), ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    (r"\(literal\]", [("(literal]", 1.0)]), (r"a\\b", [("a\\b", 1.0)]), (r"a\b", [("ab", 1.0)]), ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    ("a (((house:1.3))) [on] a (hill:0.5), sun, (((sky))).",
     [("a ", 1.0), ("house", 1.573), (" ", 1.0), ("on", 0.9090909), (" a ", 1.0), ("hill", 0.5), (", sun, ", 1.0), ("sky", 1.331), (".", 1.0)]),
    ("(a (b:1.3) [c])", [("a ", 1.1), ("b", 1.43), (" ", 1.1), ("c", 1.0)]), ("(a: 1.5 )b", [("a", 1.5), ("b", 1.0)]), ("(a:-.5)", [("a", -0.5)]),
    ("(a:1.)", [("a", 1.0)]), ("(a:x)", [("a:x", 1.1)]), ("(a:1.2.3)", [("a:1.2.3", 1.1)]), ("[a:1.3]x", [("x", 1.0)]), ("a:1.3)", [("a:1.3)", 1.0)]),
    ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 0.9090909)]), ("((a)", [("(", 1.0), ("a", 1.1)]), ("a)", [("a)", 1.0)]), ("[a", [("[a", 1.0)]),
    ("(a:1.0)", [("a", 1.0)]), ("((a:1.21))b", [("a", 1.331), ("b", 1.0)])])
def test_a1111_weights(text: str, expected: list[tuple[str, float]]) -> None:
    assert said(text) == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("(word:1.3) (word)", [("word", 1.3), (" ", 1.0), ("word", 1.1)]), ("((a))", [("a", 1.21)]), ("(a (b:1.2):1.5)", [("a ", 1.5), ("b", 1.2)]),
    ("(((a:1.3)))", [("a", 1.3)]), ("[a] [b:c:0.5] BREAK AND", [("[a] [b:c:0.5] BREAK AND", 1.0)]), (r"\(a\) \[ \\", [(r"(a) \[ \\", 1.0)]),
    ("(:3)", [(":3", 1.1)]), ("(a:b:1.3)", [("a:b", 1.3)]), ("(a:1e-1)", [("a", 0.1)]), ("(a:nan)", [("a:nan", 1.1)]), ("(a", [("(a", 1.0)])])
def test_comfy_weights(text: str, expected: list[tuple[str, float]]) -> None:
    assert said(text, "comfy") == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("test", [(10, "test")]), ("a [b:3]", [(3, "a "), (10, "a b")]), ("a [b: 3 ]", [(3, "a "), (10, "a b")]), ("a [[[b]]:2]", [(2, "a "), (10, "a b")]),
    ("[(a:2):3]", [(3, ""), (10, "a")]), ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]), ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
    ("a [unbalanced", [(10, "a [unbalanced")]), ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]), ("[from::0.4]x", [(4, "fromx"), (10, "x")]),
    ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]), ("[a:b:0]", [(10, "b")]), ("[a:b:99]", [(10, "a")]), ("[a:b:1.0]", [(10, "a")]),
    ("[a:b:-3]", [(10, "b")]), ("[a:b:1e999]", [(10, "a")]), ("[a:b:c:3]", [(10, "a:b:c:3")]), ("[a:b]", [(10, "a:b")]), ("[a:(b:3]", [(10, "a:(b:3")]),
    ("[a:b|c:3]", [(10, "a:b|c:3")]), ("x | y [a:b:3]", [(3, "x | y a"), (10, "x | y b")]), (r"[a\:b:c:3]", [(3, "a:b"), (10, "c")]),
    ("[[a|b]:c:2]", [(1, "a"), (2, "b"), (10, "c")]), ("[a:0.5:0.7]", [(7, "a"), (10, "0.5")])])
def test_schedules(text: str, expected: list[tuple[int, str]]) -> None:
    assert by_step(text) == expected


def test_alternation() -> None:
    assert by_step("[a|(b:1.1)]", 4) == [(1, "a"), (2, "b"), (3, "a"), (4, "b")] and said("[a|(b:1.2)]", step=2) == [("b", 1.2)]
    assert by_step("[fe|]male", 3) == [(1, "female"), (2, "male"), (3, "female")]
    assert by_step("[fe|||]male", 6) == [(1, "female"), (4, "male"), (5, "female"), (6, "male")]  # neighbours that say the same are one
    assert by_step("[a|a] b", 9) == [(9, "a b")]
    assert by_step("(x [a|[c:d:2]] y:1.3)", 4) == [(1, "x a y"), (2, "x c y"), (3, "x a y"), (4, "x d y")]


def test_a_share_of_the_steps_is_rounded_down_as_a1111_does() -> None:
    for steps in (7, 20, 29, 100):
        for share in ("0.29", "0.4", ".999", "0.05"):
            ends = [end for end, _ in by_step(f"[a:b:{share}]", steps)]
            assert ends == sorted({end for end in (int(float(share) * steps), steps) if end})
    with pytest.raises(RequestError, match="^steps is 0"):
        parse("a").spans(0)


def test_prompts_joined_by_and() -> None:
    def read(text: str) -> list[tuple[float, str]]:
        return [(one.weight, one.text) for one in parse(text).spans(5)[0].conjuncts]

    assert read("a cat AND a dog :0.8") == [(1.0, "a cat"), (0.8, "a dog")]
    assert read("a:1.2 AND b : -.5 AND c:x AND") == [(1.2, "a"), (-0.5, "b"), (1.0, "c:x"), (1.0, "")]
    assert read("HAND ANDY and") == [(1.0, "HAND ANDY and")] and read("(a AND b:2)") == [(1.0, "(a"), (1.0, "b:2)")]
    spans = parse("[a:b:1] AND [c:d:2]:0.5").spans(4)
    assert [(s.first, s.last, [(c.weight, c.text) for c in s.conjuncts]) for s in spans] == [
        (1, 1, [(1.0, "a"), (0.5, "c")]), (2, 2, [(1.0, "b"), (0.5, "c")]), (3, 4, [(1.0, "b"), (0.5, "d")])]
    word = parse("a AND b", composed=False)
    assert word.spans(1)[0].conjuncts[0].text == "a AND b" and "AND is read as a word" in word.notes[0]


def test_breaks() -> None:
    def read(text: str) -> tuple[Fragment, ...]:
        return parse(text).spans(1)[0].conjuncts[0].fragments

    assert read("a BREAK b") == (Fragment("a"), Fragment("b", 1.0, True)) and read("BREAK a") == (Fragment("a", 1.0, True),)
    assert read("a BREAK BREAK (b:2)") == (Fragment("a"), Fragment("", 1.0, True), Fragment("b", 2.0, True))
    assert read("a BREAK") == (Fragment("a"), Fragment("", 1.0, True)) and read("BREAKS a_BREAK") == (Fragment("BREAKS a_BREAK"),)
    assert read("(a\n BREAK\tb:1.2)") == (Fragment("a", 1.2), Fragment("b", 1.2, True)) and parse("x BREAK").breaks and not parse("x BREAK", "comfy").breaks


def test_equal_prompts_are_equal() -> None:
    for one, other in (("((a))", "(a:1.21)"), ("(a)(b)", "(ab)"), ("(a:1.0)b", "ab"), ("[[a]] b", "(a:0.82644628) b"), ("a AND  b ", "a AND b:1"),
                       ("[x:x:0.5] y", "x y"), ("(a)(:1.3)b", "(a:1.1)b")):
        assert hash(parse(one).spans(20)) == hash(parse(other).spans(20)) and parse(one).spans(20) == parse(other).spans(20), one
    assert parse("(a)").spans(20) != parse("a").spans(20)


@pytest.mark.parametrize(("text", "words"), [
    ("a (b", r"^prompt: 1 bracket has no partner and stands as text, the first at character 3: close it"),
    ("ab] ((", "3 brackets have no partner .* character 3"),
    ("a :1.3)", "the first at character 7"), ("at 12:30", "^prompt: ':30' at its end is text"), ("(a:5000)", f"a weight beyond {LIMIT:g} is read as"),
    ("a AND b:99999", "a weight of 99999 is read as 1000")])
def test_notes(text: str, words: str) -> None:
    notes = parse(text).notes
    assert len(notes) == 1 and re.search(words, notes[0]), notes
    assert not parse("a (b:1.3) [c:d:0.5] [e|f] AND g :0.3 BREAK \\( \\]").notes and not parse(text, "plain").notes
    with pytest.raises(RequestError, match="^dialect is 'compel': expected one of 'a1111', 'comfy', 'plain'$"):
        parse(text, "compel")  # type: ignore[arg-type]


def oracle(text: str) -> list[tuple[str, float]]:
    """A1111's rule character by character, written from its description: brackets multiply the span between them. Partners are found first, so that
    those without one can be text."""
    tokens, at = [], 0
    while at < len(text):
        end = at + 1
        if text[at] == "\\":
            end = at + (2 if text[at + 1:at + 2] in tuple("()[]\\") else 1)
        elif number := re.match(r":\s*[+-]?(\d+\.?\d*|\.\d+)\s*\)", text[at:]):
            end = at + number.end()
        tokens.append(text[at:end])
        at = end
    weight, text_ = [1.0] * len(tokens), [t[1:] if t[0] == "\\" else t for t in tokens]
    for opening, closing in ("()", "[]"):
        waiting = []
        for i, token in enumerate(tokens):
            if token == opening:
                waiting.append(i)
            elif waiting and token[-1] == closing and token[0] != "\\":
                start = waiting.pop()
                factor = float(token[1:-1]) if len(token) > 1 else 1.1 if opening == "(" else 1 / 1.1
                text_[start] = text_[i] = ""
                for j in range(start, i):
                    weight[j] *= factor
    joined: list[tuple[str, float]] = []
    for words, w in zip(text_, weight, strict=True):
        if words:
            merge = joined and joined[-1][1] == pytest.approx(w, rel=1e-6)
            joined[-1:] = [(joined[-1][0] + words, w)] if merge else [*joined[-1:], (words, w)]
    return joined or [("", 1.0)]


@relaxed
@given(st.lists(st.sampled_from([*"()[]\\ ab", ":1.3)", ":.5)", "(", "é", ": "]), max_size=30).map("".join))
def test_weights_equal_the_rule(text: str) -> None:
    ours, theirs = said(text), oracle(text)
    assert [words for words, _ in ours] == [words for words, _ in theirs]
    assert [w for _, w in ours] == pytest.approx([w for _, w in theirs], rel=1e-6)


@relaxed
@given(st.one_of(syntax, st.text(max_size=60)), st.sampled_from(DIALECTS), st.integers(1, 30))
def test_any_text_has_a_reading(text: str, dialect: str, steps: int) -> None:
    spans = parse(text, dialect).spans(steps)
    assert [span.first for span in spans] == [1, *(span.last + 1 for span in spans[:-1])] and spans[-1].last == steps
    for span in spans:
        assert span.conjuncts and all(abs(c.weight) <= LIMIT and c.fragments for c in span.conjuncts)
        for conjunct in span.conjuncts:
            pairs = list(zip(conjunct.fragments, conjunct.fragments[1:], strict=False))
            assert all(b.breaks or a.weight != b.weight for a, b in pairs) and all(abs(f.weight) <= LIMIT for f in conjunct.fragments)
            assert all(f.text or f.breaks for f in conjunct.fragments) or conjunct.fragments == (Fragment(""),)
    hash(spans)


@relaxed
@given(st.text(max_size=80), st.text(st.characters(blacklist_characters="()[]\\:|"), max_size=80).filter(lambda t: "BREAK" not in t and "AND" not in t))
def test_plain_text_comes_back(anything: str, words: str) -> None:
    assert said(anything, "plain") == [(anything, 1.0)]
    for dialect in ("a1111", "comfy"):
        assert said(words, dialect) == [(words, 1.0)] and not parse(words, dialect).notes
    escaped = re.sub(r"([()\[\]\\])", r"\\\1", anything.replace("BREAK", "").replace("AND", "").replace(":", ""))
    assert "".join(t for t, _ in said(escaped)) == re.sub(r"\\(.)", r"\1", escaped, flags=re.DOTALL) and not parse(escaped).notes


@pytest.mark.parametrize("piece", ["(", "[", ")", "]", "([", "[:]", "[a|", ":1", "(:1", "\\", " BREAK", "[a:b:3]", "[|", "a", " ", ":", "1"])
def test_reading_takes_work_in_proportion_to_the_text(piece: str) -> None:
    """Eight times the text, eight times the lines of Python that are run, whatever brackets it is of; and deep nesting does not recurse."""
    def text(size: int, close: str) -> str:
        return piece * (size // 2 // len(piece)) + (close or piece) * (size // 2 // len(close or piece))

    for close in ("", "]", ")"):
        small, large = (lines_run(lambda size=size: parse(text(size, close)).spans(2)) for size in (1000, 8000))
        assert large < 8.5 * small + 100


@pytest.mark.parametrize("text", ["[" * 10**6, "(" * 5 * 10**5 + ")" * 5 * 10**5, "])" * 5 * 10**5, "[a:" * 3 * 10**5, "\\" * 10**6, ":1" * 5 * 10**5],
                         ids=["open", "nested", "closed", "schedules", "escapes", "numbers"])
def test_a_megabyte_has_a_reading(text: str) -> None:
    """Of which every letter stands in some part: a reading in quadratic time would not come to its end here."""
    read = parse(text)
    assert read.text == text and len(read.parts) == 1 and len(read.notes) <= 2
    assert sum(len(fragment.text) for fragment in read.spans(1)[0].conjuncts[0].fragments) <= len(text)
