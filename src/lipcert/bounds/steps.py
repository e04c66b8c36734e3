"""What single nodes do to changes that pass them linearly, and what starts at them."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.bounds.slopes import everywhere
from lipcert.graph import Affine, Box, Concat, Input, Lipschitz, Node, Slope, Sum
from lipcert.linear_kinds import Scale
from lipcert.linear_map import LinearMap
from lipcert.simplify import simplify


@dataclass(frozen=True)
class Step:
    """What a node does.

    Attributes:
        through: To what passes through it; None for the identity, and where nothing passes.
        emit: To what starts at it; None for the identity, and where nothing starts.
    """

    through: LinearMap | None = None
    emit: LinearMap | None = None


@dataclass(frozen=True, eq=False)
class SampleScale(LinearMap):
    """Elementwise multiplication with numbers of each sample, `diagonal` of shape `(b, *shape)`.

    It takes batches that hold the samples in their order, any number of times.
    """

    diagonal: Float[Tensor, "b ..."]

    def apply(self, x: Float[Tensor, "rounds_b ..."]) -> Float[Tensor, "rounds_b ..."]:
        rounds = len(x) // max(len(self.diagonal), 1)
        return (x.unflatten(0, (rounds, len(self.diagonal))) * self.diagonal).flatten(0, 1)

    def adjoint(self, y: Float[Tensor, "rounds_b ..."]) -> Float[Tensor, "rounds_b ..."]:
        return self.apply(y)


def local_step(n: Node, slopes: Box, like: Float[Tensor, "b ..."]) -> Step:
    """The step of a `Slope` node whose slopes are known around each sample."""
    low, high = (slope.expand(len(like), *n.shape) for slope in slopes)
    c, d = (low + high) / 2, (high - low) / 2
    return Step(SampleScale(n.shape, n.shape, c), SampleScale(n.shape, n.shape, d))


def linear_step(n: Node, like: Tensor | None = None) -> Step:
    """The step of a node with the weights as they are now.

    Args:
        n: The node.
        like: Fold the maps for use, in this precision and on this device; by default they are
            left for strategies to fold, in float64.
    """
    match n.op:
        case Affine(map=map):
            if like is None:
                return Step(map().to(torch.float64))
            return Step(simplify(map().to(like.dtype)))
        case Slope():
            low, high = everywhere(n)
            if like is not None:
                # A number stays where it is, so that nobody waits for an accelerator.
                low, high = (slope.to(like) if slope.ndim else slope for slope in (low, high))
            through, emit = (low + high) / 2, (high - low) / 2
            return Step(Scale(n.shape, n.shape, through), Scale(n.shape, n.shape, emit))
        case _:
            return Step()


def is_source(n: Node) -> bool:
    """Whether changes start at the node that are no linear function of its inputs' changes."""
    return isinstance(n.op, Input | Slope | Lipschitz)


def pulled(n: Node, step: Step, y: Float[Tensor, "b ..."], place: int) -> Float[Tensor, "b ..."]:
    """What the adjoint of a node sends to the input at a place."""
    match n.op:
        case Sum():
            return y
        case Concat():
            sizes = [math.prod(i.shape) for i in n.inputs]
            return y.split(sizes, 1)[place].reshape(-1, *n.inputs[place].shape)
        case _:
            return y if step.through is None else step.through.adjoint(y)
