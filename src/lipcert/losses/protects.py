"""Which class a loss protects, and the few terms that several losses share."""

import math
from collections.abc import Callable
from typing import ParamSpec, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lipcert.errors import LipcertError

P = ParamSpec("P")


@runtime_checkable
class Loss(Protocol[P]):
    """A loss function that also says which class of each sample it protects."""

    protects: Callable[[Tensor, Tensor], Tensor | None]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        """Mean loss of a batch, a scalar."""
        ...


def label(logits: Float[Tensor, "b c"], labels: Int[Tensor, "b"]) -> Int[Tensor, "b"]:
    """The label of every sample."""
    return labels


def prediction(logits: Float[Tensor, "b c"], labels: Int[Tensor, "b"]) -> Int[Tensor, "b"]:
    """The predicted class of every sample: the index of its largest logit."""
    return logits.detach().argmax(dim=1)


def each_logit(logits: Float[Tensor, "b c"], labels: Int[Tensor, "b"]) -> None:
    """No class: the loss takes each logit by itself, and wants the constants of single logits."""


def protects(
    which: Callable[[Tensor, Tensor], Tensor | None],
) -> Callable[[Callable[P, Tensor]], Loss[P]]:
    """Decorator that sets ``loss.protects``.

    Args:
        which: `label`, `prediction` or `each_logit`, or any function (logits, labels) -> class of
            each sample, None for no class.
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


def check_row(logits: Float[Tensor, "b c"], K_row: Tensor) -> None:
    """Raises LipcertError unless there is a constant for each logit."""
    if K_row.shape != logits.shape:
        raise LipcertError(
            f"K_row has shape {tuple(K_row.shape)} and the logits {tuple(logits.shape)}; give a "
            "row for each sample: bound().row(loss.protects(logits, labels))"
        )


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
        LipcertError: eps is negative or NaN, or K_row has another shape than the logits.
    """
    check_radius(eps)
    check_row(logits, K_row)
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


def quotients(
    values: Float[Tensor, "b c"], constants: Float[Tensor, "b c"]
) -> tuple[Float[Tensor, "b c"], Bool[Tensor, "b c"]]:
    """Values / constants, and where it was divided; elsewhere the values themselves.

    Not divided is where a division by K^2 in the gradient would overflow. Both tests are false for
    NaN, which must show in the loss.
    """
    tiny = math.sqrt(torch.finfo(values.dtype).tiny)
    with torch.no_grad():
        unsafe = (constants <= tiny) | ((values / constants).abs() > 1 / tiny)
    return values / constants.masked_fill(unsafe, 1.0), ~unsafe
