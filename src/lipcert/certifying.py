"""Certifying predictions in batches, after what could make certificates untrue is checked."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lipcert.bounds import Bound, MarginConstants
from lipcert.certificate import Certificate, Claim, from_logits
from lipcert.errors import LipcertError
from lipcert.graph import Graph
from lipcert.kinds import Kind, weakest


def certify(
    net: nn.Module,
    x: Float[Tensor, "n ..."],
    *,
    bound: Bound,
    constants: MarginConstants | None = None,
    batch_size: int = 512,
    bisections: int = 0,
    allow_estimate: bool = False,
    on_batch: Callable[[int], object] | None = None,
) -> Certificate:
    """Certify the predictions of a network.

    The network runs in eval mode (its mode is restored), in batches, with TF32 and autocast off.
    A global bound is evaluated once.

    Args:
        net: The network that `bound` was traced from.
        x: Inputs `(n, *input_shape)`, in the units in which radii are wanted (pixels in [0, 1]:
            normalisation belongs inside the network).
        bound: A bound of this network.
        constants: What a global bound gave for the weights as they are now, if it was evaluated
            before.
        batch_size: Samples at a time.
        bisections: How often a local bound is evaluated again in balls of other radii, around each
            sample its own, to find the largest one that it proves. Radii never shrink by it.
        allow_estimate: Accept a bound of kind estimate. What comes out is then no certificate,
            and its `kind` says so.
        on_batch: Called with the number of samples done after each batch (for progress bars).

    Raises:
        LipcertError: The bound is an estimate; it was traced from another network, or the network
            changed since; NaN weights; wrong shape or precision of the inputs.
    """
    if not isinstance(bound, Bound):
        raise LipcertError(
            f"bound={bound!r:.60} is no bound; give e.g. lc.Product(lc.trace(net, input_shape))."
        )
    bound.graph.check(net)
    _check_inputs(bound, x, batch_size, bisections)
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with torch.no_grad(), _ieee_float32(_like(net, x).device.type):
            if constants is None and not bound.local:
                constants = bound()
            if constants is not None:
                _check_kind(constants.kind, allow_estimate)
            parts = []
            _check_function(net, bound.graph, x[:_COMPARED])
            with bound.held():
                for batch in x.split(batch_size):
                    here = bound(batch) if constants is None else constants
                    _check_kind(here.kind, allow_estimate)
                    logits = net(batch.to(_like(net, batch)))
                    part = from_logits(logits, here)
                    parts.append(_bisected(part, logits, bound, batch, bisections))
                    if on_batch is not None:
                        on_batch(sum(len(p) for p in parts))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return _joined(parts, bound.local)


def _bisected(
    certificate: Certificate, logits: Tensor, bound: Bound, x: Tensor, bisections: int
) -> Certificate:
    """The certificate after more passes, in larger balls until one fails, then in between."""
    if not bound.local:
        return certificate
    failed = torch.full_like(certificate.radius, math.inf)
    for _ in range(bisections):
        proved = certificate.radius.where(certificate.radius.isfinite(), 0)
        wider = torch.maximum(2 * proved, certificate.claims[-1].valid_radius)
        eps = wider.where(failed.isinf(), (proved + failed) / 2)
        trial = from_logits(logits, bound(x, eps=eps))
        failed = failed.where(trial.radius >= eps, eps)
        certificate = _better(certificate, trial)
    return certificate


def _better(a: Certificate, b: Certificate) -> Certificate:
    """For each sample the certificate of the larger radius."""
    second = b.radius > a.radius
    claims = tuple(
        Claim(
            old.constants.where(~second[:, None], new.constants),
            old.drops.where(~second[:, None], new.drops),
            old.valid_radius.where(~second, new.valid_radius),
        )
        for old, new in zip(a.claims, b.claims, strict=True)
    )
    return dataclasses.replace(
        a,
        radius=torch.maximum(a.radius, b.radius),
        failure=min(1.0, a.failure + b.failure),
        claims=claims,
    )


def _check_kind(kind: Kind, allow_estimate: bool) -> None:
    if kind is Kind.ESTIMATE and not allow_estimate:
        raise LipcertError(
            "The bound is an estimate, made for training: its norms are iterated from below, or it "
            "is computed in float32. It proves nothing. Certify with the same bound without norm= "
            "and every=, e.g. lc.LipLT(graph) or lc.Ellipsoid(graph), or pass allow_estimate=True; "
            "every result then says 'estimate'."
        )


_COMPARED = 4  # samples at which network and graph are compared


def _check_function(net: nn.Module, graph: Graph, x: Float[Tensor, "n ..."]) -> None:
    """Raises LipcertError unless the graph computes what the network does, on a few samples.

    Settings that a module does not print, forwards that were replaced and hooks that hold for all
    modules change the network without a trace in its modules.
    """
    x = x.to(_like(net, x))
    for part in (x, x[:1]):  # alone too: a network may look at the size of the batch
        values, theirs = graph.values(part), net(part)
        apart = (values[graph.output] - theirs).abs().flatten(1).amax(1)
        size = values[graph.output].abs().flatten(1).amax(1)
        inside = max(float(v.abs().max()) for v in values.values())
        # Far more than rounding, also of what may have cancelled inside; false for NaN.
        if bool((apart > 1e-2 * size + 1e-5 * inside).any()):
            raise LipcertError(
                f"The network does not compute what was traced: an output differs by "
                f"{float(apart.max()):.3g}. It changed since, or it is not what its modules say (a "
                "replaced forward, a global hook). Trace it again: lc.trace(net, input_shape)."
            )


def _check_inputs(bound: Bound, x: Tensor, batch_size: int, bisections: int) -> None:
    if not isinstance(x, Tensor):
        raise LipcertError(
            f"The inputs are a {type(x).__name__}; give a tensor: torch.as_tensor(x)."
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise LipcertError(
            f"batch_size={batch_size}: a whole number, at least one sample at a time."
        )
    if not isinstance(bisections, int) or bisections < 0:
        raise LipcertError(f"bisections={bisections}: needs a whole number >= 0.")
    if tuple(x.shape[1:]) != bound.graph.input_shape:
        raise LipcertError(
            f"The inputs have shape {tuple(x.shape)}; the bound was traced for (n, "
            f"{', '.join(map(str, bound.graph.input_shape))})."
        )
    if not x.is_floating_point():
        raise LipcertError(
            f"The inputs are {x.dtype}; certify in the units of the network's input, e.g. pixels "
            "in [0, 1]: x.float() / 255."
        )
    if len(x) == 0:
        raise LipcertError("There are no samples to certify.")
    weights = [p.dtype for p in bound.graph.model.parameters() if p.is_floating_point()]
    bad = {t for t in weights if t not in (torch.float32, torch.float64)}
    if bad:
        raise LipcertError(
            f"The network's weights are {', '.join(map(str, bad))}; certify in float32 or float64 "
            "(net.float()): margins in half precision are not those that the bound speaks of."
        )


def _like(net: nn.Module, x: Tensor) -> Tensor:
    """A tensor with the precision and device that the network computes in."""
    weights = itertools.chain(net.parameters(), net.buffers())
    return next((t for t in weights if t.is_floating_point()), x)


@contextlib.contextmanager
def _ieee_float32(device: str) -> Iterator[None]:
    """Float32 as it is: no TF32, no bfloat16 products, no autocast."""
    precision = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions


def _joined(parts: list[Certificate], local: bool) -> Certificate:
    def cat(name: str, found: Sequence[object]) -> Tensor:
        return torch.cat([getattr(part, name) for part in found])

    kind = weakest(part.kind for part in parts)
    # A global bound was computed once for all parts; local ones anew for each: a union bound.
    failures = [part.failure for part in parts]
    failure = min(1.0, sum(failures)) if local else failures[0]
    claims = tuple(
        Claim(*(cat(name, same) for name in ("constants", "drops", "valid_radius")))
        for same in zip(*(part.claims for part in parts), strict=True)
    )
    return Certificate(
        *(cat("prediction", parts), cat("radius", parts), kind, failure),
        *(cat("margins", parts), claims, parts[0].p),
    )
