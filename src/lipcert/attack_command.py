"""What the verb `attack` does: at given radii, inside certified balls, or the inequality."""

import json
from pathlib import Path
from typing import Any

import typer
from torch import nn

from lipcert import attacking, tables
from lipcert.attacking import Effort
from lipcert.data import Dataset, Split, load
from lipcert.errors import LipcertError
from lipcert.external_attacks import AttackName
from lipcert.progress import progress
from lipcert.run import Run
from lipcert.targets import attack_name, open_trained


def attack(
    folder: Path,
    eps: list[str],
    attack: str | None,
    inequality: bool,
    effort: Effort,
    data_source: str | None,
    device: str,
    as_json: bool,
) -> None:
    """`lipcert attack`."""
    if inequality and (eps or attack):
        raise LipcertError(
            "--inequality looks for the smallest perturbation with every attack at hand: leave out "
            "--eps and --attack."
        )
    name = attack_name(attack or AttackName.PGD)
    run, net, _ = open_trained(folder, device)
    data = load(data_source or _certified_data(run), Split.EVALUATION)
    if inequality:
        results = _inequality(run, net, data, effort)
        show = tables.show_inequality
    else:
        results = attack_at(run, net, data, name, eps, effort)
        show = tables.show_attack
    if as_json:
        typer.echo(json.dumps(results, indent=2))
    else:
        show(results)
    fail_on_flips(results)


def _certified_data(run: Run) -> str:
    """The data that were certified, so that rows match; else the recipe's."""
    if run.path("summary.json").exists():
        return run.read_json("summary.json", f"lipcert certify {run.folder}")["data"]
    return run.recipe.data


def attack_at(
    run: Run, net: nn.Module, data: Dataset, attack: AttackName, eps: list[str], effort: Effort
) -> dict[str, Any]:
    """Attacks at radii, or inside the certified balls without any, with a progress bar."""
    total = min(len(data), effort.samples or len(data)) * max(1, len(eps))
    with progress(f"attack ({attack})", total) as advance:
        return attacking.attack_run(
            run, net, data, attack=attack, radii=eps, effort=effort, on_batch=advance
        )


def _inequality(run: Run, net: nn.Module, data: Dataset, effort: Effort) -> dict[str, Any]:
    with progress("inequality", min(len(data), effort.samples or len(data))) as advance:
        return attacking.inequality_run(run, net, data, effort=effort, on_batch=advance)


def fail_on_flips(results: dict[str, Any]) -> None:
    """Ends the program with exit code 1 where a certificate was refuted."""
    flipped = results.get("inside", {}).get("flipped", 0)
    refuted = results.get("refuted", 0)
    if not flipped and not refuted:
        return
    what = (
        f"{refuted} certified radii are above the smallest perturbation found, or above the radius "
        "with the slopes seen"
        if refuted
        else f"{flipped} predictions changed inside their certified ball"
    )
    typer.echo(
        f"lipcert: {what}. This must not happen: please report it with the run directory.", err=True
    )
    raise typer.Exit(1)
