"""Average pooling and convolutions folded into one convolution: the same map, or none."""

import pytest
import torch
from torch import nn

import lipcert as lc
from lipcert.bounds.cover import circular_cover
from lipcert.folding import as_convolution
from lipcert.simplify import simplify
from oracles import differences, jacobians
from test_api import jaxtyping_off


@pytest.fixture(autouse=True)
def unchecked():
    with jaxtyping_off():
        yield


def map_of(net, shape):
    """The one affine map that a network is."""
    graph = lc.trace(net, shape)
    assert len(graph.nodes) == 2
    return simplify(graph.output.op.map())


FOLDED = {
    "pooling": (nn.AvgPool2d(2), (2, 6, 4)),
    "left over cells": (nn.AvgPool2d(2), (2, 5, 5)),
    "overlapping": (nn.AvgPool2d(3, 2), (2, 7, 7)),
    "one axis": (nn.AvgPool2d((2, 1)), (2, 6, 5)),
    "convolution, then pooling": (
        nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.AvgPool2d(2)),
        (2, 6, 6),
    ),
    "strided, then pooling": (nn.Sequential(nn.Conv2d(2, 3, 4, 2, 1), nn.AvgPool2d(2)), (2, 8, 8)),
    "pooling, then convolution": (
        nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(2, 3, 3, 1, 1)),
        (2, 6, 6),
    ),
    "pooling, then strides": (nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(2, 3, 4, 2, 1)), (2, 8, 8)),
    "grouped": (nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 4, 3, 1, 1, groups=2)), (4, 6, 6)),
    "no padding": (nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(2, 3, 2)), (2, 7, 6)),
    "one dimension": (nn.Sequential(nn.AvgPool1d(2), nn.Conv1d(2, 3, 3, 1, 1)), (2, 8)),
    "two convolutions": (nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.Conv2d(3, 2, 2, 2)), (2, 6, 6)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_it_is_the_same_map(name):
    torch.manual_seed(0)
    net, shape = FOLDED[name]
    net.double()  # made before the tests' precision was set
    for layer in net.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            layer.reset_parameters()
            nn.init.zeros_(layer.bias)
    map = map_of(net, shape)
    conv = as_convolution(map)
    assert conv is not None
    x = torch.randn(5, *shape)
    torch.testing.assert_close(conv.apply(x), net(x))


UNFOLDED = {
    "cells that padding would hide": (
        nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(2, 3, 3, 1, 1)),
        (2, 7, 7),
    ),
    "padding after a convolution": (
        nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.Conv2d(3, 2, 3, 1, 1)),
        (2, 6, 6),
    ),
    "divisors that differ": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (2, 7, 7)),
    "uneven windows": (nn.AdaptiveAvgPool2d(3), (2, 8, 8)),
}


@pytest.mark.parametrize("name", UNFOLDED)
def test_others_are_none(name):
    assert as_convolution(map_of(*UNFOLDED[name])) is None


def test_networks_with_pooling_go_by_frequency():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(16, 3)),
    ).eval()
    graph = lc.trace(net, (2, 8, 8))
    cover = circular_cover(graph)
    assert len(cover.of) == 5
    with torch.no_grad():
        bound = lc.Ellipsoid(graph)
        bound._ways = [way for way in bound._ways if way.cover is not None]
        K = bound().dense()[0]
    J = jacobians(net, 3 * torch.randn(200, 2, 8, 8))
    off = ~torch.eye(3, dtype=torch.bool)
    assert (differences(J)[..., off] <= (1 + 1e-9) * K[off]).all()
