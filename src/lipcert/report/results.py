"""A finished run, read back from its files: each is checked before anything is made of it."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from jaxtyping import Bool, Float, Int

from lipcert.attacking import read_inequality
from lipcert.bound_table import BoundTable
from lipcert.errors import LipcertError
from lipcert.evaluate import read_certificates, read_local_rows
from lipcert.inequality import Inequality
from lipcert.locality import Locality, LocalRows, Part
from lipcert.radii import parse_radius
from lipcert.report.stored import Attack, Attacked, Start, Summary
from lipcert.report.typed import typed
from lipcert.run import Run
from lipcert.train import Epoch


@dataclass(frozen=True, eq=False)
class Results:
    """All that is known of a certified run.

    Attributes:
        run: The run.
        start: From recipe.json.
        summary: From summary.json.
        label: The true class of each sample.
        prediction: The predicted class.
        radius: The certified L2 radius in input units.
        robust: Whether the prediction is certified at a radius, by the radius as text.
        attack: From attack.json, empty without the file.
        bound: From bound.json, None without the file.
        epochs: From metrics.jsonl, None without the file.
        inequality: From inequality.parquet, None without the file; of the first samples.
        locality: From locality.json, None without the file.
        local_rows: From locality.parquet, None without locality.json.
    """

    run: Run
    start: Start
    summary: Summary
    label: Int[np.ndarray, " n"]
    prediction: Int[np.ndarray, " n"]
    radius: Float[np.ndarray, " n"]
    robust: dict[str, Bool[np.ndarray, " n"]]
    attack: Attack
    bound: BoundTable | None
    epochs: tuple[Epoch, ...] | None
    inequality: Inequality | None
    locality: Locality | None = None
    local_rows: LocalRows | None = None

    @property
    def right(self) -> Bool[np.ndarray, " n"]:
        """Whether the prediction is the label."""
        return self.label == self.prediction

    def certified(self, text: str, samples: int | None = None) -> int:
        """How many of the first samples (all by default) are right and certified at a radius."""
        robust = self.robust.get(text)
        if robust is None:  # not a radius of the summary; `radius` is rounded down, so this holds
            robust = self.radius >= parse_radius(text)
        return int((self.right & robust)[:samples].sum())

    def contradictions(self) -> list[tuple[str, Attacked]]:
        """Attacks, with their radius, that left fewer samples right than are certified."""
        return [
            (text, found)
            for text, found in self.attack.all()
            if round(found.value * found.samples) < self.certified(text, found.samples)
        ]


def read_results(run: Run) -> Results:
    """Reads the files of a run that `lipcert certify` has been through.

    Raises:
        LipcertError: summary.json or certificates.parquet is missing; or a file is broken or does
            not fit the others. The message names the file and the command that makes it.
    """
    certify = f"lipcert certify {run.folder}"
    train = f"lipcert train {run.recipe.name} --out {run.folder}"
    start = _read(run, "recipe.json", Start, train)
    summary = _read(run, "summary.json", Summary, certify)
    attack, bound = Attack(), None
    if run.path("attack.json").exists():
        attack = _read(run, "attack.json", Attack, f"lipcert attack {run.folder}")
    if run.path("bound.json").exists():
        bound = _read(run, "bound.json", BoundTable, certify)
    epochs = _epochs(run.path("metrics.jsonl"), train)
    inequality = read_inequality(run) if run.path("inequality.parquet").exists() else None
    table = read_certificates(run)
    try:
        label, prediction = (_column(table, n, pyarrow.int64()) for n in ("label", "prediction"))
        radius = _column(table, "radius", pyarrow.float64())
        robust = {t: _column(table, f"robust@{t}", pyarrow.bool_()) for t in summary.cra}
        rows = (label, prediction, radius, robust)
        results = Results(run, start, summary, *rows, attack, bound, epochs, inequality)
        _count_again(results, (table.schema.metadata or {}).get(b"kind", b"").decode())
    except (KeyError, pyarrow.ArrowException, LipcertError) as error:
        raise LipcertError(
            f"{run.path('certificates.parquet')} does not fit summary.json ({error.args[0]}). "
            f"Make both again: {certify}."
        ) from None
    _check_attack(results)
    _check_inequality(results)
    return _with_locality(results, certify)


def _column(table: pyarrow.Table, name: str, kind: pyarrow.DataType) -> np.ndarray:
    column = table.column(name).cast(kind)
    if column.null_count:
        raise LipcertError(f"column {name} has gaps")
    return column.to_numpy()


def _count_again(results: Results, kind: str) -> None:
    """Counts again what the summary says."""
    summary, n = results.summary, len(results.label)
    if n != summary.samples or n == 0:
        raise LipcertError(f"{n} rows for {summary.samples} samples")
    if kind != summary.kind:
        raise LipcertError(f"kind {kind!r} for {summary.kind}")
    if not (results.radius >= 0).all():
        raise LipcertError("a radius is negative or not a number")
    counted = {"clean_accuracy": int(results.right.sum())}
    said = {"clean_accuracy": summary.clean_accuracy}
    for text, fraction in summary.cra.items():
        counted[f"cra at {text}"], said[f"cra at {text}"] = results.certified(text), fraction
    for name, count in counted.items():
        if not math.isclose(count / n, said[name], abs_tol=1e-9):
            raise LipcertError(
                f"{name}: the rows give {count / n:.6f}, the summary {said[name]:.6f}"
            )


def _check_attack(results: Results) -> None:
    attack = results.attack
    tried = [found.samples for _, found in attack.all()]
    tried += [attack.inside.samples] if attack.inside else []
    if not all(0 < samples <= results.summary.samples for samples in tried):
        raise LipcertError(
            f"{results.run.path('attack.json')} is not of the {results.summary.samples} samples "
            f"that were certified. Remove it and attack again: lipcert attack {results.run.folder}."
        )


def _check_inequality(results: Results) -> None:
    found = results.inequality
    if found is None:
        return
    counted = np.where(results.right, results.radius, 0)
    if not 0 < len(found) <= len(counted) or (found.certified > counted[: len(found)]).any():
        raise LipcertError(
            f"{results.run.path('inequality.parquet')} is not of these certificates. Make it "
            f"again: lipcert attack {results.run.folder} --inequality."
        )


def _with_locality(results: Results, certify: str) -> Results:
    """With what the local bound gained, counted again from its rows."""
    run, summary = results.run, results.summary
    if not run.path("locality.json").exists():
        return results
    certify = f"{certify} --bound {summary.bound}"
    found = _read(run, "locality.json", Locality, certify)
    rows = read_local_rows(run, certify)
    fits = (found.bound, found.samples) == (summary.bound, summary.samples)
    fits &= len(rows.rival) == summary.samples and found.cra.keys() == set(Part)
    fits = fits and all(
        math.isclose(found.cra[part], (ok.numpy() & results.right).mean(), abs_tol=1e-9)
        for part, ok in rows.proved.items()
    )
    same = math.isclose(found.cra.get(Part.ALL, -1), summary.cra.get(found.eps, -2), abs_tol=1e-9)
    if not (fits and same):
        raise LipcertError(
            f"{run.path('locality.json')} and locality.parquet are not of these certificates. Make "
            f"all again: {certify}."
        )
    return dataclasses.replace(results, locality=found, local_rows=rows)


def _epochs(path: Path, made_by: str) -> tuple[Epoch, ...] | None:
    if not path.exists():
        return None
    epochs = []
    try:
        for line in path.read_text().splitlines():
            epochs.append(typed(Epoch, json.loads(line), "the line"))
    except ValueError as error:  # broken JSON, or a LipcertError
        raise LipcertError(
            f"{path}, line {len(epochs) + 1}, is no record of an epoch ({error}). Remove the file, "
            f"and the report does without it; or train anew: {made_by}."
        ) from None
    return tuple(epochs)


def _read(run: Run, name: str, kind: type, made_by: str) -> Any:
    content = run.read_json(name, made_by)
    try:
        return typed(kind, content, "the file")
    except LipcertError as error:
        said = str(error).rstrip(".")
        raise LipcertError(f"{run.path(name)}: {said}. Make it again: {made_by}.") from None
