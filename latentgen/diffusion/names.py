"""What other programs call samplers and spacings, and which of ours does the same. Data, and how a name is found in it; runs nothing.

A name is recognised to be suggested, or to read another program's recipe; a request takes our own names only, in any case ("Karras").
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Ours:
    """What a foreign name means here.

    sampler, spacing: our names; None where the name does not tell, or where there is none (then `note` says so).
    options: of our sampler.  automatic: the spacing that the program itself takes where none is chosen.  note: what is not quite the same.
    """

    sampler: str | None = None
    spacing: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    automatic: str | None = None

    @property
    def known(self) -> bool:
        """Whether there is anything of ours for it."""
        return self.sampler is not None or self.spacing is not None


def _is(sampler: str, note: str = "", *, automatic: str | None = None, **options: Any) -> Ours:
    return Ours(sampler, options=options, note=note, automatic=automatic)


def _to(spacing: str, note: str = "") -> Ours:
    return Ours(spacing=spacing, note=note)


def _no(note: str) -> Ours:
    return Ours(note=f"no equivalent here: {note}")


CFG_PP = "together with the guider cfg_pp"
BETWEEN = "asks at the middle of each step, there at every other level"
BROWNIAN = "noise from another generator: another picture of the same kind"
EVEN = "by steps of any length: exact weights here, approximate ones there"
UNIPC_A = _is("unipc", order=3, variant="bh1")
FAST, ADAPTIVE = _no("it chooses its own levels, nearest is dpmpp_2s_ancestral with eta 0"), _no("it chooses its own steps, "
                                                                                                 "nearest is rk45 with rtol 0.01")
HEUN = _is("heun", variable="ratio")

SAMPLER_NAMES: dict[str, dict[str, Ours]] = {
    "A1111": {
        "DPM++ 2M": _is("dpmpp_2m", automatic="karras"), "DPM++ SDE": _is("dpmpp_sde", BROWNIAN, automatic="karras"),
        "DPM++ 2M SDE": _is("dpmpp_2m_sde", BROWNIAN, automatic="exponential"),
        "DPM++ 2M SDE Heun": _is("dpmpp_2m_sde", BROWNIAN, automatic="exponential", solver="heun"),
        "DPM++ 2S a": _is("dpmpp_2s_ancestral", automatic="karras"), "DPM++ 3M SDE": _is("dpmpp_3m_sde", BROWNIAN, automatic="exponential"),
        "Euler a": _is("euler_ancestral"), "Euler": _is("euler"), "LMS": _is("lms"), "Heun": HEUN, "DPM2": _is("dpm2", automatic="karras"),
        "DPM2 a": _is("dpm2_ancestral", automatic="karras"), "DPM fast": FAST, "DPM adaptive": ADAPTIVE,
        "Restart": _is("restart", "there the number of restarts follows from the steps", automatic="karras"), "DDIM": _is("ddim"),
        "DDIM CFG++": _is("ddim", CFG_PP), "PLMS": _is("plms"), "UniPC": UNIPC_A, "LCM": _is("lcm"), "TCD": _is("tcd"), "DDPM": _is("ddpm"),
        "Heun++": _no("nearest is heun"), "IPNDM": _is("ipndm"), "IPNDM_V": _is("lms", EVEN), "DEIS": _is("deis"),
        "Euler CFG++": _is("euler", CFG_PP), "Euler a CFG++": _is("euler_ancestral", CFG_PP), "Res Multistep": _is("res_multistep"),
        "DPM++ 2M Turbo": _no("nearest is dpmpp_2m"), "DPM++ 2M SDE Turbo": _no("nearest is dpmpp_2m_sde"),
        "Gradient Estimation": _no("nearest is euler"), "ER SDE": _is("er_sde"), "SA Solver": _is("sa_solver"),
    },
    "ComfyUI": {
        "euler": _is("euler"), "euler_cfg_pp": _is("euler", CFG_PP), "euler_ancestral": _is("euler_ancestral"),
        "euler_ancestral_cfg_pp": _is("euler_ancestral", CFG_PP), "heun": HEUN, "heunpp2": _no("nearest is heun"),
        "exp_heun_2_x0": _no("nearest is heun"), "exp_heun_2_x0_sde": _no("nearest is dpmpp_sde"), "dpm_2": _is("dpm2"),
        "dpm_2_ancestral": _is("dpm2_ancestral"), "lms": _is("lms"), "dpm_fast": FAST, "dpm_adaptive": ADAPTIVE,
        "dpmpp_2s_ancestral": _is("dpmpp_2s_ancestral"), "dpmpp_2s_ancestral_cfg_pp": _is("dpmpp_2s_ancestral", CFG_PP),
        "dpmpp_sde": _is("dpmpp_sde", BROWNIAN), "dpmpp_sde_gpu": _is("dpmpp_sde", BROWNIAN), "dpmpp_2m": _is("dpmpp_2m"),
        "dpmpp_2m_cfg_pp": _is("dpmpp_2m", CFG_PP), "dpmpp_2m_sde": _is("dpmpp_2m_sde", BROWNIAN), "dpmpp_2m_sde_gpu": _is("dpmpp_2m_sde", BROWNIAN),
        "dpmpp_2m_sde_heun": _is("dpmpp_2m_sde", BROWNIAN, solver="heun"), "dpmpp_2m_sde_heun_gpu": _is("dpmpp_2m_sde", BROWNIAN, solver="heun"),
        "dpmpp_3m_sde": _is("dpmpp_3m_sde", BROWNIAN), "dpmpp_3m_sde_gpu": _is("dpmpp_3m_sde", BROWNIAN), "ddpm": _is("ddpm"), "lcm": _is("lcm"),
        "ipndm": _is("ipndm"), "ipndm_v": _is("lms", EVEN), "deis": _is("deis", "a polynomial in another variable there"),
        "res_multistep": _is("res_multistep"), "res_multistep_cfg_pp": _is("res_multistep", CFG_PP),
        "res_multistep_ancestral": _is("res_multistep", eta=1.0), "res_multistep_ancestral_cfg_pp": _is("res_multistep", CFG_PP, eta=1.0),
        "gradient_estimation": _no("nearest is euler"), "gradient_estimation_cfg_pp": _no("nearest is euler"),
        "er_sde": _is("er_sde"), "seeds_2": _no("nearest is dpmpp_sde"), "seeds_3": _no("nearest is dpmpp_sde"),
        "sa_solver": _is("sa_solver", "noise only where that program puts it: set s_tmin and s_tmax", predictor_order=3, corrector_order=4),
        "sa_solver_pece": _no("it asks twice in each step, nearest is sa_solver"), "ddim": _is("ddim"), "uni_pc": UNIPC_A,
        "uni_pc_bh2": _is("unipc", order=3, variant="bh2"),
    },
    "diffusers": {
        "DDIMScheduler": _is("ddim"), "DDIMParallelScheduler": _is("ddim"), "CogVideoXDDIMScheduler": _is("ddim"), "DDPMScheduler": _is("ddpm"),
        "DDPMParallelScheduler": _is("ddpm"), "DDPMWuerstchenScheduler": _is("ddpm"), "UnCLIPScheduler": _is("ddpm"), "PNDMScheduler": _is("pndm"),
        "LMSDiscreteScheduler": _is("lms"), "EulerDiscreteScheduler": _is("euler"), "EDMEulerScheduler": _is("euler"),
        "EulerAncestralDiscreteScheduler": _is("euler_ancestral"),
        "LTXEulerAncestralRFScheduler": _is("euler_ancestral", "another share of noise there"),
        "FlowMatchEulerDiscreteScheduler": _is("euler"), "HeunDiscreteScheduler": HEUN, "FlowMatchHeunDiscreteScheduler": _is("heun"),
        "KarrasVeScheduler": _is("heun", s_churn=80.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.007), "KDPM2DiscreteScheduler": _is("dpm2"),
        "KDPM2AncestralDiscreteScheduler": _is("dpm2_ancestral"), "DPMSolverMultistepScheduler": _is("dpmpp_2m"),
        "EDMDPMSolverMultistepScheduler": _is("dpmpp_2m"), "CosineDPMSolverMultistepScheduler": _is("dpmpp_2m_sde", solver="midpoint"),
        "CogVideoXDPMScheduler": _is("dpmpp_2m_sde", "nearly"), "DPMSolverSinglestepScheduler": _is("dpmpp_2s_ancestral", BETWEEN, eta=0.0),
        "DPMSolverSDEScheduler": _is("dpmpp_sde", BROWNIAN), "UniPCMultistepScheduler": _is("unipc"), "DEISMultistepScheduler": _is("deis", order=2),
        "IPNDMScheduler": _is("ipndm"), "LCMScheduler": _is("lcm"), "FlowMatchLCMScheduler": _is("lcm"), "TCDScheduler": _is("tcd"),
        "SASolverScheduler": _is("sa_solver", "noise there only from timestep 200 to 800", s_tmin=0.571, s_tmax=5.112),
        "CMStochasticIterativeScheduler": _is("consistency"), "ConsistencyDecoderScheduler": _is("consistency", s_min=0.0),
        "ScoreSdeVeScheduler": _is("predictor_corrector", snr=0.15, predictor="reverse"),
        "ScoreSdeVpScheduler": _is("predictor_corrector", corrector_steps=0, predictor="reverse"),
        "SCMScheduler": _is("consistency", "levels by angle there", s_min=0.0),
        **{name: _no(why) for why, names in {
            "it runs from the picture to noise": ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
            "it is for tokens, not for latents": ("AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler",
                                                  "VQDiffusionScheduler"),
            "it belongs to one model": ("FlowMapEulerDiscreteScheduler", "HeliosDMDScheduler", "HeliosScheduler", "MiniMaxH3Scheduler",
                                        "PiflowScheduler",
                                        "RFD4ProteinaScheduler"),
            "inpainting is a wrapper here, for any sampler": ("RePaintScheduler",)}.items() for name in names},
    },
    "InvokeAI": {
        "ddim": _is("ddim"), "ddpm": _is("ddpm"), "deis": _is("deis", order=2), "lms": _is("lms"), "pndm": _is("pndm"), "heun": HEUN,
        "euler": _is("euler"),
        "euler_a": _is("euler_ancestral"), "kdpm_2": _is("dpm2"), "kdpm_2_a": _is("dpm2_ancestral"),
        "dpmpp_2s": _is("dpmpp_2s_ancestral", BETWEEN, eta=0.0),
        "dpmpp_2m": _is("dpmpp_2m"), "dpmpp_2m_sde": _is("dpmpp_2m_sde"), "dpmpp_3m": _is("dpmpp_3m_sde", eta=0.0),
        "dpmpp_sde": _is("dpmpp_sde", BROWNIAN),
        "unipc": _is("unipc"), "lcm": _is("lcm"), "tcd": _is("tcd"),
    },
    "stable-diffusion.cpp": {
        "euler": _is("euler"), "euler_a": _is("euler_ancestral"), "heun": HEUN, "dpm2": _is("dpm2"), "dpm++2s_a": _is("dpmpp_2s_ancestral"),
        "dpm++2m": _is("dpmpp_2m"), "dpm++2mv2": _no("nearest is dpmpp_2m"), "dpm++2m_sde": _is("dpmpp_2m_sde"),
        "dpm++2m_sde_bt": _is("dpmpp_2m_sde", BROWNIAN),
        "ipndm": _is("ipndm"), "ipndm_v": _is("lms", EVEN), "lcm": _is("lcm"), "ddim_trailing": Ours("ddim", "trailing"), "tcd": _is("tcd"),
        "res_multistep": _is("res_multistep"), "res_2s": _no("nearest is dpmpp_2s_ancestral with eta 0"), "er_sde": _is("er_sde"),
        "euler_cfg_pp": _is("euler", CFG_PP), "euler_a_cfg_pp": _is("euler_ancestral", CFG_PP), "euler_ge": _no("nearest is euler"),
        "lms": _is("lms"),
    },
}
_K = ("deis", "lms", "heun", "euler", "kdpm_2", "kdpm_2_a", "dpmpp_2s", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_sde", "unipc")
SAMPLER_NAMES["InvokeAI"] |= {f"{name}_k": replace(SAMPLER_NAMES["InvokeAI"][name], spacing="karras") for name in _K}

SIGMAS = "in sigma there: karras or exponential are nearer"
SPACING_NAMES: dict[str, dict[str, Ours]] = {
    "A1111": {
        "Automatic": Ours(note="the sampler's own choice"), "Uniform": _to("normal"), "Karras": _to("karras"), "Exponential": _to("exponential"),
        "Polyexponential": _to("polyexponential"), "SGM Uniform": _to("sgm_uniform"), "KL Optimal": _to("kl_optimal"),
        "Align Your Steps": _to("ays", "of the larger model: ays_xl"), "Simple": _to("simple"), "Normal": _to("normal"),
        "DDIM": _to("leading", "with offset 1"),
        "Beta": _to("beta", SIGMAS), "Align Your Steps GITS": _no("nearest is ays"), "Align Your Steps 11": _to("ays"),
        "Align Your Steps 32": _to("ays"),
        "Turbo": _to("trailing"),
    },
    "ComfyUI": {
        "simple": _to("simple"), "sgm_uniform": _to("sgm_uniform"), "karras": _to("karras"), "exponential": _to("exponential"),
        "ddim_uniform": _to("leading", "with offset 1, there one step more or less"), "beta": _to("beta"), "normal": _to("normal"),
        "linear_quadratic": _to("linear_quadratic"), "kl_optimal": _to("kl_optimal"), "polyexponential": _to("polyexponential"),
        "AlignYourStepsScheduler": _to("ays", "of the larger model: ays_xl"),
    },
    "diffusers": {
        "use_karras_sigmas": _to("karras"), "use_exponential_sigmas": _to("exponential"), "use_beta_sigmas": _to("beta", SIGMAS),
        "use_lu_lambdas": _to("exponential"), "use_flow_sigmas": Ours(note="a flow model is told by its family"), "linspace": _to("linspace"),
        "leading": _to("leading"), "trailing": _to("trailing"),
    },
    "stable-diffusion.cpp": {
        "discrete": _to("normal"), "karras": _to("karras"), "exponential": _to("exponential"), "ays": _to("ays", "of the larger model: ays_xl"),
        "gits": _no("nearest is ays"), "sgm_uniform": _to("sgm_uniform"), "simple": _to("simple"), "smoothstep": _no("nearest is simple"),
        "kl_optimal": _to("kl_optimal"), "lcm": _to("trailing", "of the 50 levels such models are taught"),
        "bong_tangent": _no("nearest is kl_optimal"),
        "ltx2": _no("its own shift and end"), "logit_normal": _no("nearest is beta"), "flux": _to("trailing"), "flux2": _to("trailing"),
        "beta": _to("beta"),
    },
}


def foreign(name: str, program: str | None = None) -> Ours | None:
    """What a name from another program means here: of a sampler, else of a spacing; None where it is in no table.

    Spelling, case and "k_" or "Scheduler" around it do not count; A1111's "DPM++ 2M Karras" is a sampler and a spacing.
    program: "A1111", "ComfyUI", "diffusers", "InvokeAI" or "stable-diffusion.cpp", where it is known.
    """
    programs = [p for p in SAMPLER_NAMES if program in (None, p)]
    for same in (str.strip, plain):
        for table in (SAMPLER_NAMES, SPACING_NAMES):
            for each in programs:
                for known, ours in table.get(each, {}).items():
                    if same(known) == same(name):
                        return ours
    letters = plain(name)
    for known, of_spacing in sorted(_all(SPACING_NAMES, programs), key=lambda pair: -len(pair[0])):
        rest = letters.removesuffix(plain(known))
        if of_spacing.spacing and rest and rest != letters:
            found = next((ours for other, ours in _all(SAMPLER_NAMES, programs) if plain(other) == rest), None)
            if found is not None and found.sampler:
                return replace(found, spacing=of_spacing.spacing)
    return None


def own(name: str, known: Collection[str], table: Mapping[str, Mapping[str, Ours]]) -> str | None:
    """The one of our own names that this is, whatever its case; None where it is none, or where it is another program's name for something else.

    "Karras" is karras and "DDIM" is ddim, but what A1111 calls UniPC is not what unipc does by itself.

    Args:
        known: our samplers or spacings; table: `SAMPLER_NAMES` or `SPACING_NAMES`.
    """
    small = name.strip().lower()
    if name in known or small not in known:
        return name if name in known else None
    others = [ours for called in table.values() for other, ours in called.items() if other == name.strip()]
    return None if any(ours.options or ours.note or small not in (ours.sampler, ours.spacing) for ours in others) else small


def from_diffusers(config: Mapping[str, Any]) -> Ours | None:
    """What a scheduler config of diffusers means here: its class and its flags; None for a class that is in no table."""
    found = SAMPLER_NAMES["diffusers"].get(str(config.get("_class_name")))
    if found is None or found.sampler is None:
        return found
    flags = [flag for flag in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas") if config.get(flag)]
    spacing = SPACING_NAMES["diffusers"].get(flags[0] if flags else str(config.get("timestep_spacing")))
    order, stochastic = config.get("solver_order", 2), str(config.get("algorithm_type", "")).startswith("sde")
    if found.sampler == "dpmpp_2m" and (stochastic or order == 3):
        third = {"eta": float(stochastic)}
        found = _is("dpmpp_3m_sde", **third) if order == 3 else _is("dpmpp_2m_sde", solver=config.get("solver_type", "midpoint"))
    elif found.sampler == "dpmpp_2m" and config.get("solver_type") == "heun":
        found = _is("dpmpp_2m_sde", eta=0.0, solver="heun")
    elif found.sampler == "unipc":
        found = _is("unipc", order=order, variant=config.get("solver_type", "bh2"))
    elif found.sampler == "deis":
        found = _is("deis", order=order)
    elif found.sampler == "pndm" and config.get("skip_prk_steps"):
        found = _is("plms")
    elif found.sampler == "sa_solver":
        orders = {name: config[name] for name in ("predictor_order", "corrector_order") if name in config}
        found = replace(found, options={**found.options, **orders})
    if str(config.get("algorithm_type", "")).endswith("dpmsolver"):
        found = replace(found, note="that one extrapolates the noise, this one x0")
    return found if spacing is None else replace(found, spacing=spacing.spacing)


def nearest(name: object, own: Iterable[str]) -> Ours | None:
    """The sampler whose name here or elsewhere is spelt most like this one, or None where nothing is."""
    known = {plain(other): ours for other, ours in reversed(_all(SAMPLER_NAMES, SAMPLER_NAMES)) if ours.sampler}
    known |= {plain(mine): Ours(mine) for mine in own}
    close = difflib.get_close_matches(plain(name), known, 1, cutoff=0.7)
    return known[close[0]] if close else None


def plain(name: object) -> str:
    """A name without what programs spell differently: "DPM++ 2M", "k_dpmpp_2m" and "sample_dpmpp_2m" are all "dpmpp2m"."""
    text = str(name).strip().lower().replace("+", "p")
    text = "".join(letter for letter in text.removeprefix("k_").removeprefix("sample_") if letter.isalnum())
    return text.removesuffix("scheduler").removesuffix("sampler") or text


def _all(table: Mapping[str, Mapping[str, Ours]], programs: Iterable[str]) -> list[tuple[str, Ours]]:
    return [pair for program in programs for pair in table.get(program, {}).items()]
