"""What a local bound gains around samples, and which of its parts gains it.

A local bound beats the global one by three things: boxes, which say where each entry of a layer can
be; the worst case of the last layer over ball and box; and constants around each sample, in which
units that the ball keeps constant do not count. Here certified accuracy at one radius is counted
without some of them, on the same samples and with the same norms.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lipcert.bound_names import GLOBAL_OF, LOCAL, BoundName
from lipcert.bound_table import Evaluated, bounds_around, evaluated, evaluated_around
from lipcert.bounds import Bound, MarginConstants, Product
from lipcert.bounds.around import Around
from lipcert.bounds.tightest import Tightest, tightest_pairs
from lipcert.certificate import Certificate, Claim
from lipcert.certifying import certify
from lipcert.errors import LipcertError
from lipcert.graph import Graph, Node, Slope
from lipcert.kinds import Constant
from lipcert.region import L2Ball

_SAMPLED = 32  # samples of the local row of the bound table
_SAME = 1e-9  # relative difference of radii that differ by the order of sums only


class Part(StrEnum):
    """What a proof uses.

    `GLOBAL`: global constants alone. `BOXES`: the product bound's global norms with boxes and the
    worst case over ball and box (BCP). `CONSTANTS`: constants around each sample alone. `LOCAL`:
    the local bound as it is (for the product bound, Local-Lip). `ALL`: every bound at hand.
    """

    GLOBAL = "global"
    BOXES = "boxes"
    CONSTANTS = "constants"
    LOCAL = "local"
    ALL = "all"

    @property
    def words(self) -> str:
        """What it is, for tables."""
        match self:
            case Part.GLOBAL:
                return "global constants"
            case Part.BOXES:
                return "boxes and worst last layer, global norms (BCP)"
            case Part.CONSTANTS:
                return "constants around each image"
            case Part.LOCAL:
                return "both: the local bound"
            case Part.ALL:
                return "everything: with the global bounds too"


@dataclass(frozen=True)
class ConstantUnits:
    """The units of an activation layer that cannot change in the ball.

    Attributes:
        name: Of the layer.
        share: Their part of all units, averaged over the samples.
    """

    name: str
    share: float


@dataclass(frozen=True)
class Locality:
    """What a local bound gains in balls of one radius.

    Attributes:
        bound: Which local bound.
        eps: The radius, as text.
        samples: How many samples.
        cra: Certified accuracy at the radius by what the proof uses, a value of `Part`.
        layers: Constant units, one entry an elementwise activation.
        median_global: Median over the samples of the global constant of the decisive margin, that
            of the predicted class against its rival; None if infinite.
        median_local: The same of the constant around each sample.
        proved_by: How many samples have their radius from which bound; "" where there is none.
    """

    bound: str
    eps: str
    samples: int
    cra: dict[str, float]
    layers: tuple[ConstantUnits, ...]
    median_global: float | None
    median_local: float | None
    proved_by: dict[str, int]


@dataclass(frozen=True, eq=False)
class LocalRows:
    """The same sample by sample.

    Attributes:
        rival: The class against which the global bound proves the smallest radius, `(n,)`.
        global_constant: Constant of f_prediction - f_rival everywhere, logits per unit of input.
        local_constant: The same in the ball around the sample.
        proved: Whether the prediction is proved to stay in the ball, by what the proof uses.
    """

    rival: Int[Tensor, " n"]
    global_constant: Float[Tensor, " n"]
    local_constant: Float[Tensor, " n"]
    proved: dict[Part, Bool[Tensor, " n"]]


@dataclass(frozen=True, eq=False)
class Localised:
    """Certificates that use a local bound.

    Attributes:
        certificate: By all bounds together.
        proved_by: The bound that gave each sample its radius: a global one where it does as well,
            "" where the radius is 0.
        found: The bounds, evaluated; the local one around the first samples.
        layers: Constant units at the first radius.
        rows: What was gained at the first radius.
    """

    certificate: Certificate
    proved_by: list[str]
    found: dict[BoundName, Evaluated]
    layers: tuple[ConstantUnits, ...]
    rows: LocalRows

    def summary(self, name: BoundName, eps: str, labels: Int[Tensor, " n"]) -> Locality:
        """The gains, averaged; certified accuracy counts right predictions only."""
        right = self.certificate.prediction == labels.cpu()
        cra = {p: float((right & ok).double().mean()) for p, ok in self.rows.proved.items()}
        return Locality(
            bound=str(name),
            eps=eps,
            samples=len(right),
            cra={str(part): fraction for part, fraction in cra.items()},
            layers=self.layers,
            median_global=_finite_median(self.rows.global_constant),
            median_local=_finite_median(self.rows.local_constant),
            proved_by=dict(Counter(self.proved_by).most_common()),
        )


def certify_around(
    net: nn.Module,
    graph: Graph,
    x: Float[Tensor, "n ..."],
    *,
    name: BoundName,
    radii: Mapping[str, float],
    batch_size: int,
    on_batch: Callable[[int], object] | None = None,
) -> Localised:
    """Certifies with all cheap global bounds and a local one in balls of each radius.

    Every global norm is computed once, whichever bound uses it.

    Args:
        net: The network.
        graph: Its graph.
        x: The samples.
        name: The local bound.
        radii: Radii of the balls by their text; at the first one the parts are told apart.
        batch_size: Samples at a time.
        on_batch: Called with the number of samples done.

    Raises:
        LipcertError: The bound is not local, the network has no logits, or as `certify` raises.
    """
    if name not in LOCAL:
        raise LipcertError(f"{name} is not local; use certify(net, x, bound=...).")
    text, first = next(iter(radii.items()))
    units, bounds = _Units(), bounds_around(graph, L2Ball(first))
    around, product = bounds[name], bounds[BoundName.LOCAL_PRODUCT]
    with contextlib.ExitStack() as stack:
        for bound in bounds.values():
            stack.enter_context(bound.held())
        found = evaluated([BoundName.AUTO, GLOBAL_OF[name]], graph, bounds)
        everywhere, alone = found[BoundName.AUTO].pairs, found[GLOBAL_OF[name]].pairs
        if everywhere is None or alone is None:
            raise LipcertError(f"Certificates need logits; the output is {graph.output.shape}.")
        every = AtRadii(everywhere, around, list(radii.values()), units)
        certificate = certify(net, x, bound=every, batch_size=batch_size, on_batch=on_batch)
        assert isinstance(product, Product)
        boxes = certify(net, x, bound=_WholeNorms(product), batch_size=batch_size)
        found[name] = evaluated_around(around, x[:_SAMPLED], text)
    names = [str(BoundName.AUTO), *(f"{name}@{text}" for text in radii)]
    return Localised(
        *(certificate, proved_by(certificate, names), found, units.shares()),
        _rows(certificate, alone, boxes.robust_at(first), first),
    )


class AtRadii(Tightest):
    """Constants that are known everywhere, and those of a local bound in balls of several radii.

    Args:
        everywhere: The global constants, for the weights as they are now.
        around: The local bound.
        radii: The radii.
        watch: Called with what is known of each batch in balls of the first radius.
    """

    def __init__(
        self,
        everywhere: MarginConstants,
        around: Bound,
        radii: Sequence[float],
        watch: Callable[[Around], object],
    ):
        super().__init__((around,))
        self._everywhere, self._radii, self._watch = everywhere, radii, watch

    def forward(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
        index: Int[Tensor, " b"] | None = None,
    ) -> MarginConstants:
        """The constants of all pairs, see `Bound`; with `eps`, in balls of this radius alone."""
        radii = self._radii if eps is None else [eps]
        local = [self._bounds[0](x, radius, index) for radius in radii]
        if local[0].around is not None:
            self._watch(local[0].around)
        return tightest_pairs([self._everywhere, *local])


class _WholeNorms(Product):
    """The bound of BCP, `masked=()`, with the norms of another product bound."""

    def __init__(self, product: Product):
        super().__init__(product.graph, product.norm, product.region, masked=())
        self._of = (product,)  # in a tuple: no part of this one's state

    def _whole(self, n: Node) -> Constant:
        return self._of[0]._whole(n)


class _Units:
    """Counts constant units, batch by batch."""

    def __init__(self) -> None:
        self._sums: dict[Node, float] = {}
        self._samples = 0

    def __call__(self, around: Around) -> None:
        self._samples += len(around.radii)
        for n in around.graph:
            weights = around.weights(n) if isinstance(n.op, Slope) else None
            if weights is not None:
                constant = (weights == 0).flatten(1).double().mean(1)
                self._sums[n] = self._sums.get(n, 0.0) + float(constant.sum())

    def shares(self) -> tuple[ConstantUnits, ...]:
        """The average over all samples, layer by layer."""
        return tuple(ConstantUnits(n.name, s / self._samples) for n, s in self._sums.items())


def proved_by(certificate: Certificate, names: Sequence[str]) -> list[str]:
    """For each sample the name of the claim that gives its radius, "" where that is 0.

    That is the claim that proves most against the decisive class, whose radius is the sample's; the
    first of those that are the same but for rounding.

    Args:
        certificate: The certificate.
        names: One for each of its claims.
    """
    radii = torch.zeros_like(certificate.margins)
    for claim in certificate.claims:
        radii = torch.maximum(radii, claim.radii(certificate.margins))
    decisive = radii.argmin(1)[:, None]
    best, which = torch.zeros_like(certificate.radius), torch.full((len(certificate),), -1)
    for place, claim in enumerate(certificate.claims):
        radius = claim.radii(certificate.margins).gather(1, decisive)[:, 0]
        which = which.where(radius <= best * (1 + _SAME), place)
        best = torch.maximum(best, radius)
    return [names[place] if place >= 0 else "" for place in which.tolist()]


@torch.no_grad()
def _rows(
    certificate: Certificate, everywhere: MarginConstants, boxes: Tensor, eps: float
) -> LocalRows:
    """From claims: the first is global, the second that of the local bound at `eps`."""
    prediction, margins, local = certificate.prediction, certificate.margins, certificate.claims[1]
    itself = nn.functional.one_hot(prediction, margins.shape[1]).bool()
    constants = everywhere.row(prediction).to("cpu", torch.float64).masked_fill(itself, 0)
    infinite = torch.full_like(constants, math.inf)
    alone = Claim(constants, infinite, torch.full_like(certificate.radius, math.inf))
    no_worst_case = Claim(local.constants, infinite, local.valid_radius)
    largest = torch.finfo(torch.float64).max
    rival = alone.radii(margins).clamp(max=largest).masked_fill(itself, math.inf).argmin(1)
    kept = {
        Part.GLOBAL: alone.kept_at(margins, eps).all(1),
        Part.BOXES: boxes,
        Part.CONSTANTS: no_worst_case.kept_at(margins, eps).all(1),
        Part.LOCAL: local.kept_at(margins, eps).all(1),
        Part.ALL: certificate.robust_at(eps),
    }
    at = torch.arange(len(rival)), rival
    return LocalRows(rival, constants[at], local.constants[at], kept)


def _finite_median(values: Float[Tensor, " n"]) -> float | None:
    """The median, None for infinity, which JSON does not know."""
    median = float(values.quantile(0.5))
    return median if math.isfinite(median) else None
