"""Certifying a trained network, and the files that the certificates go to."""

import dataclasses
import io
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet
from torch import Tensor, nn

from lipcert.bound_table import BoundName, evaluated, make_bound, tabulated
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
    found = evaluated([name], graph)
    certificate = certify(
        net,
        x,
        bound=make_bound(name, graph),
        constants=found[name].pairs,
        batch_size=batch_size,
        on_batch=on_batch,
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
    shown = [part for part in BoundName if part in found and part is not BoundName.AUTO]
    table = tabulated(shown, found, graph, x[:32])
    write_atomically(
        run.path("certificates.parquet"), certificates_table(certificate, labels, values, name)
    )
    run.write_json("bound.json", dataclasses.asdict(table))
    run.write_json("summary.json", summary)
    attack = earlier_attack(run, data)
    if attack.pop("inside", None):  # it spoke of the certificates that were there before
        run.write_json("attack.json", attack)
    run.path("inequality.parquet").unlink(missing_ok=True)  # for the same reason
    return summary


def earlier_attack(run: Run, data: Dataset) -> dict[str, Any]:
    """What attack.json holds, if it is of these data; to be added to."""
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
