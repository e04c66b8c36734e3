"""Rules: facts about ops. Importing this package fills the table."""

from lipcert.rules import activation, affine, one_lipschitz, resampling, structural, vector
from lipcert.rules.registry import refuse, rule

__all__ = [
    "activation",
    "affine",
    "one_lipschitz",
    "refuse",
    "resampling",
    "rule",
    "structural",
    "vector",
]
