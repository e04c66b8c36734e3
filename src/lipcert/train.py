"""The training loop: flat, from top to bottom, resumable bit for bit on a CPU.

Every epoch draws its order and everything random from (seed, epoch) alone, so a checkpoint holds
no random states: weights, optimiser and the singular vectors of bound and penalties are all there
is to restore.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from lipcert.accuracy import certified_accuracy, clean_accuracy
from lipcert.bounds import Bound
from lipcert.certifying import certify
from lipcert.data import Dataset, split_validation
from lipcert.errors import LipcertError
from lipcert.files import write_atomically
from lipcert.run import Run, save_model
from lipcert.tracing import trace

Modules = Mapping[str, nn.Module]  # what a checkpoint holds besides the optimiser
_SEED_STRIDE = 1_000_003  # seeds of different runs do not meet within a million epochs


@dataclass(frozen=True)
class Epoch:
    """One line of metrics.jsonl. Certified accuracy here is an estimate, for the curve alone."""

    epoch: int
    loss: float
    train_accuracy: float
    eps: float
    learning_rate: float
    validation_accuracy: float | None
    validation_cra_estimate: float | None
    seconds: float


def train(
    run: Run,
    data: Dataset,
    *,
    device: str = "cpu",
    on_step: Callable[[int, int], object] = lambda done, total: None,
    on_epoch: Callable[[Epoch], object] = lambda epoch: None,
) -> nn.Module:
    """Trains as the run's recipe says, from its checkpoint if there is one, and saves the model.

    Args:
        run: The run directory.
        data: The training data; a part is held out for validation as the recipe says.
        device: Where to compute.
        on_step: Called with (steps done, steps in all) after each step.
        on_epoch: Called after each epoch, when its checkpoint is on disk.

    Returns:
        The trained network, in eval mode.

    Raises:
        LipcertError: The data do not fit, the loss is not finite, or the checkpoint is broken.
    """
    recipe = run.recipe
    torch.manual_seed(recipe.seed)
    held_out = None
    if recipe.validation > 0:
        data, held_out = split_validation(data, recipe.validation, recipe.seed)
    in_shape = tuple(data.images.shape[1:])
    net = recipe.model(in_shape=in_shape, classes=len(data.classes)).to(device)
    bound = recipe.bound(trace(net, in_shape))
    penalties = nn.ModuleList(make(net) for make in recipe.penalties)
    optimiser = recipe.optimiser(net.parameters(), recipe.learning_rate)
    modules: Modules = {"net": net, "bound": bound, "penalties": penalties}
    started = _restore(run, modules, optimiser)

    dtype = next(net.parameters()).dtype
    steps_an_epoch = math.ceil(len(data) / recipe.batch_size)
    total = recipe.epochs * steps_an_epoch
    labels = data.labels.to(device)
    for epoch in range(started, recipe.epochs):
        begin = time.perf_counter()
        torch.manual_seed(recipe.seed * _SEED_STRIDE + epoch + 1)
        order = torch.randperm(len(data))
        net.train()
        sums = torch.zeros(2, device=device)  # loss and right predictions, summed over samples
        eps = rate = 0.0
        for place, index in enumerate(order.split(recipe.batch_size)):
            step = epoch * steps_an_epoch + place
            progress = step / max(1, total - 1)
            eps = recipe.eps * recipe.eps_schedule(progress)
            rate = recipe.learning_rate * recipe.learning_rate_schedule(progress)
            for group in optimiser.param_groups:
                group["lr"] = rate
            x, y = data.pixels(index, device, dtype), labels[index]
            if recipe.augment is not None:
                x = recipe.augment(x)
            if recipe.perturb is not None:
                x = recipe.perturb(net, x, y, eps)

            logits = net(x)
            classes = recipe.loss.protects(logits, y)
            constants = bound(x, eps, index)
            scheduled = {name: at(progress) for name, at in recipe.loss_schedules.items()}
            options = {**recipe.loss_options, **scheduled}
            loss = recipe.loss(logits, y, constants.within(classes, eps), eps, **options)
            if recipe.regularise is not None:
                loss = loss + recipe.regularise(constants, progress)
            for penalty in penalties:
                loss = loss + penalty()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            if recipe.after_step is not None:
                with torch.no_grad():
                    recipe.after_step(net)

            right = (logits.detach().argmax(1) == y).sum()
            sums += torch.stack([loss.detach() * len(y), right])
            on_step(step + 1, total)

        mean_loss, accuracy = (sums / len(data)).tolist()
        if not math.isfinite(mean_loss):
            raise LipcertError(
                f"The loss became {mean_loss} in epoch {epoch + 1} of {recipe.name}. The last good "
                f"state is kept in {run.folder}; try a smaller --set learning_rate=..."
            )
        clean, certified = _validate(net, bound, held_out, recipe.eps)
        seconds = time.perf_counter() - begin
        record = Epoch(
            epoch + 1, mean_loss, accuracy, eps, rate, clean, certified, round(seconds, 3)
        )
        _checkpoint(run, modules, optimiser, record)
        on_epoch(record)
    save_model(run, net, in_shape, data.classes)
    return net.eval()


def _validate(
    net: nn.Module, bound: Bound, held_out: Dataset | None, eps: float
) -> tuple[float | None, float | None]:
    """Clean accuracy and estimated certified accuracy on the held-out part."""
    if held_out is None:
        return None, None
    x = held_out.pixels(device=next(net.parameters()).device)
    certificate = certify(net, x, bound=bound, allow_estimate=True)
    clean = clean_accuracy(certificate, held_out.labels)
    return clean, certified_accuracy(certificate, held_out.labels, eps)


def _checkpoint(
    run: Run, modules: Modules, optimiser: torch.optim.Optimizer, record: Epoch
) -> None:
    """Everything that resuming needs in one file, so that it is there whole or not at all."""
    tensors = {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    state = optimiser.state_dict()
    plain: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimiser.{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    metrics = [*_metrics(run, record.epoch - 1), json.dumps(vars(record))]
    header = {
        "epoch": str(record.epoch),
        "optimiser": json.dumps({"groups": state["param_groups"], "state": plain}),
    }
    owned = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomically(run.path("checkpoint.safetensors"), save(owned, metadata=header))
    write_atomically(run.path("metrics.jsonl"), "\n".join(metrics) + "\n")


def _metrics(run: Run, upto: int) -> list[str]:
    """The lines of the epochs before, without what an interrupted run wrote later."""
    path = run.path("metrics.jsonl")
    return path.read_text().splitlines()[:upto] if path.exists() else []


def _restore(run: Run, modules: Modules, optimiser: torch.optim.Optimizer) -> int:
    """Loads the checkpoint, if there is one; gives the number of epochs done."""
    path = run.path("checkpoint.safetensors")
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as stored:
            header = stored.metadata()
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LipcertError(f"{path} is broken ({error}). Remove it to start anew.") from None

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    saved = json.loads(header["optimiser"])
    state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in saved["state"].items()}
    for key, value in part("optimiser.").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    try:
        for name, module in modules.items():
            module.load_state_dict(part(f"{name}."))
        optimiser.load_state_dict({"state": state, "param_groups": saved["groups"]})
    except (RuntimeError, ValueError) as error:
        raise LipcertError(f"{path} is of another run: {str(error).splitlines()[0]}") from None
    return int(header["epoch"])


def finished(run: Run) -> bool:
    """Whether the run has its model."""
    return run.path("config.json").exists()
