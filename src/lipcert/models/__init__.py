"""Networks to train: those of the papers, and a dense one."""

from lipcert.models.building import initialise_orthogonally, mlp
from lipcert.models.papers import (
    c4f3_bcp,
    c4f3_cll,
    c6f2_bcp,
    c6f2_crm,
    c8f2_bcp,
    c8f2_crm,
    crm_depth,
    lmt_mnist,
)

__all__ = [
    "c4f3_bcp",
    "c4f3_cll",
    "c6f2_bcp",
    "c6f2_crm",
    "c8f2_bcp",
    "c8f2_crm",
    "crm_depth",
    "initialise_orthogonally",
    "lmt_mnist",
    "mlp",
]
