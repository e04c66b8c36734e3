"""Average pooling before or after a convolution, as one convolution.

Pooling by averages is a convolution of each channel by itself. Two convolutions in a row are one
with a larger kernel, as long as the second reads nothing outside of what the first gives, or what
it reads there would be zero anyway.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lipcert.convolution import Conv, convolution
from lipcert.linear_kinds import Separable
from lipcert.linear_map import Composition, LinearMap

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def as_convolution(map: LinearMap) -> Conv | None:
    """A zero-padded convolution equal to a simplified map, or None where there is none."""
    match map:
        case Conv(circular=False):
            return map
        case Separable():
            return _pooling(map)
        case Composition(factors=factors):
            whole: Conv | None = None
            for factor in factors:
                part = as_convolution(factor.to(map.like.dtype))
                whole = part if whole is None or part is None else _after(whole, part)
                if whole is None:
                    return None
            return whole
    return None


def _pooling(map: Separable) -> Conv | None:
    """A map with the same window at each place along each axis, as a convolution by channel."""
    first, *matrices = map.matrices
    if first is not None or not matrices:
        return None
    windows = [_window(matrix, n) for matrix, n in zip(matrices, map.in_shape[1:], strict=True)]
    if any(window is None for window in windows):
        return None
    weights, strides, paddings = zip(*(w for w in windows if w is not None), strict=True)
    kernel = weights[0]
    for weight in weights[1:]:
        kernel = kernel[..., None] * weight
    channels = map.in_shape[0]
    return Conv(
        *(map.in_shape, map.out_shape, kernel.expand(channels, 1, *kernel.shape), strides),
        *(paddings, (1,) * len(matrices), channels),
    )


def _window(matrix: Tensor | None, n: int) -> tuple[Tensor, int, tuple[int, int]] | None:
    """Weights, stride and padding of a matrix whose rows are shifts of one another."""
    if matrix is None:
        return torch.ones(1, dtype=torch.float64), 1, (0, 0)
    rows = len(matrix)
    used = matrix != 0
    begins = used.int().argmax(1)
    lengths = used.sum(1)
    if rows < 2 or int(lengths.min()) != int(lengths.max()):
        return None
    length, stride = int(lengths[0]), int(begins[1] - begins[0])
    weight, start = matrix[0, begins[0] : begins[0] + length], int(begins[0])
    if start != 0 or stride < 1 or (rows - 1) * stride + length > n:
        return None
    same = torch.zeros_like(matrix)
    for row in range(rows):
        same[row, row * stride : row * stride + length] = weight
    return (weight, stride, (0, 0)) if same.equal(matrix) else None


def _after(first: Conv, then: Conv) -> Conv | None:
    """`then` after `first`, or None where what `then` pads with zeros is none."""
    if max(first.dilation) > 1 or max(then.dilation) > 1 or then.circular:
        return None
    if any(side > 0 for pair in then.padding for side in pair) and not _zero_outside(first):
        return None
    weight = _TRANSPOSED[first.axes](then.ungrouped(), first.ungrouped(), stride=first.stride)
    padding = tuple(
        (p + s * q, _rest(n, m, k, s * t, p + s * q))
        for (p, _), (q, _), s, t, n, m, k in zip(
            *(first.padding, then.padding, first.stride, then.stride),
            *(first.in_shape[1:], then.out_shape[1:], weight.shape[2:]),
            strict=True,
        )
    )
    strides = tuple(s * t for s, t in zip(first.stride, then.stride, strict=True))
    whole = convolution(weight, first.in_shape, strides, padding, (1,) * first.axes, 1)
    return whole if whole.out_shape == then.out_shape else None


def _rest(cells: int, places: int, kernel: int, stride: int, before: int) -> int:
    """How many cells of padding after the image the last place reads."""
    return max(0, (places - 1) * stride + kernel - before - cells)


def _zero_outside(conv: Conv) -> bool:
    """Whether windows beyond the places of the output meet only padding."""
    return all(
        k <= s + p and s * m - p >= n
        for k, s, (p, _), m, n in zip(
            *(conv.kernel, conv.stride, conv.padding, conv.out_shape[1:], conv.in_shape[1:]),
            strict=True,
        )
    )
