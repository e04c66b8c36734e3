"""Training with each bound: same network, loss, seed and processor time.

Every training gets as many epochs as fit into the same processor time on one core, measured once
for a network and a bound. All nets are certified with the tightest of all bounds, so the figures
compare trainings and not certificates. Resumes where it was stopped; several processes may share
the folder, each with its own --net or --seed.

    python benchmarks/ellipsoid_training.py train --data DIR --out DIR --net lmt --seed 0
    python benchmarks/ellipsoid_training.py table --data DIR --out DIR --set mnist
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import RESULTS, save
from matplotlib.lines import Line2D

import lipcert as lc
from lipcert import models, recipes
from lipcert.augment import random_flip
from lipcert.data import Dataset, Split
from lipcert.radii import parse_radius
from lipcert.recipe import Recipe
from lipcert.run import Run, load_model
from lipcert.train import train


@dataclasses.dataclass(frozen=True)
class Net:
    """A network, and the recipe whose loss, radius and schedule trains it.

    Attributes:
        title: Its name.
        model: Makes it.
        recipe: Name of the recipe.
        changes: What is unlike the recipe.
        every: At every how many steps Eclipse and Ellipsoid are computed.
    """

    title: str
    model: Callable
    recipe: str = "ellipsoid-mnist-lmt"
    changes: dict = dataclasses.field(default_factory=dict)
    every: int = 2


SETS = {
    "mnist": {
        "mlp": Net("MLP 4x100", partial(models.mlp, widths=(100,) * 4, activation=torch.nn.ReLU)),
        "lmt": Net("LMT's small net", models.lmt_mnist),
        "c4f3": Net("4C3F", models.c4f3_bcp),
    },
    # A few epochs: turning and shifting the images, made for 800, would only slow them down.
    "cifar10": {
        "c6f2": Net(
            "6C2F", models.c6f2_bcp, "ellipsoid-cifar10-c6f2_bcp", {"augment": random_flip}, every=4
        ),
    },
}
NETS = {key: net for nets in SETS.values() for key, net in nets.items()}
BOUNDS = {
    "product": lambda graph, every: lc.Product(graph, norm=lc.PowerIteration(2)),
    "LipLT": lambda graph, every: lc.LipLT(graph, norm=lc.LOBPCG(1)),
    "Eclipse": lambda graph, every: lc.Eclipse(graph, every=every),
    "Ellipsoid": lambda graph, every: lc.Ellipsoid(graph, every=every),
}
COLLAPSED = {("c4f3", "Ellipsoid"), ("c4f3", "product")}
"""Trainings that ended with one class at the rate of the recipe: these take a third of it."""


def orthogonal(make, in_shape, classes) -> torch.nn.Module:
    """A network of orthogonal weights."""
    net = make(in_shape, classes)
    models.initialise_orthogonally(net)
    return net


def recipe_of(net: str, bound: str, seed: int, epochs: int) -> Recipe:
    """The recipe of the network with another bound, length and seed."""
    recipe = recipes.get(NETS[net].recipe)
    rate = recipe.learning_rate / 3 if (net, bound) in COLLAPSED else recipe.learning_rate
    return dataclasses.replace(
        recipe,
        learning_rate=rate,
        model=partial(orthogonal, NETS[net].model),
        bound=partial(BOUNDS[bound], every=NETS[net].every),
        epochs=epochs,
        seed=seed,
        **NETS[net].changes,
    )


def epochs_within(net: str, bound: str, data: Dataset, minutes: float) -> int:
    """How many epochs take this much processor time, by three epochs over 5,120 images."""
    part, clock = data.subset(torch.arange(5120)), []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), recipe_of(net, bound, 0, 4))
        train(run, part, on_epoch=lambda _: clock.append(time.process_time()))
    # Not the first one, which compiles and warms up.
    seconds = (clock[-1] - clock[0]) / 3 * len(data) / len(part)
    return max(2, round(60 * minutes / seconds))


def train_all(options: argparse.Namespace) -> None:
    data = lc.data.load(options.data, Split.TRAIN)
    for bound in options.bounds or BOUNDS:
        folder = options.out / f"{options.net}-{bound}-{options.seed}"
        plan = options.out / f"{options.net}-{bound}.json"
        if not plan.exists():
            epochs = epochs_within(options.net, bound, data, options.minutes)
            options.out.mkdir(parents=True, exist_ok=True)
            plan.write_text(json.dumps({"epochs": epochs}))
        folder.mkdir(exist_ok=True)
        epochs = json.loads(plan.read_text())["epochs"]
        run = Run(folder, recipe_of(options.net, bound, options.seed, epochs))
        clock = time.process_time()

        def note(epoch, folder=folder):
            nonlocal clock
            spent = time.process_time() - clock
            clock += spent
            with (folder / "cpu.txt").open("a") as file:
                file.write(f"{epoch.epoch} {spent:.1f}\n")
            if epoch.epoch % 10 == 0:
                print(folder.name, epoch, flush=True)

        train(run, data, on_epoch=note)
        print(folder.name, "done", flush=True)


def tabulate(options: argparse.Namespace) -> None:
    test = lc.data.load(options.data, Split.EVALUATION)
    shape = tuple(test.images.shape[1:])
    rows, curves = [], {}
    recipe = recipes.get(next(iter(SETS[options.set].values())).recipe)
    grid = torch.linspace(0, 2 * recipe.eps, 301, dtype=torch.float64)
    for folder in sorted(options.out.glob("*-*-*")):
        key, bound, seed = folder.name.split("-")
        if key not in SETS[options.set]:
            continue
        run = Run(folder, recipe_of(key, bound, int(seed), 1))
        if not run.path("config.json").exists():
            continue
        net, _ = load_model(run)
        graph = lc.trace(net, shape)
        bounds = {b.__name__: b(graph) for b in (lc.Product, lc.LipLT, lc.Eclipse, lc.Ellipsoid)}
        cert = lc.certify(net, test.pixels(), bound=lc.tightest(*bounds.values()))
        spent = dict(line.split() for line in (folder / "cpu.txt").read_text().splitlines())
        rows.append(
            {
                "net": NETS[key].title,
                "trained with": bound,
                "seed": int(seed),
                "rate": recipe_of(key, bound, 0, 1).learning_rate,
                "epochs": len(spent),
                "CPU seconds of training": round(sum(map(float, spent.values()))),
                "clean": lc.clean_accuracy(cert, test.labels),
                **{
                    f"CRA {eps}": lc.certified_accuracy(cert, test.labels, parse_radius(eps))
                    for eps in recipe.radii
                },
                "ACR": round(lc.average_certified_radius(cert, test.labels), 4),
                **{f"largest pair, {name}": largest_pair(b) for name, b in bounds.items()},
            }
        )
        print(rows[-1], flush=True)
        curve = lc.accuracy.curve(cert, test.labels, grid)
        curves.setdefault((NETS[key].title, bound), []).append(curve)
    name = f"ellipsoid_{options.set}"
    save(name, {"loss": "gloro", "summary": summary(rows), "runs": rows})
    plot(name, grid, curves)


def largest_pair(bound: torch.nn.Module) -> float:
    """The largest constant of a difference of two logits."""
    with torch.no_grad():
        return float(bound().dense().triu(1).max())


def summary(rows: list[dict]) -> list[dict]:
    """Mean and largest distance from it over the seeds."""
    figures = [name for name in rows[0] if name in ("clean", "ACR") or name.startswith("CRA ")]
    found = []
    for net, bound in dict.fromkeys((row["net"], row["trained with"]) for row in rows):
        same = [row for row in rows if (row["net"], row["trained with"]) == (net, bound)]
        line = {"net": net, "trained with": bound, "seeds": len(same)}
        for name in figures:
            values = [row[name] for row in same]
            mean = statistics.mean(values)
            line[name] = [round(mean, 4), round(max(abs(v - mean) for v in values), 4)]
        found.append(line)
    return found


def plot(name: str, grid: torch.Tensor, curves: dict[tuple[str, str], list[torch.Tensor]]) -> None:
    there = {net for net, _ in curves}
    nets = [net.title for net in NETS.values() if net.title in there]
    figure, axes = plt.subplots(
        1,
        len(nets),
        figsize=(3.6 * len(nets) + 1, 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    colours = dict(zip(BOUNDS, ("tab:orange", "tab:blue", "tab:green", "tab:red"), strict=True))
    for axis, net in zip(axes[0], nets, strict=True):
        for bound, colour in colours.items():
            for curve in curves.get((net, bound), []):
                axis.plot(grid, 100 * curve, color=colour, alpha=0.8)
        axis.set(title=net, xlabel="L2 radius, pixels in [0, 1]", xlim=(0, grid[-1]), ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("certified accuracy, %")
    used = {bound for _, bound in curves}
    lines = [Line2D([], [], color=colour) for bound, colour in colours.items() if bound in used]
    axes[0, -1].legend(lines, [b for b in BOUNDS if b in used], frameon=False, title="trained with")
    figure.savefig(RESULTS / f"{name}.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("train", "table"))
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", choices=SETS, default="mnist")
    parser.add_argument("--net", choices=NETS)
    parser.add_argument("--bounds", nargs="*", choices=BOUNDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train_all(options) if options.command == "train" else tabulate(options)


if __name__ == "__main__":
    main()
