"""The end of a network: its output as a sum of affine maps of nodes."""

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.graph import Affine, Node, Sum
from lipcert.linear_kinds import Dense, identity
from lipcert.linear_map import LinearMap
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
    map = identity(source.shape) if map is None else simplify(map.to(torch.float64))
    if isinstance(map, Dense) and len(map.in_shape) == 1:
        return map.weight
    basis = torch.eye(map.out_size, dtype=torch.float64, device=map.like.device)
    return map.adjoint(basis.reshape(-1, *map.out_shape)).flatten(1)
