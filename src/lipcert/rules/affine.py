"""Rules of affine layers: dense, convolution, normalisation in eval mode, average pooling."""



import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.convolution import convolution
from lipcert.errors import LipcertError
from lipcert.graph import Affine, Node
from lipcert.linear_map import Dense, LinearMap, Scale, Separable, Shape
from lipcert.rules.registry import Live, attribute, live, rule
from lipcert.rules.structural import copying


def _dense(x: Node, weight: Live, bias: Live | None) -> Affine:
    def map() -> LinearMap:
        w = weight()
        return Dense(x.shape, (*x.shape[:-1], len(w)), w)

    return Affine(map, bias)


@rule(nn.Linear)
def linear_module(module: nn.Linear, x: Node) -> Affine:
    weight = attribute(module, "weight")
    assert weight is not None
    return _dense(x, weight, attribute(module, "bias"))


@rule(F.linear)
def linear_function(x: Node, weight: Live, bias: Live | None = None) -> Affine:
    return _dense(x, weight, bias)


@rule(torch.matmul, "matmul", "__matmul__")
def matmul(x: Node | Live, other: Node | Live) -> Affine:
    if isinstance(x, Node) and isinstance(other, Live) and other().ndim == 2:
        return _dense(x, Live(lambda: other().mT), None)
    if isinstance(x, Node) and isinstance(other, Node):
        raise LipcertError("a product of two functions of the input is not Lipschitz")
    raise LipcertError("only x @ W with a constant matrix W has a rule; use F.linear")


def _tuple(value: int | tuple[int, ...], axes: int) -> Shape:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _convolve(
    x: Node,
    weight: Live,
    bias: Live | None,
    stride,
    padding,
    dilation,
    groups: int,
    mode: str = "zeros",
) -> Affine | Node:
    axes = weight().ndim - 2
    if len(x.shape) != axes + 1:
        raise LipcertError(f"a {axes}-d convolution of an input of shape {x.shape}")
    kernel = tuple(weight().shape[2:])
    stride, dilation = _tuple(stride, axes), _tuple(dilation, axes)
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = tuple((t // 2, t - t // 2) for t in total)
    else:
        sides = tuple((p, p) for p in _tuple(padding, axes))
    circulant = all(
        before + after == d * (k - 1) and n % s == 0
        for (before, after), d, k, n, s in zip(
            sides, dilation, kernel, x.shape[1:], stride, strict=True
        )
    )
    circular = mode == "circular" and circulant
    if mode != "zeros" and not circular:
        x = pad(x, [side for pair in reversed(sides) for side in pair], mode)
        sides = ((0, 0),) * axes
    shape = x.shape

    def map() -> LinearMap:
        return convolution(weight(), shape, stride, sides, dilation, groups, circular)

    shift = None if bias is None else Live(lambda: bias().reshape(-1, *(1,) * axes))
    return Node(Affine(map, shift), (x,), map().out_shape)


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution_module(module: nn.Conv2d, x: Node) -> Affine | Node:
    weight = attribute(module, "weight")
    assert weight is not None
    bias = attribute(module, "bias")
    geometry = module.stride, module.padding, module.dilation, module.groups
    return _convolve(x, weight, bias, *geometry, mode=module.padding_mode)


@rule(F.conv1d, F.conv2d, F.conv3d)
def convolution_function(
    x: Node, weight: Live, bias: Live | None = None, stride=1, padding=0, dilation=1, groups=1
) -> Affine | Node:
    return _convolve(x, weight, bias, stride, padding, dilation, groups)


def _deconvolve(
    x: Node, weight: Live, bias: Live | None, stride, padding, extra, groups, dilation
) -> Affine:
    """The adjoint of the convolution with the same weight, from this output back to x."""
    axes = weight().ndim - 2
    stride, padding, extra, dilation = (
        _tuple(v, axes) for v in (stride, padding, extra, dilation)
    )
    kernel = weight().shape[2:]
    geometry = zip(x.shape[1:], kernel, stride, padding, extra, dilation, strict=True)
    spatial = [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, s, p, e, d in geometry]
    sides = tuple((p, p) for p in padding)

    def map() -> LinearMap:
        w = weight()
        shape = (w.shape[1] * groups, *spatial)
        return convolution(w, shape, stride, sides, dilation, groups).T

    shift = None if bias is None else Live(lambda: bias().reshape(-1, *(1,) * axes))
    return Affine(map, shift)


@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def deconvolution_module(module: nn.ConvTranspose2d, x: Node) -> Affine:
    weight = attribute(module, "weight")
    assert weight is not None
    bias = attribute(module, "bias")
    m = module
    return _deconvolve(
        x, weight, bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation
    )


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def deconvolution_function(
    x: Node,
    weight: Live,
    bias: Live | None = None,
    stride=1,
    padding=0,
    output_padding=0,
    groups=1,
    dilation=1,
) -> Affine:
    return _deconvolve(x, weight, bias, stride, padding, output_padding, groups, dilation)


def _batch_norm(
    x: Node, mean: Live | None, variance: Live | None, weight, bias, eps: float
) -> Affine:
    if mean is None or variance is None:
        raise LipcertError(
            "without running statistics its output depends on the other samples of the batch; "
            "use track_running_stats=True"
        )
    shape, column = x.shape, (-1, *(1,) * (len(x.shape) - 1))

    def gain() -> Tensor:
        inverse = (variance() + eps).rsqrt()
        return inverse if weight is None else weight() * inverse

    def map() -> LinearMap:
        return Scale(shape, shape, gain().reshape(column))

    def shift() -> Tensor:
        offset = -mean() * gain()
        return (offset if bias is None else offset + bias()).reshape(column)

    return Affine(map, shift)


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm_module(module: nn.BatchNorm2d, x: Node) -> Affine:
    names = "running_mean", "running_var", "weight", "bias"
    return _batch_norm(x, *(attribute(module, n) for n in names), module.eps)


@rule(F.batch_norm)
def batch_norm_function(
    x: Node,
    running_mean: Live | None,
    running_var: Live | None,
    weight: Live | None = None,
    bias: Live | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Affine:
    if training:
        raise LipcertError("in training mode it depends on the other samples of the batch")
    return _batch_norm(x, running_mean, running_var, weight, bias, eps)


def separable(x: Node, functions: list) -> Affine:
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
    fixed = Separable(x.shape, tuple(ends), tuple(matrices))
    return Affine(lambda: fixed)


def _average_pool(
    x: Node,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
) -> Affine:
    axes = len(x.shape) - 1
    kernel, padding = _tuple(kernel_size, axes), _tuple(padding, axes)
    stride = kernel if stride is None or stride == () else _tuple(stride, axes)

    def along(axis: int):
        k, s, p = kernel[axis], stride[axis], padding[axis]
        # A fixed divisor is shared out: the first axis takes all of it.
        divisor = None if divisor_override is None else (divisor_override if axis == 0 else 1)

        def average(rows: Tensor) -> Tensor:
            column = rows[..., None]  # the 2-d op is the one that knows a divisor
            pooled = F.avg_pool2d(
                column, (k, 1), (s, 1), (p, 0), ceil_mode, count_include_pad, divisor
            )
            return pooled[..., 0]

        return average

    return separable(x, [along(axis) for axis in range(axes)])


@rule(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
def average_pool_function(x: Node, kernel_size, stride=None, padding=0, *rest, **named) -> Affine:
    return _average_pool(x, kernel_size, stride, padding, *rest, **named)


@rule(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def average_pool_module(module: nn.AvgPool2d, x: Node) -> Affine:
    m = module
    divisor = getattr(m, "divisor_override", None)
    geometry = m.kernel_size, m.stride, m.padding
    return _average_pool(x, *geometry, m.ceil_mode, m.count_include_pad, divisor)


@rule(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
def adaptive_average_pool_function(x: Node, output_size) -> Affine:
    axes = len(x.shape) - 1
    sizes = [
        n if size is None else size
        for n, size in zip(x.shape[1:], _tuple(output_size, axes), strict=True)
    ]
    return separable(x, [lambda rows, m=m: F.adaptive_avg_pool1d(rows, m) for m in sizes])


@rule(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def adaptive_average_pool_module(module: nn.AdaptiveAvgPool2d, x: Node) -> Affine:
    return adaptive_average_pool_function(x, module.output_size)


_ALONG = {"bilinear": "linear", "trilinear": "linear"}


@rule(F.interpolate, nn.functional.upsample)
def interpolate(
    x: Node,
    size=None,
    scale_factor=None,
    mode: str = "nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias: bool = False,
) -> Affine:
    axes = len(x.shape) - 1
    sizes = [None] * axes if size is None else _tuple(size, axes)
    factors = [None] * axes
    if scale_factor is not None:
        factors = [scale_factor] * axes if isinstance(scale_factor, int | float) else scale_factor

    def along(axis: int):
        options = {
            "align_corners": align_corners,
            "recompute_scale_factor": recompute_scale_factor,
        }
        target, factor = sizes[axis], factors[axis]

        def resample(rows: Tensor) -> Tensor:
            if mode in ("bicubic",) or antialias:  # known to the 2-d op only
                side = rows[..., None]
                size2 = None if target is None else (target, 1)
                factor2 = None if factor is None else (factor, 1.0)
                out = F.interpolate(side, size2, factor2, mode, antialias=antialias, **options)
                return out[..., 0]
            return F.interpolate(rows, target, factor, _ALONG.get(mode, mode), **options)

        return resample

    return separable(x, [along(axis) for axis in range(axes)])


@rule(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
def upsample_module(module: nn.Upsample, x: Node) -> Affine:
    m = module
    return interpolate(x, m.size, m.scale_factor, m.mode, m.align_corners)


@rule(torch.mean, "mean")
def mean(x: Node, dim=None, keepdim: bool = False) -> Affine | Node:
    return _reduce(x, dim, keepdim, average=True)


@rule(torch.sum, "sum")
def total(x: Node, dim=None, keepdim: bool = False) -> Affine | Node:
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
    fixed = Separable(x.shape, full, tuple(matrices))
    reduced = Node(Affine(lambda: fixed), (x,), full)
    if keepdim:
        return reduced
    return Node(copying(lambda t: t.reshape(len(t), *kept), reduced), (reduced,), tuple(kept))


@rule(F.pad)
def pad(x: Node, pad, mode: str = "constant", value: float | None = None) -> Node:
    mode = "constant" if mode == "zeros" else mode
    if mode == "constant" and value:
        zeros = Node(copying(lambda t: F.pad(t, list(pad)), x), (x,), ())
        shape = zeros.op.map().out_shape  # type: ignore[union-attr]
        frame = F.pad(torch.zeros(1, *x.shape), list(pad), value=value)[0]
        op = Affine(zeros.op.map, live(frame))  # type: ignore[union-attr]
        return Node(op, (x,), shape)
    op = copying(lambda t: F.pad(t, list(pad), mode=mode), x)
    return Node(op, (x,), op.map().out_shape)


