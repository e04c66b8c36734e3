"""The ellipsoid bound with multipliers that are searched for: LipSDP for any graph."""

import dataclasses
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.bounds.chain import lazily
from lipcert.bounds.eclipse import one_number
from lipcert.bounds.ellipsoid import Ellipsoid, Seen, ends_of, seen
from lipcert.bounds.ends import margins, single_logits
from lipcert.bounds.extent import (
    APART,
    Extent,
    Gains,
    Moving,
    balanced,
)
from lipcert.bounds.margin import MarginConstants, evaluating
from lipcert.bounds.roots import largest_eigenvalue
from lipcert.bounds.sweep import Sweep
from lipcert.bounds.tail import tail
from lipcert.bounds.tightest import least, tightest_pairs
from lipcert.errors import LipcertError
from lipcert.graph import Graph, Node
from lipcert.kinds import Constant
from lipcert.spectral import Strategy

_FLOOR = 1e-12  # of the largest: what is below counts as zero


class Multipliers(Ellipsoid):
    """`Ellipsoid` with multipliers moved by Adam, for certificates.

    Multipliers are the variables of LipSDP, and all that Adam comes by are a proof: the best are
    kept, and the closed form for each pair, logit or node for which it is less. On a chain of
    matrices the optimum is that of LipSDP-Neuron, with `per_neuron=False` that of LipSDP-Layer;
    convolutions that go by frequency have one a channel. What is made least is the mean logarithm
    over all pairs, or over all logits, or of the one node that is asked for. Of several sweeps
    (see `Ellipsoid`) the one that is least at its start is moved. Inside `held` each search is
    done once. There are no gradients.

    A step takes two or three times as long as `Ellipsoid`, and keeps the matrices of all nodes.

    Args:
        graph: A traced network.
        norm: As for `Ellipsoid`.
        steps: Of Adam.
        rate: Of Adam at the start, for logarithms; it falls to zero by a cosine.
        per_neuron: Whether each neuron has a multiplier, or each node one.
        pairwise: Whether each pair has a search of its own, done when it is first asked for:
            tighter by a tenth or more for most, and slower as often as there are pairs.

    Raises:
        LipcertError: As for `Ellipsoid`, or `steps` or `rate` is not positive.

    Reference: LipSDP, arXiv 1906.04893; the recursion and its parameters: this library.
    """

    def __init__(
        self,
        graph: Graph,
        norm: Strategy | None = None,
        steps: int = 100,
        rate: float = 0.15,
        per_neuron: bool = True,
        pairwise: bool = False,
    ):
        super().__init__(graph, norm)
        number = isinstance(rate, int | float)
        if not isinstance(steps, int) or steps < 1 or not (number and 0 < rate < math.inf):
            raise LipcertError(
                f"steps={steps!r}, rate={rate!r}: Multipliers takes a whole number of at least one "
                "step and a positive rate, e.g. steps=100, rate=0.15."
            )
        self.steps, self.rate = steps, rate
        self.per_neuron, self.pairwise = per_neuron, pairwise

    def extra_repr(self) -> str:
        """The arguments, for ``print(bound)``."""
        own = f"steps={self.steps}, rate={self.rate}, per_neuron={self.per_neuron}"
        own += f", pairwise={self.pairwise}"
        return f"{super().extra_repr()}, {own}"

    def per_output(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """Lipschitz constants of the single logits, see `Bound`."""
        closed = super().per_output

        def make() -> Constant:
            found = ends_of(self._at_end(_singles))
            return least([closed(), single_logits(self.logits, found, self.p)])

        with torch.no_grad():
            return self._once("single", make)

    def prefix(
        self,
        upto: Node | str,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """A Lipschitz constant of the function from the input to a node, see `Bound`."""
        target = self.graph.node(upto) if isinstance(upto, str) else upto

        def make() -> Constant:
            found = self._searched([target], lambda sweep: sweep.of(target).radius().value)
            return found.of(target).radius()

        with torch.no_grad():
            return self._once(target, make)

    def _gains(self, n: Node) -> Gains:
        return balanced if self.per_neuron else one_number

    def _margins(self) -> MarginConstants:
        closed = super()._margins

        def make() -> MarginConstants:
            if self.pairwise:
                return tightest_pairs([closed(), self._pair_by_pair()])
            each = tuple(torch.triu_indices(self.classes, self.classes, 1))
            found = ends_of(self._at_end(lambda parts: _pairs(parts)[each]))
            return tightest_pairs([closed(), margins(self.classes, found, self.p)])

        with torch.no_grad():
            return self._once("pairs", make)

    def _pair_by_pair(self) -> MarginConstants:
        @torch.no_grad()
        def of(i: int, j: int) -> Tensor:
            found = self._at_end(lambda parts: _pairs(parts)[i, j])
            return margins(self.classes, ends_of(found), self.p).row(torch.tensor([i]))[0, j]

        return MarginConstants(lazily(self.classes, of), self.classes, self._facts().kind)

    def _at_end(self, sizes: Callable[[Seen], Tensor]) -> Seen:
        """What the logits see of the sweep for which some of their constants are least."""
        terms = tail(self.graph.output)
        sources = list(dict.fromkeys(source for _, source in terms))
        sweep = self._searched(sources, lambda sweep: sizes(seen(sweep, terms)))
        with evaluating(self.graph):
            return seen(sweep, terms)

    def _searched(self, targets: list[Node], sizes: Callable[[Sweep], Tensor]) -> Sweep:
        """The sweep with the multipliers that make the mean logarithm of some constants least."""

        def mean(sweep: Sweep) -> Tensor:
            found = sizes(sweep)
            floor = (_FLOOR * found.detach().max()).clamp(min=torch.finfo(found.dtype).tiny)
            return torch.maximum(found, floor).log().mean()

        with evaluating(self.graph):
            facts = self._facts()
            starts = [mean(Sweep(facts, targets, way)) for way in self._ways]
            way = self._ways[int(torch.stack(starts).argmin())]
            moved = {n: _Moved(self._gains(n), self.per_neuron) for n in self.graph}
            facts = dataclasses.replace(facts, gains=moved.__getitem__)
            best = mean(Sweep(facts, targets, way))
            free = [number for of_node in moved.values() for number in of_node.numbers]
            if free and bool(best.isfinite()):
                self._descend(lambda: mean(Sweep(facts, targets, way)), free)
            return Sweep(facts, targets, way)

    def _descend(self, value: Callable[[], Tensor], free: list[Tensor]) -> None:
        """Moves numbers to where a value is least of all that Adam comes by."""
        # Few steps: squares of the first ones are to be forgotten soon.
        adam = torch.optim.Adam(free, self.rate, betas=(0.9, 0.9))
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)
        lowest, kept = math.inf, free
        for step in range(self.steps + 1):
            with torch.enable_grad():
                now = value()
            if float(now) < lowest:
                lowest, kept = float(now), [number.detach().clone() for number in free]
            if step == self.steps:
                break
            slopes = torch.autograd.grad(now, free, materialize_grads=True)
            for number, slope in zip(free, slopes, strict=True):
                number.grad = slope
            adam.step()
            slower.step()
        for number, found in zip(free, kept, strict=True):
            number.copy_(found)


class _Moved:
    """The multipliers of one node: G = kappa lmax(E^-1/2 S E^-1/2) E, above S for all kappa > 1.

    E is that of a closed form, each entry times the exponential of a number that can be moved;
    kappa too, from where G is that of the closed form.
    """

    def __init__(self, start: Gains, per_neuron: bool):
        self._start, self._per_neuron = start, per_neuron
        self._first: Tensor | None = None
        self.numbers: list[Tensor] = []

    def __call__(self, moving: Moving) -> Float[Tensor, " m"]:
        if self._first is None:
            first = self._start(moving).detach()
            largest = first.max().clamp(min=torch.finfo(first.dtype).tiny)
            self._first = (first / largest).clamp(min=_FLOOR)
            above = largest / _largest_ratio(moving, self._first) - 1
            # Where nothing moves it would be infinite.
            self.numbers.append(above.clamp(_FLOOR, 1 / _FLOOR).log().requires_grad_())
            if self._per_neuron:
                self.numbers.append(torch.zeros_like(first).requires_grad_())
        above, *each = self.numbers
        axes = self._first * each[0].exp() if each else self._first
        return (1 + above.exp().clamp(min=APART)) * _largest_ratio(moving, axes) * axes


def _largest_ratio(moving: Moving, axes: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """The largest eigenvalue of E^-1/2 S E^-1/2: G = E is above S where it is below 1."""
    root = axes.rsqrt()
    return largest_eigenvalue(root[:, None] * moving.matrices * root).clamp(min=0)


def _pairs(parts: Seen) -> Float[Tensor, "c c"]:
    """The constants of all pairs; the diagonal means nothing."""
    terms = []
    for extent, rows in parts:
        gram = _gram(extent, rows)
        each = gram.diagonal()
        terms.append(extent.scale * _root(each[:, None] + each - gram - gram.mT))
    return torch.stack(terms).sum(0)


def _singles(parts: Seen) -> Float[Tensor, " c"]:
    """The constants of the single logits."""
    each = [extent.scale * _root(_gram(extent, rows).diagonal()) for extent, rows in parts]
    return torch.stack(each).sum(0)


def _gram(extent: Extent, rows: Float[Tensor, "c n"]) -> Float[Tensor, "c c"]:
    rows = rows if extent.root is None else rows @ extent.root.mT
    return rows @ rows.mT


def _root(squares: Tensor) -> Tensor:
    """The square root, without a slope where a square is zero but for rounding."""
    floor = (_FLOOR**2 * squares.detach().max()).clamp(min=torch.finfo(squares.dtype).tiny)
    return torch.maximum(squares, floor).sqrt()
