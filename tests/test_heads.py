"""Beginnings and ends of 1-Lipschitz networks: channels, pooling, the normalised last layer."""

import copy
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipcert as lc
from lipcert.layers import FitChannels, L2Pool2d, LastLayerNormalized
from oracles import best_quotients, jacobians

GOLDEN = np.load(
    Path(__file__).parent / "golden" / "cll_layers_orthogonal.npz"
)  # provenance: in it


def golden(name):
    return torch.from_numpy(GOLDEN[name])


# ---------------------------------------------------------------- last layer


def test_reference_values_of_the_last_layer():
    module = LastLayerNormalized(10, 4).float()
    module.load_state_dict({"weight": golden("lln/weight"), "bias": golden("lln/bias")})
    torch.testing.assert_close(module(golden("lln/x")), golden("lln/out"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("scale", [1.0, 1e15, 1e-15, 1e-30, 0.0])
def test_each_logit_is_one_lipschitz(scale, dtype):
    module = LastLayerNormalized(6, 4).to(dtype)
    with torch.no_grad():
        module.weight.mul_(scale)
        module.weight[1] = 0
        module.weight[2] = module.weight[3]
    x = torch.randn(2, 6, dtype=dtype)
    norms = jacobians(module, x)[0].norm(dim=1)
    expected = [1.0, 0.0, 1.0, 1.0] if scale else [0.0] * 4
    torch.testing.assert_close(norms, torch.tensor(expected, dtype=dtype))
    module(x).square().sum().backward()
    assert module.weight.grad.isfinite().all()
    module = module.double()
    constants = lc.Product(lc.trace(module, (6,)))().dense()[0]
    rows = jacobians(module, x.double())[0]
    torch.testing.assert_close(constants, (rows[:, None] - rows).norm(dim=2))
    assert constants[2, 3] == 0


def test_gradients_state_and_compilation(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks cannot be compiled
    module = LastLayerNormalized(5, 3)
    x = torch.randn(2, 5, requires_grad=True)
    weight, bias = (p.detach().clone().requires_grad_() for p in module.parameters())

    def forward(x, weight, bias):
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(forward, (x, weight, bias))
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    with pytest.raises(lc.LipcertError, match="needs positive sizes"):
        LastLayerNormalized(5, 0)


# ---------------------------------------------------------------- channels


def test_reference_values_of_channels_and_pooling():
    assert torch.equal(FitChannels(6)(golden("padch/x")), golden("padch/out"))
    assert torch.equal(FitChannels(4)(golden("trunc/x")), golden("trunc/out"))
    pool = nn.AvgPool2d(4, divisor_override=4)
    x = golden("avgpool/x").double()
    torch.testing.assert_close(pool(x).float(), golden("avgpool/out"))
    assert float(lc.lipschitz(pool, (6, 8, 8))) == pytest.approx(1)  # an isometry on constants


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 2)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_channels_are_appended_or_cut(shape, channels):
    x = torch.randn(2, *shape)
    y = FitChannels(channels)(x)
    kept = min(3, channels)
    assert y.shape == (2, channels, *shape[1:])
    assert torch.equal(y[:, :kept], x[:, :kept])
    assert not y[:, kept:].any()
    assert float(lc.lipschitz(FitChannels(channels), shape)) == 1
    with pytest.raises(lc.LipcertError, match="positive number of channels"):
        FitChannels(0)


# ---------------------------------------------------------------- L2 pooling


def test_l2_pooling_is_the_norm_of_each_window():
    x = torch.randn(2, 3, 4, 6)
    expected = F.lp_pool2d(x.abs(), 2, 2)
    torch.testing.assert_close(L2Pool2d(2)(x), expected)
    torch.testing.assert_close(L2Pool2d(2)(x).norm(), x.norm())
    seen = best_quotients(L2Pool2d(2), (1, 2, 4)).norm(dim=1).max()
    assert 0.9 < seen <= 1 + 1e-12


def test_l2_pooling_has_gradients_at_zero():
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    L2Pool2d(2)(x).sum().backward()
    assert not x.grad.any()


def test_images_of_l2_pooling_are_attained_and_right_at_infinity():
    op = lc.trace(L2Pool2d(2), (1, 2, 2)).output.op
    lower = torch.tensor([-1.0, 2.0, -3.0, 0.0]).reshape(1, 1, 2, 2)
    upper = torch.tensor([2.0, 3.0, -2.0, 0.0]).reshape(1, 1, 2, 2)
    low, high = op.image(lower, upper)
    assert low.item() == pytest.approx(8**0.5)
    assert high.item() == pytest.approx(22**0.5)
    low, high = op.image(torch.full_like(lower, -torch.inf), torch.full_like(lower, torch.inf))
    assert (low.item(), high.item()) == (0, torch.inf)


def test_an_input_of_l2_pooling_matters_where_its_window_does():
    op = lc.trace(L2Pool2d(2), (1, 2, 4)).output.op
    needed = op.needs(torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2))
    assert needed[0, 0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_windows_have_to_fit():
    with pytest.raises(lc.LipcertError, match="sides are multiples of 2, not one of 3 x 4"):
        L2Pool2d(2)(torch.zeros(1, 1, 3, 4))
    with pytest.raises(lc.LipcertError, match="positive size"):
        L2Pool2d(0)
