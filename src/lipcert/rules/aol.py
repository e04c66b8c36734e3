"""Rules of almost-orthogonal layers: linear maps that know their norm."""

from lipcert.convolution import convolution
from lipcert.graph import Affine, KnownNorm, Node
from lipcert.layers import AOLConv2d, AOLLinear
from lipcert.linear_kinds import Dense
from lipcert.linear_map import LinearMap
from lipcert.rules.registry import Live, attribute, rule


@rule(AOLLinear)
def _linear(module: AOLLinear, x: Node) -> Affine:
    def map() -> LinearMap:
        matrix = module.matrix()
        return Dense(x.shape, (*x.shape[:-1], len(matrix)), matrix)

    return Affine(map, attribute(module, "bias"), KnownNorm(module.constant))


@rule(AOLConv2d)
def _convolution(module: AOLConv2d, x: Node) -> Affine:
    stride, sides = (module.stride,) * 2, ((module.padding,) * 2,) * 2

    def map() -> LinearMap:
        return convolution(module.kernel(), x.shape, stride, sides, (1, 1), 1)

    bias = attribute(module, "bias")
    shift = None if bias is None else Live(lambda: bias()[:, None, None])
    return Affine(map, shift, KnownNorm(module.constant))
