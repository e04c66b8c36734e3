"""Convex-potential layers (SLL, CPL) in networks: boxes, graphs, bounds, training."""

import math

import torch
import torch.nn.functional as F
from torch import nn

import lipcert as lc
from lipcert.graph import Lipschitz
from lipcert.layers import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear
from oracles import best_quotients, differences, jacobians
from potential_weights import each_cpl, each_layer, each_weight, made

INF = math.inf


def node(module, shape):
    (found,) = (n for n in lc.trace(nn.Sequential(module), shape) if isinstance(n.op, Lipschitz))
    return found


@each_layer
@each_weight
def test_boxes_hold_the_images(name, weights):
    module, shape = made(name, weights)
    op = node(module, shape).op
    ends = torch.randn(2, 50, *shape).sort(0).values
    lower, upper = ends * 10 ** torch.linspace(-6, 3, 50).reshape(-1, *(1,) * len(shape))
    low, high = op.image(lower, upper)
    assert not (low.isnan() | high.isnan()).any()
    for i in range(20):
        # Corners as well as points inside.
        where = torch.rand_like(lower)
        where = where.round() if i % 2 else where
        value = op.fn(lower + (upper - lower) * where)
        slack = 1e-9 * (1 + value.abs())
        assert (low - slack <= value).all()
        assert (value <= high + slack).all()


@each_layer
def test_boxes_that_are_points_or_without_end(name):
    module, shape = made(name)
    op = node(module, shape).op
    x = torch.randn(4, *shape)
    low, high = op.image(x, x)
    torch.testing.assert_close(low, op.fn(x))
    torch.testing.assert_close(high, op.fn(x))
    for lower, upper in ((x, x + INF), (x - INF, x), (x - INF, x + INF)):
        one_lower, one_upper = x.clone(), x + 1
        one_lower.flatten(1)[:, 0] = lower.flatten(1)[:, 0]
        one_upper.flatten(1)[:, 0] = upper.flatten(1)[:, 0]
        for a, b in ((lower, upper), (one_lower, one_upper)):
            low, high = op.image(a, b)
            assert not (low.isnan() | high.isnan()).any()
            for _ in range(50):
                point = (x + 1e3 * torch.randn_like(x)).maximum(a).minimum(b)
                value = op.fn(point)
                assert (low <= value + 1e-9).all()
                assert (value <= high + 1e-9).all()


@each_cpl
def test_the_graph_is_that_of_eval_mode_whatever_the_mode(name):
    module, shape = made(name)
    net = nn.Sequential(module)
    x = torch.randn(2, *shape)
    exact = net(x)
    graph = lc.trace(net, shape)
    net.train()
    before = module.direction.clone()
    torch.testing.assert_close(graph.values(x)[graph.output], exact)
    assert torch.equal(module.direction, before)
    module.weight.data *= 0.1
    assert not torch.allclose(graph.values(x)[graph.output], exact)


def small_net():
    return nn.Sequential(
        CPLConv2d(2, (5, 5), 3),
        nn.Conv2d(2, 3, 3, 2),
        SLLConv2d(3, 4),
        nn.Flatten(),
        nn.Linear(12, 6),
        CPLLinear(6),
        SLLLinear(6, 8),
        nn.Linear(6, 3),
    )


def trained(net, shape, steps=60):
    x, labels = torch.randn(64, *shape), torch.arange(64) % 3
    x = x + labels.reshape(-1, *(1,) * len(shape))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimiser.step()
    return net.eval(), x, labels


def test_bounds_of_a_net_hold():
    net, x, _ = trained(small_net(), (2, 5, 5))
    graph = lc.trace(net, (2, 5, 5))
    slopes = jacobians(net, x)
    for bound in (lc.Product(graph), lc.LipLT(graph)):
        constant = float(bound.lipschitz())
        assert torch.linalg.matrix_norm(slopes, 2).max() <= constant
        assert best_quotients(net, (2, 5, 5), 100).norm(dim=1).max() <= constant
        rows = bound().row(torch.arange(3))
        pairs = differences(slopes)
        assert (rows >= pairs - 1e-9)[~torch.eye(3, dtype=torch.bool)].all()
    affine = [lc.spectral_norm(m, s) for m, s in ((net[1], (2, 5, 5)), (net[4], (12,)))]
    last = lc.spectral_norm(net[7], (6,))
    expected = math.prod(float(c) for c in (*affine, last))
    assert float(lc.lipschitz(net, (2, 5, 5))) <= expected * (1 + 1e-9)
    certificate = lc.certify(net, x, bound=lc.Product(graph))
    assert certificate.kind is lc.Kind.UPPER
    assert (certificate.radius > 0).any()


def test_local_bounds_of_a_net_hold():
    net, x, _ = trained(small_net(), (2, 5, 5))
    x, eps = x[:4], 0.3
    for make in (lc.Product, lc.LipLT):
        bound = make(lc.trace(net, (2, 5, 5)), region=lc.L2Ball(0.3))
        constant = bound.lipschitz(x, eps).value
        away = torch.randn(4, 200, *x.shape[1:])
        away = away / away.flatten(2).norm(dim=2)[..., None, None, None]
        points = x[:, None] + eps * away
        change = net(points.flatten(0, 1)).reshape(4, 200, 3) - net(x)[:, None]
        assert (change.norm(dim=2).amax(1) / eps <= constant * (1 + 1e-9)).all()


def test_long_training_at_a_high_rate_stays_finite():
    torch.manual_seed(1)
    net = nn.Sequential(CPLLinear(4), SLLLinear(4), CPLLinear(4), SLLLinear(4)).float()
    x, target = torch.randn(16, 4).float(), torch.randn(16, 4).float()
    parameters = list(net.parameters())
    for _ in range(2000):
        loss = (net(x) - target).square().mean()
        slopes = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_sub_(parameters, slopes, alpha=0.3)
    assert loss.isfinite()
    assert all(p.isfinite().all() for p in parameters)
    net.eval()
    assert torch.linalg.matrix_norm(jacobians(net, x), 2).max() <= 1 + 1e-5
