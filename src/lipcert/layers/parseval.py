"""What Parseval networks change: scaled convolutions and convex sums."""

import math

import torch
from torch import nn


class ScaledConv2d(nn.Conv2d):
    """`nn.Conv2d` divided by the root of its kernel's size.

    Where the kernel, flattened to a matrix, has norm 1, the map has at most norm 1: without padding
    by copies no cell is read by more than that many taps.

    Reference: arXiv 1704.08847 (Parseval networks).
    """

    def forward(self, input):  # no annotations: tracing calls it with stand-ins for tensors
        """The convolution and its bias, both divided."""
        return super().forward(input) / math.sqrt(math.prod(self.kernel_size))


class ConvexSum(nn.Module):
    """a f + b g with learned shares a, b >= 0 that add up to one.

    Where f and g are both L-Lipschitz so is the sum, which plainly added would count 2 L. A step of
    an optimiser leaves the shares anywhere: `project` is to follow it.

    Attributes:
        shares: a and b, a parameter of shape (2,); at the start both are 1/2.

    Reference: arXiv 1704.08847 (Parseval networks).
    """

    def __init__(self):
        super().__init__()
        self.shares = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, f, g):  # as above
        """The weighted sum of two tensors of one shape."""
        return self.shares[0] * f + self.shares[1] * g

    @torch.no_grad()
    def project(self) -> None:
        """Replaces the shares by the nearest ones that are >= 0 and add up to one."""
        a, b = self.shares
        first = ((1 + a - b) / 2).clamp(0, 1)
        self.shares.copy_(torch.stack([first, 1 - first]))
