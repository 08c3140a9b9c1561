"""Networks without edges: against convolutions that torch itself wraps around, and against the network's own answer on copies side by side."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from latentgen.models.around import Around, around

X = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": 1, "stride": 2},
                                     {"kernel_size": 5, "padding": 2},
                                     {"kernel_size": 3, "padding": 2, "dilation": 2}, {"kernel_size": (3, 1), "padding": (1, 0)}], ids=str)
def test_as_torch_wraps_around(options):
    torch.manual_seed(0)
    plain, wrapped = nn.Conv2d(3, 4, **options), nn.Conv2d(3, 4, **options, padding_mode="circular")
    wrapped.load_state_dict(plain.state_dict())
    torch.testing.assert_close(Around(plain, (2, 3))(X), wrapped(X), rtol=0, atol=1e-5)
    one_way = nn.functional.pad(X, (0, 0, wrapped.padding[0], wrapped.padding[0]), mode="circular") if wrapped.padding[0] else X
    by_hand = nn.functional.conv2d(one_way, plain.weight, plain.bias, plain.stride, (0, plain.padding[1]), plain.dilation)
    torch.testing.assert_close(Around(plain, (2,))(X), by_hand, rtol=0, atol=1e-5)


def test_a_side_shorter_than_the_reach():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 5, padding=4, dilation=2)
    small = X[..., :2, :3]
    middle = conv(small.tile(1, 1, 5, 5))[..., 4:6, 6:9]
    torch.testing.assert_close(Around(conv, (2, 3))(small), middle, rtol=0, atol=1e-5)


class Doubling(nn.Conv2d):
    """A convolution that doubles first."""

    def forward(self, x):
        return super().forward(nn.functional.interpolate(x, scale_factor=2, mode="nearest"))


def test_what_doubles_by_itself():
    torch.manual_seed(0)
    conv = Doubling(3, 4, 3, padding=1)
    torch.testing.assert_close(Around(conv, (3,))(X), conv(X.tile(1, 1, 1, 3))[..., 24:48], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=16,
                                attention_head_dim=8,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).eval()


@pytest.mark.parametrize("axes", [(2,), (3,), (2, 3)])
def test_a_network_without_edges_turns_with_its_picture(unet, axes):
    """Rolled by the network's own stride, the picture comes out rolled; along the other side it does not."""
    torch.manual_seed(1)
    x, words = torch.randn(1, 4, 8, 12), torch.randn(1, 5, 16)
    net = around(unet, axes)
    with torch.no_grad():
        plain = unet(x, 500, words).sample
        made = net(x, 500, words).sample
        for axis in (2, 3):
            turned = net(x.roll(2, axis), 500, words).sample.roll(-2, axis)
            assert torch.allclose(turned, made, rtol=0, atol=2e-5) == (axis in axes)
        assert torch.equal(unet(x, 500, words).sample, plain)  # the network itself is as it was
    assert (made - plain).abs().max() > 1e-3


def test_it_shares_every_weight(unet):
    net = around(unet, (2, 3))
    assert {id(p) for p in net.parameters()} == {id(p) for p in unet.parameters()}
    wide = [module for module in unet.modules() if isinstance(module, nn.Conv2d) and module.padding != (0, 0)]
    assert sum(isinstance(module, Around) for module in net.modules()) == len(wide) > 0


def test_as_the_network_whose_convolutions_wrap(unet):
    wrapped = copy.deepcopy(unet)
    for module in wrapped.modules():
        if isinstance(module, nn.Conv2d) and module.padding != (0, 0):
            module.padding_mode = "circular"
    torch.manual_seed(2)
    x, words = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(around(unet, (2, 3))(x, 10, words).sample, wrapped(x, 10, words).sample, rtol=0, atol=1e-5)


def test_a_network_of_patches_cannot_be_told():
    assert around(nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.Linear(8, 8)), (2, 3)) is None
