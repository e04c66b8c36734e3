"""Singular vectors of single samples, kept from epoch to epoch."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipcert.errors import LipcertError


class SampleVectors:
    """Iterated vectors by the number of a sample in its data set, as a warm start of local norms.

    They are a cache and no state: nothing is saved in checkpoints, and a sample whose vectors are
    not here starts from those of the whole map. Where pictures are flipped or cropped at random,
    vectors belong to another view of the sample; they still are a start.

    Args:
        samples: How many samples there are.
        limit: Bytes that all vectors together may take. Samples with a number too large for it are
            not kept.
        where: A device to keep them on (the CPU by default), or a folder for files that are mapped
            into memory.
        dtype: Precision to keep them in.
    """

    def __init__(
        self,
        samples: int,
        limit: int = 2**30,
        where: torch.device | Path | None = None,
        dtype: torch.dtype = torch.float16,
    ):
        if samples < 1 or limit < 1:
            raise LipcertError(f"SampleVectors(samples={samples}, limit={limit}): needs both >= 1.")
        self.samples, self.limit, self.where, self.dtype = samples, limit, where, dtype
        self._kept: dict[str, Tensor] = {}
        self._known: dict[str, Tensor] = {}

    def prepare(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Makes room for vectors of these shapes by name; called by the bound that uses them."""
        bytes_each = self.dtype.itemsize * sum(math.prod(shape) for shape in shapes.values())
        self.capacity = min(self.samples, self.limit // max(1, bytes_each))
        for name, shape in shapes.items():
            size = (self.capacity, *shape)
            if isinstance(self.where, Path):
                self.where.mkdir(parents=True, exist_ok=True)
                path, count = self.where / f"{name}.bin", math.prod(size)
                self._kept[name] = torch.from_file(
                    str(path), shared=True, size=count, dtype=self.dtype
                ).view(size)
            else:
                self._kept[name] = torch.empty(size, dtype=self.dtype, device=self.where)
            self._known[name] = torch.zeros(self.capacity, dtype=torch.bool)

    def load(
        self, name: str, index: Int[Tensor, " b"], start: Float[Tensor, "b ..."]
    ) -> Float[Tensor, "b ..."]:
        """The vectors of the samples, `start` for those that have none.

        Raises:
            LipcertError: As many numbers as samples are needed, none of them negative.
        """
        index = _checked(index, len(start))
        inside = index < self.capacity
        inside &= self._known[name][index.where(inside, 0)] if self.capacity else inside
        if not inside.any():
            return start
        found = start.clone()
        places = inside.nonzero()[:, 0]
        rows = self._kept[name][index[places].to(self._kept[name].device)]
        found[places.to(start.device)] = rows.to(start)
        return found

    def store(self, name: str, index: Int[Tensor, " b"], rows: Float[Tensor, "b ..."]) -> None:
        """Keeps the vectors of the samples, as far as there is room.

        Raises:
            LipcertError: As for `load`.
        """
        index = _checked(index, len(rows))
        places = (index < self.capacity).nonzero()[:, 0]
        if len(places):
            kept = self._kept[name]
            kept[index[places].to(kept.device)] = rows[places.to(rows.device)].to(kept)
            self._known[name][index[places]] = True


def _checked(index: Int[Tensor, " n"], count: int) -> Int[Tensor, " n"]:
    if index.shape != (count,) or bool((index < 0).any()):
        raise LipcertError(
            f"index holds {index.tolist()[:5]}, in all {index.numel()} numbers, for {count} "
            "samples: give each sample's number in the data set, from 0."
        )
    return index.cpu()
