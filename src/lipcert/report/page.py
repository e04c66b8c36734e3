"""The page as a whole: head, comparison of several runs, a part for each run, glossary."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import lipcert
from lipcert.data import Dataset, Split, load
from lipcert.errors import LipcertError
from lipcert.files import write_atomically
from lipcert.kinds import Kind
from lipcert.report import pictures, sections, wording
from lipcert.report.figures import attack_key, curve_figure, line_key
from lipcert.report.markup import Html, join, number, percent, table, tag
from lipcert.report.results import Results, read_results
from lipcert.run import Run


def write_report(runs: Sequence[Run], out: Path) -> Path:
    """Writes one HTML page about certified runs; nothing on it is loaded from elsewhere.

    Args:
        runs: The runs; several are compared.
        out: The file to write.

    Returns:
        `out`.

    Raises:
        LipcertError: There is no run or no folder to write to; or a file of a run is missing,
            broken or contradicts another.
    """
    if not runs:
        raise LipcertError("There is no run to report on. Name one: lipcert report RUN.")
    if not out.parent.is_dir():
        raise LipcertError(f"There is no folder {out.parent} for {out.name}; make it first.")
    results = [read_results(run) for run in runs]
    sources = dict.fromkeys(r.summary.data for r in results)
    write_atomically(out, _page(results, {source: _pictures(source) for source in sources}))
    return out


def _pictures(source: str) -> Dataset | str:
    """The pictures, or why there are none."""
    try:
        return load(source, Split.EVALUATION)
    except LipcertError as error:
        return f"No images here, as the data could not be loaded: {error}"


def _page(results: Sequence[Results], data: Mapping[str, Dataset | str]) -> str:
    names = _names(results)
    if len(results) == 1:
        title, run = names[0], results[0]
        curve = _curve(results, names, list(run.summary.cra))
        content = _run(run, title, data[run.summary.data], level=1, curve=curve)
    else:
        title = f"{len(results)} runs compared"
        parts = (
            tag(
                "section", _run(r, name, data[r.summary.data], level=2), class_="run", id=f"run-{i}"
            )
            for i, (r, name) in enumerate(zip(results, names, strict=True), 1)
        )
        content = join(_comparison(results, names, title), *parts)
    style = files("lipcert.report").joinpath("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title}: certified robustness"),
        tag("style", Html(style)),
    )
    body = tag("body", tag("main", content, _foot()))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _names(results: Sequence[Results]) -> list[str]:
    """The recipes, with the folder where several runs are of the same recipe."""
    recipes = [r.run.recipe.name for r in results]
    return [
        name if recipes.count(name) == 1 else f"{name} ({r.run.folder})"
        for name, r in zip(recipes, results, strict=True)
    ]


def _comparison(results: Sequence[Results], names: Sequence[str], title: str) -> Html:
    shared = [t for t in results[0].summary.cra if all(t in r.summary.cra for r in results)]
    cra = (f"CRA at {text}" for text in shared)
    head = ("Run", "Data", "Images", "Clean", *cra, "ACR", "Kind", "Bound")
    rows = []
    for i, (r, name) in enumerate(zip(results, names, strict=True)):
        s = r.summary
        rows.append(
            (
                join(line_key(i), tag("a", name, href=f"#run-{i + 1}")),
                s.data,
                s.samples,
                percent(s.clean_accuracy),
                *(percent(s.cra[text]) for text in shared),
                number(s.average_radius),
                tag("strong", "ESTIMATE") if s.kind is Kind.ESTIMATE else s.kind,
                s.bound,
            )
        )
    warnings = (wording.warnings(r, of=f"{name}: ") for r, name in zip(results, names, strict=True))
    return tag(
        "header",
        tag("p", "Certified robustness", class_="over"),
        tag("h1", title),
        *warnings,
        table(head, rows, words=("Data", "Kind", "Bound")),
        _curve(results, names, shared),
    )


def _curve(results: Sequence[Results], names: Sequence[str], radii: Sequence[str]) -> Html:
    keys = [
        tag("li", line_key(i), f"{name}: {wording.adjective(r.summary.kind)} accuracy")
        for i, (r, name) in enumerate(zip(results, names, strict=True))
    ]
    if any(r.attack.all() for r in results):
        colour = ", in the colour of the run" if len(results) > 1 else ""
        keys.append(tag("li", attack_key(), f"accuracy under attack{colour}"))
    plot = tag("div", curve_figure(results, radii), class_="scroll", tabindex="0")
    return tag("figure", tag("ul", *keys, class_="legend"), plot)


def _run(
    r: Results, name: str, data: Dataset | str, *, level: int, curve: Html | None = None
) -> Html:
    """One run: what is proved, then its sections under headings one level below `level`."""
    s, other = r.summary, wording.other_settings(r.run)
    facts = (
        f"Data {s.data}, split {s.split}, {s.samples} images. L2 norm, pixels in [0, 1]. Bound "
        f"{s.bound}. Run "
    )
    header = tag(
        "header",
        *([tag("p", "Certified robustness", class_="over")] if level == 1 else []),
        tag(f"h{level}", name),
        tag("p", r.run.recipe.summary, class_="muted"),
        tag("p", f"Other settings than the recipe's: {other}.", class_="muted") if other else "",
        wording.warnings(r),
        tag("p", wording.claim(s), class_="claim"),
        tag("p", tag("span", wording.badge(s), class_=f"badge {s.kind}"), class_="muted"),
        tag("p", facts, tag("code", r.run.folder), class_="muted"),
        sections.tiles(r),
    )
    parts = {
        "Accuracy by radius": join(sections.by_radius(r), curve or ""),
        "Around each image": sections.locality(r),
        "How tight the certificates are": sections.inequality(r),
        "Beside the published numbers": sections.published(r),
        "Sample images": pictures.images(r, data),
        "Class by class": sections.by_class(r),
        "Where the bound is loose": sections.layers(r),
        "Training": sections.training(r),
        "How to make it again": sections.provenance(r),
    }
    shown = (
        tag("section", tag(f"h{level + 1}", title), content)
        for title, content in parts.items()
        if content
    )
    return join(header, *shown)


def _foot() -> Html:
    terms = (join(tag("dt", k), tag("dd", v)) for k, v in wording.GLOSSARY.items())
    return tag(
        "footer",
        tag("h2", "Words"),
        tag("dl", *terms, class_="glossary"),
        tag("p", f"Written by lipcert {lipcert.__version__}.", class_="note"),
    )
