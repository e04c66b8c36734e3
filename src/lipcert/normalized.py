"""Networks and blocks scaled by their own LipLT bound, so that their constant is given."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lipcert.bounds import LipLT
from lipcert.errors import LipcertError
from lipcert.graph import Affine, Node
from lipcert.linear_kinds import Scale
from lipcert.linear_map import Shape
from lipcert.rules import rule
from lipcert.spectral import LOBPCG
from lipcert.tracing import trace


class LipLTNormalized(nn.Module):
    """gamma / L times a network, L its LipLT constant: gamma-Lipschitz whatever its weights.

    In training mode L is an estimate that follows the weights, with singular vectors kept as
    buffers, and gradients go through it. In eval mode L is a true upper bound, computed when the
    weights have changed since it was last needed; then gamma is a Lipschitz constant of the output.
    To notice any change, a copy of the weights that L belongs to is kept.

    As LipLT lies below the product of the layers' norms, the weights are free to be larger than if
    each layer were normalised by itself.

    Args:
        net: Any network made of ops with a known rule.
        gamma: The Lipschitz constant (L2) to be had, output units per input unit.
        input_shape: Shape of one input; by default that of the first batch.

    Raises:
        LipcertError: gamma is not positive; ops without a rule; inputs of several shapes; layers
            replaced after the first call.

    Reference: arXiv 2310.00116 (layers with controllable Lipschitz bounds).
    """

    factor: Tensor

    def __init__(self, net: nn.Module, gamma: float = 1.0, input_shape: Shape | None = None):
        super().__init__()
        if not 0 < gamma < float("inf"):
            raise LipcertError(f"LipLTNormalized(gamma={gamma}): needs a positive finite number.")
        self.net = net
        self.gamma = gamma
        self.estimate: LipLT | None = None
        self._weights_of_factor: list[Tensor] | None = None
        like = next(net.parameters(), torch.zeros(()))
        self.register_buffer("factor", torch.zeros_like(like.detach().flatten()[:1]).squeeze(0))
        if input_shape is not None:
            self.estimate_of(tuple(input_shape))

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The scaled output."""
        estimate = self.estimate_of(tuple(x.shape[1:]))
        if self.training:
            return self.net(x) * self._factor(estimate.lipschitz().value)
        return self.net(x) * self.scale()

    def extra_repr(self) -> str:
        """The constant, for ``print(model)``."""
        return f"gamma={self.gamma:g}"

    def estimate_of(self, input_shape: Shape) -> LipLT:
        """The estimate of L; the network is traced when it is needed first."""
        if self.estimate is None:
            self.estimate = LipLT(trace(self.net, input_shape), norm=LOBPCG(1))
        elif input_shape != self.estimate.graph.input_shape:
            raise LipcertError(
                f"LipLTNormalized got an input of shape {input_shape}, but its constant is that "
                f"for inputs of shape {self.estimate.graph.input_shape}. Resize the inputs, or use "
                "one module for each shape."
            )
        return self.estimate

    def _factor(self, constant: Tensor) -> Tensor:
        constant = constant.where(constant > 0, 1)  # a constant network needs no scaling
        return (self.gamma / constant).to(self.factor)

    def scale(self) -> Float[Tensor, ""]:
        """Gamma / L with the true upper bound L, computed anew if a weight was written to since."""
        assert self.estimate is not None
        weights = [t.detach() for t in (*self.net.parameters(), *self.net.buffers())]
        if not _equal(weights, self._weights_of_factor):
            graph = self.estimate.graph
            graph.check(self.net)
            with torch.no_grad():
                self.factor = self._factor(LipLT(graph).lipschitz().value)
            self._weights_of_factor = [t.clone() for t in weights]
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in self.net.parameters()):
            return self.factor
        guess = self._factor(self.estimate.lipschitz().value)
        return self.factor * (guess / guess.detach())  # its value, with a gradient

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Vectors are there only after a first call, here and there: without them it keeps its own.
        own = {} if self.estimate is None else self.estimate.state_dict(prefix=f"{prefix}estimate.")
        for key in [key for key in state_dict if key.startswith(f"{prefix}estimate.")]:
            if key not in own or own[key].shape != state_dict[key].shape:
                del state_dict[key]
        for key, vectors in own.items():
            state_dict.setdefault(key, vectors)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self) -> dict[str, Any]:
        # Without the graph: it reads the weights of this module, and a copy has its own.
        state = self.__dict__ | {"_modules": self._modules | {"estimate": None}}
        del state["_weights_of_factor"]
        kept = None
        if self.estimate is not None:
            kept = self.estimate.graph.input_shape, self.estimate.state_dict()
        return state | {"_kept": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = state.pop("_kept")
        super().__setstate__(state | {"_weights_of_factor": None})
        if kept is not None:
            input_shape, vectors = kept
            self.estimate_of(input_shape).load_state_dict(vectors)


def _equal(tensors: list[Tensor], others: list[Tensor] | None) -> bool:
    """Whether all values are the same; version counters would miss writes to `weight.data`."""
    if others is None or len(tensors) != len(others):
        return False
    return all(
        (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)
        for a, b in zip(tensors, others, strict=True)
    )


@rule(LipLTNormalized)
def _normalized(module: LipLTNormalized, x: Node) -> Node:
    """The network's own nodes and a scaling, so that an outer bound can be tighter than gamma."""
    nodes = module.estimate_of(x.shape).graph.nodes
    copies = {nodes[0]: x}
    for n in nodes[1:]:
        copies[n] = Node(n.op, tuple(copies[i] for i in n.inputs), n.shape, n.name)
    shape = nodes[-1].shape
    scaling = Affine(lambda: Scale(shape, shape, module.scale()))
    return Node(scaling, (copies[nodes[-1]],), shape)


class Block(nn.Module):
    """skip(x) + out(activation(inner(x))), the residual block h(x) = H x + G phi(W x)."""

    def __init__(
        self,
        inner: nn.Module,
        out: nn.Module,
        skip: nn.Module,
        activation: Callable[[], nn.Module],
    ):
        super().__init__()
        self.inner, self.out, self.skip = inner, out, skip
        self.activation = activation()

    def forward(self, x):  # no annotations: tracing calls it with stand-ins for tensors
        """The block."""
        return self.skip(x) + self.out(self.activation(self.inner(x)))


def normalized_block(
    inner: nn.Module,
    out: nn.Module,
    skip: nn.Module | None = None,
    activation: Callable[[], nn.Module] = nn.ReLU,
    gamma: float = 1.0,
) -> LipLTNormalized:
    """A residual block h(x) = H x + G phi(W x) divided by |H + c G W| + d |G| |W|, times gamma.

    c and d are half the sum and half the difference of the steepest and flattest slopes of phi.

    Args:
        inner: W, an affine layer.
        out: G, an affine layer back to the shape of H x.
        skip: H, an affine layer; the identity by default.
        activation: Called without arguments for phi.
        gamma: The Lipschitz constant of the block.
    """
    return LipLTNormalized(Block(inner, out, skip or nn.Identity(), activation), gamma)
