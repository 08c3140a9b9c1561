"""A prompt explained: what the table says is what the encoders read."""

from __future__ import annotations

import html.parser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_t5 import tiny_t5_tokenizer

from latentgen.conditioning.dialect import parse
from latentgen.conditioning.explain import Explanation, explain
from latentgen.conditioning.prompt import laid_spans
from latentgen.conditioning.tokens import ClipTokens, TokenizerSpec, Tokens, read_tokens


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokens]:
    folder = tiny_t5_tokenizer(tmp_path_factory.mktemp("t5"), length=24)
    return {"tokenizer": ClipTokens.packaged(), "tokenizer_2": read_tokens(TokenizerSpec("t5", 24), folder)}


class Page(html.parser.HTMLParser):
    """Tags and text of a page; every tag that opens must close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not attrs
        self.open.append(tag)
        self.tags.add(tag)
        self.cells += [""] if tag == "td" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["td"]:
            self.cells[-1] += data


def page(explained: Explanation) -> Page:
    read = Page()
    read.feed(explained._repr_html_())
    assert not read.open and read.tags <= {"div", "p", "b", "ul", "li", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    return read


def test_tokens_weights_and_chunks(tokenizers: dict[str, Tokens]) -> None:
    made = explain("a (red:1.4) heart BREAK flat", tokenizers, steps=8)
    first, second = made.prompts[0].heard
    assert [[(w.text, w.weight) for w in chunk if w.kind == "word"] for chunk in first.chunks] == [
        [("a ", 1.0), ("red ", 1.4), ("heart ", 1.0)], [("flat ", 1.0)]]
    assert [chunk[0].text for chunk in first.chunks] == ["<|startoftext|>"] * 2 and first.chunks[0][-1].kind == "frame"
    assert (first.room, first.words, first.padding, second.room, len(second.chunks)) == (75, 4, 146, 23, 1)
    assert made.schedule == ((1, 8, ((1.0, 1),)),) and made.notes == ("prompt: BREAK says nothing to tokenizer_2, which reads all in one chunk",)
    text = str(made)
    assert "tokenizer: 4 tokens in 2 chunks of at most 75, 146 of padding" in text and "1.4  'red '" in text and "steps" not in text.split("prompt 1")[0]
    assert page(made).cells[:10] == ["1", "0", "49406", "", "'<|startoftext|>'  (frame)", "1", "1", "320", "1", "'a '"]


def test_the_schedule_by_step(tokenizers: dict[str, Tokens]) -> None:
    made = explain("[cat|dog] AND a hill :0.5", tokenizers, steps=4)
    assert made.schedule == tuple((n, n, ((1.0, cat), (0.5, 2))) for n, cat in ((1, 1), (2, 3), (3, 1), (4, 3)))
    assert [p.text for p in made.prompts] == ["cat", "a hill", "dog"]
    assert "steps     2: prompt 3 AND prompt 2 (weight 0.5)" in str(made)
    ranged = explain("[a:b:0.5]", tokenizers, steps=10)
    assert "steps     1 to 5: prompt 1\nsteps     6 to 10: prompt 2" in str(ranged) and "steps 6 to 10: prompt 2" in ranged._repr_html_()
    assert "... and 960 stretches more" in str(explain("[a|b]", tokenizers, steps=1000)) and len(explain("[a|b]", tokenizers, steps=1000).prompts) == 2


def test_what_is_not_heard(tokenizers: dict[str, Tokens]) -> None:
    made = explain("a red heart, flat " * 6 + "猫 the cat", tokenizers)
    clip, t5 = made.prompts[0].heard
    assert clip.cut == "" and t5.words == 23 and t5.cut.endswith("the cat") and t5.cut in str(made).split("cut off")[1] and "cut off: " in made._repr_html_()
    assert any("tokens for tokenizer_2, which reads at most 23: the last" in note for note in made.notes)
    odd = explain("猫", tokenizers)
    assert any(word.kind == "unknown" for word in odd.prompts[0].heard[1].chunks[0])
    assert odd.notes == ("prompt: 1 token of what is written is unknown to tokenizer_2",) and "(unknown)" in str(odd)
    assert not explain("a cat", tokenizers).notes and explain("(a", tokenizers).notes[0].startswith("prompt: 1 bracket has no partner")


def test_other_dialects_and_texts(tokenizers: dict[str, Tokens]) -> None:
    plain = explain(parse("(a:2) [b]", "plain"), tokenizers)
    assert plain.dialect == "plain" and {w.weight for w in plain.prompts[0].heard[0].chunks[0]} == {1.0} and str(plain).startswith("dialect   plain")
    other = explain("a", tokenizers, texts={"tokenizer_2": parse("(dog:2)")})
    assert {w.weight for w in other.prompts[0].heard[1].chunks[0] if w.kind == "word"} == {2.0}


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from([*"<>&\"'()[]:|", "<script>", " AND ", "BREAK", "a", "\n", "\x1b[31m"]),
                                             max_size=20).map("".join)))
def test_any_text_is_explained_and_escaped(tokenizers: dict[str, Tokens], text: str) -> None:
    made = explain(text, tokenizers, steps=3)
    read = page(made)
    assert all(line.isprintable() for line in str(made).split("\n")) and "\x1b" not in made._repr_html_()
    spans = laid_spans(parse(text), tokenizers, steps=3, strict=False)
    used = {(reader, row[skip:skip + n]) for s in spans for c in s.conjuncts for reader, laid in c.chunks.items()
            for row, n, skip in zip(laid.ids, laid.used, [0] * len(laid.ids), strict=True)}
    shown = {(h.reader, tuple(w.id for w in chunk)) for p in made.prompts for h in p.heard for chunk in h.chunks}
    assert shown == used and len(read.cells) == 5 * sum(len(chunk) for p in made.prompts for h in p.heard for chunk in h.chunks)
