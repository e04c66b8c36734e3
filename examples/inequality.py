"""Draw LMT's inequality for a run: certificate <= sampled constants <= smallest perturbation.

    lipcert attack runs/a --inequality --samples 200
    python examples/inequality.py runs/a --out inequality.png

Only the lowest line is proved. The two in the middle divide margins by slopes that were seen, so
they are estimates; the highest is the distance of a misclassified point that an attack found.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lipcert.attacking import read_inequality
from lipcert.run import open_run

LABELS = {
    "certified": "certified",
    "sampled_global": "by the largest slope seen anywhere (no certificate)",
    "sampled_local": "by the largest slope seen nearby (no certificate)",
    "smallest_perturbation": "smallest perturbation found",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("inequality.png"))
    arguments = parser.parse_args()
    found = read_inequality(open_run(arguments.run))
    order = np.argsort(found.certified)
    figure = Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, label in LABELS.items():
        axes.plot(getattr(found, name)[order], label=label, linewidth=1)
    axes.set(xlabel="test images, by certified radius", ylabel="L2 radius, in pixels of [0, 1]")
    axes.set(xlim=(0, len(order) - 1), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
