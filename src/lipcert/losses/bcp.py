"""BCP: cross-entropy of the logits where every wrong class has gained all that it can."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.losses.protects import label, protects, reach, widened


@protects(label)
def bcp(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
    kappa: float = 0.0,
) -> Float[Tensor, ""]:
    """Plain cross-entropy times kappa, plus that of the worst logits times 1 - kappa.

    With label y the worst logits are z_j + eps * K_yj for j != y, and z_y itself. With true upper
    bounds in ``K_row`` their cross-entropy is an upper bound of the cross-entropy anywhere within
    eps of the input, because it falls with every margin z_y - z_j.

    This is the loss of BCP, and of the variant of Local-Lip that its authors train on CIFAR-10 and
    Tiny-ImageNet, where eps * K_yj is the largest gain of class j within the ball and the box that
    hold the last hidden layer.

    Args:
        logits: Class scores z.
        labels: True classes y, which the loss protects.
        K_row: Lipschitz constants of f_y - f_j, logits per unit of input (L2).
        eps: L2 radius in units of the input, >= 0.
        kappa: Share of plain cross-entropy; the papers lower it from 1 to 0 while eps rises.

    Raises:
        LipcertError: eps is negative or NaN.

    Reference: BCP (Lipschitz-certifiable training with a tight outer bound, NeurIPS 2020), the
    objective; arXiv 2111.01395.
    """
    z = widened(logits)
    worst = z + reach(z, labels, K_row, eps)
    return kappa * F.cross_entropy(z, labels) + (1 - kappa) * F.cross_entropy(worst, labels)
