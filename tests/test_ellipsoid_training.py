"""The ellipsoid bound in training: an estimate in float32, not at every step."""

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.layers import MaxMin
from test_api import jaxtyping_off


@pytest.fixture(autouse=True)
def unchecked():
    with jaxtyping_off():
        yield


def conv_net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)]
    return nn.Sequential(*layers).float()


def test_it_is_the_bound_to_single_precision_and_claims_nothing():
    graph = lc.trace(conv_net(), (1, 6, 6))
    exact = lc.Ellipsoid(graph)
    exact._ways = exact._ways[-1:]
    found = lc.Ellipsoid(graph, every=1)()
    assert found.kind is lc.Kind.ESTIMATE
    torch.testing.assert_close(found.dense().double(), exact().dense(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        found.within(None, 1.0).double()[0], exact.per_output().value, rtol=1e-3, atol=1e-6
    )
    with pytest.raises(lc.LipcertError, match="estimate"):
        lc.certify(graph.model, torch.rand(2, 1, 6, 6), bound=lc.Ellipsoid(graph, every=2))


def test_between_refreshes_it_repeats_itself_and_makes_up_in_the_gradient():
    net = conv_net()
    bound, one = (lc.Ellipsoid(lc.trace(net, (1, 6, 6)), every=n) for n in (3, 1))
    weight = net[0].weight

    def step():
        weight.grad = None
        K = bound().row(torch.tensor([0, 1]))
        if K.requires_grad:
            K.sum().backward()
        return K.detach()

    first = step()
    thrice = weight.grad.clone()
    weight.grad = None
    one().row(torch.tensor([0, 1])).sum().backward()
    torch.testing.assert_close(thrice, 3 * weight.grad)
    with torch.no_grad():
        net[0].weight.mul_(2)
    for _ in range(2):
        torch.testing.assert_close(step(), first)
        assert weight.grad is None
    torch.testing.assert_close(step(), 2 * first, rtol=1e-3, atol=0)


def test_validation_between_steps_is_fresh_and_does_not_count():
    net = conv_net()
    bound = lc.Ellipsoid(lc.trace(net, (1, 6, 6)), every=2)
    first = bound().dense().detach()
    with torch.no_grad():
        net[0].weight.mul_(2)
        torch.testing.assert_close(bound().dense(), 2 * first, rtol=1e-3, atol=0)
    torch.testing.assert_close(bound().dense(), first)


def test_its_state_is_saved():
    torch.set_default_dtype(torch.float32)
    net = conv_net()
    graph = lc.trace(net, (1, 6, 6))
    bound, other = lc.Ellipsoid(graph, every=2), lc.Ellipsoid(graph, every=2)
    first = bound().dense().detach()
    other.load_state_dict(bound.state_dict())
    with torch.no_grad():
        net[0].weight.mul_(2)
    assert torch.equal(other().dense(), first)  # so that training resumes bit for bit


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_bad_intervals_are_refused(every):
    with pytest.raises(lc.LipcertError, match="every="):
        lc.Ellipsoid(lc.trace(conv_net(), (1, 6, 6)), every=every)


def zeroed(layer):
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class Skip(nn.Module):
    """x + f(x)"""

    def __init__(self, *layers):
        super().__init__()
        self.inside = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.inside(x)


def conv(into=2, stride=1):
    return nn.Conv2d(into, 2, 3, stride, 1)


ZEROS = {  # networks of a common start, with zeros somewhere
    "branch": lambda: [nn.Linear(4, 4), Skip(nn.ReLU(), zeroed(nn.Linear(4, 4))), nn.ReLU()],
    "branch of images": lambda: [conv(1), Skip(nn.ReLU(), zeroed(conv())), nn.ReLU(), nn.Flatten()],
    "first layer": lambda: [zeroed(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()],
    "all": lambda: [zeroed(conv(1, 2)), nn.ReLU(), Skip(zeroed(conv()), nn.ReLU(), zeroed(conv())),
                    nn.ReLU(), nn.Flatten()],
    "sorted pairs": lambda: [zeroed(conv(1)), MaxMin(), conv(), MaxMin(), nn.Flatten()],
}  # fmt: skip


@pytest.mark.parametrize("name", ZEROS)
@pytest.mark.parametrize("make", [lc.Ellipsoid, lc.Eclipse])
def test_zeros_leave_constants_and_gradients_finite(name, make):
    torch.manual_seed(0)
    body = nn.Sequential(*ZEROS[name]())
    shape = (4,) if isinstance(body[0], nn.Linear) else (1, 4, 4)
    net = nn.Sequential(body, nn.Linear(body(torch.zeros(1, *shape)).shape[1], 3))
    graph = lc.trace(net, shape)
    with torch.no_grad():
        exact = make(graph)()
        assert exact.dense().isfinite().all()
        assert lc.Multipliers(graph, steps=2)().dense().isfinite().all()
        assert (exact.dense() <= lc.Product(graph)().dense() * (1 + 1e-9) + 1e-60).all()
    K = make(graph, every=1)().dense()
    K.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-9, 1e-19, 0.0])
def test_residual_branches_that_begin_near_zero(size):
    """Nothing is read of their neurons: a multiplier far above the top costs nothing there."""
    torch.manual_seed(0)
    blocks = [Skip(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(3)]
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), *blocks, nn.Linear(6, 3)).float()
    with torch.no_grad():
        for block in blocks:
            block.inside[2].weight.mul_(size)
    graph = lc.trace(net, (6,))
    found = lc.Ellipsoid(graph, every=1)().dense()[0]
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    torch.testing.assert_close(found.double(), lc.Ellipsoid(graph)().dense()[0], rtol=0.01, atol=0)
