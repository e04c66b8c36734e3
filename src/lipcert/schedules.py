"""Schedules: functions of the training progress t in [0, 1] that return a value.

They serve radii, learning rates and weights alike, and know nothing of a run's epochs: a recipe
keeps its shape when its length changes. Each is a frozen dataclass of numbers and prints as it is
written. Below, s = clip((t - begin) / (until - begin), 0, 1): values are held outside [begin,
until].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from lipcert.errors import LipcertError

Schedule = Callable[[float], float]


def _share(progress: float, begin: float, until: float) -> float:
    return min(max((progress - begin) / (until - begin), 0.0), 1.0)


def _check_span(schedule: object, begin: float, until: float) -> None:
    if not 0 <= begin < until <= 1:
        raise LipcertError(f"{schedule}: need 0 <= begin < until <= 1, as shares of the training")


@dataclass(frozen=True)
class Constant:
    """v(t) = value."""

    value: float

    def __call__(self, progress: float) -> float:
        """The value at this progress."""
        return self.value


@dataclass(frozen=True)
class Linear:
    """v(t) = (1 - s) * start + s * end."""

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        _check_span(self, self.begin, self.until)

    def __call__(self, progress: float) -> float:
        """The value at this progress."""
        s = _share(progress, self.begin, self.until)
        return (1 - s) * self.start + s * self.end


@dataclass(frozen=True)
class Polynomial:
    """v(t) = end + (start - end) * (1 - s)^power: the higher the power, the earlier it moves."""

    start: float
    end: float
    power: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        _check_span(self, self.begin, self.until)
        if not self.power > 0:
            raise LipcertError(f"{self}: the power must be > 0")

    def __call__(self, progress: float) -> float:
        """The value at this progress."""
        w = (1 - _share(progress, self.begin, self.until)) ** self.power
        return self.end + w * (self.start - self.end)


@dataclass(frozen=True)
class Piecewise:
    """v(t) on straight lines between ``points`` (t, value), held outside them.

    A triangular learning rate is Piecewise(((0.0, 0.0), (0.4, 1.0), (0.8, 0.05), (1.0, 0.0))).
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        at = [t for t, _ in self.points]
        if not (at and at[0] >= 0 and at[-1] <= 1 and all(a < b for a, b in pairwise(at))):
            raise LipcertError(f"{self}: the places of the points must rise and lie in [0, 1]")

    def __call__(self, progress: float) -> float:
        """The value at this progress."""
        for (begin, start), (until, end) in pairwise(self.points):
            if progress <= until:
                s = _share(progress, begin, until)
                return (1 - s) * start + s * end
        return self.points[-1][1]


@dataclass(frozen=True)
class Cosine:
    """v(t) = (1 - w) * start + w * end with w = (1 - cos(pi * s)) / 2."""

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        _check_span(self, self.begin, self.until)

    def __call__(self, progress: float) -> float:
        """The value at this progress."""
        w = (1 - math.cos(math.pi * _share(progress, self.begin, self.until))) / 2
        return (1 - w) * self.start + w * self.end


@dataclass(frozen=True)
class Steps:
    """v(t) = value * factor^n with n the number of entries of ``at`` that are <= t."""

    value: float
    factor: float
    at: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(0 <= step <= 1 for step in self.at):
            raise LipcertError(f"{self}: the steps are shares of the training and lie in [0, 1]")

    def __call__(self, progress: float) -> float:
        """The value at this progress."""
        return self.value * self.factor ** sum(progress >= step for step in self.at)


@dataclass(frozen=True)
class Switch:
    """v(t) = before for t < at, else after."""

    before: float
    after: float
    at: float

    def __post_init__(self) -> None:
        if not 0 <= self.at <= 1:
            raise LipcertError(f"{self}: at is a share of the training and lies in [0, 1]")

    def __call__(self, progress: float) -> float:
        """The value at this progress."""
        return self.before if progress < self.at else self.after


@dataclass(frozen=True)
class Exponential:
    """v(t) = start^(1 - s) * end^s with until = 1: straight on a logarithmic scale."""

    start: float
    end: float
    begin: float = 0.0

    def __post_init__(self) -> None:
        _check_span(self, self.begin, 1.0)
        if not (self.start > 0 and self.end > 0):
            raise LipcertError(f"{self}: start and end must be > 0; Linear reaches 0")

    def __call__(self, progress: float) -> float:
        """The value at this progress."""
        s = _share(progress, self.begin, 1.0)
        return self.start ** (1 - s) * self.end**s


@dataclass(frozen=True)
class EpochRamp:
    """A ramp in steps of epochs, as trainings with BCP and Local-Lip have it for radius and kappa.

    Epochs are counted from 0 and have the length 1 / epochs. Up to epoch ``warmup`` the value is
    ``start``. Then ``ramp`` epochs begin at equally spaced values, the first at ``start`` and the
    last at ``end``, and inside each the value moves on in proportion by (end - start) / ramp in
    all, but never beyond ``end``, where it stays.

    The code of the papers does not stop at ``end``: in each epoch from then on, too, the value
    moves on by (towards - start) / ramp and jumps back. For radii its ``towards`` is the radius of
    the test, which is not that of the training. ``legacy`` does just this, to repeat their runs.

    Attributes:
        start: Value before the ramp.
        end: Value after it.
        ramp: Epochs of the ramp.
        epochs: Epochs of the whole training.
        warmup: Epochs before the ramp.
        legacy: Whether to overshoot as the papers' code.
        towards: Where the slope inside epochs leads if ``legacy``; ``end`` if None.

    Reference: arXiv 2111.01395, the authors' code.
    """

    start: float
    end: float
    ramp: int
    epochs: int
    warmup: int = 0
    legacy: bool = False
    towards: float | None = None

    def __post_init__(self) -> None:
        if not (self.ramp >= 1 and self.warmup >= 0 and self.warmup + self.ramp <= self.epochs):
            raise LipcertError(f"{self}: warm-up and a ramp of >= 1 epochs must fit in the epochs")
        if self.towards is not None and not self.legacy:
            raise LipcertError(f"{self}: towards is of the overshoot, which needs legacy=True")

    def __call__(self, progress: float) -> float:
        """The value at this progress."""
        epoch = min(int(progress * self.epochs), self.epochs - 1)
        inside = progress * self.epochs - epoch
        if epoch < self.warmup:
            return self.start
        step = epoch - self.warmup
        w = 1.0 if step >= self.ramp else step / max(1, self.ramp - 1)
        begin = (1 - w) * self.start + w * self.end
        if self.legacy:
            towards = self.end if self.towards is None else self.towards
            return begin + inside * (towards - self.start) / self.ramp
        value = begin + inside * (self.end - self.start) / self.ramp
        return min(value, self.end) if self.end >= self.start else max(value, self.end)
