"""What every bound gives: constants of logit differences, and what they claim."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lipcert.errors import LipcertError
from lipcert.graph import Graph, Lipschitz, Node
from lipcert.kinds import Constant, Kind
from lipcert.spectral import Strategy


@dataclass(frozen=True, eq=False)
class MarginConstants:
    """K with: for every x' with |x' - x| = r <= valid_radius, f_i - f_j falls by at most K_ij r.

    Pairs (i, j) are ordered, the diagonal means nothing and is never read. Units: logits per unit
    of input, distances in the l_p norm.

    Attributes:
        row: `classes (b,) -> (b, c)`: K_ij for i = classes[b] and every j, computed when asked
            for, so that many classes need no c x c array.
        classes: c.
        kind: What the constants claim.
        failure: Probability that the claim is false (0 unless probabilistic).
        batch: Number of samples of a local bound; None for a global one, true for every x.
        valid_radius: Up to which distance the claim holds, `(b,)`; infinite for a global bound.
        p: In which norm distances are measured.
    """

    row: Callable[[Int[Tensor, " b"]], Float[Tensor, "b c"]]
    classes: int
    kind: Kind
    failure: float = 0.0
    batch: int | None = None
    valid_radius: Tensor | float = math.inf
    p: float = 2.0

    def dense(self) -> Float[Tensor, "b c c"]:
        """All pairs: b is 1 for a global bound, the batch for a local one."""
        if self.batch is None:
            return self.row(torch.arange(self.classes))[None]
        rows = [self.row(torch.full((self.batch,), i)) for i in range(self.classes)]
        return torch.stack(rows, 1)


class Bound(nn.Module):
    """A Lipschitz bound of a traced network: a module whose state is its singular vectors.

    Attributes:
        graph: The traced network; its weights are read anew at each call.
        local: Whether the constants hold only around the given samples.
        p: In which norm distances are measured.
    """

    local = False
    p = 2.0

    def __init__(self, graph: Graph):
        if not isinstance(graph, Graph):
            raise LipcertError(
                f"A bound takes a graph, not a {type(graph).__name__}: lc.trace(net, input_shape)."
            )
        super().__init__()
        self.graph = graph

    @abstractmethod
    def forward(self, x: Float[Tensor, "b ..."] | None = None) -> MarginConstants:
        """The constants; a local bound needs the batch, a global one does not look at it."""

    @abstractmethod
    def lipschitz(self) -> Constant:
        """A Lipschitz constant of the whole output vector."""

    @abstractmethod
    def per_output(self) -> Constant:
        """Lipschitz constants of the single logits; `value` has shape `(classes,)`."""

    @abstractmethod
    def prefix(self, upto: Node | str) -> Constant:
        """A Lipschitz constant of the function from the input to a node (or its name)."""

    @property
    def classes(self) -> int:
        """Number of logits.

        Raises:
            LipcertError: The network's output is not one logit a class.
        """
        shape = self.graph.output.shape
        if len(shape) != 1 or shape[0] < 2:
            raise LipcertError(
                f"Margins need one logit a class, and at least two; the network's output has shape "
                f"{shape}. For its Lipschitz constant alone use lc.lipschitz(net, input_shape)."
            )
        return shape[0]


def evaluating(graph: Graph) -> torch.autocast:
    """Around each evaluation: the network is the traced one, and autocast is off.

    A constant is never computed in half precision.

    Raises:
        LipcertError: A layer was replaced since the tracing.
    """
    graph.check_modules()
    return torch.autocast(device_of(graph).type, enabled=False)


def device_of(graph: Graph) -> torch.device:
    """Where the weights lie; slopes and the norms of fixed maps are computed on the CPU."""
    return next((t.device for t in graph.model.parameters()), torch.device("cpu"))


def check_strategy(norm: Strategy, graph: Graph) -> None:
    """Raises LipcertError unless the strategy is one, and fits what the graph's nodes say."""
    if not isinstance(norm, Strategy):
        raise LipcertError(
            f"norm={norm!r} is no strategy; give one as a value, e.g. norm=lc.Auto()."
        )
    opaque = [n.name for n in graph if isinstance(n.op, Lipschitz)]
    if norm.p != 2 and opaque:
        raise LipcertError(
            f"norm={norm!r} gives l_{norm.p:g} bounds, but the constants of {', '.join(opaque)} "
            "are known for L2 only. Use norm=lc.Auto(), or a network of affine layers and "
            "elementwise activations."
        )
