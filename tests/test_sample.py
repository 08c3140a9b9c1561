"""Samplers against exact answers: Gaussian data has a known denoiser, and so a known solution at every level."""

import math
from itertools import pairwise

import pytest
import torch

from latentgen.diffusion import SAMPLERS, Level, RectifiedFlow, VarianceExploding, VariancePreserving, sampler, spacing, zero_terminal_snr
from latentgen.diffusion.schedule import scaled_linear
from latentgen.errors import RequestError

SD = scaled_linear(1000, 0.00085, 0.012)
PATHS = {
    "vp": VariancePreserving(SD),
    "zero-terminal": VariancePreserving(zero_terminal_snr(SD)),
    "flow": RectifiedFlow(),
    "ve": VarianceExploding(0.002, 80.0),
}
DETERMINISTIC = [name for name, info in SAMPLERS.items() if not info.stochastic]
MU, S = 0.7, 0.4  # the data: N(MU, S²)
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def gaussian(x, level, one=1.0):
    """E[x0 | x] of the data."""
    gain = level.alpha * S**2 / (level.alpha**2 * S**2 + level.sigma**2)
    return MU * one + gain * (x - level.alpha * MU * one)


def spread(level):
    return math.hypot(level.alpha * S, level.sigma)


def no_noise():
    raise AssertionError("a deterministic sampler drew noise")


def run(name, x, levels, denoise=gaussian, noise=no_noise, **options):
    return list(sampler(name).function(denoise, x, levels, noise=noise, **options))


def even_levels(path, steps, high, low):
    """Levels even in log(alpha / sigma), ending before the clean end: a smooth grid, as orders are measured on."""
    ends = [path.at(high).half_log_snr, path.at(low).half_log_snr]
    return [path.at(path.find(ends[0] + (ends[1] - ends[0]) * i / steps)) for i in range(steps + 1)]


def order(name, path, **options):
    """Slope of the log of the error between 40 and 80 steps."""
    x = torch.tensor([1.3], dtype=torch.float64)
    errors = []
    for steps in (40, 80):
        levels = even_levels(path, steps, 0.9, 0.1)
        first, last = levels[0], levels[-1]
        exact = last.alpha * MU + spread(last) / spread(first) * (x - first.alpha * MU)
        errors.append((run(name, x, levels, **options)[-1].x - exact).abs().item())
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("path", [PATHS["vp"], PATHS["flow"]], ids=["vp", "flow"])
@pytest.mark.parametrize(
    "name, options, expected",
    [("euler", {}, 1), ("ddim", {}, 1), ("heun", {}, 2), ("heun", {"variable": "ratio"}, 2), ("dpmpp_2m", {}, 2)],
)
def test_order_of_convergence(name, options, expected, path):
    assert order(name, path, **options) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_reach_the_exact_end_from_pure_noise(name, path):
    levels = spacing("karras", path, 300)
    first, last = levels[0], levels[-2]
    x = torch.tensor([-1.0, 0.2, 1.5], dtype=torch.float64) * first.sigma
    # the ODE down to the last noisy level; the step from there to sigma = 0 is x0 itself, whatever the sampler
    exact = gaussian(last.alpha * MU + spread(last) / spread(first) * (x - first.alpha * MU), last)
    tolerance = 0.02 if name in ("euler", "ddim") else 5e-4
    torch.testing.assert_close(run(name, x, levels)[-1].x, exact, atol=tolerance, rtol=0)


def mean_and_std(name, path, steps, denoise, **options):
    """The exact law of the result: an affine denoiser keeps x = mean + sum of weights * draws, so x is carried as its weights."""
    levels = spacing("trailing", path, steps)
    basis = iter(torch.eye(steps + 3, dtype=torch.float64))
    one, first = next(basis), next(basis)
    x = first * math.hypot(levels[0].alpha, levels[0].sigma)
    x = run(name, x, levels, lambda x, level: denoise(x, level, one), noise=lambda: next(basis), **options)[-1].x
    return x[0].item(), x[1:].norm().item()


@pytest.mark.parametrize("path", [PATHS["vp"], PATHS["zero-terminal"], PATHS["flow"]], ids=["vp", "zero-terminal", "flow"])
@pytest.mark.parametrize(
    "name, options", [("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.5}), ("ddpm", {}), ("euler_ancestral", {}), ("dpmpp_2m_sde", {})]
)
def test_stochastic_samplers_reach_the_right_mean_and_spread(name, options, path):
    coarse, fine = (mean_and_std(name, path, steps, gaussian, **options) for steps in (200, 400))
    assert fine == pytest.approx((MU, S), abs=0.03)
    # the start at unit spread is not quite the data's on a table that stops short of pure noise; the rest must shrink with the steps
    assert abs(fine[1] - S) < 0.7 * abs(coarse[1] - S) or abs(fine[1] - S) < 2e-3


def consistency(x, level, one=1.0):
    """The end of the ODE from x: what a perfectly distilled consistency model answers."""
    return MU * one + S / spread(level) * (x - level.alpha * MU * one)


@pytest.mark.parametrize("path", [PATHS["zero-terminal"], PATHS["flow"]], ids=["zero-terminal", "flow"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_with_a_perfect_consistency_model_is_exact_at_any_number_of_steps(path, steps):
    assert mean_and_std("lcm", path, steps, consistency) == pytest.approx((MU, S), abs=1e-12)


@every_sampler
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_two_ends_are_exact(name, path):
    """From alpha = 0 to sigma = 0: finite, and the last step returns the denoiser's answer to the last bit."""
    levels = spacing("trailing", path, 6)
    generator = torch.Generator().manual_seed(3)
    noise = lambda: torch.randn(2, 4, 5, 5, generator=generator)  # noqa: E731
    steps = run(name, noise() * levels[0].sigma, levels, lambda x, level: torch.tanh(x) + level.sigma, noise)
    assert all(step.x.isfinite().all() and step.x.dtype == torch.float32 for step in steps)
    assert torch.equal(steps[-1].x, steps[-1].x0)


@every_sampler
def test_one_step_object_for_each_transition(name):
    levels = spacing("trailing", PATHS["flow"], 5)
    asked, draws = [], []

    def denoise(x, level):
        asked.append(level)
        return 0.5 * x

    def noise():
        draws.append(1)
        return torch.ones(1, 4, 2, 2)

    steps = run(name, torch.ones(1, 4, 2, 2), levels, denoise, noise)
    info = SAMPLERS[name]
    assert [(step.index, step.total) for step in steps] == [(i, 5) for i in range(5)]
    assert [step.level for step in steps] == list(levels[:-1])
    assert len(asked) == 5 * info.evaluations_per_step - (1 if name == "heun" else 0)
    assert len(draws) == (4 if info.stochastic else 0)
    assert all(isinstance(level, Level) for level in asked)


@every_sampler
def test_a_run_can_be_cut_in_two_unless_it_has_a_history(name):
    levels = spacing("trailing", PATHS["vp"], 8)
    x = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def noises():
        generator = torch.Generator().manual_seed(5)
        return lambda: torch.randn(1, 4, 3, 3, generator=generator)

    whole = run(name, x, levels, noise=noises())[-1].x
    noise = noises()
    half = run(name, x, levels[:4], noise=noise)[-1].x
    joined = run(name, half, levels[3:], noise=noise)[-1].x
    assert torch.equal(joined, whole) is not name.startswith("dpmpp_2m")


def test_samplers_leave_their_input_and_the_global_generator_alone():
    before = torch.get_rng_state()
    x = torch.ones(1, 4, 2, 2)
    for name in SAMPLERS:
        run(name, x, spacing("trailing", PATHS["flow"], 3), noise=lambda: torch.zeros(1, 4, 2, 2))
    assert torch.equal(x, torch.ones(1, 4, 2, 2)) and torch.equal(torch.get_rng_state(), before)


def test_ddim_at_eta_1_is_the_posterior_of_ddpm():
    """Ho et al. 2020, eq. 6 and 7, written out for two neighbouring timesteps."""
    t, (a_now, a_then) = 500, (SD[500], SD[499])
    path, beta = PATHS["vp"], 1 - SD[500] / SD[499]
    x, x0, z = 0.3, -0.8, 1.7
    mean = math.sqrt(a_then) * beta / (1 - a_now) * x0 + math.sqrt(1 - beta) * (1 - a_then) / (1 - a_now) * x
    expected = mean + math.sqrt((1 - a_then) / (1 - a_now) * beta) * z
    levels = [path.at_time(t), path.at_time(t - 1)]
    tensor = lambda value: torch.tensor([value], dtype=torch.float64)  # noqa: E731
    for name, options in (("ddpm", {}), ("ddim", {"eta": 1.0}), ("euler_ancestral", {})):
        (step,) = run(name, tensor(x), levels, lambda *_: tensor(x0), lambda: tensor(z), **options)
        assert step.x.item() == pytest.approx(expected, rel=1e-12)


def test_heun_is_the_trapezoid_rule_of_a_flow():
    now, then = PATHS["flow"].at(1.0), PATHS["flow"].at(0.6)
    x = torch.tensor([0.9], dtype=torch.float64)
    velocity = lambda x, level: (x - gaussian(x, level)) / level.sigma  # noqa: E731
    v = velocity(x, now)
    expected = x + (0.6 - 1.0) / 2 * (v + velocity(x + (0.6 - 1.0) * v, then))
    torch.testing.assert_close(run("heun", x, [now, then])[-1].x, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_first_order_step_is_exact_when_x0_is_constant(path):
    x0, eps = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for now, then in pairwise(spacing("simple", path, 9)):
        x = now.alpha * x0 + now.sigma * eps
        torch.testing.assert_close(
            run("euler", x, [now, then], lambda *_: x0)[-1].x, then.alpha * x0 + then.sigma * eps, rtol=1e-9, atol=1e-9  # noqa: B023
        )


@every_sampler
def test_low_precision_is_refused(name):
    with pytest.raises(RequestError, match="float32"):
        run(name, torch.ones(1, 4, 2, 2, dtype=torch.float16), spacing("trailing", PATHS["flow"], 3))


@pytest.mark.parametrize("levels", [[], [Level(0.5, 0.5, 1.0)], [Level(0.5, 0.5, 1.0)] * 2, [Level(1.0, 0.0, 0.0), Level(0.0, 1.0, 1.0)]])
@every_sampler
def test_levels_that_do_not_get_cleaner_are_refused(name, levels):
    with pytest.raises(RequestError, match="levels"):
        run(name, torch.ones(1), levels)


@pytest.mark.parametrize("name, options", [("ddim", {"eta": -0.1}), ("ddim", {"eta": 1.5}), ("heun", {"variable": "t"})])
def test_bad_options_are_refused(name, options):
    with pytest.raises(RequestError, match=next(iter(options))):
        run(name, torch.ones(1), spacing("trailing", PATHS["flow"], 3), **options)


def test_the_table_names_every_option():
    for info in SAMPLERS.values():
        keywords = info.function.__kwdefaults__ or {}
        assert tuple(keywords) == info.options


@pytest.mark.parametrize(
    "given, ours",
    [
        ("euler_a", "'euler_ancestral'"),
        ("Euler a", "'euler_ancestral'"),
        ("k_euler_a", "'euler_ancestral'"),
        ("EulerAncestralDiscreteScheduler", "'euler_ancestral'"),
        ("Euler", "'euler'"),
        ("EulerDiscreteScheduler", "'euler'"),
        ("FlowMatchEulerDiscreteScheduler", "'euler'"),
        ("DPM++ 2M", "'dpmpp_2m'"),
        ("DPM++ 2M Karras", "'dpmpp_2m' with spacing 'karras'"),
        ("DPM++ 2M SDE", "'dpmpp_2m_sde'"),
        ("DPMSolverMultistepScheduler", "'dpmpp_2m'"),
        ("DDIMScheduler", "'ddim'"),
        ("LCM", "'lcm'"),
        ("HeunDiscreteScheduler", "'heun'"),
        ("uler", "'euler'"),
    ],
)
def test_other_names_are_refused_with_ours(given, ours):
    with pytest.raises(RequestError) as error:
        sampler(given)
    assert f"did you mean {ours}?" in str(error.value)


@pytest.mark.parametrize("given", ["quantum", "", None, 3])
def test_a_name_that_resembles_nothing_gets_the_list(given):
    with pytest.raises(RequestError, match="Choose one of ddpm, ddim") as error:
        sampler(given)
    assert "did you mean" not in str(error.value)
