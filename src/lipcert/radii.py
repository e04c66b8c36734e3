"""Radii as people write them: a fraction or a decimal, printed as it was given."""

import math
from fractions import Fraction

from lipcert.errors import LipcertError


def check_radius(eps: float) -> float:
    """The radius as a float.

    Raises:
        LipcertError: eps is not a positive finite number.
    """
    number = isinstance(eps, int | float)
    if not (number and eps > 0 and math.isfinite(eps)):
        raise LipcertError(
            f"eps = {eps!r}: a radius must be a positive finite number, e.g. 36/255, and no text."
        )
    return float(eps)


def parse_radius(text: str) -> float:
    """The value of a radius such as "36/255" or "0.5".

    Raises:
        LipcertError: It is no number, or not positive and finite.
    """
    try:
        value = float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise LipcertError(
            f"eps = {text!r} is not a radius; write a fraction or a decimal such as 36/255 or 0.5."
        ) from None
    return check_radius(value)
