"""The table of samplers: what each is called, takes and costs. Knows the samplers; does not know families, prompts, guidance, seeds or devices.

The samplers themselves, one short generator each, are in the folder `samplers`; names that other programs use are in `names`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latentgen.diffusion.level import Denoiser, Level
from latentgen.diffusion.names import CFG_PP, Ours, foreign, nearest
from latentgen.diffusion.option import Option, check_options
from latentgen.diffusion.samplers import adams, langevin, multistep, ode, one_step
from latentgen.diffusion.samplers.steps import Noise, Step
from latentgen.errors import RequestError

__all__ = ["SAMPLERS", "SamplerInfo", "Step", "asked", "sampler"]


ETA = Option("share of the ancestral noise: 0 none, 1 as much as DDPM", 0, 1)
S_NOISE = Option("factor on fresh noise", 0, 10)
CHURN = {
    "s_churn": Option("Karras' churn: how much noise is added before steps, in all"),
    "s_tmin": Option("ratio sigma / alpha below which no noise is added"),
    "s_tmax": Option("ratio sigma / alpha above which no noise is added"),
    "s_noise": S_NOISE,
}
ANCESTRAL = {"eta": ETA, "s_noise": S_NOISE}


@dataclass(frozen=True)
class SamplerInfo:
    """A sampler and what to know before running it.

    generator: the bare function.  about, paper: one line each.  order: of convergence on smooth levels (of its ODE at eta 0).
    stochastic: it draws noise with its options left alone.  evaluations_per_step: denoiser calls in a step from level to level
    with its options left alone; first, last and lower-order steps make fewer, `asked` tells exactly.
    options: its own keyword arguments.  between: it asks between the levels and needs them as `Levels`.
    """

    generator: Callable[..., Iterator[Step]]
    about: str
    paper: str
    order: int
    stochastic: bool = False
    evaluations_per_step: int = 1
    options: Mapping[str, Option] = field(default_factory=dict)
    between: bool = False

    def function(self, denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, noise: Noise, **options: Any) -> Iterator[Step]:
        """The sampler at work; RequestError for an option that it does not have, or a value that the option does not take."""
        self.check(options)
        return self.generator(denoise, x, levels, noise=noise, **options)

    def check(self, options: Mapping[str, object]) -> None:
        """RequestError for an option that it does not have, or a value that the option does not take."""
        check_options(f"the sampler {self.generator.__name__!r}", self.options, options)

    @property
    def defaults(self) -> dict[str, Any]:
        """The values of its options when they are left alone."""
        keywords = self.generator.__kwdefaults__ or {}
        return {name: keywords[name] for name in self.options}


SAMPLERS: dict[str, SamplerInfo] = {
    "ddpm": SamplerInfo(one_step.ddpm, "ancestral sampling, as diffusion models were first run", "Ho et al. 2020", 1, True),
    "ddim": SamplerInfo(one_step.ddim, "deterministic, or with a share eta of DDPM's noise", "Song et al. 2021 (DDIM)", 1, options=ANCESTRAL),
    "euler": SamplerInfo(one_step.euler, "Euler's method, plain or with Karras' churn", "Karras et al. 2022 (EDM)", 1, options=CHURN),
    "euler_ancestral": SamplerInfo(one_step.euler_ancestral, "an Euler step past the target, and noise back up", "k-diffusion", 1, True,
                                   options=ANCESTRAL),
    "heun": SamplerInfo(one_step.heun, "Euler's step, corrected by the slope at its end", "Karras et al. 2022 (EDM)", 2, False, 2,
                        {"variable": Option("what the trapezoid rule runs in", choices=("sigma", "ratio")), **CHURN}),
    "dpm2": SamplerInfo(one_step.dpm2, "the slope at the middle of the step", "Lu et al. 2022 (DPM-Solver), k-diffusion", 2, False, 2, CHURN, True),
    "dpm2_ancestral": SamplerInfo(one_step.dpm2_ancestral, "DPM2 past the target, and noise back up", "k-diffusion", 2, True, 2, ANCESTRAL, True),
    "dpmpp_2s_ancestral": SamplerInfo(one_step.dpmpp_2s_ancestral, "x0 at the middle of the step, and noise back up", "Lu et al. 2022 (DPM-Solver++)",
                                      2, True, 2, ANCESTRAL, True),
    "dpmpp_sde": SamplerInfo(one_step.dpmpp_sde, "two ancestral stages in each step", "Lu et al. 2022 (DPM-Solver++), k-diffusion", 2, True, 2,
                             ANCESTRAL, True),
    "dpmpp_2m": SamplerInfo(multistep.dpmpp_2m, "x0 on the line through the last two answers", "Lu et al. 2022 (DPM-Solver++)", 2),
    "dpmpp_2m_sde": SamplerInfo(multistep.dpmpp_2m_sde, "the same with fresh noise", "Lu et al. 2022 (DPM-Solver++)", 2, True,
                                options={**ANCESTRAL, "solver": Option("where on the line x0 is taken", choices=("midpoint", "heun"))}),
    "dpmpp_3m_sde": SamplerInfo(multistep.dpmpp_3m_sde, "x0 on the parabola through the last three answers, with fresh noise", "k-diffusion", 2, True,
                                options=ANCESTRAL),
    "res_multistep": SamplerInfo(multistep.res_multistep, "an exponential solver on the last two answers", "Zhang et al. 2023 (RES)", 2,
                                 options=ANCESTRAL),
    "unipc": SamplerInfo(multistep.unipc, "predicts, and corrects with the next answer for nothing", "Zhao et al. 2023 (UniPC)", 3,
                         options={"order": Option("answers that the predictor takes", 1, 3, True),
                                  "variant": Option("the paper's B(h)", choices=("bh1", "bh2"))}),
    "sa_solver": SamplerInfo(multistep.sa_solver, "stochastic Adams methods, predictor and corrector", "Xue et al. 2023 (SA-Solver)", 2, True,
                             options={
        "predictor_order": Option("answers that the predictor takes", 1, 4, True),
        "corrector_order": Option("answers that the corrector takes, 0 none", 0, 4, True), "tau": Option("noise: 0 the ODE, 1 the SDE", 0, 10),
        "s_tmin": CHURN["s_tmin"], "s_tmax": CHURN["s_tmax"]}),
    "er_sde": SamplerInfo(multistep.er_sde, "extended reverse-time SDE with less noise at the clean end", "Cui et al. 2023 (ER-SDE)", 1, True,
                          options={"order": Option("answers that it takes", 1, 3, True), "s_noise": S_NOISE}),
    "plms": SamplerInfo(adams.plms, "the noise of the last four answers, as early Stable Diffusion was run", "Liu et al. 2022 (PNDM)", 2),
    "pndm": SamplerInfo(adams.pndm, "the same, begun with three Runge-Kutta steps", "Liu et al. 2022 (PNDM)", 2, between=True),
    "ipndm": SamplerInfo(adams.ipndm, "the same, begun with lower orders", "Zhang & Chen 2023 (DEIS)", 2,
                         options={"order": Option("answers that it takes", 1, 4, True)}),
    "lms": SamplerInfo(adams.lms, "a polynomial in sigma through the noise of the last answers", "k-diffusion", 2,
                       options={"order": Option("answers that it takes", 1, 4, True)}),
    "deis": SamplerInfo(adams.deis, "a polynomial in log sigma through the noise of the last answers", "Zhang & Chen 2023 (DEIS)", 2,
                        options={"order": Option("answers that it takes", 1, 4, True)}),
    "rk45": SamplerInfo(ode.rk45, "the probability-flow ODE by a Runge-Kutta method, to a tolerance if one is given", "Song et al. 2021 (score SDE)",
                        5, False, 6, {"rtol": Option("relative tolerance, 0 for fixed steps", 0, 1), "atol": Option("absolute tolerance", 1e-12, 1)},
                        True),
    "restart": SamplerInfo(one_step.restart, "Heun, and back up to more noise in between", "Xu et al. 2023 (Restart)", 2, True, 2, {
        "times": Option("restarts", 1, 100, True), "inner": Option("steps of each way back down", 1, 100, True),
        "s_low": Option("ratio sigma / alpha that it restarts from", 1e-4, 1e4),
        "s_high": Option("ratio sigma / alpha that it goes back to", 1e-4, 1e4)}, True),
    "lcm": SamplerInfo(one_step.lcm, "for latent consistency models: x0, and all noise anew", "Luo et al. 2023 (LCM)", 1, True),
    "consistency": SamplerInfo(one_step.consistency, "for consistency models, in one step or few", "Song et al. 2023 (consistency models)", 1, True,
                               options={"s_min": Option("ratio sigma / alpha that the model stops at", 0, 10), "s_noise": S_NOISE}),
    "tcd": SamplerInfo(one_step.tcd, "for trajectory consistency models: past the target, and noise back up", "Zheng et al. 2024 (TCD)", 1, True,
                       options={"gamma": Option("how far past the target: 0 not at all, 1 to the clean end", 0, 1)}, between=True),
    "annealed_langevin": SamplerInfo(langevin.annealed_langevin, "for score models: Langevin's walk at each level", "Song & Ermon 2019 (NCSN)", 1,
                                     True, 5,
                                     {"inner": Option("steps at each level", 1, 1000, True), "step": Option("step size in sigma²", 1e-6, 1)}),
    "predictor_corrector": SamplerInfo(langevin.predictor_corrector, "for score models: Langevin steps, then a step down",
                                       "Song et al. 2021 (score SDE)",
                                       1, True, 2, {"snr": Option("the corrector's signal-to-noise ratio", 0, 1),
                                                    "corrector_steps": Option("corrections at each level", 0, 100, True),
                                                    "predictor": Option("the step down", choices=("ancestral", "reverse", "none"))}),
}

USUAL = ("ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm")  # what a message names


def sampler(name: str) -> SamplerInfo:
    """The sampler of this exact name; otherwise RequestError, which knows what other programs call it."""
    if name in SAMPLERS:
        return SAMPLERS[name]
    found = foreign(name) if isinstance(name, str) else None
    found = found or nearest(name, SAMPLERS)
    raise RequestError(f"unknown sampler {name!r}: {_hint(found)}`latentgen samplers` lists all {len(SAMPLERS)}.")


def _hint(found: Ours | None) -> str:
    """What to say instead of a foreign name."""
    if found is None:
        return f"choose one of {', '.join(USUAL)} or another. "
    if found.sampler is None:
        return f"that is a spacing, {found.spacing!r} here. " if found.spacing else f"{found.note}. "
    said = [f"spacing {found.spacing!r}"] if found.spacing else []
    said += [f"{name} {value!r}" for name, value in found.options.items()]
    said += ["the guider 'cfg_pp'"] if found.note == CFG_PP else []
    return f"did you mean {found.sampler!r}{' with ' + ' and '.join(said) if said else ''}? "


def asked(name: str, levels: Sequence[Level], options: Mapping[str, Any] | None = None) -> tuple[Level, ...]:
    """The levels at which this sampler will ask its denoiser, in order: a dry run on a single number.

    Exact for every sampler but `rk45` with a tolerance, whose steps depend on the network. Raises RequestError as the run itself would.
    """
    seen: list[Level] = []

    def denoise(x: Tensor, level: Level) -> Tensor:
        seen.append(level)
        return 0.5 * x

    one = torch.ones((1, 1), dtype=torch.float64)
    for _ in sampler(name).function(denoise, one, levels, noise=lambda: one, **(options or {})):
        pass
    return tuple(seen)
