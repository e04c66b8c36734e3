"""Rules of convex-potential layers: 1-Lipschitz functions, and boxes through their two maps."""

import math

import torch.nn.functional as F
from torch import Tensor

from lipcert.graph import Box, Lipschitz, Node
from lipcert.layers import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear
from lipcert.layers.potential import ConvexPotential, Terms
from lipcert.rules.registry import rule


@rule(SLLLinear, SLLConv2d, CPLLinear, CPLConv2d)
def _potential(module: ConvexPotential, x: Node) -> Lipschitz:
    """The layer in eval mode, also while it trains."""
    column = (-1, *(1,) * (module.weight.ndim - 2))

    def terms(like: Tensor) -> Terms:
        return Terms(*(t.to(like) for t in module.terms()))

    def fn(value: Tensor) -> Tensor:
        return module.step(value, terms(value))

    def image(lower: Tensor, upper: Tensor) -> Box:
        """Interval arithmetic: through K x + c and relu, back by K^T, taken from the box of x."""
        kernel, gain, offset = terms(lower)
        map = module.map(kernel, x.shape)
        gain, offset = gain.reshape(column), offset.reshape(column)
        low, high = _known(*map.interval(lower, upper))
        back = map.T.interval(gain * F.relu(low + offset), gain * F.relu(high + offset))
        return _known(lower - back[1], upper - back[0])

    return Lipschitz(fn, x.shape, lambda: module.constant().value, image)


def _known(lower: Tensor, upper: Tensor) -> Box:
    """A box without NaN, which intervals with infinite ends make: nothing is known there."""
    return lower.where(~lower.isnan(), -math.inf), upper.where(~upper.isnan(), math.inf)
