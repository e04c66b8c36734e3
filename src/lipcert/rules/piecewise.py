"""Rules of piecewise linear activations: the slopes of their pieces."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.errors import LipcertError
from lipcert.graph import Node, Slope
from lipcert.rules.registry import attribute, refuse, rule
from lipcert.rules.slopes import piecewise_linear


def _relu(fn: Callable[[Tensor], Tensor]) -> Slope:
    return piecewise_linear(fn, lambda: ((0.0,), (0.0, 1.0)))


@rule(nn.ReLU)
def _relu_module(module: nn.ReLU, x: Node) -> Slope:
    return _relu(F.relu)


@rule(F.relu, torch.relu, torch.relu_, "relu", "relu_")
def _relu_function(x: Node, inplace: bool = False) -> Slope:
    return _relu(F.relu)


def _clamp(low: float | None, high: float | None) -> Slope:
    bottom, top = -math.inf if low is None else low, math.inf if high is None else high
    if bottom > top:
        raise LipcertError(f"clamp from {bottom} to {top}")
    if math.inf in (-bottom, top):
        one_end, slopes = (top, (1.0, 0.0)) if bottom == -math.inf else (bottom, (0.0, 1.0))
        return piecewise_linear(lambda t: t.clamp(low, high), lambda: ((one_end,), slopes))
    return piecewise_linear(lambda t: t.clamp(low, high), lambda: ((bottom, top), (0.0, 1.0, 0.0)))


@rule(torch.clamp, torch.clip, "clamp", "clip", "clamp_", "clip_")
def _clamp_function(x: Node, min: float | None = None, max: float | None = None) -> Slope:
    if any(isinstance(end, Node) for end in (min, max)):
        raise LipcertError("clamp between functions of the input; use maximum and minimum")
    if not all(end is None or isinstance(end, int | float) for end in (min, max)):
        raise LipcertError("clamp with tensors as ends has no rule; use numbers")
    return _clamp(min, max)


@rule(torch.clamp_min, "clamp_min", "clamp_min_")
def _clamp_min(x: Node, min: float) -> Slope:
    return _clamp(min, None)


@rule(torch.clamp_max, "clamp_max", "clamp_max_")
def _clamp_max(x: Node, max: float) -> Slope:
    return _clamp(None, max)


@rule(nn.Hardtanh, nn.ReLU6)
def _hardtanh_module(module: nn.Hardtanh, x: Node) -> Slope:
    return _clamp(module.min_val, module.max_val)


@rule(F.hardtanh, F.hardtanh_)
def _hardtanh_function(x: Node, min_val=-1.0, max_val=1.0, inplace: bool = False) -> Slope:
    return _clamp(min_val, max_val)


@rule(F.relu6)
def _relu6_function(x: Node, inplace: bool = False) -> Slope:
    return _clamp(0.0, 6.0)


@rule(torch.abs, "abs", "abs_")
def _absolute(x: Node) -> Slope:
    return piecewise_linear(torch.abs, lambda: ((0.0,), (-1.0, 1.0)))


def _leaky(negative: float) -> Slope:
    if negative == 0:
        return _relu(F.relu)  # 0 * infinity is NaN
    return piecewise_linear(lambda t: F.leaky_relu(t, negative), lambda: ((0.0,), (negative, 1.0)))


@rule(nn.LeakyReLU)
def _leaky_relu_module(module: nn.LeakyReLU, x: Node) -> Slope:
    return _leaky(module.negative_slope)


@rule(F.leaky_relu, F.leaky_relu_)
def _leaky_relu_function(x: Node, negative_slope: float = 0.01, inplace: bool = False) -> Slope:
    return _leaky(negative_slope)


@rule(nn.RReLU)
def _randomised_relu_module(module: nn.RReLU, x: Node) -> Slope:
    return _leaky((module.lower + module.upper) / 2)


@rule(nn.PReLU)
def _prelu_module(module: nn.PReLU, x: Node) -> Slope:
    weight = attribute(module, "weight")
    assert weight is not None
    return _prelu(x, weight)


@rule(F.prelu)
def _prelu_function(x: Node, weight) -> Slope:
    return _prelu(x, weight)


def _prelu(x: Node, weight: Callable[[], Tensor]) -> Slope:
    column = (-1, *(1,) * (len(x.shape) - 1))
    return piecewise_linear(
        lambda t: F.prelu(t, weight().to(t)), lambda: ((0.0,), (weight().reshape(column), 1.0))
    )


@rule(nn.Softshrink)
def _softshrink_module(module: nn.Softshrink, x: Node) -> Slope:
    return _softshrink_function(x, module.lambd)


@rule(F.softshrink)
def _softshrink_function(x: Node, lambd: float = 0.5) -> Slope:
    ends = (-lambd, lambd)
    return piecewise_linear(lambda t: F.softshrink(t, lambd), lambda: (ends, (1.0, 0.0, 1.0)))


@rule(nn.Hardsigmoid, F.hardsigmoid)
def _hardsigmoid(*args, inplace: bool = False) -> Slope:
    return piecewise_linear(F.hardsigmoid, lambda: ((-3.0, 3.0), (0.0, 1 / 6, 0.0)))


refuse(
    *(nn.Threshold, F.threshold, nn.Hardshrink, F.hardshrink, torch.sign, "sign"),
    *(torch.round, "round", torch.floor, "floor"),
    because="it jumps, so it has no Lipschitz constant; use a clamp or Softshrink",
)
