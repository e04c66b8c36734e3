"""Norms of parts of a map, sample by sample: of diag(rows) A diag(columns).

Around one input some activations are constant, which takes rows and columns out of the maps beside
them. With weights of at most 1 the norm of A itself is always a bound.

The Gram matrices of the samples differ little: G = A A^T is formed once, rows are masked in G, and
columns are either taken out of it, G - A_Z A_Z^T, or those that stay are summed, A_K A_K^T,
whichever are fewer. Taking out cancels: where little is left the sum is used after all.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind, weakest
from lipcert.linear_kinds import Index, Scale
from lipcert.linear_map import LinearMap, Matrix
from lipcert.simplify import simplify
from lipcert.spectral.auto import Auto
from lipcert.spectral.exact import LARGEST_SIDE, Exact, closed_form, nonzero
from lipcert.spectral.iterative import Iterative
from lipcert.spectral.lanczos import Lanczos, gram_product, largest_ritz, random_starts
from lipcert.spectral.strategy import Strategy, wants_gradient

# Up to this smaller side Auto takes eigenvalues for every sample: about 0.1 s each at 1024.
AUTO_SIDE = 1024
_CHUNK_BYTES = 2**25  # what fits the caches is faster than what is allocated anew
_LANCZOS_BYTES = 2**28
_COLUMNS = 1024  # columns that are gathered at a time
_CANCELLED = 1e-4  # of the trace of G: below it the rounding of G is no longer negligible


def masked_norms(
    norm: Strategy, map: LinearMap, columns: Tensor | None, rows: Tensor | None, whole: Constant
) -> Constant:
    """The norms of diag(rows_b) A diag(columns_b), one a sample, with what they claim.

    `Exact` takes eigenvalues for each sample, `Auto` too where the smaller side of the map is at
    most `AUTO_SIDE`; `Lanczos` runs on all samples at once, each with a start of its own. Other
    strategies, and `Auto` elsewhere, say `whole`. What is fixed a call (the matrix of the map, its
    Gram matrix) is worth many samples at a time.

    Args:
        norm: The strategy; none that iterates vectors.
        map: A.
        columns: Weights in [0, 1] for the inputs, `(b, *in_shape)`; constants. None: all ones.
        rows: Weights in [0, 1] for the outputs, `(b, *out_shape)`; constants. None: all ones.
        whole: The norm of A: the answer where all weights are 1, and never exceeded if it is a
            true bound.

    Returns:
        Values of shape `(b,)` in float64, differentiable in the weights of the map; 0 where all
        rows or all columns are 0. The failure probability is that of all samples together.

    Raises:
        LipcertError: The strategy iterates vectors, which belong to a bound; no weights at all; or
            the matrix is too large for `Exact`.
    """
    if isinstance(norm, Iterative):
        raise LipcertError(
            f"masked_norms(norm={norm!r}): its vectors are kept by the bound that iterates them. "
            "Use that bound, or norm=Auto() or Lanczos() for norms of single samples."
        )
    masks = [mask for mask in (columns, rows) if mask is not None]
    if not masks:
        raise LipcertError("masked_norms: pass columns, rows or both; without, `whole` is the norm")
    map = simplify(map.to(torch.float64))
    device = map.like.device if map.tensors() else masks[0].device
    ends = ((columns, map.in_shape), (rows, map.out_shape))
    columns, rows = (
        torch.ones(1, dtype=torch.float64, device=device).expand(len(masks[0]), *shape)
        if mask is None
        else mask.detach().to(device, torch.float64)
        for mask, shape in ends
    )
    flat = columns.flatten(1), rows.flatten(1)
    zero = (flat[0] == 0).all(1) | (flat[1] == 0).all(1)
    untouched = (flat[0] == 1).all(1) & (flat[1] == 1).all(1)
    limit = whole.value.to(device, torch.float64)
    value = limit * ~zero
    rest = (~zero & ~untouched).nonzero()[:, 0]
    part = _part_norms(norm, map, columns[rest], rows[rest]) if len(rest) else None
    if part is None:
        return Constant(value, whole.kind, whole.failure)
    capped = torch.minimum(part.value, limit) if whole.kind is Kind.UPPER else part.value
    used = [part, whole] if untouched.any() else [part]
    failure = min(1.0, sum(constant.failure for constant in used))
    return Constant(value.index_copy(0, rest, capped), weakest(c.kind for c in used), failure)


def _part_norms(norm: Strategy, map: LinearMap, columns: Tensor, rows: Tensor) -> Constant | None:
    """The norms that a strategy finds; None where it takes the norm of the whole map."""
    side = min(map.in_size, map.out_size)
    with torch.no_grad():
        closed = closed_form(map)
    match norm:
        case Auto() if side > AUTO_SIDE or closed is not None:
            return None
        case Lanczos() if side > norm.steps and closed is None:
            return _by_lanczos(norm, map, columns, rows)
        case Exact() | Auto() | Lanczos():
            return Constant(_exact(map, columns, rows), Kind.UPPER)
        case _:
            return None


# ---------------------------------------------------------------- exact


def _exact(map: LinearMap, columns: Tensor, rows: Tensor) -> Float[Tensor, " b"]:
    # Each row of these reads one input, so that columns are orthogonal whatever the weights.
    match map:
        case Scale():
            return (map.apply(columns) * rows).flatten(1).abs().amax(1)
        case Index():
            return (map.adjoint(rows.square()).sqrt() * columns).flatten(1).amax(1)
    if map.in_size * map.out_size > LARGEST_SIDE**2:
        raise LipcertError(
            f"Exact() needs the {map.out_size} x {map.in_size} matrix of the map {map.in_shape} -> "
            f"{map.out_shape} for the norms of its parts, more than its limit of "
            f"{LARGEST_SIDE}^2 entries. Use norm=Auto(), which takes the norm of the whole map."
        )
    wanted = wants_gradient(map)
    with torch.no_grad():
        matrix = _matrix(map).to(columns)
        scale = nonzero(matrix.abs().max())  # NaN or infinite, it spoils every sample
        sides = (rows.flatten(1), columns.flatten(1))
        on_input = map.in_size <= map.out_size
        left, right = reversed(sides) if on_input else sides
        values, vectors = _largest((matrix.mT if on_input else matrix) / scale, left, right, wanted)
    if vectors is None:
        return scale * values
    return _differentiable(scale * values, map, vectors, columns, rows)


def _matrix(map: LinearMap) -> Float[Tensor, "out in"]:
    """The matrix of a map, by as few applications as its smaller side."""
    if isinstance(map, Matrix):
        return map.weight
    return map.dense() if map.in_size <= map.out_size else map.T.dense().mT


def _differentiable(
    values: Tensor, map: LinearMap, vectors: Tensor, columns: Tensor, rows: Tensor
) -> Tensor:
    """The values with the gradients at unit singular vectors on the smaller side of the map."""
    if map.in_size <= map.out_size:
        image = rows * map.apply(columns * vectors.reshape(columns.shape))
    else:
        image = columns * map.adjoint(rows * vectors.reshape(rows.shape))
    norms = torch.linalg.vector_norm(image.flatten(1), dim=1)
    return values + (norms - norms.detach())


def _largest(
    matrix: Float[Tensor, "m n"],
    rows: Float[Tensor, "b m"],
    columns: Float[Tensor, "b n"],
    vectors: bool,
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b m"] | None]:
    """The largest singular values of the masked matrix, and left singular vectors if wanted."""
    values = matrix.new_zeros(len(rows))
    lefts = matrix.new_zeros(len(rows), len(matrix)) if vectors else None

    def solve(samples: Tensor, turned: bool, gram: Tensor | None) -> None:
        ends = (columns[samples], rows[samples]) if turned else (rows[samples], columns[samples])
        for some, top, vector in _eigen(matrix.mT if turned else matrix, *ends, gram, vectors):
            at = samples[some]
            values[at] = top
            if lefts is not None and vector is not None:
                lefts[at] = _image(matrix, rows[at], columns[at], vector) if turned else vector

    kept = (columns != 0).sum(1)
    turned = kept < (rows != 0).sum(1)
    few = ~turned & ((columns != 1).sum(1) < kept)
    if few.any():
        gram = matrix @ matrix.mT
        solve(few.nonzero()[:, 0], False, gram)
        few &= values.square() >= _CANCELLED * gram.trace()
    solve((~turned & ~few).nonzero()[:, 0], False, None)
    solve(turned.nonzero()[:, 0], True, None)
    return values, lefts


def _image(matrix: Tensor, rows: Tensor, columns: Tensor, vectors: Tensor) -> Tensor:
    """The left singular vectors that belong to right ones."""
    image = rows * ((columns * vectors) @ matrix.mT)
    return image / nonzero(torch.linalg.vector_norm(image, dim=1, keepdim=True))


def _eigen(
    matrix: Float[Tensor, "m n"],
    rows: Float[Tensor, "b m"],
    columns: Float[Tensor, "b n"],
    gram: Float[Tensor, "m m"] | None,
    vectors: bool,
) -> Iterator[tuple[Int[Tensor, " k"], Float[Tensor, " k"], Float[Tensor, "k m"] | None]]:
    """Chunks of samples with their largest singular values and left singular vectors.

    Args:
        matrix: The matrix.
        rows: Weights of its rows.
        columns: Weights of its columns.
        gram: The Gram matrix to start from, if columns are to be taken out of it.
        vectors: Whether vectors are wanted.
    """
    if not len(rows):
        return
    weights = columns.square() if gram is None else columns.square() - 1
    sizes = (rows != 0).sum(1)
    side = int(sizes.max())
    chunk = max(1, _CHUNK_BYTES // (8 * side * (3 * side + 2 * min(_COLUMNS, matrix.shape[1]))))
    transposed = matrix.mT.contiguous()
    for samples in sizes.argsort().split(chunk):  # those of about one size together
        at, weight = _places(rows[samples]), rows[samples]
        kept = weight.gather(1, at)
        total = _gram(transposed, at, weights[samples], gram)
        total *= kept[:, :, None]
        total *= kept[:, None, :]
        # Eigenvalue routines may raise or never return on what is not finite.
        finite = total.flatten(1).sum(1).isfinite()
        total[~finite] = 0
        if vectors:
            eigenvalues, basis = torch.linalg.eigh(total)
            left = torch.zeros_like(weight).scatter(1, at, basis[:, :, -1])
        else:
            eigenvalues, left = torch.linalg.eigvalsh(total), None
        yield samples, eigenvalues[:, -1].clamp(min=0).sqrt().where(finite, torch.nan), left


def _places(weights: Float[Tensor, "k n"]) -> Int[Tensor, "k s"]:
    """The places of the weights that are not 0, filled up with places of weights that are."""
    wanted = (weights != 0).to(torch.int8)
    most = int(wanted.sum(1).max())
    return wanted.argsort(dim=1, descending=True, stable=True)[:, :most]


def _gram(
    transposed: Float[Tensor, "n m"],
    at: Int[Tensor, "k s"],
    weights: Float[Tensor, "k n"],
    gram: Float[Tensor, "m m"] | None,
) -> Float[Tensor, "k s s"]:
    """The Gram matrix with A diag(weights) A^T added, the rows of each sample only."""
    if gram is None:
        total = transposed.new_zeros(len(at), at.shape[1], at.shape[1])
    else:
        total = gram[at[:, :, None], at[:, None, :]]
    for places in _places(weights).split(_COLUMNS, 1):
        part = transposed[places[:, :, None], at[:, None, :]]
        total.baddbmm_((part * weights.gather(1, places)[:, :, None]).mT, part)
    return total


# ---------------------------------------------------------------- Lanczos


def _by_lanczos(norm: Lanczos, map: LinearMap, columns: Tensor, rows: Tensor) -> Constant:
    side = min(map.in_size, map.out_size)
    floats = norm.steps * (side + norm.steps) + 2 * (map.in_size + map.out_size)
    chunk = max(1, _LANCZOS_BYTES // (8 * floats))
    values, vectors = [columns.new_zeros(0)], [columns.new_zeros(0, side)]
    with torch.no_grad():
        for begin in range(0, len(columns), chunk):
            ends = columns[begin : begin + chunk], rows[begin : begin + chunk]
            product, shape = gram_product(map, *ends)
            ritz, top = largest_ritz(
                product, random_starts(len(ends[0]), shape, columns), norm.steps
            )
            values.append(norm.inflated(ritz, side))
            vectors.append(top.flatten(1))
    value = torch.cat(values)
    if wants_gradient(map):
        value = _differentiable(value, map, torch.cat(vectors), columns, rows)
    failure = min(1.0, len(columns) * norm.failure)
    return Constant(value, norm.kind, failure)
