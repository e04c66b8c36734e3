"""Roots of S: gradients against finite differences, and fewer rows of the same S."""

import pytest
import torch

from lipcert.bounds.roots import fewer_rows, gram, half_inverse, raised_factor

both = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])


@both
def test_the_gradient_of_a_gram_matrix(dtype):
    root = torch.randn(3, 5, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, 4, 4, dtype=dtype)  # not Hermitian: S need not be read as if it were
    assert torch.autograd.gradcheck(lambda root: (gram(root) * weight).sum(), root)


@both
def test_the_gradient_of_what_is_made_of_a_root_and_its_multipliers(dtype):
    """X^H (G - S)^-1 X by its root, in S, G and X."""
    root = (torch.randn(3, 5, 4, dtype=dtype) / 4).requires_grad_()
    right = torch.randn(3, 4, 6, dtype=dtype, requires_grad=True)
    gains = (4 + torch.rand(4)).requires_grad_()
    weight = torch.randn(3, 6, 6, dtype=dtype)

    def value(root, right, gains):
        lowered, factor, raised = raised_factor(gram(root), gains)
        torch.testing.assert_close(raised, gains, rtol=1e-9, atol=0)
        found = half_inverse(lowered, factor, right)
        return (gram(found) * weight).sum()

    assert torch.autograd.gradcheck(value, (root, right, gains), rtol=1e-3)
    lowered, factor, _ = raised_factor(gram(root), gains)
    exact = right.mH @ torch.linalg.solve(lowered, right)
    torch.testing.assert_close(gram(half_inverse(lowered, factor, right)), exact)


@both
@pytest.mark.parametrize("differentiable", [True, False])
def test_fewer_rows_of_the_same_matrix(dtype, differentiable):
    root = torch.randn(2, 30, 4, dtype=dtype)
    root[..., 1] = 0
    root[..., 3] = root[..., 2] * (1 + 1e-12)  # the difference of the two has 4 digits
    found = fewer_rows(root.requires_grad_(differentiable)).detach()
    assert found.shape == (2, 4, 4)
    torch.testing.assert_close(found.mH @ found, root.detach().mH @ root.detach())
    assert (found[..., 1] == 0).all()
    difference = torch.tensor([0.0, 0.0, 1.0, -1.0], dtype=dtype)
    for matrix in (found, root.detach()):
        size = torch.linalg.vector_norm(matrix @ difference, dim=1)
        expected = 1e-12 * torch.linalg.vector_norm(root.detach()[..., 2], dim=1)
        torch.testing.assert_close(size, expected, rtol=1e-2, atol=0)


@both
def test_the_gradient_through_fewer_rows(dtype):
    root = torch.randn(2, 9, 3, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, 3, 3, dtype=dtype)
    assert torch.autograd.gradcheck(lambda root: (gram(fewer_rows(root)) * weight).sum(), root)
