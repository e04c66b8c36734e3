"""Rules: facts about ops. Importing this package fills the table."""

from lipcert.rules import (
    affine,
    arithmetic,
    one_lipschitz,
    piecewise,
    resampling,
    smooth,
    structural,
    thresholds,
    vector,
)
from lipcert.rules.registry import refuse, rule

__all__ = [
    "affine",
    "arithmetic",
    "one_lipschitz",
    "piecewise",
    "refuse",
    "resampling",
    "rule",
    "smooth",
    "structural",
    "thresholds",
    "vector",
]
