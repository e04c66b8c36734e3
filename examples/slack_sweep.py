"""Train one recipe of CLL with several slacks and radii, and draw what comes of it.

    python examples/slack_sweep.py --out sweep                       two moons, minutes
    python examples/slack_sweep.py --recipe cll-digits --slack 0.5 0.1 0.01 --eps 36/255 72/255

For each radius: clean and certified accuracy at that radius against the slack. Little slack is a
steep loss that wants every radius to be eps; much slack is a smooth loss that gives up samples. A
training that is in the folder already is not done again.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure

import lipcert as lc
from lipcert import recipes
from lipcert.accuracy import certified_accuracy, clean_accuracy
from lipcert.data import Split, load
from lipcert.files import write_atomically
from lipcert.progress import progress
from lipcert.radii import parse_radius
from lipcert.recipe import Recipe
from lipcert.run import Run, create
from lipcert.train import train


def trained(recipe: Recipe, folder: Path, what: str) -> torch.nn.Module:
    """The network of a recipe, trained in a folder; it goes on where it was interrupted."""
    data = load(recipe.data, Split.TRAIN)
    there = (folder / "recipe.json").exists()
    run = Run(folder, recipe) if there else create(folder, recipe)
    with progress(what) as advance:
        return train(run, data, on_step=lambda done, total: advance(done, total))


def measured(recipe: Recipe, folder: Path, what: str) -> dict[str, float]:
    """Clean accuracy, certified accuracy at the recipe's radius, and the Lipschitz constant."""
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    net = trained(recipe, folder, what)
    test = load(recipe.data, Split.EVALUATION)
    bound = lc.Product(lc.trace(net, tuple(test.images.shape[1:])))
    certificate = lc.certify(net, test.pixels(), bound=bound)
    found = {
        "clean": clean_accuracy(certificate, test.labels),
        "certified": certified_accuracy(certificate, test.labels, recipe.eps),
        "constant": float(bound.lipschitz()),
    }
    write_atomically(result, json.dumps(found, indent=2) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="cll-moons")
    parser.add_argument("--slack", nargs="+", type=float, default=[0.75, 0.5, 0.25, 0.01, 1e-4])
    parser.add_argument("--eps", nargs="+", default=["0.1", "0.15", "0.2"])
    parser.add_argument("--epochs", type=int, help="default: as in the recipe")
    parser.add_argument("--out", type=Path, default=Path("sweep"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = recipes.get(arguments.recipe)
    if recipe.loss is not lc.losses.cll:
        parser.error(f"{recipe.name} does not train with the loss cll, so it has no slack")
    epochs = arguments.epochs or recipe.epochs
    figure = Figure(figsize=(7, 3.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for place, text in enumerate(arguments.eps):
        rows = []
        for slack in arguments.slack:
            options = {**recipe.loss_options, "slack": slack}
            eps = parse_radius(text)
            one = dataclasses.replace(recipe, loss_options=options, eps=eps, epochs=epochs)
            folder = arguments.out / f"eps-{eps:.4g}-slack-{slack:g}-epochs-{epochs}"
            rows.append(measured(one, folder, f"eps {text}, slack {slack:g}"))
            print(f"eps {text}, slack {slack:g}: {rows[-1]}", flush=True)
        axes.plot(
            arguments.slack,
            [100 * r["clean"] for r in rows],
            f"C{place}o--",
            label=f"clean, {text}",
        )
        axes.plot(
            arguments.slack,
            [100 * r["certified"] for r in rows],
            f"C{place}o-",
            label=f"certified at {text}",
        )
    axes.set(xscale="log", xlabel="slack", ylabel="accuracy, %", title=recipe.name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncol=len(arguments.eps))
    picture = arguments.out / "slack_sweep.png"
    figure.savefig(picture)
    print(picture)


if __name__ == "__main__":
    main()
