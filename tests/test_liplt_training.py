"""LipLT in training: the vectors it keeps, its gradients, and what it refuses."""

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.layers import Normalize
from nets import NETS
from rule_cases import Fn
from test_api import jaxtyping_off

each_kept = pytest.mark.parametrize("norm", [lc.PowerIteration(1), lc.LOBPCG(1)], ids=str)


def built(name, norm=None, joint=False):
    return lc.LipLT(lc.trace(NETS[name].build(), NETS[name].shape), norm, joint)


# ---------------------------------------------------------------- vectors


@each_kept
def test_the_vectors_are_buffers_one_a_map(norm):
    bound = built("branches", norm)
    state = bound.state_dict()
    assert state.keys() == dict(bound.named_buffers()).keys()
    assert all(name.startswith("vectors_") for name in state)
    assert not list(bound.parameters())
    places = {f"vectors_{place}": n for place, n in enumerate(bound.graph)}
    for name, rows in state.items():
        assert rows.shape[1:] == (norm.kept, *places[name].shape)
        torch.testing.assert_close(rows.flatten(2).norm(dim=2), torch.ones(rows.shape[:2]))
    assert not built("branches", lc.Exact()).state_dict()


@each_kept
@pytest.mark.parametrize("name", ["conv", "densenet", "branches"])
def test_saved_vectors_go_on_where_they_were(name, norm, tmp_path):
    bound = built(name, norm)
    for _ in range(5):
        bound()
    torch.save(bound.state_dict(), tmp_path / "state.pt")
    value, total = bound().dense(), bound.lipschitz().value
    fresh = lc.LipLT(bound.graph, norm)
    assert not torch.allclose(fresh().dense(), value)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(fresh().dense(), value)
    assert torch.equal(fresh.lipschitz().value, total)


@pytest.mark.parametrize("name", ["conv", "unet"])
def test_values_rise_to_the_exact_ones_from_call_to_call(name):
    bound = built(name, lc.PowerIteration(1))
    shapes = {k: v.shape for k, v in bound.state_dict().items()}
    exact = lc.LipLT(bound.graph, lc.Exact())
    K, total = exact().dense(), exact.lipschitz().value
    pairs, totals = [], []
    with torch.no_grad():
        for _ in range(40):  # one after the other: they share the vectors of all but the output
            pairs.append(bound().dense())
            totals.append(bound.lipschitz().value)
        assert {k: v.shape for k, v in bound.state_dict().items()} == shapes
    assert (torch.stack(pairs).diff(dim=0) >= -1e-12).all()
    assert (torch.stack(totals).diff() >= -1e-12).all()
    assert (pairs[-1] <= K * (1 + 1e-9)).all()
    assert totals[-1] <= total * (1 + 1e-9)
    torch.testing.assert_close(pairs[-1], K, rtol=0.01, atol=0)
    torch.testing.assert_close(totals[-1], total, rtol=0.01, atol=0)


@each_kept
def test_a_call_does_not_change_the_vectors_of_an_earlier_one(norm):
    bound = built("densenet", norm)
    for use in (bound.lipschitz, bound.per_output):
        first = use().value.sum()
        bound()
        bound.lipschitz()
        first.backward()  # raises if a tensor that it needs was overwritten
    assert not any(rows.requires_grad for rows in bound.buffers())


@each_kept
def test_single_precision(norm):
    bound = built("conv", norm)
    twin = built("conv", norm)
    twin.graph.model.float()
    twin.load_state_dict(bound.state_dict())
    twin.to(torch.float32)
    assert {rows.dtype for rows in twin.buffers()} == {torch.float32}
    for _ in range(3):
        expected, found = bound().dense(), twin().dense()
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert {rows.dtype for rows in twin.buffers()} == {torch.float32}
    assert float(twin.lipschitz()) == pytest.approx(float(bound.lipschitz()), rel=1e-4)


@pytest.mark.parametrize("norm", [lc.Exact(), lc.PowerIteration(1), lc.LOBPCG(1)], ids=str)
def test_autocast_changes_nothing(norm):
    net = NETS["conv"].build().float()
    graph = lc.trace(net, NETS["conv"].shape)
    bound, twin = (lc.LipLT(graph, norm) for _ in range(2))
    twin.load_state_dict(bound.state_dict())
    plain = bound().dense(), bound.lipschitz().value, bound.per_output().value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = twin().dense(), twin.lipschitz().value, twin.per_output().value
    for a, b in zip(plain, mixed, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "norm", [lc.Exact(), lc.PowerIteration(300), lc.LOBPCG(60)], ids=lambda n: type(n).__name__
)
@pytest.mark.parametrize("name", ["mlp", "conv", "resnet", "branches"])
def test_the_gradient_is_that_of_the_bound(name, norm):
    """In a random direction of all weights together, slopes and BatchNorm's among them."""
    graph = lc.trace(NETS[name].build(), NETS[name].shape)
    parameters = [p for p in graph.model.parameters() if p.requires_grad]

    def value(norm):
        return lc.LipLT(graph, norm)().dense()[0, 0, 1:].sum()

    slopes = torch.autograd.grad(value(norm), parameters, allow_unused=True)
    directions = [torch.randn_like(p) for p in parameters]
    predicted = sum((g * d).sum() for g, d in zip(slopes, directions, strict=True) if g is not None)
    ends = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, d in zip(parameters, directions, strict=True):
                p.add_(step * d)
            ends.append(value(lc.Exact()))
    measured = (ends[0] - ends[1]) / 2e-6
    torch.testing.assert_close(predicted, measured, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("output", ["pairs", "lipschitz", "per_output"])
def test_gradcheck_of_every_output(output):
    net = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4, 0.3), nn.Linear(4, 3), nn.Tanh())
    bound = lc.LipLT(lc.trace(net, (3,)), lc.Exact())
    weight, slopes = (p.detach().requires_grad_() for p in (net[0].weight, net[1].weight))

    def function(weight, slopes):
        del net[0].weight, net[1].weight
        net[0].weight, net[1].weight = weight, slopes
        return bound().dense() if output == "pairs" else getattr(bound, output)().value

    assert torch.autograd.gradcheck(function, (weight, slopes))


@pytest.mark.parametrize(
    ("norm", "joint"), [(lc.Exact(), False), (lc.Exact(), True), (lc.PowerIteration(2), False)]
)
def test_everything_that_matters_gets_a_gradient(norm, joint):
    net = nn.Sequential(
        *(Normalize([0.5, 0.4], [0.2, 0.3]), nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)),
        *(nn.PReLU(3), nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.GELU()),
        *(nn.Flatten(), nn.Linear(48, 3)),
    ).eval()
    bound = lc.LipLT(lc.trace(net, (2, 4, 4)), norm, joint)
    for value in (bound().dense().sum(), bound.lipschitz().value):
        net.zero_grad()
        value.backward()
        for name, p in net.named_parameters():
            if not name.endswith("bias"):
                assert p.grad.isfinite().all(), name
                assert p.grad.abs().max() > 0, name
            else:
                assert p.grad is None or not p.grad.any(), name


@pytest.mark.parametrize("norm", [lc.Exact(), lc.PowerIteration(3), lc.LOBPCG(2)], ids=str)
def test_zero_weights_give_zero(norm):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    for layer in (net[4], net[2], net[0]):
        with torch.no_grad():
            layer.weight.zero_()
        bound = lc.LipLT(lc.trace(net, (4,)), norm)
        for _ in range(2):
            net.zero_grad()
            K, total = bound().dense(), bound.lipschitz().value
            assert not K.any()
            assert total == 0
            (K.sum() + total).backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
            assert all(rows.isfinite().all() for rows in bound.buffers())


# ---------------------------------------------------------------- what it refuses


@each_kept
def test_the_joint_norm_keeps_no_vectors(norm):
    with pytest.raises(lc.LipcertError, match="joint=True needs.*norm=lc.Auto.*joint=False"):
        built("mlp", norm, joint=True)


@pytest.mark.parametrize("norm", [lc.Auto, "auto", 3])
def test_a_norm_is_a_value(norm):
    with jaxtyping_off(), pytest.raises(lc.LipcertError, match="no strategy; give one as a value"):
        built("mlp", norm)


def test_a_network_is_traced_first():
    with jaxtyping_off(), pytest.raises(lc.LipcertError, match="takes a graph, not a Linear"):
        lc.LipLT(nn.Linear(3, 3))


@pytest.mark.parametrize("norm", [lc.Exact(), lc.PowerIteration(2)], ids=str)
def test_one_logit_or_a_map_has_no_margins(norm):
    for last in (nn.Linear(4, 1), nn.Unflatten(1, (2, 2))):
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), last)
        bound = lc.LipLT(lc.trace(net, (4,)), norm)
        with pytest.raises(lc.LipcertError, match="one logit a class, and at least two"):
            bound()
        assert float(bound.lipschitz()) > 0


def test_the_batch_is_not_looked_at():
    bound = built("mlp")
    assert not bound.local
    constants = bound(torch.randn(5, 6))
    assert torch.equal(constants.dense(), bound().dense())
    assert (constants.batch, constants.classes, constants.valid_radius) == (None, 3, float("inf"))
    rows = constants.row(torch.tensor([2, 0, 2]))
    torch.testing.assert_close(rows, constants.dense()[0, [2, 0, 2]])
    with pytest.raises(lc.LipcertError, match="no node 'nine'"):
        bound.prefix("nine")


def test_a_graph_stays_true_while_its_network_changes():
    bound = built("mlp", lc.Exact())
    before = bound().dense()
    with torch.no_grad():
        bound.graph.model[2].weight.mul_(-3)
        bound.graph.model[4].weight.mul_(0.5)
        bound.graph.model[2].bias.mul_(7)
    torch.testing.assert_close(bound().dense(), 1.5 * before)
    net = Fn(lambda s, x: s.net(x))
    net.net = bound.graph.model
    torch.testing.assert_close(lc.LipLT(lc.trace(net, (6,)))().dense(), 1.5 * before)


@pytest.mark.parametrize("bound", [lc.Product, lc.LipLT])
def test_an_iterated_bound_follows_the_precision_of_its_network(bound):
    net = NETS["mlp"].build()
    estimate = bound(lc.trace(net, NETS["mlp"].shape), lc.LOBPCG(20))
    before = float(estimate.lipschitz())
    for dtype in (torch.float32, torch.float64):
        net.to(dtype)
        assert float(estimate.lipschitz()) == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("bound", [lc.Product, lc.LipLT])
def test_a_bound_notices_that_a_layer_was_replaced(bound):
    net = NETS["mlp"].build()
    constants = bound(lc.trace(net, NETS["mlp"].shape))
    net[0] = torch.nn.Linear(6, 10)
    for evaluate in (constants, constants.lipschitz, constants.per_output):
        with pytest.raises(lc.LipcertError, match="changed after it was traced, at: 0"):
            evaluate()


def test_bounds_and_constants_print_what_they_are():
    bound = lc.LipLT(lc.trace(NETS["mlp"].build(), NETS["mlp"].shape), joint=True)
    assert str(bound) == "LipLT(norm=Auto(), joint=True)"
    assert str(bound.per_output()).startswith("Constant([0.")
