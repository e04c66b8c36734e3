"""hKR: as far apart as a 1-Lipschitz network can hold the classes, and a hinge on its margins."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.losses.protects import label, protects, widened


@protects(label)
def hkr(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
    alpha: float = 0.9,
    margin: float = 1.0,
) -> Float[Tensor, ""]:
    """Alpha * hinge - (1 - alpha) * separation, each class against the rest; K_row is not used.

    The separation is the mean over classes i of E[z_i | y = i] - E[z_i | y != i], means of the
    batch. With a 1-Lipschitz logit it is at most the Wasserstein-1 distance between the class and
    the rest. A term without samples is 0. The hinge is the mean over samples and logits of
    max(0, margin / 2 - z_i) * (c - 1) for i = y and max(0, margin / 2 + z_i) for the others, so
    that the label weighs as much as all others together.

    Logits are separated at 0, not against each other, and adding a number to all changes the loss.

    Args:
        logits: Class scores z.
        labels: True classes y.
        K_row: Ignored; the network is supposed to be 1-Lipschitz.
        eps: Ignored.
        alpha: Share of the hinge, in [0, 1].
        margin: Between the two sides of a logit, in logits, > 0; 2 eps asks for a distance of eps
            between samples and the zero of a 1-Lipschitz logit.

    Raises:
        LipcertError: An option is out of its range.

    Reference: arXiv 2006.06520; the form for many classes is that of the deel-torchlip library.
    """
    if not (0 <= alpha <= 1 and margin > 0):
        raise LipcertError(f"alpha={alpha}, margin={margin}: needs 0 <= alpha <= 1 and margin > 0.")
    z = widened(logits)
    c = z.shape[1]
    own = F.one_hot(labels, c).to(z.dtype)
    rest = 1 - own
    hinge = own * (c - 1) * F.relu(margin / 2 - z) + rest * F.relu(margin / 2 + z)
    inside = (own * z).sum(0) / own.sum(0).clamp(min=1)
    outside = (rest * z).sum(0) / rest.sum(0).clamp(min=1)
    return alpha * hinge.mean() - (1 - alpha) * (inside - outside).mean()
