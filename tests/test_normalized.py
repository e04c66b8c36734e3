"""Networks divided by their LipLT bound: the constant is what was asked for, whatever happens."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import lipcert as lc
from nets import NETS
from oracles import best_quotients, differences, jacobians
from rule_cases import Fn
from test_api import jaxtyping_off

UP = 1 + 1e-9  # float64 rounding of the norms
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def mlp(bias=True):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 5, bias=bias), nn.ReLU(), nn.Linear(5, 4, bias=bias), nn.Tanh(),
        nn.Linear(4, 3, bias=bias),
    )  # fmt: skip


def constant(net, shape, norm=None):
    """The true LipLT constant of a network, traced anew."""
    return lc.LipLT(lc.trace(net, shape), norm).lipschitz().value.detach()


def block(skip=None, activation=nn.ReLU, gamma=1.0):
    return lc.normalized_block(nn.Linear(4, 6), nn.Linear(6, 4), skip, activation, gamma)


def settled(module, x, calls=25):
    """The module after so many calls that its estimate has no error left."""
    mode = module.training
    module.train()
    for _ in range(calls):
        module(x)
    return module.train(mode)


# ---------------------------------------------------------------- the constant


@pytest.mark.parametrize("gamma", [0.3, 1.0, 25])
@pytest.mark.parametrize("name", ["linear", "mlp", "conv", "pools", "resnet", "densenet", "unet"])
def test_gamma_is_a_lipschitz_constant(name, gamma):
    shape = NETS[name].shape
    net = lc.LipLTNormalized(NETS[name].build(), gamma).eval()
    quotients = best_quotients(net, shape, pairs=40, steps=4)
    assert quotients.norm(dim=1).max() <= UP * gamma
    steepest = torch.linalg.matrix_norm(jacobians(net, torch.randn(40, *shape)), 2).max()
    assert steepest <= UP * gamma
    if name == "linear":
        assert steepest == pytest.approx(gamma)


@pytest.mark.parametrize("name", [name for name in NETS if name != "zero weights"])
def test_the_bound_of_the_scaled_network_is_gamma(name):
    shape = NETS[name].shape
    net = NETS[name].build()
    scaled = lc.LipLTNormalized(net, 2.5, shape).eval()
    x = torch.randn(5, *shape)
    torch.testing.assert_close(scaled(x), net(x) * 2.5 / constant(net, shape, lc.Exact()))
    assert float(constant(nn.Sequential(scaled), shape)) == pytest.approx(2.5)


def test_the_scale_of_a_weight_does_not_matter():
    net = lc.LipLTNormalized(mlp(bias=False), 2).eval()
    net.net[3] = nn.LeakyReLU(0.2)
    x = torch.randn(6, 4)
    before = net(x).detach()
    for place, factor in ((0, 7), (2, 0.01), (4, 1e3)):
        with torch.no_grad():
            net.net[place].weight.mul_(factor)
        torch.testing.assert_close(net(x), before)


@MODES
@pytest.mark.parametrize("net", [nn.ReLU(), nn.Sequential(), nn.Flatten()], ids=str)
def test_networks_without_weights(net, training):
    x = torch.randn(3, 4)
    scaled = lc.LipLTNormalized(nn.Sequential(net), 3).train(training)
    torch.testing.assert_close(scaled(x), 3 * net(x))


@MODES
def test_networks_of_zeros_give_zeros(training):
    for dead in ((0, 2, 4), (0,), (4,)):
        net = mlp(bias=False)
        for place in dead:
            nn.init.zeros_(net[place].weight)
        scaled = lc.LipLTNormalized(net).train(training)
        y = scaled(torch.randn(3, 4))
        assert (y == 0).all()
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())


# ---------------------------------------------------------------- training


def test_the_estimate_approaches_the_true_factor_from_above():
    net = mlp()
    scaled = lc.LipLTNormalized(net, 2, (4,)).train()
    x = torch.randn(5, 4)
    factors = torch.stack([(scaled(x) / net(x)).mean() for _ in range(40)]).detach()
    true = 2 / constant(net, (4,))
    assert factors[0] > 1.001 * true
    assert (factors.diff() <= 1e-9).all()
    torch.testing.assert_close(factors[-1], true)


@MODES
def test_gradients_are_those_of_the_quotient(training):
    """Along random directions, against differences of gamma f(x) / L with L from singular values.

    In eval mode the value is exact and the gradient that of the estimate.
    """
    net, x, aim = mlp(), torch.randn(5, 4), torch.randn(5, 3)
    scaled = settled(lc.LipLTNormalized(net, 3), x).train(training)
    slopes = torch.autograd.grad((scaled(x) * aim).sum(), list(net.parameters()))
    weights = list(net.parameters())

    def moved(directions, step):
        with torch.no_grad():
            for w, d in zip(weights, directions, strict=True):
                w.add_(step * d)
            value = (3 * net(x) * aim).sum() / constant(net, (4,), lc.Exact())
            for w, d in zip(weights, directions, strict=True):
                w.sub_(step * d)
        return value

    for _ in range(4):
        directions = [torch.randn_like(w) for w in weights]
        expected = (moved(directions, 1e-6) - moved(directions, -1e-6)) / 2e-6
        predicted = sum((s * d).sum() for s, d in zip(slopes, directions, strict=True))
        torch.testing.assert_close(predicted, expected, rtol=1e-6, atol=1e-8)


@MODES
def test_no_gradient_in_the_scale_of_a_weight(training):
    net = mlp(bias=False)
    net[3] = nn.ReLU()
    (lc.LipLTNormalized(net).train(training)(torch.randn(5, 4)) ** 2).sum().backward()
    for layer in (net[0], net[2], net[4]):
        assert layer.weight.grad.norm() > 1e-3
        assert abs((layer.weight.grad * layer.weight).sum()) < 1e-12


# ---------------------------------------------------------------- changes of the weights


def step(net):
    optimiser = torch.optim.SGD(net.parameters(), 1.0)
    net(torch.randn(5, 4)).square().sum().backward()
    optimiser.step()


def write_data(net):
    net.net[0].weight.data.mul_(5)


def set_data(net):
    net.net[0].weight.data = 5 * net.net[0].weight.data


def set_parameter(net):
    net.net[0].weight = nn.Parameter(5 * net.net[0].weight.detach())


def load(net):
    state = net.state_dict()
    net.load_state_dict({k: 5 * v if k.endswith("weight") else v for k, v in state.items()})


def statistics(net):
    net.net[5].running_var.mul_(1 / 25)


@pytest.mark.parametrize("change", [step, write_data, set_data, set_parameter, load, statistics])
def test_every_change_of_the_weights_is_noticed(change):
    net = lc.LipLTNormalized(mlp().append(nn.BatchNorm1d(3)), 2).eval()
    x = torch.randn(5, 4)
    net(x)
    before = constant(net.net, (4,))
    change(net)
    after = constant(net.net, (4,))
    assert abs(after / before - 1) > 0.01
    torch.testing.assert_close(net(x), net.net(x) * 2 / after)
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.net(x) * 2 / after)


def test_unchanged_weights_cost_nothing(monkeypatch):
    net = lc.LipLTNormalized(mlp()).eval()
    x = torch.randn(2, 4)
    expected = net(x).detach()
    monkeypatch.delattr("lipcert.normalized.LipLT")
    with torch.no_grad():
        assert torch.equal(net(x), expected)
        net.net[0].weight.mul_(2)
        with pytest.raises(NameError):
            net(x)


@pytest.mark.parametrize("called", [True, False], ids=["called", "never called"])
@pytest.mark.parametrize("source_called", [True, False], ids=["from called", "from never called"])
def test_states_load_into_any_instance(called, source_called):
    x = torch.randn(4, 4)
    source, target = (nn.Sequential(lc.LipLTNormalized(mlp(), 2)).eval() for _ in range(2))
    with torch.no_grad():
        source[0].net[2].weight.mul_(-3)
    if source_called:
        settled(source, x)
    if called:
        settled(target, x, calls=2)
    state = source.state_dict()
    keys = set(state)
    target.load_state_dict(state)
    assert set(state) == keys
    torch.testing.assert_close(target(x), source(x))
    if called and source_called:  # the vectors too: the estimate goes on where it was
        torch.testing.assert_close(target.train()(x), source.train()(x), rtol=1e-12, atol=0)


def pickled(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("called", [True, False], ids=["called", "never called"])
def test_copies_stand_alone(copied, called):
    x = torch.randn(4, 4)
    net = nn.Sequential(lc.LipLTNormalized(mlp(), 2)).eval()
    if called:
        settled(net, x)(x)
    twin = copied(net)
    assert not twin.training
    assert twin.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(twin(x), net(x))
    if called:
        torch.testing.assert_close(twin.train()(x), net.train()(x), rtol=1e-12, atol=0)
        twin.eval()
        net.eval()
    before = net(x).detach()
    with torch.no_grad():
        twin[0].net[0].weight.mul_(10)
    assert torch.equal(net(x), before)
    assert float(constant(twin, (4,))) == pytest.approx(2)
    torch.testing.assert_close(twin(x), twin[0].net(x) * 2 / constant(twin[0].net, (4,)))
    twin(x).sum().backward()
    assert net[0].net[0].weight.grad is None


@MODES
@pytest.mark.parametrize("called", [True, False], ids=["called", "never called"])
def test_the_precision_can_change(training, called):
    net = lc.LipLTNormalized(mlp(), 2).train(training)
    x = torch.randn(4, 4)
    if called:
        net(x)
    for dtype in (torch.float32, torch.float64):
        net.to(dtype)
        y = net(x.to(dtype))
        assert y.dtype == net.factor.dtype == dtype
        y.sum().backward()
        assert net.net[0].weight.grad.dtype == dtype
        settled(net, x.to(dtype), calls=12)
        expected = net.net(x.to(dtype)) * 2 / constant(net.net, (4,)).to(dtype)
        torch.testing.assert_close(net(x.to(dtype)), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- as a part of a network


def blocks(head=True):
    torch.manual_seed(1)
    parts = [block(gamma=0.5), block(nn.Linear(4, 4), nn.Tanh, gamma=1.5)]
    return nn.Sequential(*parts, *([nn.Linear(4, 3)] if head else [])).eval()


def test_networks_of_several_blocks():
    net = blocks()
    graph = lc.trace(net, (4,))
    x = torch.randn(50, 4)
    torch.testing.assert_close(graph.values(x)[graph.output], net(x))
    head = torch.linalg.matrix_norm(net[2].weight.detach(), 2)
    bound, product = lc.LipLT(graph), lc.Product(graph)
    assert bound.lipschitz().kind is lc.Kind.UPPER
    assert bound.lipschitz().value < 0.5 * 1.5 * head < product.lipschitz().value
    seen = differences(best_quotients(net, (4,), pairs=50, steps=4))
    assert (seen <= UP * bound().dense()[0] + 1e-12).all()
    certificate = lc.certify(net, x, bound=bound)
    assert (certificate.radius > 0).all()
    steps = torch.randn(30, *x.shape)
    steps = steps / steps.norm(dim=2, keepdim=True) * certificate.radius[:, None] * (1 - 1e-9)
    with torch.no_grad():
        for step in steps:
            assert (net(x + step).argmax(1) == certificate.prediction).all()
    assert (certificate.radius >= lc.certify(net, x, bound=product).radius).all()


def test_bounds_follow_the_weights():
    net = blocks()
    bound = lc.LipLT(lc.trace(net, (4,)))
    before = bound().dense()
    with torch.no_grad():
        net[0].net.inner.weight.mul_(3)
        net[1].net.skip.weight.data.add_(1)
    torch.testing.assert_close(bound().dense(), lc.LipLT(lc.trace(net, (4,)))().dense())
    assert (bound().dense() - before).abs().max() > 0.01


def test_blocks_in_blocks():
    x = torch.randn(4, 4)
    net = lc.LipLTNormalized(blocks(), 2)
    for mode in (True, False):
        net.train(mode)(x).sum().backward()
    assert float(constant(net, (4,))) == pytest.approx(2)
    with torch.no_grad():
        net.net[0].net.out.weight.mul_(4)
    torch.testing.assert_close(net(x), net.net(x) * 2 / constant(net.net, (4,)))


def test_a_module_used_twice():
    net = Fn(lambda s, x: s.block(s.block(x)) - x)
    net.block = block(gamma=0.9)
    net.eval()
    graph = lc.trace(net, (4,))
    x = torch.randn(5, 4)
    torch.testing.assert_close(graph.values(x)[graph.output], net(x))
    assert lc.LipLT(graph).lipschitz().value <= 0.81 + 1


def test_gradients_of_an_outer_bound():
    net = blocks()
    for part in net[:2]:
        settled(part, torch.randn(2, 4))
    bound = lc.LipLT(lc.trace(net, (4,)), lc.Exact())
    weights = list(net.parameters())
    slopes = torch.autograd.grad(bound().dense()[0, 0, 1:].sum(), weights, allow_unused=True)
    directions = [torch.randn_like(w) for w in weights]
    predicted = sum((s * d).sum() for s, d in zip(slopes, directions, strict=True) if s is not None)

    def moved(step):
        with torch.no_grad():
            for w, d in zip(weights, directions, strict=True):
                w.add_(step * d)
            value = bound().dense()[0, 0, 1:].sum()
            for w, d in zip(weights, directions, strict=True):
                w.sub_(step * d)
        return value

    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    torch.testing.assert_close(predicted, expected, rtol=1e-5, atol=1e-8)


def test_the_bound_of_a_normalised_network_has_no_slope():
    """It is gamma for all weights."""
    net = settled(lc.LipLTNormalized(mlp(), 2), torch.randn(2, 4)).eval()
    bound = lc.LipLT(lc.trace(nn.Sequential(net), (4,)), lc.Exact()).lipschitz().value
    assert float(bound.detach()) == pytest.approx(2)
    slopes = torch.autograd.grad(bound, [net.net[i].weight for i in (0, 2, 4)])
    assert all(s.abs().max() < 1e-6 for s in slopes)


# ---------------------------------------------------------------- the block


SLOPES = {
    "relu": (nn.ReLU, 0, 1),
    "tanh": (nn.Tanh, 0, 1),
    "identity": (nn.Identity, 1, 1),
    "leaky relu": (lambda: nn.LeakyReLU(0.1), 0.1, 1),
    "abs-like": (lambda: nn.LeakyReLU(-0.5), -0.5, 1),
    "elu": (lambda: nn.ELU(2.0), 0, 2),
    "sigmoid": (nn.Sigmoid, 0, 0.25),
}


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("skip", [True, False], ids=["H", "identity"])
def test_the_block_is_divided_by_its_formula(name, skip):
    activation, low, high = SLOPES[name]
    module = block(nn.Linear(4, 4) if skip else None, activation, gamma=1.7).eval()
    W, G = module.net.inner.weight, module.net.out.weight
    H = module.net.skip.weight if skip else torch.eye(4)
    norms = [torch.linalg.matrix_norm(m, 2) for m in (H + (low + high) / 2 * G @ W, G, W)]
    divisor = norms[0] + (high - low) / 2 * norms[1] * norms[2]
    x = torch.randn(5, 4)
    out = module.net.skip(x) + module.net.out(activation()(module.net.inner(x)))
    torch.testing.assert_close(module(x), 1.7 * out / divisor)


def test_a_block_of_convolutions():
    conv = nn.Conv2d(2, 3, 3, padding=1)
    module = lc.normalized_block(conv, nn.Conv2d(3, 2, 3, padding=1)).eval()
    x = torch.randn(4, 2, 5, 5)
    steepest = torch.linalg.matrix_norm(jacobians(module, x), 2).max()
    assert module(x).shape == x.shape
    assert 0.2 < steepest <= UP


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("gamma", [0, -1.0, math.nan, math.inf])
def test_gamma_must_be_positive_and_finite(gamma):
    with pytest.raises(lc.LipcertError, match=f"gamma={gamma}.*positive finite"):
        lc.LipLTNormalized(mlp(), gamma)


@pytest.mark.parametrize("early", [True, False])
def test_ops_without_a_rule_are_named(early):
    net = nn.Sequential(nn.Linear(4, 4), nn.Softmin(1), nn.Linear(4, 3))
    with pytest.raises(lc.LipcertError, match="Softmin"):
        lc.LipLTNormalized(net, input_shape=(4,) if early else None)(torch.randn(2, 4))


def test_inputs_of_another_shape_are_refused():
    net = lc.LipLTNormalized(nn.Conv2d(1, 1, 3, padding=1), input_shape=(1, 3, 3)).eval()
    with pytest.raises(lc.LipcertError, match=r"\(1, 9, 9\).*\(1, 3, 3\).*one module for each"):
        net(torch.randn(2, 1, 9, 9))
    with jaxtyping_off(), pytest.raises(lc.LipcertError, match=r"\(1, 9, 9\).*\(1, 3, 3\)"):
        lc.trace(nn.Sequential(nn.Upsample(scale_factor=3), net), (1, 3, 3))


def test_layers_replaced_after_the_first_call_are_noticed():
    net = lc.LipLTNormalized(mlp(), input_shape=(4,)).eval()
    net.net[2] = nn.Linear(5, 4)
    with pytest.raises(lc.LipcertError, match="changed after it was traced, at: 2"):
        net(torch.randn(2, 4))


def test_it_prints_its_constant():
    assert "gamma=0.5" in repr(lc.LipLTNormalized(mlp(), 0.5))
