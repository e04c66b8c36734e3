"""The section of a report that shows sample images with their radii."""

from collections.abc import Iterable

import numpy as np

from lipcert.data import Dataset
from lipcert.report import wording
from lipcert.report.figures import thumbnail
from lipcert.report.markup import Html, join, rounded_down, tag
from lipcert.report.results import Results

_PICTURES = 6  # in each group


def images(r: Results, data: Dataset | str) -> Html:
    """Samples with large, middling and small radii, and wrong ones; or why there are none."""
    if isinstance(data, Dataset) and not _are_those(r, data):
        data = "No images here: the data found now are not those that were certified."
    if isinstance(data, str):
        return tag("p", data, class_="note")
    order = np.argsort(r.radius, kind="stable")
    proved = order[r.right[order] & (r.radius[order] > 0)]
    middle = max(0, (len(proved) - _PICTURES) // 2)
    adjective = wording.adjective(r.summary.kind)
    groups = {
        f"Largest {adjective} radius": proved[::-1],
        "Around the median": proved[middle:],
        f"Right, smallest {adjective} radius": proved,
        "Wrong, largest radius first": order[~r.right[order]][::-1],
    }
    shown = (
        tag("div", tag("p", tag("strong", title)), _group(r, data, members[:_PICTURES].tolist()))
        for title, members in groups.items()
    )
    note = "Label → prediction, and below it the radius, rounded down."
    return join(tag("p", note, class_="note"), tag("div", *shown, class_="groups"))


def _are_those(r: Results, data: Dataset) -> bool:
    same = np.array_equal(data.labels.numpy(), r.label) and data.split == r.summary.split
    return same and set(r.prediction.tolist()) <= set(range(len(data.classes)))


def _group(r: Results, data: Dataset, members: Iterable[int]) -> Html:
    figures = []
    for i in members:
        caption = f"{data.classes[r.label[i]]} → {data.classes[r.prediction[i]]}"
        sample = data.pixels(slice(i, i + 1))[0].numpy()
        name = tag("b", caption, class_="good" if r.right[i] else "wrong")
        words = tag("figcaption", name, tag("br"), rounded_down(float(r.radius[i])))
        if sample.ndim == 3:
            picture = tag("img", src=thumbnail(sample), alt=caption)
        else:
            picture = tag("code", ", ".join(f"{v:.3g}" for v in sample.flat[:4]))
        figures.append(tag("figure", picture, words))
    return tag("div", *figures, class_="pictures") if figures else tag("p", "None.", class_="note")
