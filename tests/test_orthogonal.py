"""Orthogonal layers and linear residual ones: constants for every weight, gradients, state."""

import copy

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipcert as lc
from lipcert.layers import (
    BatchCentering,
    BjorckConv2d,
    BjorckLinear,
    CholeskyLinear,
    FitChannels,
    L2Pool2d,
    LastLayerNormalized,
    LinearResidualConv2d,
    MaxMin,
    SOCConv2d,
)
from lipcert.layers.bjorck import bjorck
from oracles import jacobians

LAYERS = {
    "bjorck wide": (lambda: BjorckLinear(7, 4), (7,)),
    "bjorck tall": (lambda: BjorckLinear(4, 7, bias=False), (2, 4)),
    "bjorck square": (lambda: BjorckLinear(6, 6), (6,)),
    "cholesky wide": (lambda: CholeskyLinear(7, 4), (7,)),
    "cholesky tall": (lambda: CholeskyLinear(4, 7, bias=False), (4,)),
    "bjorck conv": (lambda: BjorckConv2d(2, 3, 3, padding=1), (2, 4, 5)),
    "bjorck strided": (lambda: BjorckConv2d(2, 5, 3, stride=2, padding=1, bias=False), (2, 5, 6)),
    "bjorck patches": (lambda: BjorckConv2d(2, 8, 2, stride=2), (2, 4, 4)),
    "soc": (lambda: SOCConv2d(3, 3), (3, 4, 3)),
    "soc of size 1": (lambda: SOCConv2d(2, 4, 1, bias=False), (2, 3, 3)),
    "soc strided": (lambda: SOCConv2d(1, 3, 3, stride=2), (1, 4, 4)),
}
WEIGHTS = ("fresh", "trained", "random", "rank one", "zero", "some zero", "huge", "tiny", "tiniest")
each_layer = pytest.mark.parametrize("name", LAYERS)
each_precision = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)


def made(name, weights="random", dtype=torch.float64):
    make, shape = LAYERS[name]
    module = make().to(dtype)
    if weights == "trained":
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(20):
            optimiser.zero_grad()
            module(torch.randn(8, *shape, dtype=dtype)).square().mean().backward()
            optimiser.step()
    elif weights != "fresh":
        with torch.no_grad():
            new = torch.randn_like(module.weight)
            if weights == "rank one":
                new = new.flatten(1)[:1] * torch.randn(len(new), 1, dtype=dtype)
            elif weights == "some zero":
                new[0], new[:, 0] = 0, 0
            new *= {"zero": 0, "huge": 1e15, "tiny": 1e-15, "tiniest": 1e-30}.get(weights, 1)
            module.weight.copy_(new.reshape(module.weight.shape))
            if module.bias is not None:
                module.bias.normal_()
    return module.eval(), shape


def matrix(module, shape):
    """The whole layer as a matrix in float64, from its own forward pass."""
    module = copy.deepcopy(module).double()
    zero = torch.zeros(1, *shape)
    basis = torch.eye(zero.numel()).reshape(-1, *shape)
    return (module(basis) - module(zero)).detach().flatten(1).T


def singular_values(module, shape):
    return torch.linalg.svdvals(matrix(module, shape))


# ---------------------------------------------------------------- laws


@each_layer
@each_precision
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_constant_is_a_bound_whatever_the_weights(name, weights, dtype):
    module, shape = made(name, weights, dtype)
    x = torch.randn(2, *shape, dtype=dtype)
    constant = module.constant()
    assert constant.kind is lc.Kind.UPPER
    assert constant.value.dtype == torch.float64
    assert constant.value.shape == ()
    assert not constant.value.requires_grad
    graph = lc.trace(module, shape)
    slopes = jacobians(module, x).double()
    rounding = 1e-12 if dtype == torch.float64 else 1e-5
    true = torch.linalg.matrix_norm(graph.output.op.map().dense(), 2)
    assert true <= float(constant) + 1e-12
    assert (torch.linalg.matrix_norm(slopes, 2) <= float(constant) + rounding).all()
    assert float(lc.Product(graph).lipschitz()) <= float(constant)
    if "soc" not in name:  # there a stale iteration is told by the constant
        assert float(constant) <= 1 + rounding
    elif weights in ("fresh", "trained", "zero"):
        assert float(constant) <= 1 + 1e-12


@each_layer
@each_precision
@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_are_finite_whatever_the_weights(name, weights, dtype):
    module, shape = made(name, weights, dtype)
    for mode in (True, False):
        module.train(mode)
        module.zero_grad()
        x = torch.randn(2, *shape, dtype=dtype, requires_grad=True)
        module(x).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in (x, *module.parameters()))
        assert all(b.isfinite().all() for b in module.buffers())


@each_layer
@pytest.mark.parametrize("weights", ["random", "huge", "tiny"])
def test_gradients_are_those_of_the_forward_pass(name, weights):
    module, shape = made(name, weights)
    scale = module.weight.detach().abs().max()
    parameters = dict(module.named_parameters())
    x = torch.randn(2, *shape, requires_grad=True)

    def forward(x, weight, *rest):
        named = dict(zip(parameters, (weight * scale, *rest), strict=True))
        return torch.func.functional_call(module, named, (x,))

    start = [p.detach().clone().requires_grad_() for p in parameters.values()]
    start[0] = (start[0].detach() / scale).requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, *start))


@each_layer
@each_precision
@pytest.mark.parametrize("power", [-90, 90])
def test_the_scale_of_the_weight_does_not_matter(name, dtype, power):
    module, shape = made(name, "random", dtype)
    x = torch.randn(2, *shape, dtype=dtype)
    with torch.no_grad():
        before, constant = module(x), float(module.constant())
        module.weight *= 2.0**power
        torch.testing.assert_close(module(x), before)
        assert float(module.constant()) == pytest.approx(constant, rel=1e-5)


@each_layer
@each_precision
def test_copies_and_saved_states_are_the_same_layer(name, dtype):
    module, shape = made(name, "trained", dtype)
    x = torch.randn(2, *shape, dtype=dtype)
    with torch.no_grad():
        expected, constant = module(x), float(module.constant())
        fresh = LAYERS[name][0]().to(dtype).eval()
        fresh(x)
        fresh.constant()
        fresh.load_state_dict(module.state_dict())
        for other in (copy.deepcopy(module), fresh):
            assert torch.equal(other(x), expected)
            assert float(other.constant()) == constant
        assert float((module(x).double() - module.double()(x.double())).abs().max()) < 1e-5
        assert module(x.double()).dtype == torch.float64
        assert float(module.constant()) == pytest.approx(constant, abs=1e-6)


@each_layer
def test_what_is_kept_follows_the_weights_and_is_kept(name):
    module, shape = made(name)
    x = torch.randn(2, *shape)
    with torch.no_grad():
        before = module(x)
        kept = module.kernel() if hasattr(module, "kernel") else module.matrix()
        assert (module.kernel() if hasattr(module, "kernel") else module.matrix()) is kept
        assert module.constant() is module.constant()
        module.weight.add_(torch.randn_like(module.weight))
        assert not torch.allclose(module(x), before)
        again = LAYERS[name][0]().eval()
        again.load_state_dict(module.state_dict())
        assert torch.equal(module(x), again(x))
        assert float(module.constant()) == float(again.constant())
    with torch.inference_mode():
        assert torch.equal(module(x), again(x))
    assert module(x).requires_grad


@each_layer
def test_compiled_layers_are_the_same(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks cannot be compiled
    torch._dynamo.reset()
    module, shape = made(name)
    x = torch.randn(2, *shape)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(compiled(x), module(x))
    module.train()
    other = copy.deepcopy(module)
    if isinstance(module, SOCConv2d):
        module.steps += 1  # compiled, the first step iterates no more often than the others
        other.steps += 1
    torch.testing.assert_close(compiled(x), other(x))
    for buffer, expected in zip(module.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


@each_layer
def test_the_bound_reads_the_layer_as_it_is_when_asked(name):
    module, shape = made(name)
    bound = lc.Product(lc.trace(module, shape))
    with torch.no_grad():
        module.weight.zero_()
    expected = singular_values(module, shape)[0]
    assert float(bound.lipschitz()) == pytest.approx(float(expected), abs=1e-12)


def test_settings_that_cannot_be_are_refused():
    for make, because in (
        (lambda: BjorckLinear(0, 2), "needs positive sizes"),
        (lambda: CholeskyLinear(2, -1), r"CholeskyLinear\(2, -1\): needs positive sizes"),
        (lambda: BjorckLinear(2, 2, steps=0), "at least one step"),
        (lambda: BjorckConv2d(2, 2, 3, steps=0), "at least one step"),
        (lambda: BjorckConv2d(2, 2, 3, stride=0), "needs positive sizes and padding"),
        (lambda: BjorckConv2d(2, 2, 3, padding=-1), "needs positive sizes and padding"),
        (lambda: CholeskyLinear(2, 2, eps=0), "needs a positive number"),
        (lambda: LinearResidualConv2d(2, 3, kernel_size=2), "odd kernel"),
        (lambda: LinearResidualConv2d(2, 0), "needs positive sizes"),
        (lambda: BatchCentering(0), "positive number of channels"),
        (lambda: BatchCentering(2, momentum=0.0), "momentum in"),
    ):
        with pytest.raises(lc.LipcertError, match=because):
            make()


# ---------------------------------------------------------------- Bjorck


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_bjorck_converges_to_the_orthogonal_factor(shape):
    weight = torch.randn(shape)
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(bjorck(weight, 40), u @ vh)
    few = torch.linalg.svdvals(bjorck(weight, 3))
    assert few[0] <= 1 + 1e-12
    assert few[-1] < 0.9  # not there yet, and still a contraction
    assert (torch.linalg.svdvals(bjorck(weight, 4)) >= few - 1e-12).all()


@pytest.mark.parametrize("shape", [(3, 3), (64, 80), (300, 300)])
def test_the_weight_is_divided_by_at_most_twice_its_norm_and_no_less_than_it(shape):
    for weight in (torch.randn(shape), torch.eye(*shape), torch.ones(shape)):
        largest = torch.linalg.matrix_norm(bjorck(weight, 0), 2)
        assert 0.5 < largest <= 1 + 1e-12


def test_bjorck_of_an_orthogonal_matrix_is_that_matrix():
    layer = BjorckLinear(8, 8)
    torch.testing.assert_close(layer.matrix(), layer.weight)
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x).norm(), x.norm())


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 2])
def test_no_cell_is_read_more_often_than_the_factor_says(kernel, stride, padding):
    module = BjorckConv2d(1, 1, kernel, stride, padding, bias=False)
    size = 9
    reads = torch.zeros(1, 1, size, size, requires_grad=True)
    windows = F.conv2d(reads, torch.ones(1, 1, kernel, kernel), None, stride, padding)
    (counts,) = torch.autograd.grad(windows.sum(), reads)
    factor = (module.weight.norm() / module.kernel().norm()).detach()
    assert counts.max() <= factor**2 + 1e-9
    if padding == 2:
        assert counts.max() == pytest.approx(float(factor**2))  # attained: no factor is smaller


def test_a_bjorck_convolution_of_patches_is_orthogonal():
    module, shape = made("bjorck patches")
    with torch.no_grad():
        module.steps = 40
    torch.testing.assert_close(singular_values(module, shape), torch.ones(32))


# ---------------------------------------------------------------- Cholesky


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_cholesky_shrinks_singular_values_as_its_formula_says(shape):
    layer = CholeskyLinear(shape[1], shape[0], eps=0.01)
    with torch.no_grad():
        layer.weight.normal_()
    s = torch.linalg.svdvals(layer.weight)
    mean = s.square().mean()
    torch.testing.assert_close(
        torch.linalg.svdvals(layer.matrix()).sort().values,
        (s / (s.square() + 0.01 * mean).sqrt()).sort().values,
    )


def test_nan_weights_give_nan_and_no_error_of_the_factorisation():
    layer = CholeskyLinear(3, 3)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    assert layer(torch.randn(2, 3)).isnan().any()
    assert layer.constant().value.isnan()


# ---------------------------------------------------------------- linear residual


def test_a_linear_residual_layer_is_the_sum_it_stands_for():
    layer = LinearResidualConv2d(3, depth=4)
    with torch.no_grad():
        layer.gamma.normal_()
        layer.bias.normal_()
    x = torch.randn(2, 3, 5, 4)
    branch = F.conv2d(x, layer.weight, padding=1) * layer.gamma[:, None, None]
    torch.testing.assert_close(layer(x), x + branch / 2 + layer.bias[:, None, None])
    true = singular_values(layer, (3, 5, 4))[0]
    assert float(lc.lipschitz(layer, (3, 5, 4))) == pytest.approx(float(true), rel=1e-9)
    assert true > 1


def test_centering_subtracts_the_batch_in_training_and_what_it_kept_in_evaluation():
    layer = BatchCentering(3, momentum=0.25)
    x = torch.randn(50, 3, 4) + torch.tensor([1.0, -2.0, 5.0])[:, None]
    torch.testing.assert_close(layer(x).mean((0, 2)), torch.zeros(3))
    mean = x.mean((0, 2))
    torch.testing.assert_close(layer.mean, 0.25 * mean)
    assert not layer.mean.requires_grad
    layer.eval()
    torch.testing.assert_close(layer(x), x - 0.25 * mean[:, None])
    torch.testing.assert_close(layer.mean, 0.25 * mean)
    layer.bias.data.normal_()
    graph = lc.trace(layer, (3, 4))
    torch.testing.assert_close(graph.values(x)[graph.output], layer(x))
    assert float(lc.lipschitz(layer, (3, 4))) == 1


# ---------------------------------------------------------------- networks

NETS = {
    "dense": (
        lambda: nn.Sequential(
            BjorckLinear(6, 8), MaxMin(), CholeskyLinear(8, 8), MaxMin(), LastLayerNormalized(8, 3)
        ),
        (6,),
    ),
    "conv": (
        lambda: nn.Sequential(
            BjorckConv2d(1, 4, 3, padding=1),
            MaxMin(),
            BjorckConv2d(4, 8, 2, stride=2),
            MaxMin(),
            nn.Flatten(),
            BjorckLinear(32, 3),
        ),
        (1, 4, 4),
    ),
    "soc": (
        lambda: nn.Sequential(
            FitChannels(4),
            SOCConv2d(4, 4),
            MaxMin(adjacent=True),
            SOCConv2d(4, 8, stride=2),
            MaxMin(),
            L2Pool2d(2),
            nn.Flatten(),
            LastLayerNormalized(8, 3),
        ),
        (1, 4, 4),
    ),
    "linear residual": (
        lambda: nn.Sequential(
            LinearResidualConv2d(2, 2),
            BatchCentering(2),
            MaxMin(),
            LinearResidualConv2d(2, 2),
            MaxMin(),
            nn.Flatten(),
            nn.Linear(18, 3),
        ),
        (2, 3, 3),
    ),
}


@pytest.mark.parametrize("name", NETS)
@each_precision
def test_networks_train_and_are_certified(name, dtype):
    make, shape = NETS[name]
    net = make().to(dtype)
    x = torch.randn(32, *shape, dtype=dtype)
    labels = (x.flatten(1)[:, 0] > 0).long() + (x.flatten(1)[:, 1] > 0).long()
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        losses.append(F.cross_entropy(8 * net(x), labels))
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]
    net.eval()
    bound = lc.Product(lc.trace(net, shape))
    features = lc.Product(lc.trace(net[:-1], shape)).lipschitz()
    if name != "linear residual":
        assert float(features) <= 1 + 1e-5
    slopes = jacobians(net, x).double()
    assert torch.linalg.matrix_norm(slopes, 2).max() <= float(bound.lipschitz()) * (1 + 1e-5)
    certificate = lc.certify(net, x, bound=bound)
    assert certificate.kind is lc.Kind.UPPER
    assert (certificate.radius > 0).any()
    for x0, radius, label in zip(x, certificate.radius, certificate.prediction, strict=True):
        step = torch.randn(50, *shape, dtype=dtype)
        step *= 0.999 * float(radius) / step.flatten(1).norm(dim=1).view(-1, *(1,) * len(shape))
        assert (net(x0 + step).argmax(1) == label).all()
