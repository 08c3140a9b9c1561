"""Samplers against the formulas that k-diffusion and the papers publish, written out in y = x / alpha and sigma / alpha, in float64.

Each oracle is (model, y, sigmas, noise) -> y, where model answers x0 and noise() is the next draw. They know no alpha and no path: that ours
agree on eps, v and flow models is the point. Steps to 0 are x0 in both.
"""

import math

import pytest
import torch

from latentgen.diffusion import Levels, RectifiedFlow, VarianceExploding, VariancePreserving, prediction_row, sampler
from latentgen.diffusion.schedule import scaled_linear

PATHS = {
    "epsilon": VariancePreserving(scaled_linear(1000, 0.00085, 0.012)),
    "v": VariancePreserving(scaled_linear(1000, 0.00085, 0.012)),
    "flow": RectifiedFlow(),
    "edm": VarianceExploding(0.002, 80.0),
}
SIGMAS = [9.0, 6.1, 4.2, 2.6, 1.7, 1.1, 0.62, 0.34, 0.2, 0.11, 0.05, 0.0]
SHAPE = (2, 4, 3, 3)
EPS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MIX = 0.5 * torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def stream():
    generator = torch.Generator().manual_seed(7)
    return lambda: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def up_and_down(start, end, eta=1.0):
    up = min(end, eta * math.sqrt(end**2 * (start**2 - end**2) / start**2))
    return up, math.sqrt(end**2 - up**2)


def slope(y, x0, sigma):
    return (y - x0) / sigma


def churn(y, sigma, sigmas, noise, amount, low, high, loud):
    gamma = min(amount / (len(sigmas) - 1), 2**0.5 - 1) if low <= sigma <= high else 0.0
    hat = sigma * (1 + gamma)
    return (y + noise() * loud * math.sqrt(hat**2 - sigma**2) if gamma > 0 else y), hat


def euler(model, y, sigmas, noise, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    for s, t in zip(sigmas, sigmas[1:]):
        y, s = churn(y, s, sigmas, noise, s_churn, s_tmin, s_tmax, s_noise)
        y = y + slope(y, model(y, s), s) * (t - s)
    return y


def heun(model, y, sigmas, noise, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0, variable="ratio"):
    for s, t in zip(sigmas, sigmas[1:]):
        y, s = churn(y, s, sigmas, noise, s_churn, s_tmin, s_tmax, s_noise)
        d = slope(y, model(y, s), s)
        ahead = y + d * (t - s)
        y = ahead if t == 0 else y + (d + slope(ahead, model(ahead, t), t)) / 2 * (t - s)
    return y


def dpm2(model, y, sigmas, noise, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    for s, t in zip(sigmas, sigmas[1:]):
        y, s = churn(y, s, sigmas, noise, s_churn, s_tmin, s_tmax, s_noise)
        d = slope(y, model(y, s), s)
        if t > 0:
            middle = math.exp((math.log(s) + math.log(t)) / 2)
            ahead = y + d * (middle - s)
            d = slope(ahead, model(ahead, middle), middle)
        y = y + d * (t - s)
    return y


def euler_ancestral(model, y, sigmas, noise, eta=1.0, s_noise=1.0):
    for s, t in zip(sigmas, sigmas[1:]):
        up, down = up_and_down(s, t, eta)
        y = y + slope(y, model(y, s), s) * (down - s)
        y = y + noise() * s_noise * up if t > 0 else y
    return y


def dpm2_ancestral(model, y, sigmas, noise, eta=1.0, s_noise=1.0):
    for s, t in zip(sigmas, sigmas[1:]):
        up, down = up_and_down(s, t, eta)
        d = slope(y, model(y, s), s)
        if down > 0:
            middle = math.sqrt(s * down)
            ahead = y + d * (middle - s)
            d = slope(ahead, model(ahead, middle), middle)
        y = y + d * (down - s)
        y = y + noise() * s_noise * up if t > 0 else y
    return y


def dpmpp_2s_ancestral(model, y, sigmas, noise, eta=1.0, s_noise=1.0):
    for s, t in zip(sigmas, sigmas[1:]):
        up, down = up_and_down(s, t, eta)
        x0 = model(y, s)
        if down == 0:
            y = x0
        else:
            h = math.log(s / down)
            middle = s * math.exp(-h / 2)
            y = (down / s) * y - math.expm1(-h) * model((middle / s) * y - math.expm1(-h / 2) * x0, middle)
        y = y + noise() * s_noise * up if t > 0 else y
    return y


def dpmpp_sde(model, y, sigmas, noise, eta=1.0, s_noise=1.0):
    """The Brownian increments of both halves are drawn first; a tree would give the same ones."""
    for s, t in zip(sigmas, sigmas[1:]):
        x0 = model(y, s)
        if t == 0:
            y = x0
            continue
        h = math.log(s / t)
        middle = s * math.exp(-h / 2)
        first, second = math.sqrt(s - middle) * noise(), math.sqrt(middle - t) * noise()
        up, down = up_and_down(s, middle, eta)
        ahead = (down / s) * y - (down / s - 1) * x0 + first / math.sqrt(s - middle) * s_noise * up
        x0_middle = model(ahead, middle)
        up, down = up_and_down(s, t, eta)
        y = (down / s) * y - (down / s - 1) * x0_middle + (first + second) / math.sqrt(s - t) * s_noise * up
    return y


def dpmpp_2m(model, y, sigmas, noise):
    old = None
    for i, (s, t) in enumerate(zip(sigmas, sigmas[1:])):
        x0 = model(y, s)
        if t == 0:
            return x0
        h = math.log(s / t)
        mean = x0
        if old is not None:
            r = math.log(sigmas[i - 1] / s) / h
            mean = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old
        y, old = (t / s) * y - math.expm1(-h) * mean, x0
    return y


def dpmpp_2m_sde(model, y, sigmas, noise, eta=1.0, s_noise=1.0, solver="midpoint"):
    old = None
    for i, (s, t) in enumerate(zip(sigmas, sigmas[1:])):
        x0 = model(y, s)
        if t == 0:
            return x0
        h = math.log(s / t)
        wide = h * (1 + eta)
        y = (t / s) * math.exp(-eta * h) * y - math.expm1(-wide) * x0
        if old is not None:
            r = math.log(sigmas[i - 1] / s) / h
            y = y + (-0.5 * math.expm1(-wide) if solver == "midpoint" else -math.expm1(-wide) / -wide + 1) / r * (x0 - old)
        if eta:
            y = y + noise() * t * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise
        old = x0
    return y


def dpmpp_3m_sde(model, y, sigmas, noise, eta=1.0, s_noise=1.0):
    past, spans = [], []
    for s, t in zip(sigmas, sigmas[1:]):
        x0 = model(y, s)
        if t == 0:
            return x0
        h = math.log(s / t)
        wide = h * (1 + eta)
        y = math.exp(-wide) * y - math.expm1(-wide) * x0
        phi_2 = math.expm1(-wide) / wide + 1
        if len(past) >= 2:
            r0, r1 = spans[-1] / h, spans[-2] / h
            d10, d11 = (x0 - past[-1]) / r0, (past[-1] - past[-2]) / r1
            d1, d2 = d10 + (d10 - d11) * r0 / (r0 + r1), (d10 - d11) / (r0 + r1)
            y = y + phi_2 * d1 - (phi_2 / wide - 0.5) * d2
        elif past:
            y = y + phi_2 * (x0 - past[-1]) / (spans[-1] / h)
        if eta:
            y = y + noise() * t * math.sqrt(-math.expm1(-2 * h * eta)) * s_noise
        past.append(x0)
        spans.append(h)
    return y


def lms(model, y, sigmas, noise, order=4):
    """Lagrange's polynomials in sigma, expanded and integrated term by term."""
    slopes = []
    for i, (s, t) in enumerate(zip(sigmas, sigmas[1:])):
        x0 = model(y, s)
        if t == 0:
            return x0
        slopes = [slope(y, x0, s), *slopes[: order - 1]]
        nodes = [sigmas[i - j] for j in range(len(slopes))]
        for j, d in enumerate(slopes):
            poly = [1.0]
            for m, node in enumerate(nodes):
                if m != j:
                    poly = [(a - node * b) / (nodes[j] - node) for a, b in zip([0.0, *poly], [*poly, 0.0])]
            y = y + d * sum(c * (t ** (k + 1) - s ** (k + 1)) / (k + 1) for k, c in enumerate(poly))
    return y


def ipndm(model, y, sigmas, noise, order=4):
    table = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    slopes = []
    for s, t in zip(sigmas, sigmas[1:]):
        x0 = model(y, s)
        if t == 0:
            return x0
        slopes = [slope(y, x0, s), *slopes[: order - 1]]
        y = y + (t - s) * sum(w * d for w, d in zip(table[len(slopes) - 1], slopes))
    return y


def res_multistep(model, y, sigmas, noise, eta=0.0, s_noise=1.0):
    old, old_down = None, None
    for i, (s, t) in enumerate(zip(sigmas, sigmas[1:])):
        x0 = model(y, s)
        up, down = up_and_down(s, t, eta)
        if t == 0:
            return x0
        if old is None:
            y = y + slope(y, x0, s) * (down - s)
        else:
            h = math.log(s / down)
            c2 = (math.log(old_down) - math.log(sigmas[i - 1])) / h
            phi_1 = math.expm1(-h) / -h
            phi_2 = (phi_1 - 1) / -h
            y = math.exp(-h) * y + h * ((phi_1 - phi_2 / c2) * x0 + phi_2 / c2 * old)
        y = y + noise() * s_noise * up if up > 0 else y
        old, old_down = x0, down
    return y


def er_sde(model, y, sigmas, noise, order=3, s_noise=1.0):
    """The integrals by the midpoint rule on many points, where the authors' code takes 200."""
    scale = lambda s: s * (math.exp(s**0.3) + 10)  # noqa: E731
    old = old_d = None
    for i, (s, t) in enumerate(zip(sigmas, sigmas[1:])):
        x0 = model(y, s)
        if t == 0:
            return x0
        r = scale(t) / scale(s)
        y = r * y + (1 - r) * x0
        points = [t + (k + 0.5) / 4000 * (s - t) for k in range(4000)]
        d = None
        if old is not None and order > 1:
            d = (x0 - old) / (s - sigmas[i - 1])
            y = y + (t - s + scale(t) * sum(1 / scale(p) for p in points) * (s - t) / 4000) * d
            if old_d is not None and order > 2:
                u = (d - old_d) / ((s - sigmas[i - 2]) / 2)
                y = y + ((t - s) ** 2 / 2 + scale(t) * sum((p - s) / scale(p) for p in points) * (s - t) / 4000) * u
        y = y + noise() * s_noise * math.sqrt(t**2 - s**2 * r**2)
        old, old_d = x0, d
    return y


def lcm(model, y, sigmas, noise):
    for s, t in zip(sigmas, sigmas[1:]):
        y = model(y, s)
        y = y + t * noise() if t > 0 else y
    return y


def consistency(model, y, sigmas, noise, s_min=0.002, s_noise=1.0):
    for s, t in zip(sigmas, sigmas[1:]):
        y = model(y, s)
        y = y + math.sqrt(t**2 - s_min**2) * s_noise * noise() if t > s_min else y
    return y


def restart(model, y, sigmas, noise, times=2, inner=4, s_low=0.1, s_high=2.0):
    for s, t in zip(sigmas, sigmas[1:]):
        y = heun(model, y, [s, t], noise)
        if t == min(sigmas[1:-1], key=lambda each: abs(math.log(each / s_low))):
            for _ in range(times):
                y = y + noise() * math.sqrt(s_high**2 - t**2)
                ramp = [(s_high ** (1 / 7) + i / inner * (t ** (1 / 7) - s_high ** (1 / 7))) ** 7 for i in range(inner + 1)]
                y = heun(model, y, ramp, noise)
    return y


def annealed_langevin(model, y, sigmas, noise, inner=5, step=0.2):
    for s, t in zip(sigmas, sigmas[1:]):
        for _ in range(inner):
            size = step * s**2
            y = y + size / 2 * (model(y, s) - y) / s**2 + math.sqrt(size) * noise()
        y = model(y, s) if t == 0 else y
    return y


CHURN = {"s_churn": 4.0, "s_tmin": 0.1, "s_tmax": 5.0, "s_noise": 1.01}
CASES = [
    (euler, {}), (euler, CHURN), (heun, {"variable": "ratio"}), (heun, CHURN | {"variable": "ratio"}), (dpm2, {}), (dpm2, CHURN), (euler_ancestral, {}),
    (euler_ancestral, {"eta": 0.6, "s_noise": 1.02}), (dpm2_ancestral, {}), (dpm2_ancestral, {"eta": 0.5}), (dpmpp_2s_ancestral, {}),
    (dpmpp_2s_ancestral, {"eta": 0.4, "s_noise": 0.98}), (dpmpp_sde, {}), (dpmpp_sde, {"eta": 0.7, "s_noise": 1.02}), (dpmpp_2m, {}), (dpmpp_2m_sde, {}),
    (dpmpp_2m_sde, {"solver": "heun"}), (dpmpp_2m_sde, {"eta": 0.5, "s_noise": 1.01}), (dpmpp_3m_sde, {}), (dpmpp_3m_sde, {"eta": 0.0}),
    (dpmpp_3m_sde, {"eta": 0.3}), (lms, {}), (lms, {"order": 2}), (ipndm, {}), (ipndm, {"order": 3}), (res_multistep, {}), (res_multistep, {"eta": 1.0}),
    (er_sde, {}), (er_sde, {"order": 2}), (er_sde, {"order": 1}), (lcm, {}), (consistency, {}), (restart, {}),
    (restart, {"times": 1, "inner": 9, "s_high": 3.0}),
    (annealed_langevin, {}),
]


def label(case):
    return case.__name__ if callable(case) else ",".join(f"{k}={v}" for k, v in case.items())


@pytest.mark.parametrize("prediction", PATHS)
@pytest.mark.parametrize("oracle, options", CASES, ids=label)
def test_against_the_published_formula(oracle, options, prediction):
    path = PATHS[prediction]
    levels = Levels([path.at(path.find(-math.log(s))) if s else path.at(0.0) for s in SIGMAS], path)

    def denoise(x, level):
        a, b = prediction_row(prediction, level)
        # the level itself is as exact as the path's inverse: 1e-12
        out = torch.tanh(torch.einsum("oc,bchw->bohw", MIX, x) + 0.3 * x.roll(1, -1)) + 0.2 * math.cos(level.half_log_snr)
        return a * x + b * out

    def model(y, sigma):
        level = path.at(path.find(-math.log(sigma)))
        return denoise(level.alpha * y, level)

    y = oracle(model, SIGMAS[0] * EPS, SIGMAS, stream(), **options)
    *_, last = sampler(oracle.__name__).function(denoise, levels[0].sigma * EPS, levels, noise=stream(), **options)
    assert last.x.isfinite().all()
    tolerance = 1e-6 if oracle is er_sde else 1e-8  # its oracle sums over points
    torch.testing.assert_close(last.x, y, rtol=0, atol=tolerance * y.abs().max().item())
