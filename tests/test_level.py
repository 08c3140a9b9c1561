"""Levels, paths, prediction rows and seeded noise: exact answers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentgen.diffusion import (
    Level,
    NoisePath,
    RectifiedFlow,
    SeededNoise,
    VarianceExploding,
    VariancePreserving,
    noised,
    prediction_row,
    start,
    zero_terminal_snr,
)
from latentgen.diffusion.schedule import scaled_linear
from latentgen.errors import RequestError

SD = scaled_linear(1000, 0.00085, 0.012)
PATHS = {
    "vp": VariancePreserving(SD),
    "zero-terminal": VariancePreserving(zero_terminal_snr(SD)),
    "flow": RectifiedFlow(),
    "ve": VarianceExploding(0.002, 80.0),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


@every_path
def test_a_path_is_clean_at_0_and_only_gets_noisier(path):
    assert isinstance(path, NoisePath)
    levels = [path.at(i / 5000) for i in range(5001)]
    assert (levels[0].alpha, levels[0].sigma) == (1.0, 0.0)
    assert levels[0].half_log_snr == math.inf
    assert all(b.half_log_snr < a.half_log_snr for a, b in zip(levels, levels[1:]))
    assert all(b.time >= a.time for a, b in zip(levels, levels[1:]))


@every_path
@given(s=st.floats(0, 1))
def test_find_inverts_at(path, s):
    assert path.find(path.at(s).half_log_snr) == pytest.approx(s, abs=1e-9)


@every_path
def test_find_at_both_infinities(path):
    assert path.find(math.inf) == 0.0
    assert path.find(-math.inf) == 1.0


@every_path
@pytest.mark.parametrize("s", [-0.01, 1.01, math.nan])
def test_a_position_outside_the_path_is_refused(path, s):
    with pytest.raises(RequestError, match="position"):
        path.at(s)


def test_variance_preserving_levels_are_the_table_at_whole_timesteps():
    path = PATHS["vp"]
    for t in (0, 1, 500, 999):
        level = path.at_time(t)
        assert level == Level(math.sqrt(SD[t]), math.sqrt(1 - SD[t]), t)
        assert path.at((t + 1) / 1000).alpha == pytest.approx(level.alpha, rel=1e-12)
    for s in (0.0003, 0.4567, 0.99999):
        assert math.hypot(path.at(s).alpha, path.at(s).sigma) == pytest.approx(1, abs=1e-15)
    between = path.at_time(400.25)
    assert between.half_log_snr == pytest.approx(0.75 * path.at_time(400).half_log_snr + 0.25 * path.at_time(401).half_log_snr)
    assert between.time == 400.25
    for t in (-1, 999.5):
        with pytest.raises(RequestError, match="999"):
            path.at_time(t)


def test_zero_terminal_snr_ends_exactly_in_noise():
    path = PATHS["zero-terminal"]
    assert path.at(1.0) == Level(0.0, 1.0, 999.0)
    assert path.at(1.0).half_log_snr == -math.inf
    assert 0 < path.at_time(998.5).alpha < path.at_time(998).alpha


def test_flow_and_exploding_levels():
    assert PATHS["flow"].at(1.0) == Level(0.0, 1.0, 1000.0)
    assert PATHS["flow"].at(0.25) == Level(0.75, 0.25, 250.0)
    noise = PATHS["ve"].at(1.0)
    assert noise.alpha == 1 and noise.sigma == pytest.approx(80) and noise.time == pytest.approx(math.log(80) / 4)
    assert PATHS["ve"].at(1 / 1000).sigma == pytest.approx(0.002)


@pytest.mark.parametrize("table", [(), (0.5,), (0.5, 0.5), (0.5, 0.6), (1.0, 0.5), (0.5, -0.1), (0.9, math.nan)])
def test_a_table_that_does_not_fall_is_refused(table):
    with pytest.raises(RequestError, match="alphas_bar"):
        VariancePreserving(table)


def test_an_impossible_exploding_path_is_refused():
    with pytest.raises(RequestError, match="sigma_min"):
        VarianceExploding(2.0, 1.0)


TARGETS = {
    "epsilon": lambda x0, eps, level: eps,
    "v": lambda x0, eps, level: level.alpha * eps - level.sigma * x0,
    "flow": lambda x0, eps, level: eps - x0,
    "x0": lambda x0, eps, level: x0,
}


@every_path
@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("s", [0.0, 0.01, 0.6, 1.0])
def test_a_perfect_prediction_gives_x0_back(path, prediction, s):
    level = path.at(s)
    if prediction == "epsilon" and level.alpha == 0:
        with pytest.raises(RequestError, match="alpha = 0"):
            prediction_row(prediction, level)
        return
    x0, eps = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = prediction_row(prediction, level)
    out = TARGETS[prediction](x0, eps, level)
    torch.testing.assert_close(a * noised(x0, eps, level) + b * out, x0, atol=1e-9, rtol=1e-9)


@every_path
def test_the_edm_row_is_that_of_the_paper_in_scaled_coordinates(path):
    level, sigma_data = path.at(0.3), 0.7
    a, b = prediction_row("edm", level, sigma_data=sigma_data)
    sigma = level.sigma / level.alpha  # EDM works on x / alpha
    assert a * level.alpha == pytest.approx(sigma_data**2 / (sigma**2 + sigma_data**2))
    assert b == pytest.approx(sigma * sigma_data / math.hypot(sigma, sigma_data))
    assert prediction_row("edm", Level(0.0, 1.0, 999)) == (0.0, 0.5)  # and has no trouble where alpha = 0


def test_an_unknown_prediction_is_refused_with_the_list():
    with pytest.raises(RequestError, match="epsilon, v, flow, x0, edm"):
        prediction_row("noise", Level(0.6, 0.8, 1.0))


def test_noised_and_start():
    x0, eps = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    level = Level(0.25, 0.75, 750.0)
    torch.testing.assert_close(noised(x0, eps, level), 0.25 * x0 + 0.75 * eps)
    assert noised(x0, eps, level).dtype == torch.float32
    torch.testing.assert_close(start(eps, level), eps * math.sqrt(0.625))
    assert torch.equal(start(eps, PATHS["flow"].at(1.0)), eps)
    assert torch.equal(start(eps, PATHS["zero-terminal"].at(1.0)), eps)


def test_an_image_has_the_same_noise_in_any_batch_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    shape, s = (4, 6, 5), 41
    batch = SeededNoise([s, s + 1, s + 2], shape)
    first, second = batch.draw(), batch.draw()
    assert first.shape == (3, *shape) and first.dtype == torch.float32 and first.device.type == "cpu"
    for i in range(3):
        alone = SeededNoise([s + i], shape)
        assert torch.equal(alone.draw()[0], first[i])
        assert torch.equal(alone.draw()[0], second[i])
    assert not torch.equal(first, second)
    assert torch.equal(first[1:2], torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(s + 1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_first_draw_is_that_of_diffusers():
    randn_tensor = pytest.importorskip("diffusers.utils.torch_utils").randn_tensor
    theirs = randn_tensor((2, 4, 8, 8), generator=[torch.Generator("cpu").manual_seed(seed) for seed in (7, 8)])
    assert torch.equal(SeededNoise((7, 8), (4, 8, 8)).draw(), theirs)


@pytest.mark.parametrize("seeds", [[], [-1], [2**64], [1.0], [True]])
def test_unusable_seeds_are_refused(seeds):
    with pytest.raises(RequestError, match="seed"):
        SeededNoise(seeds, (4, 8, 8))
