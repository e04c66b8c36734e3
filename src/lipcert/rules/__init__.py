"""Rules: facts about ops. Importing this package fills the table."""

from lipcert.rules import (
    affine,
    aol,
    arithmetic,
    one_lipschitz,
    orthogonal,
    pairs,
    piecewise,
    potential,
    resampling,
    smooth,
    structural,
    thresholds,
    vector,
)
from lipcert.rules.registry import refuse, rule

__all__ = [
    "affine",
    "aol",
    "arithmetic",
    "one_lipschitz",
    "orthogonal",
    "pairs",
    "piecewise",
    "potential",
    "refuse",
    "resampling",
    "rule",
    "smooth",
    "structural",
    "thresholds",
    "vector",
]
