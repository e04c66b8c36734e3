"""Several bounds of one network, and for each pair of classes the best of them."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lipcert.bounds.margin import Bound, MarginConstants
from lipcert.errors import LipcertError
from lipcert.graph import Node
from lipcert.kinds import Constant, weakest


class Tightest(Bound):
    """All that several bounds say of each pair of classes.

    Global constants become one, the least for each pair. Local ones stay beside it, as each holds
    in its own ball only: a sample is robust against a class as far as any member proves. The kind
    is the weakest of theirs, the failure probability the sum of theirs. Made by `tightest(a, b)`.
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
        self.local = any(member.local for member in members)
        self.members = nn.ModuleList(members)  # for their state
        self._bounds = members

    def forward(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
        index: Int[Tensor, " b"] | None = None,
    ) -> MarginConstants:
        """The constants of all pairs, see `Bound`; `eps` is that of all local members."""
        return tightest_pairs(
            [
                m(x, eps, index) if m.local else self._once(m, functools.partial(m, x))
                for m in self._bounds
            ]
        )

    def lipschitz(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """The least, of those around samples where there are such, see `Bound`."""
        return least([m.lipschitz(x, eps) if m.local else m.lipschitz() for m in self._bounds])

    def per_output(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """The least for each logit, see `Bound`."""
        return least([m.per_output(x, eps) if m.local else m.per_output() for m in self._bounds])

    def prefix(
        self,
        upto: Node | str,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """The least up to a node, see `Bound`."""
        return least([m.prefix(upto, x, eps) if m.local else m.prefix(upto) for m in self._bounds])

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """As `Bound.held`, for all members."""
        with contextlib.ExitStack() as stack:
            for member in self._bounds:
                stack.enter_context(member.held())
            stack.enter_context(super().held())
            yield


def tightest(*bounds: Bound) -> Tightest:
    """The best of several bounds of one network, pair by pair: no bound is always the best.

    Raises:
        LipcertError: There are none, or they are of different networks.
    """
    return Tightest(bounds)


def tightest_pairs(constants: Sequence[MarginConstants]) -> MarginConstants:
    """The least of the global constants of each pair, and the local ones beside it."""
    everywhere = [c for c in constants if c.batch is None]
    around = [c for c in constants if c.batch is not None]

    def row(wanted: Int[Tensor, " b"]) -> Float[Tensor, "b c"]:
        rows = [c.row(wanted) for c in everywhere]
        return torch.stack([r.to(rows[0].device, torch.float64) for r in rows]).amin(0)

    def alone() -> Float[Tensor, " c"]:
        single = [c.alone() for c in everywhere if c.alone is not None]
        return torch.stack([s.to(single[0].device, torch.float64) for s in single]).amin(0)

    if everywhere:
        known = any(c.alone is not None for c in everywhere)
        first = dataclasses.replace(everywhere[0], row=row, alone=alone if known else None)
    else:
        first = around.pop(0)
    return dataclasses.replace(
        first,
        kind=weakest(c.kind for c in constants),
        failure=min(1.0, sum(c.failure for c in constants)),
        others=tuple(around),
    )


def least(constants: Sequence[Constant]) -> Constant:
    """The least of several constants of one function."""
    values = [c.value.to(constants[0].value.device, torch.float64) for c in constants]
    failure = min(1.0, sum(c.failure for c in constants))
    together = torch.stack(torch.broadcast_tensors(*values)).amin(0)
    return Constant(together, weakest(c.kind for c in constants), failure)
