"""What every bound gives: constants of logit differences, and what they claim."""

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lipcert.bounds.around import Around
from lipcert.errors import LipcertError
from lipcert.graph import Graph, Lipschitz, Node
from lipcert.kinds import Constant, Kind
from lipcert.region import L2Ball
from lipcert.spectral import Iterative, Strategy

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class MarginConstants:
    """K, drop: for |x' - x| = r <= valid_radius, f_i - f_j falls by at most min(K_ij r, drop_ij).

    Pairs (i, j) are ordered, the diagonal means nothing and is never read. Units: logits per unit
    of input for K, logits for drop; distances in the l_p norm.

    Attributes:
        row: `classes (b,) -> (b, c)`: K_ij for i = classes[b] and every j, computed when asked
            for, so that many classes need no c x c array.
        classes: c.
        kind: What the constants claim.
        failure: Probability that the claim is false (0 unless probabilistic).
        batch: Number of samples of a local bound; None for a global one, true for every x.
        valid_radius: Up to which distance the claim holds, `(b,)`; infinite for a global bound.
        p: In which norm distances are measured.
        drop: `classes (b,) -> (b, c)`: the largest fall in the whole ball of a local bound, for
            every j. Not proportional to r: drop / valid_radius is no constant for smaller r. None
            where only K is known.
        others: Further constants of the same margins, each true in its own ball: a margin falls by
            no more than the least of what all say. `kind` and `failure` speak of all together.
        around: How the boxes of a local bound lie; None for a global one.
        alone: Gives the constants of the single logits f_i, `(c,)`, or `(b, c)` if local; None if
            only those of differences are known.
    """

    row: Callable[[Int[Tensor, " b"]], Float[Tensor, "b c"]]
    classes: int
    kind: Kind
    failure: float = 0.0
    batch: int | None = None
    valid_radius: Tensor | float = math.inf
    p: float = 2.0
    drop: Callable[[Int[Tensor, " b"]], Float[Tensor, "b c"]] | None = None
    others: tuple["MarginConstants", ...] = ()
    around: Around | None = None
    alone: Callable[[], Float[Tensor, "*b c"]] | None = None

    def __repr__(self) -> str:
        where = "everywhere" if self.batch is None else f"around {self.batch} samples"
        return (
            f"MarginConstants({self.kind}, {where}, {self.classes} classes; "
            "the numbers: row(classes) or dense())"
        )

    def members(self) -> list["MarginConstants"]:
        """This one and all others."""
        return [self, *(member for other in self.others for member in other.members())]

    def within(self, classes: Int[Tensor, " b"] | None, eps: float) -> Float[Tensor, "b c"]:
        """What a loss at radius eps takes for K: eps times it is the largest fall within eps.

        At eps = 0 the constants themselves. Members whose ball is smaller than eps say nothing; if
        none is left, the result is infinite.

        Args:
            classes: The class that is protected for each sample; None for the constants of the
                single logits, `(1, c)` where they are global.
            eps: The radius.

        Raises:
            LipcertError: Single logits are asked for, and a member does not know theirs.
        """
        rows = []
        for member in self.members():
            row = member._alone() if classes is None else member.row(classes)
            if classes is not None and member.drop is not None and eps > 0:
                row = torch.minimum(row, member.drop(classes) / eps)
            if member.batch is not None:
                row = row.where((torch.as_tensor(member.valid_radius) >= eps)[:, None], math.inf)
            rows.append(row)
        if len(rows) == 1:
            return rows[0]
        return torch.stack(torch.broadcast_tensors(*(r.to(rows[0]) for r in rows))).amin(0)

    def _alone(self) -> Float[Tensor, "b c"]:
        if self.alone is None:
            raise LipcertError(
                "These MarginConstants know differences of logits, but not the single logits: give "
                "alone=..., or train with a loss that compares classes, such as lc.losses.cll."
            )
        found = self.alone()
        return found if found.ndim == 2 else found[None]

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
        self._held: dict[Hashable, Any] | None = None

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
        index: Int[Tensor, " b"] | None = None,
    ) -> MarginConstants:
        """The constants.

        Args:
            x: The samples around which a local bound is wanted; a global one does not look at
                anything.
            eps: Another radius than that of the region, one for all samples or one for each.
            index: The samples' numbers in their data set, for bounds that keep vectors for each.
        """

    def lipschitz(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """A Lipschitz constant of the whole output vector: a number, or `(b,)` if local."""
        return self.prefix(self.graph.output, x, eps)

    @abstractmethod
    def per_output(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """Lipschitz constants of the single logits: `(classes,)`, or `(b, classes)` if local."""

    @abstractmethod
    def prefix(
        self,
        upto: Node | str,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """A Lipschitz constant of the function from the input to a node (or its name).

        Around samples it is that of the node's entries on which the output depends there.
        """

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, weights stay as they are: what does not depend on samples is computed once."""
        outer, self._held = self._held, {} if self._held is None else self._held
        try:
            yield
        finally:
            self._held = outer

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, or inside `held` what it gave before."""
        if self._held is None:
            return make()
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]

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

    @property
    def logits(self) -> int:
        """Number of entries of the output, one alone allowed.

        Raises:
            LipcertError: The network's output is no vector.
        """
        shape = self.graph.output.shape
        if len(shape) != 1:
            raise LipcertError(
                f"Constants of single logits need an output that is a vector; the network's has "
                f"shape {shape}. For its Lipschitz constant alone use lc.lipschitz(net, "
                "input_shape)."
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


def check_region(region: L2Ball | None, norm: Strategy) -> None:
    """Raises LipcertError unless the region is one that the strategy can be used in."""
    if region is None:
        return
    if not isinstance(region, L2Ball):
        raise LipcertError(f"region={region!r:.60} is no region; give e.g. region=lc.L2Ball(0.1).")
    if norm.p != 2:
        raise LipcertError(f"norm={norm!r} gives l_{norm.p:g} bounds, but an L2Ball is of L2.")


def samples(
    x: Float[Tensor, "b ..."] | None, graph: Graph, norm: Strategy
) -> Float[Tensor, "b ..."]:
    """The samples of a local bound, in the precision to work in and on the network's device.

    That is the precision of the weights while vectors are iterated for training, else float64.

    Raises:
        LipcertError: There are none, or they are not inputs of the network.
    """
    if x is None:
        raise LipcertError("A bound with a region holds around samples: give them, bound(x).")
    if tuple(x.shape[1:]) != graph.input_shape:
        raise LipcertError(
            f"The samples have the shape {tuple(x.shape)}; the network was traced for (n, "
            f"{', '.join(map(str, graph.input_shape))})."
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise LipcertError(
            f"The samples are {x.dtype}; a local bound takes float32 or float64: x.float()."
        )
    weights = (p.dtype for p in graph.model.parameters() if p.is_floating_point())
    dtype = next(weights, x.dtype) if isinstance(norm, Iterative) else torch.float64
    return x.to(device_of(graph), dtype)
