"""Seeds to noise: the same in any batch and order, and varied and resized as A1111's published rule says."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from latentgen.diffusion.noise import SeededNoise, centred, slerp
from latentgen.errors import RequestError

SHAPE = (4, 8, 6)


def a1111(seed: int, shape: tuple[int, int, int], subseed: int | None = None, strength: float = 0.0, origin: tuple[int, int] | None = None) -> Tensor:
    """One image's first noise, written index by index from the rule that A1111 publishes (rng.py: ImageRNG.first, slerp; noise source "CPU")."""
    def drawn(of: int, size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=torch.Generator("cpu").manual_seed(of))

    at = shape if origin is None else (shape[0], *origin)
    noise = drawn(seed, at)
    if subseed is not None and strength != 0:
        other, mixed = drawn(subseed, at), noise.clone()
        for c, column in itertools.product(range(at[0]), range(at[2])):
            low, high = noise[c, :, column].double(), other[c, :, column].double()
            omega = torch.acos((low / low.norm()) @ (high / high.norm()))
            mixed[c, :, column] = (torch.sin((1 - strength) * omega) / torch.sin(omega) * low + torch.sin(strength * omega) / torch.sin(omega) * high).float()
        noise = mixed
    if at == shape:
        return noise
    x = drawn(seed, shape)
    dx, dy = (shape[2] - at[2]) // 2, (shape[1] - at[1]) // 2
    w, h = at[2] + min(0, 2 * dx), at[1] + min(0, 2 * dy)
    for row, column in itertools.product(range(h), range(w)):
        x[:, max(dy, 0) + row, max(dx, 0) + column] = noise[:, max(-dy, 0) + row, max(-dx, 0) + column]
    return x


def test_the_first_draw_is_that_of_a_plain_generator() -> None:
    expected = torch.cat([torch.randn((1, *SHAPE), generator=torch.Generator("cpu").manual_seed(seed)) for seed in (3, 7, 2**63 - 1)])
    assert torch.equal(SeededNoise([3, 7, 2**63 - 1], SHAPE).draw(), expected)


@pytest.mark.parametrize("strength", [0.0, 0.01, 0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("origin", [None, (8, 6), (4, 4), (5, 3), (16, 12), (11, 9), (4, 12), (12, 5), (1, 1), (9, 7)])
def test_variation_and_seed_resize_are_a1111s(strength: float, origin: tuple[int, int] | None) -> None:
    noise = SeededNoise([3, 7], SHAPE, variations=[100, 5], strength=strength, origin=origin)
    if origin == (1, 1) and strength:
        assert bool(torch.isfinite(noise.draw()).all())  # one number is no direction: there the published rule gives NaN
        return
    expected = torch.stack([a1111(seed, SHAPE, other, strength, origin) for seed, other in ((3, 100), (7, 5))])
    torch.testing.assert_close(noise.draw(), expected, rtol=0, atol=2e-6)


def test_the_ends_of_a_variation_are_the_two_noises_bit_by_bit() -> None:
    plain = SeededNoise([3, 100], SHAPE).draw()
    assert torch.equal(SeededNoise([3], SHAPE, variations=[100], strength=0.0).draw()[0], plain[0])
    torch.testing.assert_close(SeededNoise([3], SHAPE, variations=[100], strength=1.0).draw()[0], plain[1], rtol=0, atol=1e-6)
    assert torch.equal(SeededNoise([3], SHAPE, variations=[3], strength=0.4).draw()[0], plain[0])  # nothing to turn to


def test_a_seed_resized_to_its_own_size_is_itself() -> None:
    assert torch.equal(SeededNoise([3], SHAPE, origin=SHAPE[1:]).draw(), SeededNoise([3], SHAPE).draw())


def test_later_draws_follow_as_if_nothing_had_been_varied() -> None:
    """What stochastic samplers draw is A1111's too: one draw of the picture's own shape has gone before."""
    plain, varied = SeededNoise([3, 7], SHAPE), SeededNoise([3, 7], SHAPE, variations=[1, 2], strength=0.3, origin=(4, 4))
    assert not torch.equal(plain.draw(), varied.draw())
    for _ in range(3):
        assert torch.equal(plain.draw(), varied.draw())


@pytest.mark.parametrize("options", [{}, {"strength": 0.3}, {"origin": (5, 9)}, {"strength": 0.3, "origin": (16, 4)}], ids=str)
def test_noise_depends_on_its_own_seeds_alone(options: dict) -> None:
    """In any batch and any order, over several draws."""
    pairs = [(3, 30), (11, 5), (7, 70), (3, 31)]

    def draws(some: list[tuple[int, int]]) -> Tensor:
        varied = {"variations": [b for _, b in some]} if "strength" in options else {}
        noise = SeededNoise([a for a, _ in some], SHAPE, **varied, **options)
        return torch.stack([noise.draw() for _ in range(3)], dim=1)

    alone = {pair: draws([pair])[0] for pair in pairs}
    for order in itertools.permutations(pairs):
        assert all(torch.equal(made, alone[pair]) for pair, made in zip(order, draws(list(order)), strict=True))


def test_the_global_generator_is_not_touched_and_does_not_matter() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before, one = torch.get_rng_state(), SeededNoise([3], SHAPE, variations=[4], strength=0.5, origin=(4, 4)).draw()
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert torch.equal(SeededNoise([3], SHAPE, variations=[4], strength=0.5, origin=(4, 4)).draw(), one)


def test_the_spread_stays_that_of_unit_noise() -> None:
    """Which the straight line between two noises would not keep: its variance falls to a half in the middle."""
    noise = SeededNoise(range(4), (4, 64, 64), variations=range(50, 54), strength=0.5).draw()
    assert abs(float(noise.std()) - 1) < 0.02 and abs(float(noise.mean())) < 0.02


@pytest.mark.parametrize("dim", [-1, -2, (-2, -1), (0, 1, 2)])
def test_the_arc_has_the_angles_that_it_should(dim: int | tuple[int, ...]) -> None:
    """Of unit vectors: unit vectors, at t and 1 - t of the whole angle from the two ends."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn((3, 4, 5), generator=g, dtype=torch.float64) for _ in range(2))
    a, b = (one / torch.linalg.vector_norm(one, dim=dim, keepdim=True) for one in (a, b))
    whole = torch.acos((a * b).sum(dim))
    for share in (0.0, 0.25, 0.8, 1.0):
        made = slerp(a, b, share, dim=dim)
        torch.testing.assert_close(torch.linalg.vector_norm(made, dim=dim), torch.ones_like(whole), rtol=0, atol=1e-9)
        torch.testing.assert_close(torch.acos((a * made).sum(dim).clamp(-1, 1)), share * whole, rtol=0, atol=1e-7)


def test_where_there_is_no_arc_the_line_is_taken() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(slerp(a, a, 0.3, dim=-1), a)
    assert torch.equal(slerp(a, -a, 0.25, dim=-1), 0.5 * a)
    assert torch.equal(slerp(torch.zeros(2, 2), a, 0.5, dim=-1), 0.5 * a)


def test_placed_in_the_middle() -> None:
    ground, noise = torch.zeros(1, 5, 6), torch.arange(1.0, 7.0).reshape(1, 2, 3)
    assert centred(noise, ground)[0].nonzero().tolist() == [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]]
    assert centred(torch.arange(16.0).reshape(1, 4, 4), torch.zeros(1, 2, 2)).tolist() == [[[5.0, 6.0], [9.0, 10.0]]]
    assert not ground.any()


@pytest.mark.parametrize(("said", "words"), [
    ({"seeds": []}, "no seeds"), ({"seeds": [-1]}, "seed -1"), ({"seeds": [2**64]}, "seed 1844"), ({"seeds": [True]}, "seed True"), ({"seeds": [1.0]}, "seed 1.0"),
    ({"seeds": [1], "variations": [-2], "strength": 0.1}, "seed -2"), ({"seeds": [1, 2], "variations": [3], "strength": 0.1}, "1 variation seeds"),
    ({"seeds": [1], "variations": [3], "strength": 1.1}, "strength of a variation is 1.1"), ({"seeds": [1], "strength": float("nan")}, "strength of a variation is nan"),
    ({"seeds": [1], "strength": 0.5}, "0 variation seeds")], ids=str)
def test_what_cannot_be_drawn(said: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        SeededNoise(said.pop("seeds"), SHAPE, **said)
