"""Where a bound holds: a ball around each sample. Without a region, bounds hold everywhere."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.errors import LipcertError


@dataclass(frozen=True)
class L2Ball:
    """All inputs within an L2 distance of a sample; bounds in it hold for this sample only.

    Attributes:
        eps: The distance, in units of the input. A bound may be asked for another one when it is
            called, one for all samples or one for each.
        clip: Least and greatest value of an input entry, if inputs outside them are not to be
            considered. What is then proved says nothing of inputs outside.
        progressive: Whether boxes use the local constants of the layers before them and the part of
            a filter that meets the image, which is never worse; or as in BCP and Local-Lip the
            global constants and whole filters.
    """

    eps: float
    clip: tuple[float, float] | None = None
    progressive: bool = True

    def __post_init__(self):
        if not (_is_number(self.eps) and 0 < self.eps < math.inf):
            raise LipcertError(f"L2Ball(eps={self.eps!r}): needs a positive finite number.")
        if self.clip is not None and not _is_range(self.clip):
            raise LipcertError(
                f"L2Ball(clip={self.clip!r}): needs two numbers, the least first, e.g. (0.0, 1.0)."
            )

    def radii(
        self, x: Float[Tensor, "b ..."], eps: float | Float[Tensor, " b"] | None
    ) -> Float[Tensor, " b"]:
        """The radius around each sample: `eps` where given (0 is allowed then), else `self.eps`.

        Raises:
            LipcertError: A radius is negative, infinite or NaN; there are not as many as samples;
                samples lie outside `clip`.
        """
        if not (eps is None or _is_number(eps) or isinstance(eps, Tensor)):
            raise LipcertError(f"eps={eps!r}: needs a radius, or a tensor of one for each sample.")
        asked = torch.as_tensor(self.eps if eps is None else eps).to(x)
        if asked.ndim > 1 or (asked.ndim == 1 and len(asked) != len(x)):
            raise LipcertError(
                f"eps has the shape {tuple(asked.shape)}; needs one radius, or one for each of the "
                f"{len(x)} samples."
            )
        if not bool(((asked >= 0) & (asked < math.inf)).all()):
            raise LipcertError(f"eps={eps!r}: radii must be finite numbers of at least 0.")
        if self.clip is not None and not bool(((x >= self.clip[0]) & (x <= self.clip[1])).all()):
            raise LipcertError(f"There are samples outside the values {self.clip} of clip.")
        return asked.expand(len(x))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_range(value: object) -> bool:
    """Whether it is two numbers, the least first."""
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(map(_is_number, value))
        and value[0] < value[1]
    )
