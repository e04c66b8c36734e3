"""Linear residual layers of LiResNet: the identity is part of the convolution's kernel."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lipcert.errors import LipcertError


class LinearResidualConv2d(nn.Module):
    """y = x + depth^(-1/2) gamma (W * x) + b as one convolution, padded by zeros to keep the size.

    The identity and the branch are one linear map, whose kernel has the identity in its middle tap.
    Its norm is that of the sum, where a residual block with an activation in its branch would count
    1 plus the norm of the branch. The layer is not 1-Lipschitz: a bound has to measure its norm.

    Args:
        channels: Channels of input and output.
        depth: How many such layers the network has.
        kernel_size: k, odd.
        bias: Whether there is one.

    Attributes:
        weight: W, shape (channels, channels, k, k); at the start normal with standard deviation
            1 / (channels k^2).
        gamma: One factor for each output channel, shape (channels,); at the start 1.
        bias: Shape (channels,), or None.

    Raises:
        LipcertError: A size is not positive, or k is even.

    Reference: arXiv 2301.12549.
    """

    def __init__(self, channels: int, depth: int, kernel_size: int = 3, bias: bool = True):
        super().__init__()
        if min(channels, depth, kernel_size) < 1 or kernel_size % 2 == 0:
            raise LipcertError(
                f"LinearResidualConv2d({channels}, depth={depth}, kernel_size={kernel_size}): "
                "needs positive sizes and an odd kernel, which has a middle"
            )
        self.depth = depth
        weight = torch.randn(channels, channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(weight / (channels * kernel_size**2))
        self.gamma = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def kernel(self) -> Float[Tensor, "c c k k"]:
        """The kernel as it is applied, differentiable in weight and gamma."""
        middle = self.weight.shape[-1] // 2
        identity = torch.zeros_like(self.weight)
        identity[:, :, middle, middle] = torch.eye(len(self.weight)).to(self.weight)
        return identity + self.depth**-0.5 * self.gamma[:, None, None, None] * self.weight

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The convolution and its bias."""
        return F.conv2d(x, self.kernel(), self.bias, padding=self.weight.shape[-1] // 2)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{len(self.weight)}, depth={self.depth}, kernel_size={self.weight.shape[-1]}"


class BatchCentering(nn.Module):
    """x - mean + b for each channel: what BatchNorm does without a division; 1-Lipschitz.

    Training subtracts the mean of the batch and keeps a running mean, which evaluation subtracts.

    Args:
        channels: Number of channels, along dimension 1.
        momentum: Share of the batch in the running mean, in (0, 1].

    Attributes:
        bias: b, a parameter of shape (channels,); at the start 0.
        mean: The running mean, a buffer of shape (channels,).

    Raises:
        LipcertError: The number of channels is not positive, or the momentum is not in (0, 1].

    Reference: arXiv 2301.12549.
    """

    mean: Tensor

    def __init__(self, channels: int, momentum: float = 0.1):
        super().__init__()
        if channels < 1 or not 0 < momentum <= 1:
            raise LipcertError(
                f"BatchCentering({channels}, momentum={momentum}): needs a positive number of "
                "channels and a momentum in (0, 1]"
            )
        self.momentum = momentum
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, x: Float[Tensor, "b c *rest"]) -> Float[Tensor, "b c *rest"]:
        """Centres a batch."""
        mean = self.mean
        if self.training:
            mean = x.mean([axis for axis in range(x.ndim) if axis != 1])
            with torch.no_grad():
                self.mean.lerp_(mean.to(self.mean), self.momentum)
        return x + (self.bias - mean).view(-1, *(1,) * (x.ndim - 2))

    def extra_repr(self) -> str:
        """The number of channels and the momentum, for ``print(model)``."""
        return f"{len(self.bias)}, momentum={self.momentum}"
