"""A dense layer orthogonalised by a Cholesky factor."""

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.layers.orthogonal import OrthogonalLinear


class CholeskyLinear(OrthogonalLinear):
    """A dense layer whose matrix is L^-1 X, nearly orthogonal and never beyond.

    X is the weight (transposed if it has more rows than columns) and L the Cholesky factor of
    S = X X^T + eps m I, with m the mean of the diagonal of X X^T. Then
    (L^-1 X) (L^-1 X)^T = L^-1 (S - eps m I) L^-T = I - eps m L^-1 L^-T, which is at most I: a
    contraction for every weight. A singular value t of X becomes t / sqrt(t^2 + eps m).

    Args:
        in_features: Number of inputs.
        out_features: Number of outputs.
        bias: Whether there is one.
        eps: The share of the mean that is added, > 0. Rounding needs some: with 1e-3 it is hidden
            in float32 up to sides of some thousand.

    Attributes:
        weight: The free parameter, shape (out_features, in_features).
        bias: Shape (out_features,), or None.

    Raises:
        LipcertError: A size or eps is not positive.

    Reference: arXiv 2310.02513.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, eps: float = 1e-3):
        super().__init__(in_features, out_features, bias)
        if not 0 < eps < float("inf"):
            raise LipcertError(f"CholeskyLinear(eps={eps}): needs a positive number, 1e-3 say")
        self.eps = eps

    def transformed(self) -> Float[Tensor, "out in"]:
        """The matrix, made anew."""
        rows, columns = self.weight.shape
        turned = rows > columns
        x = self.weight.mT if turned else self.weight
        # The result does not depend on the scale of X. Here it makes the mean of the diagonal 1, or
        # all zero for a zero weight, where the factor is still defined.
        with torch.no_grad():
            largest = x.abs().max()
            largest = largest.where(largest > 0, 1)
            frobenius = torch.linalg.vector_norm(x / largest).clamp(min=1)
        x = x / largest / frobenius * len(x) ** 0.5
        gram = x @ x.mT
        mean = gram.diagonal().mean()
        mean = mean.where(mean > 0, 1)  # 1 but for rounding; kept for its gradient
        # Without checks: NaN weights give NaN, as in any other layer.
        eye = torch.eye(len(gram), dtype=x.dtype, device=x.device)
        factor = torch.linalg.cholesky_ex(gram + self.eps * mean * eye).L
        result = torch.linalg.solve_triangular(factor, x, upper=False)
        return result.mT if turned else result

    def extra_repr(self) -> str:
        """Sizes and eps, for ``print(model)``."""
        return f"{super().extra_repr()}, eps={self.eps}"
