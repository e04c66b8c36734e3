"""Bounds, one method a file: each turns a graph into constants of logit differences."""

from lipcert.bounds.eclipse import Eclipse
from lipcert.bounds.ellipsoid import Ellipsoid
from lipcert.bounds.liplt import LipLT
from lipcert.bounds.lipsdp import LipSDP
from lipcert.bounds.margin import Bound, MarginConstants
from lipcert.bounds.multipliers import Multipliers
from lipcert.bounds.product import Layer, Product
from lipcert.bounds.sample_vectors import SampleVectors
from lipcert.bounds.tightest import Tightest, tightest

__all__ = [
    "Bound",
    "Eclipse",
    "Ellipsoid",
    "Layer",
    "LipLT",
    "LipSDP",
    "MarginConstants",
    "Multipliers",
    "Product",
    "SampleVectors",
    "Tightest",
    "tightest",
]
