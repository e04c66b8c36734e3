"""Speed of the 1-Lipschitz layers beside plain ones, and those of deel-torchlip if installed.

    python benchmarks/layers.py

One thread, CPU time, all layers of a case in turns, the least of several rounds. A training call is
forward and backward in input and weights; an evaluating call is forward only, without gradients,
its transformed weight kept from the call before.

deel-torchlip has SpectralConv2d and SpectralLinear, our BjorckConv2d and BjorckLinear: a norm, at
most 15 steps of Bjorck's iteration, and for convolutions the same divisor. By default its iteration
ends once a step changes the matrix by less than 1e-3 (Frobenius norm); with eps_bjorck=0 it takes
15 steps always, as many as ours at most. Two differences stay: its norm is an estimate by one step
of power iteration a call, and its gradient leaves out a part of the derivative of all steps but the
first four. So the number of its steps depends on the weight. Cases are timed from the weights that
layers start with (orthogonal), and from normal ones.

It needs numpy 1, so it wants an environment of its own; without it its columns are left out:

    python3.11 -m venv deel && . deel/bin/activate
    pip install -c constraints.txt torch jaxtyping safetensors typer rich
    pip install "numpy<2" deel-torchlip && pip install --no-deps -e .
"""

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import save
from torch import Tensor, nn

from lipcert import layers

THEIRS = importlib.util.find_spec("deel") is not None
if THEIRS:
    import deel.torchlip as torchlip

ROUNDS, STEPS = 4, 50
OURS, DEFAULT, FIXED = "Bjorck", "deel-torchlip, its default", "deel-torchlip, 15 steps"


def best(calls: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """The least CPU time of each call, in turns, after two calls that warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round in range(rounds + 2):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            if round >= 2:
                seconds[name].append(time.process_time() - begin)
    return {name: min(times) for name, times in seconds.items()}


def over(seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Milliseconds, and how many times those of the plain layer."""
    return {
        name: {"ms": round(1e3 * s, 2), "over_plain": round(s / seconds["plain"], 3)}
        for name, s in seconds.items()
    }


def conv(kind: str, into: int, out: int, kernel: int, stride: int, padding: int) -> nn.Module:
    """A convolution: a plain one, ours or deel-torchlip's."""
    if kind == OURS:
        return layers.BjorckConv2d(into, out, kernel, stride, padding)
    if kind == "plain":
        return nn.Conv2d(into, out, kernel, stride, padding)
    eps = {} if kind == DEFAULT else {"eps_bjorck": 0.0}
    return torchlip.SpectralConv2d(into, out, kernel, stride, padding, **eps)


def dense(kind: str, into: int, out: int) -> nn.Module:
    """A dense layer: a plain one, ours or deel-torchlip's."""
    if kind == OURS:
        return layers.BjorckLinear(into, out)
    if kind == "plain":
        return nn.Linear(into, out)
    eps = {} if kind == DEFAULT else {"eps_bjorck": 0.0}
    return torchlip.SpectralLinear(into, out, **eps)


def kinds() -> tuple[str, ...]:
    """The kinds that `conv` and `dense` make here."""
    return ("plain", OURS, DEFAULT, FIXED) if THEIRS else ("plain", OURS)


def trained(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward, in the input and the weights."""
    x = x.clone().requires_grad_()
    layer.train()
    with torch.no_grad():
        gradient = torch.randn_like(layer(x))

    def call() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(gradient)

    return call


def evaluated(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Forward in eval mode."""
    layer.eval()
    return torch.no_grad()(lambda: layer(x))


def normal_weight(layer: nn.Module) -> nn.Module:
    """The layer with its free weight drawn from a normal distribution, of about norm 2."""
    weight = layer.get_parameter(
        "parametrizations.weight.original" if hasattr(layer, "parametrizations") else "weight"
    )
    with torch.no_grad():
        weight.normal_(0, weight[0].numel() ** -0.5)
    return layer


def case(make: Callable[[], dict[str, nn.Module]], x: Tensor) -> dict[str, object]:
    """All layers of a case, training and evaluating, then Bjorck's again from normal weights."""
    start = over(best({name: trained(layer, x) for name, layer in make().items()}))
    some = {name: normal_weight(layer) for name, layer in make().items() if name in kinds()}
    normal = over(best({name: trained(layer, x) for name, layer in some.items()}))
    calls = {}
    for name, layer in make().items():
        trained(layer, x)()  # deel-torchlip evaluates with the matrix of the last training call
        calls[name] = evaluated(layer, x)
    return {
        "training": start,
        "training_from_normal_weights": normal,
        "evaluating": over(best(calls)),
    }


def square(channels: int, side: int) -> dict[str, nn.Module]:
    """3 x 3 convolutions of as many channels in and out."""
    some = {name: conv(name, channels, channels, 3, 1, 1) for name in kinds()}
    return some | {
        "AOL": layers.AOLConv2d(channels, channels, 3, padding=1),
        "SLL": layers.SLLConv2d(channels),
        "CPL": layers.CPLConv2d(channels, (side, side)),
        "SOC": layers.SOCConv2d(channels, channels),
    }


def strided() -> dict[str, nn.Module]:
    """64 to 128 channels, stride 2."""
    some = {name: conv(name, 64, 128, 4, 2, 1) for name in kinds()}
    return some | {
        "AOL": layers.AOLConv2d(64, 128, 4, stride=2, padding=1),
        "SOC, 3 x 3": layers.SOCConv2d(64, 128, stride=2),
    }


def wide() -> dict[str, nn.Module]:
    """Dense layers of 1024 features."""
    some = {name: dense(name, 1024, 1024) for name in kinds()}
    return some | {
        "Cholesky": layers.CholeskyLinear(1024, 1024),
        "AOL": layers.AOLLinear(1024, 1024),
        "SLL": layers.SLLLinear(1024),
        "CPL": layers.CPLLinear(1024),
    }


def loop(kind: str, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Fifty steps of Adam on a net of four convolutions and a dense layer."""

    def run() -> None:
        torch.manual_seed(0)
        net = nn.Sequential(
            *(conv(kind, 3, 32, 3, 1, 1), nn.ReLU(), conv(kind, 32, 32, 4, 2, 1), nn.ReLU()),
            *(conv(kind, 32, 64, 3, 1, 1), nn.ReLU(), conv(kind, 64, 64, 4, 2, 1), nn.ReLU()),
            *(nn.Flatten(), dense(kind, 64 * (x.shape[-1] // 4) ** 2, 10)),
        )
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

    return run


def main() -> None:
    """Runs all cases."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, object] = {
        "deel-torchlip": importlib.metadata.version("deel-torchlip") if THEIRS else None,
        "conv 64-64, 3 x 3, batch 128, 16 x 16": case(
            lambda: square(64, 16), torch.randn(128, 64, 16, 16)
        ),
        "conv 128-128, 3 x 3, batch 128, 8 x 8": case(
            lambda: square(128, 8), torch.randn(128, 128, 8, 8)
        ),
        "conv 64-128, 4 x 4, stride 2, batch 128, 16 x 16": case(
            strided, torch.randn(128, 64, 16, 16)
        ),
        "dense 1024-1024, batch 256": case(wide, torch.randn(256, 1024)),
    }
    x, y = torch.randn(64, 3, 16, 16), torch.randint(0, 10, (64,))
    loops = {kind: loop(kind, x, y) for kind in kinds()}
    result["50 training steps, 4 convolutions, batch 64, 16 x 16"] = over(best(loops, 2))
    save("layers", result)


if __name__ == "__main__":
    main()
