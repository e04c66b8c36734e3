"""CRM: cross-entropy, and a push on the certified radii that are still small."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.losses.protects import (
    check_radius,
    check_row,
    prediction,
    protects,
    quotients,
    widened,
)

Classification = Callable[[Tensor, Tensor], Tensor]


@protects(prediction)
def crm(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
    t: float = 5.0,
    weight: float = 15.0,
    misclassified: bool = False,
    continuous: bool = False,
    classification: Classification = F.cross_entropy,
) -> Float[Tensor, ""]:
    """Classification loss minus ``weight`` times the mean of the small smoothed radii.

    With p the predicted class, r_j = (z_p - z_j) / K_pj is the radius within which j provably does
    not overtake p, R = min over j != p of r_j the certified radius, and
    R_t = -1/t log sum over j != p of e^(-t r_j) its softmin, R - log(c - 1) / t <= R_t <= R. The
    loss is ``classification`` + weight / b * sum over A of -R_t, where A are the samples that are
    predicted correctly and have R < eps; b is the size of the whole batch. The gradient does not
    see that A depends on R. At eps = 0 nothing is penalised.

    The value jumps where R passes eps. With ``continuous`` the sum is that of max(0, eps - R_t)
    over all samples predicted correctly: the same gradient on A, none where R_t >= eps, and no jump
    in between. It also pushes samples outside A of which several classes are nearly as near as the
    nearest, since R_t < eps does not need R < eps.

    Args:
        logits: Class scores z.
        labels: True classes.
        K_row: Lipschitz constants of f_p - f_j for the **predicted** class p, logits per unit of
            input (L2). Where one is zero, or too small to divide by, that class is never in reach
            and does not count.
        eps: Largest L2 radius that is penalised, in units of the input, >= 0 (r0 in the authors'
            scripts).
        t: Sharpness of the softmin, per unit of radius, > 0 (t in the paper).
        weight: Weight of the radii, >= 0 (lambda in the paper).
        misclassified: Whether wrong predictions are penalised as well: their radius, too, is that
            of the prediction, so that it makes them more robustly wrong.
        continuous: Whether to use the form without a jump.
        classification: `torch.nn.functional.cross_entropy` or `boosted_cross_entropy`.

    Raises:
        LipcertError: eps or weight is negative or NaN, t is not positive, or K_row has another
            shape than the logits.

    Reference: arXiv 2310.00116; the form follows the authors' code.
    """
    _check_options(t, weight)

    def penalty(radii: Float[Tensor, "b c"]) -> Float[Tensor, "b"]:
        return torch.logsumexp(-t * radii, dim=1) / t

    z, radii = _radii(logits, labels, K_row, eps)
    kept = _kept(z, labels, misclassified)
    rest = -eps if continuous else None
    return classification(z, labels) + weight * _mean_penalty(radii, kept, eps, penalty, rest)


@protects(prediction)
def crm_max(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
    t: float = 5.0,
    weight: float = 15.0,
    misclassified: bool = False,
    continuous: bool = False,
    classification: Classification = F.cross_entropy,
) -> Float[Tensor, ""]:
    """Classification loss plus ``weight`` times the mean of e^(-t R) / t over the small radii R.

    As `crm`, but the penalty of a sample in A is e^(-t R) / t with R the certified radius itself,
    through which only the nearest class has a gradient. With ``continuous`` the penalty is
    (e^(-t R) - e^(-t eps)) / t: the same set A and the same gradient, without the jump at eps.

    Args:
        logits: Class scores z.
        labels: True classes.
        K_row: Lipschitz constants of f_p - f_j for the **predicted** class p, as for `crm`.
        eps: Largest L2 radius that is penalised, in units of the input, >= 0.
        t: Decay of the penalty, per unit of radius, > 0.
        weight: Weight of the penalty, >= 0.
        misclassified: Whether wrong predictions are penalised as well.
        continuous: Whether to use the form without a jump.
        classification: `torch.nn.functional.cross_entropy` or `boosted_cross_entropy`.

    Raises:
        LipcertError: eps or weight is negative or NaN, t is not positive, or K_row has another
            shape than the logits.

    Reference: arXiv 2310.00116; this form is in the authors' code.
    """
    _check_options(t, weight)

    def penalty(radii: Float[Tensor, "b c"]) -> Float[Tensor, "b"]:
        return torch.exp(-t * radii.amin(dim=1)) / t

    z, radii = _radii(logits, labels, K_row, eps)
    kept = _kept(z, labels, misclassified)
    rest = math.exp(-t * eps) / t if continuous else None
    return classification(z, labels) + weight * _mean_penalty(radii, kept, eps, penalty, rest)


def boosted_cross_entropy(
    logits: Float[Tensor, "b c"], labels: Int[Tensor, "b"]
) -> Float[Tensor, ""]:
    """Mean of -log p_y - log(1 - max over j != y of p_j) with p = softmax(logits).

    Args:
        logits: Class scores z.
        labels: True classes y.

    Reference: an option of the authors' code of arXiv 2310.00116.
    """
    z = widened(logits)
    wrong = z.scatter(1, labels.unsqueeze(1), -torch.inf)
    others = z.scatter(1, wrong.argmax(dim=1, keepdim=True), -torch.inf)  # all but the strongest
    complement = z.logsumexp(dim=1) - others.logsumexp(dim=1)
    return F.cross_entropy(z, labels) + complement.mean()


def _check_options(t: float, weight: float) -> None:
    if not t > 0:
        raise LipcertError(f"the sharpness t of the radii must be > 0, got {t}")
    if not weight >= 0:
        raise LipcertError(f"the weight of the radii must be >= 0, got {weight}")


def _kept(
    logits: Float[Tensor, "b c"], labels: Int[Tensor, "b"], misclassified: bool
) -> Bool[Tensor, "b"]:
    """The samples that may be penalised."""
    right = prediction(logits, labels) == labels
    return torch.ones_like(right) if misclassified else right


def _radii(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]]:
    """The widened logits and (z_p - z_j) / K_pj; infinite for p itself and classes out of reach.

    Out of reach is what a division by K^2 in the gradient would overflow for.
    """
    check_radius(eps)
    check_row(logits, K_row)
    z = widened(logits)
    classes = prediction(z, labels).unsqueeze(1)
    margins = z.gather(1, classes) - z
    radii, divided = quotients(margins, K_row.to(z.dtype).scatter(1, classes, 1.0))
    out_of_reach = (~divided).scatter(1, classes, True)
    return z, radii.masked_fill(out_of_reach, torch.inf)


def _mean_penalty(
    radii: Float[Tensor, "b c"],
    kept: Bool[Tensor, "b"],
    eps: float,
    penalty: Callable[[Tensor], Tensor],
    rest: float | None,
) -> Float[Tensor, ""]:
    """The sum over the small radii of the penalty, over the size of the batch.

    Args:
        radii: Of every class, infinite where it does not count.
        kept: The samples that may be penalised.
        eps: The largest penalised radius.
        penalty: Falls with the radii.
        rest: Its value from which on it is held, in the continuous form; None in the other.
    """
    with torch.no_grad():
        # Both tests are true for NaN: broken constants must show in the loss.
        large = radii.amin(dim=1) >= eps if rest is None else penalty(radii) <= rest
        small = kept & ~large & (eps > 0)
    # Zeros first: in some versions of torch a row of infinities has no gradient, masked or not.
    values = penalty(radii.masked_fill(~small.unsqueeze(1), 0.0)) - (rest or 0.0)
    return values.masked_fill(~small, 0.0).sum() / len(radii)
