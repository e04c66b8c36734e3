"""Almost-orthogonal layers (AOL): linear maps whose columns are rescaled to norm at most 1."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.layers.cache import Cache
from lipcert.layers.potential import positive

# Against the square of the largest entry. Columns with row sums below this are left unscaled.
_SMALLEST = 1e-30


class _AOL(nn.Module):
    """A linear map P D with D_jj = (sum_i |P^T P|_ij)^(-1/2).

    diag(s) - P^T P with s_j = sum_i |P^T P|_ij is diagonally dominant, hence P^T P <= diag(s), and
    (P D)^T (P D) = D P^T P D <= I: the norm is at most 1 for every P. D may be smaller. The entries
    are divided by the largest one first, which changes nothing but keeps their squares in range.
    Columns whose sums are then below 1e-30, zero columns above all, get 1 instead of an inverse
    root, which is less.
    """

    def __init__(self, weight: Tensor, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight))) if bias else None
        self._cache: Cache[Tensor] = Cache()

    def _rescaled(self) -> Tensor:
        scale = self.weight.detach().abs().max()
        weight = self.weight / scale.where(scale != 0, 1)
        sums = self._sums(weight)
        sums = sums.where(sums > _SMALLEST, 1)
        return weight * sums.rsqrt().reshape(-1, *(1,) * (weight.ndim - 2))

    def _sums(self, weight: Tensor) -> Float[Tensor, " inputs"]:
        raise NotImplementedError

    def constant(self) -> Constant:
        """The Lipschitz constant of the layer: 1, for all weights."""
        return Constant(torch.ones((), dtype=torch.float64, device=self.weight.device), Kind.UPPER)


class AOLLinear(_AOL):
    """The dense layer y = P D x + b, 1-Lipschitz in L2 for all weights.

    D_jj = (sum_i |P^T P|_ij)^(-1/2). It acts on the last axis, as `nn.Linear`. At the start P is
    orthogonal (or part of an orthogonal matrix).

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output.
        bias: Whether there is a b.

    Attributes:
        weight: P, `(out_features, in_features)`.
        bias: b, `(out_features,)`, or None.

    Raises:
        LipcertError: A size is not positive.

    Reference: arXiv 2208.03160, theorem 1.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        positive(self, (in_features, out_features))
        super().__init__(nn.init.orthogonal_(torch.empty(out_features, in_features)), bias)

    def matrix(self) -> Float[Tensor, "out in"]:
        """P D."""
        return self._cache((self.weight,), self._rescaled)

    def forward(self, x: Float[Tensor, "b *rest n"]) -> Float[Tensor, "b *rest m"]:
        """Applies the layer."""
        return F.linear(x, self.matrix(), self.bias)

    def _sums(self, weight: Tensor) -> Tensor:
        return (weight.mT @ weight).abs().sum(0)

    def extra_repr(self) -> str:
        """The sizes, for ``print(model)``."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, bias={self.bias is not None}"


class AOLConv2d(_AOL):
    """The convolution y = (K D) * x + b, 1-Lipschitz in L2 for all weights and sizes of input.

    With zero padding it is a part of the convolution on the whole plane. There, input cell p of
    channel i meets all cells in one column of P^T P; the sum s of its sizes depends on i and, with
    a stride, on p modulo the stride, as only every stride-th tap reads that cell. D_i is s^(-1/2)
    for the largest of them. At the start the middle tap is orthogonal (or part of an orthogonal
    matrix) and the others are zero.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Taps along both axes.
        stride: Along both axes.
        padding: Zeros around the input.
        bias: Whether there is a b.

    Attributes:
        weight: K, `(out_channels, in_channels, kernel_size, kernel_size)`.
        bias: b, `(out_channels,)`, or None.

    Raises:
        LipcertError: A size is not positive, or the padding is negative.

    Reference: arXiv 2208.03160, theorem 2 (stride 1).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ):
        positive(self, (in_channels, out_channels, kernel_size, stride))
        if padding < 0:
            raise LipcertError(f"AOLConv2d: padding={padding} must not be negative")
        weight = torch.zeros(out_channels, in_channels, kernel_size, kernel_size)
        middle = kernel_size // 2
        weight[:, :, middle, middle] = nn.init.orthogonal_(torch.empty(out_channels, in_channels))
        super().__init__(weight, bias)
        self.stride, self.padding = stride, padding

    def kernel(self) -> Float[Tensor, "out in k k"]:
        """K D."""
        return self._cache((self.weight,), self._rescaled)

    def forward(self, x: Float[Tensor, "b in h w"]) -> Float[Tensor, "b out *rest"]:
        """Applies the layer."""
        return F.conv2d(x, self.kernel(), self.bias, self.stride, self.padding)

    def _sums(self, weight: Tensor) -> Tensor:
        """The row sums of |P^T P| on the whole plane, the largest phase of each channel.

        With s x s pixels made channels, each phase is a channel of its own, and the stride is 1.
        """
        missing = -weight.shape[2] % self.stride
        phases = F.pixel_unshuffle(F.pad(weight, (0, missing, 0, missing)), self.stride)
        # All shifts of one kernel against another; a transposed convolution multiplies no zeros.
        meetings = F.conv_transpose2d(phases.transpose(0, 1).flip(2, 3), phases)
        return meetings.abs().sum((0, 2, 3)).reshape(-1, self.stride**2).amax(1)

    def extra_repr(self) -> str:
        """The geometry, for ``print(model)``."""
        outputs, inputs, taps, _ = self.weight.shape
        geometry = f"kernel_size={taps}, stride={self.stride}, padding={self.padding}"
        return f"{inputs}, {outputs}, {geometry}, bias={self.bias is not None}"
