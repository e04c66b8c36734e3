"""Training losses: pure functions of the logits, one row of Lipschitz constants and a radius.

Every loss is called as ``loss(logits, labels, K_row, eps, ...)`` and returns the mean over the
batch. ``K_row[b, j]`` is the Lipschitz constant of f_i - f_j, where i is the class that the loss
protects for sample b: ``loss.protects(logits, labels)``. Where that is None, the loss takes each
logit by itself, and ``K_row[b, j]`` is the constant of f_j. No loss knows how K was obtained.
"""

from lipcert.losses.bcp import bcp
from lipcert.losses.calibration import Calibration, calibration
from lipcert.losses.ce import ce
from lipcert.losses.certificate_regularisation import certificate_regularisation
from lipcert.losses.cll import Offset, cll, cll_per_logit
from lipcert.losses.crm import boosted_cross_entropy, crm, crm_max
from lipcert.losses.decay import ConstantDecay
from lipcert.losses.emma import emma
from lipcert.losses.gloro import gloro, gloro_trades
from lipcert.losses.hinge import hinge
from lipcert.losses.hkr import hkr
from lipcert.losses.lmt import lmt
from lipcert.losses.local_lip import local_lip
from lipcert.losses.logit_annealing import logit_annealing
from lipcert.losses.protects import Loss, each_logit, label, prediction, protects
from lipcert.losses.sparsity import Sparsity

__all__ = [
    "Calibration",
    "ConstantDecay",
    "Loss",
    "Offset",
    "Sparsity",
    "bcp",
    "boosted_cross_entropy",
    "calibration",
    "ce",
    "certificate_regularisation",
    "cll",
    "cll_per_logit",
    "crm",
    "crm_max",
    "each_logit",
    "emma",
    "gloro",
    "gloro_trades",
    "hinge",
    "hkr",
    "label",
    "lmt",
    "local_lip",
    "logit_annealing",
    "prediction",
    "protects",
]
