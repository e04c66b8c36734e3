"""Plain PyTorch modules with known Lipschitz constants; they know nothing of bounds."""

from lipcert.layers.activations import Householder, MaxMin, Normalize
from lipcert.layers.batch_norm import RecordingBatchNorm2d, last_batch_variances
from lipcert.layers.parseval import ConvexSum, ScaledConv2d
from lipcert.layers.thresholds import ClippedMaxMin, ClippedReLU, project_thresholds

__all__ = [
    "ClippedMaxMin",
    "ClippedReLU",
    "ConvexSum",
    "Householder",
    "MaxMin",
    "Normalize",
    "RecordingBatchNorm2d",
    "ScaledConv2d",
    "last_batch_variances",
    "project_thresholds",
]
