"""Stochastic samplers reach the right distribution, on tables and on flows: Gaussian data, whose denoiser is known."""

import math

import pytest
import torch

from latentgen.diffusion import SAMPLERS, RectifiedFlow, VarianceExploding, VariancePreserving, asked, sampler, spacing, zero_terminal_snr
from latentgen.diffusion.schedule import scaled_linear

SD = scaled_linear(1000, 0.00085, 0.012)
PATHS = {"vp": VariancePreserving(SD), "zero-terminal": VariancePreserving(zero_terminal_snr(SD)), "flow": RectifiedFlow()}
MU, S = 0.7, 0.4  # the data: N(MU, S²)


def gaussian(x, level, one=1.0):
    """E[x0 | x] of the data."""
    gain = level.alpha * S**2 / (level.alpha**2 * S**2 + level.sigma**2)
    return MU * one + gain * (x - level.alpha * MU * one)


def consistency(x, level, one=1.0):
    """The end of the ODE from x: what a perfectly distilled consistency model answers."""
    return MU * one + S / math.hypot(level.alpha * S, level.sigma) * (x - level.alpha * MU * one)


def law(name, path, steps, denoise=gaussian, ramp="karras", **options):
    """(mean, std) of the result, exactly: an affine denoiser keeps x = mean + sum of weights * draws, so x is carried as its weights."""
    levels = spacing(ramp, path, steps)
    basis = iter(torch.eye(2 + (len(asked(name, levels, options)) + steps) * 2, dtype=torch.float64))
    one, first = next(basis), next(basis)
    x = first * math.hypot(levels[0].alpha, levels[0].sigma)
    *_, last = sampler(name).function(lambda x, level: denoise(x, level, one), x, levels, noise=lambda: next(basis), **options)
    return last.x[0].item(), last.x[1:].norm().item()


CASES = [
    ("ddim", {"eta": 1.0}, 1), ("ddim", {"eta": 0.5}, 1), ("ddpm", {}, 1), ("euler_ancestral", {}, 1), ("euler_ancestral", {"eta": 0.3}, 1),
    ("euler", {"s_churn": 20.0, "s_tmin": 0.05, "s_tmax": 20.0}, 1), ("er_sde", {"order": 1}, 1), ("er_sde", {"order": 2}, 2), ("er_sde", {}, 2),
    ("heun", {"s_churn": 20.0}, 2), ("dpm2", {"s_churn": 20.0}, 2), ("dpm2_ancestral", {}, 2), ("dpmpp_2s_ancestral", {}, 2), ("dpmpp_sde", {}, 2),
    ("dpmpp_sde", {"eta": 0.5}, 2), ("dpmpp_2m_sde", {}, 2), ("dpmpp_2m_sde", {"eta": 0.5, "solver": "heun"}, 2), ("dpmpp_3m_sde", {}, 2),
    ("res_multistep", {"eta": 1.0}, 2), ("sa_solver", {}, 2), ("sa_solver", {"tau": 0.5, "predictor_order": 3, "corrector_order": 4}, 2),
    ("sa_solver", {"s_tmin": 0.5, "s_tmax": 5.0}, 2), ("restart", {"inner": 20}, 2),
]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name, options, order", CASES)
def test_the_right_mean_and_spread(name, options, order, path):
    """The table's first and last levels are not quite noise and data: that is worth 0.015 in the mean and 0.0015 in the spread, however many steps."""
    coarse, fine = (law(name, path, steps, **options) for steps in (75, 150))
    assert fine[0] == pytest.approx(MU, abs=0.015 if path is PATHS["vp"] else 1e-6)
    assert fine[1] == pytest.approx(S, abs=0.03 if order == 1 else 0.006)
    assert abs(fine[1] - S) < {1: 0.65, 2: 0.4}[order] * abs(coarse[1] - S) + 0.0015


def test_every_stochastic_sampler_is_here():
    elsewhere = {"lcm", "consistency", "tcd", "annealed_langevin", "predictor_corrector"}
    assert {name for name, info in SAMPLERS.items() if info.stochastic} == elsewhere | {name for name, _, _ in CASES if SAMPLERS[name].stochastic}


@pytest.mark.parametrize("path", [PATHS["zero-terminal"], PATHS["flow"]], ids=["zero-terminal", "flow"])
@pytest.mark.parametrize("name, options", [("lcm", {}), ("consistency", {"s_min": 0.0})])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_perfect_consistency_model_is_exact_at_any_number_of_steps(name, options, path, steps):
    assert law(name, path, steps, consistency, "trailing", **options) == pytest.approx((MU, S), abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.0])
def test_a_perfect_trajectory_model_is_exact_at_any_number_of_steps(steps, gamma):
    """TCD's model answers, for the step down to s, the x0 that leads to the trajectory's x at s: with it the rest is fresh noise."""
    path = PATHS["flow"]
    levels = spacing("trailing", path, steps)
    basis = iter(torch.eye(2 + steps, dtype=torch.float64))
    one, first = next(basis), next(basis)
    x = first.clone()
    targets = {now: path.at((1 - gamma) * then.sigma) for now, then in zip(levels, levels[1:], strict=False)}

    def trajectory(x, level):
        below = targets[level]
        spread = [math.hypot(each.alpha * S, each.sigma) for each in (level, below)]
        end = below.alpha * MU * one + spread[1] / spread[0] * (x - level.alpha * MU * one)
        r = below.sigma / level.sigma
        return (end - r * x) / (below.alpha - level.alpha * r)

    *_, last = sampler("tcd").function(trajectory, x, levels, noise=lambda: next(basis), gamma=gamma)
    assert (last.x[0].item(), last.x[1:].norm().item()) == pytest.approx((MU, S), abs=1e-12)


@pytest.mark.parametrize("path", [VarianceExploding(0.01, 20.0), *PATHS.values()], ids=["ve", *PATHS])
def test_annealed_langevin(path):
    """Levels close together, and a walk on each that is long enough for what the level before left over."""
    coarse, fine = (law("annealed_langevin", path, steps, ramp="exponential", inner=inner, step=0.1) for steps, inner in ((40, 20), (100, 30)))
    assert fine[0] == pytest.approx(MU, abs=1e-6) and fine[1] == pytest.approx(S, abs=0.022)
    assert abs(fine[1] - S) < abs(coarse[1] - S) / 2.5


@pytest.mark.parametrize("path", [VarianceExploding(0.01, 20.0), *PATHS.values()], ids=["ve", *PATHS])
@pytest.mark.parametrize("options", [{}, {"predictor": "reverse"}, {"predictor": "none"}, {"corrector_steps": 0}], ids=str)
def test_predictor_corrector(path, options):
    """Its corrector takes the norms of an image: one image of many pixels, all of them drawn from the same law."""
    generator = torch.Generator().manual_seed(4)
    noise = lambda: torch.randn(1, 40_000, generator=generator, dtype=torch.float64)  # noqa: E731
    levels = spacing("karras", path, 80)
    *_, last = sampler("predictor_corrector").function(gaussian, noise() * math.hypot(levels[0].alpha, levels[0].sigma), levels, noise=noise, **options)
    assert last.x.mean().item() == pytest.approx(MU, abs=0.03) and last.x.std().item() == pytest.approx(S, abs=0.06)


def test_the_inverse_of_a_table_bears_rounding_at_its_clean_end():
    """A log(alpha / sigma) a rounding below the first entry's has that entry's alpha_bar."""
    for path in (PATHS["vp"], PATHS["zero-terminal"]):
        clean = path.at_time(0).half_log_snr
        for ulps in range(1, 40):
            assert path.find(clean - ulps * math.ulp(clean)) == pytest.approx(1e-3, rel=1e-9)
