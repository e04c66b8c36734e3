"""Attacking a trained network, and the files that go with it: attack.json, inequality.parquet."""

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from lipcert import evaluate
from lipcert.adversary import pgd
from lipcert.bound_names import LOCAL
from lipcert.data import Dataset
from lipcert.errors import LipcertError
from lipcert.external_attacks import AttackName, autoattack, carlini_wagner, deepfool
from lipcert.files import write_atomically
from lipcert.inequality import ABOUT, RADII, Inequality, measure
from lipcert.radii import parse_radius
from lipcert.run import Run

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Effort:
    """How hard an attack tries.

    Attributes:
        steps: Steps of each attack.
        restarts: Random starts; only PGD has them.
        samples: Only the first so many; None for all.
        seed: Of all random numbers.
        batch_size: Samples at a time.
    """

    steps: int
    restarts: int
    samples: int | None
    seed: int
    batch_size: int


def attack_run(
    run: Run,
    net: nn.Module,
    data: Dataset,
    *,
    attack: AttackName,
    radii: Sequence[str],
    effort: Effort,
    on_batch: Progress = lambda done: None,
) -> dict[str, Any]:
    """Attacks samples at the given radii, or inside their certified balls, where it must fail.

    Args:
        run: Where attack.json goes; what earlier calls found on the same data is kept. What PGD
            found at a radius is under "robust_accuracy", what others found under "others", each
            under its name.
        net: The trained network.
        data: The samples, in the order in which they were certified.
        attack: Which attack; inside the certified balls, PGD.
        radii: Radii as text; none for the certified balls.
        effort: How hard it tries.
        on_batch: Called with the number of samples done, over all radii.

    Returns:
        The content of attack.json.

    Raises:
        LipcertError: A bad radius; certificates are needed and missing; another attack than PGD
            without radii, or without its package.
    """
    if not radii and attack is not AttackName.PGD:
        raise LipcertError(
            f"--attack {attack} needs a radius, e.g. --eps 0.5; inside the certified balls only "
            "pgd attacks, because the others stay in the box of pixels."
        )
    if attack is not AttackName.PGD:
        _check_pixels(data, f"--attack {attack}")
    values = {text: parse_radius(text) for text in radii}
    data = data.subset(slice(effort.samples))
    results = evaluate.earlier_attack(run, data)
    device = next(net.parameters()).device
    x, labels = data.pixels(device=device), data.labels.to(device)
    settings = {
        "samples": len(data),
        "steps": effort.steps,
        "restarts": effort.restarts if attack is AttackName.PGD else 1,
        "seed": effort.seed,
        "attack": str(attack),
    }

    box = data.limits if radii else None  # a certificate also speaks of points outside it

    def hits(targets: Tensor, radius: Tensor, done: int) -> Tensor:
        generator = torch.Generator(device=device).manual_seed(effort.seed)
        found = []
        pieces = zip(*(t.split(effort.batch_size) for t in (x, targets, radius)), strict=True)
        for batch in pieces:
            found.append(_hits(attack, net, batch, box, effort, generator))
            done += len(found[-1])
            on_batch(done)
        return torch.cat(found).cpu()

    if radii:
        if attack is AttackName.PGD:
            at = results.setdefault("robust_accuracy", {})
        else:
            at = results.setdefault("others", {}).setdefault(str(attack), {})
        for place, (text, value) in enumerate(values.items()):
            radius = torch.full((len(data),), value, dtype=torch.float64, device=device)
            found = hits(labels, radius, place * len(data))
            at[text] = settings | {"value": float((~found).double().mean())}
    else:
        table = evaluate.read_certificates(run).slice(0, len(data))
        radius = torch.tensor(table["radius"].to_pylist(), dtype=torch.float64, device=device)
        radius = radius.clamp(max=x[0].numel() ** 0.5)  # the box's diagonal stands for no limit
        prediction = torch.tensor(table["prediction"].to_pylist(), device=device)
        found = hits(prediction, radius, 0)
        attacked = int((radius > 0).sum())
        results["inside"] = settings | {"attacked": attacked, "flipped": int(found.sum())}
    run.write_json("attack.json", results)
    return results


def _hits(
    attack: AttackName,
    net: nn.Module,
    batch: tuple[Tensor, Tensor, Tensor],
    box: tuple[float, float] | None,
    effort: Effort,
    generator: torch.Generator,
) -> Tensor:
    """Which samples of a batch (inputs, classes to be left, radii) the attack brings down."""
    x, targets, radius = batch
    match attack:
        case AttackName.PGD:
            tries = effort.steps, effort.restarts
            return pgd(net, x, targets, radius, *tries, box, generator=generator).found
        case AttackName.AUTOATTACK:
            return autoattack(net, x, targets, float(radius[0]), effort.steps, effort.seed).found
        case AttackName.DEEPFOOL:
            result = deepfool(net, x, targets, effort.steps)
        case AttackName.CW:
            result = carlini_wagner(net, x, targets, effort.steps)
    return result.found & (result.distance <= radius)


def _check_pixels(data: Dataset, what: str) -> None:
    """These attacks search the box of pixels only."""
    if data.limits != (0.0, 1.0):
        raise LipcertError(
            f"{what} attacks pixels in [0, 1]; the inputs of {data.source} are no pixels. Plain "
            "`lipcert attack RUN`, with or without --eps, attacks any inputs."
        )


def inequality_run(
    run: Run,
    net: nn.Module,
    data: Dataset,
    *,
    effort: Effort,
    on_batch: Progress = lambda done: None,
) -> dict[str, Any]:
    """Sets certified radii beside sampled ones and the smallest perturbations found.

    Args:
        run: Where certificates.parquet lies and inequality.parquet goes.
        net: The trained network.
        data: The samples that were certified, in their order.
        effort: How hard the attacks try.
        on_batch: Called with the number of samples done.

    Returns:
        Medians and median ratios (None for infinity or nothing), how hard the attacks tried, and
        how many certificates were refuted: an attack within them, or slopes above their constants.

    Raises:
        LipcertError: The certificates are missing, or not of these samples; or these are no pixels.
    """
    _check_pixels(data, "--inequality")
    data = data.subset(slice(effort.samples))
    table = evaluate.read_certificates(run).slice(0, len(data))
    if table["label"].to_pylist() != data.labels.tolist():
        raise LipcertError(
            f"The certificates of {run.folder} are not of these samples of {data.source}. Certify "
            f"them first: lipcert certify {run.folder} --data {data.source}"
        )
    device = next(net.parameters()).device
    radius = torch.tensor(table["radius"].to_pylist(), dtype=torch.float64)
    right = torch.tensor(table["prediction"].to_pylist()) == data.labels
    result = measure(
        net,
        data.pixels(device=device),
        data.labels.to(device),
        radius.where(right, 0),
        steps=effort.steps,
        restarts=effort.restarts,
        batch_size=effort.batch_size,
        seed=effort.seed,
        on_batch=on_batch,
    )
    write_atomically(run.path("inequality.parquet"), _parquet(result))
    bound = (table.schema.metadata or {}).get(b"bound", b"").decode()
    crossed = int((result.smallest_perturbation < result.sampled_local).sum())
    return {
        "samples": len(result),
        **result.about,
        "medians": _plain(result.medians()),
        "ratios": _plain(result.ratios()),
        "perturbations_below_sampled_local": crossed,
        "refuted": int(refuted(result, bound).sum()),
    }


def refuted(inequality: Inequality, bound: str) -> Bool[np.ndarray, " n"]:
    """Which certificates are contradicted by what was found or, if they are global, seen.

    A local bound may well prove more than slopes allow that were seen outside its ball; only a
    perturbation refutes it.

    Args:
        inequality: The radii side by side.
        bound: The name of the bound behind the certificates.
    """
    if bound in LOCAL:
        nothing_seen = np.full_like(inequality.sampled_global, np.inf)
        inequality = dataclasses.replace(inequality, sampled_global=nothing_seen)
    return inequality.refuted()


def _plain(numbers: dict[str, float]) -> dict[str, float | None]:
    """Numbers for JSON, which knows no infinity: None instead."""
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _parquet(inequality: Inequality) -> bytes:
    """One row a sample; how it was measured is in the metadata."""
    columns: dict[str, Any] = {name: getattr(inequality, name) for name in RADII}
    columns = {"index": range(len(inequality))} | columns | {"found_by": inequality.found_by}
    buffer = io.BytesIO()
    table = pyarrow.table(columns).replace_schema_metadata(inequality.about)
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def read_inequality(run: Run) -> Inequality:
    """The content of inequality.parquet.

    Raises:
        LipcertError: It is missing or broken.
    """
    path, made_by = run.path("inequality.parquet"), f"lipcert attack {run.folder} --inequality"
    if not path.exists():
        raise LipcertError(f"{path} is missing. It is made by: {made_by}.")
    try:
        table = pyarrow.parquet.read_table(path)
        radii = {name: table[name].cast(pyarrow.float64()).to_numpy() for name in RADII}
        if not all((r >= 0).all() for r in radii.values()):
            raise ValueError("a radius is negative or not a number")
        metadata = table.schema.metadata or {}
        about = {name: metadata[name.encode()].decode() for name in ABOUT}
        by = tuple(table["found_by"].to_pylist())
        return Inequality(**radii, found_by=by, about=about)
    except (KeyError, ValueError, pyarrow.ArrowException, OSError) as error:
        raise LipcertError(f"{path} is broken ({error}). Make it again: {made_by}.") from None
