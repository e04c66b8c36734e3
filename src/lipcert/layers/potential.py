"""The step that convex-potential layers share, and the checks of their sizes."""

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lipcert.convolution import convolution
from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.linear_kinds import Dense
from lipcert.linear_map import LinearMap, Shape


class Terms(NamedTuple):
    """K, t and c of the step y = x - K^T (t relu(K x + c)).

    Attributes:
        kernel: K, of the shape of the weight.
        gain: t >= 0, one number a row of K, `(width,)`.
        offset: c, `(width,)`.
    """

    kernel: Tensor
    gain: Tensor
    offset: Tensor


class ConvexPotential(nn.Module):
    """y = x - K^T (t relu(K x + c)): a step down the gradient of a convex function.

    The Jacobian is I - K^T D K with 0 <= D <= diag(t). It is 1-Lipschitz in L2 if K K^T <= 2
    diag(t)^-1 in the order of symmetric matrices (on the rows with t > 0; the others do not act):
    with z the change of relu(K x + c) and v = K dx that of its argument,

        |dy|^2 = |dx|^2 - 2 v^T t z + |K^T t z|^2 <= |dx|^2 - 2 z^T t (v - z) <= |dx|^2,

    as every entry of z lies between 0 and its entry of v. Only what is under `relu` matters, so
    the argument holds for a convolution with any padding on any size, as long as the way back is
    its exact adjoint: a padded convolution is a part of the one on the whole plane.

    Subclasses choose K, t and c.

    Attributes:
        weight: `(width, features)`, or `(width, channels, kernel, kernel)` of a convolution.
        bias: `(width,)`.

    Reference: arXiv 2110.12690; arXiv 2303.03169.
    """

    def __init__(self, weight_shape: Shape, padding: int = 0):
        super().__init__()
        positive(self, weight_shape)
        if padding < 0:
            raise LipcertError(f"{type(self).__name__}: padding={padding} must not be negative")
        self.padding = padding
        self.weight = nn.Parameter(torch.empty(weight_shape))
        self.bias = nn.Parameter(torch.empty(weight_shape[0]))

    @abstractmethod
    def terms(self) -> Terms:
        """K, t and c as they are in eval mode, differentiable unless a subclass says otherwise."""

    def forward(self, x: Float[Tensor, "b *sample"]) -> Float[Tensor, "b *sample"]:
        """Applies the layer."""
        return self.step(x, self.terms())

    def step(self, x: Float[Tensor, "b *sample"], terms: Terms) -> Float[Tensor, "b *sample"]:
        """The step with given K, t and c."""
        kernel, gain, offset = terms
        if kernel.ndim == 2:
            return x - (gain * F.relu(F.linear(x, kernel, offset))) @ kernel
        inside = F.relu(F.conv2d(x, kernel, offset, padding=self.padding))
        return x - F.conv_transpose2d(_column(gain) * inside, kernel, padding=self.padding)

    def map(self, kernel: Tensor, shape: Shape) -> LinearMap:
        """K as a linear map on samples of a shape."""
        if kernel.ndim == 2:
            return Dense(shape, (*shape[:-1], len(kernel)), kernel)
        sides = ((self.padding, self.padding),) * 2
        return convolution(kernel, shape, (1, 1), sides, (1, 1), 1)

    def constant(self) -> Constant:
        """The Lipschitz constant of the layer in eval mode: 1, for all weights."""
        return Constant(torch.ones((), dtype=torch.float64, device=self.weight.device), Kind.UPPER)

    def extra_repr(self) -> str:
        """The shape of the weight and the padding, for ``print(model)``."""
        shape = "x".join(map(str, self.weight.shape))
        return shape if self.weight.ndim == 2 else f"{shape}, padding={self.padding}"


def positive(layer: nn.Module, sizes: Shape) -> None:
    """Raises LipcertError unless all sizes of a layer are positive."""
    if min(sizes) < 1:
        raise LipcertError(
            f"{type(layer).__name__} got the sizes {tuple(sizes)}; features, channels, widths, "
            "kernels and strides must all be at least 1"
        )


def _column(vector: Tensor) -> Tensor:
    return vector[:, None, None]
