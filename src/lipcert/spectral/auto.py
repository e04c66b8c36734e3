"""The cheapest strategy that is a true upper bound, map by map."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.linear_kinds import Dense
from lipcert.linear_map import Add, Composition, LinearMap, Matrix, Stack, Transpose
from lipcert.simplify import simplify
from lipcert.spectral.exact import Exact, closed_form, without_isometries
from lipcert.spectral.fourier import Fourier, fits
from lipcert.spectral.strategy import Strategy

DENSE_SIDE = 4096


@dataclass(frozen=True)
class Auto(Strategy):
    """Exact where the smaller side is at most 4096, else Fourier, else the parts of the map.

    Parts: the product over the factors of a composition (neighbours that fit one strategy stay
    together), the sum over the terms of a sum, the root of the squares over a stack.
    """

    kind: ClassVar[Kind] = Kind.UPPER

    def __call__(self, map: LinearMap) -> Constant:
        map = without_isometries(simplify(map.to(torch.float64)))
        if _fits_exact(map):
            return Exact()(map)
        if fits(map):
            return Fourier()(map)
        match map:
            case Transpose():
                return self(map.inner)
            case Composition():
                value = self._values(_groups(map)).prod()
            case Add():
                value = self._values(map.terms).sum()
            case Stack():
                value = torch.linalg.vector_norm(self._values(map.parts))
            case _:
                raise LipcertError(
                    f"No affordable true bound for the {type(map).__name__} map {map.in_shape} -> "
                    f"{map.out_shape}. Use norm=Lanczos(failure=1e-9): it needs only the map and "
                    "its adjoint, and is an upper bound but for that probability."
                )
        return Constant(value, self.kind)

    def _values(self, parts: Sequence[LinearMap]) -> Tensor:
        """The norms of the parts, on one device (fixed maps live on the CPU)."""
        values = [self(part).value for part in parts]
        return torch.stack([v.to(parts[0].like.device) for v in values])


def _fits_exact(map: LinearMap) -> bool:
    small = min(map.in_size, map.out_size) <= DENSE_SIDE
    return small or isinstance(map, Dense | Matrix) or closed_form(map) is not None


def _groups(map: Composition) -> list[LinearMap]:
    """Neighbouring factors joined as long as one strategy takes them as one operator."""
    groups: list[LinearMap] = [map.factors[0]]
    for factor in map.factors[1:]:
        joint = simplify(factor @ groups[-1])
        # What does not matter to the norm of the group matters to the factor after it.
        if _fits_exact(without_isometries(joint)) or fits(joint):
            groups[-1] = joint
        else:
            groups.append(factor)
    return groups
