"""What summary.json, attack.json and recipe.json hold."""

import dataclasses
import math
from dataclasses import dataclass

from lipcert.errors import LipcertError
from lipcert.external_attacks import AttackName
from lipcert.kinds import Kind
from lipcert.radii import parse_radius


@dataclass(frozen=True)
class ClassSummary:
    """One class in summary.json; fractions are of the samples of this class."""

    name: str
    samples: int
    clean_accuracy: float
    cra: dict[str, float]
    median_radius: float


@dataclass(frozen=True)
class Summary:
    """summary.json: fractions, and radii in input units; `acr` is None if infinite."""

    clean_accuracy: float
    cra: dict[str, float]
    kind: Kind
    failure_probability: float
    bound: str
    acr: float | None
    median_radius: float
    samples: int
    seconds: float
    recipe: str
    data: str
    split: str
    classes: tuple[ClassSummary, ...]
    versions: dict[str, str]
    weights_sha256: str | None = None

    def __post_init__(self):
        if not self.cra:
            raise LipcertError("there is no radius in 'cra'")
        for text in self.cra:
            parse_radius(text)

    @property
    def average_radius(self) -> float:
        """The average certified radius (ACR), infinite where the file has none."""
        return math.inf if self.acr is None else self.acr


@dataclass(frozen=True, kw_only=True)
class Tried:
    """An attack on the first `samples`, and how hard it tried."""

    samples: int
    steps: int
    restarts: int
    seed: int
    attack: AttackName = AttackName.PGD


@dataclass(frozen=True, kw_only=True)
class Attacked(Tried):
    """Accuracy under attack at one radius: `value` is a fraction of the samples."""

    value: float


@dataclass(frozen=True, kw_only=True)
class Inside(Tried):
    """The attack inside the certified balls."""

    attacked: int
    flipped: int


@dataclass(frozen=True)
class Attack:
    """attack.json; each part may be absent.

    Attributes:
        robust_accuracy: What PGD left right, by radius as text.
        others: The same of other attacks, by their names.
        inside: The attack inside the certified balls.
    """

    robust_accuracy: dict[str, Attacked] = dataclasses.field(default_factory=dict)
    others: dict[str, dict[str, Attacked]] = dataclasses.field(default_factory=dict)
    inside: Inside | None = None

    def __post_init__(self):
        for text, found in self.all():
            parse_radius(text)
            if not 0 <= found.value <= 1:
                raise LipcertError(f"the accuracy at {text} is {found.value}, no fraction")

    def all(self) -> list[tuple[str, Attacked]]:
        """Every attack with its radius."""
        return [pair for by in (self.robust_accuracy, *self.others.values()) for pair in by.items()]

    def strongest(self) -> dict[str, Attacked]:
        """By radius the attack on the most samples, and of these the one that left the fewest."""
        best: dict[str, Attacked] = {}
        for text, found in self.all():
            known = best.setdefault(text, found)
            if (-found.samples, found.value) < (-known.samples, known.value):
                best[text] = found
        return best


@dataclass(frozen=True)
class Start:
    """What recipe.json says besides the recipe: the versions at the time of training."""

    versions: dict[str, str]
