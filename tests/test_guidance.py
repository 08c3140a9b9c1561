"""Guidance beyond the plain rule, against the papers' own steps, diffusers' guiders and exact answers."""

import math

import numpy as np
import pytest
import torch

from latentgen.diffusion import SAMPLERS, Level, RectifiedFlow, VariancePreserving, guided, prediction_row, spacing, zero_terminal_snr
from latentgen.diffusion.guidance.classify import classified
from latentgen.diffusion.guidance.combine import combination, standing, thresholded
from latentgen.diffusion.guidance.progress import Progress
from latentgen.diffusion.guidance.rules import manifold_scale, optimised_negative, quantile
from latentgen.diffusion.guidance.table import GUIDERS, filled
from latentgen.diffusion.guidance.thresholds import dynamic_threshold
from latentgen.diffusion.guide import Estimates
from latentgen.diffusion.schedule import scaled_linear
from latentgen.diffusion.table import spread
from latentgen.errors import RequestError

FLOW, VP = RectifiedFlow(), VariancePreserving(scaled_linear(1000, 0.00085, 0.012))
ZERO = VariancePreserving(zero_terminal_snr(scaled_linear(1000, 0.00085, 0.012)))
LEVELS = spacing("trailing", FLOW, 8)
DICE = torch.Generator().manual_seed(0)
X, POS, NEG, EMPTY, WEAK = torch.randn(5, 3, 4, 6, 6, generator=DICE)
STEPS = torch.randn(5, 2, 3, 4, 6, 6, generator=DICE)  # five steps of (positive, negative)


def combined(said, *, scale=5.0, levels=LEVELS, prediction="flow", first=0):
    return combination(filled(spread(said)), scale=scale, progress=Progress(levels, first=first), row=lambda level: prediction_row(prediction, level))


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"eta": 1.0, "momentum": 0.7}, {"norm_threshold": 0.0}, {"norm_threshold": 2.5, "eta": 0.3}])
def test_apg_is_that_of_diffusers_over_steps(options):
    """Its guider in the paper's form, pred_cond + (w - 1) * update."""
    theirs = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    said = GUIDERS["apg"].defaults | options
    buffer = theirs.MomentumBuffer(said["momentum"])
    combine = combined({"apg": options})
    for level, (pos, neg) in zip(LEVELS, STEPS):
        wanted = theirs.normalized_guidance(pos, neg, 4.0, buffer, said["eta"], said["norm_threshold"], use_original_formulation=True)
        torch.testing.assert_close(combine(X, level, Estimates(pos, (neg,))), wanted, rtol=1e-5, atol=1e-5)


def test_apg_without_its_three_parts_is_the_plain_rule():
    said = {"apg": {"momentum": 0.0, "eta": 1.0, "norm_threshold": 0.0}}
    torch.testing.assert_close(combined(said)(X, LEVELS[2], Estimates(POS, (NEG,))), NEG + 5 * (POS - NEG), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path, prediction", [(FLOW, "flow"), (VP, "epsilon"), (VP, "v")])
def test_cfg_zero_scales_outputs_as_diffusers_does(path, prediction):
    theirs = pytest.importorskip("diffusers.guiders.classifier_free_zero_star_guidance")
    level = path.at(0.6)
    a, b = prediction_row(prediction, level)
    outs = theirs.ClassifierFreeZeroStarGuidance(guidance_scale=5.0, zero_init_steps=0)
    outs.set_state(step=3, num_inference_steps=8, timestep=torch.tensor(500.0))
    wanted = a * X + b * outs.forward(POS, NEG).pred
    made = combined({"cfg_zero": {"zero_steps": 0}}, prediction=prediction)(X, level, Estimates(a * X + b * POS, (a * X + b * NEG,)))
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
    clean = Level(1.0, 0.0, 0.0)
    assert optimised_negative(X, POS, NEG, row=prediction_row(prediction, clean)) is NEG


def test_cfg_zero_stands_still_in_the_first_steps_of_the_whole_run():
    guiders, asked = filled(spread({"cfg_zero": {"zero_steps": 2}})), []

    def stand(first=0, inside=lambda level: True):
        guide = guided(lambda x, level: asked.append(level) or POS, lambda x, level: asked.append(level) or Estimates(POS, (NEG,)), scale=5.0,
                       position=lambda level: 0.5, combine=combined(guiders))
        return standing(guide, guiders, progress=Progress(LEVELS, first=first), row=lambda level: prediction_row("flow", level), inside=inside)

    states = [X] + [step.x for step in SAMPLERS["euler"].function(stand(), X, LEVELS, noise=lambda: X)]
    torch.testing.assert_close(states[2], X, rtol=0, atol=1e-6)
    assert (states[3] - states[2]).abs().max() > 0.01 and asked == list(LEVELS[2:-1])  # and no network is asked
    assert (stand(first=2)(X, LEVELS[0]) - X).abs().max() > 0.1  # the last steps of a longer run
    assert (stand(inside=lambda level: False)(X, LEVELS[0]) - X).abs().max() > 0.1


@pytest.mark.parametrize("path", [VP, ZERO, FLOW], ids=["vp", "zero-terminal", "flow"])
@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
def test_cfg_plus_plus_is_the_papers_ddim_step(path, strength):
    """Chung et al. 2024, algorithm 2, written out: noise of the negative estimate, x0 of both."""
    levels = spacing("trailing", path, 7)

    def nets(x):
        return Estimates(torch.tanh(x), (torch.sin(2 * x),))

    combine = combined({"cfg_pp": {"scale": strength}}, levels=levels)
    guide = guided(lambda x, level: nets(x).positive, lambda x, level: nets(x), scale=5.0, position=lambda level: 0.5, combine=combine)
    ours = [step.x for step in SAMPLERS["ddim"].function(guide, X.double(), levels, noise=lambda: X)]
    x = X.double()
    for made, here, after in zip(ours, levels, levels[1:]):
        pos, neg = nets(x).positive, nets(x).others[0]
        noise = (x - here.alpha * neg) / here.sigma
        x = after.alpha * (neg + strength * (pos - neg)) + after.sigma * noise
        torch.testing.assert_close(made, x, rtol=1e-9, atol=1e-9)


def test_cfg_plus_plus_between_levels_and_at_the_end():
    progress = Progress(LEVELS)
    scale = manifold_scale(0.6, progress)
    middle = FLOW.at(0.55)
    assert progress.following(middle).sigma == 0.375  # 0.5 is the nearest in log(alpha / sigma)
    q = progress.following(middle).sigma * middle.alpha / (progress.following(middle).alpha * middle.sigma)
    assert scale(middle) == pytest.approx(0.6 / (1 - q)) and scale(LEVELS[-2]) == 0.6 and scale(LEVELS[0]) == 0.6
    cut = Progress(LEVELS[:4])  # a run that hands over: a sampler may ask at the very end
    assert manifold_scale(0.6, cut)(LEVELS[3]) == 1.0


def test_perp_neg_picture_by_picture():
    """Armandpour et al. 2023, eq. 8, with a loop."""
    made = combined({"perp_neg": {"weight": 1.5}})(X, LEVELS[3], Estimates(POS, (NEG,), EMPTY))
    for i in range(3):
        pos, neg = POS[i] - EMPTY[i], NEG[i] - EMPTY[i]
        upright = neg - (pos * neg).sum() / (pos * pos).sum() * pos
        torch.testing.assert_close(made[i], EMPTY[i] + 5 * (pos - 1.5 * upright), rtol=1e-5, atol=1e-5)
    same = combined("perp_neg")(X, LEVELS[3], Estimates(POS, (POS,), EMPTY))  # the negative words are the prompt: they take nothing
    torch.testing.assert_close(same, EMPTY + 5 * (POS - EMPTY), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, theirs", [("pag", "PerturbedAttentionGuidance"), ("slg", "SkipLayerGuidance")])
def test_weaker_networks_are_left_behind_as_in_diffusers(name, theirs):
    made = combined({name: {"scale": 2.5}})(X, LEVELS[1], Estimates(POS, (NEG,), weak={name: WEAK}))
    torch.testing.assert_close(made, POS + 4 * (POS - NEG) + 2.5 * (POS - WEAK), rtol=1e-5, atol=1e-5)
    guiders = pytest.importorskip("diffusers.guiders")
    key, layers = {"pag": ("perturbed_guidance", "perturbed_guidance_layers"), "slg": ("skip_layer_guidance", "skip_layer_guidance_layers")}[name]
    reference = getattr(guiders, theirs)(guidance_scale=4.0, use_original_formulation=True, **{f"{key}_scale": 2.5, layers: [0], f"{key}_stop": 1.0})
    reference.set_state(step=3, num_inference_steps=8, timestep=torch.tensor(500.0))
    torch.testing.assert_close(made, reference.forward(POS, NEG, WEAK).pred, rtol=1e-5, atol=1e-5)
    alone = combined({name: {"scale": 2.5}}, scale=1.0)(X, LEVELS[1], Estimates(POS, weak={name: WEAK}))
    torch.testing.assert_close(alone, POS + 2.5 * (POS - WEAK))
    assert combined({name: {"scale": 2.5}}, scale=1.0)(X, LEVELS[1], Estimates(POS)) is POS  # where it does not act


def test_mimic_has_the_lower_scales_range():
    """The published rule in numpy: mean, absolute deviation, each channel by itself."""
    said = {"mimic": {"scale": 2.0, "percentile": 0.9}}
    made = combined(said, scale=12.0)(X, LEVELS[3], Estimates(POS, (NEG,))).numpy()
    high, low = (NEG + 12 * (POS - NEG)).numpy(), (NEG + 2 * (POS - NEG)).numpy()
    for i, c in np.ndindex(3, 4):
        centred, aim = high[i, c] - high[i, c].mean(), np.abs(low[i, c] - low[i, c].mean()).max()
        reach = max(np.quantile(np.abs(centred), 0.9), aim)
        np.testing.assert_allclose(made[i, c], high[i, c].mean() + np.clip(centred, -reach, reach) / reach * aim, rtol=1e-4, atol=1e-4)
    same = combined({"mimic": {"scale": 5.0}})(X, LEVELS[3], Estimates(POS, (NEG,)))
    torch.testing.assert_close(same, NEG + 5 * (POS - NEG), rtol=1e-5, atol=1e-5)


def test_dynamic_threshold_is_imagens():
    """diffusers' schedulers have it for pixels: a limit of 1, at most sample_max_value."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=100.0)
    torch.testing.assert_close(dynamic_threshold(3 * X, limit=1.0, percentile=0.9), scheduler._threshold_sample(3 * X))
    assert torch.equal(dynamic_threshold(X, limit=50.0, percentile=0.9), X)
    wrapped = thresholded(lambda x, level: 9 * x, filled({"static_threshold": {"limit": 2.0}}))
    assert torch.equal(wrapped(X, LEVELS[0]), (9 * X).clamp(-2, 2))
    shrunk = thresholded(lambda x, level: 9 * x, filled({"dynamic_threshold": {}}))(X, LEVELS[0])
    assert shrunk.abs().amax() == pytest.approx(3.0, abs=1e-5) and shrunk.abs().mean() < (9 * X).clamp(-3, 3).abs().mean()


@pytest.mark.parametrize("percentile", [0.5, 0.77, 0.995, 1.0])
def test_quantile_is_torchs(percentile):
    torch.testing.assert_close(quantile(X.flatten(1), percentile), torch.quantile(X.flatten(1), percentile, dim=1))


MEANS, SPREAD = torch.tensor([[-1.0, 0.5], [1.5, -0.3]]), 0.4  # two classes of points in the plane, equally many


def mixture(x, level):
    """log p(x | class) + log 1/2 of x = alpha x0 + sigma eps, (B, 2), and E[x0 | x, class], (B, 2 classes, 2)."""
    variance = (level.alpha * SPREAD) ** 2 + level.sigma**2
    far = x[:, None, :, 0, 0] - level.alpha * MEANS.to(x)
    return -(far**2).sum(2) / (2 * variance), MEANS.to(x) + level.alpha * SPREAD**2 / variance * far


@pytest.mark.parametrize("path", [VP, FLOW, ZERO], ids=["vp", "flow", "zero-terminal"])
def test_classifier_guidance_is_bayes_rule_at_scale_1(path):
    """With the exact classifier of a Gaussian mixture the unconditional denoiser becomes exactly the class's own."""
    x = torch.randn(6, 2, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def anything(x, level):
        joint, x0 = mixture(x, level)
        return (joint.softmax(1)[..., None] * x0).sum(1)[..., None, None]

    for label in (0, 1):
        guide = classified(anything, lambda x, level: mixture(x, level)[0].log_softmax(1)[:, label], scale=1.0)
        for s in (0.02, 0.3, 0.7, 0.99):
            wanted = mixture(x, path.at(s))[1][:, label, :, None, None]
            torch.testing.assert_close(guide(x, path.at(s)), wanted, rtol=1e-8, atol=1e-8)
        assert torch.equal(guide(x, Level(0.0, 1.0, 1000.0)), anything(x, Level(0.0, 1.0, 1000.0)))  # noise alone says nothing of the class
        assert not x.requires_grad


def test_a_judge_of_x0_is_exact_for_data_of_spread_1():
    """For Gaussian data of spread 1 the network's slope is known, so that asking it (autograd through the denoiser) gives the same."""

    def judge(x0, level):
        return -((x0 - 0.3) ** 2).sum(dim=(1, 2, 3)) * 2

    for path in (VP, FLOW):
        level = path.at(0.6)
        slope = level.alpha / (level.alpha**2 + level.sigma**2)
        through = classified(lambda x, level: slope * x, lambda x, level: judge(slope * x, level), scale=0.7)
        made = classified(lambda x, level: slope * x, judge, scale=0.7, of="x0")(X, level)
        torch.testing.assert_close(made, through(X, level), rtol=1e-5, atol=1e-5)
    assert torch.equal(classified(lambda x, level: x, judge, scale=1.0, of="x0", active=lambda level: False)(X, level), X)


@pytest.mark.parametrize("judge, word", [
    (lambda x, level: x.sum(), r"a tensor \(\): expected log p of each picture"), (lambda x, level: 1.0, "a float"),
    (lambda x, level: x.detach().sum(dim=(1, 2, 3)), "no gradient"), (lambda x, level: torch.zeros(3, requires_grad=True), "does not depend")])
def test_a_classifier_that_is_none(judge, word):
    with pytest.raises(RequestError, match=word):
        classified(lambda x, level: x, judge, scale=1.0)(X, FLOW.at(0.5))


@pytest.mark.parametrize("said", ["apg", "cfg_zero", "cfg_pp", "perp_neg", "mimic", ["apg", "cfg_pp", "mimic"], ["apg", "perp_neg"], ["cfg_zero", "apg", "pag", "slg"]])
def test_a_batch_equals_its_pictures(said):
    whole, alone = combined(said), [combined(said) for _ in range(3)]
    for level, (pos, neg) in zip(LEVELS, STEPS):
        made = whole(X, level, Estimates(pos, (neg,), EMPTY, {name: WEAK for name in ("pag", "slg") if name in said}))
        for i, one in enumerate(alone):
            x, p, n, e, w = (t[i:i + 1] for t in (X, pos, neg, EMPTY, WEAK))
            single = one(x, level, Estimates(p, (n,), e, {name: w for name in ("pag", "slg") if name in said}))
            torch.testing.assert_close(made[i:i + 1], single, rtol=1e-5, atol=1e-5)


def test_guiders_compose_in_the_order_that_is_said():
    """All at once, written out: optimised negative, projection, CFG++'s scale, mimic, the weaker network, the threshold."""
    said = {"dynamic_threshold": {"limit": 2.0}, "slg": {"scale": 1.5}, "mimic": {"scale": 2.0, "percentile": 0.9}, "cfg_pp": {"scale": 0.5},
            "apg": {"eta": 0.2, "momentum": 0.0, "norm_threshold": 0.0}, "cfg_zero": {"zero_steps": 0}}
    assert list(filled(said)) == ["cfg_zero", "apg", "cfg_pp", "mimic", "slg", "dynamic_threshold"]
    level, after = LEVELS[2], LEVELS[3]
    a, b = prediction_row("flow", level)
    out_pos, out_neg = (POS - a * X) / b, (NEG - a * X) / b
    s = (out_pos * out_neg).sum(dim=(1, 2, 3), keepdim=True) / (out_neg**2).sum(dim=(1, 2, 3), keepdim=True)
    d = POS - (a * X + b * s * out_neg)
    along = (d * POS).sum(dim=(1, 2, 3), keepdim=True) / (POS**2).sum(dim=(1, 2, 3), keepdim=True) * POS
    d = d - 0.8 * along
    scale = 0.5 / (1 - after.sigma / after.alpha * level.alpha / level.sigma)
    high, low = POS + (scale - 1) * d, POS + d
    mean = high.mean(dim=(2, 3), keepdim=True)
    aim = (low - low.mean(dim=(2, 3), keepdim=True)).abs().amax(dim=(2, 3), keepdim=True)
    reach = torch.maximum(torch.quantile((high - mean).abs().flatten(2), 0.9, dim=2)[..., None, None], aim)
    x0 = mean + (high - mean).clamp(-reach, reach) * aim / reach + 1.5 * (POS - WEAK)
    combine = combined(said)
    made = thresholded(lambda x, level: combine(x, level, Estimates(POS, (NEG,), weak={"slg": WEAK})), filled(said))(X, level)
    torch.testing.assert_close(made, dynamic_threshold(x0, limit=2.0, percentile=0.995), rtol=1e-4, atol=1e-4)


def test_progress_counts_the_whole_run():
    progress = Progress(LEVELS[4:], first=4)
    assert (progress.total, progress.step(LEVELS[4]), progress.step(LEVELS[7]), progress.step(FLOW.at(0.4))) == (8, 4, 7, 4)
    assert [progress.within(level, 0.5, 0.75) for level in LEVELS[4:8]] == [True, True, False, False]
    assert progress.following(LEVELS[7]) == LEVELS[8] and progress.following(Level(1.0, 0.0, 0.0)) == Level(1.0, 0.0, 0.0)
    assert math.isinf(Progress(LEVELS).levels[0].half_log_snr) and Progress(LEVELS).following(LEVELS[0]) == LEVELS[1]


@pytest.mark.parametrize("said, word", [
    ({"dynamic_treshold": {}}, "did you mean 'dynamic_threshold'"), ({"CFG++": {}}, "did you mean 'cfg_pp'"), ({"rescale_cfg": {}}, "guidance_rescale"),
    ({"apg": {"momentun": 0}}, "no such option"), ({"apg": {"momentum": 3}}, "a number from -0.99 to 0.99"), ({"cfg_pp": {"scale": 7.5}}, "from 0 to 1"),
    ({"apg": {"eta": math.nan}}, "apg's eta is nan"), ({"pag": {"layers": []}}, "a layer's name or number"), ({"slg": {"start": 0.5, "end": 0.2}}, "starts at 0.5"),
    ({"cfg_zero": {}, "perp_neg": {}}, "cfg_zero and perp_neg are given but both"), ({"static_threshold": {}, "dynamic_threshold": {}}, "leave one of them out")])
def test_guiders_that_cannot_be(said, word):
    with pytest.raises(RequestError, match=word):
        filled(said)


def test_the_table_is_whole():
    for name, info in GUIDERS.items():
        assert set(info.options) == set(info.defaults) and GUIDERS.find(name) is info
        filled({name: {}})
    assert {*GUIDERS.elsewhere.values()} <= {*GUIDERS, "guidance_rescale"}
    assert spread("apg") == {"apg": {}} and spread(["apg", {"slg": {"scale": 1}}]) == {"apg": {}, "slg": {"scale": 1}} and spread({"apg": None}) == {"apg": {}}
    for wrong in (7, [], ["apg", "apg"], {"apg": 3}, [7], {7: {}}):
        with pytest.raises(ValueError):
            spread(wrong)
