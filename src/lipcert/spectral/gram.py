"""Gram iteration: an upper bound from matrix products alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Inexact
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.linear_map import LinearMap
from lipcert.simplify import simplify
from lipcert.spectral.exact import closed_form, nonzero, scaled_gram, without_isometries
from lipcert.spectral.fourier import _chunks, as_convolution, symbol
from lipcert.spectral.strategy import Strategy

DENSE_SIDE = 4096


@dataclass(frozen=True)
class Gram(Strategy):
    """G_0 = A, G_(i+1) = G_i^T G_i; ||A|| <= N(G_t)^(2^-t) for a norm N above the spectral one.

    N is the smallest of three: Frobenius; the largest row sum; and the bound of Wolkowicz and
    Styan from the trace and the trace of the square, which is exact where all singular values
    are equal (there Frobenius converges slowly). In float64, on the dense matrix where its smaller
    side is at most 4096, else on the symbols of a convolution.

    Attributes:
        steps: t >= 1.

    Reference: arXiv 2305.16173 (Gram iteration); Wolkowicz & Styan 1980.
    """

    steps: int = 6
    kind: ClassVar[Kind] = Kind.UPPER

    def __post_init__(self):
        if self.steps < 1:
            raise LipcertError(f"Gram(steps={self.steps}): steps must be at least 1.")

    def __call__(self, map: LinearMap) -> Constant:
        map = without_isometries(simplify(map.to(torch.float64)))
        if (closed := closed_form(map)) is not None:
            return Constant(closed, self.kind)
        if min(map.in_size, map.out_size) <= DENSE_SIDE:
            gram, scale = scaled_gram(map)
            return Constant(scale * self._close(gram[None]), self.kind)
        conv = as_convolution(map)
        if conv is None:
            raise LipcertError(
                f"Gram() fits maps whose smaller side is at most {DENSE_SIDE} and convolutions, "
                f"not the {type(map).__name__} {map.in_shape} -> {map.out_shape}. Use norm=Auto()."
            )
        scale = nonzero(conv.weight.abs().max())
        largest = [
            self._close((b @ b.mH if b.shape[-2] <= b.shape[-1] else b.mH @ b).flatten(0, 1))
            for b in (symbol(conv, f) / scale for f in _chunks(conv))
        ]
        return Constant(scale * torch.stack(largest).max(), self.kind)

    def _close(self, gram: Inexact[Tensor, "batch n n"]) -> Tensor:
        """The largest of the bounds on sqrt(lambda_max) for a batch of Gram matrices."""
        log = gram.real.new_zeros(len(gram))  # log of the factors taken out so far
        for step in range(self.steps):
            size = torch.linalg.matrix_norm(gram).detach()
            size = size.where(size != 0, 1)
            gram = gram / size[:, None, None]
            log = log + size.log() / 2**step
            if step < self.steps - 1:
                gram = gram @ gram
        n = gram.shape[-1]
        frobenius = torch.linalg.matrix_norm(gram)
        row_sum = gram.abs().sum(-1).amax(-1)
        mean = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1) / n
        # The spread from differences: those of squares would lose half of the digits.
        centre = mean[:, None, None] * torch.eye(n, dtype=gram.dtype, device=gram.device)
        spread = torch.linalg.matrix_norm(gram - centre)
        wolkowicz_styan = mean + ((n - 1) / n) ** 0.5 * spread
        bound = torch.stack([frobenius, row_sum, wolkowicz_styan]).amin(0)
        zero = bound == 0
        bound = bound.where(~zero, 1)
        norm = (log / 2).exp() * bound ** (0.5**self.steps)
        return norm.where(~zero, 0).max()
