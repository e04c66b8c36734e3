"""The count bound of convolutions: the norm of the kernel matrix times a count of windows."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lipcert.convolution import Conv
from lipcert.errors import LipcertError
from lipcert.kinds import Constant, Kind
from lipcert.linear_kinds import Dense, Index
from lipcert.linear_map import Composition, LinearMap
from lipcert.simplify import simplify
from lipcert.spectral.exact import Exact, without_isometries
from lipcert.spectral.fourier import as_convolution
from lipcert.spectral.strategy import Strategy


@dataclass(frozen=True)
class Count(Strategy):
    """||conv|| <= max over groups of ||W'|| times sqrt(the most windows that share a cell).

    A convolution is its kernel matrix W' (out x in kernel) applied to windows of the image; each
    row of that unfolding copies one cell, so its norm is the root of the largest number of
    (window, tap) pairs that read one cell, counted for the real size, stride, dilation and
    padding, padding by copies included. Cheap (one small matrix) and loose: 1.4 to 3 times for
    random 3 x 3 and 5 x 5 kernels, and more for wider ones.

    Reference: arXiv 1802.04034 (LMT), with counts in place of its formula.
    """

    kind: ClassVar[Kind] = Kind.UPPER

    def __call__(self, map: LinearMap) -> Constant:
        conv, copies = _parts(map)
        reads = _reads(conv)
        if copies is not None:
            reads = copies.adjoint(reads)
        matrices = conv.weight.reshape(conv.groups, -1, conv.weight[0].numel())
        norms = [Exact()(Dense((m.shape[1],), (len(m),), m)).value for m in matrices]
        return Constant(torch.stack(norms).max() * reads.max().sqrt(), self.kind)


def _parts(map: LinearMap) -> tuple[Conv, Index | None]:
    """A convolution with the norm of the map, and the padding by copies before it, if any."""
    conv = as_convolution(map)
    if conv is not None:
        return conv, None
    match without_isometries(simplify(map.to(torch.float64))):
        case Composition(factors=(Index() as copies, Conv() as conv)):
            return conv, copies
    raise LipcertError(
        f"Count() fits convolutions, not the map {map.in_shape} -> {map.out_shape}. Use "
        "norm=Auto()."
    )


def _reads(conv: Conv) -> Tensor:
    """How many (window, tap) pairs read each cell, `(1, *in_shape)`: the adjoint on ones."""
    every_tap = conv.weight.new_ones(conv.groups, *conv.weight.shape[1:])
    out_shape = (conv.groups, *conv.out_shape[1:])
    ones = replace(conv, weight=every_tap, out_shape=out_shape)
    with torch.no_grad():
        return ones.adjoint(every_tap.new_ones(1, *out_shape))
