"""The hinge on margins, with which CPL is trained."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.losses.protects import label, protects, widened


@protects(label)
def hinge(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
    margin: float = 0.7,
) -> Float[Tensor, ""]:
    """Mean over samples of the sum over j != y of max(0, margin - (z_y - z_j)) / c.

    It asks for the same margin whatever the constants are; K_row and eps are not used.

    Args:
        logits: Class scores z.
        labels: True classes y.
        K_row: Ignored; the network is supposed to be 1-Lipschitz.
        eps: Ignored.
        margin: In logits, > 0.

    Raises:
        LipcertError: The margin is not positive.

    Reference: arXiv 2110.12690 (CPL), the authors' code.
    """
    if not margin > 0:
        raise LipcertError(f"margin={margin}: the margin that is asked for must be > 0.")
    return F.multi_margin_loss(widened(logits), labels, margin=margin)
