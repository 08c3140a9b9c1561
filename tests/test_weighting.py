"""Weights of tokens: laid out as A1111 does, and applied by rules whose oracles are written from their publications, on tiny encoders."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_clip
from tiny_t5 import tiny_t5, tiny_t5_tokenizer
from torch import Tensor

from latentgen.conditioning.dialect import Conjunct, Fragment, parse
from latentgen.conditioning.prompt import PromptChunks, chunked, laid_out, laid_spans, level_spans, levelled, silent
from latentgen.conditioning.tokens import ClipTokens, TokenizerSpec, read_tokens
from latentgen.conditioning.weighting import RULES, Listener, Weighing, unweighted, weighted, weights_of
from latentgen.errors import RequestError

CLIP = ClipTokens.packaged()
PROMPT = "a (red:1.4) heart, [flat], (top (view:0.5)) of a city"
relaxed = settings(max_examples=60, deadline=None)
words = st.lists(st.sampled_from(["cat", "red", ",", "a", "extraordinarily", "日本"]), max_size=170).map(" ".join)


def conjunct(text: str, dialect: str = "a1111") -> Conjunct:
    return parse(text, dialect).spans(1)[0].conjuncts[0]


@pytest.fixture(scope="module")
def clip() -> torch.nn.Module:
    return tiny_clip()


@pytest.fixture(scope="module")
def t5_tokens(tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    return read_tokens(TokenizerSpec("t5", 24), tiny_t5_tokenizer(tmp_path_factory.mktemp("t5"), length=24))


def states(encoder: torch.nn.Module, laid: PromptChunks) -> Tensor:
    with torch.no_grad():
        return encoder(torch.tensor(laid.ids)).last_hidden_state


@relaxed
@given(st.one_of(words, st.text(max_size=40)))
def test_ids_without_weights_are_those_of_the_text(text: str) -> None:
    plain, read = chunked(text, CLIP), chunked(conjunct(text, "plain"), CLIP)
    assert (read.ids, read.used, read.tokens, read.text) == (plain.ids, plain.used, plain.tokens, text) and not read.weighted
    assert [row[:used] for row, used in zip(plain.ids, plain.used, strict=True)] == [tuple(row) for row in CLIP.chunks(text)]
    assert {len(row) for row in read.weights} == {77} and len(read.weights) == len(read.ids)


def a1111_chunks(fragments: list[tuple[str, float]], backtrack: int) -> list[list[tuple[int, float]]]:
    """A1111's rule, written from its description: 75 tokens a chunk; where a chunk is full and its last comma is at most `backtrack` tokens back, what
    follows the comma moves to the next chunk. BREAK (weight -1) ends a chunk at once."""
    comma, done, now = CLIP.ids(",")[0], [], []
    for text, weight in fragments:
        if (text, weight) == ("BREAK", -1):
            done, now = [*done, now], []
            continue
        for i in CLIP.ids(text):
            commas = [at for at, (token, _) in enumerate(now) if token == comma]
            if len(now) == 75 and i != comma and backtrack and commas and 75 - commas[-1] <= backtrack:
                done.append(now[:commas[-1] + 1])
                now = now[commas[-1] + 1:]
            elif len(now) == 75:
                done, now = [*done, now], []
            now = [*now, (i, weight)]
    return [*done, now] if now or not done else done


@relaxed
@given(st.lists(st.tuples(words, st.sampled_from([1.0, 1.3, 0.5])), max_size=4), st.integers(0, 30))
def test_chunks_are_a1111s(pieces: list[tuple[str, float]], backtrack: int) -> None:
    said = [part for text, weight in pieces for part in ((text, weight), ("BREAK", -1))][:-1]
    fragments = tuple(Fragment(text, weight, at > 0) for at, (text, weight) in enumerate(pieces)) or (Fragment(""),)
    laid = chunked(Conjunct(1.0, fragments), CLIP, backtrack=backtrack)
    expected = a1111_chunks(said, backtrack)
    assert [list(zip(ids[1:used - 1], w[1:used - 1], strict=True)) for ids, w, used in zip(laid.ids, laid.weights, laid.used, strict=True)] == expected
    assert all(ids[0] == 49406 and set(ids[used - 1:]) == {49407} and set(w[used - 1:]) == {1.0} == {w[0]} for ids, w, used in
               zip(laid.ids, laid.weights, laid.used, strict=True))


def test_commas_near_a_chunks_end() -> None:
    text = "cat " * 60 + ", " + "dog " * 30
    assert [used - 2 for used in chunked(text, CLIP).used] == [75, 16]
    for reach, sizes in ((20, [61, 30]), (15, [61, 30]), (14, [75, 16]), (0, [75, 16])):
        assert [used - 2 for used in chunked(text, CLIP, backtrack=reach).used] == sizes, reach
    for dialect, sizes in (("a1111", [61, 30]), ("comfy", [75, 16]), ("plain", [75, 16])):
        [span] = laid_spans(parse(text, dialect), {"tokenizer": CLIP}, steps=5)
        assert [used - 2 for used in span.conjuncts[0].chunks["tokenizer"].used] == sizes
    short = ClipTokens.packaged(length=32)  # chunks of 30: the reach shrinks with them, to 8
    assert [used - 2 for used in chunked("cat " * 20 + ", " + "dog " * 15, short, backtrack=20).used] == [30, 6]
    assert [used - 2 for used in chunked("cat " * 24 + ", " + "dog " * 10, short, backtrack=20).used] == [25, 10]


def test_breaks_make_chunks_where_there_may_be_several(t5_tokens) -> None:  # noqa: ANN001
    notes: list[str] = []
    [span] = laid_spans(parse("a red BREAK (heart:1.5) BREAK BREAK flat"), {"tokenizer": CLIP, "tokenizer_2": t5_tokens}, steps=5, notes=notes)
    ours, one = span.conjuncts[0].chunks["tokenizer"], span.conjuncts[0].chunks["tokenizer_2"]
    assert [used - 2 for used in ours.used] == [2, 1, 0, 1] and ours.weights[1][1] == 1.5 and ours.tokens == 4
    assert one.used == (len(t5_tokens.ids("a red heart flat")) + 1,) and sorted(set(one.weights[0])) == [1.0, 1.5]
    assert notes == ["prompt: BREAK says nothing to tokenizer_2, which reads all in one chunk"]
    with pytest.raises(RequestError, match=r"3 tokens in 19 chunks: at most 1200 .* or write BREAK less often$"):
        chunked(conjunct("a" + " BREAK" * 17 + " b BREAK c"), CLIP)


def test_one_chunk_with_weights_and_cut(t5_tokens) -> None:  # noqa: ANN001
    laid = chunked(conjunct("a red (heart:1.5), flat"), t5_tokens)
    heart = t5_tokens.ids("heart")
    assert laid.ids[0][:laid.used[0]] == (*t5_tokens.ids("a red "), *heart, *t5_tokens.ids(", flat"), 1) and len(laid.weights[0]) == 24
    assert sum(w == 1.5 for w in laid.weights[0]) == len(heart) and laid.weights[0][laid.used[0] - 1] == 1
    cut = chunked(conjunct("(a red heart:2) " * 12), t5_tokens, strict=False)
    assert len(cut.ids[0]) == len(cut.weights[0]) == 24 and cut.weights[0][-1] == 1 and cut.ids[0][-1] == 1 and "cut off" in cut.note
    whole = chunked(conjunct("(a red heart:2)"), t5_tokens)
    assert whole.ids == chunked("a red heart", t5_tokens).ids and set(whole.weights[0][:whole.used[0] - 1]) == {2.0}


def test_a1111_rule_on_a_tiny_clip(clip: torch.nn.Module) -> None:
    """z * w, then * mean before / mean after, chunk by chunk."""
    laid = chunked(conjunct(PROMPT + " BREAK a (cat:1.7) BREAK dog"), CLIP)
    z, w = states(clip, laid), torch.tensor(laid.weights)
    for n in range(3):
        scaled = z[n] * w[n][:, None]
        torch.testing.assert_close(weighted(z, w, "a1111")[n], scaled * (z[n].mean() / scaled.mean()), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weighted(z, w, "a1111_no_norm")[n], scaled, rtol=0, atol=0)
    assert torch.equal(weighted(z, w, "a1111")[2], z[2]) and not torch.allclose(weighted(z, w, "a1111")[0], z[0])


def test_comfy_rule_on_a_tiny_clip(clip: torch.nn.Module) -> None:
    """(z - empty) * w + empty, token by token, against the empty prompt's one chunk."""
    laid = chunked(conjunct("a (red:1.4) heart, " + "(flat:0) " * 80 + "(view:-1)", "comfy"), CLIP)
    z, empty = states(clip, laid), states(clip, silent(laid, CLIP))
    ours = weighted(z, torch.tensor(laid.weights), "comfy", empty=empty)
    for n, row in enumerate(laid.weights):
        for at, w in enumerate(row):
            torch.testing.assert_close(ours[n, at], (z[n, at] - empty[0, at]) * w + empty[0, at] if w != 1 else z[n, at], rtol=1e-6, atol=1e-6)
    assert len(laid.ids) == 2 and empty.shape == (1, 77, 32)


def test_two_clips_and_t5(clip: torch.nn.Module, t5_tokens) -> None:  # noqa: ANN001
    """Encoders of several kinds, each weighed by itself, as a family's `encode` would: pooled vectors are never touched."""
    second, third = tiny_clip(projected=True, seed=1, width=16), tiny_t5()
    tokenizers = {"tokenizer": CLIP, "tokenizer_2": ClipTokens.packaged(pad="!"), "tokenizer_3": t5_tokens}
    own = {"tokenizer_2": parse("a (blue:1.6) car")}
    chunks = laid_spans(parse("a (red:1.4) heart"), tokenizers, steps=1, texts=own)[0].conjuncts[0].chunks

    def encode(laid: dict[str, PromptChunks], weigh) -> dict[str, Tensor]:  # noqa: ANN001
        with torch.no_grad():
            ids = {reader: torch.tensor(one.ids) for reader, one in laid.items()}
            deep = second(ids["tokenizer_2"], output_hidden_states=True)
            return {"tokenizer": weigh("tokenizer", clip(ids["tokenizer"], output_hidden_states=True).hidden_states[-2]),
                    "tokenizer_2": weigh("tokenizer_2", deep.hidden_states[-2]), "pooled": deep.text_embeds,
                    "tokenizer_3": weigh("tokenizer_3", third(ids["tokenizer_3"]).last_hidden_state)}

    plain, silence = encode(chunks, unweighted), Listener()
    encode({reader: silent(one, tokenizers[reader]) for reader, one in chunks.items()}, silence)
    assert set(weights_of(chunks)) == set(tokenizers) and set(silence.heard) == set(tokenizers)
    assert max(weights_of(chunks)["tokenizer_2"].flatten().tolist()) == pytest.approx(1.6)
    for rule in RULES:
        weighing = Weighing(rule, weights_of(chunks), silence.heard)
        made = encode(chunks, weighing)
        assert torch.equal(made["pooled"], plain["pooled"]) and weighing.heard == set(tokenizers)
        for reader in tokenizers:
            expected = weighted(plain[reader], torch.tensor(chunks[reader].weights), rule, empty=silence.heard[reader])
            assert torch.equal(made[reader], expected) and not torch.equal(expected, plain[reader])
    partly = Weighing("a1111", {"tokenizer": weights_of(chunks)["tokenizer"]})
    assert torch.equal(encode(chunks, partly)["tokenizer_3"], plain["tokenizer_3"])


def test_a_mean_of_nought_is_left() -> None:
    """A last norm without bias: 0 / 0, or rounding over rounding, and no state may be lost by it."""
    z = torch.nn.functional.layer_norm(torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(0)), (64,))
    w = torch.ones(1, 77)
    w[0, 3] = 1.5
    for mean in (z, torch.zeros_like(z), torch.tensor([1.0, -1.0]).repeat(32).expand(1, 77, 64)):
        assert torch.equal(weighted(mean, w, "a1111"), mean * w[..., None])
    only = torch.zeros(1, 77)
    assert torch.equal(weighted(z + 1, only, "a1111"), torch.zeros_like(z))  # all weights 0: old mean / 0


def test_half_precision_is_kept_and_ones_do_nothing(clip: torch.nn.Module) -> None:
    z = states(clip, chunked("a red heart", CLIP)).bfloat16()
    for rule in RULES:
        assert weighted(z, torch.ones(1, 77), rule) is z
        assert weighted(z, torch.full((1, 77), 1.2), rule, empty=z * 0).dtype == torch.bfloat16


@relaxed
@given(st.lists(st.floats(-3, 3).map(lambda w: round(w, 3)), min_size=6, max_size=6), st.integers(0, 5))
def test_rules_keep_what_they_promise(weights: list[float], seed: int) -> None:
    z = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(seed)) + 0.5
    empty = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(seed + 99))
    w = torch.tensor([weights])
    made = {rule: weighted(z, w, rule, empty=empty) for rule in RULES}
    assert all(bool(m.isfinite().all()) and m.shape == z.shape for m in made.values())
    if abs(float(made["a1111_no_norm"].mean())) > 1e-3:
        assert float(made["a1111"].mean()) == pytest.approx(float(z.mean()), rel=1e-3)
    for at, weight in enumerate(weights):
        if weight in (0, 1):
            assert torch.equal(made["comfy"][0, at], (empty if weight == 0 else z)[0, at])


def test_what_does_not_fit_is_refused() -> None:
    z, w = torch.ones(1, 4, 8), torch.full((1, 4), 2.0)
    for options, told in (({"rule": "compel"}, "^weighting is 'compel': expected one of 'a1111'"), ({"rule": "comfy"}, "empty prompt's states are not there"),
                          ({"rule": "comfy", "empty": torch.ones(1, 5, 8)}, "in the same shape"),
                          ({"rule": "a1111", "weights": w[:, :3]}, r"there are \(1, 3\)")):
        with pytest.raises(RequestError, match=told):
            weighted(z, options.pop("weights", w), **options)


def test_prompts_by_step_for_all_encoders(t5_tokens) -> None:  # noqa: ANN001
    tokenizers = {"tokenizer": CLIP, "tokenizer_2": t5_tokens}
    spans = laid_spans(parse("[cat:dog:2] AND a [red|blue] sun :0.5"), tokenizers, steps=4, texts={"tokenizer_2": parse("[a:the:3] city")})
    assert [(s.first, s.last) for s in spans] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert [[c.chunks["tokenizer"].text for c in s.conjuncts] for s in spans] == [
        ["cat", "a red sun"], ["cat", "a blue sun"], ["dog", "a red sun"], ["dog", "a blue sun"]]
    assert [s.conjuncts[1].chunks["tokenizer_2"].text for s in spans] == ["a city"] * 3 + ["the city"] and [c.weight for c in spans[0].conjuncts] == [1.0, 0.5]
    long = laid_spans(parse("[a:" + "cat " * 100 + ":1]"), {"tokenizer": CLIP}, steps=2)
    assert [len(s.conjuncts[0].chunks["tokenizer"].ids) for s in long] == [2, 2]
    short, both = laid_spans(parse("b"), {"tokenizer": CLIP}, steps=2), {"tokenizer": CLIP}
    assert [len(s.conjuncts[0].chunks["tokenizer"].weights) for spans_ in level_spans([long, short], both) for s in spans_] == [2, 2, 2]
    with pytest.raises(RequestError, match="^prompt has 2 prompts joined by AND and prompt_2 has 3: write as many, or one$"):
        laid_spans(parse("a AND b"), tokenizers, steps=2, texts={"tokenizer_2": parse("a AND b AND c")})
    notes: list[str] = []
    laid_spans(parse("[a:b:1] " + "a red heart " * 20), tokenizers, steps=3, strict=False, notes=notes)
    assert len(notes) == len(set(notes)) and any("cut off" in note for note in notes)


def test_the_layout_that_was_there_goes_on(t5_tokens) -> None:  # noqa: ANN001
    tokenizers = {"tokenizer": CLIP, "tokenizer_2": t5_tokens}
    a, b = levelled(laid_out("cat " * 80, {"tokenizer": CLIP}), laid_out("", tokenizers), tokenizers)
    assert len(a["tokenizer"].weights) == len(b["tokenizer"].weights) == len(b["tokenizer"].ids) == 2
    quiet = silent(chunked("a cat", t5_tokens), t5_tokens)
    assert quiet.ids == chunked("", t5_tokens).ids and quiet.mask == chunked("", t5_tokens).mask
    assert math.isclose(sum(map(sum, a["tokenizer"].weights)), 154)


def test_silence_of_a_tokenizer_that_does_not_pad(tmp_path: Path) -> None:
    tokens = read_tokens(TokenizerSpec("t5", 24, padded=False), tiny_t5_tokenizer(tmp_path / "t5", length=24))
    laid = chunked(conjunct("a (red:2) heart"), tokens)
    quiet = silent(laid, tokens)
    assert len(quiet.ids[0]) == len(laid.ids[0]) == laid.used[0] and quiet.ids[0][0] == 1 and set(quiet.ids[0][1:]) == {tokens.pad} and quiet.used == (1,)
