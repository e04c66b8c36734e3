"""Strategies for the spectral norm of a linear map, one a file; and norms of its parts."""

from lipcert.spectral.auto import Auto
from lipcert.spectral.count import Count
from lipcert.spectral.exact import Exact
from lipcert.spectral.fourier import Fourier
from lipcert.spectral.gram import Gram
from lipcert.spectral.iterative import Iterative
from lipcert.spectral.lanczos import Lanczos
from lipcert.spectral.lobpcg import LOBPCG
from lipcert.spectral.masked import masked_norms
from lipcert.spectral.power_bound import PowerBound
from lipcert.spectral.power_iteration import PowerIteration
from lipcert.spectral.strategy import Strategy
from lipcert.spectral.sums import ColumnSum, RowSum

__all__ = [
    "LOBPCG",
    "Auto",
    "ColumnSum",
    "Count",
    "Exact",
    "Fourier",
    "Gram",
    "Iterative",
    "Lanczos",
    "PowerBound",
    "PowerIteration",
    "RowSum",
    "Strategy",
    "masked_norms",
]
