"""A penalty that drives units towards being constant in the ball around each sample."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.bounds import MarginConstants
from lipcert.errors import LipcertError
from lipcert.graph import Slope


@dataclass(frozen=True)
class Sparsity:
    """How far units are from being constant, summed over activations.

    With the box [l, u] before an activation that is constant below s and above t, each activation
    counts mean max(0, u - s) + `thresholds` * mean max(0, t - l), over samples and those units that
    have such an end; where no unit has both, as after MaxMin with thresholds, both weights are 1.

    To be given to a recipe as `regularise`.

    Attributes:
        weight: Of the whole, as a function of the training's progress in [0, 1].
        thresholds: Weight of the upper ends.

    Reference: arXiv 2111.01395; the form is that of the authors' code for Tiny-ImageNet.
    """

    weight: Callable[[float], float]
    thresholds: float = 0.1

    def __call__(self, constants: MarginConstants, progress: float) -> Float[Tensor, ""]:
        """The weighted penalty from the boxes of a local bound.

        Raises:
            LipcertError: The bound is global.
        """
        around = constants.around
        if around is None:
            raise LipcertError(
                "Sparsity looks at boxes around samples, and this bound is global; give it a "
                "region, e.g. lc.Product(graph, region=lc.L2Ball(0.1))."
            )
        total = around.radii.new_zeros(())
        for n in around.graph:
            if isinstance(n.op, Slope) and n.op.flat is not None:
                lower, upper = around.box(n.inputs[0])
                below, above = (torch.as_tensor(end).to(lower) for end in n.op.flat())
                both = bool((below.isfinite() & above.isfinite()).any())
                total = total + _mean(upper - below, below.isfinite())
                weight = self.thresholds if both else 1.0
                total = total + weight * _mean(above - lower, above.isfinite())
        return self.weight(progress) * total


def _mean(excess: Float[Tensor, "b ..."], counted: Tensor) -> Float[Tensor, ""]:
    """The mean of the positive parts over what is counted; 0 if nothing is."""
    counted = counted.expand_as(excess)
    if not bool(counted.any()):
        return excess.new_zeros(())
    return excess[counted].clamp(min=0).mean()
