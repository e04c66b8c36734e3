"""Rules of ops that act on each axis by itself: average pooling, interpolation, sums over axes."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.errors import LipcertError
from lipcert.graph import Affine, Node
from lipcert.linear_kinds import Separable
from lipcert.rules.affine import per_axis
from lipcert.rules.registry import rule, rule_by_axes
from lipcert.rules.structural import copying, fixed


def separable(x: Node, functions: list[Callable[[Tensor], Tensor]]) -> Affine:
    """An op that acts on each of the last axes by itself, one function an axis.

    Args:
        x: The input; its last `len(functions)` axes are acted on.
        functions: For each of them a linear function of `(rows, channels = 1, n)`.
    """
    untouched = len(x.shape) - len(functions)
    matrices: list[Tensor | None] = [None] * untouched
    for n, function in zip(x.shape[untouched:], functions, strict=True):
        identity = torch.eye(n, dtype=torch.float64)[:, None]
        matrices.append(function(identity)[:, 0].mT)
    ends = [n if m is None else len(m) for n, m in zip(x.shape, matrices, strict=True)]
    return fixed(Separable(x.shape, tuple(ends), tuple(matrices)))


def _average_pool(
    axes: int,
    x: Node,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
) -> Affine:
    kernel, sides = per_axis(kernel_size, axes), per_axis(padding, axes)
    steps = per_axis(stride, axes) if stride else kernel

    def along(axis: int) -> Callable[[Tensor], Tensor]:
        k, s, p = kernel[axis], steps[axis], sides[axis]
        # A fixed divisor is shared out: the first axis takes all of it.
        divisor = None if divisor_override is None else (divisor_override if axis == 0 else 1)

        def average(rows: Tensor) -> Tensor:
            column = rows[..., None]  # the 2-d op is the one that knows a divisor
            average = F.avg_pool2d(
                column, (k, 1), (s, 1), (p, 0), ceil_mode, count_include_pad, divisor
            )
            return average[..., 0]

        return average

    return separable(x, [along(axis) for axis in range(axes)])


def _average_pool_module(axes: int, module: nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d, x: Node):
    m = module
    divisor = getattr(m, "divisor_override", None)
    geometry = m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad
    return _average_pool(axes, x, *geometry, divisor)


def _adaptive_average_pool(axes: int, x: Node, output_size) -> Affine:
    sizes = [
        n if size is None else size
        for n, size in zip(x.shape[-axes:], per_axis(output_size, axes), strict=True)
    ]
    return separable(x, [partial(F.adaptive_avg_pool1d, output_size=size) for size in sizes])


def _adaptive_average_pool_module(axes: int, module: nn.Module, x: Node) -> Affine:
    return _adaptive_average_pool(axes, x, module.output_size)


rule_by_axes((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), _average_pool)
rule_by_axes((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _average_pool_module)
rule_by_axes(
    (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), _adaptive_average_pool
)
rule_by_axes(
    (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    _adaptive_average_pool_module,
)


_ALONG = {"bilinear": "linear", "trilinear": "linear"}


@rule(F.interpolate)
def _interpolate(
    x: Node,
    size=None,
    scale_factor=None,
    mode: str = "nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias: bool = False,
) -> Affine:
    """Resizing; each axis is resampled by itself."""
    axes = len(x.shape) - 1
    sizes = per_axis(size, axes)
    factors = per_axis(scale_factor, axes)
    options = {"align_corners": align_corners, "recompute_scale_factor": recompute_scale_factor}

    def along(axis: int) -> Callable[[Tensor], Tensor]:
        target, factor = sizes[axis], factors[axis]

        def resample(rows: Tensor) -> Tensor:
            if mode == "bicubic" or antialias:  # known to the 2-d op only
                # As the last axis: torch 2.13 resamples a column with antialias=True wrongly.
                size2 = None if target is None else (1, target)
                factor2 = None if factor is None else (1.0, factor)
                image = rows[:, :, None]
                return F.interpolate(image, size2, factor2, mode, antialias=antialias, **options)[
                    :, :, 0
                ]
            return F.interpolate(rows, target, factor, _ALONG.get(mode, mode), **options)

        return resample

    return separable(x, [along(axis) for axis in range(axes)])


@rule(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
def _upsample_module(module: nn.Upsample, x: Node) -> Affine:
    """Resizing as a layer."""
    m = module
    return _interpolate(
        x, m.size, m.scale_factor, m.mode, m.align_corners, m.recompute_scale_factor
    )


@rule(torch.mean, "mean")
def _mean(x: Node, dim=None, keepdim: bool = False) -> Affine | Node:
    """The mean over axes of the sample."""
    return _reduce(x, dim, keepdim, average=True)


@rule(torch.sum, "sum")
def _total(x: Node, dim=None, keepdim: bool = False) -> Affine | Node:
    """The sum over axes of the sample."""
    return _reduce(x, dim, keepdim, average=False)


def _reduce(x: Node, dim, keepdim: bool, average: bool) -> Affine | Node:
    rank = len(x.shape) + 1
    if dim is None:
        raise LipcertError("without dim it mixes the samples of the batch; give dim=")
    dims = {d % rank for d in (dim if isinstance(dim, tuple | list) else (dim,))}
    if 0 in dims:
        raise LipcertError("over the batch axis it mixes the samples of the batch")
    matrices, kept = [], []
    for axis, n in enumerate(x.shape, start=1):
        inside = axis in dims
        row = torch.ones(1, n, dtype=torch.float64)
        matrices.append((row / n if average else row) if inside else None)
        if not inside:
            kept.append(n)
    full = tuple(1 if m is not None else n for n, m in zip(x.shape, matrices, strict=True))
    reduced = Node(fixed(Separable(x.shape, full, tuple(matrices))), (x,), full)
    if keepdim:
        return reduced
    return Node(copying(lambda t: t.reshape(len(t), *kept), reduced), (reduced,), tuple(kept))
