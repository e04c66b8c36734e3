"""Norms from iterated vectors, for one map or for many at once: estimates, for training.

`Rows` hold one vector a map, under some keys; `apply` and `adjoint` may order the maps differently
on their two sides, as a sweep through a network does.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.kinds import Constant, Kind
from lipcert.linear_map import LinearMap, Shape
from lipcert.spectral.strategy import Strategy

_MANY = 32  # vectors
_SAFE = 1e-15, 1e15  # norms whose squares are well inside the range of float32

Rows = dict[Any, Float[Tensor, "_ ..."]]
Sweep = Callable[[Rows], Rows]


@dataclass(frozen=True)
class Iterative(Strategy):
    """||A v|| for unit vectors v that get better from call to call: at most the norm of A.

    The iteration runs without gradient; the last application is differentiated, which gives the
    gradient u^T dA v of the norm at the singular vectors found. The vectors are never taken from
    the loss, so they survive batches without a gradient, and a map that becomes zero keeps its own.
    Whoever calls keeps the state: `kept` vectors a map, the first of which is v.
    """

    kept: ClassVar[int]
    kind: ClassVar[Kind] = Kind.ESTIMATE

    @abstractmethod
    def improve(self, apply: Sweep, adjoint: Sweep, state: Rows, order: Int[Tensor, " n"]) -> Rows:
        """Better states, see `refine_many`."""

    def start(self, shape: Shape, like: Tensor) -> Float[Tensor, "kept ..."]:
        """A random state for a map from arrays of this shape."""
        rows = torch.randn((self.kept, *shape), dtype=like.dtype, device=like.device)
        return units(rows, rows)

    def __call__(self, map: LinearMap) -> Constant:
        return self.refine(map, self.start(map.in_shape, map.like))[0]

    def refine(self, map: LinearMap, state: Tensor) -> tuple[Constant, Tensor]:
        """The norm of a map and a better state."""
        norms, states = self.refine_many(
            lambda rows: {0: map.apply(rows[0])},
            lambda rows: {0: map.adjoint(rows[0])},
            {0: state[None]},
            torch.zeros(1, dtype=torch.long, device=state.device),
        )
        return Constant(norms[0][0], self.kind), states[0][0]

    def refine_many(
        self, apply: Sweep, adjoint: Sweep, state: Rows, order: Int[Tensor, " n"]
    ) -> tuple[dict[Any, Float[Tensor, " _"]], Rows]:
        """The norms of many maps at once.

        Args:
            apply: From one vector a map to A v of each map.
            adjoint: From the layout of those images to A^T y of each map.
            state: States to start from, `(k, kept, *shape)`.
            order: For each map as `state` orders them its place among the images.

        Returns:
            The norm of each row of the images, and better states.
        """
        with torch.no_grad():
            state = self.improve(apply, adjoint, state, order)
        images = apply({key: rows[:, 0] for key, rows in state.items()})
        return {key: _differentiated(rows) for key, rows in images.items()}, state


def _differentiated(rows: Float[Tensor, "k ..."]) -> Float[Tensor, " k"]:
    """The norms of images A v; their gradient is that of u . A v at the unit image u."""
    with torch.no_grad():
        size, unit = norms(rows), units(rows, None)
    if not rows.requires_grad:
        return size
    along = (rows * unit).flatten(1).sum(1)
    return size + (along - along.detach())


def norms(rows: Float[Tensor, "k ..."]) -> Float[Tensor, " k"]:
    """In float64 if need be: in float32, squares of 1e-30 are zero and those of 1e30 infinite."""
    flat = rows.flatten(1)
    if len(flat) >= _MANY:  # a vector a sample: a copy in float64 would take much memory
        size = torch.linalg.vector_norm(flat, dim=1)
        if bool(((size > _SAFE[0]) & (size < _SAFE[1])).all()):
            return size
    return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).to(rows)


def units(rows: Tensor, fallback: Tensor | None) -> Tensor:
    """The rows x / ||x||; where that is 0/0, the fallback (or x) instead. No synchronisation."""
    size = norms(rows)
    ok = (size > 0) & size.isfinite()
    shape = (-1, *(1,) * (rows.ndim - 1))
    scaled = rows / size.where(ok, 1).reshape(shape)
    return scaled if fallback is None else scaled.where(ok.reshape(shape), fallback)
