"""What 1-Lipschitz networks begin and end with: fitting channels, L2 pooling, the last layer."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lipcert.errors import LipcertError


class LastLayerNormalized(nn.Module):
    """A last layer each of whose logits is 1-Lipschitz: its rows are divided by their norms (LLN).

    The matrix itself has a norm of up to the root of the number of classes. What a certificate
    needs are the norms of differences of rows, at most 2, which every bound takes from the matrix.

    Args:
        in_features: Number of inputs.
        classes: Number of logits.
        bias: Whether there is one.

    Attributes:
        weight: Shape (classes, in_features); rows of any norm. A row of zeros stays as it is.
        bias: Shape (classes,), or None.

    Raises:
        LipcertError: A size is not positive.

    Reference: arXiv 2108.04062.
    """

    def __init__(self, in_features: int, classes: int, bias: bool = True):
        super().__init__()
        if min(in_features, classes) < 1:
            raise LipcertError(
                f"LastLayerNormalized({in_features}, {classes}): needs positive sizes"
            )
        weight = torch.empty(classes, in_features)
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(weight, a=5**0.5))
        self.bias = nn.Parameter(torch.zeros(classes)) if bias else None

    def matrix(self) -> Float[Tensor, "classes in"]:
        """The matrix as it is applied, differentiable in the weight."""
        largest = self.weight.detach().abs().amax(1, keepdim=True)  # squares stay in range
        rows = self.weight / largest.where(largest > 0, 1)
        return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch classes"]:
        """The logits."""
        return F.linear(x, self.matrix(), self.bias)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        classes, into = self.weight.shape
        return f"{into}, {classes}, bias={self.bias is not None}"


class FitChannels(nn.Module):
    """Appends channels of zeros, or keeps the first ones: 1-Lipschitz, along dimension 1.

    It takes the colours of an image to the width of layers that keep it, and cuts features down to
    one for each class.

    Args:
        channels: Number of channels of the output.

    Raises:
        LipcertError: The number is not positive.
    """

    def __init__(self, channels: int):
        super().__init__()
        if channels < 1:
            raise LipcertError(f"FitChannels({channels}): needs a positive number of channels")
        self.channels = channels

    def forward(self, x: Float[Tensor, "b before *rest"]) -> Float[Tensor, "b after *rest"]:
        """Pads or cuts a batch."""
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.channels - x.shape[1]))

    def extra_repr(self) -> str:
        """The number of channels, for ``print(model)``."""
        return f"{self.channels}"


class L2Pool2d(nn.Module):
    """The Euclidean norm of each window of k x k cells; windows do not overlap.

    | |u| - |v| | <= |u - v| in each window, and the squares add up: 1-Lipschitz, and the norm of
    the input is kept.

    Args:
        size: k; the sides of the input must be multiples of it.

    Raises:
        LipcertError: The size is not positive; in ``forward``, a side is no multiple of it.
    """

    def __init__(self, size: int):
        super().__init__()
        if size < 1:
            raise LipcertError(f"L2Pool2d({size}): needs a positive size")
        self.size = size

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Pools a batch."""
        k = self.size
        if x.shape[2] % k or x.shape[3] % k:
            raise LipcertError(
                f"L2Pool2d({k}) takes images whose sides are multiples of {k}, not one of "
                f"{x.shape[2]} x {x.shape[3]}; pad or crop it first"
            )
        windows = x.unflatten(3, (-1, k)).unflatten(2, (-1, k))
        return torch.linalg.vector_norm(windows, dim=(3, 5))

    def extra_repr(self) -> str:
        """The size, for ``print(model)``."""
        return f"{self.size}"
