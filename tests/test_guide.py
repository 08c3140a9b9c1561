"""Wrappers: what they call, what they compute, what they keep."""

import math

import pytest
import torch

from latentgen.diffusion import SAMPLERS, RectifiedFlow, VariancePreserving, guided, masked, noised, spacing, start, zero_terminal_snr
from latentgen.diffusion.guide import Estimates
from latentgen.diffusion.schedule import scaled_linear
from latentgen.errors import RequestError

FLOW = RectifiedFlow()
ZERO = VariancePreserving(zero_terminal_snr(scaled_linear(1000, 0.00085, 0.012)))
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def position(level):
    return FLOW.find(level.half_log_snr)


class Counted:
    """Two denoisers that count their calls."""

    def __init__(self):
        self.positive_calls = self.both_calls = 0

    def positive(self, x, level):
        self.positive_calls += 1
        return torch.tanh(x)

    def both(self, x, level):
        self.both_calls += 1
        return Estimates(torch.tanh(x), (torch.sin(3 * x),))

    def guided(self, **options):
        return guided(self.positive, self.both, position=position, **options)


def test_guidance_is_the_extrapolation_from_negative_to_positive():
    net = Counted()
    x0 = net.guided(scale=7.5)(X, FLOW.at(0.5))
    torch.testing.assert_close(x0, torch.sin(3 * X) + 7.5 * (torch.tanh(X) - torch.sin(3 * X)))
    assert (net.positive_calls, net.both_calls) == (0, 1)


def test_scale_1_calls_only_the_positive():
    net = Counted()
    denoise = net.guided(scale=1.0, rescale=0.7)
    for s in (1.0, 0.5, 0.01):
        assert torch.equal(denoise(X, FLOW.at(s)), torch.tanh(X))
    assert (net.positive_calls, net.both_calls) == (3, 0)


def test_outside_the_interval_only_the_positive_is_called():
    net = Counted()
    denoise = net.guided(scale=4.0, interval=(0.25, 0.75))
    plain = {s: torch.equal(denoise(X, FLOW.at(s)), torch.tanh(X)) for s in (1.0, 0.76, 0.75, 0.5, 0.25, 0.24, 0.0)}
    assert [s for s, is_plain in plain.items() if not is_plain] == [0.75, 0.5, 0.25]
    assert (net.positive_calls, net.both_calls) == (4, 3)


@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_rescale_is_the_formula_of_the_paper_image_by_image(rescale):
    """Lin et al. 2023, eq. 15 and 16, written out with a loop over images."""
    net = Counted()
    level = FLOW.at(0.5)
    x0 = net.guided(scale=9.0, rescale=rescale)(X, level)
    x_cfg = net.guided(scale=9.0)(X, level)
    for i in range(len(X)):
        x_rescaled = x_cfg[i] * torch.tanh(X[i]).std() / x_cfg[i].std()
        torch.testing.assert_close(x0[i], rescale * x_rescaled + (1 - rescale) * x_cfg[i])
    if rescale == 1:
        torch.testing.assert_close(x0.std(dim=(1, 2, 3)), torch.tanh(X).std(dim=(1, 2, 3)))


def test_rescale_is_that_of_diffusers():
    module = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    net, level = Counted(), FLOW.at(0.5)
    theirs = module.rescale_noise_cfg(net.guided(scale=5.0)(X, level), torch.tanh(X), guidance_rescale=0.6)
    torch.testing.assert_close(net.guided(scale=5.0, rescale=0.6)(X, level), theirs)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"scale": math.nan}, "scale"),
        ({"scale": math.inf}, "scale"),
        ({"scale": 5.0, "rescale": 1.1}, "rescale"),
        ({"scale": 5.0, "rescale": -0.1}, "rescale"),
        ({"scale": 5.0, "interval": (0.8, 0.2)}, "interval"),
        ({"scale": 5.0, "interval": (-0.1, 0.2)}, "interval"),
        ({"scale": 1.0, "interval": (0.0, 1.5)}, "interval"),
    ],
)
def test_bad_guidance_is_refused(options, word):
    with pytest.raises(RequestError, match=word):
        Counted().guided(**options)


@pytest.fixture
def inpaint():
    generator = torch.Generator().manual_seed(1)
    z0, eps = torch.randn(2, 1, 4, 6, 6, generator=generator)
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., 2:5, 1:4] = 1.0
    mask[..., 5, :] = 0.5
    return z0, eps, mask


def test_masked_shows_and_answers_the_kept_area(inpaint):
    z0, eps, mask = inpaint
    seen = []

    def denoise(x, level):
        seen.append(x)
        return torch.tanh(x)

    x, level = torch.ones(1, 4, 6, 6), FLOW.at(0.4)
    x0 = masked(denoise, z0=z0, mask=mask, eps=eps)(x, level)
    torch.testing.assert_close(seen[0], mask * x + (1 - mask) * (0.6 * z0 + 0.4 * eps))
    torch.testing.assert_close(x0, mask * torch.tanh(seen[0]) + (1 - mask) * z0)
    assert torch.equal(seen[0][..., :2, :], noised(z0, eps, level)[..., :2, :])
    assert torch.equal(x0[..., :2, :], z0[..., :2, :])
    assert torch.equal(x, torch.ones(1, 4, 6, 6))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("path", [FLOW, ZERO], ids=["flow", "zero-terminal"])
@pytest.mark.parametrize("begin", [0, 4], ids=["from noise", "from the picture"])
def test_the_kept_area_ends_exactly_as_it_was(name, path, begin, inpaint):
    z0, eps, mask = inpaint
    levels = spacing("trailing", path, 8)[begin:]
    generator = torch.Generator().manual_seed(2)
    denoise = masked(lambda x, level: torch.tanh(2 * x), z0=z0, mask=mask, eps=eps)
    x = start(eps, levels[0]) if begin == 0 else noised(z0, eps, levels[0])
    *_, last = SAMPLERS[name].function(denoise, x, levels, noise=lambda: torch.randn(1, 4, 6, 6, generator=generator))
    kept = (mask == 0).expand_as(z0)
    assert torch.equal(last.x[kept], z0[kept])
    assert not torch.allclose(last.x[~kept], z0[~kept])


def test_mask_1_is_the_denoiser_itself(inpaint):
    z0, eps, _ = inpaint
    denoise = masked(lambda x, level: torch.tanh(x), z0=z0, mask=torch.ones(1, 1, 6, 6), eps=eps)
    assert torch.equal(denoise(X, FLOW.at(0.3)), torch.tanh(X))
