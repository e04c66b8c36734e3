"""The ellipsoid bound in training: an estimate in float32, not at every step."""

import pytest
import torch
from torch import nn

import lipcert as lc
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
