"""Secant slopes and images of elementwise functions on intervals, infinite ones included.

Two families cover the activations in use: piecewise linear ones, and smooth ones whose derivative
is monotone between a few known points.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lipcert.graph import Box, Slope

Numbers = Sequence[Tensor | float]


def piecewise_linear(
    fn: Callable[[Tensor], Tensor], pieces: Callable[[], tuple[Numbers, Numbers]]
) -> Slope:
    """A continuous piecewise linear function.

    Args:
        fn: The function.
        pieces: Gives the ascending break points and the slopes of the pieces, one more than
            breaks; each a number or a live tensor that broadcasts to the sample's shape.
    """

    def secants(lower: Tensor, upper: Tensor) -> Box:
        breaks, slopes = pieces()
        ends = [-math.inf, *breaks, math.inf]
        point = lower == upper
        low = torch.full_like(lower, math.inf)
        high = torch.full_like(lower, -math.inf)
        for begin, end, slope in zip(ends[:-1], ends[1:], slopes, strict=True):
            left = torch.maximum(lower, torch.as_tensor(begin).to(lower))
            right = torch.minimum(upper, torch.as_tensor(end).to(upper))
            met = (left < right) | (point & (left == right))
            value = torch.as_tensor(slope).to(lower)
            low = torch.where(met, torch.minimum(low, value), low)
            high = torch.where(met, torch.maximum(high, value), high)
        return low, high

    def image(lower: Tensor, upper: Tensor) -> Box:
        breaks, slopes = pieces()
        limits = []
        for x, slope, near, way in (
            (lower, slopes[0], breaks[0], -1),
            (upper, slopes[-1], breaks[-1], 1),
        ):
            rise = torch.as_tensor(slope).to(x) * way
            flat = fn(torch.as_tensor(near).to(x).expand_as(x))
            limits.append(torch.where(rise == 0, flat, rise.sign() * math.inf))
        ends = (_at(fn, lower, limits), _at(fn, upper, limits))
        return _range(fn, lower, upper, ends, breaks)

    return Slope(fn, secants, image)


def smooth(
    fn: Callable[[Tensor], Tensor],
    derivative: Callable[[Tensor], Tensor],
    peaks: Numbers = (),
    tails: tuple[float, float] = (0.0, 0.0),
    turns: Numbers = (),
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> Slope:
    """A function whose derivative is monotone between the points `peaks`.

    By the mean value theorem secant slopes on an interval lie between the least and the greatest
    derivative there, taken at the ends or at a peak inside.

    Args:
        fn: The function.
        derivative: Its derivative.
        peaks: Where the derivative has its local extrema or jumps.
        tails: Limits of the derivative at minus and plus infinity.
        turns: Where the function itself has its local extrema.
        limits: Limits of the function at minus and plus infinity.
    """

    def secants(lower: Tensor, upper: Tensor) -> Box:
        at_tails = [torch.full_like(lower, t) for t in tails]
        ends = (_at(derivative, lower, at_tails), _at(derivative, upper, at_tails))
        return _range(derivative, lower, upper, ends, peaks)

    def image(lower: Tensor, upper: Tensor) -> Box:
        at_limits = [torch.full_like(lower, t) for t in limits]
        ends = (_at(fn, lower, at_limits), _at(fn, upper, at_limits))
        return _range(fn, lower, upper, ends, turns)

    return Slope(fn, secants, image)


def everywhere(
    fn: Callable[[Tensor], Tensor], slopes: tuple[float, float], values: tuple[float, float]
) -> Slope:
    """A function of which only the overall range of slopes and values is used."""

    def constant(pair: tuple[float, float]) -> Callable[[Tensor, Tensor], Box]:
        return lambda lower, upper: (
            torch.full_like(lower, pair[0]),
            torch.full_like(upper, pair[1]),
        )

    return Slope(fn, constant(slopes), constant(values))


def _at(fn: Callable[[Tensor], Tensor], x: Tensor, limits: Sequence[Tensor]) -> Tensor:
    """fn(x), with its limits at minus and plus infinity."""
    value = fn(torch.where(x.isinf(), 0, x))
    value = torch.where(x == -math.inf, limits[0], value)
    return torch.where(x == math.inf, limits[1], value)


def _range(
    fn: Callable[[Tensor], Tensor],
    lower: Tensor,
    upper: Tensor,
    ends: tuple[Tensor, Tensor],
    interior: Numbers,
) -> Box:
    """Least and greatest of the values at the ends and at the given points inside."""
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    for point in interior:
        x = torch.as_tensor(point).to(lower).expand_as(lower)
        inside = (lower <= x) & (x <= upper)
        value = fn(x)
        low = torch.where(inside, torch.minimum(low, value), low)
        high = torch.where(inside, torch.maximum(high, value), high)
    return low, high
