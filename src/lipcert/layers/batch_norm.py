"""BatchNorm that remembers the variance of its last mini-batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lipcert.errors import LipcertError


class RecordingBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that records the variance by which it divided its last training batch.

    What it computes is that of its base class; in eval mode it records nothing.

    Attributes:
        batch_var: The variance of the last batch it saw in training mode, with weight 1 / n as it
            is used there, `(channels,)`; differentiable in the batch. None before the first batch,
            and not part of the state that is saved.
    """

    batch_var: Tensor | None

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features, eps)
        self.register_buffer("batch_var", None, persistent=False)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalises a batch."""
        if self.training:
            wide = input.to(torch.promote_types(input.dtype, torch.float32))
            self.batch_var = wide.var((0, 2, 3), correction=0)
        return super().forward(input)


@contextmanager
def last_batch_variances(net: nn.Module) -> Iterator[None]:
    """While open, every `RecordingBatchNorm2d` of the net has its last batch's variance as its own.

    A graph of the net, which reads running statistics, then reads those of the batch, with their
    gradient. Afterwards the recorded variances are plain numbers, so that they keep no batch alive.

    Raises:
        LipcertError: The net has no such layer, or none of them has seen a batch in training.
    """
    layers = [m for m in net.modules() if isinstance(m, RecordingBatchNorm2d)]
    seen = [(layer, layer.running_var, layer.batch_var) for layer in layers]
    if not seen or any(batch is None for _, _, batch in seen):
        raise LipcertError(
            f"There is no batch variance in this {type(net).__name__}: it needs normalisations "
            "that are RecordingBatchNorm2d, and a batch through all of them in training mode."
        )
    try:
        for layer, _, batch in seen:
            layer.running_var = batch
        yield
    finally:
        for layer, running, batch in seen:
            layer.running_var = running
            layer.batch_var = None if batch is None else batch.detach()
