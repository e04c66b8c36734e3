"""The end of a network: its output as a sum of affine maps of nodes."""

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.graph import Affine, Node, Sum
from lipcert.linear_kinds import Dense, Index, identity
from lipcert.linear_map import Composition, LinearMap
from lipcert.simplify import simplify


def tail(output: Node) -> list[tuple[LinearMap | None, Node]]:
    """The output as a sum of affine maps (None: the identity) of nodes."""
    match output.op:
        case Sum():
            return [end for i in output.inputs for end in tail(i)]
        case Affine(map=map):
            return [(map(), output.inputs[0])]
        case _:
            return [(None, output)]


def rows_of(map: LinearMap | None, source: Node) -> Float[Tensor, "classes n"]:
    """The rows of a map's matrix, float64."""
    return matrix_of(identity(source.shape) if map is None else simplify(map.to(torch.float64)))


def matrix_of(map: LinearMap) -> Float[Tensor, "out in"]:
    """The matrix of a simplified map, for less than applying it takes where it is a dense layer."""
    match map:
        case Dense() if len(map.in_shape) == 1:
            return map.weight
        case Composition(factors=(Index(is_reshape=True), Dense() as last)) if (
            len(last.in_shape) == 1
        ):
            return last.weight
    basis = torch.eye(map.out_size).to(map.like)
    return map.adjoint(basis.reshape(-1, *map.out_shape)).reshape(len(basis), -1)
