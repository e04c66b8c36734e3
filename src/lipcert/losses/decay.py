"""A penalty on the Lipschitz constant itself, for losses that do not see its size."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.bounds import MarginConstants
from lipcert.errors import LipcertError


@dataclass(frozen=True)
class ConstantDecay:
    """``weight`` * K^``power`` with K the largest constant of all pairs of classes.

    Around samples it is the mean over the samples. To be given to a recipe as `regularise`; the
    gradient flows through the bound. A calibrated loss such as `cll` stays as it is when logits and
    constants grow together, and this decides how large they are.

    The code of the paper has variants that let no constant below 1 count; they have no gradient
    there. This one always has.

    Attributes:
        weight: Of the penalty, >= 0 (lambda in the paper).
        power: Of the constant, > 0.

    Raises:
        LipcertError: A number is out of its range.

    Reference: arXiv 2309.06166.
    """

    weight: float
    power: float = 2.0

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and self.power > 0):
            raise LipcertError(f"{self}: needs weight >= 0 and power > 0.")

    def __call__(self, constants: MarginConstants, progress: float) -> Float[Tensor, ""]:
        """The penalty at these constants; the progress of the training is not looked at."""
        return self.weight * _largest(constants).pow(self.power).mean()


def _largest(constants: MarginConstants) -> Float[Tensor, " b"]:
    """The largest constant of all pairs; one number if global, else one for each sample."""
    every = torch.arange(constants.classes)
    batch = next((m.batch for m in constants.members() if m.batch is not None), None)
    if batch is None:
        pairs = constants.within(every, 0.0)[None]
    else:
        pairs = torch.stack([constants.within(i.expand(batch), 0.0) for i in every], 1)
    own = torch.eye(constants.classes, dtype=torch.bool, device=pairs.device)
    return pairs.masked_fill(own, 0.0).amax((1, 2))
