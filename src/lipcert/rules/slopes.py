"""Secant slopes and images of elementwise functions on intervals, infinite ones included.

Two families cover the activations in use: piecewise linear ones, and smooth ones whose derivative
is monotone between a few known points.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lipcert.graph import Box, Slope
from lipcert.rules.anchored import Numbers, of_derivative, of_pieces


def piecewise_linear(
    fn: Callable[[Tensor], Tensor], pieces: Callable[[], tuple[Numbers, Numbers]]
) -> Slope:
    """A continuous piecewise linear function.

    An interval meets a piece where they share more than a point, a single point the pieces it
    belongs to, ends included. Between breaks in the wrong order there is no piece: those around
    them overlap. What is NaN meets every piece, so that it never looks constant.

    Args:
        fn: The function.
        pieces: Gives the ascending break points and the slopes of the pieces, one more than
            breaks; each a number or a live tensor that broadcasts to the sample's shape.
    """

    def secants(lower: Tensor, upper: Tensor) -> Box:
        breaks, slopes = pieces()
        missed = _missed(lower, upper, breaks)
        numbers = [slope for slope in slopes if isinstance(slope, int | float)]
        if len(numbers) < len(slopes):
            return _hull(lower, slopes, missed)
        by_slope: dict[float, Tensor] = {}  # where all pieces of this slope are missed
        for slope, here in sorted(zip(numbers, missed, strict=True), key=lambda pair: pair[0]):
            if here is not None:
                by_slope[slope] = by_slope[slope] & here if slope in by_slope else here
        values = list(by_slope)
        low = _chosen(lower, [(v, by_slope[v]) for v in values[:-1]], values[-1])
        high = _chosen(lower, [(v, by_slope[v]) for v in values[:0:-1]], values[0])
        return low, high

    def image(lower: Tensor, upper: Tensor) -> Box:
        breaks, slopes = pieces()
        if all(isinstance(slope, int | float) and slope >= 0 for slope in slopes):
            return fn(lower), fn(upper)
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

    def flat() -> tuple[Tensor | float, Tensor | float]:
        breaks, slopes = pieces()
        begins, ends = (isinstance(s, int | float) and s == 0 for s in (slopes[0], slopes[-1]))
        return breaks[0] if begins else -math.inf, breaks[-1] if ends else math.inf

    return Slope(fn, secants, image, flat, of_pieces(pieces, secants))


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

    return Slope(fn, secants, image, anchored=of_derivative(secants))


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


def _missed(lower: Tensor, upper: Tensor, breaks: Numbers) -> list[Tensor | None]:
    """Where an interval meets nothing of each piece; None for a piece between crossed numbers."""
    # All are false where an end is NaN, and for a point on a break, which misses neither piece.
    right, left = [], []
    for point in breaks:
        at = point.to(lower) if isinstance(point, Tensor) else point
        right.append((lower >= at) & (upper > at))
        left.append((upper <= at) & (lower < at))
    missed: list[Tensor | None] = [right[0]]
    for k, (begin, end) in enumerate(itertools.pairwise(breaks)):
        crossed = begin >= end
        between = left[k] | right[k + 1]
        if isinstance(crossed, Tensor):
            missed.append(between | crossed.to(lower.device))
        else:
            missed.append(None if crossed else between)
    return [*missed, left[-1]]


def _chosen(like: Tensor, others: list[tuple[float, Tensor]], last: float) -> Tensor:
    """The first value that is not missed, else the last one."""
    if len(others) == 1 and {others[0][0], last} == {0.0, 1.0}:  # several times faster than `where`
        missed = others[0][1]
        return (missed if last else ~missed).to(like.dtype)
    values = torch.full_like(like, last)
    for value, missed in reversed(others):
        values = torch.where(missed, values, value)
    return values


def _hull(lower: Tensor, slopes: Numbers, missed: list[Tensor | None]) -> Box:
    """Least and greatest of live slopes."""
    low = torch.full_like(lower, math.inf)
    high = torch.full_like(lower, -math.inf)
    for slope, here in zip(slopes, missed, strict=True):
        if here is not None:
            value = torch.as_tensor(slope).to(lower)
            low = torch.where(here, low, torch.minimum(low, value))
            high = torch.where(here, high, torch.maximum(high, value))
    return low, high


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
