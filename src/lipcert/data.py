"""Labelled samples as one tensor: the embedded digits, the Hugging Face hub, folders, tensors."""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, Shaped, UInt8
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.moons import MOONS as MOONS
from lipcert.moons import two_moons
from lipcert.sources import DIGITS as DIGITS
from lipcert.sources import LAYOUT, decoded_images, read_splits

if TYPE_CHECKING:
    import datasets

_IMAGE_COLUMNS = ("image", "img", "pixel_values")
_LABEL_COLUMNS = ("label", "fine_label", "labels")  # coarse_label is another task: only on request


class Split(StrEnum):
    """The part of a data set that is wanted, whatever the data set itself calls it."""

    TRAIN = "train"
    EVALUATION = "test"


_SPLIT_NAMES = {Split.TRAIN: ("train",), Split.EVALUATION: ("test", "valid", "validation", "val")}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled pictures, decoded once and held in memory; or other inputs of a network.

    Attributes:
        images: pictures as stored: bytes 0..255, or floating-point pixels in [0, 1]; one channel
            for grey pictures, else three (red, green, blue). Other inputs: numbers of any shape.
        labels: index into `classes`, one per picture.
        classes: the names of the classes.
        source: where the data come from, as the user gave it.
        split: the name that the source gives this part ("validation", not the wish "test").
        limits: the range of every entry of a valid input; None if there is none.

    Raises:
        LipcertError: there are no pictures, or a label is outside the classes.
    """

    images: UInt8[Tensor, "n c h w"] | Float[Tensor, "n *shape"]
    labels: Int64[Tensor, "n"]
    classes: tuple[str, ...]
    source: str
    split: str
    limits: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self):
        where = f"data {self.source!r}, split {self.split!r}"
        if not len(self.images):
            raise LipcertError(f"{where} is empty; give data with at least one picture")
        outside = ((self.labels < 0) | (self.labels >= len(self.classes))).nonzero()
        if len(outside):
            row = int(outside[0])
            raise LipcertError(
                f"{where}: row {row} has the label {int(self.labels[row])}, outside the "
                f"{len(self.classes)} classes, which count from 0. A label of -1 marks hidden test "
                "labels: use a split whose labels are published"
            )

    def __len__(self) -> int:
        return len(self.images)

    def pixels(
        self,
        index: Int[Tensor, "b"] | Bool[Tensor, "n"] | slice = slice(None),
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "b *shape"]:
        """Gives pictures as a network's input: pixels in [0, 1], not normalised.

        Args:
            index: which rows, as for a tensor.
            device: where the result lies; by default where `images` lies.
            dtype: the floating-point type of the result.
        """
        rows = self.images[index].to(device=device)  # moved as bytes: a quarter of the traffic
        return rows.to(dtype) / 255 if rows.dtype == torch.uint8 else rows.to(dtype)

    def subset(self, index: Int[Tensor, "b"] | Bool[Tensor, "n"] | slice) -> "Dataset":
        """Keeps the rows of `index`, in its order; everything else stays."""
        return replace(self, images=self.images[index], labels=self.labels[index])


def load(
    source: str | Path,
    split: Split,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Dataset:
    """Reads one split of a data set and decodes its pictures.

    A split is grey (one channel) if each of its pictures is; otherwise all become RGB. The decoded
    pictures are kept beside the cache of the `datasets` library, so the next call is quick.
    Progress bars and log lines of that library are off during the call.

    Args:
        source: "digits" (embedded), "moons" (points of the plane), a local folder (parquet files in
            the hub's layout, or pictures as split/CLASS/x.png), or a hub id such as "ylecun/mnist",
            with the name of a configuration if there are several:
            "ufldl-stanford/svhn:cropped_digits". A folder that happens to be called digits is
            "./digits".
        split: which part; `Split.EVALUATION` takes the first of test, valid, validation, val.
        image_column: the column of pictures; by default image, img or pixel_values.
        label_column: the column of labels; by default label, fine_label or labels.

    Raises:
        LipcertError: the data cannot be found or read, the split or a column is missing, or its
            content does not fit: no pictures, several sizes, hidden labels.
    """
    if source == MOONS:
        n, seed = (2_000, 123) if split is Split.TRAIN else (20_000, 124)
        return Dataset(*two_moons(n, seed), ("outer", "inner"), MOONS, str(split), limits=None)
    splits = read_splits(source)
    name = next((name for name in _SPLIT_NAMES[split] if name in splits), None)
    if name is None:
        raise LipcertError(
            f"data {str(source)!r} has no split {' or '.join(_SPLIT_NAMES[split])}; it has: "
            f"{', '.join(splits)}. Name the files by split: {LAYOUT}"
        )
    where = f"data {str(source)!r}, split {name!r}"
    if not splits[name].num_rows:
        raise LipcertError(f"{where} is empty; give data with at least one picture")
    columns = splits[name].column_names
    image_column = _column(columns, image_column, _IMAGE_COLUMNS, "image_column", where)
    label_column = _column(columns, label_column, _LABEL_COLUMNS, "label_column", where)
    labels, classes = _labels(splits, name, label_column, where)
    images = decoded_images(splits[name], image_column, where)
    return Dataset(images, labels, classes, str(source), name)


def split_validation(data: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Holds out a random part of the training data, for choosing between models.

    The held-out part has round(fraction * n) pictures, and each class gives its share of them to
    within one picture. Every picture is as likely to be held out as any other. The same arguments
    always give the same parts; rows keep their order.

    Args:
        data: what to split.
        fraction: the part to hold out, strictly between 0 and 1.
        seed: of the choice.

    Returns:
        The rows to train on, and the rows held out.

    Raises:
        LipcertError: one of the two parts would be empty.
    """
    n = len(data)
    count = round(fraction * n) if 0 < fraction < 1 else 0
    if not 0 < count < n:
        raise LipcertError(
            f"a validation fraction of {fraction} holds out none or all of the {n} pictures of "
            f"data {data.source!r}; give a fraction between {1 / n:.3g} and {1 - 1 / n:.3g}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    by_class = order[data.labels.cpu()[order].argsort(stable=True)]
    # Evenly spaced on the circle of all pictures sorted by class, from a random start.
    chosen = torch.arange(count) * n // count + torch.randint(n, (), generator=generator)
    held = torch.zeros(n, dtype=torch.bool)
    held[by_class[chosen % n]] = True
    return data.subset(~held), data.subset(held)


def from_tensors(
    images: Shaped[Tensor, "..."],
    labels: Shaped[Tensor, "..."],
    classes: tuple[str, ...] | None = None,
) -> Dataset:
    """Makes a data set of tensors in memory; pixels are neither copied nor changed.

    Args:
        images: (n, c, h, w), either bytes 0..255 or floating-point pixels in [0, 1].
        labels: (n,), integers from 0.
        classes: the names; by default the numbers up to the largest label.

    Raises:
        LipcertError: the shapes or types do not fit, or a pixel is outside [0, 1] or not a number.
    """
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise LipcertError(
            f"images have the shape {tuple(images.shape)} and labels {tuple(labels.shape)}; give "
            "(n, c, h, w) and (n,), for instance images.reshape(n, 1, h, w)"
        )
    if images.is_floating_point():
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise LipcertError(
                f"images of type {images.dtype} have pixels outside [0, 1] or not a number; divide "
                "by the largest possible value, and keep the normalisation inside the model"
            )
    elif images.dtype != torch.uint8:
        raise LipcertError(f"images are of type {images.dtype}; give uint8, or floats in [0, 1]")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise LipcertError(f"labels are of type {labels.dtype}; give integers, as labels.long()")
    if classes is None:
        classes = tuple(map(str, range(int(labels.max()) + 1))) if len(labels) else ()
    return Dataset(images, labels.long(), classes, source="tensors", split="all")


def _column(
    columns: list[str], given: str | None, aliases: tuple[str, ...], option: str, where: str
) -> str:
    """Picks the column that was asked for, or the first alias that is there."""
    wanted = (given,) if given is not None else aliases
    for name in wanted:
        if name in columns:
            return name
    raise LipcertError(
        f"{where} has no column {' or '.join(map(repr, wanted))}; it has: {', '.join(columns)}. "
        f"Choose one of them with {option}="
    )


def _labels(
    splits: "dict[str, datasets.Dataset]", name: str, column: str, where: str
) -> tuple[Int64[Tensor, "n"], tuple[str, ...]]:
    """Gives the labels of a split and the names of the classes."""
    import datasets
    from pyarrow import compute

    feature = splits[name].features[column]
    if isinstance(feature, datasets.ClassLabel):
        classes = tuple(feature.names)
    elif isinstance(feature, datasets.Value) and "int" in feature.dtype:
        # Without names the classes are the numbers met in any split: one split may lack the last.
        largest = (compute.max(rows.data.column(column)).as_py() for rows in splits.values())
        classes = tuple(map(str, range(1 + max(-1 if top is None else top for top in largest))))
    else:
        raise LipcertError(
            f"{where}: the column {column!r} holds {feature}, not class numbers; turn it into a "
            "ClassLabel (datasets: class_encode_column), or choose another with label_column="
        )
    values = splits[name].data.column(column)
    if values.null_count:
        raise LipcertError(
            f"{where}: {values.null_count} of {len(values)} rows have no label; use a split whose "
            "labels are published, or remove these rows"
        )
    return torch.from_numpy(values.to_numpy().astype(np.int64)), classes
