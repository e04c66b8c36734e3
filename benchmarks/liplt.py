"""What LipLT costs: against a plain re-statement of its authors' scheme, and in a training step.

1. Forward and backward of all pairs on CRM's 6C2F at equal iterations: CPU seconds, the two schemes
   taking turns.
2. The same at equal error: both follow the weights of one training on CIFAR-10 with warm vectors;
   every few steps their pair constants are compared with converged ones.
3. CPU seconds against depth, 6 to 20 layers.
4. A training step of CRM at batch 256 against the plain step.

    python benchmarks/liplt.py --data DIR [--steps 300]
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from authors_liplt import AuthorsLipLT
from common import RESULTS, save
from torch import nn

import lipcert as lc
from lipcert.data import Split

SHAPE = (3, 32, 32)
ITERATIONS = (1, 2, 5, 10, 20, 40)
OURS = {
    "PowerIteration(1)": lc.PowerIteration(1),
    "PowerIteration(5)": lc.PowerIteration(5),
    "LOBPCG(1)": lc.LOBPCG(1),
    "LOBPCG(2)": lc.LOBPCG(2),
    "LOBPCG(3)": lc.LOBPCG(3),
}
DEPTHS = (6, 8, 10, 12, 14, 16, 18, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    iterations = equal_iterations()
    training = along_training(options.data, options.steps)
    save(
        "liplt",
        {
            "net": "c6f2_crm, all 45 pairs, forward and backward, float32, CPU seconds",
            "equal iterations": iterations,
            "along a training": training,
            "equal error": equal_error(iterations, training["mean relative error"]),
            "depth": depth(),
            "training step, batch 256": training_step(),
        },
    )


def taking_turns(*runs: Callable[[], object], pairs: int = 9) -> list[list[float]]:
    """CPU seconds of each run, one after the other, so that a drifting machine hits all."""
    for run in runs:
        run()
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(pairs):
        for run, found in zip(runs, seconds, strict=True):
            begin = time.process_time()
            run()
            found.append(time.process_time() - begin)
    return seconds


def ours_of(net: nn.Module, norm: lc.spectral.Strategy, shape=SHAPE) -> Callable[[], None]:
    bound = lc.LipLT(lc.trace(net, shape), norm=norm)

    def run() -> None:
        net.zero_grad()
        bound().dense().sum().backward()

    return run


def theirs_of(net: nn.Sequential, iterations: int, shape=SHAPE) -> Callable[[], None]:
    bound = AuthorsLipLT(net, shape)

    def run() -> None:
        net.zero_grad()
        bound(iterations).sum().backward()
        bound.detach()

    return run


def equal_iterations() -> dict:
    torch.manual_seed(1)
    net = lc.models.c6f2_crm(in_shape=SHAPE, classes=10)
    found = {}
    for n in ITERATIONS:
        runs = theirs_of(net, n), ours_of(net, lc.PowerIteration(n))
        theirs, ours = taking_turns(*runs)
        ratios = [t / o for t, o in zip(theirs, ours, strict=True)]
        found[str(n)] = {
            "authors": round(statistics.median(theirs), 4),
            "ours": round(statistics.median(ours), 4),
            "ratio": round(statistics.median(ratios), 2),
        }
        print(n, found[str(n)], flush=True)
    names = list(OURS)
    seconds = taking_turns(*(ours_of(net, OURS[name]) for name in names))
    found["ours"] = {n: round(statistics.median(s), 4) for n, s in zip(names, seconds, strict=True)}
    return found


def along_training(source: str, steps: int) -> dict:
    """Mean relative error of the pair constants while a net trains with CRM."""
    torch.manual_seed(1)
    data = lc.data.load(source, Split.TRAIN)
    net = lc.models.c6f2_crm(in_shape=SHAPE, classes=10)
    graph = lc.trace(net, SHAPE)
    ours = {name: lc.LipLT(graph, norm) for name, norm in OURS.items()}
    theirs = {n: AuthorsLipLT(net, SHAPE) for n in ITERATIONS}
    converged = lc.LipLT(graph, lc.LOBPCG(30))
    optimiser = torch.optim.Adam(net.parameters(), 1e-3, eps=1e-7)
    off = ~torch.eye(10, dtype=torch.bool)
    errors: dict[str, list[float]] = {}
    for step in range(steps):
        with torch.no_grad():
            values = {f"authors {n}": bound(n) for n, bound in theirs.items()}
            values |= {name: bound().dense()[0] for name, bound in ours.items()}
            if step % 20 == 19:
                truth = converged().dense()[0]
                for name, value in values.items():
                    error = ((truth - value) / truth)[off].mean()
                    errors.setdefault(name, []).append(float(error))
        index = torch.randint(len(data), (128,))
        x, y = data.pixels(index), data.labels[index]
        logits = net(x)
        row = ours["LOBPCG(2)"]().row(logits.argmax(1))
        loss = lc.losses.crm(logits, y, row, 0.2, t=5.0, weight=15.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    means = {name: sum(found) / len(found) for name, found in errors.items()}
    return {"steps": steps, "mean relative error": {n: round(e, 5) for n, e in means.items()}}


def equal_error(iterations: dict, errors: dict[str, float]) -> dict:
    """The authors' seconds at the error of each of ours, between their iterations, over ours."""
    theirs = [(errors[f"authors {n}"], iterations[str(n)]["authors"]) for n in ITERATIONS]
    found = {}
    for name in OURS:
        seconds = _interpolated(errors[name], theirs)
        ratio = None if seconds is None else round(seconds / iterations["ours"][name], 2)
        found[name] = {"error": errors[name], "seconds": iterations["ours"][name], "ratio": ratio}
    return found


def _interpolated(error: float, points: list[tuple[float, float]]) -> float | None:
    """Seconds at an error, on straight lines between points of log(error) and log(seconds)."""
    for (e0, s0), (e1, s1) in itertools.pairwise(points):
        if e1 <= error <= e0:
            share = math.log(e0 / error) / math.log(e0 / e1)
            return math.exp(math.log(s0) + share * math.log(s1 / s0))
    return None


def deep_net(layers: int) -> nn.Sequential:
    """Convolutions of 32 channels on 16 x 16 cells and a dense layer, ReLU in between."""
    parts: list[nn.Module] = [nn.Conv2d(3, 32, 3, 1, 1), nn.ReLU()]
    for _ in range(layers - 2):
        parts += [nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(32 * 256, 10))


def depth() -> dict:
    shape = (3, 16, 16)
    rows = []
    for layers in DEPTHS:
        torch.manual_seed(0)
        net = deep_net(layers)
        runs = (
            theirs_of(net, 5, shape),
            ours_of(net, lc.PowerIteration(5), shape),
            ours_of(net, lc.LOBPCG(1), shape),
        )
        row = [statistics.median(s) for s in taking_turns(*runs, pairs=5)]
        rows.append([layers, *(round(s, 4) for s in row)])
        print(rows[-1], flush=True)
    names = "authors, 5 iterations", "ours, PowerIteration(5)", "ours, LOBPCG(1)"
    exponents = {name: _exponent(rows, i + 1) for i, name in enumerate(names)}
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for i, name in enumerate(names):
        label = f"{name}: depth^{exponents[name]}"
        axis.loglog([r[0] for r in rows], [r[i + 1] for r in rows], "o-", label=label)
    axis.set(xlabel="layers", ylabel="CPU seconds, forward + backward")
    axis.set_xticks(DEPTHS, [str(d) for d in DEPTHS])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="small")
    figure.savefig(RESULTS / "liplt_depth.png", dpi=150)
    return {"columns": ["layers", *names], "seconds": rows, "exponent": exponents}


def _exponent(rows: list[list[float]], column: int) -> float:
    """Slope of log(seconds) against log(layers), least squares."""
    x = [math.log(row[0]) for row in rows]
    y = [math.log(row[column]) for row in rows]
    return round(statistics.linear_regression(x, y).slope, 2)


def training_step() -> dict:
    torch.manual_seed(0)
    net = lc.models.c6f2_crm(in_shape=SHAPE, classes=10)
    graph = lc.trace(net, SHAPE)
    optimiser = torch.optim.Adam(net.parameters(), 1e-4)
    x, y = torch.rand(256, *SHAPE), torch.randint(10, (256,))
    norms = lc.PowerIteration(5), lc.LOBPCG(1), lc.LOBPCG(2)
    bounds = [None, *(lc.LipLT(graph, norm) for norm in norms)]

    def step(bound: lc.LipLT | None) -> None:
        logits = net(x)
        if bound is None:
            loss = F.cross_entropy(logits, y)
        else:
            row = bound().row(logits.argmax(1))
            loss = lc.losses.crm(logits, y, row, 0.2, t=5.0, weight=15.0)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    plain, *others = taking_turns(*(lambda b=b: step(b) for b in bounds), pairs=7)
    return {
        "plain, CPU seconds": round(statistics.median(plain), 3),
        **{
            f"CRM with {norm} / plain": round(
                statistics.median(s / p for s, p in zip(seconds, plain, strict=True)), 3
            )
            for norm, seconds in zip(norms, others, strict=True)
        },
    }


if __name__ == "__main__":
    main()
