"""The product bound: never below what is seen, equal where it must be, honest in what it claims."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.graph import Lipschitz
from lipcert.rules import registry
from nets import NETS, Net
from oracles import best_quotients, differences, jacobians
from rule_cases import Fn

GOLDEN = np.load(Path(__file__).parent / "golden" / "lmt_mnistnet.npz")  # provenance: inside
NORMS = [lc.Auto(), lc.Exact(), lc.Gram(3), lc.Lanczos(1e-9, steps=20)]
UP = 1 + 1e-9  # float64 rounding of the norms


def bound_of(net, shape, norm=None):
    return lc.Product(lc.trace(net, shape), norm)


def built(name, norm=None):
    return bound_of(NETS[name].build(), NETS[name].shape, norm)


def off_diagonal(K):
    return K[..., ~torch.eye(K.shape[-1], dtype=torch.bool)]


# ---------------------------------------------------------------- soundness


@pytest.fixture(scope="module")
def seen():
    """What sampling finds: differences of outputs of pairs, and Jacobians, of each net."""
    torch.set_default_dtype(torch.float64)
    found = {}
    for name, net in NETS.items():
        module = net.build()
        quotients = best_quotients(module, net.shape, pairs=1000)
        found[name] = quotients, jacobians(module, torch.randn(100, *net.shape))
    return found


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_no_pair_and_no_jacobian_is_above_the_bound(name, norm, seen):
    quotients, jacobian = seen[name]
    bound = built(name, norm)
    K, total = bound().dense(), bound.lipschitz().value
    per_output = bound.per_output().value
    assert K.shape == (1, 3, 3)
    for vectors in (quotients, jacobian):
        assert (off_diagonal(differences(vectors)) <= UP * off_diagonal(K[0])).all()
    assert quotients.norm(dim=1).max() <= UP * total
    assert torch.linalg.matrix_norm(jacobian, 2).max() <= UP * total
    assert (quotients.abs().amax(0) <= UP * per_output).all()
    assert (jacobian.norm(dim=2).amax(0) <= UP * per_output).all()
    assert (per_output <= UP * total).all()
    assert (UP * math.sqrt(2) * total >= K).all()


@pytest.mark.parametrize("name", NETS)
def test_prefixes_bound_every_node(name):
    bound = built(name)
    x = torch.randn(300, *NETS[name].shape)
    y = x + torch.randn_like(x) * 10 ** torch.empty(300, *(1,) * (x.ndim - 1)).uniform_(-2, 1)
    distance = (x - y).flatten(1).norm(dim=1)
    at_x, at_y = bound.graph.values(x), bound.graph.values(y)
    for layer in bound.layers():
        change = (at_x[layer.node] - at_y[layer.node]).flatten(1).norm(dim=1)
        assert (change <= UP * layer.prefix.value * distance + 1e-12).all(), layer.node.name
        same = bound.prefix(layer.node.name), bound.prefix(layer.node)
        assert same[0].value == same[1].value == layer.prefix.value
    assert [layer.node for layer in bound.layers()] == list(bound.graph)
    assert layer.prefix.value == bound.lipschitz().value


@pytest.mark.parametrize("name", ["linear", "deep linear"])
@pytest.mark.parametrize("norm", [lc.Exact(), lc.Auto()], ids=str)
def test_linear_networks_have_their_own_constants(name, norm, seen):
    bound = built(name, norm)
    matrix = seen[name][1][0]
    torch.testing.assert_close(bound.lipschitz().value, torch.linalg.matrix_norm(matrix, 2))
    torch.testing.assert_close(bound.per_output().value, matrix.norm(dim=1))
    torch.testing.assert_close(bound().dense()[0], (matrix[:, None] - matrix).norm(dim=2))


def test_two_layers_by_hand():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    net[0].weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    net[2].weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    bound = bound_of(net, (2,))
    assert float(bound.prefix("1")) == pytest.approx(4)
    assert float(bound.lipschitz()) == pytest.approx(8)
    assert bound.per_output().value.tolist() == pytest.approx([4, 8, 4])
    root5 = 5**0.5
    expected = torch.tensor([[0, root5, 0], [root5, 0, root5], [0, root5, 0]])
    torch.testing.assert_close(bound().dense()[0], 4 * expected)


def test_sums_add_and_concatenations_add_squares():
    def net(forward):
        return bound_of(Fn(forward), (3,))

    add = net(lambda s, x: (3 * x).relu() + (4 * x).relu())
    assert float(add.lipschitz()) == pytest.approx(7)
    cat = net(lambda s, x: torch.cat([(3 * x).relu(), (4 * x).relu()], 1))
    assert float(cat.lipschitz()) == pytest.approx(5)


def test_scaling_a_layer_scales_everything():
    net, bound = (b := built("mlp")).graph.model, b
    before = bound().dense()
    with torch.no_grad():
        net[2].weight.mul_(-3)
        net[2].bias.mul_(7)
    torch.testing.assert_close(bound().dense(), 3 * before)


def test_hidden_units_have_no_order():
    bound = built("mlp")
    net, before = bound.graph.model, bound().dense()
    order = torch.randperm(10)
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight[order])
        net[2].weight.copy_(net[2].weight[:, order])
    torch.testing.assert_close(bound().dense(), before)


def test_equal_classes_cannot_be_confused():
    bound = built("mlp")
    with torch.no_grad():
        bound.graph.model[4].weight[2] = bound.graph.model[4].weight[0] * 1
    K = bound().dense()[0]
    assert K[0, 2] == K[2, 0] == 0
    torch.testing.assert_close(K[0, 1], K[2, 1])


@pytest.mark.parametrize("norm", [*NORMS, lc.PowerIteration(3)], ids=str)
def test_zero_weights_give_zero(norm):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    for layer in (net[2], net[0]):
        with torch.no_grad():
            layer.weight.zero_()
        assert (bound_of(net, (4,), norm)().dense() == 0).all()


# ---------------------------------------------------------------- tails


def test_an_affine_tail_counts_by_its_rows():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.BatchNorm1d(3)).eval()
    nn.init.normal_(net[3].weight)
    bound = bound_of(net, (4,))
    rows = net[3].weight[:, None] / (1 + net[3].eps) ** 0.5 * net[2].weight
    expected = bound.prefix("1").value * (rows[:, None] - rows).norm(dim=2)
    torch.testing.assert_close(bound().dense()[0], expected)


def test_a_convolutional_tail_counts_by_its_rows():
    bound = built("unet")
    source = bound.graph.output.inputs[0]
    head = jacobians(Net(lambda: bound.graph.model.head, ()).make(), torch.randn(1, *source.shape))
    rows = head.reshape(3, 8, -1).mean(1)
    expected = bound.prefix(source).value * (rows[:, None] - rows).norm(dim=2)
    torch.testing.assert_close(bound().dense()[0], expected)


def test_a_sum_of_affine_maps_is_a_tail_too():
    """Also when it was added up in several steps: each part counts by its own rows."""
    bound = built("branches")
    net = bound.graph.model
    lengths = [bound.prefix(name).value for name in ("gelu", "sigmoid", "elu")]
    weights = [net.heads[0].weight, net.heads[1].weight, 2 * net.heads[2].weight]
    pairs = zip(lengths, weights, strict=True)
    expected = sum(k * (w[:, None] - w).norm(dim=2) for k, w in pairs)
    torch.testing.assert_close(bound().dense()[0], expected)
    pairs = zip(lengths, weights, strict=True)
    torch.testing.assert_close(bound.per_output().value, sum(k * w.norm(dim=1) for k, w in pairs))


def test_other_tails_count_by_the_root_of_two():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    bound = bound_of(net, (4,))
    total = bound.lipschitz().value
    torch.testing.assert_close(total, torch.linalg.matrix_norm(net[0].weight, 2))
    torch.testing.assert_close(bound().dense()[0], 2**0.5 * total * (1 - torch.eye(3)))
    torch.testing.assert_close(bound.per_output().value, total.expand(3))


def test_a_tail_of_both_kinds_adds_both():
    net = Fn(lambda s, x: s.layer(x.sin()) + (2 * x).tanh())
    net.layer = nn.Linear(3, 3)
    rows = net.layer.weight
    expected = (rows[:, None] - rows).norm(dim=2) + 2 * 2**0.5 * (1 - torch.eye(3))
    torch.testing.assert_close(bound_of(net, (3,))().dense()[0], expected)


def test_one_logit_or_a_map_has_no_margins():
    for net in (nn.Linear(4, 1), nn.Unflatten(1, (2, 2))):
        bound = bound_of(nn.Sequential(net), (4,))
        with pytest.raises(lc.LipcertError, match="one logit a class, and at least two"):
            bound()
        assert float(bound.lipschitz()) > 0


# ---------------------------------------------------------------- constants


@pytest.mark.parametrize("name", ["mlp", "branches", "resnet", "parametrized"])
def test_rows_are_those_of_the_table(name):
    constants = built(name)()
    K = constants.dense()
    for labels in ([0], [2, 0], [1, 1, 2, 0, 2, 1, 0]):
        row = constants.row(torch.tensor(labels))
        torch.testing.assert_close(row, K[0, labels])
    assert (K.diagonal(dim1=1, dim2=2) == 0).all()
    torch.testing.assert_close(K, K.mT)
    assert constants.classes == 3
    assert constants.batch is None
    assert constants.valid_radius == math.inf


def test_rows_of_many_classes_need_no_table():
    net = nn.Linear(3, 20_000)
    row = bound_of(nn.Sequential(net), (3,))().row(torch.tensor([7, 19_999]))
    assert row.shape == (2, 20_000)
    torch.testing.assert_close(row[1, 7], (net.weight[7] - net.weight[-1]).norm())


def test_nearby_rows_are_told_apart():
    """Through W W^T their distance would drown in rounding."""
    net = nn.Linear(50, 40)
    with torch.no_grad():
        net.weight.copy_(1e4 + 1e-6 * torch.randn(40, 50))
    rows = net.weight.detach()
    K = bound_of(nn.Sequential(net), (50,))().dense()[0]
    torch.testing.assert_close(K, (rows[:, None] - rows).norm(dim=2), rtol=1e-9, atol=0)


def test_the_batch_is_not_looked_at():
    bound = built("mlp")
    assert not bound.local
    assert torch.equal(bound(torch.randn(5, 6)).dense(), bound().dense())


# ---------------------------------------------------------------- what it claims


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_kinds_are_those_of_the_strategy(norm):
    bound = built("mlp", norm)
    assert {bound().kind, bound.lipschitz().kind, bound.per_output().kind} == {lc.Kind.UPPER}
    assert bound().failure == bound.lipschitz().failure == 0


def test_failures_add_up_over_the_norms_used():
    """Wide layers, so that Lanczos does not fall back on an exact norm."""
    net = nn.Sequential(
        nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 3)
    )
    bound = bound_of(net, (30,), lc.Lanczos(1e-6, steps=10))
    K, total, rows = bound(), bound.lipschitz(), bound.per_output()
    assert {K.kind, total.kind, rows.kind} == {lc.Kind.PROBABILISTIC}
    assert K.failure == pytest.approx(2e-6)  # the last layer counts by its rows
    assert rows.failure == pytest.approx(2e-6)
    assert total.failure == pytest.approx(2e-6)  # its small side is 3: exact
    assert bound.prefix("1").failure == pytest.approx(1e-6)
    failures = [layer.prefix.failure for layer in bound.layers()]
    assert failures == pytest.approx([0, 1e-6, 1e-6, 2e-6, 2e-6, 2e-6])
    assert bound.prefix("input").failure == 0
    assert bound_of(net, (30,), lc.Lanczos(1e-3, 10)).lipschitz().failure == pytest.approx(2e-3)
    assert bound_of(net, (30,), lc.Lanczos(0.9, 10)).lipschitz().failure == 1


def test_failures_of_a_shared_layer_count_once():
    net = Fn(lambda s, x: (lambda y: s.b(y).relu() + y)(s.a(x).relu()))
    net.a, net.b = nn.Linear(30, 30), nn.Linear(30, 30)
    assert bound_of(net, (30,), lc.Lanczos(1e-6, 10)).lipschitz().failure == pytest.approx(2e-6)


def test_one_estimate_makes_an_estimate():
    bound = built("branches", lc.PowerIteration(2))
    assert {bound().kind, bound.lipschitz().kind, bound.per_output().kind} == {lc.Kind.ESTIMATE}
    assert bound.prefix("input").kind is lc.Kind.UPPER
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    last = bound_of(net, (3,), lc.PowerIteration(2))
    assert last.prefix("0").kind is lc.Kind.ESTIMATE
    assert bound_of(net[1:], (3,), lc.PowerIteration(2))().kind is lc.Kind.UPPER  # exact rows


def test_the_kind_of_a_rule_is_kept(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    net = Fn(lambda s, x: s.layer(torch.logcumsumexp(x, dim=1)))
    net.layer = nn.Linear(3, 3)
    lc.rule(torch.logcumsumexp)(
        lambda x, dim: Lipschitz(
            lambda t: torch.logcumsumexp(t, 1),
            x.shape,
            lambda: 3**0.5,
            lambda low, high: (low, high),
            lc.Kind.ESTIMATE,
        )
    )
    bound = bound_of(net, (3,))
    assert bound().kind is lc.Kind.ESTIMATE
    assert float(bound.prefix("logcumsumexp")) == pytest.approx(3**0.5)


# ---------------------------------------------------------------- power iteration


def test_power_iteration_approaches_the_norm_from_below_and_keeps_its_vectors():
    net = NETS["conv"].build()
    graph = lc.trace(net, NETS["conv"].shape)
    exact = lc.Product(graph, lc.Exact())().dense()
    bound = lc.Product(graph, lc.PowerIteration(1))
    steps = torch.stack([bound().dense() for _ in range(300)])
    assert (steps <= exact * UP).all()
    assert (steps.diff(dim=0) >= -1e-12).all()
    torch.testing.assert_close(steps[-1], exact, rtol=1e-4, atol=0)


def test_its_vectors_are_buffers():
    bound = built("conv", lc.PowerIteration(1))
    state = bound.state_dict()
    assert len(state) == len(list(bound.buffers())) == 3
    assert not list(bound.parameters())
    for _ in range(20):
        bound()
    saved = {k: v.clone() for k, v in bound.state_dict().items()}
    value = bound().dense()
    fresh = lc.Product(bound.graph, lc.PowerIteration(1))
    assert not torch.allclose(fresh().dense(), value)
    fresh.load_state_dict(saved)
    torch.testing.assert_close(fresh().dense(), value)
    assert not lc.Product(bound.graph, lc.Exact()).state_dict()


def test_a_call_does_not_change_the_vectors_of_an_earlier_one():
    bound = built("mlp", lc.PowerIteration(1))
    first = bound.lipschitz().value
    bound.lipschitz()
    first.backward()  # raises if a tensor that it needs was overwritten


@pytest.mark.parametrize("norm", [lc.Exact(), lc.PowerIteration(1000)], ids=str)
@pytest.mark.parametrize("name", ["mlp", "conv", "branches", "resnet"])
def test_the_gradient_is_that_of_the_bound(name, norm):
    net = NETS[name].build()
    graph = lc.trace(net, NETS[name].shape)
    bound = lc.Product(graph, norm)
    value = bound().dense()[0, 0, 1:].sum()
    parameters = [p for p in net.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(value, parameters, allow_unused=True)
    directions = [torch.randn_like(p) for p in parameters]
    predicted = sum((g * d).sum() for g, d in zip(slopes, directions, strict=True) if g is not None)

    def moved(step):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(step * d)
            value = lc.Product(graph, lc.Exact())().dense()[0, 0, 1:].sum()
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(step * d)
        return value

    measured = (moved(1e-6) - moved(-1e-6)) / 2e-6
    torch.testing.assert_close(predicted, measured, rtol=1e-4, atol=1e-8)


def test_equal_classes_have_a_finite_gradient():
    bound = built("mlp")
    net = bound.graph.model
    with torch.no_grad():
        net[4].weight[1] = net[4].weight[0]
    bound().dense().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("norm", [lc.Exact(), lc.PowerIteration(1)], ids=str)
def test_autocast_changes_nothing(norm):
    net = NETS["conv"].build().float()
    graph = lc.trace(net, NETS["conv"].shape)
    bound, twin = (lc.Product(graph, norm) for _ in range(2))
    double = lc.Product(lc.trace(NETS["conv"].build(), NETS["conv"].shape), norm)
    for other in (twin, double):
        other.load_state_dict(bound.state_dict())
    plain = bound().dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = twin().dense()
        assert twin.lipschitz().value.dtype == torch.float64
    assert torch.equal(plain, mixed)
    torch.testing.assert_close(plain, double().dense(), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- one-liners


def test_the_norm_of_a_layer_is_that_of_the_operator():
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    jacobian = jacobians(conv, torch.randn(1, 3, 6, 6))[0]
    exact = lc.spectral_norm(conv, (3, 6, 6), lc.Exact())
    torch.testing.assert_close(exact.value, torch.linalg.matrix_norm(jacobian, 2))
    assert exact.kind is lc.Kind.UPPER
    assert float(lc.spectral_norm(conv, (3, 6, 6), lc.Fourier())) >= float(exact)
    estimate = lc.spectral_norm(conv, (3, 6, 6), lc.PowerIteration(1))
    assert estimate.kind is lc.Kind.ESTIMATE
    assert float(estimate) < float(exact)
    exact.value.backward()
    assert conv.weight.grad.abs().max() > 0


def test_the_norm_of_other_modules_is_refused():
    with pytest.raises(lc.LipcertError, match="Sequential holds other nodes.*Slope.*lc.lipschitz"):
        lc.spectral_norm(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (3,))
    assert float(lc.spectral_norm(nn.Identity(), (3,))) == 1


def test_the_constant_of_a_network():
    net = NETS["mlp"].build()
    graph = lc.trace(net, (6,))
    each = [float(b(graph).lipschitz()) for b in (lc.Product, lc.LipLT, lc.Ellipsoid)]
    assert float(lc.lipschitz(net, (6,))) == min(each)
    assert lc.lipschitz(net, (6,), lc.PowerIteration(5)).kind is lc.Kind.ESTIMATE
    net[0].weight.data[0, 0] = float("nan")
    with pytest.raises(lc.LipcertError, match="NaN or infinite weights in: 0.weight"):
        lc.lipschitz(net, (6,))


# ---------------------------------------------------------------- reference numbers


def mnist_net():
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(288, 100), nn.ReLU(), nn.Linear(100, 10)),
    )
    for place, name in ((0, "conv1"), (2, "conv2"), (5, "fc1"), (7, "fc2")):
        net[place].weight.data = torch.tensor(GOLDEN[f"{name}_W_f32"]).double()
        net[place].bias.data = torch.tensor(GOLDEN[f"{name}_b_f32"]).double()
    return net


def test_the_reference_network():
    net = mnist_net()
    x = torch.tensor(GOLDEN["X_f32"]).double()
    bound = bound_of(net, (1, 12, 12), lc.Exact())
    gains = [
        float(r.gain) for r in bound.layers() if r.gain is not None and r.node.name not in "136"
    ]
    expected = [*GOLDEN["sigmas"], float(GOLDEN["sigma_last"])]
    assert gains == pytest.approx(expected, rel=1e-10)
    certificate = lc.certify(net, x, bound=bound)
    np.testing.assert_allclose(net(x).detach().numpy(), GOLDEN["logits"], rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(certificate.prediction.numpy(), GOLDEN["pred"])
    np.testing.assert_allclose(
        certificate.radius.numpy(), GOLDEN["radius_pairwise"], rtol=1e-10, atol=1e-14
    )
    by_total = lc.MarginConstants(
        lambda labels: math.sqrt(2) * bound.lipschitz().value.detach().expand(len(labels), 10),
        10,
        lc.Kind.UPPER,
    )
    with torch.no_grad():
        radius = lc.certificate.from_logits(net(x), by_total).radius
    np.testing.assert_allclose(radius.numpy(), GOLDEN["radius_sqrt2"], rtol=1e-10, atol=1e-14)
