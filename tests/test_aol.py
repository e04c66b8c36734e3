"""Almost-orthogonal layers: norm at most 1 for every weight, geometry and precision."""

import copy
import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipcert as lc
from lipcert.layers import AOLConv2d, AOLLinear, MaxMin
from oracles import jacobians
from potential_weights import WEIGHTS, filled

GEOMETRIES = [
    (1, 1, 0),
    (2, 1, 0),
    (2, 2, 0),
    (2, 3, 1),
    (3, 1, 1),
    (3, 2, 1),
    (4, 2, 3),
    (5, 3, 2),
]


def norm(module, *shape):
    matrix = lc.trace(nn.Sequential(module), shape).output.op.map().dense()
    return torch.linalg.matrix_norm(matrix, 2).item()


LAYERS = {
    "dense wide": (lambda: AOLLinear(3, 5), (3,)),
    "dense narrow": (lambda: AOLLinear(6, 4, bias=False), (2, 6)),
    "conv": (lambda: AOLConv2d(3, 4, 3, padding=1), (3, 5, 4)),
    "strided": (lambda: AOLConv2d(2, 5, 3, stride=2, bias=False), (2, 6, 5)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def made(name, weights="random", dtype=torch.float64):
    make, shape = LAYERS[name]
    module = make().to(dtype)
    filled(module, weights)
    return module.eval(), shape


@each_layer
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_norm_is_at_most_the_constant(name, weights, dtype):
    module, shape = made(name, weights, dtype)
    constant = module.constant()
    assert constant.kind is lc.Kind.UPPER
    assert constant.value.dtype == torch.float64
    assert float(constant) == 1
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert norm(module, *shape) <= 1 + tolerance
    x = torch.randn(2, *shape, dtype=dtype)
    slopes = jacobians(module, x).double()
    assert (torch.linalg.matrix_norm(slopes, 2) <= 1 + tolerance).all()
    module.train()(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions_of_every_geometry_and_size(geometry):
    kernel, stride, padding = geometry
    for channels, outputs in ((1, 3), (3, 2)):
        module = AOLConv2d(channels, outputs, kernel, stride, padding, bias=False)
        filled(module, "random")
        for size in ((5, 5), (6, 7)):
            assert norm(module, channels, *size) <= 1 + 1e-12
        assert norm(module, channels, 11, 11) >= 0.3  # far from a trivial bound


def test_the_scale_is_the_inverse_root_of_the_row_sums():
    module = AOLLinear(4, 6)
    filled(module, "random")
    p = module.weight.detach()
    sums = (p.T @ p).abs().sum(0)
    torch.testing.assert_close(module.matrix(), p / sums.sqrt())


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_scale_of_a_convolution_is_that_of_a_cell_far_from_the_border(stride):
    module = AOLConv2d(2, 3, 4, stride, padding=6, bias=False)
    filled(module, "random")
    unscaled = nn.Conv2d(2, 3, 4, stride, 6, bias=False)
    unscaled.weight.data = module.weight.data
    size = 13
    matrix = lc.trace(unscaled, (2, size, size)).output.op.map().dense()
    sums = (matrix.T @ matrix).abs().sum(0).reshape(2, size, size)
    middle = sums[:, 3:-3, 3:-3].flatten(1).amax(1)  # every phase of the stride is among these
    expected = module.weight.detach() / middle.sqrt()[:, None, None]
    torch.testing.assert_close(module.kernel(), expected)


def test_orthogonal_weights_stay_as_they_are():
    dense = AOLLinear(4, 4)
    torch.testing.assert_close(dense.matrix(), dense.weight)
    torch.testing.assert_close(dense.matrix().T @ dense.matrix(), torch.eye(4))
    conv = AOLConv2d(3, 3, 3, padding=1)
    x = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(conv(x).norm(), x.norm())
    # Patches without overlap: a stride has columns of its own for every phase.
    patches = AOLConv2d(1, 4, 2, stride=2)
    patches.weight.data = nn.init.orthogonal_(torch.empty(4, 4)).reshape(4, 1, 2, 2)
    torch.testing.assert_close(patches.kernel(), patches.weight)


def test_the_forward_pass_is_that_of_the_rescaled_weight():
    conv = AOLConv2d(2, 3, 3, 2, 1)
    filled(conv, "random")
    x = torch.randn(2, 2, 6, 5)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.kernel(), conv.bias, 2, 1))
    dense = AOLLinear(3, 2)
    x = torch.randn(4, 5, 3)
    torch.testing.assert_close(dense(x), x @ dense.matrix().T + dense.bias)


def test_scaling_the_weight_changes_nothing():
    for scale in (1e-30, 1e15, 1e30):
        for name in LAYERS:
            module, shape = made(name)
            x = torch.randn(2, *shape)
            before = module(x)
            module.weight.data *= scale
            torch.testing.assert_close(module(x), before)


@each_layer
def test_gradients(name):
    module, shape = made(name)
    names = [n for n, _ in module.named_parameters()]
    x = torch.randn(2, *shape, requires_grad=True)

    def forward(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *module.parameters()), atol=1e-6)


@each_layer
def test_states_copies_precisions_and_compilation(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks cannot be compiled
    torch._dynamo.reset()
    module, shape = made(name)
    x = torch.randn(2, *shape)
    with torch.no_grad():
        value = module(x)
        fresh = LAYERS[name][0]().eval()
        fresh(x)  # something is cached
        fresh.load_state_dict(module.state_dict())
        assert torch.equal(fresh(x), value)
        assert torch.equal(copy.deepcopy(module)(x), value)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), value)
        module.weight.mul_(torch.rand_like(module.weight))
        torch.testing.assert_close(compiled(x), module(x))
        assert not torch.allclose(module(x), value)
        single = copy.deepcopy(module).float()
        torch.testing.assert_close(single(x.float()), module(x).float())


def test_a_net_of_them_trains_and_is_certified():
    net = nn.Sequential(
        AOLConv2d(2, 4, 3, 2, 1),
        MaxMin(),
        nn.Flatten(),
        AOLLinear(36, 6),
        MaxMin(),
        AOLLinear(6, 2),
    )
    x = torch.randn(32, 2, 6, 6)
    labels = torch.randint(2, (32,))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        F.cross_entropy(10 * net(x), labels).backward()
        optimiser.step()
    graph = lc.trace(net, (2, 6, 6))
    bound = lc.Product(graph)
    constant = float(bound.lipschitz())
    seen = torch.linalg.matrix_norm(jacobians(net.eval(), x), 2).max()
    assert seen <= constant <= 1 + 1e-9
    certificate = lc.certify(net, x, bound=bound)
    margin = net(x).detach().topk(2).values.diff().abs().flatten()
    assert certificate.kind is lc.Kind.UPPER
    assert (certificate.radius >= margin / math.sqrt(2) * (1 - 1e-6)).all()
    assert margin.max() > 0.1


@pytest.mark.parametrize(
    "make",
    [
        lambda: AOLLinear(0, 3),
        lambda: AOLConv2d(2, 0, 3),
        lambda: AOLConv2d(2, 3, 0),
        lambda: AOLConv2d(2, 3, 3, stride=0),
        lambda: AOLConv2d(2, 3, 3, padding=-1),
    ],
)
def test_sizes_are_checked(make):
    with pytest.raises(lc.LipcertError, match="must all be at least 1|must not be negative"):
        make()
