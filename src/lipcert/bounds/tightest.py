"""Several bounds of one network, and for each pair of classes the best of them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lipcert.bounds.margin import Bound, MarginConstants
from lipcert.errors import LipcertError
from lipcert.graph import Node
from lipcert.kinds import Constant, weakest


class Tightest(Bound):
    """The smallest constant of each pair of classes that any of the members proves.

    Its kind is the weakest of theirs, its failure probability the sum of theirs. Made by
    `tightest(a, b, ...)`.
    """

    def __init__(self, members: tuple[Bound, ...]):
        if not members or not all(isinstance(member, Bound) for member in members):
            raise LipcertError(
                "tightest() takes bounds: lc.tightest(lc.Product(graph), lc.LipLT(graph))."
            )
        super().__init__(members[0].graph)
        if any(
            (m.graph.model, m.graph.signature) != (self.graph.model, self.graph.signature)
            for m in members
        ):
            raise LipcertError("tightest() takes bounds of one network; these are of several.")
        if len({member.p for member in members}) > 1:
            raise LipcertError("tightest() takes bounds for one norm of the input.")
        self.p = members[0].p
        self.members = nn.ModuleList(members)  # for their state
        self._bounds = members

    def forward(self, x: Float[Tensor, "b ..."] | None = None) -> MarginConstants:
        """The constants of all pairs; `x` is not looked at."""
        return tightest_pairs([member(x) for member in self._bounds])

    def lipschitz(self) -> Constant:
        return least([member.lipschitz() for member in self._bounds])

    def per_output(self) -> Constant:
        return least([member.per_output() for member in self._bounds])

    def prefix(self, upto: Node | str) -> Constant:
        return least([member.prefix(upto) for member in self._bounds])


def tightest(*bounds: Bound) -> Tightest:
    """The best of several bounds of one network, pair by pair: no bound is always the best.

    Raises:
        LipcertError: There are none, or they are of different networks.
    """
    return Tightest(bounds)


def tightest_pairs(constants: Sequence[MarginConstants]) -> MarginConstants:
    """The least of the constants of each pair."""

    def row(wanted: Int[Tensor, " b"]) -> Float[Tensor, "b c"]:
        rows = [c.row(wanted) for c in constants]
        return torch.stack([r.to(rows[0].device, torch.float64) for r in rows]).amin(0)

    failure = min(1.0, sum(c.failure for c in constants))
    kind, p = weakest(c.kind for c in constants), constants[0].p
    return MarginConstants(row, constants[0].classes, kind, failure, p=p)


def least(constants: Sequence[Constant]) -> Constant:
    """The least of several constants of one function."""
    values = torch.stack([c.value.to(constants[0].value.device, torch.float64) for c in constants])
    failure = min(1.0, sum(c.failure for c in constants))
    return Constant(values.amin(0), weakest(c.kind for c in constants), failure)
