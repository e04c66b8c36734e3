"""How steep a calibrated loss is: the width of its logistic, from a radius and a share of slack."""

import math
from dataclasses import dataclass

from lipcert.errors import LipcertError


@dataclass(frozen=True)
class Calibration:
    """The logistic that a calibrated loss lays over signed distances to the decision boundary.

    Attributes:
        sigma: Its width, in units of the input.
        constant: 1 / sigma, the Lipschitz constant of the calibrated logit, per unit of input,
            whatever that of the network is.
    """

    sigma: float
    constant: float


def calibration(eps: float, slack: float) -> Calibration:
    """The logistic that has all its mass but the share ``slack`` within eps of its centre.

    The slack is shared by both tails: the logistic of width sigma is slack / 2 at a distance of eps
    on the one side and 1 - slack / 2 on the other. Hence sigma = eps / log((2 - slack) / slack).
    Little slack is a steep loss that wants every radius to be eps; much slack is a smooth loss.
    (The formula as printed by the authors, with slack in place of slack / 2, is another function;
    the numbers they report are of this one.)

    Args:
        eps: L2 radius in units of the input, > 0.
        slack: p in the paper, 0 < slack < 1.

    Raises:
        LipcertError: An argument is out of its range.

    Reference: arXiv 2309.06166; two tails as in the authors' code.
    """
    if not 0 < eps < math.inf:
        raise LipcertError(
            f"A calibrated loss needs a finite radius eps > 0, got {eps}: its width is a multiple "
            "of eps. Let eps_schedule start above 0, or give sigma."
        )
    if not 0 < slack < 1:
        raise LipcertError(
            f"slack={slack}: the share of the logistic's mass beyond eps needs 0 < slack < 1, e.g. "
            "slack=0.3."
        )
    # log((2 - slack) / slack) as a sum of positive terms: all digits at either end of the range
    constant = (math.log1p(1 - slack) - math.log(slack)) / eps
    return Calibration(1 / constant, constant)
