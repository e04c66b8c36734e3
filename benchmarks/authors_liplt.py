"""LipLT as the CRM authors' public code computes it, to compare accuracy and time against.

Reference: arXiv 2310.00116; github.com/o4lc/CRM-LipLT, commit aadf1fa. This is their method in our
own words, checked against numbers that their code gave (tests/test_authors_liplt.py).

What comes out is an estimate: power iteration approaches every norm from below.

Two of its limits are theirs, and kept:

- The adjoint of a convolution is a transposed convolution that does not know the size of the input.
  Where a stride leaves rows over, (in + 2 padding - kernel) mod stride != 0, it returns a smaller
  image, and concatenating the two sizes raises RuntimeError.
- The gradient runs through every iteration of a call, so memory grows with the iterations.
"""

from collections.abc import Sequence
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mode(Enum):
    """Of which outputs the constant is taken."""

    GLOBAL = "the whole output"
    PER_CLASS = "each logit"
    PAIRWISE = "each difference of two logits"


class AuthorsLipLT:
    """The LipLT estimate of a sequence of convolutions, ReLUs, flattenings and dense layers.

    With N layers W_0 .. W_{N-1} that have weights, the estimates m_k of the constants of the
    sub-networks "input to pre-activation k" are

        m_k = 2^-k |W_k .. W_0| + sum over j = 1..k of 2^-(k-j+1) |W_k .. W_j| m_(j-1).

    Every norm |W_(s+t) .. W_s| has a vector of its own, kept between calls. The vectors of one
    start layer are one batch, and a sweep calls every layer once, with all chains that cross it.
    Per class and pairwise the last layer is taken exactly: its rows, or differences of rows, are
    enumerated and pushed through all adjoints.

    Attributes:
        m: The estimates m_k of the last call, of all layers (GLOBAL) or all but the last one.
        vectors: One batch per start layer s, (norms that start at s, *input shape of layer s).
    """

    def __init__(
        self,
        net: nn.Sequential,
        input_shape: Sequence[int],
        mode: Mode = Mode.PAIRWISE,
        starts: Sequence[Tensor] | None = None,
    ) -> None:
        """Records the shapes and draws the start vectors.

        Args:
            net: Its weights stay live. ReLU is assumed between any two layers with weights.
            input_shape: Shape of one input, without a batch.
            mode: Of which outputs the constant is taken.
            starts: The first `vectors`; standard normal and not normalised where absent.

        Raises:
            ValueError: A module is of another kind, or is a convolution with groups, dilation or
                a padding mode, which the authors' code would read as a plain one.
        """
        self.mode = mode
        self.layers: list[nn.Conv2d | nn.Linear] = []
        self.inputs: list[torch.Size] = []
        self.outputs: list[torch.Size] = []
        x = next(net.parameters()).new_zeros(1, *input_shape)
        for module in net:
            _check(module)
            shape, x = x.shape[1:], module(x)
            if isinstance(module, nn.Conv2d | nn.Linear):
                self.layers.append(module)
                self.inputs.append(shape)
                self.outputs.append(x.shape[1:])
        self.count = len(self.layers) - (mode is not Mode.GLOBAL)
        self.vectors = (
            [x.new_empty(self.count - s, *self.inputs[s]).normal_() for s in range(self.count)]
            if starts is None
            else list(starts)
        )
        self.m: list[Tensor] = []

    def __call__(self, iterations: int) -> Tensor:
        """Iterates on from the kept vectors.

        Args:
            iterations: Power iterations, each a sweep forward and one backward.

        Returns:
            The constant: () for GLOBAL, (K,) for PER_CLASS, (K, K) with zeros on the diagonal for
            PAIRWISE. Differentiable in the weights, through every iteration since `detach`.

        Raises:
            RuntimeError: A stride leaves rows of an image over.
        """
        for _ in range(iterations):
            back = self._backward(self._forward(self.vectors))
            self.vectors = [v / _lengths(v).view(-1, *[1] * (v.ndim - 1)) for v in back]
        self.m = []
        for k, ends in enumerate(self._forward(self.vectors)):
            norms = _lengths(ends)  # of W_k .. W_s, for s = 0..k
            terms = [norms[j] * self.m[j - 1] / 2 ** (k - j + 1) for j in range(1, k + 1)]
            self.m.append(norms[0] / 2**k + sum(terms))
        if self.mode is Mode.GLOBAL:
            return self.m[-1]
        unit = torch.eye(*self.outputs[-1]).to(self.vectors[0])
        if self.mode is Mode.PER_CLASS:
            return self._of_rows(unit)
        i, j = torch.triu_indices(*unit.shape, 1)
        upper = unit.new_zeros(unit.shape).index_put((i, j), self._of_rows(unit[i] - unit[j]))
        return upper + upper.T

    def detach(self) -> None:
        """Cuts the gradient's way into earlier calls; to be called after the optimiser's step."""
        self.vectors = [v.detach() for v in self.vectors]

    def _forward(self, vectors: list[Tensor]) -> list[Tensor]:
        """For each layer k the images W_k .. W_s v of the chains that end there, s = 0..k."""
        ends = []
        crossing = vectors[0].new_empty(0, self.count, *self.inputs[0])
        for i, starting in enumerate(vectors):  # crossing: (start layer, chain, *shape)
            crossing = crossing.reshape(i, self.count - i, *self.inputs[i])
            crossing = torch.cat([crossing, starting[None]])
            crossing = self._apply(i, crossing.flatten(0, 1)).unflatten(0, crossing.shape[:2])
            ends.append(crossing[:, 0])
            crossing = crossing[:, 1:]
        return ends

    def _backward(self, ends: list[Tensor]) -> list[Tensor]:
        """The adjoint chains, from what `_forward` returned, gathered by start layer."""
        vectors: list[Tensor] = []
        crossing = ends[-1][:, None]
        for i in reversed(range(self.count)):
            crossing = self._adjoint(i, crossing.flatten(0, 1)).unflatten(0, crossing.shape[:2])
            vectors.insert(0, crossing[i])
            if i:
                # Unlike a convolution, a dense layer may follow a flattening.
                if isinstance(self.layers[i], nn.Linear):
                    crossing = crossing.unflatten(2, self.outputs[i - 1])
                crossing = torch.cat([ends[i - 1][:, None], crossing[:i]], 1)
        return vectors

    def _of_rows(self, rows: Tensor) -> Tensor:
        """The constants (R,) of combinations of logits, given as `rows` (R, K)."""
        last, total = len(self.layers) - 1, rows.new_zeros(len(rows))
        for i in reversed(range(last + 1)):
            rows = self._adjoint(i, rows.reshape(-1, *self.outputs[i]))
            before = self.m[i - 1] / 2 if i else 1
            total = total + _lengths(rows) * before / 2 ** (last - i)
        return total

    def _apply(self, i: int, x: Tensor) -> Tensor:
        layer = self.layers[i]
        if isinstance(layer, nn.Linear):
            return F.linear(x, layer.weight)
        return F.conv2d(x, layer.weight, None, layer.stride, layer.padding)

    def _adjoint(self, i: int, y: Tensor) -> Tensor:
        layer = self.layers[i]
        if isinstance(layer, nn.Linear):
            return y @ layer.weight
        return F.conv_transpose2d(y, layer.weight, None, layer.stride, layer.padding)


def _lengths(batch: Tensor) -> Tensor:
    return batch.flatten(1).norm(dim=1)


def _check(module: nn.Module) -> None:
    if not isinstance(module, nn.Conv2d | nn.ReLU | nn.Flatten | nn.Linear):
        raise ValueError(f"only Conv2d, ReLU, Flatten and Linear, not {module}")
    if isinstance(module, nn.Conv2d) and (
        module.groups != 1
        or module.dilation != (1, 1)
        or module.padding_mode != "zeros"
        or isinstance(module.padding, str)
    ):
        raise ValueError(f"only a stride and a zero padding given in numbers, not {module}")
