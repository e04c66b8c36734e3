"""Certificates: the prediction of each sample with a radius inside which it cannot change."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lipcert.bounds import MarginConstants
from lipcert.kinds import Kind
from lipcert.radii import check_radius


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

    def __repr__(self) -> str:
        """In short; the tensors are its attributes."""
        median = f", median radius {float(self.radius.median()):.4g}" if len(self) else ""
        return f"Certificate({self.kind}, {len(self)} samples{median})"

    def robust_at(self, eps: float) -> Bool[Tensor, " n"]:
        """Whether the prediction provably stays for every x' with |x' - x| <= eps.

        Tests margin > K eps itself (rounded up), not the rounded-down radius.

        Raises:
            LipcertError: eps is not a positive finite number.
        """
        eps = check_radius(eps)
        kept = torch.stack([claim.kept_at(self.margins, eps) for claim in self.claims])
        return kept.any(0).all(1)


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
