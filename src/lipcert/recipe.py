"""What a recipe is: everything that defines a training run, as values and functions."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lipcert.bounds import Bound, MarginConstants
from lipcert.errors import LipcertError
from lipcert.graph import Graph
from lipcert.losses import Loss
from lipcert.radii import parse_radius
from lipcert.schedules import Constant, Schedule

Optimiser = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
Augmentation = Callable[[Tensor], Tensor]
Perturbation = Callable[[nn.Module, Tensor, Tensor, float], Tensor]
Regulariser = Callable[[MarginConstants, float], Tensor]
_ALWAYS_ONE = Constant(1.0)


@dataclass(frozen=True)
class Published:
    """A number from a paper or its code, to lay beside ours.

    Attributes:
        what: What was measured, e.g. "CRA at 1.58".
        value: As a fraction or in input units, not in percent.
        source: Where it stands.
        certainty: How sure we are of it.
    """

    what: str
    value: float
    source: str
    certainty: str


@dataclass(frozen=True)
class Recipe:
    """A training run. Schedules are functions of progress in [0, 1], so other lengths keep shape.

    Attributes:
        name: As typed on the command line.
        summary: One line.
        data: Default source of the data: "digits", a hub id or a folder.
        model: `model(in_shape=..., classes=...)` gives a fresh network.
        bound: Gives the bound to train with; estimates are fine here.
        loss: A loss of `lipcert.losses` or with their signature.
        loss_options: Further keyword arguments of the loss.
        loss_schedules: Further keyword arguments of the loss, as schedules of their values.
        eps: L2 radius the training aims at, in input units (pixels in [0, 1]).
        eps_schedule: Factor on `eps`.
        epochs: Passes over the training part.
        batch_size: Samples a step; the last, smaller batch of an epoch is used too.
        optimiser: `optimiser(parameters, learning_rate)`.
        learning_rate: Peak learning rate.
        learning_rate_schedule: Factor on it.
        penalties: Each makes a module for the network; what it returns when called without
            arguments, a scalar, is added to the loss. Its buffers are saved in checkpoints.
        regularise: `regularise(constants, progress)` gives a scalar that is added to the loss; it
            is called with the constants of the step and the progress in [0, 1].
        augment: Gives the pictures to train on in place of a batch, pixels in [0, 1]; drawn from
            torch's global generator.
        perturb: `perturb(network, inputs, labels, radius)` gives the inputs to train on in place of
            a batch; loss and training accuracy are then of these.
        after_step: Called with the network after each step of the optimiser, without gradients.
        validation: Fraction of the training data held out for the progress curve.
        radii: Radii of interest, as text.
        seed: Of weights, split, order and singular vectors.
        published: What the paper reports.
    """

    name: str
    summary: str
    data: str
    model: Callable[..., nn.Module]
    bound: Callable[[Graph], Bound]
    loss: Loss
    eps: float
    epochs: int
    batch_size: int
    optimiser: Optimiser
    learning_rate: float
    radii: tuple[str, ...]
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    loss_schedules: Mapping[str, Schedule] = field(default_factory=dict)
    eps_schedule: Schedule = _ALWAYS_ONE
    learning_rate_schedule: Schedule = _ALWAYS_ONE
    penalties: tuple[Callable[[nn.Module], nn.Module], ...] = ()
    regularise: Regulariser | None = None
    augment: Augmentation | None = None
    perturb: Perturbation | None = None
    after_step: Callable[[nn.Module], None] | None = None
    validation: float = 0.1
    seed: int = 0
    published: tuple[Published, ...] = ()


SETTABLE = ("data", "eps", "epochs", "batch_size", "learning_rate", "validation", "seed")


def override(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with some plain fields changed; values may be text as typed (`eps=36/255`).

    Raises:
        LipcertError: Unknown field, or a value that makes no sense; the message lists the fields.
    """
    changes = {name: _value(recipe, name, value) for name, value in settings.items()}
    return dataclasses.replace(recipe, **changes)


def _value(recipe: Recipe, name: str, value: Any) -> Any:
    if name not in SETTABLE:
        raise LipcertError(
            f"A recipe has no field {name!r} to set. Fields: {', '.join(SETTABLE)}. Anything else "
            "is a new recipe: dataclasses.replace(recipe, ...)."
        )
    if name == "data":
        return str(value)
    if name == "eps":
        return parse_radius(str(value))
    kind = type(getattr(recipe, name))
    try:
        number = kind(str(value))
    except ValueError:
        raise LipcertError(f"{name}={value!r}: needs {_EXPECTED[name]}.") from None
    ok = 0 <= number < 1 if name == "validation" else number >= 0 if name == "seed" else number > 0
    if not ok:
        raise LipcertError(f"{name}={value!r}: needs {_EXPECTED[name]}.")
    return number


_EXPECTED = {
    "epochs": "a whole number of at least 1",
    "batch_size": "a whole number of at least 1",
    "learning_rate": "a positive number",
    "validation": "a fraction of at least 0 and below 1",
    "seed": "a whole number of at least 0",
}


def settings(recipe: Recipe) -> dict[str, Any]:
    """The plain fields, as saved in a run's recipe.json."""
    values = {name: getattr(recipe, name) for name in SETTABLE}
    json.dumps(values)  # stays plain
    return values
