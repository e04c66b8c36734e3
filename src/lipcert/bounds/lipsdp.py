"""LipSDP by a solver, for small networks: its multipliers, and what they prove."""

import functools
import importlib
import math
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lipcert.bounds.chain import chain, lazily, values_within
from lipcert.bounds.ellipsoid import Ellipsoid
from lipcert.bounds.extent import Extent, Moving, through_map, through_slopes
from lipcert.bounds.margin import MarginConstants, evaluating
from lipcert.bounds.sweep import Facts
from lipcert.bounds.tail import matrix_of, rows_of, tail
from lipcert.bounds.tightest import least, tightest_pairs
from lipcert.errors import LipcertError
from lipcert.graph import Affine, Graph, Node, Slope
from lipcert.kinds import Constant
from lipcert.linear_map import Matrix

NEURONS = 500
"""More take a solver hours."""


class LipSDP(Ellipsoid):
    """LipSDP with one multiplier a neuron, solved by clarabel: what `Multipliers` is judged by.

    For chains of affine layers and elementwise functions of at most 500 neurons. A solver's value
    is right up to its tolerance only and is never reported: its multipliers are, as any are, a
    proof by the recursion of `Ellipsoid`, and that is the bound; or what `Ellipsoid` gives by
    itself, where that is less. The logit vector, each logit and each pair have a program of
    their own, those of pairs solved when they are asked for. There are no gradients.

    Args:
        graph: A traced network.

    Raises:
        LipcertError: cvxpy or clarabel is missing, or the network is larger or of other kinds.

    Reference: arXiv 1906.04893 (LipSDP-Neuron), here for any slopes.
    """

    def __init__(self, graph: Graph):
        _cvxpy()
        super().__init__(graph)
        nodes = chain(graph.output)
        if nodes is None:
            raise LipcertError(
                "LipSDP takes affine layers and elementwise functions one after the other; this "
                "network has others or joins. lc.Multipliers(graph) takes any."
            )
        neurons = sum(math.prod(n.shape) for n in nodes if isinstance(n.op, Slope))
        if neurons > NEURONS or not values_within([graph.nodes[0], *nodes], 4 * NEURONS):
            raise LipcertError(
                f"LipSDP takes at most {NEURONS} neurons and {4 * NEURONS} inputs; this network "
                f"has {neurons} and {math.prod(graph.input_shape)}. "
                "lc.Multipliers(graph) takes any."
            )

    def per_output(
        self,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """Lipschitz constants of the single logits, see `Bound`."""
        with torch.no_grad():
            closed, (facts, nodes, rows) = super().per_output(), self._last()
            found = torch.stack([_proved(facts, nodes, row[None]) for row in rows])
            return least([closed, Constant(found, closed.kind)])

    def prefix(
        self,
        upto: Node | str,
        x: Float[Tensor, "b ..."] | None = None,
        eps: float | Float[Tensor, " b"] | None = None,
    ) -> Constant:
        """A Lipschitz constant of the function from the input to a node, see `Bound`."""
        target = self.graph.node(upto) if isinstance(upto, str) else upto
        with evaluating(self.graph), torch.no_grad():
            closed, facts = super().prefix(target), self._facts()
            (map, source), *_ = tail(target)
            nodes = chain(source)
            assert nodes is not None
            found = _proved(facts, nodes, rows_of(map, source))
            return least([closed, Constant(found, closed.kind)])

    def _margins(self) -> MarginConstants:
        with torch.no_grad():
            closed, (facts, nodes, rows) = super()._margins(), self._last()

        def of(i: int, j: int) -> Tensor:
            return _proved(facts, nodes, rows[i : i + 1] - rows[j : j + 1])

        row = lazily(self.classes, of)
        return tightest_pairs([closed, MarginConstants(row, self.classes, closed.kind)])

    def _last(self) -> tuple[Facts, list[Node], Float[Tensor, "classes n"]]:
        """The chain up to the node that the logits are affine in, and their rows."""
        with evaluating(self.graph):
            (map, source), *_ = tail(self.graph.output)
            nodes = chain(source)
            assert nodes is not None
            return self._facts(), nodes, rows_of(map, source)


@dataclass(frozen=True)
class _Layer:
    """An elementwise function after an affine map of norm about 1.

    Attributes:
        node: The function.
        map: The matrix of the map, divided by a number.
        power: The product of these numbers up to here.
        low: The least slopes.
        high: The greatest slopes.
    """

    node: Node
    map: Float[Tensor, "n m"]
    power: float
    low: Float[Tensor, " n"]
    high: Float[Tensor, " n"]


def _layers(facts: Facts, nodes: list[Node]) -> list[_Layer]:
    found: list[_Layer] = []
    map, power = torch.eye(math.prod(facts.graph.input_shape)).to(facts.one), 1.0
    for n in nodes:
        if isinstance(n.op, Affine):
            map = matrix_of(facts.maps[n]) @ map
            continue
        norm = float(torch.linalg.matrix_norm(map.nan_to_num(), 2)) or 1.0
        power *= norm
        found.append(_Layer(n, map / norm, power, *facts.slopes[n]))
        map = torch.eye(math.prod(n.shape)).to(facts.one)
    return found


def _given(gains: Tensor, moving: Moving) -> Tensor:
    return gains


@torch.no_grad()
def _proved(facts: Facts, nodes: list[Node], rows: Float[Tensor, "k n"]) -> Tensor:
    """What the solver's multipliers prove of rows of the last node, by the steps of `Ellipsoid`."""
    layers = _layers(facts, nodes)
    if not layers or not all(bool(m.isfinite().all()) for m in (rows, *(s.map for s in layers))):
        return facts.one * math.inf  # there the closed form says all
    gains = _solved(layers, rows)
    at = Extent(facts.one, kind=facts.kind)
    for n in nodes:
        if isinstance(n.op, Affine):
            at = through_map(at, facts.maps[n])
        else:
            low, high = facts.slopes[n]
            own = gains[n][high > low] / at.scale.square()
            at = through_slopes(at, low, high, None, functools.partial(_given, own))
    map = Matrix((rows.shape[1],), (len(rows),), rows)
    return through_map(at, map).radius().value


def _solved(layers: list[_Layer], rows: Float[Tensor, "k n"]) -> dict[Node, Tensor]:
    """Multipliers G of all neurons, by the solver.

    With T >= 0 and |psi_i| <= |z_i|, psi = (y - c z) / r: the least rho for which

        rho |x|^2 - |R y_last|^2 - sum over layers of z^T T z - psi^T T psi

    is never negative, as a matrix in the inputs of the layers; then G = rho / T. Here t = T / r^2.
    """
    cp = _cvxpy()
    rows = rows / (torch.linalg.matrix_norm(rows, 2) or 1.0)
    rho, blocks, numbers = cp.Variable(), {}, []
    sizes = [layers[0].map.shape[1], *(len(layer.map) for layer in layers)]
    blocks[0, 0] = rho * np.eye(sizes[0])
    for k, layer in enumerate(layers, 1):
        half = (layer.high - layer.low) / 2
        c, a = ((layer.low + layer.high) / 2).numpy(), layer.map.numpy()
        # Without a range t would be infinite; a range too large only makes the program harder.
        r = half.clamp(min=1e-3 * float(torch.maximum(half, half.new_tensor(abs(c))).max())).numpy()
        t = cp.Variable(sizes[k], nonneg=True)
        numbers.append((t, r))
        blocks[k, k] = cp.diag(t)
        blocks[k - 1, k] = -a.T @ cp.diag(cp.multiply(c, t))
        blocks[k, k - 1] = blocks[k - 1, k].T
        if (abs(c) != r).any():
            blocks[k - 1, k - 1] += a.T @ cp.diag(cp.multiply(c**2 - r**2, t)) @ a
    blocks[len(layers), len(layers)] -= rows.mT.numpy() @ rows.numpy()
    every = range(len(sizes))
    whole = cp.bmat(
        [[blocks.get((i, j), np.zeros((sizes[i], sizes[j]))) for j in every] for i in every]
    )
    problem = cp.Problem(cp.Minimize(rho), [(whole + whole.T) / 2 >> 0])
    problem.solve(solver="CLARABEL")
    if rho.value is None:
        raise LipcertError(
            f"clarabel found no multipliers ({problem.status}); take lc.Multipliers(graph)."
        )
    found = {}
    for layer, (t, r) in zip(layers, numbers, strict=True):
        multipliers = torch.as_tensor(t.value * r**2).clamp(
            min=1e-12 * float((t.value * r**2).max())
        )
        found[layer.node] = layer.power**2 * float(rho.value) / multipliers
    return found


def _cvxpy() -> ModuleType:
    try:
        importlib.import_module("clarabel")
        return importlib.import_module("cvxpy")
    except ImportError as error:
        raise LipcertError(
            f'LipSDP needs a solver ({error}). Install the extra: pip install "lipcert[sdp]". '
            "lc.Multipliers(graph) is about as tight and needs none."
        ) from None
