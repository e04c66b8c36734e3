"""Pieces that several recipes share."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lipcert.adversary import pgd
from lipcert.bounds import Bound, Product
from lipcert.graph import Graph
from lipcert.spectral import PowerIteration

RECALLED = "recalled, not checked against the paper's text"
"""The certainty of published numbers that nobody looked up again."""


def product_by_power_iteration(graph: Graph) -> Bound:
    """The product bound with one warm power-iteration step a call: an estimate, for training."""
    return Product(graph, norm=PowerIteration(1))


def adam(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    weight_decay: float = 0.0,
    epsilon: float = 1e-8,
) -> torch.optim.Optimizer:
    """Adam with its default moments; the decay of all parameters is part of the gradient."""
    return torch.optim.Adam(parameters, learning_rate, eps=epsilon, weight_decay=weight_decay)


def nesterov(
    parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with Nesterov momentum 0.9; the decay is part of the gradient."""
    return torch.optim.SGD(
        parameters, learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )


def attacked(net: nn.Module, x: Tensor, labels: Tensor, eps: float) -> Tensor:
    """The batch after ten steps of projected gradient ascent within eps (L2).

    A sample stays where it was first misclassified, at its own place if it is so already; one that
    is not gives the visited point of the smallest margin.
    """
    return pgd(net, x, labels, eps, steps=10).adversarial
