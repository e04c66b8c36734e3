"""The kinds of linear maps that layers lower to, besides convolutions."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.linear_map import LinearMap, Shape


@dataclass(frozen=True, eq=False)
class Dense(LinearMap):
    """`weight` acting on the last axis: `(..., n)` to `(..., m)`, as `nn.Linear` does."""

    weight: Float[Tensor, "m n"]

    def apply(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT

    def adjoint(self, y: Tensor) -> Tensor:
        return y @ self.weight

    def magnitude(self) -> LinearMap:
        return dataclasses.replace(self, weight=self.weight.abs())


@dataclass(frozen=True, eq=False)
class Scale(LinearMap):
    """Elementwise multiplication with `diagonal`, which broadcasts to the shape."""

    diagonal: Float[Tensor, "..."]

    def apply(self, x: Tensor) -> Tensor:
        return x * self.diagonal.to(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.apply(y)

    def magnitude(self) -> LinearMap:
        return dataclasses.replace(self, diagonal=self.diagonal.abs())


@dataclass(frozen=True, eq=False)
class Index(LinearMap):
    """Each output is a copy of one input, or zero where `source` is -1.

    Reshapes, permutations, slices, crops, zero padding, repetition: `source` holds, in the shape
    of the output, positions in the flattened input.
    """

    source: Int[Tensor, "..."]

    @cached_property
    def is_reshape(self) -> bool:
        """Whether the flattened array stays as it is."""
        places = torch.arange(self.in_size, device=self.source.device)
        return self.in_size == self.out_size and bool((self.source.flatten() == places).all())

    def apply(self, x: Tensor) -> Tensor:
        if self.is_reshape:
            return x.reshape(-1, *self.out_shape)
        source = self.source.to(x.device)
        padded = torch.cat(
            [x.reshape(len(x), self.in_size), x.new_zeros(len(x), 1)], 1
        )  # position -1 is the zero
        return padded[:, source.flatten()].reshape(-1, *self.out_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        if self.is_reshape:
            return y.reshape(-1, *self.in_shape)
        source = self.source.to(y.device).flatten() % (self.in_size + 1)
        sums = y.new_zeros(len(y), self.in_size + 1).index_add(
            1, source, y.reshape(len(y), self.out_size)
        )
        return sums[:, :-1].reshape(-1, *self.in_shape)

    def magnitude(self) -> LinearMap:
        return self

    def copies(self) -> Int[Tensor, " in"]:
        """How often each input is read."""
        kept = self.source[self.source >= 0].flatten()
        return torch.bincount(kept, minlength=self.in_size)


def identity(shape: Shape) -> Index:
    """The identity of a shape."""
    return Index(shape, shape, torch.arange(math.prod(shape)).reshape(shape))


def zero(in_shape: Shape, out_shape: Shape) -> Index:
    """The zero map between two shapes."""
    return Index(in_shape, out_shape, torch.full(out_shape, -1))


@dataclass(frozen=True, eq=False)
class Separable(LinearMap):
    """One matrix per axis (None: untouched): pooling by averages, resampling, sums over axes.

    `matrices[a]` has shape `(out_shape[a], in_shape[a])`.
    """

    matrices: tuple[Tensor | None, ...]

    def apply(self, x: Tensor) -> Tensor:
        for axis, matrix in enumerate(self.matrices, start=1):
            if matrix is not None:
                x = (x.movedim(axis, -1) @ matrix.to(x).mT).movedim(-1, axis)
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        return self.transposed().apply(y)

    def transposed(self) -> "Separable":
        """The transposed map, of the same kind."""
        turned = tuple(None if m is None else m.mT for m in self.matrices)
        return Separable(self.out_shape, self.in_shape, turned)

    def magnitude(self) -> LinearMap:
        # An entry is a product with one factor an axis.
        absolute = tuple(None if m is None else m.abs() for m in self.matrices)
        return dataclasses.replace(self, matrices=absolute)
