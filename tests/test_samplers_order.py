"""Orders of convergence on a Gaussian mixture, whose denoiser is known, on levels from sigma / alpha = 10 to 0.1."""

import functools
import math

import pytest
import torch

from latentgen.diffusion import SAMPLERS, Levels, RectifiedFlow, VarianceExploding, VariancePreserving, sampler
from latentgen.diffusion.samplers.adams import gauss_legendre, integrals
from latentgen.diffusion.schedule import scaled_linear

PATHS = {"vp": VariancePreserving(scaled_linear(1000, 0.00085, 0.012)), "flow": RectifiedFlow(), "ve": VarianceExploding(0.002, 80.0)}
MEANS = torch.tensor([-1.0, 0.5, 1.2], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
SPREAD = 0.5
X = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)


def mixture(x, level):
    """E[x0 | x] of sum of WEIGHTS * N(MEANS, SPREAD²)."""
    variance = (level.alpha * SPREAD) ** 2 + level.sigma**2
    away = x[..., None] - level.alpha * MEANS
    share = torch.softmax(torch.log(WEIGHTS) - away**2 / (2 * variance), -1)
    return (share * (MEANS + level.alpha * SPREAD**2 / variance * away)).sum(-1)


def grid(path, steps):
    return Levels([path.at(path.find(-math.log(10) + 2 * math.log(10) * i / steps)) for i in range(steps + 1)], path)


def end(name, path, steps, **options):
    levels = grid(path, steps)
    *_, last = sampler(name).function(mixture, X * math.hypot(levels[0].alpha, levels[0].sigma), levels, noise=None, **options)
    return last.x


@functools.cache
def truth(path):
    """The end of the ODE, to 1e-13."""
    return end("rk45", path, 160)


def orders(name, path, counts=(20, 40, 80), **options):
    exact = truth(path)
    errors = [(end(name, path, steps, **options) - exact).abs().max().item() for steps in counts]
    return [math.log2(a / b) for a, b in zip(errors, errors[1:])], errors[-1]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("euler", {}, 1), ("ddim", {}, 1), ("tcd", {"gamma": 0.0}, 1), ("euler_ancestral", {"eta": 0.0}, 1), ("heun", {}, 2),
        ("heun", {"variable": "ratio"}, 2),
        ("dpm2", {}, 2), ("dpm2_ancestral", {"eta": 0.0}, 2), ("dpmpp_2s_ancestral", {"eta": 0.0}, 2), ("dpmpp_sde", {"eta": 0.0}, 2), ("dpmpp_2m", {}, 2),
        ("dpmpp_2m_sde", {"eta": 0.0}, 2), ("dpmpp_2m_sde", {"eta": 0.0, "solver": "heun"}, 2), ("dpmpp_3m_sde", {"eta": 0.0}, 2), ("res_multistep", {}, 2),
        ("unipc", {"order": 1}, 2), ("unipc", {"variant": "bh1"}, 3), ("sa_solver", {"tau": 0.0, "corrector_order": 0}, 2), ("plms", {}, 2), ("pndm", {}, 2),
        ("ipndm", {}, 2), ("lms", {"order": 2}, 2), ("deis", {"order": 2}, 2), ("rk45", {}, 5),
    ],
)
def test_order_of_convergence(name, options, expected, path):
    found, _ = orders(name, path, **options)
    assert found == pytest.approx([expected, expected], abs=0.2)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(
    "name, options, early, late",
    [("lms", {}, 3.3, 2.7), ("deis", {}, 2.6, 2.0), ("unipc", {}, 2.9, 1.6), ("unipc", {"order": 3}, 1.9, 2.0), ("sa_solver", {"tau": 0.0}, 2.3, 2.1)],
)
def test_what_begins_with_lower_orders_drifts_to_two(name, options, early, late, path):
    """Their first steps are of first or second order: on fine grids that is what is left of the error."""
    found, error = orders(name, path, (20, 40, 80, 160), **options)
    assert [found[0], found[-1]] == pytest.approx([early, late], abs=0.15)
    assert error < orders("dpmpp_2m", path, (80, 160))[1]  # and still they beat the second-order method


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_adaptive_ode_keeps_its_tolerance(path):
    exact = truth(path)
    errors = [(end("rk45", path, 2, rtol=rtol, atol=rtol) - exact).abs().max().item() for rtol in (1e-3, 1e-5, 1e-8)]
    assert errors[0] < 1e-2 and errors[1] < 1e-4 and errors[2] < 1e-7 and errors[2] < errors[1] < errors[0]


def test_the_table_tells_the_measured_order():
    for name, order in {"euler": 1, "heun": 2, "dpmpp_3m_sde": 2, "lms": 2, "unipc": 3, "rk45": 5, "sa_solver": 2}.items():
        assert SAMPLERS[name].order == order


def test_quadrature():
    assert sum(weight for _, weight in gauss_legendre(16)) == pytest.approx(2, rel=1e-14)
    assert sum(weight * place**30 for place, weight in gauss_legendre(16)) == pytest.approx(2 / 31, rel=1e-13)
    weights = integrals([0.3, 0.9, 1.4], 0.3, -0.2, math.exp)  # exact for a parabola
    value = sum(weight * node**2 for weight, node in zip(weights, [0.3, 0.9, 1.4]))
    antiderivative = lambda u: math.exp(u) * (u * u - 2 * u + 2)  # noqa: E731
    assert value == pytest.approx(antiderivative(-0.2) - antiderivative(0.3), rel=1e-12)
