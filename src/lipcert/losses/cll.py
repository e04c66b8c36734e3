"""CLL: cross-entropy of margins measured as distances in the input, its width set by a radius."""

import math
from enum import StrEnum

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.losses.calibration import calibration
from lipcert.losses.protects import (
    check_radius,
    check_row,
    each_logit,
    label,
    protects,
    quotients,
    widened,
)


class Offset(StrEnum):
    """Where the loss has its centre: at a radius of 2 eps, of eps, or at the decision boundary."""

    TWO_SIDED = "two_sided"
    ONE_SIDED = "one_sided"
    NONE = "none"


_CENTRES = {Offset.TWO_SIDED: 2, Offset.ONE_SIDED: 1, Offset.NONE: 0}


@protects(label)
def cll(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
    slack: float = 0.3,
    margin_offset: Offset | str = Offset.TWO_SIDED,
    scale: float = 1.0,
    detach: bool = True,
    sigma: float | None = None,
) -> Float[Tensor, ""]:
    """Mean of log(1 + sum over j != y of e^((m eps - r_j / scale) / sigma)).

    r_j = (z_y - z_j) / K_yj is the signed radius against class j, y the label, m = 2, 1 or 0 says
    ``margin_offset``, and sigma is `calibration(eps, slack).sigma`. Multiplying the logits and K by
    one number changes nothing, so that nothing keeps K small: add `ConstantDecay`.

    With ``one_sided`` the loss turns at r = eps, as in the paper's formula for two classes;
    ``two_sided``, which most published settings have, turns at r = 2 eps.

    Where K_yj is zero or too small to divide by, as for equal rows of the last layer, class j is
    never in reach if the margin is positive and adds nothing. Else it is always in reach; then the
    margin itself stands for r_j, as if K_yj were 1, which keeps loss and gradient finite.

    Args:
        logits: Class scores z.
        labels: True classes y, which the loss protects.
        K_row: Lipschitz constants of f_y - f_j, logits per unit of input (L2).
        eps: L2 radius in units of the input, > 0; with ``sigma`` given >= 0.
        slack: Share of the logistic's mass beyond eps, 0 < slack < 1 (p in the paper).
        margin_offset: Where the centre is.
        scale: Divides the radii, but not the centre, > 0; below 1 in the first part of a training,
            margins count more than they are (K_scale in the authors' code).
        detach: Whether K is a constant for the gradient. If it is not, wrong predictions push
            their constants up.
        sigma: Width of the logistic, in units of the input, in place of that by ``slack``.

    Raises:
        LipcertError: An option is out of its range, or K_row has another shape than the logits.

    Reference: arXiv 2309.06166; the form for many classes is in the authors' code.
    """
    centre, width = _shape(eps, slack, margin_offset, scale, sigma)
    check_row(logits, K_row)
    z = widened(logits)
    classes = labels.unsqueeze(1)
    margins = z.gather(1, classes) - z
    constants = (K_row.detach() if detach else K_row).to(z.dtype).scatter(1, classes, 1.0)
    radii, divided = quotients(margins, constants)
    scores = (centre - radii / scale) / width
    never = ~divided & (margins > 0)
    scores = scores.masked_fill(never, -torch.inf).scatter(1, classes, 0.0)
    return F.cross_entropy(scores, labels)


@protects(each_logit)
def cll_per_logit(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "#b c"] | Float[Tensor, " c"],
    eps: float,
    slack: float = 0.3,
    margin_offset: Offset | str = Offset.TWO_SIDED,
    scale: float = 1.0,
    detach: bool = True,
    sigma: float | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of z_j / (scale sigma K_j), the wrong classes raised by m eps / sigma.

    As `cll`, but each logit is divided by its own constant and not each margin by that of the pair.
    Adding a number to all logits of a sample changes this loss, and no term of it is a certified
    radius. It is what several published settings of the authors run.

    A logit whose constant is zero or too small to divide by stands for itself, as if K_j were 1.

    Args:
        logits: Class scores z.
        labels: True classes y.
        K_row: Lipschitz constants of the **single logits** f_j, logits per unit of input (L2); one
            row for all samples or one for each.
        eps: L2 radius in units of the input, > 0; with ``sigma`` given >= 0.
        slack: Share of the logistic's mass beyond eps, 0 < slack < 1.
        margin_offset: Where the centre is, as for `cll`.
        scale: Divides the logits, but not the centre, > 0.
        detach: Whether K is a constant for the gradient.
        sigma: Width of the logistic, in units of the input, in place of that by ``slack``.

    Raises:
        LipcertError: An option is out of its range.

    Reference: arXiv 2309.06166; this form is in the authors' code only.
    """
    centre, width = _shape(eps, slack, margin_offset, scale, sigma)
    z = widened(logits)
    constants = (K_row.detach() if detach else K_row).to(z.dtype).expand(z.shape)
    distances, _ = quotients(z, constants)
    raised = torch.full_like(z, centre / width).scatter(1, labels.unsqueeze(1), 0.0)
    return F.cross_entropy(distances / scale / width + raised, labels)


def _shape(
    eps: float, slack: float, margin_offset: Offset | str, scale: float, sigma: float | None
) -> tuple[float, float]:
    """Centre and width of the logistic, in units of the input, from checked options."""
    try:
        times = _CENTRES[Offset(margin_offset)]
    except ValueError:
        raise LipcertError(
            f"margin_offset={margin_offset!r} is none of {', '.join(map(repr, map(str, Offset)))}."
        ) from None
    if not 0 < scale < math.inf:
        raise LipcertError(f"scale={scale}: the number that divides the radii must be > 0.")
    if sigma is None:
        return times * eps, calibration(eps, slack).sigma
    check_radius(eps)
    if not 0 < sigma < math.inf:
        raise LipcertError(f"sigma={sigma}: the width of the logistic must be > 0.")
    return times * eps, sigma
