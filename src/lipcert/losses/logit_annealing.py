"""Logit annealing: cross-entropy that loses interest in samples that have their margin."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from lipcert.errors import LipcertError
from lipcert.losses.ce import tempered
from lipcert.losses.emma import raised
from lipcert.losses.protects import label, protects, widened


@protects(label)
def logit_annealing(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
    temperature: float = 0.75,
    offset: float = 2.0,
    power: float = 5.0,
    raise_rivals: bool = False,
) -> Float[Tensor, ""]:
    """Mean of temperature * (1 - e^(-l))^power * l, with l = CE((z - offset * e_y) / temperature).

    e^(-l) is the probability of the label after the offset. Samples that have their margin lose
    their weight, and a network of fixed Lipschitz constant spends its slope on the others.

    Args:
        logits: Class scores z.
        labels: True classes y, which the loss protects.
        K_row: Lipschitz constants of f_y - f_j, logits per unit of input (L2); not used unless
            ``raise_rivals``.
        eps: L2 radius in units of the input; not used unless ``raise_rivals``.
        temperature: In logits, > 0 (T in the paper).
        offset: In logits; subtracted from the label's (xi in the paper).
        power: How fast the weight falls, >= 1 (beta in the paper).
        raise_rivals: Whether the wrong classes are raised first as by `emma`, as for networks of
            which some layers have free norms.

    Raises:
        LipcertError: An option is out of its range.

    Reference: arXiv 2501.15003 (BRONet).
    """
    if not power >= 1:
        raise LipcertError(f"power={power}: the annealing needs a power >= 1.")
    z = widened(logits)
    if raise_rivals:
        z = raised(z, labels, K_row, eps)
    each = cross_entropy(tempered(z, labels, temperature, offset), labels, reduction="none")
    return temperature * ((-torch.expm1(-each)).pow(power) * each).mean()
