"""Layers orthogonalised by Bjorck's iteration: dense, and convolutions by their reshaped kernel."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.layers.cache import Cache
from lipcert.layers.orthogonal import OrthogonalLinear, exact_norm

# Steps made of one Gram matrix. Rounding can leave an eigenvalue of it below 0, and a step takes
# that times 2.25 or more: not far in so few.
_BLOCK = 7


def bjorck(weight: Float[Tensor, "m n"], steps: int) -> Float[Tensor, "m n"]:
    """The matrix with its singular values driven to 1, never beyond.

    The weight is first divided by s = (sum of sigma_i^16)^(1/16) over its singular values, found as
    |(W W^T)^4|_F^(1/8). That is at least the spectral norm, and at most min(m, n)^(1/16) times it:
    less than 2 up to a side of 65,535. Or by the root of the largest sum of sizes in a row of W
    W^T, which is at least the norm as well, if that is less: it is the norm itself where the rows
    are orthogonal. Neither needs an iteration whose state could be stale. Then each step W <- 1.5 W
    - 0.5 W W^T W maps a singular value t to 1.5 t - 0.5 t^3, which rises from 0 to 1 on [0, 1]: all
    of them stay in [0, 1] and rise. The result is a contraction whatever the number of steps, and
    orthogonal in the limit where no singular value is 0; small ones grow by 1.5 a step.

    Args:
        weight: Any matrix; a zero matrix stays zero.
        steps: How many steps, >= 0.

    Returns:
        The matrix, differentiable in the weight.

    Reference: Bjorck and Bowie, SIAM J. Numer. Anal. 8 (1971), 358; arXiv 1811.05381.
    """
    if weight.shape[0] > weight.shape[1]:
        return bjorck(weight.mT, steps).mT
    # The result does not depend on the scale, so `largest` and `frobenius` need no gradient. They
    # keep the powers below in range: the 16th powers of the singular values sum to min(m, n)^-7 or
    # more.
    with torch.no_grad():
        largest = weight.abs().max()
        largest = largest.where(largest > 0, 1)
    w = weight / largest
    gram = _gram(w)
    with torch.no_grad():
        frobenius = gram.diagonal().sum().clamp(min=1).sqrt()
    gram = gram / frobenius.square()
    sixteenth = _square(_square(gram)).square().sum()
    rows = gram.abs().sum(1).max()
    tiny = torch.finfo(w.dtype).tiny  # the derivative of a root has none at 0
    norm = torch.minimum(sixteenth.clamp(min=tiny) ** (1 / 16), rows.clamp(min=tiny).sqrt())
    w, gram = w / (norm * frobenius), gram / norm.square()
    longest = _BLOCK if w.shape[1] >= 2 * w.shape[0] else 1
    left = steps
    while left:
        if _orthogonal(gram):
            return _stepped(w, gram, 1)
        block = max(1, min(longest, left - 1))  # the last alone: it mends the rounding of others
        w = _stepped(w, gram, block)
        left -= block
        gram = _gram(w) if left else gram
    return w


def _stepped(w: Float[Tensor, "m n"], gram: Float[Tensor, "m m"], steps: int) -> Tensor:
    """The matrix after some steps, with G = W W^T; after fewer where the rest change nothing.

    A step is W <- T W with T = 1.5 - 0.5 G, so G <- T G T. T and G commute, and several steps are a
    product of small matrices that meets W once.
    """
    if steps == 1:
        return torch.addmm(w, gram, w, beta=1.5, alpha=-0.5)
    product = 1.5 * torch.eye(len(gram), dtype=w.dtype, device=w.device) - 0.5 * gram
    for _ in range(steps - 1):
        once = 1.5 * gram - 0.5 * _square(gram)
        gram = torch.addmm(once, once, gram, beta=1.5, alpha=-0.5)
        if _orthogonal(gram):
            break
        product = torch.addmm(product, gram, product, beta=1.5, alpha=-0.5)
    return product @ w


def _orthogonal(gram: Float[Tensor, "m m"]) -> bool:
    """Whether G is the identity but for rounding, so that all steps from here on are one.

    The next step then changes no more than the last digits, and its derivative is a projection, as
    is that of each step after it. What is compiled takes all steps.
    """
    if torch.compiler.is_compiling():
        return False
    with torch.no_grad():
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        rounding = torch.finfo(gram.dtype).eps * len(gram)
        return bool(torch.linalg.vector_norm(gram - eye) <= rounding)


def _gram(w: Tensor) -> Tensor:
    # torch.compile warns of every Function it meets, and warnings may be errors.
    return w @ w.mT if torch.compiler.is_compiling() else _Gram.apply(w)


def _square(gram: Tensor) -> Tensor:
    return gram @ gram if torch.compiler.is_compiling() else _Square.apply(gram)


class _Gram(torch.autograd.Function):
    """W W^T. Its derivative is one product, as both factors are the same matrix."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor) -> Tensor:
        return w @ w.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        # Under autocast the product has fewer digits than the weight.
        return (gradient + gradient.mT).to(w) @ w


class _Square(torch.autograd.Function):
    """G G of a symmetric G, whose derivative is one product and its transpose.

    The gradient is that among symmetric matrices, where all that is made of G above stays.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gram: Tensor) -> Tensor:
        return gram @ gram

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gram,) = ctx.saved_tensors
        half = gram @ (gradient + gradient.mT) / 2
        return half + half.mT


def _checked(name: str, steps: int) -> int:
    if steps < 1:
        raise LipcertError(f"{name}(steps={steps}): needs at least one step, 15 by default")
    return steps


class BjorckLinear(OrthogonalLinear):
    """A dense layer whose matrix is orthogonalised by Bjorck's iteration.

    The matrix is `bjorck(weight, steps)`, a contraction for every weight, and orthogonal (its rows
    or its columns, whichever are fewer) once the iteration has converged. The weight starts
    orthogonal. `constant` is the true norm of the matrix as it is applied, so what rounding or a
    missing step leaves is part of it.

    Args:
        in_features: Number of inputs.
        out_features: Number of outputs.
        bias: Whether there is one.
        steps: Steps of the iteration.

    Attributes:
        weight: The free parameter, shape (out_features, in_features).
        bias: Shape (out_features,), or None.

    Raises:
        LipcertError: A size or the number of steps is not positive.

    Reference: arXiv 1811.05381.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, steps: int = 15):
        super().__init__(in_features, out_features, bias)
        self.steps = _checked("BjorckLinear", steps)

    def transformed(self) -> Float[Tensor, "out in"]:
        """The matrix, made anew."""
        return bjorck(self.weight, self.steps)

    def extra_repr(self) -> str:
        """Sizes and steps, for ``print(model)``."""
        return f"{super().extra_repr()}, steps={self.steps}"


class BjorckConv2d(nn.Module):
    """A zero-padded convolution whose reshaped kernel is orthogonalised (RKO): a contraction.

    Let R be the kernel as a matrix of shape (out, in k^2), made by `bjorck`. The convolution takes
    patch p of the image, in k^2 numbers, to R patch_p. So |R * x|^2 <= |R|^2 sum_p |patch_p|^2. A
    cell of the image lies in patch p only if its offset in the patch is a number from 0 to k - 1
    on each axis; those offsets differ by multiples of the stride s, so there are at most
    ceil(k / s) of them an axis. Cells of the padding are 0 and count nothing. Hence
    |R * x|^2 <= |R|^2 ceil(k / s)^2 |x|^2 for every image size and padding, and the kernel is R
    divided by ceil(k / s). The map is orthogonal only where k <= s.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: k, of both axes.
        stride: s, of both axes.
        padding: Zeros on each side.
        bias: Whether there is one.
        steps: Steps of the iteration.

    Attributes:
        weight: The free parameter, shape (out_channels, in_channels, k, k).
        bias: Shape (out_channels,), or None.

    Raises:
        LipcertError: A size, the stride or the number of steps is not positive, or the padding is
            negative.

    Reference: arXiv 1802.04034 (how many patches read a cell), arXiv 2006.06520 (deel-lip).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        steps: int = 15,
    ):
        super().__init__()
        if min(in_channels, out_channels, kernel_size, stride) < 1 or padding < 0:
            raise LipcertError(
                f"BjorckConv2d({in_channels}, {out_channels}, kernel_size={kernel_size}, "
                f"stride={stride}, padding={padding}): needs positive sizes and padding >= 0"
            )
        self.stride, self.padding = stride, padding
        self.steps = _checked("BjorckConv2d", steps)
        weight = torch.empty(out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(nn.init.orthogonal_(weight))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self._kernel: Cache[Tensor] = Cache()
        self._constant: Cache[Constant] = Cache()

    def kernel(self) -> Float[Tensor, "out in k k"]:
        """The kernel as it is applied, differentiable in the weight."""
        return self._kernel((self.weight,), self._make)

    def _make(self) -> Tensor:
        flat = bjorck(self.weight.flatten(1), self.steps)
        return flat.reshape(self.weight.shape) / self._reads

    @property
    def _reads(self) -> int:
        """The root of how many patches at most read one cell."""
        return math.ceil(self.weight.shape[-1] / self.stride)

    def constant(self) -> Constant:
        """A bound of the Lipschitz constant for every image size, with the weights as they are."""

        def make() -> Constant:
            return Constant(exact_norm(self.kernel().flatten(1)) * self._reads, Kind.UPPER)

        with torch.no_grad():
            return self._constant((self.weight,), make)

    def forward(self, x: Float[Tensor, "b in h w"]) -> Float[Tensor, "b out h2 w2"]:
        """The convolution and its bias."""
        return F.conv2d(x, self.kernel(), self.bias, self.stride, self.padding)

    def extra_repr(self) -> str:
        """Sizes and steps, for ``print(model)``."""
        out, into, k, _ = self.weight.shape
        geometry = f"kernel_size={k}, stride={self.stride}, padding={self.padding}"
        return f"{into}, {out}, {geometry}, steps={self.steps}"
