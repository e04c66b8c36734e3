"""Rules of orthogonal layers, which know a bound of their norm, and of what goes with them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lipcert.convolution import convolution
from lipcert.errors import LipcertError
from lipcert.graph import Affine, Box, KnownNorm, Lipschitz, Node
from lipcert.layers import (
    BatchCentering,
    BjorckConv2d,
    BjorckLinear,
    CholeskyLinear,
    FitChannels,
    L2Pool2d,
    LastLayerNormalized,
    LinearResidualConv2d,
    SOCConv2d,
)
from lipcert.layers.orthogonal import OrthogonalLinear
from lipcert.linear_kinds import Dense
from lipcert.linear_map import Generic, LinearMap
from lipcert.rules.registry import attribute, rule
from lipcert.rules.structural import copying


@rule(BjorckLinear, CholeskyLinear)
def _linear(module: OrthogonalLinear, x: Node) -> Affine:
    return Affine(_dense(module, x), attribute(module, "bias"), known=KnownNorm(module.constant))


@rule(LastLayerNormalized)
def _last_layer(module: LastLayerNormalized, x: Node) -> Affine:
    return Affine(_dense(module, x), attribute(module, "bias"))


def _dense(module: OrthogonalLinear | LastLayerNormalized, x: Node) -> Callable[[], LinearMap]:
    out_shape = (*x.shape[:-1], len(module.weight))
    return lambda: Dense(x.shape, out_shape, module.matrix())


@rule(BjorckConv2d)
def _bjorck(module: BjorckConv2d, x: Node) -> Affine:
    map = _convolution(module, x, module.stride, module.padding)
    return Affine(map, _column(module), known=KnownNorm(module.constant))


@rule(LinearResidualConv2d)
def _linear_residual(module: LinearResidualConv2d, x: Node) -> Affine:
    return Affine(_convolution(module, x, 1, module.weight.shape[-1] // 2), _column(module))


def _convolution(
    module: BjorckConv2d | LinearResidualConv2d, x: Node, stride: int, padding: int
) -> Callable[[], LinearMap]:
    sides = ((padding, padding),) * 2
    return lambda: convolution(module.kernel(), x.shape, (stride, stride), sides, (1, 1), 1)


@rule(SOCConv2d)
def _soc(module: SOCConv2d, x: Node) -> Affine:
    height, width = (n // module.stride for n in x.shape[1:])
    map = Generic(x.shape, (module.out_channels, height, width), module.linear)
    return Affine(lambda: map, _column(module), known=KnownNorm(module.constant))


def _column(module: nn.Module) -> Callable[[], Tensor] | None:
    """The bias of a 2-d convolution, one number a channel."""
    bias = attribute(module, "bias")
    return None if bias is None else lambda: bias().reshape(-1, 1, 1)


@rule(BatchCentering)
def _centering(module: BatchCentering, x: Node) -> Affine:
    column = (-1, *(1,) * (len(x.shape) - 1))
    same = copying(lambda t: t, x)
    return Affine(same.map, lambda: (module.bias - module.mean).reshape(column), same.known)


@rule(FitChannels)
def _fit_channels(module: FitChannels, x: Node) -> Affine:
    return copying(module, x)


@rule(L2Pool2d)
def _l2_pool(module: L2Pool2d, x: Node) -> Lipschitz:
    """The norm of a window rises with the size of each entry."""

    def image(lower: Tensor, upper: Tensor) -> Box:
        largest = torch.maximum(lower.abs(), upper.abs())
        least = torch.maximum(lower, -upper).clamp(min=0)
        return module(least), module(largest)

    def needs(outputs: Tensor) -> Tensor:
        return outputs.repeat_interleave(module.size, 2).repeat_interleave(module.size, 3)

    channels, height, width = x.shape
    if height % module.size or width % module.size:
        raise LipcertError(f"windows of {module.size} cells do not fit an input of {x.shape}")
    shape = (channels, height // module.size, width // module.size)
    return Lipschitz(module, shape, lambda: 1.0, image, needs=needs)
