"""The norm of an affine node: by a strategy, and what its layer knows of itself."""

import dataclasses

from lipcert.graph import Affine
from lipcert.kinds import Constant
from lipcert.linear_map import Generic, LinearMap
from lipcert.spectral import Strategy


def affine_norm(op: Affine, norm: Strategy) -> Constant:
    """The strategy's norm of the map or the layer's own bound, whichever is smaller.

    Where the map has parts of unknown structure the strategy is not asked: it could only try all
    unit vectors, which costs far more than such a bound is worth.
    """
    known = known_norm(op, norm)
    if known is not None and _has_generic_parts(op.map()):
        return known
    found = norm(op.map())
    return found if known is None or found.value <= known.value.to(found.value) else known


def known_norm(op: Affine, norm: Strategy) -> Constant | None:
    """What the layer knows of its norm in L2; None if that is nothing."""
    return op.norm() if op.norm is not None and norm.p == 2 else None


def _has_generic_parts(map: LinearMap) -> bool:
    if isinstance(map, Generic):
        return True
    values = [getattr(map, field.name) for field in dataclasses.fields(map)]
    parts = [p for v in values for p in (v if isinstance(v, tuple) else (v,))]
    return any(isinstance(p, LinearMap) and _has_generic_parts(p) for p in parts)
