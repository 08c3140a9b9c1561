"""Approximations against their published rules: diffusers' first-block cache, a Taylor polynomial by hand, DeepCache and token merging spelt out.

Left at nothing (threshold 0, interval 1, ratio 0), each is exactly the plain network; and what it says that it saved, it saved.
"""

import math

import pytest
import torch
from tiny import lively

from latentgen.diffusion.level import Level
from latentgen.diffusion.table import in_words
from latentgen.errors import RequestError
from latentgen.models.approximate.memory import Memory, Tally
from latentgen.models.approximate.merge import matching
from latentgen.models.approximate.stack import Foretold, block_names, distance, read_by_attention
from latentgen.models.approximate.table import APPROXIMATIONS, approximated, clashes, kind_of, saved
from latentgen.models.asked import Asked
from latentgen.models.family import Conditioning
from latentgen.models.view import StandIn, view
from latentgen.run.batch import joined, repeated

WORDS = Conditioning(torch.zeros(1, 2, 2))
TIMES = (600.0, 599.5, 599.0, 598.5, 598.0, 597.5, 597.0, 596.5)  # close together: a tiny random network turns on its heel


def flux():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(1)
    return lively(FluxTransformer2DModel(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                                         joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6)))


def pixart():
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(1)
    return lively(PixArtTransformer2DModel(sample_size=8, num_layers=3, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8,
                                           cross_attention_dim=16, caption_channels=32, use_additional_conditions=False))


def unet(**more):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    said = {"sample_size": 8, "layers_per_block": 2, "block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 32, "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    return lively(UNet2DConditionModel(**(said | more)))


def caller(net, *, rows=1):
    """(network, time, input) -> its answer, with words that stay."""
    torch.manual_seed(2)
    kind = type(net).__name__
    if kind.startswith("Flux"):
        states, pooled = torch.randn(rows, 5, 32), torch.randn(rows, 32)
        grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
        return torch.randn(rows, 16, 16), lambda n, t, x: n(x, states, pooled, torch.full((rows,), t / 1000), img_ids=grid, txt_ids=torch.zeros(5, 3),
                                                        return_dict=False)[0]
    states = torch.randn(rows, 5, 32)
    if kind.startswith("PixArt"):
        told = {"resolution": None, "aspect_ratio": None}
        return torch.randn(rows, 4, 8, 8), lambda n, t, x: n(x, encoder_hidden_states=states, timestep=torch.full((rows,), t), added_cond_kwargs=told, return_dict=False)[0]
    return torch.randn(rows, 4, 8, 8), lambda n, t, x: n(x, t, states, return_dict=False)[0]


def run(net, call, x, asked, *, words=(WORDS,), pace=0.02, times=TIMES):
    """Answers over levels, each on an input a little further on."""
    found = []
    for n, time in enumerate(times):
        asked.tell(Level(1 - time / 1000, time / 1000, time), joined([repeated(c, len(x) // len(words)) for c in words]))
        with torch.no_grad():
            found.append(call(net, time, x * (1 + pace * n)))
    return found


def near_exact(found, plain):
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, plain, strict=True))


NOTHING = {"first_block": {"threshold": 0}, "tea_cache": {"threshold": 0}, "taylor": {"interval": 1}, "deep_cache": {"interval": 1}, "token_merging": {"ratio": 0}}
SOME = {"first_block": {"threshold": 0.2}, "tea_cache": {"threshold": 0.3}, "taylor": {"interval": 2, "warmup": 2}, "deep_cache": {"interval": 2},
        "token_merging": {"ratio": 0.5}}


def net_for(name):
    return flux() if APPROXIMATIONS[name].kind == "transformer" else unet()


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_asked_for_nothing_it_is_the_plain_network_bit_for_bit(name):
    net, asked = net_for(name), Asked()
    x, call = caller(net)
    seen = approximated(net, {name: NOTHING[name]}, asked, shape=(8, 8), tallies=(told := {}))
    for a, b in zip(run(seen, call, x, asked), run(net, call, x, Asked()), strict=True):
        assert torch.equal(a, b)
    assert saved(told)[0].startswith(f"{name}: 0 of ")


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_what_it_saves_is_saved_and_the_network_stays_as_it_was(name):
    net, asked = net_for(name), Asked()
    x, call = caller(net)
    plain = run(net, call, x, Asked())
    counted = [net.get_submodule(n) for n in block_names(net)] or [net.mid_block, net.down_blocks[1]]
    calls = []
    hooks = [module.register_forward_hook(lambda *_: calls.append(1)) for module in counted]
    seen = approximated(net, {name: SOME[name]}, asked, shape=(8, 8), tallies=(told := {}))
    found = run(seen, call, x, asked)
    for hook in hooks:
        hook.remove()
    left, whole = (int(word) for word in saved(told)[0].split() if word.isdigit())
    assert 0 < left < whole
    if APPROXIMATIONS[name].group == "stack":
        assert (len(calls), whole) == (whole - left, len(TIMES) * len(counted))
    elif name == "deep_cache":
        assert len(calls) == len(TIMES)  # two modules, every other call
    assert 0 < near_exact(found, plain) < 0.7
    assert all(torch.equal(a, b) for a, b in zip(run(net, call, x, Asked()), plain, strict=True))


@pytest.mark.parametrize("make", [flux, pixart])
@pytest.mark.parametrize("threshold", [0.05, 0.15, 0.4])
def test_first_block_cache_is_that_of_diffusers(make, threshold):
    """The same threshold, the same calls left out, the same answers."""
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    net, theirs, asked = make(), make(), Asked()
    x, call = caller(net)
    apply_first_block_cache(theirs, FirstBlockCacheConfig(threshold=threshold))
    seen = approximated(net, {"first_block": {"threshold": threshold}}, asked, shape=(8, 8), tallies=(told := {}))
    found = run(seen, call, x, asked, pace=0.1)
    _set_cache_context(theirs, CacheContext("cond"))
    expected = run(theirs, call, x, Asked(), pace=0.1)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert threshold < 0.1 or ": 0 of" not in saved(told)[0]


def test_the_cache_of_each_side_is_its_own():
    """The sides called in turn, the answers are those of each called alone; and a side that rested for a level begins anew."""
    net, asked = flux(), Asked()
    x, call = caller(net)
    other = Conditioning(torch.zeros(1, 2, 2))
    seen = approximated(net, {"first_block": {"threshold": 0.3}}, asked, shape=(8, 8), tallies={})
    mixed = {c: [] for c in (WORDS, other)}
    for n, time in enumerate(TIMES):
        for c, scale in ((WORDS, 1.0), (other, -2.0)):
            asked.tell(Level(1 - time / 1000, time / 1000, time), repeated(c, 1))
            mixed[c].append(call(seen, time, scale * x * (1 + 0.02 * n)))
    for c, scale in ((WORDS, 1.0), (other, -2.0)):
        own = Asked()
        alone = approximated(net, {"first_block": {"threshold": 0.3}}, own, shape=(8, 8), tallies={})
        for a, b in zip(mixed[c], run(alone, call, scale * x, own, words=(c,)), strict=True):
            assert torch.equal(a, b)


def test_memory_forgets_rows_that_rested():
    asked, made = Asked(), []
    memory = Memory(asked, lambda: made.append(1) or len(made))
    other = Conditioning(torch.zeros(1, 2, 2))
    for time, words, expected in ((3.0, WORDS, 1), (3.0, other, 2), (2.0, WORDS, 1), (1.0, WORDS, 1), (1.0, other, 3), (1.0, WORDS, 1)):
        asked.tell(Level(1.0, time, time), repeated(words, 1))
        assert memory.now() == expected
    asked.tell(Level(1.0, 1.0, 1.0), repeated(WORDS, 1, first=4))  # another picture
    assert memory.now() == 4


def test_the_cache_like_teacache_leaves_out_until_the_drift_is_reached():
    """By the rule in the paper: the relative changes of what the first attention reads are summed, and set back at each full call."""
    net, asked = flux(), Asked()
    x, call = caller(net)
    threshold, reads, calls = 0.1, [], []
    block = net.transformer_blocks[0]

    class Watched(StandIn):
        def forward(self, *args, **kwargs):
            reads.append(read_by_attention(block, args, kwargs))
            return self.inner(*args, **kwargs)

    run(view(net, lambda name, module: Watched(module) if name == "transformer_blocks.0" else None), call, x, Asked())
    hook = net.transformer_blocks[1].register_forward_hook(lambda *_: calls.append(asked.level.time))
    seen = approximated(net, {"tea_cache": {"threshold": threshold}}, asked, shape=(8, 8), tallies={})
    run(seen, call, x, asked)
    hook.remove()
    expected, drift = [TIMES[0]], 0.0
    for time, old, new in zip(TIMES[1:], reads, reads[1:], strict=False):
        drift += float((new - old).abs().mean() / old.abs().mean())
        if drift >= threshold:
            expected.append(time)
            drift = 0.0
    assert calls == expected
    assert 1 < len(expected) < len(TIMES)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_taylor_foretells_as_published(order):
    """Liu et al. 2025: derivatives by finite differences between full calls, F(t + k) = sum of F_i k^i / i!, on levels of equal distance."""
    asked = Asked()
    rule, interval = Foretold(asked, 3, order, 1), 3
    curve = {time: torch.tensor([math.exp(time / 700), time / 500]) for time in TIMES}
    terms, last = [], 0
    for n, time in enumerate(TIMES):
        asked.tell(Level(1.0, time, time), repeated(WORDS, 1))
        if rule.before(torch.nn.Identity(), (), {}):
            k = n - last
            expected = sum(term * k**i / math.factorial(i) for i, term in enumerate(terms))
            torch.testing.assert_close(rule.tell(), expected, rtol=1e-5, atol=1e-5)
        else:
            assert n % interval == 0
            rule.learn(curve[time])
            fresh = [curve[time]]
            for i, old in enumerate(terms[:order]):
                fresh.append((fresh[i] - old) / (n - last))
            terms, last = fresh, n


def test_taylor_of_first_order_is_exact_where_the_change_is_a_line_in_time():
    asked = Asked()
    rule = Foretold(asked, 4, 1, 2)
    for time in (900.0, 870.0, 800.0, 610.0, 300.0):  # of unequal distance
        asked.tell(Level(1.0, time, time), repeated(WORDS, 1))
        line = torch.tensor([2 * time - 5, -time])
        if rule.before(torch.nn.Identity(), (), {}):
            torch.testing.assert_close(rule.tell(), line)
        else:
            rule.learn(line)
    assert rule.calls == 5


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_deepcache_spelt_out(layers):
    """The U-Net's own steps written out, its deep features kept from the full call before."""
    net, asked = unet(), Asked()
    x, call = caller(net)
    seen = approximated(net, {"deep_cache": {"interval": 2, "layers": layers}}, asked, shape=(8, 8), tallies={})
    found = run(seen, call, x, asked)
    risen = {}
    top = net.up_blocks[-1]
    first = len(top.resnets) - layers

    def keep(module, args):
        below = top.resnets[first - 1].out_channels if first else net.up_blocks[-2].resnets[-1].out_channels
        risen["now"] = args[0][:, :below]

    def put(module, args):
        return (torch.cat([risen["now"], args[0][:, risen["now"].shape[1]:]], 1), *args[1:])

    for n, (time, got) in enumerate(zip(TIMES, found, strict=True)):
        hook = top.resnets[first].register_forward_pre_hook(put if n % 2 else keep)
        expected = call(net, time, x * (1 + 0.02 * n))
        hook.remove()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_token_merging_spelt_out():
    """Bipartite soft matching by loops: the most alike are averaged into the first of their 2x2, and get its answer."""
    torch.manual_seed(0)
    rows, columns, few = 4, 6, 7
    tokens = torch.randn(2, rows * columns, 5)
    merge, spread = matching(tokens, rows, columns, few)
    together = merge(tokens)
    assert together.shape == (2, rows * columns - few, 5)
    answers = spread(together)
    takers = [r * columns + c for r in range(0, rows, 2) for c in range(0, columns, 2)]
    for one, got in zip(tokens, answers, strict=True):
        unit = one / one.norm(dim=-1, keepdim=True)
        best = {n: max(takers, key=lambda t, n=n: float(unit[n] @ unit[t])) for n in range(len(one)) if n not in takers}
        ranked = sorted(best, key=lambda n: -float(unit[n] @ unit[best[n]]))[:few]
        expected = one.clone()
        for taker in takers:
            members = [taker, *(n for n in ranked if best[n] == taker)]
            expected[taker] = one[members].mean(dim=0)
        for n in ranked:
            expected[n] = expected[best[n]]
        torch.testing.assert_close(got, expected)


def test_token_merging_reads_fewer_tokens_only_where_the_grid_is_large():
    net, asked = unet(), Asked()
    x, call = caller(net)
    lengths = []
    hook = net.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.register_forward_hook(lambda m, args, out: lengths.append(args[0].shape[1]))
    seen = approximated(net, {"token_merging": {"ratio": 0.5}}, asked, shape=(8, 8), tallies={})
    run(seen, call, x, asked, times=TIMES[:1])
    hook.remove()
    assert lengths == [32]
    odd = approximated(net, {"token_merging": {"ratio": 0.5}}, asked, shape=(64, 1), tallies={})  # no grid of 2x2
    assert torch.equal(run(odd, call, x, asked, times=TIMES[:1])[0], run(net, call, x, Asked(), times=TIMES[:1])[0])


def test_a_picture_is_approximated_as_in_a_batch_of_one_where_nothing_adapts():
    net, asked = unet(), Asked()
    x, call = caller(net, rows=2)
    seen = approximated(net, {"deep_cache": {"interval": 2}, "token_merging": {}}, asked, shape=(8, 8), tallies={})
    both = run(seen, call, x, asked)
    for n in range(2):
        own = Asked()
        alone = approximated(net, {"deep_cache": {"interval": 2}, "token_merging": {}}, own, shape=(8, 8), tallies={})
        _, single = caller(net, rows=2)
        found = run(alone, lambda m, t, y, n=n: single(m, t, y.expand(2, -1, -1, -1))[n:n + 1], x[n:n + 1], own)
        for a, b in zip(both, found, strict=True):
            torch.testing.assert_close(a[n:n + 1], b, rtol=1e-4, atol=1e-5)


def test_distance():
    assert distance(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 2.0]])) == 0.5
    assert distance(torch.zeros(1, 2), torch.zeros(1, 2)) == math.inf
    assert distance(torch.zeros(1, 2), torch.zeros(1, 3)) == math.inf


def test_the_table():
    assert kind_of("diffusers.UNet2DConditionModel") == "unet"
    assert {name for name, info in APPROXIMATIONS.items() if info.defaults.keys() != info.options.keys()} == set()
    for name, info in APPROXIMATIONS.items():
        APPROXIMATIONS.check({name: info.defaults})
    assert in_words({"taylor": {"interval": 3, "order": 1}}) == "taylor interval 3 order 1"
    assert clashes(["first_block", "taylor"]) == ("first_block", "taylor") and clashes(["deep_cache", "token_merging"]) is None
    with pytest.raises(RequestError, match="did you mean 'first_block'"):
        APPROXIMATIONS.find("firstblock")
    with pytest.raises(RequestError, match="no such option: its options are threshold"):
        APPROXIMATIONS.check({"first_block": {"treshold": 1}})
    with pytest.raises(RequestError, match="first_block's threshold is 2: give a number from 0 to 1"):
        APPROXIMATIONS.check({"first_block": {"threshold": 2}})
    tally = Tally()
    tally.count(True, 3)
    tally.count(False)
    assert (tally.saved, tally.asked) == (3, 4)
