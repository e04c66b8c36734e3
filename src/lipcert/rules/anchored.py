"""Secant slopes through one point of the graph of an elementwise function.

The slope from the centre to t is the mean of the slopes met on the way, weighted by length. Put so,
nothing cancels where t is near the centre, and no rounding leads out of the slopes that are met.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lipcert.graph import Box

Numbers = Sequence[Tensor | float]
Secants = Callable[[Tensor, Tensor], Box]
Anchored = Callable[[Tensor, Tensor, Tensor], Box]

_PARTS = 4  # into which each side of the centre is cut where a slope is not piecewise constant


def of_pieces(pieces: Callable[[], tuple[Numbers, Numbers]], secants: Secants) -> Anchored:
    """For a piecewise linear function: exact, but for a few ulps on the safe side.

    On each piece the secant through the centre is monotone in its other end, so the extremes lie at
    the ends of the interval and at breaks inside it. (Those next to the centre give the slopes at
    the centre.)

    Args:
        pieces: Break points and slopes.
        secants: All secant slopes on an interval; they stand where it is a single point, where an
            end is NaN and where breaks are in the wrong order.
    """

    def anchored(centre: Tensor, lower: Tensor, upper: Tensor) -> Box:
        lower, upper = torch.minimum(lower, centre), torch.maximum(upper, centre)
        wide = secants(lower, upper)
        breaks, slopes = pieces()
        points = [torch.as_tensor(point).to(lower) for point in breaks]
        values = [torch.as_tensor(slope).to(lower) for slope in slopes]
        begins = [torch.full_like(points[0], -math.inf), *points]
        ends = [*points, torch.full_like(points[0], math.inf)]
        spans = list(zip(begins, ends, values, strict=True))
        low, high = torch.full_like(lower, math.inf), torch.full_like(lower, -math.inf)
        for t in (lower, upper, *points):
            t = torch.minimum(torch.maximum(t, lower), upper)
            mean = _mean(centre, t, spans)
            low = torch.where(t == centre, low, torch.minimum(low, mean))
            high = torch.where(t == centre, high, torch.maximum(high, mean))
        for one, next in itertools.pairwise(points):
            low = torch.where(one > next, math.nan, low)
            high = torch.where(one > next, math.nan, high)
        return _inside(wide, (low, high), 4 * len(spans))

    return anchored


def _mean(centre: Tensor, t: Tensor, spans: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The mean slope between the centre and t; NaN where they are equal or lengths overflow."""
    near, far = torch.minimum(centre, t), torch.maximum(centre, t)
    lengths = [
        (torch.minimum(far, end) - torch.maximum(near, begin)).clamp(min=0)
        for begin, end, _ in spans
    ]
    total = torch.stack(torch.broadcast_tensors(*lengths)).sum(0)
    mean = torch.zeros_like(total)
    for length, (_, _, slope) in zip(lengths, spans, strict=True):
        # A piece without an end outweighs all others.
        share = torch.where(length.isinf(), 1, length / total)
        mean = mean + share * slope
    return mean.where(total.isfinite() | t.isinf(), math.nan)


def of_derivative(secants: Secants) -> Anchored:
    """For any function: each side of the centre is cut, and the parts' slopes averaged.

    The mean of the least slopes of the parts up to t is below that of the function; within a part
    it is monotone in t, so its least value is at an end of one. Where an end is infinite it is the
    side's least slope.

    Args:
        secants: All secant slopes on an interval.
    """

    def anchored(centre: Tensor, lower: Tensor, upper: Tensor) -> Box:
        lower, upper = torch.minimum(lower, centre), torch.maximum(upper, centre)
        wide = secants(lower, upper)
        sides = [_side(centre, end, secants) for end in (lower, upper)]
        low = torch.minimum(sides[0][0], sides[1][0])
        high = torch.maximum(sides[0][1], sides[1][1])
        return _inside(wide, (low, high), 8 * _PARTS)

    return anchored


def _side(centre: Tensor, end: Tensor, secants: Secants) -> Box:
    far = torch.where(end.isfinite(), end, centre)
    points = [torch.lerp(centre, far, k / _PARTS) for k in range(1, _PARTS)]
    first, last = torch.minimum(centre, far), torch.maximum(centre, far)
    points = [torch.minimum(torch.maximum(point, first), last) for point in points]
    low = high = least = most = run = torch.zeros_like(centre)
    for k, (near, next) in enumerate(itertools.pairwise([centre, *points, far])):
        a, b = secants(torch.minimum(near, next), torch.maximum(near, next))
        length = (next - near).abs()
        run = run + length
        share = torch.where(run > 0, length / run, 1)
        low, high = low + (a - low) * share, high + (b - high) * share
        least, most = (torch.minimum(least, low), torch.maximum(most, high)) if k else (low, high)
    a, b = secants(torch.minimum(centre, end), torch.maximum(centre, end))
    return torch.where(end.isfinite(), least, a), torch.where(end.isfinite(), most, b)


def _inside(wide: Box, found: Box, roundings: int) -> Box:
    """The slopes found, a few ulps wider, where they lie inside those known before."""
    size = torch.maximum(wide[0].abs(), wide[1].abs())
    slack = roundings * torch.finfo(size.dtype).eps * size
    low, high = found[0] - slack, found[1] + slack
    low = torch.where((low >= wide[0]) & (low <= wide[1]), low, wide[0])
    return low, torch.where((high >= wide[0]) & (high <= wide[1]), high, wide[1])
