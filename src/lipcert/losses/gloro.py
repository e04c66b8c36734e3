"""GloRo: one more class, "not robust here", with the best logit an attacker can reach."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.losses.protects import prediction, protects, reach, widened


def bottom(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
) -> Float[Tensor, "b 1"]:
    """The bottom logit: max over j != p of z_j + eps * K_pj, with p the predicted class.

    It exceeds z_p exactly where the prediction is not certified at eps.
    """
    classes = prediction(logits, labels)
    rivals = logits + reach(logits, classes, K_row, eps)
    return rivals.scatter(1, classes.unsqueeze(1), -torch.inf).amax(dim=1, keepdim=True)


@protects(prediction)
def gloro(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the C classes and the bottom class.

    The logits are [z, z_bot] with z_bot = max over j != p of z_j + eps * K_pj. The label wins only
    if the sample is predicted correctly and certified at eps. At eps = 0 the bottom logit is the
    runner-up's, so the loss is not plain cross-entropy there.

    Args:
        logits: Class scores z.
        labels: True classes.
        K_row: Lipschitz constants of f_p - f_j for the **predicted** class p, logits per unit of
            input (L2).
        eps: L2 radius in units of the input, >= 0.

    Raises:
        LipcertError: eps is negative or NaN.

    Reference: arXiv 2102.08452, section 3.
    """
    z = widened(logits)
    whole = torch.cat([z, bottom(z, labels, K_row, eps)], dim=1).logsumexp(dim=1)
    # The label's own logit, so that a label beyond the classes is no way to mean the bottom class.
    return (whole - z.gather(1, labels.unsqueeze(1)).squeeze(1)).mean()


@protects(prediction)
def gloro_trades(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
    weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean cross-entropy plus ``weight`` times the divergence that the bottom class causes.

    With q = softmax([z, z_bot]) the second term is KL(softmax(z) || q over the C classes). All
    those log-ratios are equal, so that it is log(sum_j e^z_j + e^z_bot) - log sum_j e^z_j
    = log(1 + e^(z_bot - logsumexp z)), which is evaluated in the last form. It stays positive at
    eps = 0, where z_bot is the runner-up's logit.

    Args:
        logits: Class scores z.
        labels: True classes.
        K_row: Lipschitz constants of f_p - f_j for the **predicted** class p, logits per unit of
            input (L2).
        eps: L2 radius in units of the input, >= 0.
        weight: Weight of the divergence, >= 0; 0 leaves plain cross-entropy.

    Raises:
        LipcertError: eps is negative or NaN.

    Reference: arXiv 2102.08452, the TRADES variant of the loss.
    """
    z = widened(logits)
    excess = bottom(z, labels, K_row, eps) - z.logsumexp(dim=1, keepdim=True)
    divergence = torch.logaddexp(excess, torch.zeros_like(excess)).mean()
    return F.cross_entropy(z, labels) + weight * divergence
