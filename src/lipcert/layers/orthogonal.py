"""What dense layers with a transformed weight share."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.layers.cache import Cache
from lipcert.linear_kinds import Dense
from lipcert.spectral import Exact


def exact_norm(matrix: Float[Tensor, "m n"]) -> Float[Tensor, ""]:
    """The spectral norm in float64, without a gradient; NaN where an entry is not finite."""
    with torch.no_grad():
        rows, columns = matrix.shape
        return Exact()(Dense((columns,), (rows,), matrix.detach())).value


class OrthogonalLinear(nn.Module, ABC):
    """A dense layer whose matrix is made of a free parameter; kinds differ in `transformed`.

    Args:
        in_features: Number of inputs.
        out_features: Number of outputs.
        bias: Whether there is one; it starts at zero.

    Attributes:
        weight: The free parameter, shape (out_features, in_features); it starts orthogonal.
        bias: Shape (out_features,), or None.

    Raises:
        LipcertError: A size is not positive.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        if min(in_features, out_features) < 1:
            raise LipcertError(
                f"{type(self).__name__}({in_features}, {out_features}): needs positive sizes"
            )
        weight = torch.empty(out_features, in_features)
        self.weight = nn.Parameter(nn.init.orthogonal_(weight))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self._matrix: Cache[Tensor] = Cache()
        self._constant: Cache[Constant] = Cache()

    @abstractmethod
    def transformed(self) -> Float[Tensor, "out in"]:
        """The matrix, made anew."""

    def matrix(self) -> Float[Tensor, "out in"]:
        """The matrix as it is applied, differentiable in the weight."""
        return self._matrix((self.weight,), self.transformed)

    def constant(self) -> Constant:
        """The norm of the matrix with the weights as they are, by eigenvalues in float64."""
        with torch.no_grad():
            return self._constant(
                (self.weight,), lambda: Constant(exact_norm(self.matrix()), Kind.UPPER)
            )

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The dense map and its bias."""
        return F.linear(x, self.matrix(), self.bias)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        out, into = self.weight.shape
        return f"{into}, {out}, bias={self.bias is not None}"
