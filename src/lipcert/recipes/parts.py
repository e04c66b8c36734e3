"""Pieces that several recipes share."""

from collections.abc import Iterable

import torch
from torch import nn

from lipcert.bounds import Bound, Product
from lipcert.graph import Graph
from lipcert.spectral import PowerIteration


def product_by_power_iteration(graph: Graph) -> Bound:
    """The product bound with one warm power-iteration step a call: an estimate, for training."""
    return Product(graph, norm=PowerIteration(1))


def adam(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Adam with its default moments."""
    return torch.optim.Adam(parameters, learning_rate)
