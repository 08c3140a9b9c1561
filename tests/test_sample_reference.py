"""Samplers against diffusers' schedulers: the same starting noise, the same injected noise, the same non-linear network."""

import math
import warnings

import pytest
import torch

from latentgen.diffusion import RectifiedFlow, VariancePreserving, prediction_row, sampler, spacing

diffusers = pytest.importorskip("diffusers")

CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (2, 4, 6, 6)
EPS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) * 0.5
STEPS = 20


def network(x, time):
    """A fixed non-linear function of x and time that mixes channels and neighbours."""
    return torch.tanh(torch.einsum("oc,bchw->bohw", MIX, x) + 0.3 * x.roll(1, -1)) + 0.2 * math.cos(float(time) / 200)


def stream():
    return torch.Generator().manual_seed(7)


def ours(name, levels, prediction, **options):
    def denoise(x, level):
        a, b = prediction_row(prediction, level)
        return a * x + b * network(x, level.time)

    generator = stream()
    noise = lambda: torch.randn(SHAPE, generator=generator)  # noqa: E731
    *_, last = sampler(name).function(denoise, levels[0].sigma * EPS, levels, noise=noise, **options)
    return last.x


def theirs(scheduler, levels, *, ratio=False, **options):
    """Their loop. ratio: their state is x / alpha, as in the Euler and Heun schedulers, which then scale it back for the network."""
    x = levels[0].sigma * EPS / (levels[0].alpha if ratio else 1.0)
    generator = stream()
    takes_generator = not isinstance(scheduler, diffusers.HeunDiscreteScheduler | diffusers.FlowMatchHeunDiscreteScheduler)
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(x_in, t), t, x, **({"generator": generator} if takes_generator else {}), **options).prev_sample
    return x


def same(a, b, tolerance=1e-5):
    assert a.isfinite().all()
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


def make(kind, prediction, steps=STEPS, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, kind)(**CONFIG, prediction_type={"v": "v_prediction"}.get(prediction, prediction), **config)
        scheduler.set_timesteps(steps)
    # the table that this scheduler uses, to its last float32 bit
    return scheduler, VariancePreserving(tuple(scheduler.alphas_cumprod.tolist()))


predictions = pytest.mark.parametrize("prediction", ["epsilon", "v"])
zero_snr = pytest.mark.parametrize(
    "prediction, zero_snr", [("epsilon", False), ("v", False), ("v", True)], ids=["epsilon", "v", "v, zero terminal SNR"]
)
DDIM = {"clip_sample": False, "set_alpha_to_one": True}


@zero_snr
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(prediction, zero_snr, eta):
    scheduler, path = make("DDIMScheduler", prediction, timestep_spacing="trailing", rescale_betas_zero_snr=zero_snr, **DDIM)
    levels = spacing("trailing", path, STEPS)
    assert (levels[0].alpha == 0) is zero_snr  # here theirs is exactly 0 too
    # in float32 their sqrt(1 - alpha_bar' - std²) is 2e-4 where it should be 0
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    same(ours("ddim", levels, prediction, eta=eta), theirs(scheduler, levels, eta=eta))


@predictions
def test_ddim_leading(prediction):
    scheduler, path = make("DDIMScheduler", prediction, timestep_spacing="leading", steps_offset=1, **DDIM)
    levels = spacing("leading", path, STEPS, offset=1)
    same(ours("ddim", levels, prediction), theirs(scheduler, levels))


@zero_snr
@pytest.mark.parametrize("name", ["trailing", "leading"])
def test_ddpm(prediction, zero_snr, name):
    scheduler, path = make("DDPMScheduler", prediction, timestep_spacing=name, rescale_betas_zero_snr=zero_snr, clip_sample=False)
    levels = spacing(name, path, STEPS)
    same(ours("ddpm", levels, prediction), theirs(scheduler, levels))


@zero_snr
@pytest.mark.parametrize("name", ["trailing", "leading", "karras", "exponential"])
def test_euler(prediction, zero_snr, name):
    config = {f"use_{name}_sigmas": True} if name in ("karras", "exponential") else {"timestep_spacing": name}
    scheduler, path = make("EulerDiscreteScheduler", prediction, rescale_betas_zero_snr=zero_snr, **config)
    levels = spacing(name, path, STEPS)
    same(ours("euler", levels, prediction), theirs(scheduler, levels, ratio=True))


@zero_snr
def test_euler_ancestral(prediction, zero_snr):
    scheduler, path = make("EulerAncestralDiscreteScheduler", prediction, timestep_spacing="trailing", rescale_betas_zero_snr=zero_snr)
    levels = spacing("trailing", path, STEPS)
    same(ours("euler_ancestral", levels, prediction), theirs(scheduler, levels, ratio=True))


@predictions
@pytest.mark.parametrize("name", ["trailing", "leading"])
def test_heun(prediction, name):
    scheduler, path = make("HeunDiscreteScheduler", prediction, timestep_spacing=name)
    levels = spacing(name, path, STEPS)
    same(ours("heun", levels, prediction, variable="ratio"), theirs(scheduler, levels, ratio=True))


@zero_snr
@pytest.mark.parametrize("steps", [8, STEPS])
def test_dpmpp_2m(prediction, zero_snr, steps):
    scheduler, path = make(
        "DPMSolverMultistepScheduler", prediction, steps, timestep_spacing="trailing", rescale_betas_zero_snr=zero_snr, final_sigmas_type="zero"
    )
    levels = spacing("trailing", path, steps)
    same(ours("dpmpp_2m", levels, prediction), theirs(scheduler, levels))


@zero_snr
@pytest.mark.parametrize("steps", [8, STEPS])
def test_dpmpp_2m_sde(prediction, zero_snr, steps):
    config = {"algorithm_type": "sde-dpmsolver++", "solver_type": "midpoint", "solver_order": 2, "final_sigmas_type": "zero"}
    scheduler, path = make(
        "DPMSolverMultistepScheduler", prediction, steps, timestep_spacing="trailing", rescale_betas_zero_snr=zero_snr, **config
    )
    levels = spacing("trailing", path, steps)
    same(ours("dpmpp_2m_sde", levels, prediction), theirs(scheduler, levels))


@predictions
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_lcm(prediction, steps):
    scheduler, path = make("LCMScheduler", prediction, steps)
    levels = (*(path.at_time(t) for t in scheduler.timesteps.tolist()), path.at(0.0))
    same(ours("lcm", levels, prediction), theirs(scheduler, levels))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(STEPS)
    levels = spacing("linspace", RectifiedFlow(), STEPS, shift=shift)
    assert levels[0].alpha == 0
    same(ours("euler", levels, "flow"), theirs(scheduler, levels))
    same(ours("ddim", levels, "flow"), ours("euler", levels, "flow"), 0)


def test_flow_heun():
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    levels = spacing("linspace", RectifiedFlow(), STEPS)
    same(ours("heun", levels, "flow"), theirs(scheduler, levels))


def test_exact_zero_terminal_snr_is_what_the_others_approach():
    """Euler and DPM++ in diffusers keep alpha at 2**-12; with alpha exactly 0 ours stay within that of them."""
    scheduler, path = make("EulerDiscreteScheduler", "v", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    exact = VariancePreserving((*path.alphas_bar[:-1], 0.0))
    levels = spacing("trailing", exact, STEPS)
    assert levels[0].alpha == 0
    same(ours("euler", levels, "v"), theirs(scheduler, spacing("trailing", path, STEPS), ratio=True), 2**-10)
