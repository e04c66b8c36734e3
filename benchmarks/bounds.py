"""Global bounds side by side: dense ReLU nets of growing depth, and two convolutional ones.

    python benchmarks/bounds.py

The constant of the logit vector, and the largest of the nine pairs with the first class. Two lower
bounds: the largest norm found over slopes of 0 and 1, which no bound that knows only the slopes
can be below (dense nets), and the largest Jacobian norm at samples, which no bound can be below.
LipSDP (the extra `sdp`) runs where there are at most 80 neurons.
"""

import importlib.util
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import save
from torch import Tensor, nn

import lipcert as lc
from lipcert.adversary import lower_bound

CLASSES = 10
PAIR = "largest pair of the first class"
SMALL = 80
"""Neurons up to which each pair has a program or a search of its own."""


@dataclass(frozen=True)
class Case:
    """A network and where its Jacobians are sampled."""

    net: nn.Module
    samples: Tensor
    steps: int = 100


def dense(inputs: int, width: int, depth: int) -> nn.Sequential:
    """Dense layers with ReLUs between them, with He's initialisation."""
    sizes = [inputs, *[width] * depth, CLASSES]
    layers = [m for i, o in itertools.pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
    net = nn.Sequential(*layers[:-1]).double()
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight)
    return net


def random(width: int, depth: int) -> Case:
    inputs = min(width, 64)
    return Case(dense(inputs, width, depth), torch.randn(200, inputs).double())


def orthogonal(width: int, depth: int) -> Case:
    case = random(width, depth)
    for layer in case.net[::2]:
        nn.init.orthogonal_(layer.weight)
    return case


def trained(width: int, depth: int, penalty: float = 0.0) -> Case:
    """On the embedded digits, with a penalty on the layers' spectral norms above 1."""
    data = lc.data.load("digits", lc.data.Split.TRAIN)
    x, y = data.pixels(dtype=torch.float64).flatten(1), data.labels
    net = dense(x.shape[1], width, depth)
    adam = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(300):
        loss = F.cross_entropy(net(x) * (10 if penalty else 1), y)
        if penalty:
            norms = torch.stack([torch.linalg.matrix_norm(m.weight, 2) for m in net[::2]])
            loss = loss + penalty * (norms - 1).clamp(min=0).square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return Case(net, x[:200])


def image(net: nn.Module, shape: tuple[int, ...], steps: int) -> Case:
    return Case(net, torch.rand(50, *shape), steps)


CASES: dict[str, Callable[[], Case]] = {
    "He 20x2": lambda: random(20, 2),
    "He 20x4": lambda: random(20, 4),
    "He 20x8": lambda: random(20, 8),
    "He 64x5": lambda: random(64, 5),
    "He 128x5": lambda: random(128, 5),
    "He 128x8": lambda: random(128, 8),
    "orthogonal 128x5": lambda: orthogonal(128, 5),
    "trained 20x4": lambda: trained(20, 4),
    "trained 64x5": lambda: trained(64, 5),
    "trained 128x8": lambda: trained(128, 8),
    "norm-regularised 128x5": lambda: trained(128, 5, penalty=300.0),
    "LMT's net, random": lambda: image(lc.models.lmt_mnist(), (1, 28, 28), 100),
    "6C2F, random": lambda: image(lc.models.c6f2_bcp((3, 32, 32), CLASSES), (3, 32, 32), 10),
}


@torch.no_grad()
def over_patterns(net: nn.Sequential, rows: Tensor, starts: int = 64, rounds: int = 20) -> float:
    """The largest norm of rows of the logits found over slopes of 0 and 1.

    For the best vectors of a pattern, layer by layer the best slopes; then the vectors again.
    """
    first, *rest = [m.weight for m in net[::2]]
    rest[-1] = rows @ rest[-1]
    slopes = [torch.randint(2, (starts, w.shape[1])).to(first) for w in rest]
    best = 0.0
    for _ in range(rounds):
        whole = first.expand(starts, *first.shape)
        for w, d in zip(rest, slopes, strict=True):
            whole = w @ (d[:, :, None] * whole)
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        best = max(best, float(values.max()))
        back = [left[:, :, 0] @ rest[-1]]  # what reads each function's output
        for w, d in zip(rest[-2::-1], slopes[:0:-1], strict=True):
            back.append((back[-1] * d) @ w)
        at = right[:, 0] @ first.mT
        for k, (w, read) in enumerate(zip(rest, back[::-1], strict=True)):
            slopes[k] = (read * at > 0).to(at)
            at = (slopes[k] * at) @ w.mT
    return best


@torch.no_grad()
def sampled(case: Case, rows: Tensor) -> float:
    """The largest Jacobian norm of rows of the logits at the samples."""
    f = lambda x: case.net(x) @ rows.mT.to(x)  # noqa: E731
    return float(lower_bound(f, case.samples, 30, torch.Generator().manual_seed(0)).max())


def evaluated(make: Callable[[], object]) -> dict[str, object]:
    """The constants of a bound, and the CPU time for both."""
    begin = time.process_time()
    with torch.no_grad():
        bound = make()
        with bound.held():
            whole = bound.lipschitz()
            pairs = bound().row(torch.tensor([0]))[0, 1:]
    seconds = time.process_time() - begin
    return {
        "kind": str(whole.kind),
        "lipschitz": float(whole),
        PAIR: float(pairs.max()),
        "mean pair of the first class": float(pairs.mean()),
        "CPU seconds": round(seconds, 2),
    }


def compared(case: Case) -> dict[str, object]:
    """All bounds of a network, and what they cannot be below."""
    graph = lc.trace(case.net.eval(), tuple(case.samples.shape[1:]))
    makes: dict[str, Callable[[], object]] = {
        "Product": lambda: lc.Product(graph),
        "LipLT": lambda: lc.LipLT(graph),
        "Eclipse": lambda: lc.Eclipse(graph),
        "Ellipsoid": lambda: lc.Ellipsoid(graph),
        f"Multipliers(steps={case.steps})": lambda: lc.Multipliers(graph, steps=case.steps),
    }
    dense = isinstance(case.net, nn.Sequential) and case.samples.ndim == 2
    if dense and sum(m.out_features for m in case.net[:-1:2]) <= SMALL:
        makes["Multipliers(pairwise=True)"] = lambda: lc.Multipliers(graph, pairwise=True)
        if importlib.util.find_spec("clarabel"):
            makes["LipSDP"] = lambda: lc.LipSDP(graph)
    found: dict[str, object] = {name: evaluated(make) for name, make in makes.items()}
    eye = torch.eye(CLASSES)
    for name, rows in (("lipschitz", eye), (PAIR, eye[:1] - eye[1:])):
        each = [rows] if name == "lipschitz" else list(rows.split(1))
        below = {"sampled": max(sampled(case, r) for r in each)}
        if dense:
            below["slopes of 0 and 1"] = max(over_patterns(case.net, r.double()) for r in each)
        found[f"not below, {name}"] = below
    return found


def shown(name: str, found: dict[str, object]) -> None:
    """One network, a line for each bound."""
    print(name)
    for bound, said in found.items():
        numbers = [f"{k} {v:.5g}" for k, v in said.items() if isinstance(v, float)]
        print(f"  {bound:28}", ", ".join(numbers), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    results = {}
    for name, make in CASES.items():
        torch.manual_seed(1)
        results[name] = compared(make())
        shown(name, results[name])
    save("bounds", {"what": "constants of the logit vector and of pairs of logits", **results})


if __name__ == "__main__":
    main()
