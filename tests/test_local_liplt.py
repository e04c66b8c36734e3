"""LipLT around samples: between the gradients there and the global bound, and in closed form."""

import math

import pytest
import torch
from torch import nn

import lipcert as lc
from balls import EVERY, built, points
from lipcert.bounds import local_liplt
from lipcert.graph import Affine, Slope
from lipcert.layers import MaxMin
from oracles import jacobians

FEW = ["conv", "densenet", "branches", "residual"]
nets = pytest.mark.parametrize("name", FEW)
SMOOTH = pytest.mark.parametrize("name", ["mlp", "resnet", "densenet"])


def traced(name, seed=0):
    return lc.trace(built(name, seed, trained=True), EVERY[name].shape)


def local(graph, eps=1.0, progressive=True, **more):
    return lc.LipLT(graph, norm=lc.Exact(), region=lc.L2Ball(eps, progressive=progressive), **more)


def pairs(K):
    K = K.dense() if isinstance(K, lc.MarginConstants) else K
    return K.masked_fill(torch.eye(K.shape[-1]).bool(), 0)


def spectral(matrices):
    return torch.linalg.matrix_norm(matrices, 2)


# ---------------------------------------------------------------- limits


@SMOOTH
def test_tiny_balls_have_the_gradients(name):
    """Of the margins, of the single logits, of the output vector, and of every node before."""
    graph = traced(name)
    x = torch.randn(3, *graph.input_shape)
    bound, J = local(graph, 1e-9), jacobians(graph.model, x)
    with torch.no_grad(), bound.held():
        K = bound(x)
        near = {"rtol": 1e-5, "atol": 1e-8}
        torch.testing.assert_close(pairs(K), (J[:, :, None] - J[:, None]).norm(dim=3), **near)
        torch.testing.assert_close(bound.per_output(x).value, J.norm(dim=2), **near)
        torch.testing.assert_close(bound.lipschitz(x).value, spectral(J), **near)
        assert K.valid_radius.tolist() == [1e-9] * 3
    for n in [n for n in graph if isinstance(n.op, Slope)]:
        for upto in (n, n.inputs[0]):
            own = jacobians(lambda x, n=upto: graph.values(x)[n], x)
            before = spectral(jacobians(lambda x, n=n: graph.values(x)[n.inputs[0]], x))
            reached = bound.prefix(upto, x).value.detach()
            assert (reached >= spectral(own) * (1 - 1e-6)).all()
            if upto is not n:
                torch.testing.assert_close(reached, before, **near)


@nets
def test_huge_balls_have_the_global_bound(name):
    """Up to each end of paths, and up to the output."""
    graph = traced(name)
    x = torch.randn(2, *graph.input_shape)
    bound, whole = local(graph, 1e7), lc.LipLT(graph, norm=lc.Exact())
    with torch.no_grad(), bound.held():
        for n in bound._whole.ends:
            here = bound.prefix(n, x).value
            everywhere = whole.prefix(n).value.expand(2)
            assert (here <= everywhere * (1 + 1e-9)).all()
            if name in ("conv", "densenet"):
                torch.testing.assert_close(here, everywhere, rtol=1e-5, atol=1e-9)


@nets
@pytest.mark.parametrize("progressive", [True, False], ids=["progressive", "plain"])
def test_every_node_is_capped_by_the_global_bound(name, progressive):
    graph = traced(name)
    x = torch.randn(2, *graph.input_shape)
    whole = lc.LipLT(graph, norm=lc.Exact())
    caps = {n: whole.prefix(n).value for n in whole._whole.ends}
    for eps in (0.05, 0.5, 3.0):
        found = local(graph, progressive=progressive)._around(x, eps)
        for n in graph:
            reached = found.reached(n)
            if n in caps:
                assert (reached.value <= caps[n] * (1 + 1e-12)).all()
            assert reached.value.shape == (2,)
            assert (reached.kind, reached.failure) == (lc.Kind.UPPER, 0)


def test_prefixes_between_ends_are_capped_by_the_global_ones():
    graph = traced("resnet")
    x = torch.randn(2, *graph.input_shape)
    whole, bound = lc.LipLT(graph, norm=lc.Exact()), local(graph, 0.05)
    with torch.no_grad(), bound.held():
        for n in graph:
            assert (bound.prefix(n, x).value <= whole.prefix(n).value * (1 + 1e-12)).all()


def rising():
    """A net whose constant is larger in a ball than everywhere, if nothing caps it.

    Slopes in [0, 1] give z / 2 + psi / 2: the maps of z cancel, as W2 diag(1/2, 1/2) W1 = 0. In the
    ball that holds the second unit on, the map is W2 diag(1/2, 1) W1, and only one unit is lost.
    """
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False))
    net[0].weight.data = torch.tensor([[1.0, 0.0], [4.0, 0.0]])
    net[0].bias.data = torch.tensor([0.0, 0.0])
    net[2].weight.data = torch.tensor([[4.0, -1.0], [0.0, 0.0]])
    return lc.trace(net, (2,))


def test_smaller_balls_may_rise_before_the_cap():
    graph = rising()
    whole = lc.LipLT(graph, norm=lc.Exact())
    assert whole.prefix(graph.output).value.item() == pytest.approx(
        math.sqrt(17) * math.sqrt(17) / 2
    )
    x = torch.tensor([[0.0, 0.0], [5.0, 0.0], [-5.0, 0.0]])
    found = local(graph)._around(x, torch.tensor(0.5).expand(3)).reached(graph.output).value
    # On both sides of the kink; where both units are on: 4 - 4 = 0; where both are off: 0.
    torch.testing.assert_close(found, torch.tensor([17 / 2, 0.0, 0.0]), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- in between


def test_two_layers_in_closed_form():
    """||W2 C W1|| + ||W2 D|| ||W1||, with C and D of the neurons that the ball does not decide."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(5, 9), nn.LeakyReLU(-2.0), nn.Linear(9, 3))
    graph, eps = lc.trace(net, (5,)), 0.4
    x = torch.randn(6, 5)
    bound = local(graph, eps)
    W1, W2 = net[0].weight.detach(), net[2].weight.detach()
    z, r = net[0](x).detach(), eps * W1.norm(dim=1)
    low, high = 3 * (z - r > 0).double() - 2, 3 * (z + r > 0).double() - 2
    assert (low != high).any()
    assert (low == high).any()
    C, D = (low + high) / 2, (high - low) / 2
    first, second = W2 * C[:, None] @ W1, W2 * D[:, None]
    expected = spectral(first) + spectral(second) * spectral(W1)
    with torch.no_grad():
        whole = spectral(W2 @ W1) / 2 + 1.5 * spectral(W2) * spectral(W1)
        assert (expected < whole).any()
        torch.testing.assert_close(bound.lipschitz(x).value, expected.clamp(max=whole))
        single = first.norm(dim=2) + second.norm(dim=2) * spectral(W1)
        torch.testing.assert_close(bound.per_output(x).value, single)
        apart = [(m[:, :, None] - m[:, None]).norm(dim=3) for m in (first, second)]
        torch.testing.assert_close(bound(x).dense(), apart[0] + apart[1] * spectral(W1))
        # Up to the activation: the steepest slope there, times what reaches it.
        steepest = torch.maximum(high, -low).amax(1) * spectral(W1)
        torch.testing.assert_close(bound.prefix("1", x).value, steepest)
        torch.testing.assert_close(bound.prefix("0", x).value, spectral(W1).expand(6))


@nets
def test_secants_in_the_ball_are_below(name):
    """Of every node, between any two points of the ball."""
    graph, eps = traced(name), 0.3
    x = torch.randn(2, *graph.input_shape)
    found = points(graph.model, x, torch.full((2,), eps), 240)
    with torch.no_grad():
        values = {n: v.unflatten(0, (2, -1)) for n, v in graph.values(found.flatten(0, 1)).items()}
        for progressive in (True, False):
            bound = local(graph, eps, progressive)
            followed, single = bound._around(x, None), bound.per_output(x).value
            step = (found - found.roll(1, 1)).flatten(2).norm(dim=2)
            for n in graph:
                rise = (values[n] - values[n].roll(1, 1)).flatten(2)
                most = followed.reached(n).value[:, None] * step
                assert (rise.norm(dim=2) <= most * (1 + 1e-9) + 1e-10).all()
                if n is graph.output:
                    assert (rise.abs() <= single[:, None] * step[:, :, None] * (1 + 1e-9)).all()


@nets
def test_constants_are_those_of_explicit_sums_over_sources(name):
    """K_ij = sum over s of |row_i - row_j| r_s, from the maps of the local ends themselves."""
    graph, eps = traced(name), 0.2
    x = torch.randn(2, *graph.input_shape)
    bound = local(graph, eps)
    with torch.no_grad():
        ends, K = bound._around(x, None).ends(), bound(x)
        expected = sum(
            (e.rows[:, :, None] - e.rows[:, None]).norm(dim=3) * e.reached.value[:, None, None]
            for e in ends
        )
        torch.testing.assert_close(pairs(K), pairs(expected))
        assert sum(float(e.reached.value.max()) > 0 for e in ends) > 1
        assert all(e.rows.shape[:2] == (2, 3) for e in ends)


def test_iterated_constants_approach_the_exact_ones():
    """In a network where no cap matters."""
    graph, eps = traced("resnet"), 0.2
    x, region = torch.randn(3, *graph.input_shape), lc.L2Ball(eps, progressive=False)
    with torch.no_grad():
        exact = local(graph, eps, progressive=False)
        guess = lc.LipLT(graph, norm=lc.LOBPCG(60), region=region)
        K = guess(x)
        assert K.kind is lc.Kind.ESTIMATE
        torch.testing.assert_close(pairs(K), pairs(exact(x)), rtol=1e-3, atol=1e-6)
        value = guess.lipschitz(x).value
        torch.testing.assert_close(value, exact.lipschitz(x).value, rtol=1e-3, atol=1e-6)


def test_iterated_constants_are_capped_too():
    graph = traced("residual")
    x, region = torch.randn(8, 6), lc.L2Ball(0.2, progressive=False)
    with torch.no_grad():
        guess = lc.LipLT(graph, norm=lc.LOBPCG(60), region=region)
        whole = lc.LipLT(graph, norm=lc.Exact()).lipschitz().value
        assert (guess.lipschitz(x).value <= whole * (1 + 1e-9)).all()


def test_large_ends_keep_the_global_bound(monkeypatch):
    graph = traced("mlp")
    x = torch.randn(2, 6)
    whole = lc.LipLT(graph, norm=lc.Exact())

    def reached(n):
        found = local(graph)._around(x, torch.tensor(0.01).expand(2))
        return found.reached(n).value.detach()

    small = {n: reached(n) for n in graph}
    monkeypatch.setattr(local_liplt, "_ENTRIES", 1)
    for n in graph:
        if isinstance(n.op, Affine):
            torch.testing.assert_close(reached(n), whole.prefix(n).value.detach().expand(2))
        assert (small[n] <= reached(n) * (1 + 1e-12)).all()
    assert (small[graph.output] < 0.99 * reached(graph.output)).all()
    # The limit itself: entries of all maps of an end, 6 and 10 sources' numbers for 8 outputs.
    second = [n for n in graph if isinstance(n.op, Affine)][1]
    for limit, local_there in ((8 * 16, True), (8 * 16 - 1, False)):
        monkeypatch.setattr(local_liplt, "_ENTRIES", limit)
        assert torch.allclose(reached(second), whole.prefix(second).value) != local_there


@nets
def test_one_sample_at_a_time_is_the_same(name):
    graph = traced(name)
    x, eps = torch.randn(3, *graph.input_shape), torch.tensor([0.01, 0.2, 2.0])
    bound = local(graph)
    with torch.no_grad(), bound.held():
        K, prefix = pairs(bound(x, eps)), bound.lipschitz(x, eps).value
        for i in range(3):
            torch.testing.assert_close(pairs(bound(x[i : i + 1], eps[i].item()))[0], K[i])
            torch.testing.assert_close(
                bound.lipschitz(x[i : i + 1], eps[i : i + 1]).value[0], prefix[i]
            )
        assert bound(x[:0], eps[:0]).dense().shape == (0, 3, 3)


def test_networks_with_nothing_to_narrow():
    """Affine maps alone, or sorting alone: the global bound, with the global claim."""
    for layers in ((), (MaxMin(), nn.Linear(4, 4), MaxMin())):
        net = nn.Sequential(nn.Linear(6, 4), *layers, nn.Linear(4, 3))
        graph, x = lc.trace(net, (6,)), torch.randn(2, 6)
        whole = pairs(lc.LipLT(graph, norm=lc.Exact())())
        for eps in (1e-6, 1.0):
            K = local(graph, eps)(x)
            torch.testing.assert_close(pairs(K), whole.expand(2, -1, -1))
            assert (K.kind, K.failure, K.batch) == (lc.Kind.UPPER, 0, 2)


def test_kinds_and_failures_are_those_of_the_global_caps():
    """Boxes rest on them, and the constants on boxes."""
    graph, x = traced("mlp"), torch.randn(2, 6)
    everywhere = lc.LipLT(graph, norm=lc.Lanczos(1e-8, steps=8)).prefixes()
    K = lc.LipLT(graph, norm=lc.Lanczos(1e-8, steps=8), region=lc.L2Ball(0.1))(x)
    assert K.failure >= max(c.failure for n, c in everywhere.items() if n is not graph.output)
    if any(c.kind is lc.Kind.PROBABILISTIC for n, c in everywhere.items() if n is not graph.output):
        assert K.kind is lc.Kind.PROBABILISTIC


def test_constant_networks_have_zero():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    net[0].bias.data.fill_(-50.0)  # every unit is off in the ball
    graph = lc.trace(net, (4,))
    bound, x = local(graph, 0.5), torch.randn(2, 4)
    assert pairs(bound(x)).eq(0).all()
    assert bound.lipschitz(x).value.eq(0).all()
    slopes = torch.autograd.grad(bound(x).dense().sum(), net.parameters(), allow_unused=True)
    assert all(s is None or s.isfinite().all() for s in slopes)
    certificate = lc.certify(net, x, bound=bound)
    assert certificate.radius.tolist() == [0.5, 0.5]  # no further than the ball
