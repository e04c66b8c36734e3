"""Cross-entropy minus the certified radii of the samples that are right."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.losses.protects import check_row, label, protects, quotients, widened


@protects(label)
def certificate_regularisation(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
    weight: float = 0.1,
) -> Float[Tensor, ""]:
    """Mean cross-entropy minus ``weight`` times the mean of max(0, R).

    R = min over j != y of (z_y - z_j) / K_yj is the certified radius of a sample that is predicted
    as its label y; the others count 0. It is meant for networks whose constants are fixed: free
    ones can make R large without bound by becoming small.

    Args:
        logits: Class scores z.
        labels: True classes y, which the loss protects.
        K_row: Lipschitz constants of f_y - f_j, logits per unit of input (L2). Where one is zero,
            or too small to divide by, that class is never in reach and does not count.
        eps: Ignored; no radius is large enough.
        weight: Per unit of radius, >= 0 (gamma in the paper).

    Raises:
        LipcertError: The weight is negative, or K_row has another shape than the logits.

    Reference: arXiv 2108.04062 (certificate regularisation).
    """
    if not weight >= 0:
        raise LipcertError(f"the weight of the radii must be >= 0, got {weight}")
    check_row(logits, K_row)
    z = widened(logits)
    classes = labels.unsqueeze(1)
    margins = z.gather(1, classes) - z
    radii, divided = quotients(margins, K_row.to(z.dtype).scatter(1, classes, 1.0))
    never = ~divided & (margins > 0)
    nearest = radii.masked_fill(never.scatter(1, classes, True), torch.inf).amin(1)
    counted = nearest.masked_fill(nearest == torch.inf, 0.0)
    return F.cross_entropy(z, labels) - weight * counted.relu().mean()
