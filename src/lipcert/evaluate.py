"""Certifying a trained network, and the files that the certificates go to."""

import dataclasses
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor, nn

from lipcert.accuracy import average_certified_radius, certified_accuracy, clean_accuracy, per_class
from lipcert.bound_names import LOCAL, BoundName, make_bound
from lipcert.bound_table import evaluated, tabulated
from lipcert.certificate import Certificate
from lipcert.certifying import certify
from lipcert.data import Dataset
from lipcert.errors import LipcertError
from lipcert.files import write_atomically
from lipcert.graph import Graph
from lipcert.locality import Localised, LocalRows, Part, certify_around, proved_by
from lipcert.radii import parse_radius
from lipcert.run import Run, versions

Progress = Callable[[int], object]
SAMPLED = 32  # samples at which the bound table samples Jacobian norms
BATCH, LOCAL_BATCH = 512, 64  # samples at a time; local bounds hold boxes and norms for each


def certify_run(
    run: Run,
    net: nn.Module,
    graph: Graph,
    data: Dataset,
    *,
    name: BoundName,
    radii: Sequence[str],
    batch_size: int | None = None,
    on_batch: Progress | None = None,
) -> dict[str, Any]:
    """Certifies a data set and writes certificates.parquet, bound.json and summary.json.

    With a local bound the balls are those of all radii, every cheap global bound is used too, and
    locality.json and locality.parquet say what the local bound gains.

    Args:
        run: Where to write.
        net: The trained network.
        graph: Its graph.
        data: The evaluation data.
        name: Which bound.
        radii: Radii of interest, as text.
        batch_size: Samples at a time; by default few for a local bound.
        on_batch: Called with the number of samples done.

    Returns:
        The summary, as in summary.json: fractions, not percent.
    """
    values = {text: parse_radius(text) for text in radii}
    begin = time.perf_counter()
    device = next(net.parameters()).device
    x = data.pixels(device=device)
    local: Localised | None = None
    if name in LOCAL:
        size = batch_size or LOCAL_BATCH
        options: dict[str, Any] = {"name": name, "radii": values, "batch_size": size}
        local = certify_around(net, graph, x, **options, on_batch=on_batch)
        certificate, by, found = local.certificate, local.proved_by, local.found
    else:
        found = evaluated([name], graph)
        certificate = certify(
            net,
            x,
            bound=make_bound(name, graph),
            constants=found[name].pairs,
            batch_size=batch_size or BATCH,
            on_batch=on_batch,
        )
        by = proved_by(certificate, [str(name)])
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
        "weights_sha256": run.weights_sha256(),
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
    several = (BoundName.AUTO, BoundName.TIGHT)
    shown = [part for part in BoundName if part in found and part not in several]
    table = tabulated(shown, found, graph, x[:SAMPLED])
    about = {"bound": str(name), "weights_sha256": run.weights_sha256() or ""}
    rows_of_samples = certificates_table(certificate, labels, values, by, about)
    write_atomically(run.path("certificates.parquet"), rows_of_samples)
    run.write_json("bound.json", dataclasses.asdict(table))
    run.write_json("summary.json", summary)
    if run.path("attack.json").exists():
        attack = earlier_attack(run, data)
        attack.pop("inside", None)  # it spoke of the certificates that were there before
        run.write_json("attack.json", attack)
    run.path("inequality.parquet").unlink(missing_ok=True)  # for the same reason
    _write_locality(run, local, name, next(iter(values)), labels)
    return summary


def _write_locality(
    run: Run, local: Localised | None, name: BoundName, eps: str, labels: Tensor
) -> None:
    """Writes what a local bound gained, or removes what an earlier one did."""
    if local is None:
        run.path("locality.json").unlink(missing_ok=True)
        run.path("locality.parquet").unlink(missing_ok=True)
        return
    write_atomically(run.path("locality.parquet"), _local_table(local.rows, name, eps))
    run.write_json("locality.json", dataclasses.asdict(local.summary(name, eps, labels)))


def earlier_attack(run: Run, data: Dataset) -> dict[str, Any]:
    """What attack.json holds, if it is of these data and weights; to be added to."""
    found = (
        run.read_json("attack.json", f"lipcert attack {run.folder}")
        if run.path("attack.json").exists()
        else {}
    )
    of = {"data": data.source, "weights_sha256": run.weights_sha256()}
    return found if found.items() >= of.items() else of


def certificates_table(
    certificate: Certificate,
    labels: Tensor,
    radii: Mapping[str, float],
    by: Sequence[str],
    about: Mapping[str, str],
) -> bytes:
    """One row a sample as parquet; the kind of the claim is in every row and in the metadata.

    Args:
        certificate: The certificates.
        labels: The true classes.
        radii: Radii of interest by their text.
        by: Which bound gave each sample its radius, see `proved_by`.
        about: Further metadata: the bound, and the weights that were certified.
    """
    columns: dict[str, Any] = {
        "index": range(len(certificate)),
        "label": labels.tolist(),
        "prediction": certificate.prediction.tolist(),
        "radius": certificate.radius.numpy(),
        "kind": [str(certificate.kind)] * len(certificate),
        "proved_by": list(by),
    }
    for text, value in radii.items():
        columns[f"robust@{text}"] = certificate.robust_at(value).numpy()
    return _parquet(columns, {"kind": str(certificate.kind), "norm": "L2", **about})


def _local_table(rows: LocalRows, name: BoundName, eps: str) -> bytes:
    """One row a sample as parquet; the bound and the radius of the balls are in the metadata."""
    columns: dict[str, Any] = {
        "index": range(len(rows.rival)),
        "rival": rows.rival.numpy(),
        "global_constant": rows.global_constant.numpy(),
        "local_constant": rows.local_constant.numpy(),
    }
    columns |= {f"proved@{part}": proved.numpy() for part, proved in rows.proved.items()}
    return _parquet(columns, {"bound": str(name), "eps": eps, "norm": "L2"})


def _parquet(columns: dict[str, Any], metadata: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def read_certificates(run: Run) -> pyarrow.Table:
    """The certificates of a run.

    Raises:
        LipcertError: They are missing or broken, or of other weights than the run has now.
    """
    made_by = f"lipcert certify {run.folder}"
    table = _read_parquet(run, "certificates.parquet", made_by)
    certified = (table.schema.metadata or {}).get(b"weights_sha256", b"").decode()
    if run.weights_sha256() not in (None, certified):
        raise LipcertError(
            f"{run.path('model.safetensors')} has changed since {run.path('certificates.parquet')} "
            f"was made: nothing is known of the weights there are now. Certify them: {made_by}."
        )
    return table


def read_local_rows(run: Run, made_by: str) -> LocalRows:
    """The content of locality.parquet.

    Args:
        run: The run.
        made_by: The command that makes it.

    Raises:
        LipcertError: It is missing or broken.
    """
    table = _read_parquet(run, "locality.parquet", made_by)

    def column(name: str, kind: pyarrow.DataType) -> Tensor:
        values = table.column(name).cast(kind)
        if values.null_count:
            raise ValueError(f"column {name} has gaps")
        return torch.tensor(values.to_numpy())

    try:
        return LocalRows(
            column("rival", pyarrow.int64()),
            column("global_constant", pyarrow.float64()),
            column("local_constant", pyarrow.float64()),
            {part: column(f"proved@{part}", pyarrow.bool_()) for part in Part},
        )
    except (KeyError, ValueError, pyarrow.ArrowException) as error:
        raise LipcertError(
            f"{run.path('locality.parquet')} is broken ({error}). Make it again: {made_by}."
        ) from None


def _read_parquet(run: Run, name: str, made_by: str) -> pyarrow.Table:
    path = run.path(name)
    if not path.exists():
        raise LipcertError(f"{path} is missing. It is made by: {made_by}.")
    try:
        return pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise LipcertError(f"{path} is broken ({error}). Make it again: {made_by}.") from None
