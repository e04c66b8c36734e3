"""EMMA: every class is raised, each by as much of its reach as its margin covers."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.losses.protects import covered, label, protects, reach, widened


@protects(label)
def emma(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of logits raised class by class, just far enough to threaten the label.

    With label y the logits become z_j + s_j * eps * K_yj for j != y, where
    s_j = clip((z_y - z_j) / (eps * K_yj), 0.01, 1) is a constant for the gradient: a class that
    can overtake the label within eps is raised up to the label and no further. The floor of 0.01
    keeps a gradient towards smaller constants where the sample is misclassified.

    Args:
        logits: Class scores z.
        labels: True classes y, which the loss protects.
        K_row: Lipschitz constants of f_y - f_j, logits per unit of input (L2).
        eps: L2 radius in units of the input, >= 0.

    Raises:
        LipcertError: eps is negative or NaN.

    Reference: arXiv 2301.12549, EMMA loss; the bounds of the clip follow the authors' code.
    """
    return F.cross_entropy(raised(widened(logits), labels, K_row, eps), labels)


def raised(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
) -> Float[Tensor, "b c"]:
    """The logits of `emma` from widened ones."""
    offset = reach(logits, labels, K_row, eps)
    return logits + covered(logits, labels, offset).clamp(min=0.01) * offset
