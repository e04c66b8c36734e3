"""Plain PyTorch modules with known Lipschitz constants; they know nothing of bounds."""

from lipcert.layers.activations import GroupSort, Householder, Householder2, MaxMin, Normalize
from lipcert.layers.aol import AOLConv2d, AOLLinear
from lipcert.layers.batch_norm import RecordingBatchNorm2d, last_batch_variances
from lipcert.layers.bjorck import BjorckConv2d, BjorckLinear
from lipcert.layers.cholesky import CholeskyLinear
from lipcert.layers.cpl import CPLConv2d, CPLLinear
from lipcert.layers.heads import FitChannels, L2Pool2d, LastLayerNormalized
from lipcert.layers.liresnet import BatchCentering, LinearResidualConv2d
from lipcert.layers.parseval import ConvexSum, ScaledConv2d
from lipcert.layers.sll import SLLConv2d, SLLLinear
from lipcert.layers.soc import SOCConv2d
from lipcert.layers.thresholds import ClippedMaxMin, ClippedReLU, project_thresholds

__all__ = [
    "AOLConv2d",
    "AOLLinear",
    "BatchCentering",
    "BjorckConv2d",
    "BjorckLinear",
    "CPLConv2d",
    "CPLLinear",
    "CholeskyLinear",
    "ClippedMaxMin",
    "ClippedReLU",
    "ConvexSum",
    "FitChannels",
    "GroupSort",
    "Householder",
    "Householder2",
    "L2Pool2d",
    "LastLayerNormalized",
    "LinearResidualConv2d",
    "MaxMin",
    "Normalize",
    "RecordingBatchNorm2d",
    "SLLConv2d",
    "SLLLinear",
    "SOCConv2d",
    "ScaledConv2d",
    "last_batch_variances",
    "project_thresholds",
]
