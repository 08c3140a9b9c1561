"""What other programs call samplers and spacings: every name leads to something of ours that runs, or to a reason; and the command that prints it."""

import json

import pytest
import torch
from typer.testing import CliRunner

from latentgen.cli import app
from latentgen.diffusion import SAMPLERS, SPACINGS, RectifiedFlow, VarianceExploding, VariancePreserving, foreign, from_diffusers, sampler, spacing
from latentgen.diffusion.names import SAMPLER_NAMES, SPACING_NAMES, Ours, own, plain
from latentgen.diffusion.schedule import scaled_linear
from latentgen.errors import RequestError

# As the programs list them, today and in recent versions
KSAMPLER = """euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp heun heunpp2 exp_heun_2_x0 exp_heun_2_x0_sde dpm_2 dpm_2_ancestral lms dpm_fast
dpm_adaptive dpmpp_2s_ancestral dpmpp_2s_ancestral_cfg_pp dpmpp_sde dpmpp_sde_gpu dpmpp_2m dpmpp_2m_cfg_pp dpmpp_2m_sde dpmpp_2m_sde_gpu
dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu dpmpp_3m_sde dpmpp_3m_sde_gpu ddpm lcm ipndm ipndm_v deis res_multistep res_multistep_cfg_pp
res_multistep_ancestral res_multistep_ancestral_cfg_pp gradient_estimation gradient_estimation_cfg_pp er_sde seeds_2 seeds_3 sa_solver
sa_solver_pece ddim uni_pc uni_pc_bh2""".split()
WEBUI = ["DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S a", "DPM++ 3M SDE", "Euler a", "Euler", "LMS", "Heun", "DPM2", "DPM2 a",
         "DPM fast", "DPM adaptive", "Restart", "DDIM", "DDIM CFG++", "PLMS", "UniPC", "LCM"]
INVOKE = """ddim ddpm deis deis_k lms lms_k pndm heun heun_k euler euler_k euler_a kdpm_2 kdpm_2_k kdpm_2_a kdpm_2_a_k dpmpp_2s dpmpp_2s_k dpmpp_2m
dpmpp_2m_k dpmpp_2m_sde dpmpp_2m_sde_k dpmpp_3m dpmpp_3m_k dpmpp_sde dpmpp_sde_k unipc unipc_k lcm tcd""".split()
CPP = "euler euler_a heun dpm2 dpm++2s_a dpm++2m dpm++2mv2 ipndm ipndm_v lcm ddim_trailing tcd res_multistep res_2s er_sde".split()
LISTED = {"A1111": WEBUI, "ComfyUI": KSAMPLER, "InvokeAI": INVOKE, "stable-diffusion.cpp": CPP}
SCHEDULES = {
    "A1111": ["Automatic", "Uniform", "Karras", "Exponential", "Polyexponential", "SGM Uniform", "KL Optimal", "Align Your Steps",
              "Simple", "Normal", "DDIM", "Beta"],
    "ComfyUI": "simple sgm_uniform karras exponential ddim_uniform beta normal linear_quadratic kl_optimal".split(),
    "stable-diffusion.cpp": "discrete karras exponential ays gits smoothstep sgm_uniform simple kl_optimal lcm bong_tangent".split(),
}
VP = VariancePreserving(scaled_linear(1000, 0.00085, 0.012))


@pytest.mark.parametrize("table, listed", [(SAMPLER_NAMES, LISTED), (SPACING_NAMES, SCHEDULES)], ids=["samplers", "spacings"])
def test_every_listed_name_is_in_the_table(table, listed):
    for program, names in listed.items():
        assert set(names) <= set(table[program]), set(names) - set(table[program])


def test_every_scheduler_of_diffusers_is_in_the_table():
    diffusers = pytest.importorskip("diffusers")
    classes = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    assert not classes - set(SAMPLER_NAMES["diffusers"])


ROWS = [(program, name, ours) for table in (SAMPLER_NAMES, SPACING_NAMES) for program, names in table.items() for name, ours in names.items()]


@pytest.mark.parametrize("program, name, ours", ROWS, ids=[f"{program}: {name}" for program, name, _ in ROWS])
def test_each_leads_to_something_that_runs_or_to_a_reason(program, name, ours):
    assert ours.known or ours.note
    assert ours.spacing in (None, *SPACINGS) and ours.automatic in (None, *SPACINGS)
    assert foreign(name, program) is not None
    if ours.sampler is not None:
        levels = spacing(ours.spacing or "karras", VP, 8)
        *_, last = sampler(ours.sampler).function(lambda x, level: 0.5 * x, torch.ones(1, 1), levels, noise=lambda: torch.ones(1, 1), **ours.options)
        assert last.x.isfinite().all()
    else:
        assert not ours.options


@pytest.mark.parametrize("program", LISTED)
def test_a_name_means_the_same_in_whatever_spelling(program):
    for name in LISTED[program]:
        expected = SAMPLER_NAMES[program][name]
        assert foreign(f" {name} ", program) == expected == foreign(name.upper() if program != "A1111" else name.lower(), program)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras", {})), ("DPM++ 3M SDE Exponential", ("dpmpp_3m_sde", "exponential", {})),
        ("Euler a SGM Uniform", ("euler_ancestral", "sgm_uniform", {})),
        ("k_dpmpp_2m", ("dpmpp_2m", None, {})), ("sample_dpm_2_ancestral", ("dpm2_ancestral", None, {})), ("heun_k", ("heun", "karras", {"variable": "ratio"})),
        ("EulerAncestralDiscrete", ("euler_ancestral", None, {})), ("ddim_trailing", ("ddim", "trailing", {})), ("Align Your Steps", (None, "ays", {})),
        ("res_multistep_ancestral", ("res_multistep", None, {"eta": 1.0})),
    ],
)
def test_foreign(name, expected):
    found = foreign(name)
    assert (found.sampler, found.spacing, dict(found.options)) == expected


@pytest.mark.parametrize("name", ["", "quantum", "euler karras karras", "karras euler", "😀"])
def test_unknown_names_are_none(name):
    assert foreign(name) is None


def test_the_same_name_may_differ_between_programs():
    assert foreign("ddim", "ComfyUI").sampler == "ddim" and foreign("lcm", "stable-diffusion.cpp").sampler == "lcm"
    assert foreign("Restart", "InvokeAI") is None and foreign("plms", "A1111").sampler == "plms"
    assert plain("DPM++ 2M") == plain("k_dpmpp_2m") == plain("sample_dpmpp_2m") == "dpmpp2m"


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, ("euler", "karras", {})),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, ("euler", "trailing", {})),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "use_beta_sigmas": True}, ("euler", "beta", {})),
        ({"_class_name": "DPMSolverMultistepScheduler"}, ("dpmpp_2m", None, {})),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
         ("dpmpp_2m_sde", "karras", {"solver": "midpoint"})),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, ("dpmpp_3m_sde", None, {"eta": 0.0})),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun"}, ("dpmpp_2m_sde", None, {"eta": 0.0, "solver": "heun"})),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, ("plms", None, {})), ({"_class_name": "PNDMScheduler"}, ("pndm", None, {})),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 3, "solver_type": "bh1"}, ("unipc", None, {"order": 3, "variant": "bh1"})),
        ({"_class_name": "DEISMultistepScheduler", "solver_order": 3}, ("deis", None, {"order": 3})),
    ],
)
def test_from_diffusers(config, expected):
    found = from_diffusers(config)
    assert (found.sampler, found.spacing, dict(found.options)) == expected
    sampler(found.sampler).check(found.options)


def test_from_diffusers_without_an_equivalent():
    assert from_diffusers({"_class_name": "NoSuchScheduler"}) is None and from_diffusers({}) is None
    assert from_diffusers({"_class_name": "DDIMInverseScheduler"}).note.startswith("no equivalent")


@pytest.mark.parametrize("path", [VP, RectifiedFlow(), VarianceExploding(0.002, 80.0)], ids=["vp", "flow", "ve"])
def test_any_sampler_with_any_spacing(path):
    """In float32, from the path's own noisy end to the clean one, in few steps and more; what was not made for a path is refused by spacing()."""
    for steps in (2, 9):
        for ramp in SPACINGS:
            try:
                levels = spacing(ramp, path, steps)
            except RequestError:
                continue
            for name in SAMPLERS:
                if name == "restart" and all(level.sigma > level.alpha * 1.9 for level in levels[1:-1]):
                    continue  # which says so: no level below s_high
                *_, last = sampler(name).function(lambda x, level: torch.tanh(x), torch.full((1, 2), levels[0].sigma), levels, noise=lambda: torch.ones(1, 2))
                assert last.x.isfinite().all() and torch.equal(last.x, last.x0), (name, ramp, steps)


def shown(*arguments):
    result = CliRunner().invoke(app, ["samplers", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_lists_all():
    code, out, _ = shown()
    assert code == 0 and all(name in out for name in (*SAMPLERS, *SPACINGS)) and "KDPM2DiscreteScheduler" not in out and "--names" in out
    code, names, _ = shown("--names")
    assert code == 0 and all(name in names for name in ("DPM++ 2M SDE Heun", "dpmpp_3m_sde_gpu", "KDPM2DiscreteScheduler", "dpmpp_2s_k"))
    assert "Karras et al. 2022" not in names and shown("--names", "euler")[0] == 2
    code, out, _ = shown("--json")
    said = json.loads(out)
    assert code == 0 and [row["sampler"] for row in said["samplers"]] == list(SAMPLERS) and said["spacings"] == list(SPACINGS)
    assert len(said["foreign"]) == len(ROWS)


def test_the_command_tells_about_one():
    assert "order 3, variant bh1" in shown("UniPC")[1] and "Zhao et al. 2023" in shown("unipc")[1]
    assert json.loads(shown("DPM++ 2M Karras", "--json")[1])["spacing"] == "karras"
    lines = shown("Euler a")[1].splitlines()
    assert lines[0].split() == ["name", "Euler", "a"] and lines[1].split() == ["here", "euler_ancestral"]
    assert [line.split()[0] for line in lines[2:]][:2] == ["sampler", "about"] and "Euler a (A1111)" in lines[-1]
    assert shown("Euler")[1] == shown("euler")[1] and shown("Karras")[1] == shown("karras")[1]
    assert "SGM Uniform (A1111)" in shown("sgm_uniform")[1] and "no equivalent here" in shown("dpm_fast")[1]
    assert {"default", "takes", "about"} <= json.loads(shown("tcd", "--json")[1])["options"]["gamma"].keys()
    code, out, err = shown("quantum")
    assert code == 2 and not out and err.startswith("error: unknown sampler 'quantum'")


def test_ours_is_a_plain_value():
    assert Ours("euler") == Ours("euler") and Ours("euler").known and not Ours(note="none").known


@pytest.mark.parametrize(("said", "ours"), [("Euler", "euler"), (" DDIM ", "ddim"), ("dpmpp_2M", "dpmpp_2m"), ("Karras", "karras"), ("SGM_Uniform", "sgm_uniform"),
                                            ("UniPC", None), ("Heun", None), ("Beta", None), ("euler a", None), ("nothing", None)])
def test_our_own_names_in_any_case(said, ours):
    """But not where another program means something else by exactly that name: A1111's UniPC is order 3, its Heun measures steps otherwise."""
    assert (own(said, SAMPLERS, SAMPLER_NAMES) or own(said, SPACINGS, SPACING_NAMES)) == ours
