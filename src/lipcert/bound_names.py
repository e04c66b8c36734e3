"""The bounds by name, and which of them a name takes together."""

from enum import StrEnum

from lipcert.bounds import Bound, Eclipse, Ellipsoid, LipLT, Multipliers, Product, tightest
from lipcert.errors import LipcertError
from lipcert.graph import Graph


class BoundName(StrEnum):
    """Bounds by the name typed on the command line; the last ones hold around samples only."""

    AUTO = "auto"
    TIGHT = "tight"
    PRODUCT = "product"
    LIPLT = "liplt"
    ECLIPSE = "eclipse"
    ELLIPSOID = "ellipsoid"
    MULTIPLIERS = "multipliers"
    LOCAL_PRODUCT = "local-product"
    LOCAL_LIPLT = "local-liplt"
    LOCAL_ELLIPSOID = "local-ellipsoid"


GLOBAL = {
    BoundName.PRODUCT: Product,
    BoundName.LIPLT: LipLT,
    BoundName.ECLIPSE: Eclipse,
    BoundName.ELLIPSOID: Ellipsoid,
    BoundName.MULTIPLIERS: Multipliers,
}
"""The bounds that hold everywhere."""

GLOBAL_OF = {
    BoundName.LOCAL_PRODUCT: BoundName.PRODUCT,
    BoundName.LOCAL_LIPLT: BoundName.LIPLT,
    BoundName.LOCAL_ELLIPSOID: BoundName.ELLIPSOID,
}
"""The bounds around samples, each with what it is everywhere."""

LOCAL = tuple(GLOBAL_OF)


def members(name: BoundName, graph: Graph) -> list[BoundName]:
    """The bounds of which a name takes the tightest; of a single bound itself.

    `auto` has those that are cheap on this network, `tight` the search for multipliers too.
    """
    cheap = [BoundName.PRODUCT, BoundName.LIPLT]
    match name:
        case BoundName.AUTO:
            return [*cheap, BoundName.ELLIPSOID] if Ellipsoid(graph).is_cheap else cheap
        case BoundName.TIGHT:
            return [*cheap, BoundName.ECLIPSE, BoundName.ELLIPSOID, BoundName.MULTIPLIERS]
    return [name]


def make_bound(name: BoundName, graph: Graph) -> Bound:
    """The global bound of this name, with true norms.

    Raises:
        LipcertError: The name is that of a local bound.
    """
    if name in LOCAL:
        raise LipcertError(
            f"{name} holds in balls around samples: build it with a region, e.g. "
            "lc.Product(graph, region=lc.L2Ball(0.1))."
        )
    bounds = [GLOBAL[member](graph) for member in members(name, graph)]
    return bounds[0] if len(bounds) == 1 else tightest(*bounds)
