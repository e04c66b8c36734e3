"""A spot check of what rules state: secant slopes of an elementwise function on a grid."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lipcert.graph import Box, Slope
from lipcert.linear_map import Shape

_GRID = torch.linspace(-10, 10, 257, dtype=torch.float64)


def slope_fault(op: Slope, shape: Shape, like: Tensor) -> str | None:
    """What contradicts the secant slopes that a rule states, or None.

    Neighbours of a grid of 257 points on [-10, 10] are compared with what the rule says for the
    interval between them and for the whole line: all of them for every neuron if the function
    takes arrays that broadcast to its shape, else some of them for each channel or neuron.

    Args:
        op: The node's fact.
        shape: Shape of the node's value, without the batch.
        like: Has the precision and the device that the function is called with.
    """
    with torch.no_grad():
        for ends in _neighbours(shape):
            lower, upper = (end.to(like) for end in ends)
            try:
                before, after = op.fn(lower.clone()), op.fn(upper.clone())
            except (RuntimeError, TypeError, ValueError, LookupError):
                continue  # it insists on its own shape
            return _contradiction(op, (_plain(lower), _plain(upper)), before, after)
    return f"its function does not run on arrays of shape (n, {', '.join(map(str, shape))})"


def _neighbours(shape: Shape) -> Iterator[Box]:
    """Pairs of neighbours on the grid, in ever larger arrays, until one is of the whole shape."""
    point = (1,) * len(shape)
    for entries in dict.fromkeys((point, (*shape[:1], *point[1:]), shape)):
        count = math.prod(entries)
        rows = max(4, 1024 // count) if count > 1 else 256
        # From row to row each entry moves on by 97, so that it meets both signs within four.
        place = (torch.arange(count) + 97 * torch.arange(rows)[:, None]) % 256
        yield tuple(_GRID[place + step].reshape(rows, *entries) for step in (0, 1))  # type: ignore[misc]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.cpu().double()


def _contradiction(op: Slope, interval: Box, before: Tensor, after: Tensor) -> str | None:
    """The first secant slope outside what the rule says, told to the user."""
    gap, rise = interval[1] - interval[0], _plain(after) - _plain(before)
    size = sum(_plain(t).abs() for t in (*interval, before, after))
    slack = 1e-6 * gap + 8 * torch.finfo(after.dtype).eps * size  # and for rounding
    line = torch.full_like(gap, math.inf)
    for ends in (interval, (-line, line)):
        low, high = (_plain(end) for end in op.secants(*ends))
        wrong = ~((low * gap - slack <= rise) & (rise <= high * gap + slack))
        if wrong.any():
            told = (ends[0], ends[1], low, high, interval[0], interval[1], rise / gap)
            numbers = [float(t.expand_as(wrong)[wrong][0]) for t in told]
            return (
                "its rule states slopes in [{2:.6g}, {3:.6g}] between {0:.6g} and {1:.6g}, but "
                "from {4:.6g} to {5:.6g} the slope is {6:.6g}; correct the rule".format(*numbers)
            )
    return None
