"""Certificates: the prediction of each sample with a radius inside which it cannot change."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lipcert.bounds import Bound, MarginConstants
from lipcert.errors import LipcertError
from lipcert.graph import Graph
from lipcert.kinds import Kind, weakest


@dataclass(frozen=True, eq=False)
class Claim:
    """By how much margins can fall, as one bound proves it: min(constants r, drops) at distance r.

    Attributes:
        constants: K_prediction,j, `(n, classes)`, float64.
        drops: The largest falls within `valid_radius`, `(n, classes)`; infinite where only the
            constants are known.
        valid_radius: Up to which distance the claim holds, `(n,)`.
    """

    constants: Float[Tensor, "n classes"]
    drops: Float[Tensor, "n classes"]
    valid_radius: Float[Tensor, " n"]

    def kept_at(
        self, margins: Float[Tensor, "n classes"], eps: float | Float[Tensor, " n"]
    ) -> Bool[Tensor, "n classes"]:
        """Which margins provably stay positive: margin > min(K eps, drop), rounded up."""
        eps = torch.as_tensor(eps, dtype=torch.float64).expand(len(margins))[:, None]
        fall = torch.minimum(torch.nextafter(self.constants * eps, _UP), self.drops)
        return (margins > fall) & (eps <= self.valid_radius[:, None]) & self.constants.isfinite()

    def radii(self, margins: Float[Tensor, "n classes"]) -> Float[Tensor, "n classes"]:
        """Up to which radius each margin provably stays positive, rounded down."""
        ratio = torch.nextafter(margins / self.constants, -_UP).clamp(min=0)
        ratio = ratio.where(self.constants > 0, math.inf)
        ratio = ratio.where(~(margins > self.drops), math.inf)
        ratio = ratio.where((margins > 0) & self.constants.isfinite(), 0)
        return torch.minimum(ratio, self.valid_radius[:, None])


_UP = torch.tensor(math.inf, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Certificate:
    """What was proved about each sample.

    Attributes:
        prediction: The predicted class, `(n,)`.
        radius: Distance in input units (L2, see `p`) up to which the prediction provably stays,
            `(n,)`, float64, rounded down; 0 where nothing is proved (ties, NaN or infinite logits).
        kind: What the claim is: an upper bound's proof, one that may fail, or an estimate.
        failure: Probability that the claim is false (0 unless probabilistic).
        margins: f_prediction - f_j, `(n, classes)`, float64, rounded down; the entry of the
            prediction itself is infinite.
        claims: By how much margins can fall, one entry a bound; a margin falls by no more than the
            least of what those say whose balls reach that far.
        p: The norm of the radii: 2 unless the bound was built for another one.
    """

    prediction: Int[Tensor, " n"]
    radius: Float[Tensor, " n"]
    kind: Kind
    failure: float
    margins: Float[Tensor, "n classes"]
    claims: tuple[Claim, ...]
    p: float = 2.0

    def __len__(self) -> int:
        return len(self.prediction)

    def robust_at(self, eps: float) -> Bool[Tensor, " n"]:
        """Whether the prediction provably stays for every x' with |x' - x| <= eps.

        Tests margin > K eps itself (rounded up), not the rounded-down radius.

        Raises:
            LipcertError: eps is not a positive finite number.
        """
        eps = check_radius(eps)
        kept = torch.stack([claim.kept_at(self.margins, eps) for claim in self.claims])
        return kept.any(0).all(1)


def check_radius(eps: float) -> float:
    """The radius as a float.

    Raises:
        LipcertError: eps is not a positive finite number.
    """
    number = isinstance(eps, int | float)
    if not (number and eps > 0 and math.isfinite(eps)):
        raise LipcertError(f"eps = {eps}: a radius must be a positive finite number, e.g. 36/255.")
    return float(eps)


def certify(
    net: nn.Module,
    x: Float[Tensor, "n ..."],
    *,
    bound: Bound,
    constants: MarginConstants | None = None,
    batch_size: int = 512,
    bisections: int = 0,
    allow_estimate: bool = False,
    on_batch: Callable[[int], object] | None = None,
) -> Certificate:
    """Certify the predictions of a network.

    The network runs in eval mode (its mode is restored), in batches, with TF32 and autocast off.
    A global bound is evaluated once.

    Args:
        net: The network that `bound` was traced from.
        x: Inputs `(n, *input_shape)`, in the units in which radii are wanted (pixels in [0, 1]:
            normalisation belongs inside the network).
        bound: A bound of this network.
        constants: What a global bound gave for the weights as they are now, if it was evaluated
            before.
        batch_size: Samples at a time.
        bisections: How often a local bound is evaluated again in balls of other radii, around each
            sample its own, to find the largest one that it proves. Radii never shrink by it.
        allow_estimate: Accept a bound of kind estimate. What comes out is then no certificate,
            and its `kind` says so.
        on_batch: Called with the number of samples done after each batch (for progress bars).

    Raises:
        LipcertError: The bound is an estimate; it was traced from another network, or the network
            changed since; NaN weights; wrong shape or precision of the inputs.
    """
    if not isinstance(bound, Bound):
        raise LipcertError(
            f"bound={bound!r:.60} is no bound; give e.g. lc.Product(lc.trace(net, input_shape))."
        )
    bound.graph.check(net)
    _check_inputs(bound, x, batch_size, bisections)
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with torch.no_grad(), _ieee_float32(_like(net, x).device.type):
            if constants is None and not bound.local:
                constants = bound()
            if constants is not None:
                _check_kind(constants.kind, allow_estimate)
            parts = []
            _check_function(net, bound.graph, x[:_COMPARED])
            with bound.held():
                for batch in x.split(batch_size):
                    here = bound(batch) if constants is None else constants
                    _check_kind(here.kind, allow_estimate)
                    logits = net(batch.to(_like(net, batch)))
                    part = from_logits(logits, here)
                    parts.append(_bisected(part, logits, bound, batch, bisections))
                    if on_batch is not None:
                        on_batch(sum(len(p) for p in parts))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return _joined(parts, bound.local)


def from_logits(logits: Float[Tensor, "n classes"], constants: MarginConstants) -> Certificate:
    """The certificate of samples whose logits and constants are known.

    A sample's radius against class j is the largest that any of the constants proves: its margin
    divided by K, or the whole ball where the margin is above the drop, and never beyond the ball.
    The sample's radius is the least of these. Rounded down at every step.
    """
    logits = logits.to("cpu", torch.float64)
    prediction = logits.argmax(1)
    own = logits.gather(1, prediction[:, None])
    margins = torch.nextafter(own - logits, -_UP)
    itself = torch.nn.functional.one_hot(prediction, logits.shape[1]).bool()
    margins = margins.masked_fill(itself, math.inf)
    margins = margins.where(logits.isfinite().all(1, keepdim=True), -math.inf)
    claims = tuple(_claim(member, prediction, itself) for member in constants.members())
    radii = torch.stack([claim.radii(margins) for claim in claims])
    return Certificate(
        *(prediction, radii.amax(0).amin(1), constants.kind, constants.failure),
        *(margins, claims, constants.p),
    )


def _claim(constants: MarginConstants, prediction: Tensor, itself: Tensor) -> Claim:
    """The constants of the predicted classes, rounded up; 0 for a class against itself."""
    rows = constants.row(prediction).to("cpu", torch.float64).masked_fill(itself, 0)
    drops = torch.full_like(rows, math.inf)
    if constants.drop is not None:
        drops = constants.drop(prediction).to("cpu", torch.float64)
        drops = torch.nextafter(drops, _UP).masked_fill(itself, 0)
    rows = rows.where(~drops.isnan(), math.inf)  # what is no number proves nothing
    valid = torch.as_tensor(constants.valid_radius, dtype=torch.float64).cpu()
    valid = valid.where(~valid.isnan(), 0)
    return Claim(rows, drops, valid.expand(len(rows)))


def _bisected(
    certificate: Certificate, logits: Tensor, bound: Bound, x: Tensor, bisections: int
) -> Certificate:
    """The certificate after more passes, in larger balls until one fails, then in between."""
    if not bound.local:
        return certificate
    failed = torch.full_like(certificate.radius, math.inf)
    for _ in range(bisections):
        proved = certificate.radius.where(certificate.radius.isfinite(), 0)
        wider = torch.maximum(2 * proved, certificate.claims[-1].valid_radius)
        eps = wider.where(failed.isinf(), (proved + failed) / 2)
        trial = from_logits(logits, bound(x, eps=eps))
        failed = failed.where(trial.radius >= eps, eps)
        certificate = _better(certificate, trial)
    return certificate


def _better(a: Certificate, b: Certificate) -> Certificate:
    """For each sample the certificate of the larger radius."""
    second = b.radius > a.radius
    claims = tuple(
        Claim(
            old.constants.where(~second[:, None], new.constants),
            old.drops.where(~second[:, None], new.drops),
            old.valid_radius.where(~second, new.valid_radius),
        )
        for old, new in zip(a.claims, b.claims, strict=True)
    )
    return dataclasses.replace(
        a,
        radius=torch.maximum(a.radius, b.radius),
        failure=min(1.0, a.failure + b.failure),
        claims=claims,
    )


def _check_kind(kind: Kind, allow_estimate: bool) -> None:
    if kind is Kind.ESTIMATE and not allow_estimate:
        raise LipcertError(
            "The bound is an estimate (power iteration approaches a norm from below), so it proves "
            "nothing. Certify with a true bound, e.g. Product(graph, norm=Auto()), or pass "
            "allow_estimate=True; every result then says 'estimate'."
        )


_COMPARED = 4  # samples at which network and graph are compared


def _check_function(net: nn.Module, graph: Graph, x: Float[Tensor, "n ..."]) -> None:
    """Raises LipcertError unless the graph computes what the network does, on a few samples.

    Settings that a module does not print, forwards that were replaced and hooks that hold for all
    modules change the network without a trace in its modules.
    """
    x = x.to(_like(net, x))
    for part in (x, x[:1]):  # alone too: a network may look at the size of the batch
        values, theirs = graph.values(part), net(part)
        apart = (values[graph.output] - theirs).abs().flatten(1).amax(1)
        size = values[graph.output].abs().flatten(1).amax(1)
        inside = max(float(v.abs().max()) for v in values.values())
        # Far more than rounding, also of what may have cancelled inside; false for NaN.
        if bool((apart > 1e-2 * size + 1e-5 * inside).any()):
            raise LipcertError(
                f"The network does not compute what was traced: an output differs by "
                f"{float(apart.max()):.3g}. It changed since, or it is not what its modules say (a "
                "replaced forward, a global hook). Trace it again: lc.trace(net, input_shape)."
            )


def _check_inputs(bound: Bound, x: Tensor, batch_size: int, bisections: int) -> None:
    if not isinstance(x, Tensor):
        raise LipcertError(
            f"The inputs are a {type(x).__name__}; give a tensor: torch.as_tensor(x)."
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise LipcertError(
            f"batch_size={batch_size}: a whole number, at least one sample at a time."
        )
    if not isinstance(bisections, int) or bisections < 0:
        raise LipcertError(f"bisections={bisections}: needs a whole number >= 0.")
    if tuple(x.shape[1:]) != bound.graph.input_shape:
        raise LipcertError(
            f"The inputs have shape {tuple(x.shape)}; the bound was traced for (n, "
            f"{', '.join(map(str, bound.graph.input_shape))})."
        )
    if not x.is_floating_point():
        raise LipcertError(
            f"The inputs are {x.dtype}; certify in the units of the network's input, e.g. pixels "
            "in [0, 1]: x.float() / 255."
        )
    if len(x) == 0:
        raise LipcertError("There are no samples to certify.")
    weights = [p.dtype for p in bound.graph.model.parameters() if p.is_floating_point()]
    bad = {t for t in weights if t not in (torch.float32, torch.float64)}
    if bad:
        raise LipcertError(
            f"The network's weights are {', '.join(map(str, bad))}; certify in float32 or float64 "
            "(net.float()): margins in half precision are not those that the bound speaks of."
        )


def _like(net: nn.Module, x: Tensor) -> Tensor:
    """A tensor with the precision and device that the network computes in."""
    weights = itertools.chain(net.parameters(), net.buffers())
    return next((t for t in weights if t.is_floating_point()), x)


@contextlib.contextmanager
def _ieee_float32(device: str) -> Iterator[None]:
    """Float32 as it is: no TF32, no bfloat16 products, no autocast."""
    precision = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions


def _joined(parts: list[Certificate], local: bool) -> Certificate:
    def cat(name: str, found: Sequence[object]) -> Tensor:
        return torch.cat([getattr(part, name) for part in found])

    kind = weakest(part.kind for part in parts)
    # A global bound was computed once for all parts; local ones anew for each: a union bound.
    failures = [part.failure for part in parts]
    failure = min(1.0, sum(failures)) if local else failures[0]
    claims = tuple(
        Claim(*(cat(name, same) for name in ("constants", "drops", "valid_radius")))
        for same in zip(*(part.claims for part in parts), strict=True)
    )
    return Certificate(
        *(cat("prediction", parts), cat("radius", parts), kind, failure),
        *(cat("margins", parts), claims, parts[0].p),
    )


def clean_accuracy(certificate: Certificate, labels: Int[Tensor, " n"]) -> float:
    """Fraction of samples predicted right."""
    return float((certificate.prediction == labels.cpu()).double().mean())


def certified_accuracy(certificate: Certificate, labels: Int[Tensor, " n"], eps: float) -> float:
    """Fraction predicted right and provably so within eps (CRA, also VRA)."""
    right = certificate.prediction == labels.cpu()
    return float((right & certificate.robust_at(eps)).double().mean())


def average_certified_radius(certificate: Certificate, labels: Int[Tensor, " n"]) -> float:
    """Mean certified radius, 0 for a wrong prediction (ACR)."""
    right = certificate.prediction == labels.cpu()
    return float(certificate.radius.where(right, 0).mean())


def curve(
    certificate: Certificate, labels: Int[Tensor, " n"], radii: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """Certified accuracy as a function of the radius: fraction right with a radius >= r."""
    return curve_of_radii(certificate.radius, certificate.prediction == labels.cpu(), radii)


def curve_of_radii(
    radius: Float[Tensor, " n"], right: Bool[Tensor, " n"], radii: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """The same from certified radii and which predictions are right, as read from a file."""
    reached = radius.where(right, -1).sort().values
    below = torch.searchsorted(reached, radii.to(reached))
    return 1 - below.double() / len(reached)


@dataclass(frozen=True)
class ClassResult:
    """One row of the per-class table: all fractions of the samples of this class."""

    label: int
    samples: int
    clean_accuracy: float
    certified_accuracy: dict[float, float]
    median_radius: float


def per_class(
    certificate: Certificate, labels: Int[Tensor, " n"], radii: list[float]
) -> list[ClassResult]:
    """Accuracy and certified accuracy class by class."""
    labels = labels.cpu()
    right = certificate.prediction == labels
    robust = {eps: right & certificate.robust_at(eps) for eps in radii}
    radius = certificate.radius.where(right, 0)
    rows = []
    for label in labels.unique().tolist():
        members = labels == label
        certified = {eps: float(ok[members].double().mean()) for eps, ok in robust.items()}
        rows.append(
            ClassResult(
                label,
                int(members.sum()),
                float(right[members].double().mean()),
                certified,
                float(radius[members].median()),
            )
        )
    return rows
