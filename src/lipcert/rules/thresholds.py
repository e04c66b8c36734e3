"""Rules of activations with learned thresholds."""

import math

import torch
from torch import Tensor

from lipcert.graph import Node, Slope, node
from lipcert.layers import ClippedMaxMin, ClippedReLU
from lipcert.rules.one_lipschitz import sorted_pairs
from lipcert.rules.registry import rule
from lipcert.rules.slopes import piecewise_linear

_UP_BETWEEN = (0.0, 1.0, 0.0)


@rule(ClippedReLU)
def _clipped_relu(module: ClippedReLU, x: Node) -> Slope:
    return piecewise_linear(module, lambda: ((0.0, module.threshold), _UP_BETWEEN))


@rule(ClippedMaxMin)
def _clipped_max_min(module: ClippedMaxMin, x: Node) -> Node:
    """Sorted pairs; then maxima rise up to their threshold, and minima from theirs on."""

    def breaks() -> tuple[Tensor, Tensor]:
        no_end = torch.full_like(module.upper, math.inf)
        return torch.cat([-no_end, module.lower]), torch.cat([module.upper, no_end])

    held = piecewise_linear(module.clip, lambda: (breaks(), _UP_BETWEEN))
    return node(held, node(sorted_pairs(module.sort, x), x))
