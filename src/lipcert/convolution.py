"""Convolutions as linear maps, on the image size they really act on."""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lipcert.linear_map import LinearMap, Shape

_APPLY = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_ADJOINT = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True, eq=False)
class Conv(LinearMap):
    """A convolution in 1 to 3 dimensions, without bias.

    Attributes:
        weight: Shape `(out, in / groups, *kernel)`.
        stride: One number an axis.
        padding: A pair (before, after) an axis; the two differ for even kernels with "same".
        dilation: One number an axis.
        groups: Channel groups.
        circular: The padding wraps around instead of being zero. Only for convolutions that are
            then circulant: total padding `dilation (kernel - 1)` and a stride dividing the size.
    """

    weight: Float[Tensor, "out in_per_group *kernel"]
    stride: Shape
    padding: tuple[tuple[int, int], ...]
    dilation: Shape
    groups: int
    circular: bool = False

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return self.weight.ndim - 2

    @property
    def kernel(self) -> Shape:
        """Kernel size, one number an axis."""
        return tuple(self.weight.shape[2:])

    @property
    def _native(self) -> bool:
        return not self.circular and all(before == after for before, after in self.padding)

    def _pad(self, x: Tensor) -> Tensor:
        flat = [side for pair in reversed(self.padding) for side in pair]
        return F.pad(x, flat, mode="circular") if self.circular else F.pad(x, flat)

    def apply(self, x: Tensor) -> Tensor:
        if self._native:
            padding = tuple(before for before, _ in self.padding)
        else:
            x, padding = self._pad(x), (0,) * self.axes
        convolve = _APPLY[self.axes]
        return convolve(x, self.weight, None, self.stride, padding, self.dilation, self.groups)

    def adjoint(self, y: Tensor) -> Tensor:
        if not self._native:
            return super().adjoint(y)
        # The input's size has to be said: a transposed convolution without an output padding drops
        # the rows that the stride left over. (Faster on CPUs than the gradient of a convolution.)
        left_over = tuple(
            n - ((m - 1) * s - before - after + d * (k - 1) + 1)
            for n, m, s, (before, after), d, k in zip(
                self.in_shape[1:],
                self.out_shape[1:],
                self.stride,
                self.padding,
                self.dilation,
                self.kernel,
                strict=True,
            )
        )
        padding = tuple(before for before, _ in self.padding)
        turn = _ADJOINT[self.axes]
        return turn(
            y, self.weight, None, self.stride, padding, left_over, self.groups, self.dilation
        )

    @property
    def taps_meet(self) -> bool:
        """Whether several taps of a window read one cell, where they may cancel or add up."""
        reach = zip(self.dilation, self.kernel, self.in_shape[1:], strict=True)
        return self.circular and any(d * (k - 1) >= n for d, k, n in reach)

    def ungrouped(self) -> Float[Tensor, "out in *kernel"]:
        """The weight with zeros for pairs of channels of different groups."""
        if self.groups == 1:
            return self.weight
        blocks = self.weight.unflatten(0, (self.groups, -1))
        full = blocks.new_zeros(self.groups, blocks.shape[1], self.groups, *blocks.shape[2:])
        same = torch.arange(self.groups, device=blocks.device)
        full[same, :, same] = blocks
        return full.flatten(2, 3).flatten(0, 1)

    def magnitude(self) -> LinearMap:
        if self.taps_meet:
            return super().magnitude()
        return dataclasses.replace(self, weight=self.weight.abs())


def convolution(
    weight: Tensor,
    in_shape: Shape,
    stride: Shape,
    padding: tuple[tuple[int, int], ...],
    dilation: Shape,
    groups: int,
    circular: bool = False,
) -> Conv:
    """A `Conv` whose output shape is worked out from the rest."""
    sizes = zip(in_shape[1:], weight.shape[2:], stride, padding, dilation, strict=True)
    spatial = tuple(
        (n + before + after - d * (k - 1) - 1) // s + 1 for n, k, s, (before, after), d in sizes
    )
    out_shape = (weight.shape[0], *spatial)
    return Conv(in_shape, out_shape, weight, stride, padding, dilation, groups, circular)
