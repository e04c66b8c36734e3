"""What a spectral-norm strategy is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lipcert.kinds import Constant, Kind
from lipcert.linear_map import LinearMap


@dataclass(frozen=True)
class Strategy(ABC):
    """A way to get the spectral norm (largest singular value) of a linear map.

    Strategies are values without state; what an iterative one improves from call to call is kept by
    whoever calls it (see `iterative`).

    Attributes:
        kind: What the number claims.
        p: Of which l_p norm, on both sides of the map, it is the operator norm.
    """

    kind: ClassVar[Kind]
    p: ClassVar[float] = 2.0

    @abstractmethod
    def __call__(self, map: LinearMap) -> Constant:
        """The norm of the map, differentiable in its weights.

        Raises:
            LipcertError: The strategy does not fit this map; the message names one that does.
        """


def wants_gradient(map: LinearMap) -> bool:
    """Whether a norm of the map is to be differentiated in its weights."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in map.tensors())


def differentiable(value: Tensor, map: LinearMap, vector: Tensor) -> Tensor:
    """`value`, with the gradient that ||A v|| has at the unit top singular vector v.

    That is u^T dA v, the gradient of the largest singular value (a subgradient where it is not
    simple), at the price of one application.

    Args:
        value: The spectral norm, a scalar.
        map: The map A, in the precision of `vector`.
        vector: v, shape `in_shape`, or `out_shape` to differentiate the adjoint instead.
    """
    if not wants_gradient(map):
        return value
    on_input = vector.shape == map.in_shape
    image = map.apply(vector[None]) if on_input else map.adjoint(vector[None])
    norm = torch.linalg.vector_norm(image)
    return value + (norm - norm.detach())
