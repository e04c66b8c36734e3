"""Radii as people write them: a fraction or a decimal, printed as it was given."""

from fractions import Fraction

from lipcert.certificate import check_radius
from lipcert.errors import LipcertError


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
