"""Lipschitz-margin training: cross-entropy after the attacker has moved."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.losses.protects import covered, label, protects, reach, widened


@protects(label)
def lmt(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
    stabilise: bool = True,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of logits whose wrong classes are raised by what an attacker can gain.

    With label y the logits become z_j + alpha * eps * K_yj for j != y, where
    alpha = min over j of clip((z_y - z_j) / (eps * K_yj), 0, 1) if ``stabilise``, else 1.

    alpha keeps training stable: a misclassified sample gets no offset and a correct one is never
    pushed beyond its decision boundary. It is one number per sample and a constant for the
    gradient. Without it (alpha = 1) and with true upper bounds in ``K_row``, the loss is an upper
    bound of the cross-entropy anywhere within eps of the input, because no margin can fall by more
    than eps * K_yj and cross-entropy falls with every margin.

    The form with one constant, sqrt(2) * L for an L-Lipschitz net, is the same function with
    ``K_row`` filled with that number.

    Args:
        logits: Class scores z.
        labels: True classes y, which the loss protects.
        K_row: Lipschitz constants of f_y - f_j, logits per unit of input (L2).
        eps: L2 radius in units of the input, >= 0 (c in the paper).
        stabilise: Whether to scale the offsets by alpha.

    Raises:
        LipcertError: eps is negative or NaN.

    Reference: arXiv 1802.04034, Algorithm 1; alpha is in the authors' code only.
    """
    z = widened(logits)
    offset = reach(z, labels, K_row, eps)
    if stabilise:
        alpha = covered(z, labels, offset).amin(dim=1, keepdim=True).clamp(min=0)
        offset = alpha * offset
    return F.cross_entropy(z + offset, labels)
