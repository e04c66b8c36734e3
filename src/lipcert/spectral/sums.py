"""Operator norms for l-infinity and l1, which are sums of absolute values: exact, no iteration."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lipcert.kinds import Constant, Kind
from lipcert.linear_map import Add, Composition, Generic, LinearMap, Shape, Stack, Transpose
from lipcert.simplify import simplify
from lipcert.spectral.strategy import Strategy

_CHUNK_BYTES = 2**27


@dataclass(frozen=True)
class _Sums(Strategy):
    kind: ClassVar[Kind] = Kind.UPPER

    def __call__(self, map: LinearMap) -> Constant:
        return Constant(self._largest(simplify(map.to(torch.float64))), self.kind)

    @abstractmethod
    def _largest(self, map: LinearMap) -> Tensor:
        """The largest of the sums."""


@dataclass(frozen=True)
class RowSum(_Sums):
    """The largest sum of absolute values of a row: the operator norm from l-infinity to itself.

    Bounds with this strategy are l-infinity bounds: how far any one value changes when every input
    entry changes by at most 1. In float64.
    """

    p: ClassVar[float] = math.inf

    def _largest(self, map: LinearMap) -> Tensor:
        if _has_parts(map):
            return _largest_sum(map.adjoint, map.out_shape, map.in_size, map.like)
        ones = map.like.new_ones(1, *map.in_shape)
        return map.magnitude().apply(ones).max()


@dataclass(frozen=True)
class ColumnSum(_Sums):
    """The largest sum of absolute values of a column: the operator norm from l1 to itself.

    Bounds with this strategy are l1 bounds: how much all values together change for a change of
    the inputs by 1 in all. In float64.
    """

    p: ClassVar[float] = 1.0

    def _largest(self, map: LinearMap) -> Tensor:
        if _has_parts(map):
            return _largest_sum(map.apply, map.in_shape, map.out_size, map.like)
        ones = map.like.new_ones(1, *map.out_shape)
        return map.magnitude().adjoint(ones).max()


def _has_parts(map: LinearMap) -> bool:
    """Whether absolute values of the parts would not be those of the whole."""
    return isinstance(map, Composition | Add | Stack | Transpose | Generic)


def _largest_sum(
    apply: Callable[[Tensor], Tensor], shape: Shape, other: int, like: Tensor
) -> Tensor:
    """The largest sum over the images of unit vectors of a shape, some of them at a time."""
    size = math.prod(shape)
    chunk = max(1, _CHUNK_BYTES // (8 * max(size, other)))
    best = []
    for begin in range(0, size, chunk):
        count = min(chunk, size - begin)
        basis = like.new_zeros(count, size)
        basis[torch.arange(count), begin + torch.arange(count)] = 1
        best.append(apply(basis.reshape(count, *shape)).flatten(1).abs().sum(1).max())
    return torch.stack(best).max()
