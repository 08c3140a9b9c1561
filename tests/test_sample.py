"""Samplers against exact answers: Gaussian data has a known denoiser, and so a known solution at every level."""

import math
from itertools import pairwise

import pytest
import torch

from latentgen.diffusion import (
    SAMPLERS,
    Level,
    Levels,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    asked,
    sampler,
    spacing,
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
DETERMINISTIC = [name for name, info in SAMPLERS.items() if not info.stochastic]
MU, S = 0.7, 0.4  # the data: N(MU, S²)
HISTORY = {"dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "res_multistep", "unipc", "sa_solver", "er_sde", "plms", "pndm", "ipndm", "lms", "deis"}
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
    tolerance = 0.02 if name in ("euler", "ddim") else 2e-3 if name in ("pndm", "ipndm", "plms") else 5e-4
    torch.testing.assert_close(run(name, x, levels)[-1].x, exact, atol=tolerance, rtol=0)


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


# denoiser calls and draws in the four steps between levels, and in the last
COSTS = {
    "heun": (2, 0), "dpm2": (2, 0), "dpm2_ancestral": (2, 1), "dpmpp_2s_ancestral": (2, 1), "dpmpp_sde": (2, 2), "rk45": (6, 0),
    "annealed_langevin": (5, 5), "predictor_corrector": (2, 2),
}


@every_sampler
def test_one_step_object_for_each_transition(name):
    path = PATHS["vp"]
    levels = spacing("trailing", path, 5)
    seen, draws = [], []

    def denoise(x, level):
        seen.append(level)
        return 0.5 * x

    def noise():
        draws.append(1)
        return torch.ones(1, 4, 2, 2)

    steps = run(name, torch.ones(1, 4, 2, 2), levels, denoise, noise)
    info = SAMPLERS[name]
    assert [(step.index, step.total) for step in steps] == [(i, 5) for i in range(5)]
    assert [step.level for step in steps] == list(levels[:-1])
    assert tuple(seen) == asked(name, levels)
    calls, drawn = COSTS.get(name, (1, int(info.stochastic)))
    last = {"annealed_langevin": (6, 5), "predictor_corrector": (2, 1)}.get(name, (1, 0))
    extra = {"plms": (1, 0), "pndm": (9, 0), "restart": (4 + 2 * 8, 2)}.get(name, (0, 0))  # the first steps, and the two restarts
    if name == "restart":
        calls, drawn = 1, 0
    assert (len(seen), len(draws)) == tuple(4 * each + end + more for each, end, more in zip((calls, drawn), last, extra, strict=True))
    assert (info.evaluations_per_step == calls or name == "restart") and all(isinstance(level, Level) for level in seen)


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"restart"}))  # which looks for its level near s_low in each part
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
    assert torch.equal(joined, whole) is (name not in HISTORY)


@every_sampler
def test_an_image_does_not_depend_on_its_batch(name):
    levels, denoise = spacing("karras", PATHS["flow"], 6), lambda x, level: torch.tanh(2 * x) + level.sigma
    eps = torch.randn(3, 40, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch, alone = iter(eps.transpose(0, 1)), iter(eps[1:2].transpose(0, 1))
    both = run(name, next(batch), levels, denoise, lambda: next(batch))[-1].x
    one = run(name, next(alone), levels, denoise, lambda: next(alone))[-1].x
    torch.testing.assert_close(both[1:2], one, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize(
    "name, options",
    [
        ("ddim", {"eta": -0.1}), ("ddim", {"eta": 1.5}), ("ddim", {"eta": math.nan}), ("ddim", {"eta": "1"}), ("ddim", {"eta": True}),
        ("heun", {"variable": "t"}),
        ("euler", {"s_churn": -1}), ("lms", {"order": 5}), ("lms", {"order": 2.5}), ("unipc", {"order": 0}), ("unipc", {"variant": "bh3"}),
        ("tcd", {"gamma": 1.1}), ("sa_solver", {"tau": -1.0}), ("restart", {"times": 0}), ("rk45", {"rtol": 2.0}),
        ("predictor_corrector", {"predictor": "euler"}), ("annealed_langevin", {"step": 0.0}), ("dpmpp_2m_sde", {"solver": "ralston"}),
    ],
)
def test_bad_options_are_refused(name, options):
    with pytest.raises(RequestError, match=next(iter(options))):
        run(name, torch.ones(1), spacing("trailing", PATHS["flow"], 3), **options)


@every_sampler
def test_an_option_that_a_sampler_does_not_have_is_refused_with_those_it_has(name):
    with pytest.raises(RequestError, match="no such option: it has none|no such option: its options are"):
        run(name, torch.ones(1), spacing("trailing", PATHS["flow"], 3), strength=1)


def test_the_table_names_every_option():
    for name, info in SAMPLERS.items():
        assert info.generator.__name__ == name and info.about and info.paper and info.order
        assert set(info.generator.__kwdefaults__ or {}) == set(info.options) == set(info.defaults)
        info.check(info.defaults)
        assert all(option.about and option.takes for option in info.options.values())


@pytest.mark.parametrize("name", [name for name, info in SAMPLERS.items() if info.between])
def test_samplers_that_ask_between_levels_refuse_levels_that_know_no_path(name):
    levels = tuple(spacing("trailing", PATHS["vp"], 6))
    with pytest.raises(RequestError, match="know their path"):
        run(name, torch.ones(1, 1), levels, noise=lambda: torch.ones(1, 1), **({"rtol": 0.1} if name == "rk45" else {}))
    run(name, torch.ones(1, 1), Levels(levels, PATHS["vp"]), noise=lambda: torch.ones(1, 1))


@every_sampler
def test_only_those_marked_ask_between_levels(name):
    if not SAMPLERS[name].between:
        run(name, torch.ones(1, 1), tuple(spacing("trailing", PATHS["vp"], 6)), noise=lambda: torch.ones(1, 1))


def test_churn_never_goes_beyond_the_path():
    """At the noisy end nothing is added: the network has seen nothing noisier."""
    levels = spacing("karras", PATHS["vp"], 10)
    top = levels[0]
    for name in ("euler", "heun", "dpm2"):
        seen = asked(name, levels, {"s_churn": 40.0})
        assert seen[0] == top and all(level.half_log_snr >= top.half_log_snr for level in seen)
        assert len(set(seen) - set(asked(name, levels))) >= 8  # and below it is


def test_restart_goes_back_up():
    levels = spacing("karras", PATHS["vp"], 12)
    ratios = [level.sigma / level.alpha for level in asked("restart", levels, {"times": 3, "inner": 4})]
    assert sum(b > a * 3 for a, b in zip(ratios, ratios[1:], strict=False)) == 3
    with pytest.raises(RequestError, match="use more steps"):
        run("restart", torch.ones(1), spacing("trailing", PATHS["flow"], 1))
    with pytest.raises(RequestError, match="s_low below s_high"):
        run("restart", torch.ones(1), levels, s_low=3.0, s_high=2.0)


def test_rk45_says_when_it_cannot_reach_its_tolerance():
    rough = lambda x, level: torch.sign(torch.sin(1e9 * x))  # noqa: E731
    with pytest.raises(RequestError, match="larger tolerances"):
        run("rk45", torch.ones(1, 1, dtype=torch.float64), spacing("karras", PATHS["ve"], 2), rough, rtol=1e-12, atol=1e-12)


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
        ("HeunDiscreteScheduler", "'heun' with variable 'ratio'"),
        ("DPM++ 2M SDE Heun Exponential", "'dpmpp_2m_sde' with spacing 'exponential' and solver 'heun'"),
        ("dpmpp_3m_sde_gpu", "'dpmpp_3m_sde'"),
        ("uni_pc_bh2", "'unipc' with order 3 and variant 'bh2'"),
        ("uler", "'euler'"),
    ],
)
def test_other_names_are_refused_with_ours(given, ours):
    with pytest.raises(RequestError) as error:
        sampler(given)
    assert f"did you mean {ours}?" in str(error.value)


@pytest.mark.parametrize("given, said", [("dpm_adaptive", "no equivalent here.*rk45"), ("sgm_uniform", "that is a spacing, 'sgm_uniform'")])
def test_what_is_no_sampler_here_is_said(given, said):
    with pytest.raises(RequestError, match=said):
        sampler(given)


def test_no_message_is_longer_than_a_few_lines():
    for given in ("eulr", "dpm_fast", "KarrasVeScheduler", "SASolverScheduler", "DPM++ 2M SDE Heun SGM Uniform", "quantum"):
        with pytest.raises(RequestError) as error:
            sampler(given)
        assert len(str(error.value)) < 250


@pytest.mark.parametrize("given", ["quantum", "", None, 3])
def test_a_name_that_resembles_nothing_gets_the_list(given):
    with pytest.raises(RequestError, match="choose one of ddim, euler, .* or another. `latentgen samplers` lists all 28") as error:
        sampler(given)
    assert "did you mean" not in str(error.value)
