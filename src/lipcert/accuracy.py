"""Accuracies of certificates: clean, certified at a radius, as a curve and class by class."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lipcert.certificate import Certificate


def clean_accuracy(certificate: Certificate, labels: Int[Tensor, " n"]) -> float:
    """Fraction of samples predicted right."""
    return float((certificate.prediction == labels.cpu()).double().mean())


def certified_accuracy(certificate: Certificate, labels: Int[Tensor, " n"], eps: float) -> float:
    """Fraction predicted right and provably so within eps (CRA, also VRA)."""
    right = certificate.prediction == labels.cpu()
    return float((right & certificate.robust_at(eps)).double().mean())


def average_certified_radius(certificate: Certificate, labels: Int[Tensor, " n"]) -> float:
    """Mean certified radius, 0 for a wrong prediction (ACR)."""
    right = certificate.prediction == labels.cpu()
    return float(certificate.radius.where(right, 0).mean())


def curve(
    certificate: Certificate, labels: Int[Tensor, " n"], radii: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """Certified accuracy as a function of the radius: fraction right with a radius >= r."""
    return curve_of_radii(certificate.radius, certificate.prediction == labels.cpu(), radii)


def curve_of_radii(
    radius: Float[Tensor, " n"], right: Bool[Tensor, " n"], radii: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """The same from certified radii and which predictions are right, as read from a file."""
    reached = radius.where(right, -1).sort().values
    below = torch.searchsorted(reached, radii.to(reached))
    return 1 - below.double() / len(reached)


@dataclass(frozen=True)
class ClassResult:
    """One row of the per-class table: all fractions of the samples of this class."""

    label: int
    samples: int
    clean_accuracy: float
    certified_accuracy: dict[float, float]
    median_radius: float


def per_class(
    certificate: Certificate, labels: Int[Tensor, " n"], radii: list[float]
) -> list[ClassResult]:
    """Accuracy and certified accuracy class by class."""
    labels = labels.cpu()
    right = certificate.prediction == labels
    robust = {eps: right & certificate.robust_at(eps) for eps in radii}
    radius = certificate.radius.where(right, 0)
    rows = []
    for label in labels.unique().tolist():
        members = labels == label
        certified = {eps: float(ok[members].double().mean()) for eps, ok in robust.items()}
        rows.append(
            ClassResult(
                label,
                int(members.sum()),
                float(right[members].double().mean()),
                certified,
                float(radius[members].median()),
            )
        )
    return rows
