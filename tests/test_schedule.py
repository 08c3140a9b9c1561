"""Training tables and spacings: against the formulas of the papers and diffusers' own."""

import math

import numpy as np
import pytest
import torch

from latentgen.diffusion import (
    SPACINGS,
    UNSHIFTED,
    Levels,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    explicit,
    shifted,
    spacing,
    zero_terminal_snr,
)
from latentgen.diffusion.schedule import cosine, linear, scaled_linear, sigmoid
from latentgen.diffusion.spacings import AYS_VIDEO, beta_quantile, beta_share
from latentgen.errors import RequestError

SD = scaled_linear(1000, 0.00085, 0.012)
VP = VariancePreserving(SD)
ZERO = VariancePreserving(zero_terminal_snr(SD))
FLOW = RectifiedFlow()
VE = VarianceExploding(0.002, 80.0)
VIDEO = VarianceExploding(0.002, 700.0)
TABLES = {"ays": [VP], "ays_xl": [VP], "ays_video": [VIDEO]}  # spacings that were made for some paths only
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


@pytest.mark.parametrize("path", [VP, ZERO, FLOW, VE, VIDEO], ids=["vp", "zero-terminal", "flow", "ve", "video"])
@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 999, 1000])
def test_every_spacing_falls_to_a_clean_end(path, name, steps):
    if path not in TABLES.get(name, [path]):
        with pytest.raises(RequestError, match=f"{name} spacing was made for .*: use karras"):
            spacing(name, path, steps)
        return
    levels = spacing(name, path, steps)
    assert len(levels) == steps + 1
    assert (levels[-1].alpha, levels[-1].sigma) == (1.0, 0.0)
    snrs = [level.half_log_snr for level in levels]
    assert all(a < b for a, b in zip(snrs, snrs[1:]))
    assert levels.path is path and levels[1:].path is path
    if name == "ays_video":
        assert levels[0].sigma == pytest.approx(700.0)
    elif name != "leading":
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


@pytest.mark.parametrize("name, hint", [("kerras", "did you mean 'karras'"), ("quantum", "choose one of linspace, leading")])
def test_an_unknown_spacing_is_refused_with_the_list(name, hint):
    with pytest.raises(RequestError, match=hint):
        spacing(name, VP, 10)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, True, None])
def test_bad_steps_are_refused(steps):
    with pytest.raises(RequestError, match="1 to 1000"):
        spacing("trailing", VP, steps)


@pytest.mark.parametrize(
    "path, name, shift", [(VP, "trailing", 3.0), *((FLOW, name, 3.0) for name in UNSHIFTED), (FLOW, "simple", 0.0), (FLOW, "simple", math.nan)]
)
def test_a_shift_without_effect_is_refused(path, name, shift):
    with pytest.raises(RequestError, match="shift"):
        spacing(name, path, 10, shift=shift)


def test_normal_and_sgm_uniform_are_those_of_comfyui():
    """Timesteps torch.linspace(T - 1, 0, ...), not rounded, between which log sigma is interpolated; on a flow shifted before and after."""
    for steps in (1, 4, 20, 33):
        assert times(spacing("normal", VP, steps)) == pytest.approx(np.linspace(999, 0, steps))
        assert times(spacing("sgm_uniform", VP, steps)) == pytest.approx(np.linspace(999, 0, steps + 1)[:-1])
        bend = lambda s: 3 * s / (1 + 2 * s)  # noqa: E731
        s = bend(np.linspace(1, bend(1e-3), steps + 1)[:-1])
        np.testing.assert_allclose([level.sigma for level in spacing("sgm_uniform", FLOW, steps, shift=3.0)[:-1]], s, rtol=1e-12)
    assert spacing("normal", FLOW, 9, shift=2.0) == spacing("linspace", FLOW, 9, shift=2.0)


@pytest.mark.parametrize("steps", [1, 2, 8, 20, 41])
def test_beta_is_that_of_comfyui(steps):
    stats = pytest.importorskip("scipy.stats")
    shares = stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6)
    assert times(spacing("beta", VP, steps)) == np.rint(shares * 999).tolist()
    positions = (shares * 999 + 1) / 1000
    np.testing.assert_allclose([level.sigma for level in spacing("beta", FLOW, steps, shift=3.0)[:-1]], 3 * positions / (1 + 2 * positions), rtol=1e-12)


def test_beta_quantiles_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for a, b in ((0.6, 0.6), (0.5, 0.7), (2.0, 3.5), (1.0, 1.0)):
        shares = np.linspace(0.001, 0.999, 41)
        np.testing.assert_allclose([beta_quantile(share, a, b) for share in shares], stats.beta.ppf(shares, a, b), rtol=1e-9)
        np.testing.assert_allclose([beta_share(x, a, b) for x in shares], stats.beta.cdf(shares, a, b), rtol=1e-11)
    assert beta_quantile(0.0, 0.6, 0.6) == 0 and beta_quantile(1.0, 0.6, 0.6) == 1 and beta_quantile(0.5, 0.6, 0.6) == pytest.approx(0.5)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25])
def test_linear_quadratic_is_that_of_movie_gen(steps):
    """Half of the steps are the first of 1000 * 0.025 / half each; the parabola takes over with the same slope and ends at 1."""
    taken = [1 - level.sigma for level in spacing("linear_quadratic", FLOW, steps)]
    half = steps // 2
    assert taken[0] == 0 and taken[-1] == 1
    expected = [0.025 * i / half for i in range(half)] + [0.025] if half else [0.0]
    np.testing.assert_allclose(taken[:half + 1], expected, atol=1e-12)
    if steps > 3:
        bends = np.diff(taken[half:], 2)
        np.testing.assert_allclose(bends, bends[0], atol=1e-12)
    np.testing.assert_allclose(ratios(spacing("linear_quadratic", VP, steps)), (1 - np.array(taken)) * ratios([VP.at(1.0)])[0], atol=1e-9)


@pytest.mark.parametrize("path", [VP, VE], ids=["vp", "ve"])
def test_kl_optimal_is_even_in_the_angle(path):
    angles = np.arctan(ratios(spacing("kl_optimal", path, 17))[:-1])
    np.testing.assert_allclose(np.diff(angles), (angles[-1] - angles[0]) / 16, rtol=1e-6)


def test_polyexponential_is_that_of_k_diffusion():
    assert spacing("polyexponential", VE, 12) == spacing("exponential", VE, 12)
    ramp = np.linspace(1, 0, 12) ** 2.5
    expected = np.exp(ramp * (np.log(80) - np.log(0.002)) + np.log(0.002))
    np.testing.assert_allclose(ratios(spacing("polyexponential", VE, 12, rho=2.5))[:-1], expected, rtol=1e-9)
    roots = np.linspace(80 ** (1 / 5), 0.002 ** (1 / 5), 9) ** 5
    np.testing.assert_allclose(ratios(spacing("karras", VE, 9, rho=5.0))[:-1], roots, rtol=1e-9)


@pytest.mark.parametrize("name, rho, said", [("trailing", 5.0, "only karras and polyexponential"), ("karras", 0.0, "above 0"), ("karras", math.nan, "above 0")])
def test_a_rho_without_effect_or_sense_is_refused(name, rho, said):
    with pytest.raises(RequestError, match=said):
        spacing(name, VP, 10, rho=rho)


def test_align_your_steps_are_the_published_tables():
    schedules = pytest.importorskip("diffusers.schedulers.scheduling_utils").AysSchedules
    assert times(spacing("ays", VP, 10)) == schedules["StableDiffusionTimesteps"]
    assert times(spacing("ays_xl", VP, 10)) == schedules["StableDiffusionXLTimesteps"]
    assert list(AYS_VIDEO) == schedules["StableDiffusionVideoSigmas"][:-1] or list(AYS_VIDEO[:-1]) == schedules["StableDiffusionVideoSigmas"][:-1]
    np.testing.assert_allclose(ratios(spacing("ays_video", VIDEO, 10))[:-1], AYS_VIDEO[:-1], rtol=1e-9)
    # their published sigmas are those of the timesteps, in three digits
    np.testing.assert_allclose(ratios(spacing("ays", VP, 10))[:-1], schedules["StableDiffusionSigmas"][:-1], rtol=0.02)


@pytest.mark.parametrize("steps", [1, 5, 20, 33])
def test_align_your_steps_are_interpolated_in_the_logarithm(steps):
    logs = np.log(ratios([VP.at_time(t) for t in (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0)]))
    expected = np.exp(np.interp(np.linspace(0, 10, steps + 1), np.arange(11), logs))
    np.testing.assert_allclose(ratios(spacing("ays", VP, steps))[:-1], expected[:-1], rtol=1e-9)


def test_explicit_levels():
    assert times(explicit(VP, times=[999, 500, 0])) == [999, 500, 0]
    assert explicit(VP, times=(700.5, 20))[-1].sigma == 0
    assert [level.sigma for level in explicit(FLOW, sigmas=[1.0, 0.4, 0.1, 0.0])] == [1.0, 0.4, 0.1, 0.0]
    assert times(explicit(FLOW, times=np.array([1000, 250.0]))) == [1000, 250]
    np.testing.assert_allclose(ratios(explicit(VP, sigmas=[14.6, 2.0, 0.03, 0])), [14.6, 2.0, 0.03, 0], rtol=1e-9)
    np.testing.assert_allclose(ratios(explicit(VP, sigmas=[14.6147, 1.0]))[0], 14.6146, rtol=1e-4)  # a published digit too many
    assert explicit(VE, sigmas=[3.0, 1.0]).path is VE


@pytest.mark.parametrize(
    "path, said, hint",
    [
        (VP, {}, "one of them"), (VP, {"times": [1], "sigmas": [1]}, "one of them"), (VP, {"times": []}, "0 numbers"), (VP, {"times": [10, 10]}, "do not fall"),
        (VP, {"times": [1000]}, "0 to 999"), (VP, {"times": [5, -1]}, "0 to 999"), (VP, {"sigmas": [99.0, 1.0]}, "noisier than the model"),
        (VP, {"sigmas": [1.0, math.nan]}, "do not fall"), (VP, {"sigmas": [0.0]}, "do not fall"), (FLOW, {"sigmas": [1.2, 0.5]}, "0 .clean. to 1"),
        (FLOW, {"sigmas": [0.5, 0.0, 0.0]}, "do not fall"), (VE, {"times": [5.0]}, "pass sigmas"),
    ],
)
def test_explicit_levels_that_cannot_be_run_are_refused(path, said, hint):
    with pytest.raises(RequestError, match=hint):
        explicit(path, **said)


def test_levels_are_a_tuple_that_knows_its_path():
    import copy
    import pickle

    levels = spacing("karras", VP, 5)
    assert levels == tuple(levels) and hash(levels) == hash(tuple(levels)) and isinstance(levels[2], type(levels[0]))
    assert levels[2:].path is VP and Levels(levels).path is None
    for twin in (copy.copy(levels), copy.deepcopy(levels), pickle.loads(pickle.dumps(levels))):
        assert twin == levels and twin.path == VP
