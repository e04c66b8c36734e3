"""Convex potential layers (CPL): a gradient step whose length is told by the norm of its weight."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lipcert.convolution import convolution
from lipcert.errors import LipcertError
from lipcert.layers.potential import ConvexPotential, Terms, positive
from lipcert.linear_kinds import Dense
from lipcert.linear_map import LinearMap, Shape
from lipcert.spectral import Auto, Fourier

# h = 2 / (sigma^2 + 1e-4) = 2 / hypot(sigma, 1e-2)^2.
_REGULAR = 1e-2
# The divisor in use is rounded to the precision of the weight: this keeps it above the true one.
_ULPS = 8
_LARGEST_SIDE = 1024  # of a convolution's map whose eigenvalues are taken


class _CPL(ConvexPotential):
    """y = x - h W^T relu(W x + b) with h = 2 / (sigma^2 + 1e-4), sigma the norm of W.

    Written as K = W / d, c = b / d, t = 2 with d^2 = sigma^2 + 1e-4, so that nothing overflows.
    The condition of `ConvexPotential` is then |K| <= 1, that is |W| <= d.

    While training, sigma is an estimate: one step of power iteration a call, from the vector that
    the last one left, with gradient through sigma at that vector. It can be below |W|, so there the
    layer may stretch distances a little. In eval mode sigma is a true bound of |W| on this size of
    input, by `Auto` or `Fourier`, in float64 and rounded up: the constant of the layer in eval mode
    is 1 for every weight, also one never trained with. It is worked out again when the weight
    changed, which every call checks by comparing it with a copy; as a gradient of it would cost
    eigenvectors at each call, it counts as a number there.

    The published code takes 100 steps of power iteration there, which is below |W|: where they have
    not converged its layer is not 1-Lipschitz.

    Attributes:
        direction: The vector of the power iteration, `(1, *size)`, saved with the weights.
    """

    direction: Tensor
    _kept: Tensor
    _divisor: Tensor

    def __init__(self, weight_shape: tuple[int, ...], size: Shape, padding: int = 0):
        super().__init__(weight_shape, padding)
        positive(self, size)
        self.size = size
        if len(size) == 3 and weight_shape[-1] > min(size[1:]) + 2 * padding:
            raise LipcertError(
                f"{type(self).__name__}: a kernel of {weight_shape[-1]} taps does not fit into an "
                f"input of the size {size[1:]} with padding={padding}"
            )
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(math.prod(weight_shape[1:]))
        nn.init.uniform_(self.bias, -bound, bound)
        self.register_buffer("direction", _unit(torch.randn(1, *size)))
        never = torch.full_like(self.weight, math.nan).detach()
        self.register_buffer("_kept", never, persistent=False)
        self.register_buffer("_divisor", torch.ones(()), persistent=False)

    def _apply(self, fn, recurse=True):
        # In another precision the copy may equal the weight and the divisor be rounded down.
        super()._apply(fn, recurse)
        self._kept.fill_(math.nan)
        return self

    def forward(self, x: Float[Tensor, "b *sample"]) -> Float[Tensor, "b *sample"]:
        """Applies the layer; in training mode after one step of power iteration."""
        if len(self.size) == 3 and x.shape[1:] != self.size:
            raise LipcertError(
                f"{type(self).__name__} was made for samples of the shape {self.size}, as the norm "
                f"of its convolution depends on it, but its input has the shape {tuple(x.shape)}; "
                "make it with the size of the input that it gets"
            )
        return self.step(x, self._terms(self._estimate()) if self.training else self.terms())

    def terms(self) -> Terms:
        """W and b divided by a bound of |W|, and the number 2; sigma has no gradient."""
        _keep_divisor(self.weight.detach(), self._kept, self._divisor, self.size, self.padding)
        return self._terms(self._divisor.clone())

    def _terms(self, divisor: Tensor) -> Terms:
        gain = torch.full_like(self.bias, 2.0)
        return Terms(self.weight / divisor, gain, self.bias / divisor)

    def _estimate(self) -> Tensor:
        """The divisor from one step of power iteration, differentiable in the weight."""
        with torch.no_grad():
            scale = self.weight.abs().max()
            scale = scale.where(scale != 0, 1)
            weight = self.weight / scale
            image = _unit(self._onto(self.direction, weight))
            back = self._back(image, weight)
            # A zero weight leaves no direction: the last one stays.
            self.direction.copy_(_unit(back).where(back.abs().max() > 0, self.direction))
            direction = self.direction.clone()
        sigma = scale * (image * self._onto(direction, self.weight / scale)).sum()
        return torch.hypot(sigma, sigma.new_tensor(_REGULAR))

    def _onto(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight) if x.ndim == 2 else F.conv2d(x, weight, padding=self.padding)

    def _back(self, y: Tensor, weight: Tensor) -> Tensor:
        return y @ weight if y.ndim == 2 else F.conv_transpose2d(y, weight, padding=self.padding)


def _unit(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x)
    return x / norm.where(norm != 0, 1)


# An op of its own, as the norm is found with numbers that no compiler can trace.
@torch.library.custom_op("lipcert::keep_divisor", mutates_args=("kept", "divisor"))
def _keep_divisor(
    weight: Tensor, kept: Tensor, divisor: Tensor, size: Sequence[int], padding: int
) -> None:
    """Sets the divisor for a weight, if that is not the one it was kept for."""
    if torch.equal(weight, kept):
        return
    map: LinearMap
    if weight.ndim == 2:
        map = Dense(tuple(size), (len(weight),), weight)
    else:
        map = convolution(weight, tuple(size), (1, 1), ((padding, padding),) * 2, (1, 1), 1)
    with torch.no_grad():
        # By frequency it is a little looser and takes a fraction of the time.
        large = weight.ndim == 4 and min(map.in_size, map.out_size) > _LARGEST_SIDE
        norm = (Fourier() if large else Auto())(map).value
        upwards = 1 + _ULPS * torch.finfo(divisor.dtype).eps
        divisor.copy_(torch.hypot(norm, norm.new_tensor(_REGULAR)) * upwards)
        kept.copy_(weight)


class CPLLinear(_CPL):
    """The dense layer y = x - h W^T relu(W x + b), 1-Lipschitz in L2 in eval mode.

    h = 2 / (sigma^2 + 1e-4), sigma the norm of W: in eval mode exact, while training an estimate by
    one step of power iteration a call. It acts on the last axis, as `nn.Linear`.

    Args:
        features: Size of the last axis, of input and output.
        width: Rows of W; `features` if not given.

    Attributes:
        weight: W, `(width, features)`.
        bias: b, `(width,)`.
        direction: The vector of the power iteration, `(1, features)`.

    Raises:
        LipcertError: A size is not positive.

    Reference: arXiv 2110.12690 (convex potential layers).
    """

    def __init__(self, features: int, width: int | None = None):
        super().__init__((features if width is None else width, features), (features,))


class CPLConv2d(_CPL):
    """The convolution y = x - h K^T * relu(K * x + b), 1-Lipschitz in L2 in eval mode.

    h = 2 / (sigma^2 + 1e-4), sigma the norm of the convolution on the given size of input: in eval
    mode a true bound of it, while training an estimate by one step of power iteration a call. The
    padding is zeros, the stride 1, and the output has the size of the input.

    Args:
        channels: Of input and output.
        size: Height and width of the input.
        width: Channels of K x; `channels` if not given.
        kernel_size: Taps along both axes.
        padding: Zeros around the input before K.

    Attributes:
        weight: K, `(width, channels, kernel_size, kernel_size)`.
        bias: b, `(width,)`.
        direction: The vector of the power iteration, `(1, channels, height, width)`.

    Raises:
        LipcertError: A size is not positive, the padding is negative, or the kernel does not fit
            into the padded input; in ``forward``, the input has another size.

    Reference: arXiv 2110.12690 (convex potential layers).
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        width: int | None = None,
        kernel_size: int = 3,
        padding: int = 1,
    ):
        width = channels if width is None else width
        shape = width, channels, kernel_size, kernel_size
        super().__init__(shape, (channels, *size), padding)
