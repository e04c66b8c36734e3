"""The slopes of elementwise functions over all inputs, as bounds use them."""

import math

import torch
from torch import Tensor

from lipcert.graph import Box, Node, Slope


def everywhere(n: Node) -> Box:
    """The least and the greatest secant slope of a `Slope` node over all inputs, float64.

    A number each where every neuron has the same, else tensors that broadcast to the node's shape.
    """
    assert isinstance(n.op, Slope)
    infinite = torch.full((1,) * (len(n.shape) + 1), math.inf, dtype=torch.float64)
    low, high = n.op.secants(-infinite, infinite)
    return _of_one_sample(low), _of_one_sample(high)


def steepest(n: Node) -> Tensor:
    """The largest slope of any neuron anywhere, in size."""
    low, high = everywhere(n)
    return torch.maximum(low.abs().max(), high.abs().max())


def _of_one_sample(slopes: Tensor) -> Tensor:
    return slopes.reshape(()) if slopes.numel() == 1 else slopes.squeeze(0)
