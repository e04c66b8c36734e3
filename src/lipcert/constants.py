"""One-liners: the spectral norm of a layer, the Lipschitz constant of a network."""

from torch import nn

from lipcert.bounds import Bound, Ellipsoid, LipLT, Product, tightest
from lipcert.errors import LipcertError
from lipcert.graph import Affine, Input
from lipcert.kinds import Constant
from lipcert.linear_map import Shape
from lipcert.spectral import Strategy
from lipcert.tracing import trace


def spectral_norm(module: nn.Module, input_shape: Shape, norm: Strategy | None = None) -> Constant:
    """The L2 operator norm of an affine layer, as the operator that it is on this input shape.

    Args:
        module: A layer or a sub-network that is affine: a convolution with its stride, padding,
            dilation and groups, a dense layer, conv + BatchNorm, pooling by averages ...
        input_shape: Shape of one input, without the batch.
        norm: A strategy; `Auto()`, a true upper bound, by default.

    Returns:
        The norm with what it claims, differentiable in the layer's weights.

    Raises:
        LipcertError: The module is not affine, or the strategy is for another norm than L2.
    """
    if norm is not None and norm.p != 2:
        raise LipcertError(
            f"norm={norm!r} is an l_{norm.p:g} operator norm, no spectral norm. Call it on a "
            "linear map, or use norm=lc.Auto()."
        )
    graph = trace(module, input_shape)
    others = sorted({type(n.op).__name__ for n in graph if not isinstance(n.op, Affine | Input)})
    if others:
        raise LipcertError(
            f"spectral_norm is for affine layers; this {type(module).__name__} holds other nodes "
            f"({', '.join(others)}). Use lc.lipschitz(net, input_shape) for a bound on its "
            "Lipschitz constant."
        )
    return Product(graph, norm).lipschitz()


def lipschitz(net: nn.Module, input_shape: Shape, norm: Strategy | None = None) -> Constant:
    """The least of the upper bounds on a network's Lipschitz constant that are cheap.

    Product, LipLT and, where it fits and no strategy is given, the ellipsoid bound; global, in L2,
    of the whole output vector.

    Args:
        net: Any module made of ops with a known rule.
        input_shape: Shape of one input, without the batch.
        norm: A strategy for the norms of maps; `Auto()`, true upper bounds, by default. With
            `RowSum()` or `ColumnSum()` the constant is for l-infinity or l1.

    Raises:
        LipcertError: The network holds ops without a rule, all listed; or NaN weights.
    """
    graph = trace(net, input_shape)
    graph.check(net)  # NaN weights would come out as a constant
    bounds: list[Bound] = [Product(graph, norm), LipLT(graph, norm)]
    if norm is None and (ellipsoid := Ellipsoid(graph)).is_cheap:
        bounds.append(ellipsoid)
    return tightest(*bounds).lipschitz()
