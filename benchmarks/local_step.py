"""Cost of a Local-Lip training step beside a plain one and one of the authors' scheme.

    python benchmarks/local_step.py

4C3F with clipped ReLU on 28 x 28 pixels, batch 256, one thread, forward and backward, CPU time; the
largest of the peaks of memory is of the whole process. Then the last layer's worst case alone for
10, 100 and 200 classes.
"""

import resource
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from authors_local_lip import AuthorsLocalLip, gloro_loss
from common import save

import lipcert as lc
from lipcert import losses, models
from lipcert.bounds.ball_box import ball_box
from lipcert.layers import ClippedReLU

BATCH, EPS, ROUNDS = 256, 1.58, 5


def cpu_seconds(step: Callable[[], object]) -> float:
    """CPU time of one call."""
    begin = time.process_time()
    step()
    return time.process_time() - begin


def peak() -> float:
    """The largest memory the process had so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Times the steps in turns, so that what else runs meets all of them alike."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = models.c4f3_bcp((1, 28, 28), 10, activation=ClippedReLU)
    graph = lc.trace(net, (1, 28, 28))
    x, y = torch.rand(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))

    def plain() -> None:
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()

    def ours(bound: lc.Product) -> None:
        net.zero_grad()
        rows = bound(x, EPS).within(y, EPS)
        losses.local_lip(net(x), y, rows, EPS).backward()

    def local(iterations: int) -> Callable[[], None]:
        norm = lc.PowerIteration(iterations)
        bound = lc.Product(graph, norm=norm, region=lc.L2Ball(EPS))
        return lambda: ours(bound)

    bcp = lc.Product(graph, norm=lc.PowerIteration(1), region=lc.L2Ball(EPS), masked=())
    steps = {
        "plain": plain,
        "BCP": lambda: ours(bcp),
        "Local-Lip, 2 iterations": local(2),
        "Local-Lip, 5 iterations": local(5),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = {}
    for name, step in steps.items():
        step()
        peaks[name] = peak()
    for _ in range(ROUNDS):
        for name, step in steps.items():
            seconds[name].append(cpu_seconds(step))
    authors = AuthorsLocalLip(net, EPS, 2, 1)

    def theirs() -> None:
        net.zero_grad()
        gloro_loss(authors(x), y).backward()

    result = {name: min(times) for name, times in seconds.items()}
    theirs()
    result["the authors' scheme, 2 iterations"] = min(cpu_seconds(theirs) for _ in range(2))
    peaks["the authors' scheme, 2 iterations"] = peak()
    classes = {}
    for c in (10, 100, 200):
        w = torch.randn(32, c, 256)
        end = torch.rand(32, 256)
        classes[c] = min(
            cpu_seconds(lambda w=w, end=end: ball_box(w, -end, end, torch.ones(32)))
            for _ in range(3)
        )
    table = {
        "cpu_seconds": result,
        "over_plain": {name: value / result["plain"] for name, value in result.items()},
        "peak_gb": peaks,
        "worst_case_seconds_by_classes": classes,
    }
    save("local_step", table)


if __name__ == "__main__":
    main()
