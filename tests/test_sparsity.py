"""The sparsity penalty against the authors' code."""

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.losses import Sparsity
from lipcert.schedules import Constant
from local_lip_nets import case

NAMES = ["mlp_relux", "mlp_clmaxmin", "conv_relux", "conv_clmaxmin"]


@pytest.mark.parametrize("name", NAMES)
def test_the_value_of_the_authors_code(name):
    c = case(name)
    graph = lc.trace(c.net, tuple(c.x.shape[1:]))
    region = lc.L2Ball(c.eps, progressive=False)
    bound = lc.Product(graph, norm=lc.Exact(), region=region, masked=())
    expected = c.numbers["conv"]["tiny"]["sparsity"]
    found = 2 * Sparsity(Constant(0.5))(bound(c.x), 0.0)
    assert found.item() == pytest.approx(expected, rel=2e-4)  # their norms stop below
    found.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in c.net[:2].parameters())


def test_it_falls_as_units_become_constant():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = lc.trace(net, (3,))
    bound, x = lc.Product(graph, region=lc.L2Ball(0.1)), torch.rand(5, 3)
    before = Sparsity(Constant(1.0))(bound(x), 0.3)
    with torch.no_grad():
        net[0].bias -= 100
    assert before > 0
    assert Sparsity(Constant(1.0))(bound(x), 0.3) == 0


def test_a_global_bound_has_no_boxes():
    graph = lc.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (3,))
    with pytest.raises(lc.LipcertError, match="global"):
        Sparsity(Constant(1.0))(lc.Product(graph)(), 0.0)
