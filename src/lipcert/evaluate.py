"""Measuring a trained network: certificates and attacks, and the files they go to."""

import dataclasses
import io
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor, nn

from lipcert.adversary import pgd
from lipcert.bound_table import BoundName, bound_table, make_bound
from lipcert.certificate import (
    Certificate,
    average_certified_radius,
    certified_accuracy,
    certify,
    clean_accuracy,
    per_class,
)
from lipcert.data import Dataset
from lipcert.errors import LipcertError
from lipcert.files import write_atomically
from lipcert.graph import Graph
from lipcert.radii import parse_radius
from lipcert.run import Run, versions

Progress = Callable[[int], object]


def certify_run(
    run: Run,
    net: nn.Module,
    graph: Graph,
    data: Dataset,
    *,
    name: BoundName,
    radii: Sequence[str],
    batch_size: int,
    on_batch: Progress | None = None,
) -> dict[str, Any]:
    """Certifies a data set and writes certificates.parquet, bound.json and summary.json.

    Args:
        run: Where to write.
        net: The trained network.
        graph: Its graph.
        data: The evaluation data.
        name: Which bound.
        radii: Radii of interest, as text.
        batch_size: Samples at a time.
        on_batch: Called with the number of samples done.

    Returns:
        The summary, as in summary.json: fractions, not percent.
    """
    values = {text: parse_radius(text) for text in radii}
    begin = time.perf_counter()
    device = next(net.parameters()).device
    x = data.pixels(device=device)
    certificate = certify(
        net, x, bound=make_bound(name, graph), batch_size=batch_size, on_batch=on_batch
    )
    seconds = time.perf_counter() - begin
    labels = data.labels
    acr = average_certified_radius(certificate, labels)
    right = certificate.radius.where(certificate.prediction == labels, 0)
    rows = per_class(certificate, labels, list(values.values()))
    by_value = {value: text for text, value in values.items()}
    summary = {
        "clean_accuracy": clean_accuracy(certificate, labels),
        "cra": {t: certified_accuracy(certificate, labels, v) for t, v in values.items()},
        "kind": str(certificate.kind),
        "failure_probability": certificate.failure,
        "bound": str(name),
        "acr": acr if math.isfinite(acr) else None,
        "median_radius": float(right.median()),
        "samples": len(data),
        "seconds": round(seconds, 3),
        "recipe": run.recipe.name,
        "data": data.source,
        "split": data.split,
        "classes": [
            {
                "name": data.classes[row.label],
                "samples": row.samples,
                "clean_accuracy": row.clean_accuracy,
                "cra": {by_value[v]: f for v, f in row.certified_accuracy.items()},
                "median_radius": row.median_radius,
            }
            for row in rows
        ],
        "versions": versions(),
    }
    table = bound_table(name, graph, x[:32])
    write_atomically(
        run.path("certificates.parquet"), certificates_table(certificate, labels, values, name)
    )
    run.write_json("bound.json", dataclasses.asdict(table))
    run.write_json("summary.json", summary)
    attack = _earlier_attack(run, data)
    if attack.pop("inside", None):  # it spoke of the certificates that were there before
        run.write_json("attack.json", attack)
    return summary


def _earlier_attack(run: Run, data: Dataset) -> dict[str, Any]:
    """What attack.json holds, if it is of these data."""
    found = (
        run.read_json("attack.json", f"lipcert attack {run.folder}")
        if run.path("attack.json").exists()
        else {}
    )
    return found if found.get("data") == data.source else {"data": data.source}


def certificates_table(
    certificate: Certificate, labels: Tensor, radii: dict[str, float], name: BoundName
) -> bytes:
    """One row a sample as parquet; the kind of the claim is in every row and in the metadata."""
    columns: dict[str, Any] = {
        "index": range(len(certificate)),
        "label": labels.tolist(),
        "prediction": certificate.prediction.tolist(),
        "radius": certificate.radius.numpy(),
        "kind": [str(certificate.kind)] * len(certificate),
    }
    for text, value in radii.items():
        columns[f"robust@{text}"] = certificate.robust_at(value).numpy()
    table = pyarrow.table(columns).replace_schema_metadata(
        {"kind": str(certificate.kind), "bound": str(name), "norm": "L2"}
    )
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def read_certificates(run: Run) -> pyarrow.Table:
    """The certificates of a run.

    Raises:
        LipcertError: They are missing or broken.
    """
    path = run.path("certificates.parquet")
    if not path.exists():
        raise LipcertError(f"{path} is missing. It is made by: lipcert certify {run.folder}.")
    try:
        return pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise LipcertError(
            f"{path} is broken ({error}). Make it again: lipcert certify {run.folder}."
        ) from None


def attack_run(
    run: Run,
    net: nn.Module,
    data: Dataset,
    *,
    radii: Sequence[str],
    steps: int,
    restarts: int,
    batch_size: int,
    seed: int,
    on_batch: Progress = lambda done: None,
) -> dict[str, Any]:
    """Attacks samples at the given radii, or inside their certified balls, where it must fail.

    Args:
        run: Where attack.json goes; what earlier calls found on the same data is kept.
        net: The trained network.
        data: The samples, in the order in which they were certified (a prefix is fine).
        radii: Radii as text; none for the certified balls.
        steps: Ascent steps.
        restarts: Random starts; further ones aim at one rival class each.
        batch_size: Samples at a time.
        seed: Of the random starts.
        on_batch: Called with the number of samples done, over all radii.

    Returns:
        The content of attack.json.
    """
    device = next(net.parameters()).device
    results = _earlier_attack(run, data)
    x, labels = data.pixels(device=device), data.labels.to(device)

    box = (0.0, 1.0) if radii else None  # a certificate also speaks of points outside the box

    def found(targets: Tensor, radius: Tensor, done: int) -> Tensor:
        generator = torch.Generator(device=device).manual_seed(seed)
        hits = []
        pieces = zip(*(t.split(batch_size) for t in (x, targets, radius)), strict=True)
        for batch, target, r in pieces:
            result = pgd(net, batch, target, r, steps, restarts, box, generator=generator)
            hits.append(result.found)
            done += len(batch)
            on_batch(done)
        return torch.cat(hits).cpu()

    settings = {"samples": len(data), "steps": steps, "restarts": restarts, "seed": seed}
    if radii:
        at = results.setdefault("robust_accuracy", {})
        for place, text in enumerate(radii):
            radius = torch.full((len(data),), parse_radius(text), dtype=torch.float64)
            hit = found(labels, radius.to(device), place * len(data))
            at[text] = settings | {"value": float((~hit).double().mean())}
    else:
        table = read_certificates(run).slice(0, len(data))
        radius = torch.tensor(table["radius"].to_pylist(), dtype=torch.float64, device=device)
        radius = radius.clamp(max=x[0].numel() ** 0.5)  # the box's diagonal stands for no limit
        prediction = torch.tensor(table["prediction"].to_pylist(), device=device)
        hit = found(prediction, radius, 0)
        attacked = int((radius > 0).sum())
        results["inside"] = settings | {"attacked": attacked, "flipped": int(hit.sum())}
    run.write_json("attack.json", results)
    return results
