"""Views of networks: they share every weight, leave the original alone, and stand through `replace` for what they were told."""

import pytest
import torch
from torch import nn

from latentgen.models.view import replaced, view


@pytest.fixture
def net():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(shared, nn.ReLU()), shared, nn.BatchNorm1d(4)).eval()


def test_a_view_shares_every_weight_and_answers_the_same(net):
    same = view(net, lambda name, module: None)
    assert [id(p) for p in same.parameters()] == [id(p) for p in net.parameters()] and [id(b) for b in same.buffers()] == [id(b) for b in net.buffers()]
    assert not {id(m) for m in same.modules()} & {id(m) for m in net.modules()}
    x = torch.randn(3, 4)
    assert torch.equal(same(x), net(x))


def test_what_is_replaced_is_replaced_in_the_view_alone(net):
    x = torch.randn(3, 4)
    before, seen = net(x), []

    def replace(name, module):
        seen.append(name)
        return nn.Identity() if name == "1" else None

    other = view(net, replace)
    assert seen == ["", "0", "1", "2", "3"]  # nothing inside what was replaced
    assert torch.equal(net(x), before)
    assert torch.equal(other(x), net[3](net[2](net[0](x))))


def test_a_copy_may_be_changed(net):
    def swap(name, module):
        if name == "3":
            module.eps = 1.0
            return module
        return None

    other = view(net, swap)
    assert other[3].eps == 1.0 and net[3].eps == 1e-5


def test_where_places_are_named_only_what_is_above_them_is_copied(net):
    x = torch.randn(3, 4)
    before = net(x)
    other = replaced(net, {"1.1"}, lambda name, own: nn.Identity())
    assert other is not net and other[1] is not net[1] and type(other[1][1]) is nn.Identity and type(net[1][1]) is nn.ReLU
    assert other[0] is net[0] and other[1][0] is net[1][0] and other[3] is net[3]
    assert torch.equal(other(x), net[3](net[2](net[1][0](net[0](x))))) and torch.equal(net(x), before)


def test_a_named_place_is_given_a_copy_of_its_own(net):
    def changed(name, own):
        own.eps = 1.0
        return own

    other = replaced(net, {"3"}, changed)
    assert other[3].eps == 1.0 and net[3].eps == 1e-5


def test_a_module_in_two_places_is_one_in_the_view_too(net):
    other = view(net, lambda name, module: None)
    assert other[1][0] is other[2]


def test_moving_the_original_moves_the_view(net):
    other = view(net, lambda name, module: None)
    net.to(torch.float64)
    assert all(p.dtype == torch.float64 for p in other.parameters())
