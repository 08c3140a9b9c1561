"""The other samplers against diffusers' schedulers: the same starting noise, the same injected noise, the same non-linear network.

Where diffusers goes on to sigma = 0 by extrapolation, and we return x0, the last step is left out on both sides.
"""

import math

import pytest
import torch
from test_sample_reference import CONFIG, EPS, MIX, SHAPE, make, network, ours, same, stream

from latentgen.diffusion import Level, Levels, RectifiedFlow, VarianceExploding, VariancePreserving, prediction_row, sampler, spacing

diffusers = pytest.importorskip("diffusers")

STEPS = 12
predictions = pytest.mark.parametrize("prediction", ["epsilon", "v"])


def theirs(scheduler, levels, *, ratio=False, calls=None, noisy=True, x=None):
    """Their loop over the first `calls` timesteps, from x or levels[0].sigma * EPS; with ratio their state is x / alpha."""
    x = levels[0].sigma * EPS if x is None else x
    x = x / levels[0].alpha if ratio else x
    generator = {"generator": stream()} if noisy else {}
    for t in scheduler.timesteps[:calls]:
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(x_in, t), t, x, **generator).prev_sample
    return x


def at(path, timesteps):
    """Levels at whole timesteps, without the clean end."""
    return Levels([path.at_time(t) for t in timesteps], path)


def of_ratios(path, sigmas):
    """Levels at these sigma / alpha, the last of which may be 0."""
    return Levels([path.at(path.find(-math.log(s))) if s > 0 else path.at(0.0) for s in sigmas], path)


@pytest.mark.parametrize("skip", [True, False], ids=["plms", "pndm"])
def test_plms_and_pndm(skip):
    """Theirs averages the network's outputs, which is averaging eps for epsilon models only; without set_alpha_to_one it ends at timestep 0."""
    scheduler, path = make("PNDMScheduler", "epsilon", STEPS, skip_prk_steps=skip, timestep_spacing="leading", steps_offset=1)
    stride = 1000 // STEPS
    levels = at(path, [*(1 + stride * i for i in reversed(range(STEPS))), 0])
    if not skip:  # Runge-Kutta steps halve the stride in whole timesteps
        scheduler, path = make("PNDMScheduler", "epsilon", 10, skip_prk_steps=False, timestep_spacing="leading", steps_offset=1)
        levels = at(path, [*(1 + 100 * i for i in reversed(range(10))), 0])
    same(ours("plms" if skip else "pndm", levels, "epsilon"), theirs(scheduler, levels, noisy=False))


@predictions
@pytest.mark.parametrize("name", ["trailing", "karras"])
def test_lms(prediction, name):
    scheduler, path = make("LMSDiscreteScheduler", prediction, STEPS, **({"use_karras_sigmas": True} if name == "karras" else {"timestep_spacing": name}))
    levels = spacing(name, path, STEPS)[:-1]
    if name == "karras":  # there timesteps are rounded after the ramp
        levels = Levels([Level(level.alpha, level.sigma, float(t)) for level, t in zip(levels, scheduler.timesteps, strict=True)], path)
    same(ours("lms", levels, prediction), theirs(scheduler, levels, ratio=True, calls=STEPS - 1, noisy=False) * levels[-1].alpha, 3e-5)


@predictions
def test_dpm2(prediction):
    scheduler, path = make("KDPM2DiscreteScheduler", prediction, STEPS, timestep_spacing="trailing")
    same(ours("dpm2", spacing("trailing", path, STEPS), prediction), theirs(scheduler, spacing("trailing", path, STEPS), ratio=True, noisy=False))


class Once:
    """The noise of a two-stage scheduler that draws once in each pair of calls."""

    def __init__(self):
        self.generator = stream()

    def __call__(self):
        return torch.randn(SHAPE, generator=self.generator)


@predictions
def test_dpm2_ancestral(prediction):
    """Their last two steps are bent by a rounding of indices (sigmas_interpol[-2:] = 0): they are left out."""
    scheduler, path = make("KDPM2AncestralDiscreteScheduler", prediction, STEPS, timestep_spacing="trailing")
    levels = spacing("trailing", path, STEPS)[:-2]
    same(ours("dpm2_ancestral", levels, prediction), theirs(scheduler, levels, ratio=True, calls=2 * (STEPS - 2)) * levels[-1].alpha)


@predictions
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc(prediction, order, variant):
    """With bh1 their step to sigma = 0 multiplies infinity by 0."""
    scheduler, path = make(
        "UniPCMultistepScheduler", prediction, STEPS, timestep_spacing="trailing", solver_order=order, solver_type=variant, final_sigmas_type="zero"
    )
    calls = STEPS - (variant == "bh1")
    mine = states("unipc", spacing("trailing", path, STEPS), prediction, order=order, variant=variant)
    same(mine[calls - 1], theirs(scheduler, spacing("trailing", path, STEPS), calls=calls, noisy=False))


@predictions
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(prediction, order):
    scheduler, path = make("DEISMultistepScheduler", prediction, STEPS, timestep_spacing="trailing", solver_order=order, lower_order_final=False)
    levels = spacing("trailing", path, STEPS)[:-1]
    same(ours("deis", levels, prediction, order=order), theirs(scheduler, levels, calls=STEPS - 1, noisy=False), 2e-5)


def test_ipndm():
    """Theirs is a v model on a quarter circle. It starts at alpha = 0, where it divides by 1e-8: the first level is moved off it."""
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(STEPS)
    scheduler.betas[0] = 0.9995
    scheduler.alphas = (1 - scheduler.betas.double() ** 2).sqrt().float()
    levels = [Level(float(a), float(s), float(t)) for a, s, t in zip(scheduler.alphas, scheduler.betas, scheduler.timesteps, strict=False)]
    same(ours("ipndm", levels, "v"), theirs(scheduler, levels, calls=STEPS - 1, noisy=False))


@predictions
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd(prediction, gamma):
    scheduler, path = make("TCDScheduler", prediction, 5)
    levels = at(path, [int(t) for t in scheduler.timesteps])
    x, generator = levels[0].sigma * EPS, stream()
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(network(x, t), t, x, eta=gamma, generator=generator).prev_sample
    same(ours("tcd", levels, prediction, gamma=gamma), x)


@predictions
@pytest.mark.parametrize("orders", [(2, 2), (3, 4), (1, 1), (3, 2)])
@pytest.mark.parametrize("tau", [0.0, 1.0, 0.6])
def test_sa_solver(prediction, orders, tau):
    scheduler, path = make(
        "SASolverScheduler", prediction, STEPS, timestep_spacing="trailing", predictor_order=orders[0], corrector_order=orders[1],
        lower_order_final=False,
        tau_func=lambda t: torch.tensor(tau),
    )
    levels = spacing("trailing", path, STEPS)[:-1]
    # the last but one of our levels lowers the order as if the run ended there: it is given two levels more than are compared
    options = {"predictor_order": orders[0], "corrector_order": orders[1], "tau": tau}
    mine = states("sa_solver", spacing("trailing", path, STEPS), prediction, **options)
    same(mine[STEPS - 5], theirs(scheduler, levels, calls=STEPS - 4), 2e-5)


def states(name, levels, prediction, **options):
    """x after each step."""
    def denoise(x, level):
        a, b = prediction_row(prediction, level)
        return a * x + b * network(x, level.time)

    generator = stream()
    return [step.x for step in sampler(name).function(denoise, levels[0].sigma * EPS, levels, noise=lambda: torch.randn(SHAPE, generator=generator), **options)]


@predictions
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
def test_dpmpp_2m_sde_solvers(prediction, kind):
    scheduler, path = make("DPMSolverMultistepScheduler", prediction, STEPS, timestep_spacing="trailing", algorithm_type="sde-dpmsolver++",
                           solver_type=kind, solver_order=2, final_sigmas_type="zero")
    levels = spacing("trailing", path, STEPS)
    same(ours("dpmpp_2m_sde", levels, prediction, solver=kind), theirs(scheduler, levels))


@predictions
def test_dpmpp_3m(prediction):
    """k-diffusion's second step has the exact mean of the line, which diffusers calls "heun"."""
    scheduler, path = make("DPMSolverMultistepScheduler", prediction, STEPS, timestep_spacing="trailing", solver_order=3, lower_order_final=False,
                           solver_type="heun", final_sigmas_type="sigma_min")
    levels = spacing("trailing", path, STEPS)[:-1]
    same(ours("dpmpp_3m_sde", levels, prediction, eta=0.0), theirs(scheduler, levels, calls=STEPS - 1))


@predictions
def test_dpmpp_2s_at_even_lambda(prediction):
    """Their singlestep solver takes every other level of the run for the middle: on levels even in lambda that is the middle."""
    scheduler, path = make("DPMSolverSinglestepScheduler", prediction, 11, use_exponential_sigmas=True, solver_order=2, final_sigmas_type="sigma_min",
                           lower_order_final=False)
    sigmas = scheduler.sigmas.tolist()
    levels = Levels([Level(level.alpha, level.sigma, t) for level, t in zip(of_ratios(path, sigmas[:11]), scheduler.timesteps.tolist(), strict=True)], path)
    pairs = [i for i, order in enumerate(scheduler.order_list) if order == 2]
    x, steps = levels[0].sigma * EPS, scheduler.timesteps
    expected = x
    for i in range(pairs[0] - 1, pairs[-1] + 1):
        expected = scheduler.step(network(expected, steps[i]), steps[i], expected).prev_sample
    rounded = {round(level.half_log_snr, 4): level for level in levels}

    class Rounded:  # their times are rounded to whole timesteps
        train_steps = 1000
        def at(self, s):
            level = path.at(s)
            return rounded[min(rounded, key=lambda known: abs(known - level.half_log_snr))] if level.sigma else level
        def find(self, half_log_snr):
            return path.find(half_log_snr)

    grid = Levels([*levels[0:pairs[-1] + 1:2], path.at(path.find(-math.log(sigmas[pairs[-1] + 1])))], Rounded())
    same(ours("dpmpp_2s_ancestral", grid, prediction, eta=0.0), expected, 2e-5)


def test_consistency():
    """Theirs scales the network's output at the boundary; ours gets that as its x0."""
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0, clip_denoised=False)
    scheduler.set_timesteps(4)
    sigmas, times = scheduler.sigmas.tolist()[:5], scheduler.timesteps
    levels = [Level(1.0, sigma, float(t)) for sigma, t in zip(sigmas[:4], times, strict=True)] + [Level(1.0, 0.0, 0.0)]

    def denoise(x, level):
        skip, out = scheduler.get_scalings_for_boundary_condition(torch.tensor(level.sigma))
        x_in = x / math.sqrt(level.sigma**2 + 0.25)
        return out * network(x_in, level.time) + skip * x

    generator = stream()
    *_, last = sampler("consistency").function(denoise, 80 * EPS, levels, noise=lambda: torch.randn(SHAPE, generator=generator))
    x, generator = 80 * EPS, stream()
    for t in times:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, generator=generator).prev_sample
    same(last.x, x)


def test_predictor_corrector():
    """Score SDE's VE sampler, of one image: theirs takes the norms over the batch."""
    scheduler = diffusers.ScoreSdeVeScheduler(num_train_timesteps=STEPS, sigma_min=0.01, sigma_max=20.0, snr=0.15)
    scheduler.set_sigmas(STEPS)
    eps, generator = EPS[:1], stream()
    score = lambda x, sigma: (torch.tanh(torch.einsum("oc,bchw->bohw", MIX, x)) - x) / sigma**2  # noqa: E731
    levels = [Level(1.0, float(sigma), 0.0) for sigma in reversed(scheduler.discrete_sigmas)] + [Level(1.0, 0.0, 0.0)]
    x = 20 * eps
    for level, t in zip(levels, scheduler.timesteps, strict=False):
        x = scheduler.step_correct(score(x, level.sigma), x, generator=generator).prev_sample
        result = scheduler.step_pred(score(x, level.sigma), t, x, generator=generator)
        x = result.prev_sample
    generator = stream()
    *_, last = sampler("predictor_corrector").function(
        lambda x, level: x + level.sigma**2 * score(x, level.sigma), 20 * eps, levels, snr=0.15, predictor="reverse",
        noise=lambda: torch.randn(eps.shape, generator=generator))
    same(last.x, result.prev_sample_mean)


FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


@pytest.mark.parametrize(
    "kind, name, config, options",
    [
        ("UniPCMultistepScheduler", "unipc", {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}, {}),
        ("DPMSolverMultistepScheduler", "dpmpp_2m", {"solver_order": 2, "final_sigmas_type": "zero"}, {}),
        ("DPMSolverMultistepScheduler", "dpmpp_2m_sde", {"solver_order": 2, "algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"}, {}),
        ("DEISMultistepScheduler", "deis", {"solver_order": 2}, {"order": 2}),
    ],
)
def test_on_a_flow(kind, name, config, options):
    """Their first sigma stops just short of 1, so ours starts at that very level."""
    scheduler = getattr(diffusers, kind)(**FLOW_SIGMAS, **config)
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double().tolist()
    levels = Levels([Level(1 - s, s, float(t)) for s, t in zip(sigmas, [*scheduler.timesteps, 0], strict=True)], RectifiedFlow())
    ends_noisy = name == "deis"
    levels = levels[:-1] if ends_noisy else levels
    x = theirs(scheduler, levels, calls=STEPS - ends_noisy, noisy=name.endswith("sde"), x=EPS * levels[0].sigma)
    same(ours(name, levels, "flow", **options), x, 3e-5)


@pytest.mark.parametrize("edm", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm(edm):
    scheduler = getattr(diffusers, edm)(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, num_train_timesteps=1000)
    scheduler.set_timesteps(STEPS)
    path = VarianceExploding(0.002, 80.0)
    levels = of_ratios(path, scheduler.sigmas.tolist())
    row = lambda x, level: prediction_row("edm", level)  # noqa: E731

    def denoise(x, level):
        a, b = row(x, level)
        return a * x + b * network(x / math.sqrt(level.sigma**2 + 0.25), level.time)

    x = 80 * EPS
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    *_, last = sampler("euler" if edm == "EDMEulerScheduler" else "dpmpp_2m").function(denoise, 80 * EPS, levels, noise=Once())
    same(last.x, x, 3e-5)


def test_dpmpp_sde_with_injected_noise(monkeypatch):
    """Their Brownian tree is replaced by one whose increments are our draws."""
    pytest.importorskip("torchsde")
    scheduler = diffusers.DPMSolverSDEScheduler(**CONFIG, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    path = VariancePreserving(tuple(scheduler.alphas_cumprod.tolist()))
    levels = spacing("trailing", path, STEPS)

    class Tree:
        def __init__(self, *_args, **_keywords):
            self.noise, self.first = Once(), None

        def __call__(self, sigma, sigma_next):
            if self.first is None:
                self.first = self.noise(), float(sigma), float(sigma_next)
                return self.first[0]
            (z, start, middle), self.first = self.first, None
            share = (start - middle) / (start - float(sigma_next))
            return math.sqrt(share) * z + math.sqrt(1 - share) * self.noise()

    monkeypatch.setattr("diffusers.schedulers.scheduling_dpmsolver_sde.BrownianTreeNoiseSampler", Tree)
    same(ours("dpmpp_sde", levels, "epsilon"), theirs(scheduler, levels, ratio=True, noisy=False))
