"""What the verbs do: load, call the library, show the result."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from lipcert import evaluate, recipes, tables
from lipcert import run as runs
from lipcert import train as training
from lipcert.attack_command import attack_at, fail_on_flips
from lipcert.attacking import Effort
from lipcert.bound_names import LOCAL, BoundName, members
from lipcert.bound_table import bound_table
from lipcert.data import Dataset, Split, load
from lipcert.errors import LipcertError
from lipcert.external_attacks import AttackName
from lipcert.files import write_atomically
from lipcert.graph import Graph
from lipcert.progress import progress
from lipcert.radii import parse_radius
from lipcert.recipe import override, settings
from lipcert.report import write_report
from lipcert.run import Run
from lipcert.targets import bound_name, check_device, make_network, open_trained, parse_shape
from lipcert.tracing import trace


def show_recipes(name: str | None, as_json: bool) -> None:
    """`lipcert recipes [NAME]`."""
    chosen = [recipes.get(n) for n in ([name] if name else recipes.names())]
    if as_json:
        plain = [
            {"name": r.name, "summary": r.summary}
            | settings(r)
            | {"published": [dataclasses.asdict(p) for p in r.published]}
            for r in chosen
        ]
        typer.echo(json.dumps(plain[0] if name else plain, indent=2))
    elif name:
        tables.show_recipe(chosen[0])
    else:
        tables.list_recipes(chosen)


def train(
    name: str, changes: dict[str, Any], out: Path, resume: bool, device: str, as_json: bool
) -> None:
    """`lipcert train`."""
    check_device(device)
    recipe = override(recipes.get(name), changes)
    run = _resumed(out, name, changes) if resume else None
    data = load((run.recipe if run else recipe).data, Split.TRAIN)
    run = run or runs.create(out, recipe)
    if training.finished(run):
        typer.echo(f"{out} is finished already. Next: lipcert certify {out}")
        return
    _train(run, data, device)
    last = json.loads(run.path("metrics.jsonl").read_text().splitlines()[-1])
    if as_json:
        typer.echo(json.dumps({"run": str(out), **last}, indent=2))
    else:
        tables.show_training(last)
        typer.echo(f"The trained network is in {out}. Next: lipcert certify {out}")


def _train(run: Run, data: Dataset, device: str) -> None:
    with progress(f"train {run.recipe.name}") as advance:
        note, place = "", (0, 1)

        def on_epoch(record: training.Epoch) -> None:
            nonlocal note
            accuracy = record.validation_accuracy
            shown = "" if accuracy is None else f" validation {accuracy:.1%}"
            note = f"epoch {record.epoch}/{run.recipe.epochs} loss {record.loss:.3f}{shown}"
            advance(*place, note)

        def on_step(done: int, total: int) -> None:
            nonlocal place
            place = done, total
            advance(*place, note)

        try:
            training.train(run, data, device=device, on_step=on_step, on_epoch=on_epoch)
        except KeyboardInterrupt:
            sys.stderr.write(
                f"\nGo on later with: lipcert train {run.recipe.name} --out {run.folder} --resume\n"
            )
            raise


def _resumed(out: Path, name: str, changes: dict[str, Any]) -> Run:
    run = runs.open_run(out)
    if run.recipe.name != name:
        raise LipcertError(f"{out} is a run of {run.recipe.name}, not of {name}.")
    stored, wanted = settings(run.recipe), settings(override(run.recipe, changes))
    differing = [f"{k}={wanted[k]} (it has {stored[k]})" for k in stored if wanted[k] != stored[k]]
    if differing:
        raise LipcertError(
            f"A resumed run keeps its settings; {out} cannot change {', '.join(differing)}. Leave "
            "them out, or start a new run with another --out."
        )
    return run


def bound(
    target: str,
    weights: Path | None,
    input_shape: str | None,
    names: list[str],
    eps: str | None,
    device: str,
    as_json: bool,
) -> None:
    """`lipcert bound`."""
    chosen = [bound_name(name) for name in dict.fromkeys(names)]
    if eps is not None:
        parse_radius(eps)
        if not set(chosen) & set(LOCAL):
            raise LipcertError(
                f"--eps {eps} is the radius of the balls of local bounds; global ones have none. "
                f"Add --bound {LOCAL[0]}, or leave --eps out."
            )
    if ":" in target and not Path(target).exists():
        if input_shape is None:
            raise LipcertError(f"{target}: give --input-shape, e.g. --input-shape 3,32,32.")
        check_device(device)
        shape = parse_shape(input_shape)
        net = make_network(target).to(device)
        if weights is not None:
            runs.load_weights(net, weights)
        graph = trace(net, shape)
        generator = torch.Generator().manual_seed(0)
        x = torch.rand((evaluate.SAMPLED, *shape), generator=generator)
        like = next(net.parameters(), x)
        x = x.to(like.device, like.dtype)
    else:
        if weights is not None or input_shape is not None:
            raise LipcertError(
                f"--weights and --input-shape go with package.module:function; {target} is a run, "
                "which has its own."
            )
        run, net, graph = open_trained(Path(target), device)
        eps = eps or run.recipe.radii[0]
        data = load(run.recipe.data, Split.EVALUATION)
        x = data.pixels(slice(evaluate.SAMPLED), device)
    with progress("bound", 1) as advance:
        result = bound_table(chosen or members(BoundName.AUTO, graph), graph, x, eps)
        advance(1)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        tables.show_bounds(result)


def certify(
    folder: Path,
    eps: list[str],
    bound: str,
    data_source: str | None,
    out: Path | None,
    batch_size: int | None,
    device: str,
    as_json: bool,
) -> None:
    """`lipcert certify`."""
    name = bound_name(bound)
    if out is not None and out.suffix not in ("", ".parquet"):
        raise LipcertError(f"--out {out}: certificates are written as parquet; name it *.parquet.")
    if out is not None and not out.parent.is_dir():
        raise LipcertError(f"--out {out}: there is no folder {out.parent}.")
    run, net, graph = open_trained(folder, device)
    data = load(data_source or run.recipe.data, Split.EVALUATION)
    if tuple(data.images.shape[1:]) != graph.input_shape:
        raise LipcertError(
            f"{data.source} has images of shape {tuple(data.images.shape[1:])}; the network of "
            f"{folder} takes {graph.input_shape}."
        )
    summary = _certify(run, net, graph, data, name, tuple(eps) or run.recipe.radii, batch_size)
    if out is not None:
        write_atomically(out, run.path("certificates.parquet").read_bytes())
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        tables.show_summary(summary)
        if name in LOCAL:
            tables.show_locality(run.read_json("locality.json", f"lipcert certify {folder}"))
        typer.echo(f"One row a sample: {out or run.path('certificates.parquet')}")


def _certify(
    run: Run,
    net: nn.Module,
    graph: Graph,
    data: Dataset,
    name: BoundName,
    radii: tuple[str, ...],
    batch_size: int | None = None,
) -> dict[str, Any]:
    with progress("certify", len(data)) as advance:
        return evaluate.certify_run(
            *(run, net, graph, data),
            name=name,
            radii=radii,
            batch_size=batch_size,
            on_batch=advance,
        )


def report(folders: list[Path], out: Path | None) -> None:
    """`lipcert report`."""
    opened = [runs.open_run(folder) for folder in folders]
    path = write_report(opened, out or opened[0].path("report.html"))
    typer.echo(f"The report: {path}")


def demo(out: Path) -> None:
    """`lipcert demo`."""
    recipe = recipes.get("lmt-digits")
    data = load(recipe.data, Split.TRAIN)
    runs.remove(out, recipe.name)
    run = runs.create(out, recipe)
    _train(run, data, "cpu")
    run, net, graph = open_trained(out, "cpu")
    test = load(recipe.data, Split.EVALUATION)
    auto = BoundName.AUTO
    summary = _certify(run, net, graph, test, auto, recipe.radii)
    effort = Effort(steps=50, restarts=5, samples=None, seed=0, batch_size=512)
    attack_at(run, net, test, AttackName.PGD, list(recipe.radii), effort)
    results = attack_at(run, net, test, AttackName.PGD, [], effort)
    table = bound_table(members(auto, graph), graph, test.pixels(slice(evaluate.SAMPLED)))
    tables.show_bounds(table)
    tables.show_summary(summary, results)
    fail_on_flips(results)
    report([out], None)
