"""Plain cross-entropy, so that a net without certified training runs through the same loop."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.losses.protects import label, protects, widened


@protects(label)
def ce(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
) -> Float[Tensor, ""]:
    """Mean softmax cross-entropy; ``K_row`` and ``eps`` are not used.

    Args:
        logits: Class scores z.
        labels: True classes.
        K_row: Ignored.
        eps: Ignored.
    """
    return F.cross_entropy(widened(logits), labels)
