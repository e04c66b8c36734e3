"""Lipcert: train classifiers whose robustness can be proved, and prove it.

The names below are the public interface; each is imported when it is first used, so that
`import lipcert` and `lipcert --help` are quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOME = {
    "Auto": "lipcert.spectral",
    "Certificate": "lipcert.certificate",
    "ColumnSum": "lipcert.spectral",
    "Constant": "lipcert.kinds",
    "Count": "lipcert.spectral",
    "Exact": "lipcert.spectral",
    "Fourier": "lipcert.spectral",
    "Gram": "lipcert.spectral",
    "Kind": "lipcert.kinds",
    "L2Ball": "lipcert.region",
    "LOBPCG": "lipcert.spectral",
    "Lanczos": "lipcert.spectral",
    "Eclipse": "lipcert.bounds",
    "Ellipsoid": "lipcert.bounds",
    "LipLT": "lipcert.bounds",
    "LipLTNormalized": "lipcert.normalized",
    "LipSDP": "lipcert.bounds",
    "LipcertError": "lipcert.errors",
    "MarginConstants": "lipcert.bounds",
    "Multipliers": "lipcert.bounds",
    "PowerBound": "lipcert.spectral",
    "PowerIteration": "lipcert.spectral",
    "Product": "lipcert.bounds",
    "RowSum": "lipcert.spectral",
    "SampleVectors": "lipcert.bounds",
    "average_certified_radius": "lipcert.accuracy",
    "certified_accuracy": "lipcert.accuracy",
    "certify": "lipcert.certifying",
    "clean_accuracy": "lipcert.accuracy",
    "lipschitz": "lipcert.constants",
    "normalized_block": "lipcert.normalized",
    "pgd": "lipcert.adversary",
    "rule": "lipcert.rules",
    "spectral_norm": "lipcert.constants",
    "tightest": "lipcert.bounds",
    "trace": "lipcert.tracing",
}
_MODULES = ("data", "graph", "layers", "losses", "models", "recipes", "schedules")

__all__ = sorted([*_HOME, *_MODULES, "__version__"])

if TYPE_CHECKING:
    from lipcert import data, graph, layers, losses, models, recipes, schedules
    from lipcert.accuracy import average_certified_radius, certified_accuracy, clean_accuracy
    from lipcert.adversary import pgd
    from lipcert.bounds import (
        Eclipse,
        Ellipsoid,
        LipLT,
        LipSDP,
        MarginConstants,
        Multipliers,
        Product,
        SampleVectors,
        tightest,
    )
    from lipcert.certificate import Certificate
    from lipcert.certifying import certify
    from lipcert.constants import lipschitz, spectral_norm
    from lipcert.errors import LipcertError
    from lipcert.kinds import Constant, Kind
    from lipcert.normalized import LipLTNormalized, normalized_block
    from lipcert.region import L2Ball
    from lipcert.rules import rule
    from lipcert.spectral import (
        LOBPCG,
        Auto,
        ColumnSum,
        Count,
        Exact,
        Fourier,
        Gram,
        Lanczos,
        PowerBound,
        PowerIteration,
        RowSum,
    )
    from lipcert.tracing import trace


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"lipcert.{name}")
    else:
        raise AttributeError(f"module 'lipcert' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
