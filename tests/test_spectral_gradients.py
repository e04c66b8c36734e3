"""Gradients of spectral norms: those of the largest singular value of the dense matrix."""

from dataclasses import replace

import pytest
import torch

from lipcert.convolution import Conv
from lipcert.linear_kinds import Dense, Scale, Separable
from lipcert.linear_map import Matrix
from lipcert.spectral import Auto, Exact, Fourier, Gram, Lanczos, PowerIteration
from lipcert.spectral.fourier import as_convolution
from maps import (
    CONVS,
    FOURIER,
    HARD,
    cases,
    chain,
    close,
    conv,
    dense_of,
    each,
    live,
    scale,
    stack,
    svd,
    total,
    with_singular_values,
    zero_weights,
)

GRAMS = [Gram(1), Gram(3), Gram(8)]
DENSE = {name: build for name, build in HARD.items() if isinstance(build(), Dense)}
GAPPED = {
    "tall": lambda: dense_of(with_singular_values([3.0, 1.5, 1.0], 40, 30)),
    "wide": lambda: dense_of(with_singular_values([3.0, 1.5, 1.0], 30, 40)),
    "small": lambda: dense_of(with_singular_values([3.0, 1.5, 1.0], 3, 3)),
    "leading axes": lambda: Dense((4, 3), (4, 5), live(5, 3)),
    "matrix": lambda: Matrix((2, 3), (4,), live(4, 6)),
    "scale": lambda: Scale((3, 2), (3, 2), live(3, 1)),
    "separable": lambda: Separable((2, 3), (4, 2), (live(4, 2), live(2, 3))),
    "transposed": lambda: conv((2, 6), 3, 3, stride=2, padding=1).T,
    "stack": lambda: stack(Dense((4,), (3,), live(3, 4)), scale((4,), 4)),
    "product": lambda: chain(conv((2, 4, 4), 3, 3, 2, 1), scale((3, 2, 2), 3, 1, 1)),
    "sum": lambda: total(conv((2, 6), 2, 3, padding=1), scale((2, 6), 2, 6)),
    **{f"conv {name}": build for name, build in CONVS.items()},
}


@each([Exact(), Auto(), Lanczos(1e-9, 25)])
@cases(GAPPED)
def test_gradient_is_that_of_the_singular_value(build, norm):
    a = build()
    weights = a.tensors()
    expected = torch.autograd.grad(svd(a), weights)
    found = torch.autograd.grad(norm(a).value, weights)
    for gradient, wanted in zip(found, expected, strict=True):
        close(gradient, wanted, 1e-5)


@cases(GAPPED)
def test_gradient_of_power_iteration_at_the_singular_vector(build):
    a = build()
    top = torch.linalg.svd(a.dense().detach())[2][0].reshape(a.in_shape)
    expected = torch.autograd.grad(svd(a), a.tensors())
    found = torch.autograd.grad(PowerIteration(1).refine(a, top[None])[0].value, a.tensors())
    for gradient, wanted in zip(found, expected, strict=True):
        close(gradient, wanted, 1e-9)


def assert_gradient_of_its_value(norm, map):
    """By differences along a direction, for the first weight."""
    weight = map.tensors()[0].detach()

    def at(step):
        moved = replace(map, weight=(weight + step * direction).requires_grad_())
        return norm(moved).value, moved.weight

    direction = torch.randn(weight.shape)
    (gradient,) = torch.autograd.grad(*at(0.0))
    h = 1e-5
    close((gradient * direction).sum(), (at(h)[0] - at(-h)[0]) / (2 * h), 1e-6)


@each(GRAMS)
@pytest.mark.parametrize("frequencies", [False, True])
@cases(CONVS | {"dense": lambda: dense_of(torch.randn(4, 6))})
def test_gradient_of_gram_is_that_of_its_value(build, frequencies, norm, monkeypatch):
    a = build()
    if frequencies and isinstance(a, Conv):
        monkeypatch.setattr("lipcert.spectral.gram.DENSE_SIDE", 0)
    assert_gradient_of_its_value(norm, a)


def test_gradient_of_gram_approaches_that_of_the_singular_value():
    a = GAPPED["wide"]()
    expected = torch.autograd.grad(svd(a), a.weight)
    close(torch.autograd.grad(Gram(8)(a).value, a.weight), expected, 1e-8)


@cases({name: build for name, build in FOURIER.items() if as_convolution(build()).circular})
def test_gradient_by_frequency_is_that_of_the_singular_value(build):
    a = build()
    expected = torch.autograd.grad(svd(a), a.tensors())
    found = torch.autograd.grad(Fourier()(a).value, a.tensors())
    for gradient, wanted in zip(found, expected, strict=True):
        close(gradient, wanted, 1e-8)


@each([Exact(), Fourier()])
def test_gradient_reaches_the_largest_group_only(norm):
    c = conv((3, 8), 3, 3, padding=1, groups=3)
    with torch.no_grad():
        c.weight.mul_(torch.tensor([1.0, 100.0, 10.0])[:, None, None])
    (gradient,) = torch.autograd.grad(norm(c).value, c.weight)
    assert gradient[1].abs().min() > 0
    assert gradient[[0, 2]].abs().max() < 1e-12


@cases(CONVS)
def test_gradient_by_frequency_is_that_of_its_value(build):
    assert_gradient_of_its_value(Fourier(), build())


@each([Exact(), Auto(), PowerIteration(200), Lanczos(1e-9, 25), *GRAMS])
@cases(DENSE)
def test_gradient_where_singular_values_meet(build, norm):
    """A subgradient: <G, W> is the norm, and |<G, X>| <= |X| for every X."""
    a = build()
    value = norm(a).value
    (gradient,) = torch.autograd.grad(value, a.weight)
    part = (gradient * a.weight).sum()
    if isinstance(norm, Lanczos) and min(a.weight.shape) > norm.steps:
        assert part <= value  # the gradient of what is inflated
    else:
        close(part, value, 1e-9)
    if not isinstance(norm, Gram):
        assert torch.linalg.svdvals(gradient).sum() <= 1 + 1e-9


@each([Exact(), Auto(), Gram(3), PowerIteration(3), Lanczos(1e-9, 2), Fourier()])
def test_gradient_at_zero_is_finite(norm):
    for a in (
        zero_weights(conv((2, 4, 4), 3, 3, padding=1)),
        zero_weights(conv((2, 4, 4), 3, 3, padding=1)).T,
    ):
        value = norm(a).value
        assert value == 0
        (weight,) = a.tensors()
        assert torch.autograd.grad(value, weight)[0].isfinite().all()


def test_gradient_of_a_stack_of_zeros_is_finite(monkeypatch):
    monkeypatch.setattr("lipcert.spectral.auto.DENSE_SIDE", 3)
    c = zero_weights(conv((2, 4, 4), 3, 3, padding=1))
    value = Auto()(stack(c, scale((2, 4, 4), 2, 4, 4) @ c)).value
    assert value == 0
    assert torch.autograd.grad(value, c.weight)[0].isfinite().all()


@each([Exact(), Auto(), Gram(3), PowerIteration(3), Lanczos(1e-9, 3), Fourier()])
def test_no_graph_is_kept_without_gradient(norm):
    c = conv((2, 4, 4), 3, 3, padding=1)
    with torch.no_grad():
        assert not norm(c).value.requires_grad
    assert norm(c).value.requires_grad
