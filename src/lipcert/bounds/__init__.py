"""Bounds, one method a file: each turns a graph into constants of logit differences."""

from lipcert.bounds.liplt import LipLT
from lipcert.bounds.margin import Bound, MarginConstants
from lipcert.bounds.product import Layer, Product

__all__ = ["Bound", "Layer", "LipLT", "MarginConstants", "Product"]
