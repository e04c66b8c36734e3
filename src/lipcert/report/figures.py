"""The pictures of a report: SVG that takes its colours from the page, and thumbnails."""

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from lipcert.inequality import RADII, Inequality
from lipcert.radii import parse_radius
from lipcert.report.markup import Html, tag
from lipcert.report.results import Results
from lipcert.train import Epoch

# Colours are placeholders: each becomes a variable of the style sheet, which knows light and dark.
_INK, _MUTED, _LINE = "#000001", "#000002", "#000003"
_SERIES = ("#000011", "#000012", "#000013", "#000014", "#000015", "#000016")
_VARIABLES = {_INK: "ink", _MUTED: "muted", _LINE: "line"} | {
    colour: f"series-{i + 1}" for i, colour in enumerate(_SERIES)
}
_DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (2, 1.5), (6, 1.5, 1.5, 1.5))
_WIDTH = 1.6  # of lines, in points
_TEXT = 8.5  # points; a little more than this in pixels once the page has scaled the figure
_FILLED = 500  # points along the edge of the filled part
_CLOSEST = 0.07  # of the axis: closer ones would overlap
_FAR = 8  # times as far: more than a linear axis can show


def _style(index: int) -> dict[str, Any]:
    """The line of a run: twelve runs are told apart, four of them without colour."""
    colour, dashes = _SERIES[index % len(_SERIES)], _DASHES[index % len(_DASHES)]
    return {"color": colour, "dashes": dashes or (None, None), "linewidth": _WIDTH}


def curve_figure(runs: Sequence[Results], radii: Sequence[str]) -> Html:
    """Certified accuracy against the radius, one line a run, attacks as triangles.

    Args:
        runs: The runs, in the order of their colours.
        radii: Radii as text, marked on the upper edge.
    """
    marks = {parse_radius(text): text for text in radii}
    attacked = [
        {parse_radius(text): found.value for text, found in run.attack.strongest().items()}
        for run in runs
    ]
    finite = [run.radius[run.right & np.isfinite(run.radius)] for run in runs]
    ends = [float(r.max()) for r in finite if len(r)]
    asked = [parse_radius(text) for run in runs for text in run.summary.cra]
    end = 1.04 * max([*ends, *asked, *(eps for at in attacked for eps in at)])
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    ax = _axes(figure, 111, "L2 radius, in input units", "accuracy, %")
    for index, (run, radius, at) in enumerate(zip(runs, finite, attacked, strict=True)):
        x = [0.0, *np.sort(radius), end]
        left = int(run.right.sum()) - np.arange(len(radius) + 1)  # right, with at least this radius
        y = 100 * np.append(left, left[-1]) / len(run.label)
        style = _style(index)
        ax.plot(x, y, drawstyle="steps-post", **style)
        if len(runs) == 1:
            thin = slice(None, None, 1 + len(x) // _FILLED)  # the line hides what this leaves out
            ax.fill_between(x[thin], y[thin], step="post", color=style["color"], alpha=0.1, lw=0)
        if at:
            shares = [100 * value for value in at.values()]
            triangles = ax.scatter(list(at), shares, s=40, marker="v", clip_on=False)
            triangles.set(facecolor="none", edgecolor=style["color"], linewidth=1.4)
    _mark(ax, marks, end)
    ax.set(xlim=(0, end), ylim=(0, 101))
    return _inline(figure, "Certified accuracy against the L2 radius")


def inequality_figure(inequality: Inequality) -> Html:
    """The four radii of each sample, in the order of the certified one.

    On a log scale where the smallest perturbation is far from the certificate.
    """
    order = np.argsort(inequality.certified, kind="stable")
    order = order[:: 1 + len(order) // _FILLED]
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    ax = _axes(figure, 111, "images, by certified radius, %", "L2 radius, in input units")
    x = 100 * (np.arange(len(order)) + 1) / len(order)
    if inequality.ratios()[f"{RADII[-1]} / {RADII[0]}"] > _FAR:
        ax.set_yscale("log")
    for index, name in reversed(list(enumerate(RADII))):
        ax.plot(x, getattr(inequality, name)[order], **_style(index) | {"linewidth": 1.2})
    ax.set_xlim(0, 100)
    if ax.get_yscale() == "linear":
        ax.set_ylim(0)
    return _inline(figure, "Certified, sampled and attacked radii of each image")


def locality_figure(everywhere: Float[np.ndarray, " n"], around: Float[np.ndarray, " n"]) -> Html:
    """Global and local constants of the images, each in increasing order.

    On a log scale where they are far apart.
    """
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    ax = _axes(figure, 111, "images, each line in its own order, %", "constant")
    for index, constants in enumerate((everywhere, around)):
        y = np.sort(constants)[:: 1 + len(constants) // _FILLED]
        ax.plot(100 * (np.arange(len(y)) + 1) / len(y), y, **_style(index))
    if np.median(everywhere) > _FAR * np.median(around) and around.min() > 0:
        ax.set_yscale("log")
    else:
        ax.set_ylim(0)
    ax.set_xlim(0, 100)
    return _inline(figure, "Global and local Lipschitz constants of each image")


def _mark(ax: Axes, marks: dict[float, str], end: float) -> None:
    """Thin upright lines at the radii of interest, with their text where there is room."""
    last = -end
    for value, text in sorted(marks.items()):
        ax.axvline(value, color=_LINE, linewidth=0.8, zorder=0)
        if value - last >= _CLOSEST * end:
            above = ax.annotate(
                text, (value, 1.02), xycoords=ax.get_xaxis_transform(), ha="center", va="bottom"
            )
            above.set(color=_MUTED, fontsize=_TEXT)
            last = value


def training_figure(epochs: Sequence[Epoch]) -> Html:
    """The loss, and accuracy on the held-out part if there is one, epoch by epoch."""
    figure = Figure(figsize=(6.4, 2.5), layout="constrained")
    x = [e.epoch for e in epochs]
    loss = _axes(figure, 121, "epoch", "training loss")
    loss.plot(x, [e.loss for e in epochs], **_style(0))
    if min(e.loss for e in epochs) > 0:
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        loss.yaxis.set_major_formatter("{x:g}")
        loss.yaxis.set_minor_formatter(NullFormatter())
        loss.tick_params(which="minor", length=0)
    accuracy = _axes(figure, 122, "epoch", "validation, %")
    held_out = [e for e in epochs if e.validation_accuracy is not None]
    for index, field in enumerate(("validation_accuracy", "validation_cra_estimate")):
        values = [100 * (getattr(e, field) or 0.0) for e in held_out]
        accuracy.plot([e.epoch for e in held_out], values, **_style(index))
    accuracy.set_ylim(0, 101)
    return _inline(figure, "Training loss and validation accuracy by epoch")


def _axes(figure: Figure, place: int, x: str, y: str) -> Axes:
    ax = figure.add_subplot(place)
    ax.set_xlabel(x, color=_MUTED, fontsize=_TEXT)
    ax.set_ylabel(y, color=_MUTED, fontsize=_TEXT)
    ax.tick_params(color=_LINE, labelcolor=_INK, labelsize=_TEXT)
    ax.grid(axis="y", color=_LINE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["bottom", "left"]].set_color(_LINE)
    return ax


def _inline(figure: Figure, description: str) -> Html:
    """The figure as an element of the page, with ids of its own and text in the page's font."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lipcert"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    own = f"f{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to groups
    svg = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\1{own}", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Html(
        svg.replace("<svg ", f'<svg class="plot" role="img" aria-label="{description}" ', 1)
    )


def line_key(index: int) -> Html:
    """A short piece of the line of a run, for legends."""
    variable = _VARIABLES[_SERIES[index % len(_SERIES)]]
    pattern = " ".join(f"{_WIDTH * d:g}" for d in _DASHES[index % len(_DASHES)]) or "none"
    style = f"stroke: var(--{variable}); stroke-width: 2; stroke-dasharray: {pattern}"
    line = tag("path", d="M0 6H28", style=style)
    return tag("svg", line, width="28", height="12", class_="key", aria_hidden="true")


def attack_key() -> Html:
    """The mark of an attack, for legends."""
    style = "fill: none; stroke: var(--muted); stroke-width: 1.6"
    mark = tag("path", d="M9 2H19L14 10Z", style=style)
    return tag("svg", mark, width="28", height="12", class_="key", aria_hidden="true")


def thumbnail(pixels: Float[np.ndarray, "c h w"], largest: int = 96) -> str:
    """A picture as a data address.

    Args:
        pixels: One channel (grey) or three (red, green, blue), in [0, 1].
        largest: Side in pixels to which larger pictures are reduced.
    """
    array = np.rint(255 * pixels).astype(np.uint8).transpose(1, 2, 0)
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    image.thumbnail((largest, largest))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
