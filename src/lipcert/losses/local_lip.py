"""Local-Lip's variant of the loss of GloRo Nets: one more class, against the label."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.losses.protects import label, protects, reach, widened


@protects(label)
def local_lip(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the C classes and the strongest worst logit.

    The logits are [z, z_bot] with z_bot = max over j != y of z_j + eps * K_yj and y the label. It
    is `gloro` with the label in place of the prediction, so that the two agree on samples that are
    predicted correctly.

    Args:
        logits: Class scores z.
        labels: True classes y, which the loss protects.
        K_row: Lipschitz constants of f_y - f_j, logits per unit of input (L2).
        eps: L2 radius in units of the input, >= 0.

    Raises:
        LipcertError: eps is negative or NaN.

    Reference: arXiv 2111.01395; the form follows the authors' code.
    """
    z = widened(logits)
    worst = z + reach(z, labels, K_row, eps)
    bottom = worst.scatter(1, labels.unsqueeze(1), -torch.inf).amax(dim=1, keepdim=True)
    return F.cross_entropy(torch.cat([z, bottom], dim=1), labels)
