"""The norm of an affine node: by a strategy, and what its layer knows of itself."""

import dataclasses

import torch

from lipcert.graph import Affine
from lipcert.kinds import Constant, Kind
from lipcert.linear_map import Generic, LinearMap
from lipcert.spectral import Strategy


def affine_norm(op: Affine, norm: Strategy) -> Constant:
    """The strategy's norm of the map or the layer's own bound, whichever is smaller.

    Where the map has parts of unknown structure the strategy is not asked: it could only try all
    unit vectors, which costs far more than such a bound is worth.
    """
    known = op.known.proved() if op.known is not None and norm.p == 2 else None
    if known is not None and _has_generic_parts(op.map()):
        return known
    found = norm(op.map())
    return found if known is None or found.value <= known.value.to(found.value) else known


def expected_norm(op: Affine) -> Constant | None:
    """An estimate that costs nothing, of layers that know their norm: nothing is to be iterated."""
    if op.known is None:
        return None
    return Constant(torch.tensor(op.known.about(), dtype=torch.float64), Kind.ESTIMATE)


def _has_generic_parts(map: LinearMap) -> bool:
    if isinstance(map, Generic):
        return True
    values = [getattr(map, field.name) for field in dataclasses.fields(map)]
    parts = [p for v in values for p in (v if isinstance(v, tuple) else (v,))]
    return any(isinstance(p, LinearMap) and _has_generic_parts(p) for p in parts)
