"""Draw certified accuracy against the radius for one or several certified runs.

    python examples/curve.py runs/a runs/b --out curve.png

The line is what is proved; a triangle is what survived the attack at that radius. The truth lies
between the two.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from lipcert.accuracy import curve_of_radii
from lipcert.evaluate import read_certificates
from lipcert.radii import parse_radius
from lipcert.run import open_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curve.png"))
    arguments = parser.parse_args()
    figure = Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for place, folder in enumerate(arguments.runs):
        run = open_run(folder)
        table = read_certificates(run)
        right = torch.tensor(table["label"].to_numpy() == table["prediction"].to_numpy())
        radius = torch.tensor(table["radius"].to_numpy())
        grid = torch.linspace(0, float(radius[right].max()), 400, dtype=torch.float64)
        kind = table.schema.metadata[b"kind"].decode()
        label = f"{run.recipe.name}: certified ({kind})"
        axes.plot(grid, 100 * curve_of_radii(radius, right, grid), f"C{place}", label=label)
        if run.path("attack.json").exists():
            found = run.read_json("attack.json", "lipcert attack").get("robust_accuracy", {})
            points = [
                (parse_radius(text), 100 * at["value"])
                for text, at in found.items()
                if at["samples"] == table.num_rows  # fewer samples would be another accuracy
            ]
            if points:
                what = f"{run.recipe.name}: under attack"
                axes.plot(*zip(*points, strict=True), f"C{place}v", mfc="none", label=what)
    axes.set(
        xlabel="L2 radius, in pixels of [0, 1]", ylabel="accuracy, %", ylim=(0, 101), xlim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
