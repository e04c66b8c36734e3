"""Skew orthogonal convolutions: reference values, the bound of the series, the state."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lipcert as lc
from lipcert.layers import SOCConv2d
from lipcert.layers.soc import skew, truncated_exponential_bound

GOLDEN = np.load(
    Path(__file__).parent / "golden" / "cll_layers_orthogonal.npz"
)  # provenance: in it
SHAPES = {"soc_3to6_s1": (3, 6, 3, 1), "soc_6to12_s2": (6, 12, 3, 2), "soc_12to6_k1": (12, 6, 1, 1)}


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def series_norm(theta, terms):
    t = torch.linspace(0, theta, 4001)
    total = sum((1j * t) ** n / math.factorial(n) for n in range(terms + 1))
    return float(total.abs().max())


def forgetful(module):
    """The layer with vectors that know nothing of its weight."""
    for name, buffer in module.named_buffers():
        if name != "steps":
            buffer.zero_()
            buffer.flatten()[0] = 1
    return module


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", SHAPES)
def test_reference_values(name, mode):
    module = SOCConv2d(*SHAPES[name]).float()
    state = {k: golden(f"{name}/{mode}/{k}") for k in module.state_dict() if k != "steps"}
    module.load_state_dict(state | {"steps": torch.tensor(1)})
    module.train(mode == "train")
    out = module(golden(f"{name}/x"))
    torch.testing.assert_close(out, golden(f"{name}/{mode}/out"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("terms", [1, 2, 5, 8, 12])
@pytest.mark.parametrize("theta", [0.0, 0.3, 1.0, 2.1, 2.7, 4.0, 8.0, 100.0])
def test_the_bound_of_the_series_is_above_it(terms, theta):
    bound, true = truncated_exponential_bound(theta, terms), series_norm(theta, terms)
    assert bound >= true * (1 - 1e-14)
    assert bound <= math.exp(theta) + 1e-14
    if terms < 3 or theta in (0.0, 0.3, 100.0):  # one power of theta rules
        assert bound <= true * 1.0001


def test_twelve_terms_are_a_contraction_up_to_two_and_a_half_and_no_longer():
    assert truncated_exponential_bound(2.5, 12) < 1 + 1e-14
    assert series_norm(2.5, 12) <= 1 + 1e-15
    assert truncated_exponential_bound(4.0, 12) >= series_norm(4.0, 12) > 1.005
    assert truncated_exponential_bound(1.0, 5) >= series_norm(1.0, 5) > 1 + 8e-4


@pytest.mark.parametrize("theta", [math.nan, math.inf])
def test_what_is_not_known_of_the_convolution_is_not_known_of_its_series(theta):
    assert not truncated_exponential_bound(theta, 12) < math.inf


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (4, 3)])
def test_the_convolution_is_skew_symmetric_on_every_size(size):
    kernel = skew(torch.randn(3, 3, 3, 3))
    basis = torch.eye(3 * math.prod(size)).reshape(-1, 3, *size)
    matrix = F.conv2d(basis, kernel, padding=1).flatten(1)
    torch.testing.assert_close(matrix, -matrix.T)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (9, 9)])
def test_k_times_a_reshaped_norm_bounds_the_convolution(size):
    for weight in (torch.randn(2, 2, 3, 3), torch.ones(2, 2, 3, 3).triu(), _separable()):
        module = SOCConv2d(2, 2, correction=0.2)
        with torch.no_grad():
            module.weight.copy_(weight)
        kernel = module.eval().kernel().detach()
        basis = torch.eye(2 * math.prod(size)).reshape(-1, 2, *size)
        matrix = F.conv2d(basis, kernel, padding=1).flatten(1)
        norm = torch.linalg.matrix_norm(matrix, 2)
        reshaped = (kernel.permute(0, 2, 1, 3).reshape(6, 6), kernel.flatten(1))
        theta = 3 * min(float(torch.linalg.matrix_norm(m, 2)) for m in reshaped)
        assert norm <= theta
        assert float(module.constant()) == truncated_exponential_bound(theta, 12)


def _separable():
    """A kernel close to one that attains the factor: constant over the taps, skew over channels."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    return turn[:, :, None, None].expand(2, 2, 3, 3).clone()


def test_a_stale_iteration_gives_a_constant_above_one_that_holds():
    module = forgetful(SOCConv2d(4, 4)).eval()
    with torch.no_grad():
        module.weight.copy_(torch.ones(4, 4).tril(-1)[:, :, None, None].expand(4, 4, 3, 3))
    graph = lc.trace(module, (4, 3, 2))
    true = torch.linalg.matrix_norm(graph.output.op.map().dense(), 2)
    assert true > 1.05
    assert float(module.constant()) >= true
    assert float(lc.spectral_norm(module, (4, 3, 2))) >= true
    module.train()(torch.zeros(1, 4, 3, 2))  # the first step iterates often
    assert float(module.eval().constant()) < 1 + 1e-12


def test_sigma_is_the_least_of_four_norms():
    module = SOCConv2d(3, 3, correction=1.0)
    kernel = skew(module.weight).detach()
    module._iterate(kernel / kernel.abs().max(), 2000)
    matrices = (
        kernel.permute(0, 2, 1, 3).reshape(9, 9),
        kernel.permute(0, 3, 1, 2).reshape(9, 9),
        kernel.flatten(1),
        kernel.transpose(0, 1).flatten(1),
    )
    norms = torch.stack([torch.linalg.matrix_norm(m, 2) for m in matrices])
    torch.testing.assert_close(norms[::2], norms[1::2])  # of a skew kernel they come in pairs
    torch.testing.assert_close(module.kernel().detach(), kernel / norms.min())


def test_steps_of_training_iterate_once_and_often_at_every_two_hundredth(monkeypatch):
    times = []
    monkeypatch.setattr(SOCConv2d, "_iterate", lambda self, scaled, n: times.append(n))
    module = SOCConv2d(1, 1, 1)
    for _ in range(201):
        module(torch.zeros(1, 1, 1, 1))
    assert times == [50, 50, *[1] * 199, 50]
    module.eval()(torch.zeros(1, 1, 1, 1))
    assert len(times) == 202
    assert int(module.steps) == 201


def test_evaluation_changes_no_state_and_training_resumes_from_a_saved_one():
    module = SOCConv2d(2, 4)
    x = torch.randn(2, 2, 3, 3)
    for _ in range(3):
        module(x)
    saved = copy.deepcopy(module.state_dict())
    module.eval()(x)
    lc.lipschitz(module, (2, 3, 3))
    assert all(torch.equal(v, saved[k]) for k, v in module.state_dict().items())
    other = SOCConv2d(2, 4)
    other.load_state_dict(saved)
    assert torch.equal(module.train()(x), other(x))


def test_vectors_come_back_after_a_zero_weight():
    module = SOCConv2d(3, 3)
    with torch.no_grad():
        module.weight.zero_()
        x = torch.randn(1, 3, 4, 4)
        torch.testing.assert_close(module(x), x)  # exp(0)
        module.weight.normal_()
        for _ in range(60):
            module(x)
    assert float(module.eval().constant()) < 1 + 1e-12


def test_a_graph_describes_evaluation_also_in_training_mode():
    module = SOCConv2d(2, 3)
    module.bias.data.normal_()
    graph = lc.trace(module, (2, 4, 3))
    x = torch.randn(2, 2, 4, 3)
    value = graph.values(x)[graph.output]
    assert module.training
    torch.testing.assert_close(value, module.eval()(x))
    assert not torch.allclose(module.train()(x), value, atol=1e-9)


def test_norms_are_kept_and_only_cutting_channels_loses_some():
    x = torch.randn(3, 2, 4, 6)
    grown = SOCConv2d(2, 8, stride=2).eval()
    torch.testing.assert_close(grown(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    cut = SOCConv2d(2, 1).eval()
    assert (cut(x).flatten(1).norm(dim=1) < x.flatten(1).norm(dim=1)).all()


def test_adjoint():
    module = SOCConv2d(2, 3, stride=2)
    map = lc.trace(module, (2, 4, 6)).output.op.map()
    x, y = torch.randn(1, *map.in_shape), torch.randn(1, *map.out_shape)
    torch.testing.assert_close((map.apply(x) * y).sum(), (x * map.adjoint(y)).sum())


def test_what_does_not_fit_is_refused():
    for sizes in ((2, 2, 2), (0, 2), (2, 2, 3, 0)):
        with pytest.raises(lc.LipcertError, match="positive sizes and an odd kernel"):
            SOCConv2d(*sizes)
    for shape in ((1, 2, 3, 4), (1, 2, 4, 3), (1, 3, 4, 4)):
        with pytest.raises(lc.LipcertError, match="takes 2 channels and sides that are multiples"):
            SOCConv2d(2, 8, stride=2)(torch.zeros(shape))


def test_a_changed_correction_is_noticed():
    layer = SOCConv2d(2, 2).eval()
    x = torch.randn(1, 2, 4, 4)
    with torch.no_grad():
        before, constant = layer(x), float(layer.constant().value)
        layer.correction = 3.0
        assert not torch.allclose(layer(x), before)
        assert float(layer.constant().value) > 1.01 * constant
