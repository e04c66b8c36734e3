"""Cross-entropy that looks at no constants: plain, or with a margin for 1-Lipschitz networks."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.losses.protects import label, protects, widened


@protects(label)
def ce(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
    temperature: float = 1.0,
    offset: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean of temperature * CE((z - offset * e_y) / temperature); K_row and eps are not used.

    The defaults are plain softmax cross-entropy. A network that is 1-Lipschitz by construction is
    trained with this loss in that the label has to win by ``offset``: sqrt(2) eps asks for a
    certified radius of eps where pairs of logits have the constant sqrt(2).

    Args:
        logits: Class scores z.
        labels: True classes y.
        K_row: Ignored.
        eps: Ignored.
        temperature: In logits, > 0; the smaller, the more the loss is a hinge.
        offset: In logits; subtracted from the label's.

    Raises:
        LipcertError: The temperature is not positive.

    Reference: arXiv 2208.03160 (AOL), whose code has offset sqrt(2) and temperature 1/4.
    """
    return temperature * F.cross_entropy(tempered(logits, labels, temperature, offset), labels)


def tempered(
    logits: Float[Tensor, "b c"], labels: Int[Tensor, "b"], temperature: float, offset: float
) -> Float[Tensor, "b c"]:
    """The widened (z - offset * e_y) / temperature.

    Raises:
        LipcertError: The temperature is not positive.
    """
    if not temperature > 0:
        raise LipcertError(f"temperature={temperature}: the logits are divided by it; give > 0.")
    z = widened(logits)
    lowered = z.scatter_add(1, labels.unsqueeze(1), z.new_full((len(z), 1), -offset))
    return lowered / temperature
