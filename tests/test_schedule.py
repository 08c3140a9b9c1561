"""Training tables and spacings: against the formulas of the papers and diffusers' own."""

import math

import numpy as np
import pytest
import torch

from latentgen.diffusion import SPACINGS, RectifiedFlow, VarianceExploding, VariancePreserving, shifted, spacing, zero_terminal_snr
from latentgen.diffusion.schedule import cosine, linear, scaled_linear, sigmoid
from latentgen.errors import RequestError

SD = scaled_linear(1000, 0.00085, 0.012)
VP = VariancePreserving(SD)
ZERO = VariancePreserving(zero_terminal_snr(SD))
FLOW = RectifiedFlow()
VE = VarianceExploding(0.002, 80.0)
CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def times(levels):
    return [level.time for level in levels[:-1]]


def ratios(levels):
    return [level.sigma / level.alpha for level in levels]


@pytest.mark.parametrize(
    "table, config",
    [
        (linear(1000, 0.0001, 0.02), {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
        (SD, CONFIG),
        (cosine(1000), {"beta_schedule": "squaredcos_cap_v2"}),
    ],
    ids=["linear", "scaled_linear", "cosine"],
)
def test_tables_are_those_of_diffusers(table, config):
    scheduler = pytest.importorskip("diffusers").DDIMScheduler(**config)
    # theirs are multiplied up in float32
    np.testing.assert_allclose(table, scheduler.alphas_cumprod.double().numpy(), rtol=1e-4, atol=1e-7)


def test_linear_is_the_product_of_its_betas():
    assert linear(3, 0.1, 0.3) == pytest.approx((0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7))
    assert scaled_linear(3, 0.04, 0.16)[1] == pytest.approx(0.96 * (1 - 0.3**2))


def test_sigmoid_follows_its_curve_until_the_cap():
    curve = [1 / (1 + math.exp(6 * (i + 1) / 100 - 3)) for i in range(100)]
    low, high = 1 / (1 + math.exp(3)), 1 / (1 + math.exp(-3))
    assert sigmoid(100)[:99] == pytest.approx([(value - low) / (high - low) for value in curve[:99]])
    assert 0 < sigmoid(100)[-1] < 1e-4
    VariancePreserving(sigmoid(1000))


def test_zero_terminal_snr():
    table = zero_terminal_snr(SD)
    assert table[-1] == 0.0
    assert table[0] == pytest.approx(SD[0], rel=1e-12)
    rescale = pytest.importorskip("diffusers.schedulers.scheduling_ddim").rescale_zero_terminal_snr
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    np.testing.assert_allclose(table, torch.cumprod(1 - rescale(betas), 0).numpy(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("path", [VP, ZERO, FLOW, VE], ids=["vp", "zero-terminal", "flow", "ve"])
@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 999, 1000])
def test_every_spacing_falls_to_a_clean_end(path, name, steps):
    levels = spacing(name, path, steps)
    assert len(levels) == steps + 1
    assert (levels[-1].alpha, levels[-1].sigma) == (1.0, 0.0)
    snrs = [level.half_log_snr for level in levels]
    assert all(a < b for a, b in zip(snrs, snrs[1:]))
    if name != "leading":
        assert levels[0] == path.at(1.0)


@pytest.mark.parametrize("name", ["linspace", "leading", "trailing"])
def test_whole_timesteps_are_those_of_diffusers(name):
    scheduler = pytest.importorskip("diffusers").DDIMScheduler(**CONFIG, timestep_spacing=name)
    for steps in [*range(2, 130), 250, 333, 500, 999, 1000]:
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.tolist()
        assert times(spacing(name, VP, steps)) == theirs[:steps], steps  # numpy's arange now and then adds one more, -1
    assert all(isinstance(t, float) and t == int(t) for t in times(spacing(name, VP, 30)))


def test_leading_takes_an_offset():
    scheduler = pytest.importorskip("diffusers").DDIMScheduler(**CONFIG, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(50)
    assert times(spacing("leading", VP, 50, offset=1)) == scheduler.timesteps.tolist()
    with pytest.raises(RequestError, match="offset"):
        spacing("leading", VP, 1000, offset=1)
    with pytest.raises(RequestError, match="only leading"):
        spacing("trailing", VP, 10, offset=1)


def test_simple_is_that_of_comfyui():
    for steps in (1, 4, 7, 30):
        assert times(spacing("simple", VP, steps)) == [999 - i * 1000 // steps for i in range(steps)]
    assert [level.sigma for level in spacing("simple", FLOW, 4)] == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("name", ["karras", "exponential"])
@pytest.mark.parametrize("steps", [2, 5, 20, 33])
def test_ramps_are_those_of_diffusers(name, steps):
    scheduler = pytest.importorskip("diffusers").EulerDiscreteScheduler(**CONFIG, **{f"use_{name}_sigmas": True})
    scheduler.set_timesteps(steps)
    path = VariancePreserving(tuple(scheduler.alphas_cumprod.tolist()))
    levels = spacing(name, path, steps)
    np.testing.assert_allclose(ratios(levels), scheduler.sigmas.numpy(), rtol=1e-5)
    np.testing.assert_allclose(times(levels), scheduler.timesteps.numpy(), atol=0.02)  # theirs interpolate in float32


def test_ramps_start_where_the_network_expects_pure_noise():
    for path in (ZERO, FLOW):
        levels = spacing("karras", path, 10)
        assert levels[0] == path.at(1.0) and levels[0].alpha == 0.0
        highest = -path.at(1 - 1 / 1000).half_log_snr
        roots = [math.exp(-level.half_log_snr / 7) for level in levels[1:-1]]
        spacing_of_roots = np.diff([math.exp(highest / 7), *roots])
        np.testing.assert_allclose(spacing_of_roots, spacing_of_roots[0], rtol=1e-6)


def test_ve_karras_is_the_formula_of_the_paper():
    roots = np.linspace(80.0 ** (1 / 7), 0.002 ** (1 / 7), 18)
    np.testing.assert_allclose(ratios(spacing("karras", VE, 18))[:-1], roots**7, rtol=1e-9)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [2, 4, 28])
def test_flow_linspace_is_that_of_diffusers(shift, steps):
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    levels = spacing("linspace", FLOW, steps, shift=shift)
    np.testing.assert_allclose([level.sigma for level in levels], scheduler.sigmas.numpy(), rtol=1e-5)
    np.testing.assert_allclose(times(levels), scheduler.timesteps.numpy(), rtol=1e-5)


def test_flow_trailing_is_that_of_flux():
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 28, 28), mu=1.15)
    levels = spacing("trailing", FLOW, 28, shift=math.exp(1.15))
    np.testing.assert_allclose([level.sigma for level in levels], scheduler.sigmas.numpy(), rtol=1e-5)


def test_shifted():
    assert [shifted(s, 3.0) for s in (0.0, 0.5, 1.0)] == [0.0, 0.75, 1.0]
    assert shifted(0.37, 1.0) == 0.37


@pytest.mark.parametrize("name, hint", [("kerras", "did you mean 'karras'"), ("sgm_uniform", "linspace, leading")])
def test_an_unknown_spacing_is_refused_with_the_list(name, hint):
    with pytest.raises(RequestError, match=hint):
        spacing(name, VP, 10)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, True, None])
def test_bad_steps_are_refused(steps):
    with pytest.raises(RequestError, match="1 to 1000"):
        spacing("trailing", VP, steps)


@pytest.mark.parametrize("path, name, shift", [(VP, "trailing", 3.0), (FLOW, "karras", 3.0), (FLOW, "simple", 0.0), (FLOW, "simple", math.nan)])
def test_a_shift_without_effect_is_refused(path, name, shift):
    with pytest.raises(RequestError, match="shift"):
        spacing(name, path, 10, shift=shift)
