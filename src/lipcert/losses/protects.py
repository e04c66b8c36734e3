"""Which class a loss protects, and the few terms that several losses share."""

from collections.abc import Callable
from typing import ParamSpec, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.errors import LipcertError

P = ParamSpec("P")


@runtime_checkable
class Loss(Protocol[P]):
    """A loss function that also says which class of each sample it protects."""

    protects: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        """Mean loss of a batch, a scalar."""
        ...


def label(logits: Float[Tensor, "b c"], labels: Int[Tensor, "b"]) -> Int[Tensor, "b"]:
    """The label of every sample."""
    return labels


def prediction(logits: Float[Tensor, "b c"], labels: Int[Tensor, "b"]) -> Int[Tensor, "b"]:
    """The predicted class of every sample: the index of its largest logit."""
    return logits.detach().argmax(dim=1)


def protects(which: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Callable[P, Tensor]], Loss[P]]:
    """Decorator that sets ``loss.protects``.

    Args:
        which: `label` or `prediction`, or any function (logits, labels) -> class of each sample.
    """

    def mark(loss: Callable[P, Tensor]) -> Loss[P]:
        marked = cast(Loss[P], loss)
        marked.protects = which
        return marked

    return mark


def widened(logits: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
    """The logits in float32 at least: exponentials of half-precision logits lose the margin."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_radius(eps: float) -> None:
    """Raises LipcertError unless the radius of a loss is >= 0."""
    if not eps >= 0:
        raise LipcertError(f"the radius eps of a loss must be >= 0, got {eps}")


def reach(
    logits: Float[Tensor, "b c"],
    classes: Int[Tensor, "b"],
    K_row: Float[Tensor, "b c"],
    eps: float,
) -> Float[Tensor, "b c"]:
    """What an attacker within eps can gain against each protected class: eps * K_row.

    Args:
        logits: Widened logits; the result takes their dtype.
        classes: The protected classes.
        K_row: Lipschitz constants against the protected class, logits per unit of input (L2).
        eps: L2 radius in units of the input, >= 0.

    Returns:
        Logits by which class j can rise against the protected class; 0 for that class itself,
        whose entry of ``K_row`` is overwritten and so may hold anything, NaN included.

    Raises:
        LipcertError: eps is negative or NaN.
    """
    check_radius(eps)
    return (eps * K_row.to(logits.dtype)).scatter(1, classes.unsqueeze(1), 0.0)


def covered(
    logits: Float[Tensor, "b c"], classes: Int[Tensor, "b"], reach: Float[Tensor, "b c"]
) -> Float[Tensor, "b c"]:
    """The share margin / reach of the reach that each clean margin covers, at most 1.

    The margin of class j is z_i - z_j with i the protected class, so the share is negative where
    j is ahead already, minus infinity if moreover nothing can be reached (``reach`` 0), and 1 at i
    itself. It is a constant for the gradient.
    """
    with torch.no_grad():
        margins = logits.gather(1, classes.unsqueeze(1)) - logits
        return torch.where(margins >= reach, 1.0, margins / reach)
