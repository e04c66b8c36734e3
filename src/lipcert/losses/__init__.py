"""Training losses: pure functions of the logits, one row of Lipschitz constants and a radius.

Every loss is called as ``loss(logits, labels, K_row, eps, ...)`` and returns the mean over the
batch. ``K_row[b, j]`` is the Lipschitz constant of f_i - f_j, where i is the class that the loss
protects for sample b: ``loss.protects(logits, labels)``. No loss knows how K was obtained.
"""

from lipcert.losses.bcp import bcp
from lipcert.losses.ce import ce
from lipcert.losses.crm import boosted_cross_entropy, crm, crm_max
from lipcert.losses.emma import emma
from lipcert.losses.gloro import gloro, gloro_trades
from lipcert.losses.lmt import lmt
from lipcert.losses.local_lip import local_lip
from lipcert.losses.protects import Loss, label, prediction, protects
from lipcert.losses.sparsity import Sparsity

__all__ = [
    "Loss",
    "Sparsity",
    "bcp",
    "boosted_cross_entropy",
    "ce",
    "crm",
    "crm_max",
    "emma",
    "gloro",
    "gloro_trades",
    "label",
    "lmt",
    "local_lip",
    "prediction",
    "protects",
]
