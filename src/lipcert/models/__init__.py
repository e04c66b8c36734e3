"""Networks to train: those of the papers, and a dense one."""

from lipcert.models.building import initialise_orthogonally, mlp
from lipcert.models.one_lipschitz import (
    LARGE,
    MEDIUM,
    SMALL,
    XLARGE,
    PotentialSize,
    aol_mlp,
    cpl_net,
    first_features,
    lipconvnet,
    liresnet,
    sll_net,
)
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
    "LARGE",
    "MEDIUM",
    "SMALL",
    "XLARGE",
    "PotentialSize",
    "aol_mlp",
    "c4f3_bcp",
    "c4f3_cll",
    "c6f2_bcp",
    "c6f2_crm",
    "c8f2_bcp",
    "c8f2_crm",
    "cpl_net",
    "crm_depth",
    "first_features",
    "initialise_orthogonally",
    "lipconvnet",
    "liresnet",
    "lmt_mnist",
    "mlp",
    "sll_net",
]
