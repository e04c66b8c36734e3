"""Skew orthogonal convolutions (SOC): the exponential of a skew-symmetric convolution."""

import math
from fractions import Fraction
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.layers.cache import Cache
from lipcert.layers.orthogonal import exact_norm

# How a kernel of shape (out, in, h, w) is reshaped to a matrix: the axes that make its columns.
_COLUMNS = ((1, 3), (1, 2), (1, 2, 3), (0, 2, 3))
_REFRESH = 200, 50  # every so many steps so many iterations


def skew(weight: Float[Tensor, "c c k k"]) -> Float[Tensor, "c c k k"]:
    """(M - M^T) / 2, with M^T the kernel of the adjoint: channels exchanged, taps turned around.

    For an odd k and a padding of zeros that keeps the size, the convolution with this kernel is a
    skew-symmetric matrix on images of every size.
    """
    return (weight - weight.transpose(0, 1).flip(2, 3)) / 2


@cache
def _squared_coefficients(terms: int) -> tuple[float, ...]:
    """Coefficients c_j of |S(i t)|^2 = sum_j c_j t^(2j), with S the exponential cut after `terms`.

    Worked out in fractions, in which those of t^2 up to t^terms cancel to 0.
    """
    factors = [Fraction(1, math.factorial(n)) for n in range(terms + 1)]
    exact = [
        sum(
            factors[a] * factors[2 * j - a] * (-1) ** abs(j - a)
            for a in range(max(0, 2 * j - terms), min(2 * j, terms) + 1)
        )
        for j in range(terms + 1)
    ]
    return tuple(float(c) for c in exact)


def truncated_exponential_bound(theta: float, terms: int) -> float:
    """A bound of |S(A)| for skew-symmetric A with |A| <= theta, S the series up to A^n / n!.

    The eigenvalues of A are i t with |t| <= theta, and A is normal, so |S(A)| is the largest
    |S(i t)|. Its square is a polynomial in t^2 that starts with 1. Horner's scheme with the upper
    end of each step bounds it: p + t^2 q is at most p + max(0, theta^2 max q). With 12 terms the
    first coefficient after 1 is negative, and the bound is 1, but for rounding, up to theta = 2.5.

    Args:
        theta: The bound of |A|, >= 0; infinite or NaN where nothing is known, which comes back.
        terms: n.
    """
    if not math.isfinite(theta):
        return theta
    squared, coefficients = theta**2, _squared_coefficients(terms)
    above = 0.0
    for c in reversed(coefficients):
        above = c + max(0.0, squared * above)
    sizes = sum(abs(c) * squared**j for j, c in enumerate(coefficients))
    return math.sqrt(above + 2**-47 * sizes)  # more than the scheme can lose by rounding


class SOCConv2d(nn.Module):
    """A convolution that is nearly orthogonal: exp(A) x, its series cut after some terms.

    A is the convolution with the kernel correction * skew(weight) / sigma, padded by zeros: a
    skew-symmetric matrix on every image size, so its exponential is orthogonal. sigma is the least
    of the norms of the kernel reshaped to a matrix in four ways, each by power iteration: one step
    in a training step, 50 at the start and in every 200th (but not in compiled training). Training
    takes 5 terms beyond the first, evaluation 12. With a stride s, blocks of s x s pixels become
    channels first. Missing channels are filled with zeros, those too many are cut off.

    `constant` trusts neither the iteration nor the series. With zeros around it an image is a part
    of a larger one on a circle, where A acts as sum_ab K_ab exp(i (a f + b g)) at each pair of
    frequencies f, g. That is P* R Q with R the kernel reshaped to (out k, in k) and the phases in
    P* and Q, of norms sqrt(k); or T Q' with T reshaped to (out, in k^2) and |Q'| = k. So |A| <=
    theta = k min(|R|, |T|) on every image size; for a skew kernel the other two of the four
    matrices have the same norms. They are taken in float64 for the kernel as it is applied. Then
    the series is at most max |S(i t)| over |t| <= theta: 1 where sigma has converged, as theta is
    then k correction, 2.1 for k = 3. What is bounded is the evaluated layer.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: k, odd.
        stride: s; the sides of the image must be multiples of it.
        bias: Whether there is one.
        correction: Factor of the kernel; 0.7 by default, 1 for k = 1.

    Attributes:
        weight: The free parameter M, shape (m, m, k, k), m = max(in_channels s^2, out_channels).
        bias: Shape (out_channels,), or None.
        u1, v1, ..., u4, v4: Buffers, the vectors of the power iterations.
        steps: A buffer, how many training steps have been made.

    Raises:
        LipcertError: A size is not positive, or k is even; in ``forward``, the input has another
            number of channels, or a side that is no multiple of the stride.

    Reference: arXiv 2105.11417; the norms: arXiv 1911.10258.
    """

    steps: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = True,
        correction: float | None = None,
    ):
        super().__init__()
        if min(in_channels, out_channels, kernel_size, stride) < 1 or kernel_size % 2 == 0:
            raise LipcertError(
                f"SOCConv2d({in_channels}, {out_channels}, kernel_size={kernel_size}, "
                f"stride={stride}): needs positive sizes and an odd kernel, which has a middle"
            )
        if correction is None:
            correction = 1.0 if kernel_size == 1 else 0.7
        self.in_channels, self.out_channels = in_channels, out_channels
        self.stride, self.correction = stride, correction
        self.train_terms, self.eval_terms = 5, 12
        channels = max(in_channels * stride**2, out_channels)
        weight = torch.randn(channels, channels, kernel_size, kernel_size) / channels**0.5
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        for number, columns in enumerate(_COLUMNS, start=1):
            sizes = [n if axis in columns else 1 for axis, n in enumerate(weight.shape)]
            others = [n if axis not in columns else 1 for axis, n in enumerate(weight.shape)]
            self.register_buffer(f"u{number}", torch.randn(sizes))
            self.register_buffer(f"v{number}", torch.zeros(others))
        self._iterate(self._scaled().detach(), _REFRESH[1])
        self._kernel: Cache[Tensor] = Cache()
        self._constant: Cache[Constant] = Cache()

    def _scaled(self) -> Tensor:
        """The skew kernel with a largest entry of 1: its powers stay in range, zero stays zero."""
        kernel = skew(self.weight)
        largest = kernel.detach().abs().amax()
        return kernel / largest.where(largest > 0, 1)

    @torch.no_grad()
    def _iterate(self, scaled: Tensor, times: int) -> None:
        """Steps of power iteration on each of the four matrices, in place."""
        for number, columns in enumerate(_COLUMNS, start=1):
            u, v = getattr(self, f"u{number}"), getattr(self, f"v{number}")
            rows = [axis for axis in range(4) if axis not in columns]
            for _ in range(times):
                v.copy_(_unit((scaled * u).sum(columns, keepdim=True), v))
                u.copy_(_unit((scaled * v).sum(rows, keepdim=True), u))

    def _vectors(self) -> list[Tensor]:
        return [getattr(self, f"{name}{n}") for n in (1, 2, 3, 4) for name in "uv"]

    def kernel(self) -> Float[Tensor, "m m k k"]:
        """The kernel of A, with sigma from the vectors as they are; differentiable."""
        made_of = (self.weight, *self._vectors())
        return self._kernel(made_of, lambda: self._make(self._scaled()), self.correction)

    def _make(self, scaled: Tensor) -> Tensor:
        vectors = self._vectors()
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        # u v is a new tensor: the buffers may change before gradients are taken.
        found = [(scaled * (u * v)).sum() for u, v in pairs]
        # The largest entry is never above a norm: stale vectors divide by no less than that.
        sigma = torch.stack(found).amin().maximum(scaled.abs().amax())
        return self.correction * scaled / sigma.where(sigma > 0, 1)

    def constant(self) -> Constant:
        """A bound of the evaluated layer's Lipschitz constant, for every image size."""

        def make() -> Constant:
            kernel = self.kernel().detach()
            out, into, h, w = kernel.shape
            matrices = kernel.permute(0, 2, 1, 3).reshape(out * h, into * w), kernel.flatten(1)
            norm = min(float(exact_norm(matrix)) for matrix in matrices)
            bound = truncated_exponential_bound(math.sqrt(h * w) * norm, self.eval_terms)
            value = torch.tensor(bound, dtype=torch.float64, device=kernel.device)
            return Constant(value, Kind.UPPER)

        with torch.no_grad():
            settings = self.correction, self.eval_terms
            return self._constant((self.weight, *self._vectors()), make, *settings)

    def linear(self, x: Float[Tensor, "b in h w"]) -> Float[Tensor, "b out h2 w2"]:
        """The evaluated layer without its bias, in the precision of x and where x is."""
        return self._series(x, self.kernel().to(x), self.eval_terms)

    def _series(self, x: Tensor, kernel: Tensor, terms: int) -> Tensor:
        _, channels, height, width = x.shape
        if channels != self.in_channels or height % self.stride or width % self.stride:
            raise LipcertError(
                f"SOCConv2d({self.in_channels}, {self.out_channels}, stride={self.stride}) takes "
                f"{self.in_channels} channels and sides that are multiples of {self.stride}, not "
                f"an input of shape {tuple(x.shape)}"
            )
        x = F.pixel_unshuffle(x, self.stride)
        x = F.pad(x, (0, 0, 0, 0, 0, len(kernel) - x.shape[1]))
        total = term = x
        for n in range(1, terms + 1):
            term = F.conv2d(term, kernel, padding=kernel.shape[-1] // 2) / n
            total = total + term
        return total[:, : self.out_channels]

    def forward(self, x: Float[Tensor, "b in h w"]) -> Float[Tensor, "b out h2 w2"]:
        """exp(A) x + bias; in training, a step of power iteration first."""
        if self.training:
            scaled = self._scaled()
            refresh = not torch.compiler.is_compiling() and int(self.steps) % _REFRESH[0] == 0
            self._iterate(scaled.detach(), _REFRESH[1] if refresh else 1)
            self.steps += 1
            y = self._series(x, self._make(scaled), self.train_terms)
        else:
            y = self._series(x, self.kernel(), self.eval_terms)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def extra_repr(self) -> str:
        """Sizes and the correction, for ``print(model)``."""
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.weight.shape[-1]}"
        return f"{sizes}, stride={self.stride}, correction={self.correction}"


def _unit(vector: Tensor, before: Tensor) -> Tensor:
    """The vector made a unit vector; the one before if it is 0, which no step would leave again."""
    norm = torch.linalg.vector_norm(vector)
    return torch.where(norm > 0, vector / norm.where(norm > 0, 1), before)
