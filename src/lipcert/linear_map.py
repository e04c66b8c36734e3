"""Linear maps with their adjoints. Knows no networks and no norms.

A map acts on batches: `apply` takes `(b, *in_shape)` to `(b, *out_shape)`, `adjoint` goes back.
The kinds are few and final, and their structure stays visible: apply and adjoint alone would give
neither |W| for boxes nor a frequency symbol for norms. Maps are immutable; their tensors are the
live parameters they were built from, so results are differentiable in the weights.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LinearMap(ABC):
    """A linear map from arrays of shape `in_shape` to arrays of shape `out_shape`."""

    in_shape: Shape
    out_shape: Shape

    @abstractmethod
    def apply(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """A x for each array of the batch."""

    def adjoint(self, y: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """A^T y for each array of the batch; by automatic differentiation unless a kind knows."""
        zero = y.new_zeros(y.shape[0], *self.in_shape)
        return torch.func.vjp(self.apply, zero)[1](y)[0]

    def magnitude(self) -> "LinearMap":
        """A map whose entries are at least the absolute values of the entries of this one.

        Exactly |A|, but for the products and sums of `Composition` and `Add`, where terms that
        would cancel add up. By the dense matrix unless a kind knows.
        """
        return Matrix(self.in_shape, self.out_shape, self.dense().abs())

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """A box holding A x for every x in the box: A (l + u) / 2 -+ |A| (u - l) / 2.

        The smallest one where `magnitude` is exact. Where an end is infinite or NaN, so may be
        every end that comes of it: nothing is known there.

        Args:
            lower: Lower ends, shape `(b, *in_shape)`.
            upper: Upper ends, the same shape.

        Returns:
            Lower and upper ends, shape `(b, *out_shape)`, differentiable in weights and ends.
        """
        centre = self.apply((lower + upper) / 2)
        radius = self.magnitude().apply((upper - lower) / 2)
        return centre - radius, centre + radius

    @property
    def in_size(self) -> int:
        """Number of inputs."""
        return math.prod(self.in_shape)

    @property
    def out_size(self) -> int:
        """Number of outputs."""
        return math.prod(self.out_shape)

    def tensors(self) -> list[Tensor]:
        """The floating-point tensors the map is made of (its weights), parts included."""
        found: list[Tensor] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, LinearMap):
                    found += item.tensors()
                elif isinstance(item, Tensor) and item.is_floating_point():
                    found.append(item)
        return found

    @property
    def like(self) -> Tensor:
        """A tensor with the precision and device of the weights.

        Numbers and fixed matrices adapt to what they meet; they are float64 and on the CPU, so the
        weights are what is less precise or elsewhere. Float64 for a map without any.
        """
        tensors = self.tensors() or [torch.zeros((), dtype=torch.float64)]
        weights = [t for t in tensors if t.ndim] or tensors
        return min(weights, key=lambda t: (t.element_size(), t.device.type == "cpu"))

    def to(self, dtype: torch.dtype) -> "LinearMap":
        """The same map with its weights in another precision; still differentiable in them."""

        def cast(value):
            if isinstance(value, LinearMap):
                return value.to(dtype)
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.to(dtype)
            if isinstance(value, tuple):
                return tuple(cast(item) for item in value)
            return value

        return dataclasses.replace(
            self, **{f.name: cast(getattr(self, f.name)) for f in dataclasses.fields(self)}
        )

    def dense(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "out in"]:
        """The matrix of the map on flattened arrays: the slow oracle."""
        identity = torch.eye(self.in_size, dtype=dtype, device=self.like.device)
        columns = self.to(dtype).apply(identity.reshape(-1, *self.in_shape))
        return columns.reshape(self.in_size, self.out_size).mT

    @property
    def T(self) -> "LinearMap":
        """The transposed map."""
        return Transpose(self.out_shape, self.in_shape, self)

    def __matmul__(self, other: "LinearMap") -> "LinearMap":
        return Composition(other.in_shape, self.out_shape, (other, self))

    def __add__(self, other: "LinearMap") -> "LinearMap":
        return Add(self.in_shape, self.out_shape, (self, other))


@dataclass(frozen=True, eq=False)
class Matrix(LinearMap):
    """A matrix acting on the flattened array; the form of last resort for boxes."""

    weight: Float[Tensor, "out in"]

    def apply(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.weight.to(x).mT).reshape(-1, *self.out_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        return (y.flatten(1) @ self.weight.to(y)).reshape(-1, *self.in_shape)

    def magnitude(self) -> LinearMap:
        return dataclasses.replace(self, weight=self.weight.abs())


@dataclass(frozen=True, eq=False)
class Transpose(LinearMap):
    """The adjoint of `inner` as a map: a transposed convolution, for one."""

    inner: LinearMap

    def apply(self, x: Tensor) -> Tensor:
        return self.inner.adjoint(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.inner.apply(y)

    def magnitude(self) -> LinearMap:
        return self.inner.magnitude().T

    @property
    def T(self) -> LinearMap:
        return self.inner


@dataclass(frozen=True, eq=False)
class Composition(LinearMap):
    """`factors` one after the other, the first one applied first."""

    factors: tuple[LinearMap, ...]

    def apply(self, x: Tensor) -> Tensor:
        for factor in self.factors:
            x = factor.apply(x)
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            y = factor.adjoint(y)
        return y

    def magnitude(self) -> LinearMap:
        """The product of the magnitudes: an upper bound."""
        return dataclasses.replace(self, factors=tuple(f.magnitude() for f in self.factors))


@dataclass(frozen=True, eq=False)
class Add(LinearMap):
    """The sum of `terms`."""

    terms: tuple[LinearMap, ...]

    def apply(self, x: Tensor) -> Tensor:
        return sum((t.apply(x) for t in self.terms[1:]), start=self.terms[0].apply(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return sum((t.adjoint(y) for t in self.terms[1:]), start=self.terms[0].adjoint(y))

    def magnitude(self) -> LinearMap:
        """The sum of the magnitudes: an upper bound."""
        return dataclasses.replace(self, terms=tuple(t.magnitude() for t in self.terms))


@dataclass(frozen=True, eq=False)
class Stack(LinearMap):
    """The outputs of `parts`, flattened and put one behind the other."""

    parts: tuple[LinearMap, ...]

    def apply(self, x: Tensor) -> Tensor:
        return torch.cat([p.apply(x).flatten(1) for p in self.parts], 1)

    def adjoint(self, y: Tensor) -> Tensor:
        pieces = y.split([p.out_size for p in self.parts], 1)
        pairs = zip(self.parts, pieces, strict=True)
        return sum(p.adjoint(piece.reshape(-1, *p.out_shape)) for p, piece in pairs)  # type: ignore[return-value]

    def magnitude(self) -> LinearMap:
        return dataclasses.replace(self, parts=tuple(p.magnitude() for p in self.parts))


@dataclass(frozen=True, eq=False)
class Generic(LinearMap):
    """Any linear function of a batch, its structure unknown: `fn(x)` without bias.

    `fn` takes arrays of every floating-point precision; norms call it in float64.
    """

    fn: Callable[[Tensor], Tensor]

    def apply(self, x: Tensor) -> Tensor:
        return self.fn(x)
