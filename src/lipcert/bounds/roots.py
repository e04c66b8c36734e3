"""Linear algebra of roots R of S = R^H R, of one matrix or of many frequencies.

Roots keep all digits where the next map cancels what is large: in S itself half would be lost.
"""

from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def gram(
    root: Float[Tensor, "*f k n"] | Complex[Tensor, "*f k n"],
) -> Float[Tensor, "*f n n"] | Complex[Tensor, "*f n n"]:
    """S = R^H R."""
    return _Gram.apply(root)


class _Gram(torch.autograd.Function):
    """R^H R, with one product backwards instead of two."""

    @staticmethod
    def forward(ctx: Any, root: Tensor) -> Tensor:
        ctx.save_for_backward(root)
        return root.mH @ root

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return root @ (gradient + gradient.mH)


def half_inverse(
    matrices: Float[Tensor, "*f m m"] | Complex[Tensor, "*f m m"],
    factor: Float[Tensor, "*f m m"] | Complex[Tensor, "*f m m"],
    right: Float[Tensor, "*f m n"] | Complex[Tensor, "*f m n"],
) -> Float[Tensor, "*f m n"] | Complex[Tensor, "*f m n"]:
    """A root C = L^-1 X of X^H M^-1 X, for what is made of C^H C alone.

    Its gradient counts on that: then it is of the form C H with Hermitian H, and needs no
    derivative of the Cholesky factor.

    Args:
        matrices: M.
        factor: L, with L L^H = M; no gradient goes into it.
        right: X.
    """
    return _HalfInverse.apply(matrices, factor.detach(), right)


class _HalfInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrices: Tensor, factor: Tensor, right: Tensor) -> Tensor:
        root = torch.linalg.solve_triangular(factor, right, upper=False)
        ctx.save_for_backward(factor, root)
        return root

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
        factor, root = ctx.saved_tensors
        both = torch.cat([gradient, root], -1)
        into, solved = torch.linalg.solve_triangular(factor.mH, both, upper=True).chunk(2, -1)
        product = into @ solved.mH
        return (product + product.mH) * -0.25, None, into


def raised_factor(
    inner: Float[Tensor, "*f m m"] | Complex[Tensor, "*f m m"], gains: Float[Tensor, " m"]
) -> tuple[Tensor, Tensor, Float[Tensor, " m"]]:
    """G - S, its Cholesky factor, and G, raised as far as rounding asks for.

    Where they are far from above S, all are raised to its largest eigenvalue.
    """
    least = 16 * len(gains) * torch.finfo(gains.dtype).eps
    tiny = torch.finfo(gains.dtype).tiny ** 0.5  # so that zero has a factor
    for chosen in (gains, None):
        # In the second round, above S whatever was chosen.
        start = chosen if chosen is not None else torch.maximum(gains, largest_eigenvalue(inner))
        margin = least
        while margin < 16:
            raised = start * (1 + margin) + tiny
            # Half of the margin is for what the sum and the factor themselves round.
            lowered = torch.diag(raised / (1 + margin / 2)) - inner
            left, info = torch.linalg.cholesky_ex(lowered.detach())
            if not bool(info.any()):
                return lowered, left, raised
            if not bool(start.isfinite().all()):
                break
            margin *= 16
    unknown = torch.full_like(inner, torch.nan)
    return unknown, unknown, gains


def fewer_rows(root: Float[Tensor, "*f k n"] | Complex[Tensor, "*f k n"]) -> Tensor:
    """R with as many rows as columns and the same S."""
    if not root.requires_grad:
        return torch.linalg.qr(root, mode="r")[1]
    # Turning R is no change of S: the gradient needs none of Q.
    return torch.linalg.qr(root.detach())[0].mH @ root


def largest_eigenvalue(
    matrices: Float[Tensor, "*f n n"] | Complex[Tensor, "*f n n"],
) -> Float[Tensor, ""]:
    """The largest eigenvalue of any; in the gradient only its own vector counts."""
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    with torch.no_grad():
        if not _reals(flat).sum().isfinite():
            return flat.real.new_full((), torch.nan)
        values = torch.linalg.eigvalsh(flat)[:, -1]
        where = values.argmax()
        if not matrices.requires_grad:
            return values[where]
        top = torch.linalg.eigh(flat[where])[1][:, -1]
    seen = (top.conj() @ flat[where] @ top).real
    return values[where] + seen - seen.detach()


def square_root(value: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The roots, 0 with a gradient of 0 where a value is not above 0; NaN stays."""
    positive = ~(value <= 0)
    return value.where(positive, 1).sqrt().where(positive, 0)


def power_of_two(numbers: Tensor) -> Tensor:
    """About the size of the largest entry, a power of two, so that nothing is rounded.

    Multiply with its inverse, which is exact too: complex numbers are slow to divide.
    """
    least, greatest = _reals(numbers.detach()).aminmax()  # without a copy
    largest = torch.maximum(-least, greatest)
    power = 2.0 ** torch.floor(torch.log2(largest.where(largest != 0, 1)))
    return power.clamp(min=torch.finfo(power.dtype).tiny)  # so that it has an inverse


def _reals(numbers: Tensor) -> Float[Tensor, "..."]:
    """Real and imaginary parts as numbers of their own."""
    return torch.view_as_real(numbers.resolve_conj()) if numbers.is_complex() else numbers
