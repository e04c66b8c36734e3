"""Rules of affine layers: dense, convolution, normalisation in eval mode, padding."""

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lipcert.convolution import convolution
from lipcert.errors import LipcertError
from lipcert.graph import Affine, KnownNorm, Node
from lipcert.kinds import Constant, Kind
from lipcert.layers import Normalize, RecordingBatchNorm2d
from lipcert.linear_kinds import Dense, Scale
from lipcert.linear_map import LinearMap
from lipcert.rules.registry import Live, attribute, live, rule
from lipcert.rules.structural import copying


def _dense(x: Node, weight: Live, bias: Live | None) -> Affine:
    def map() -> LinearMap:
        w = weight()
        return Dense(x.shape, (*x.shape[:-1], len(w)), w)

    return Affine(map, bias)


@rule(nn.Linear)
def _linear_module(module: nn.Linear, x: Node) -> Affine:
    weight = attribute(module, "weight")
    assert weight is not None
    return _dense(x, weight, attribute(module, "bias"))


@rule(F.linear)
def _linear_function(x: Node, weight: Live, bias: Live | None = None) -> Affine:
    return _dense(x, weight, bias)


@rule(operator.matmul, torch.matmul, "matmul")
def _matmul(x: Node | Live, other: Node | Live) -> Affine:
    if isinstance(x, Node) and isinstance(other, Live) and other().ndim == 2:
        return _dense(x, Live(lambda: other().mT), None)
    if isinstance(x, Node) and isinstance(other, Node):
        raise LipcertError("a product of two functions of the input is not Lipschitz")
    raise LipcertError("only x @ W with a constant matrix W has a rule; use F.linear")


def per_axis(value, axes: int) -> tuple:
    """One number an axis, from one number for all or a sequence."""
    numbers = tuple(value) if isinstance(value, tuple | list) else (value,)
    return numbers * axes if len(numbers) == 1 else numbers


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
    stride, dilation = per_axis(stride, axes), per_axis(dilation, axes)
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = tuple((t // 2, t - t // 2) for t in total)
    else:
        sides = tuple((p, p) for p in per_axis(padding, axes))
    circulant = all(
        before + after == d * (k - 1) and n % s == 0
        for (before, after), d, k, n, s in zip(
            sides, dilation, kernel, x.shape[1:], stride, strict=True
        )
    )
    circular = mode == "circular" and circulant
    if mode != "zeros" and not circular:
        x = _pad(x, [side for pair in reversed(sides) for side in pair], mode)
        sides = ((0, 0),) * axes
    shape = x.shape

    def map() -> LinearMap:
        return convolution(weight(), shape, stride, sides, dilation, groups, circular)

    shift = None if bias is None else Live(lambda: bias().reshape(-1, *(1,) * axes))
    return Node(Affine(map, shift), (x,), map().out_shape)


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution_module(module: _ConvNd, x: Node) -> Affine | Node:
    weight = attribute(module, "weight")
    assert weight is not None
    bias = attribute(module, "bias")
    geometry = module.stride, module.padding, module.dilation, module.groups
    return _convolve(x, weight, bias, *geometry, mode=module.padding_mode)


@rule(F.conv1d, F.conv2d, F.conv3d)
def _convolution_function(
    x: Node, weight: Live, bias: Live | None = None, stride=1, padding=0, dilation=1, groups=1
) -> Affine | Node:
    return _convolve(x, weight, bias, stride, padding, dilation, groups)


def _deconvolve(
    x: Node, weight: Live, bias: Live | None, stride, padding, extra, groups, dilation
) -> Affine:
    """The adjoint of the convolution with the same weight, from this output back to x."""
    axes = weight().ndim - 2
    stride, padding, extra, dilation = (
        per_axis(v, axes) for v in (stride, padding, extra, dilation)
    )
    kernel = weight().shape[2:]
    if any(e >= s for e, s in zip(extra, stride, strict=True)):
        raise LipcertError(f"output_padding={extra} is not below stride={stride}")
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
def _deconvolution_module(module: _ConvTransposeNd, x: Node) -> Affine:
    weight = attribute(module, "weight")
    assert weight is not None
    bias = attribute(module, "bias")
    m = module
    return _deconvolve(x, weight, bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation)


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _deconvolution_function(
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


def _precise(number: Tensor) -> Tensor:
    """In float64: a factor that is computed must not be rounded to the precision of the weights."""
    return number.to(torch.float64)


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
        inverse = (_precise(variance()) + eps).rsqrt()
        return inverse if weight is None else weight() * inverse

    def map() -> LinearMap:
        return Scale(shape, shape, gain().reshape(column))

    def shift() -> Tensor:
        offset = -mean() * gain()
        return (offset if bias is None else offset + bias()).reshape(column)

    return Affine(map, shift)


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, RecordingBatchNorm2d)
def _batch_norm_module(module: _BatchNorm, x: Node) -> Affine:
    mean, variance = attribute(module, "running_mean"), attribute(module, "running_var")
    weight, bias = attribute(module, "weight"), attribute(module, "bias")
    return _batch_norm(x, mean, variance, weight, bias, module.eps)


@rule(F.batch_norm)
def _batch_norm_function(
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


@rule(Normalize)
def _normalize(module: Normalize, x: Node) -> Affine:
    column = (-1, *(1,) * (len(x.shape) - 1))

    def map() -> LinearMap:
        return Scale(x.shape, x.shape, 1 / _precise(module.std).reshape(column))

    def proved() -> Constant:
        return Constant((1 / _precise(module.std)).abs().max(), Kind.UPPER)

    known = KnownNorm(proved, lambda: float(proved()))
    return Affine(map, lambda: (-module.mean / _precise(module.std)).reshape(column), known)


@rule(F.pad)
def _pad(x: Node, pad, mode: str = "constant", value: float | None = None) -> Node:
    mode = "constant" if mode == "zeros" else mode
    if mode == "constant" and value:
        zeros = Node(copying(lambda t: F.pad(t, list(pad)), x), (x,), ())
        shape = zeros.op.map().out_shape  # type: ignore[union-attr]
        frame = F.pad(torch.zeros(1, *x.shape), list(pad), value=value)[0]
        op = Affine(zeros.op.map, live(frame))  # type: ignore[union-attr]
        return Node(op, (x,), shape)
    op = copying(lambda t: F.pad(t, list(pad), mode=mode), x)
    return Node(op, (x,), op.map().out_shape)
