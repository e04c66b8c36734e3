"""Fusing keeps the function and never loosens the bound."""

import time

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert import tracing
from lipcert.fuse import fuse
from lipcert.graph import Affine, Concat, Graph, Input, Slope, Sum, topological
from nets import NETS
from oracles import jacobians
from rule_cases import Fn


def parts(net, shape, monkeypatch):
    """The graph before fusing."""
    monkeypatch.setattr(tracing, "fuse", lambda output: output)
    graph = lc.trace(net, shape)
    monkeypatch.undo()
    return graph


def fused(graph):
    return Graph(graph.model, graph.input_shape, topological(fuse(graph.output)), graph.signature)


def layers(**modules):
    def make(forward):
        net = Fn(forward)
        for name, module in modules.items():
            setattr(net, name, module)
        return net

    return make


@pytest.mark.parametrize("name", NETS)
def test_fusing_keeps_the_function_and_never_loosens(name, monkeypatch):
    net, shape = NETS[name].build(), NETS[name].shape
    graph = parts(net, shape, monkeypatch)
    one = fused(graph)
    x = torch.randn(5, *shape)
    torch.testing.assert_close(one.values(x)[one.output], graph.values(x)[graph.output])
    tight, loose = (lc.Product(g, lc.Exact())().dense() for g in (one, graph))
    assert (tight <= loose * (1 + 1e-9)).all()
    assert len(one.nodes) <= len(graph.nodes)


def test_convolution_and_batch_norm_are_one_operator(monkeypatch):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    nn.init.normal_(net[1].weight)
    net[1].running_var.uniform_(0.1, 2)
    graph = lc.trace(net, (2, 5, 5))
    gain = lc.Product(graph, lc.Exact()).prefix(graph.nodes[1])
    jacobian = jacobians(net[:2], torch.randn(1, 2, 5, 5))[0]
    torch.testing.assert_close(gain.value, torch.linalg.matrix_norm(jacobian, 2))
    apart = lc.Product(parts(net, (2, 5, 5), monkeypatch), lc.Exact()).lipschitz()
    assert float(gain) < 0.99 * float(apart)


AFFINE_SUBGRAPHS = {
    "residual": lambda s, x: x + s.a(x),
    "two branches": lambda s, x: s.a(x) - 2 * s.b(x),
    "branches of branches": lambda s, x: s.b(s.a(x) + x) + s.a(x) + x.flip(1),
    "three in a row": lambda s, x: s.a(s.b(s.a(x) + 1) * 3),
    "slices": lambda s, x: torch.cat([s.a(x)[:, 1:], x[:, :1], s.b(x)], 1),
    "stacked twice": lambda s, x: torch.stack([x, s.a(x), x], 1).mean(1),
    "reordered": lambda s, x: torch.cat(s.a(x).chunk(2, 1)[::-1], 1) @ s.b.weight,
    "the same twice": lambda s, x: s.a(x) + s.a(x),
    "cancelling": lambda s, x: s.a(x) - s.a(x) + s.b(x),
}


@pytest.mark.parametrize("name", AFFINE_SUBGRAPHS)
def test_affine_sub_graphs_become_one_matrix(name):
    net = layers(a=nn.Linear(4, 4), b=nn.Linear(4, 4))(AFFINE_SUBGRAPHS[name])
    graph = lc.trace(net, (4,))
    assert [type(n.op) for n in graph] == [Input, Affine]
    x = torch.randn(3, 4)
    torch.testing.assert_close(graph.values(x)[graph.output], net(x))
    jacobian = jacobians(net, x[:1])[0]
    torch.testing.assert_close(graph.output.op.map().dense(), jacobian)
    torch.testing.assert_close(
        lc.spectral_norm(net, (4,), lc.Exact()).value, torch.linalg.matrix_norm(jacobian, 2)
    )


def test_branches_of_different_sources_stay_apart():
    net = layers(a=nn.Linear(4, 4), b=nn.Linear(4, 4))(
        lambda s, x: s.a(x.relu()) + s.b(x) + torch.cat([x.relu(), x], 1)[:, :4]
    )
    graph = lc.trace(net, (4,))
    assert {Sum, Concat} <= {type(n.op) for n in graph}
    x = torch.randn(3, 4)
    torch.testing.assert_close(graph.values(x)[graph.output], net(x))


def test_a_shared_source_is_found_behind_affine_ones():
    """Two branches from two affine functions of one activation."""
    net = layers(a=nn.Linear(4, 4), b=nn.Linear(4, 4))(
        lambda s, x: (lambda y: s.a(y).mul(2) + s.b(s.a(y)))(x.tanh())
    )
    graph = lc.trace(net, (4,))
    assert [type(n.op) for n in graph] == [Input, Slope, Affine]


def test_fused_maps_are_differentiable_in_every_weight():
    net = layers(a=nn.Linear(4, 4), b=nn.Linear(4, 4))(lambda s, x: s.b(x + s.a(x)))
    value = lc.Product(lc.trace(net, (4,)), lc.Exact()).lipschitz().value
    value.backward()
    for layer in (net.a, net.b):
        assert layer.weight.grad.abs().max() > 0
        assert layer.bias.grad is None
    with torch.no_grad():
        step = 1e-6 * torch.randn(4, 4)
        before = lc.lipschitz(net, (4,)).value
        net.a.weight += step
        change = lc.lipschitz(net, (4,)).value - before
    torch.testing.assert_close(change, (step * net.a.weight.grad).sum(), rtol=1e-4, atol=1e-12)


def test_long_chains_stay_affordable():
    def forward(s, x):
        for _ in range(60):
            x = s.a(x).flip(1) + x
        return x

    start = time.perf_counter()
    net = layers(a=nn.Linear(4, 4))(forward)
    nn.init.zeros_(net.a.weight)
    graph = lc.trace(net, (4,))
    assert [type(n.op) for n in graph] == [Input, Affine]
    assert float(lc.Product(graph).lipschitz()) == pytest.approx(1)
    assert time.perf_counter() - start < 8


def test_biases_of_chains_are_summed_in_double_precision():
    """In float32 the kink of a ReLU would move by more than the ball below is wide."""
    for seed in range(5):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 30), nn.Linear(30, 1), nn.ReLU(), nn.Linear(1, 2)).float()
        with torch.no_grad():
            net[0].bias.mul_(10)
            net[1].bias.copy_(-(net[1].weight @ net[0].bias))
        node = next(n for n in lc.trace(net, (2,)) if n.name == "0+1")
        found = node.op.bias().double()
        exact = net[:2].double()(torch.zeros(1, 2).double())[0]
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-14)
