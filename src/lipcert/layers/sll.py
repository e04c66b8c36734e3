"""SDP-based Lipschitz layers (SLL): a convex-potential step with one step size a unit."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lipcert.layers.cache import Cache
from lipcert.layers.potential import ConvexPotential, Terms

# Added to the row sums. It only makes steps shorter, and keeps them finite for zero rows.
_EPSILON = 1e-6


class _SLL(ConvexPotential):
    """y = x - W^T (T relu(W x + b)) with T_i = 2 / (sum_j |W W^T|_ij |q_j| / |q_i| + 1e-6).

    With Q = diag(|q|) the matrix Q^-1 |W W^T| Q has the row sums s_i that stand here, so diag(s) -
    W W^T is similar to a diagonally dominant matrix and W W^T <= diag(s) <= 2 T^-1: the condition
    of `ConvexPotential`. A unit with q_i = 0 has T_i = 0; it adds nothing, and the others meet the
    condition without it. W is divided by its largest entry where that is above 1, which changes
    nothing but keeps its squares in range.

    The published code has no 1e-6 here for convolutions, so it divides by 0 for zero rows; in dense
    layers it adds one to |q_i| instead, which makes T too long.
    """

    def __init__(self, weight_shape: tuple[int, ...], padding: int = 0):
        super().__init__(weight_shape, padding)
        self.q = nn.Parameter(torch.empty(weight_shape[0]))
        self._cache: Cache[Terms] = Cache()
        nn.init.xavier_normal_(self.weight)
        bound = 1 / math.sqrt(math.prod(weight_shape[1:]))
        nn.init.uniform_(self.bias, -bound, bound)

    def terms(self) -> Terms:
        """W, T and b, all with the scale of W taken out."""
        return self._cache((self.weight, self.bias, self.q), self._terms)

    def _terms(self) -> Terms:
        scale = self.weight.detach().abs().max().clamp(min=1)
        weight = self.weight / scale
        largest = self.q.detach().abs().max()
        q = self.q.abs() / largest.where(largest != 0, 1)
        sums = _magnitudes(weight) @ q + _EPSILON / scale / scale * q
        return Terms(weight, 2 * q / sums.where(sums > 0, 1), self.bias / scale)


def _magnitudes(weight: Float[Tensor, "width ..."]) -> Float[Tensor, "width width"]:
    """|W W^T|; of a convolution summed over all shifts of one kernel against the other."""
    if weight.ndim == 2:
        return (weight @ weight.mT).abs()
    sides = weight.shape[2] - 1, weight.shape[3] - 1
    return F.conv2d(weight, weight, padding=sides).abs().sum((2, 3))


class SLLLinear(_SLL):
    """The dense layer y = x - W^T (T relu(W x + b)), 1-Lipschitz in L2 for all weights.

    T_i = 2 / (sum_j |W W^T|_ij |q_j| / |q_i| + 1e-6). It acts on the last axis, as `nn.Linear`.

    Args:
        features: Size of the last axis, of input and output.
        width: Rows of W; `features` if not given.

    Attributes:
        weight: W, `(width, features)`.
        bias: b, `(width,)`.
        q: Weights of the row sums, `(width,)`; only their sizes matter.

    Raises:
        LipcertError: A size is not positive.

    Reference: arXiv 2303.03169 (SDP-based Lipschitz layers).
    """

    def __init__(self, features: int, width: int | None = None):
        super().__init__((features if width is None else width, features))
        nn.init.uniform_(self.q)


class SLLConv2d(_SLL):
    """The convolution y = x - K^T * (T relu(K * x + b)), 1-Lipschitz in L2 for all weights.

    T_i = 2 / (sum_j sum_taps |K K^T|_ij |q_j| / |q_i| + 1e-6), for every size of the input. The
    padding is zeros, the stride 1, and the output has the size of the input.

    Args:
        channels: Of input and output.
        width: Channels of K x; `channels` if not given.
        kernel_size: Taps along both axes.
        padding: Zeros around the input before K.

    Attributes:
        weight: K, `(width, channels, kernel_size, kernel_size)`.
        bias: b, `(width,)`.
        q: Weights of the row sums, `(width,)`; only their sizes matter.

    Raises:
        LipcertError: A size is not positive, or the padding is negative.

    Reference: arXiv 2303.03169 (SDP-based Lipschitz layers).
    """

    def __init__(
        self, channels: int, width: int | None = None, kernel_size: int = 3, padding: int = 1
    ):
        width = channels if width is None else width
        super().__init__((width, channels, kernel_size, kernel_size), padding)
        nn.init.normal_(self.q)
