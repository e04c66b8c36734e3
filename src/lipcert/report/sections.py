"""The sections of a report on one run; a section without anything to show is empty."""

from collections import Counter
from collections.abc import Sequence

from lipcert.bound_table import BoundTable
from lipcert.inequality import RADII
from lipcert.locality import ConstantUnits, Part
from lipcert.radii import parse_radius
from lipcert.recipe import settings
from lipcert.report import wording
from lipcert.report.figures import (
    inequality_figure,
    line_key,
    locality_figure,
    training_figure,
)
from lipcert.report.markup import Html, join, number, percent, table, tag
from lipcert.report.results import Results

_CLASSES = 20  # a longer table of classes starts folded


def tiles(r: Results) -> Html:
    """The handful of numbers that everybody looks for."""
    s = r.summary
    text, certified = next(iter(s.cra.items()))
    shown = {
        "Clean accuracy": percent(s.clean_accuracy),
        f"{wording.adjective(s.kind).capitalize()} at {text}": percent(certified),
        "Average radius (ACR)": number(s.average_radius),
        "Median radius": number(s.median_radius),
    }
    if r.bound:
        best = r.bound.best
        shown[f"Lipschitz constant ({best.bound}, {best.kind})"] = number(best.lipschitz)
    return tag(
        "dl",
        *(tag("div", tag("dt", name), tag("dd", value)) for name, value in shown.items()),
        class_="tiles",
    )


def by_radius(r: Results) -> Html:
    """What is certified and what the attack left, radius by radius."""
    s, attacked = r.summary, r.attack.strongest()
    rows = []
    for text in sorted({**s.cra, **attacked}, key=parse_radius):
        found = attacked.get(text)
        certified = r.certified(text) / s.samples
        how = wording.effort(found, s.samples) if found else ""
        if found and found.samples < s.samples:
            part = r.certified(text, found.samples) / found.samples
            how += f"; {percent(part)} of these are {wording.adjective(s.kind)}"
        upper = found.value if found else None
        bar = _bar(certified, s.clean_accuracy if upper is None else upper)
        rows.append((text, percent(certified), percent(upper), bar, how))
    head = ("L2 radius", wording.measure(s.kind), "Attacked", "", "Attack")
    notes: list[object] = [
        f"Clean accuracy, at radius 0, is {percent(s.clean_accuracy)}. In a bar, the blue part is "
        f"{wording.adjective(s.kind)}, the grey part open, the empty part wrong or lost to attack."
    ]
    missing = [text for text in s.cra if text not in attacked]
    if missing:
        command = tag("code", wording.attack_command(r.run, missing))
        notes.append(join(f"Not attacked at {', '.join(missing)}; to do so: ", command))
    return join(
        table(head, rows, words=("", "Attack")),
        *(tag("p", note, class_="note") for note in notes),
        tag("p", _inside(r)),
    )


def _inside(r: Results) -> Html:
    inside, ball = r.attack.inside, f"{wording.adjective(r.summary.kind)} ball"
    if inside is None:
        command = tag("code", wording.attack_command(r.run, ()))
        return join(f"Not attacked inside the {ball}s; to do so: ", command)
    counts = tag("strong", f"{inside.attacked} attacked, {inside.flipped} flipped")
    how = wording.effort(inside, r.summary.samples)
    return join(f"Attack inside every {ball}: ", counts, f" ({how}).")


def inequality(r: Results) -> Html:
    """Certified, sampled and attacked radii side by side; empty without inequality.parquet."""
    found = r.inequality
    if found is None:
        return Html()
    medians, ratios = found.medians(), found.ratios()
    first, last, explained = RADII[0], RADII[-1], wording.radii_explained(r.summary.kind)
    rows = []
    for i, name in enumerate(RADII):
        to_previous = number(ratios[f"{name} / {RADII[i - 1]}"]) if i else "–"
        label = join(line_key(i), name)
        rows.append((label, number(medians[name]), to_previous, explained[name]))
    head = ("Radius", "Median", "Ratio", "What")
    counts = Counter(by for by in found.found_by if by)
    by = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    about = found.about
    notes = (
        f"Of the first {len(found)} images; a wrong prediction counts as 0 in the medians. Ratio: "
        f"median over the images of this radius to the one above; from {first} to {last} it is "
        f"{number(ratios[f'{last} / {first}'])}.",
        f"Nearest points found by: {by or 'none'}. Attacks: {about['attacks']}; "
        f"{about['steps']} steps, {about['restarts']} starts.",
    )
    plot = tag("div", inequality_figure(found), class_="scroll", tabindex="0")
    return join(
        table(head, rows, words=("What",)),
        *(tag("p", note, class_="note") for note in notes),
        tag("figure", plot),
    )


def locality(r: Results) -> Html:
    """What a local bound gains, part by part; empty without locality.json."""
    found, by_image = r.locality, r.local_rows
    if found is None or by_image is None:
        return Html()
    medians = {Part.GLOBAL: found.median_global, Part.CONSTANTS: found.median_local}
    rows = [
        (
            *(part.words, percent(found.cra[part]), _bar(found.cra[part], 0.0)),
            number(medians[part]) if part in medians else "",
        )
        for part in Part
    ]
    head = ("Proved with", f"{wording.measure(r.summary.kind)} at {found.eps}", "")
    keys = (
        tag("li", line_key(0), "global constant"),
        tag("li", line_key(1), f"constant around the image, in a ball of {found.eps}"),
    )
    counts = ", ".join(f"{name or 'none'} {count}" for name, count in found.proved_by.items())
    constants = (c.numpy() for c in (by_image.global_constant, by_image.local_constant))
    plot = tag("div", locality_figure(*constants), class_="scroll", tabindex="0")
    return join(
        table((*head, "Median constant"), rows, words=("",)),
        tag("p", wording.LOCALITY_EXPLAINED, class_="note"),
        tag("p", tag("strong", "Images by the bound that proved their radius: "), f"{counts}."),
        tag("figure", tag("ul", *keys, class_="legend"), plot),
        _constant_units(found.layers),
    )


def _constant_units(layers: Sequence[ConstantUnits]) -> Html:
    if not layers:
        return tag("p", wording.NO_CONSTANT_UNITS, class_="note")
    rows = [(n.name, percent(n.share), _bar(n.share, 0.0)) for n in layers]
    return table(("Layer", "Units constant in the ball", ""), rows, words=("",))


def _bar(full: float, half: float) -> Html:
    style = f"--full: {100 * full:.1f}%; --half: {100 * half:.1f}%"
    return tag("span", class_="bar", style=style)


def published(r: Results) -> Html:
    """The numbers of the paper, each with its source, beside those of the run."""
    s = r.summary
    ours = {"clean accuracy": percent(s.clean_accuracy)}
    ours |= {f"CRA at {text}": percent(fraction) for text, fraction in s.cra.items()}
    ours |= {"average certified radius": number(s.average_radius)}
    ours |= {"median certified radius": number(s.median_radius)}
    rows = []
    for p in r.run.recipe.published:
        value = number(p.value) if "radius" in p.what else percent(p.value)
        rows.append((p.what, value, ours.get(p.what, "–"), p.source, p.certainty))
    if not rows:
        return Html()
    head = ("What", "Published", f"This run: {s.kind}", "Source", "How sure")
    other = wording.other_settings(r.run)
    trained = f", trained with {other}" if other else ""
    note = f"This run: certified with the bound {s.bound}{trained}."
    return join(table(head, rows, words=("Source", "How sure")), tag("p", note, class_="note"))


def by_class(r: Results) -> Html:
    """One row a class; many classes start folded."""
    radii = list(r.summary.cra)
    cra = (f"{wording.measure(r.summary.kind)} at {text}" for text in radii)
    head = ("Class", "Images", "Clean", *cra, "Median radius")
    rows = [
        (
            *(c.name, c.samples, percent(c.clean_accuracy)),
            *(percent(c.cra.get(text)) for text in radii),
            number(c.median_radius),
        )
        for c in r.summary.classes
    ]
    whole = table(head, rows)
    if len(rows) <= _CLASSES:
        return whole
    return tag("details", tag("summary", f"{len(rows)} classes"), whole)


def layers(r: Results) -> Html:
    """The bounds, and the product bound layer by layer; empty without bound.json."""
    b = r.bound
    if b is None:
        return Html()
    rows = [
        (
            *(row.name, row.op, number(row.gain), number(row.prefix), number(row.sampled)),
            number(row.prefix / row.sampled) if row.sampled > 0 else "–",
            percent(row.share),
            _bar(min(1.0, max(0.0, row.share)), 0.0),
        )
        for row in b.layers
    ]
    head = ("Layer", "Node", "Own constant", "Bound so far", "Sampled", "Looseness", "Share", "")
    whole = tag("p", wording.BOUNDS_EXPLAINED.format(number(b.sampled_lower_bound)))
    explained = tag("p", wording.LAYERS_EXPLAINED, class_="note")
    local = any(row.eps is not None for row in b.bounds)
    note = tag("p", wording.LOCAL_BOUNDS_EXPLAINED, class_="note") if local else ""
    return join(whole, _bounds(b), note, table(head, rows, words=("Node", "")), explained)


def _bounds(b: BoundTable) -> Html:
    """The bounds side by side."""
    rows = [
        (
            row.bound,
            number(row.lipschitz),
            number(row.ratio),
            number(row.lipschitz / b.sampled_lower_bound)
            if b.sampled_lower_bound > 0 and row.eps is None
            else "–",
            *(number(pair) for pair in (row.smallest_pair, row.median_pair, row.largest_pair)),
            row.kind,
            f"{row.seconds:.2f}",
        )
        for row in b.bounds
    ]
    head = ("Bound", "Constant", "Over the best", "Over sampled")
    pairs = ("Smallest pair", "Median pair", "Largest pair")
    return table((*head, *pairs, "Kind", "Seconds"), rows, words=("Bound", "Kind"))


def training(r: Results) -> Html:
    """Loss and validation accuracy; empty without metrics.jsonl."""
    if not r.epochs:
        return Html()
    last = r.epochs[-1]
    text = (
        f"{len(r.epochs)} epochs; at the end the loss is {last.loss:.4g} and the training "
        f"accuracy {percent(last.train_accuracy)}."
    )
    if last.validation_accuracy is None:
        keys = [tag("li", line_key(0), "loss; no validation part was held out")]
    else:
        eps = f"{r.run.recipe.eps:.4g}"
        keys = [
            tag("li", line_key(0), "loss (left), validation accuracy (right)"),
            tag("li", line_key(1), f"validation CRA at {eps}: an estimate, not certified"),
        ]
    plot = tag("div", training_figure(r.epochs), class_="scroll", tabindex="0")
    return join(tag("p", text), tag("figure", tag("ul", *keys, class_="legend"), plot))


def provenance(r: Results) -> Html:
    """Commands, settings, time and versions."""
    s = r.summary
    chosen = {name: wording.short(value) for name, value in settings(r.run.recipe).items()}
    times = f"certifying {s.seconds:.3g} s"
    if r.epochs:
        times = f"training {sum(e.seconds for e in r.epochs):.3g} s, {times}"
    facts = {
        "Settings": ", ".join(f"{name} {value}" for name, value in chosen.items()),
        "Time": times,
    }
    if s.weights_sha256:
        facts["Weights"] = f"model.safetensors with the SHA-256 {s.weights_sha256}"
    names = dict.fromkeys([*r.start.versions, *s.versions])
    rows = [(n, r.start.versions.get(n, "–"), s.versions.get(n, "–")) for n in names]
    head = ("What", "Trained with", "Certified with")
    return join(
        tag("pre", tag("code", "\n".join(wording.all_commands(r)))),
        *(tag("p", tag("strong", f"{name}: "), f"{fact}.") for name, fact in facts.items()),
        table(head, rows, words=head),
    )
