"""Convex-potential layers (SLL, CPL): 1-Lipschitz for all weights, and as published."""

import copy
import math
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

import lipcert as lc
from lipcert.layers import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear
from oracles import best_quotients, jacobians
from potential_weights import LAYERS, each_cpl, each_dtype, each_layer, each_weight, made

# Layers of the authors of CLL, run on random weights: inputs, outputs and what their state was.
# cpl_conv_k5 and cpl_lin in eval mode (100 power iterations), cpl_conv_k3 in training mode (one
# power iteration from u_start). Float32, on a CPU.
GOLDEN = np.load(Path(__file__).parent / "golden" / "cll_layers_potential.npz")

# ---------------------------------------------------------------- the constant


@each_layer
@each_weight
@each_dtype
def test_the_steps_are_short_enough(name, weights, dtype):
    """K K^T <= 2 diag(t)^-1, which is all that the proof asks of the weights."""
    module, shape = made(name, weights, dtype)
    kernel, gain, _ = module.terms()
    matrix = module.map(kernel, shape).dense()
    assert (gain >= 0).all()
    channel = 0 if kernel.ndim == 4 else -1  # of an output, the axis that the gain is for
    column = gain.double().reshape(-1, 1, 1) if channel == 0 else gain.double()
    rows = column.expand(module.map(kernel, shape).out_shape).flatten()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.linalg.matrix_norm(rows.sqrt()[:, None] * matrix, 2) ** 2 <= 2 * (1 + tolerance)
    assert float(module.constant()) == 1
    assert module.constant().kind is lc.Kind.UPPER
    assert module.constant().value.dtype == torch.float64


@each_layer
@each_weight
@each_dtype
def test_no_jacobian_is_above_the_constant(name, weights, dtype):
    module, shape = made(name, weights, dtype)
    x = torch.cat([torch.randn(20, *shape), 1e3 * torch.randn(20, *shape)]).to(dtype)
    slopes = jacobians(module, x).double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (torch.linalg.matrix_norm(slopes, 2) <= float(module.constant()) + tolerance).all()


@each_layer
@each_weight
@each_dtype
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_values_and_gradients_are_finite(name, weights, dtype, training):
    module, shape = made(name, weights, dtype)
    module.train(training)
    x = torch.randn(3, *shape, dtype=dtype, requires_grad=True)
    y = module(x)
    y.abs().mean().backward()
    assert y.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (x, *module.parameters()))


@each_layer
def test_the_constant_is_nearly_attained(name):
    module, shape = made(name)
    assert best_quotients(module, shape, 200).norm(dim=1).max() >= 0.9


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_weights_of_all_sizes_act_where_they_can(scale):
    """Without a bias the layers do not depend on the scale, but for what guards a division.

    In float32, where squares of the weights are out of range.
    """
    for name in LAYERS:
        module, shape = made(name, dtype=torch.float32)
        module.bias.data.zero_()
        x = torch.randn(3, *shape, dtype=torch.float32)
        before = module(x)
        module.weight.data *= scale
        torch.testing.assert_close(
            module(x), x if scale < 1 else before, rtol=1e-3, atol=1e-3 * before.abs().max().item()
        )


def test_units_without_weight_are_off():
    module, shape = made("SLLLinear")
    module.q.data = torch.tensor([0.0, 1.0, 1.0, 0.0, 2.0, 1e-30])
    gain = module.terms().gain
    assert gain[0] == gain[3] == 0
    assert gain[5] < 1e-25
    module.q.data.zero_()
    x = torch.randn(2, *shape)
    assert torch.equal(module(x), x)
    module(x).sum().backward()
    assert module.q.grad.isfinite().all()


def test_the_weights_of_the_row_sums_have_neither_sign_nor_scale():
    module, shape = made("SLLConv2d")
    x = torch.randn(2, *shape)
    value = module(x)
    for factor in (-1, 1e-20, 1e20):
        module.q.data *= factor
        torch.testing.assert_close(module(x), value)


# ---------------------------------------------------------------- the norm in CPL


@each_cpl
@each_weight
def test_the_divisor_is_the_norm_in_eval_mode(name, weights):
    module, shape = made(name, weights)
    matrix = module.map(module.weight.detach(), shape).dense()
    norm = torch.linalg.matrix_norm(matrix, 2)
    applied = torch.linalg.matrix_norm(module.map(module.terms().kernel, shape).dense(), 2)
    torch.testing.assert_close(applied, norm / torch.hypot(norm, norm.new_tensor(1e-2)))


@each_cpl
def test_every_change_of_the_weight_is_noticed(name):
    module, shape = made(name)
    x = torch.randn(2, *shape)
    module(x)
    changes = [
        lambda w: w.mul_(3),
        lambda w: setattr(w, "data", 5 * w.data),
        lambda w: w.data.div_(7),
        lambda w: w.data.view(-1)[0].add_(50),
    ]
    for change in changes:
        with torch.no_grad():
            change(module.weight)
        other = LAYERS[name][0]().eval()
        other.load_state_dict(module.state_dict())
        assert torch.equal(module(x), other(x))


@each_cpl
def test_a_change_of_precision_rounds_the_divisor_up(name):
    for seed in range(20):
        torch.manual_seed(seed)
        module, shape = made(name)
        module.weight.data *= 1e4  # where the 1e-4 under the root is nothing
        module(torch.randn(1, *shape))
        module.float()
        exact = module.map(module.weight.detach().double(), shape)
        assert module.terms() is not None
        assert module._divisor.double() > lc.Exact()(exact).value


@each_cpl
def test_training_finds_the_norm(name):
    module, shape = made(name)
    x = torch.randn(2, *shape)
    exact = module(x)
    module.train()
    assert not torch.allclose(module(x), exact, rtol=1e-6)
    for _ in range(3000):
        module._estimate()
    torch.testing.assert_close(module(x), exact, rtol=1e-6, atol=1e-6)
    assert abs(module.direction.norm() - 1) < 1e-12


def test_a_zero_weight_keeps_its_direction():
    module = CPLLinear(3).train()
    before = module.direction.clone()
    weight = module.weight.data.clone()
    module.weight.data.zero_()
    module(torch.randn(2, 3))
    assert torch.equal(module.direction, before)
    module.weight.data = weight
    module(torch.randn(2, 3))
    assert not torch.equal(module.direction, before)


def test_evaluation_leaves_the_power_iteration_alone():
    module = CPLLinear(3).eval()
    before = module.direction.clone()
    module(torch.randn(2, 3))
    assert torch.equal(module.direction, before)


# ---------------------------------------------------------------- the published layers


def golden(name):
    found = {k.split("/")[1]: torch.as_tensor(GOLDEN[k]) for k in GOLDEN if k.startswith(name)}
    weight = found["weight"]
    width, features, *taps = weight.shape
    if "sll" in name:
        module = SLLConv2d(features, width, taps[0]) if taps else SLLLinear(features, width)
        module.q.data = found["q"]
    elif taps:
        module = CPLConv2d(features, tuple(found["x"].shape[2:]), width, taps[0])
    else:
        module = CPLLinear(features, width)
    module = module.float().eval()
    module.weight.data, module.bias.data = weight, found["bias"]
    return module, found


@pytest.mark.parametrize("name", ["sll_conv_k5", "sll_conv_k3", "sll_lin", "cpl_lin"])
def test_the_published_layers(name):
    module, found = golden(name)
    torch.testing.assert_close(module(found["x"]), found["out"], rtol=1e-5, atol=1e-5)


def test_a_published_step_of_training():
    module, found = golden("cpl_conv_k3")
    module.direction.copy_(found["u_start"] / found["u_start"].norm())
    torch.testing.assert_close(module.train()(found["x"]), found["out"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.direction, found["pm.u"], rtol=1e-5, atol=1e-5)


def test_a_published_norm_that_had_not_converged():
    """100 iterations gave 1.00018 where the norm is 1.00116; with that number we agree.

    Their layer has a Lipschitz constant above 1, as its Jacobian where every unit is on shows.
    """
    module, found = golden("cpl_conv_k5")
    x, out, estimate = found["x"], found["out"], found["eval_sv_max"]
    theirs = module._terms(torch.hypot(estimate, torch.tensor(1e-2)))
    torch.testing.assert_close(module.step(x, theirs), out, rtol=1e-5, atol=1e-5)
    assert (module(x) - out).abs().max() > 1e-3
    norms = []
    for terms in (theirs, module.terms()):
        matrix = module.map(terms.kernel, tuple(x.shape[1:])).dense()
        on = torch.eye(matrix.shape[1]) - 2 * matrix.T @ matrix
        norms.append(torch.linalg.matrix_norm(on, 2).item())
    assert norms[0] > 1.0017
    assert norms[1] <= 1 + 1e-6


# ---------------------------------------------------------------- gradients, state, errors


@each_layer
def test_gradients(name):
    module, shape = made(name)
    if "CPL" in name:  # the gradient of sigma is exact where the power iteration has converged
        module.train()
        for _ in range(5000):
            module._estimate()
    names = [n for n, _ in module.named_parameters()]
    x = torch.randn(2, *shape, requires_grad=True)

    def forward(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *module.parameters()), atol=1e-5)


@each_layer
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_states_copies_precisions_and_compilation(name, training, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks cannot be compiled
    torch._dynamo.reset()
    module, shape = made(name)
    module.train(training)
    x = torch.randn(2, *shape)
    with torch.no_grad():
        fresh = LAYERS[name][0]().train(training)
        fresh(x)  # something is cached
        fresh.load_state_dict(module.state_dict())
        copied = copy.deepcopy(module)
        compiled = torch.compile(copy.deepcopy(module), backend="eager", fullgraph=True)
        single = copy.deepcopy(module).float()
        value = module(x)
        assert torch.equal(fresh(x), value)
        assert torch.equal(copied(x), value)
        torch.testing.assert_close(compiled(x), value)
        torch.testing.assert_close(single(x.float()), value.float(), rtol=1e-4, atol=1e-4)
        change = torch.rand_like(module.weight)
        module.weight.mul_(change)
        compiled.weight.mul_(change)
        value = module(x)
        torch.testing.assert_close(compiled(x), value)
        assert not torch.equal(copied(x), value)


def test_the_kept_norm_is_no_state():
    module = CPLConv2d(2, (4, 4))
    assert set(module.state_dict()) == {"weight", "bias", "direction"}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_inputs_of_another_size_are_refused(training):
    module = CPLConv2d(2, (5, 4)).train(training)
    with pytest.raises(lc.LipcertError, match=r"made for samples of the shape \(2, 5, 4\)"):
        module(torch.randn(3, 2, 4, 5))


def test_sll_takes_inputs_of_every_size():
    module, _ = made("SLLConv2d")
    kernel, gain, _ = module.terms()
    for size in ((1, 1), (2, 7), (8, 8)):
        assert module(torch.randn(1, 2, *size)).shape == (1, 2, *size)
        matrix = (module.map(kernel, (2, *size))).dense().reshape(3, -1, 2 * math.prod(size))
        short = (gain.sqrt()[:, None, None] * matrix).flatten(0, 1)
        assert torch.linalg.matrix_norm(short, 2) ** 2 <= 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SLLLinear(0), "at least 1"),
        (lambda: SLLConv2d(2, 0), "at least 1"),
        (lambda: SLLConv2d(2, padding=-1), "must not be negative"),
        (lambda: CPLLinear(3, -1), "at least 1"),
        (lambda: CPLConv2d(2, (0, 4)), "at least 1"),
        (lambda: CPLConv2d(2, (4, 2), kernel_size=6), "does not fit into"),
    ],
)
def test_sizes_are_checked(make, message):
    with pytest.raises(lc.LipcertError, match=message):
        make()
