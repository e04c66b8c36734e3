"""The report page: well formed, self-contained, true to the files, and loud where it must be."""

import base64
import dataclasses
import io
import json
import re
import shlex
from fractions import Fraction
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import pytest
from PIL import Image

from lipcert import recipes
from lipcert.attacking import read_inequality
from lipcert.bound_table import BoundRow, BoundTable, LayerRow
from lipcert.data import Split, load
from lipcert.errors import LipcertError
from lipcert.inequality import RADII
from lipcert.locality import ConstantUnits, Locality, Part
from lipcert.recipe import Published, override
from lipcert.report import write_report
from lipcert.report.markup import Html, number, percent, rounded_down, tag
from lipcert.report.typed import typed
from lipcert.run import create
from lipcert.train import Epoch

NOWHERE = "/no/such/folder"
VOID = {"meta", "img", "br"}
NASTY = "<script>alert('x')</script> & \"quotes\""


class Page(HTMLParser):
    """A page taken apart; fails on elements that are not closed in order."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.banners: list[str] = []
        self.commands: list[list[str]] = []
        self._marks: list[int] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
            self._marks.append(len(self.text))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        inside = self.text[self._marks.pop() :]
        if tag in ("td", "th"):
            self.tables[-1][-1].append(inside)
        if tag == "strong" and self.open[-1] == "div":
            self.banners.append(inside)
        if tag == "pre":
            self.commands = [shlex.split(line) for line in inside.splitlines()]

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data

    def values(self, attribute: str) -> list[str]:
        return [a[attribute] for _, a in self.tags if a.get(attribute) is not None]

    def table(self, heading: str) -> list[list[str]]:
        """The rows of the first table with this heading, without the headings."""
        return next(rows[1:] for rows in self.tables if heading in rows[0])


def make_run(
    folder,
    *,
    recipe=None,
    n=12,
    radii=("36/255", "0.5"),
    kind="upper",
    data=NOWHERE,
    labels=None,
    radius=None,
    class_name="class {}".format,
):
    """A run directory from made-up numbers: seven of ten samples are right."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, n) if labels is None else labels
    n = len(labels)
    prediction = np.where(random.random(n) < 0.7, labels, (labels + 1) % 3)
    radius = random.random(n) if radius is None else radius
    right = prediction == labels
    robust = {text: radius >= float(Fraction(text)) for text in radii}

    def cra(chosen):
        return {text: float((right & ok)[chosen].mean()) for text, ok in robust.items()}

    run = create(folder, recipe or recipes.get("lmt-digits"))
    columns = {"label": labels, "prediction": prediction, "radius": radius}
    columns |= {f"robust@{text}": ok for text, ok in robust.items()}
    table = pyarrow.table(columns).replace_schema_metadata({"kind": kind})
    pyarrow.parquet.write_table(table, run.path("certificates.parquet"))
    counted = np.where(right, radius, 0)
    acr = float(counted.mean())
    summary = {
        "clean_accuracy": float(right.mean()),
        "cra": cra(slice(None)),
        "kind": kind,
        "failure_probability": 1e-6 if kind == "probabilistic" else 0.0,
        "bound": "auto",
        "acr": acr if np.isfinite(acr) else None,
        "median_radius": float(np.median(counted)),
        "samples": n,
        "seconds": 0.25,
        "recipe": run.recipe.name,
        "data": data,
        "split": "test",
        "classes": [
            {
                "name": class_name(c),
                "samples": int((labels == c).sum()),
                "clean_accuracy": float(right[labels == c].mean()),
                "cra": cra(labels == c),
                "median_radius": float(np.median(counted[labels == c])),
            }
            for c in np.unique(labels)
        ],
        "versions": {"lipcert": "9.8.7"},
    }
    run.write_json("summary.json", summary)
    return run


def add_attack(run, at=None, flipped=0, samples=None):
    """attack.json, with the accuracies of `at` by radius."""
    n = samples or run.read_json("summary.json", "")["samples"]
    effort = {"samples": n, "steps": 7, "restarts": 2, "seed": 3}
    accuracies = {text: effort | {"value": value} for text, value in (at or {}).items()}
    inside = effort | {"attacked": n, "flipped": flipped}
    run.write_json("attack.json", {"robust_accuracy": accuracies, "inside": inside})
    return run


def add_bound(run, name="0+1", bound="liplt"):
    layers = (
        LayerRow(name, "Affine", 2.0, 2.0, 1.6, 0.25),
        LayerRow("2", "Sum", None, 6.0, 3.0, -0.0001),
    )
    bounds = (
        BoundRow("product", "upper", 0.1, 6.0, 1.2, 1.0, 2.0, 4.0),
        BoundRow(bound, "upper", 0.2, 5.0, 1.0, None, None, None),
    )
    table = BoundTable(bounds, 3.0, layers)
    run.write_json("bound.json", dataclasses.asdict(table))


def add_locality(run, radius="0.5", **changes):
    """locality.json and locality.parquet of a run whose bound is made local."""
    summary = run.read_json("summary.json", "") | {"bound": "local-product"}
    run.write_json("summary.json", summary)
    table = pyarrow.parquet.read_table(run.path("certificates.parquet"))
    n = table.num_rows
    proved = {part: np.array(table[f"robust@{radius}"]) for part in Part}
    for place, part in enumerate(Part):
        proved[part] &= np.arange(n) >= len(Part) - 1 - place
    right = np.equal(table["label"], table["prediction"])
    constants = np.linspace(1, 2, n)
    columns = {"rival": np.zeros(n, int), "global_constant": 4 * constants}
    columns |= {"local_constant": constants}
    columns |= {f"proved@{part}": ok for part, ok in proved.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), run.path("locality.parquet"))
    layers = (ConstantUnits("relu one", 0.25), ConstantUnits("relu two", 0.125))
    cra = {str(part): float((ok & right).mean()) for part, ok in proved.items()}
    by = {"auto": 5, "local-product@0.5": n - 6, "": 1}
    found = Locality("local-product", radius, n, cra, layers, 6.0, 1.5, by)
    run.write_json("locality.json", dataclasses.asdict(found) | changes)
    return run


def add_metrics(run, validation=True):
    lines = []
    for epoch in range(1, 4):
        clean, cra = (0.5 + epoch / 10, 0.2) if validation else (None, None)
        record = Epoch(epoch, 2.0**-epoch, 0.9, 0.1, 0.01, clean, cra, 1.0)
        lines.append(json.dumps(dataclasses.asdict(record)) + "\n")
    run.path("metrics.jsonl").write_text("".join(lines))


def complete(run):
    cra = run.read_json("summary.json", "")["cra"]
    add_attack(run, cra)
    add_bound(run)
    add_metrics(run)
    return run


def page_of(*runs) -> Page:
    out = write_report(runs, runs[0].path("report.html"))
    return Page(out.read_text(encoding="utf-8"))


def test_nothing_is_loaded_from_elsewhere_and_links_lead_somewhere(tmp_path):
    labels = load("digits", Split.EVALUATION).labels.numpy()
    runs = [complete(make_run(tmp_path / name, data="digits", labels=labels)) for name in "ab"]
    add_metrics(runs[1], validation=False)  # equal figures would share their ids
    page = page_of(*runs)
    source = runs[0].path("report.html").read_text(encoding="utf-8")
    assert "://" not in source
    assert "@import" not in source
    assert not {"script", "link", "iframe", "object"} & {name for name, _ in page.tags}
    assert len(page.values("src")) == 48
    assert all(value.startswith("data:") for value in page.values("src"))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    used = [*page.values("href"), *re.findall(r"url\((.*?)\)", source)]
    assert len(used) > 4
    assert all(value.startswith("#") and value[1:] in ids for value in used)


def test_the_page_depends_on_the_files_alone_and_leaves_matplotlib_as_it_was(tmp_path):
    run = complete(make_run(tmp_path / "a"))
    before = dict(matplotlib.rcParams)
    first = write_report([run], tmp_path / "1.html").read_bytes()
    assert write_report([run], tmp_path / "2.html").read_bytes() == first
    assert dict(matplotlib.rcParams) == before


def test_tables_say_what_the_files_say(tmp_path):
    run = complete(make_run(tmp_path / "a", n=40))
    summary = run.read_json("summary.json", "")
    page = page_of(run)
    by_radius = {row[0]: row for row in page.table("L2 radius")}
    assert list(by_radius) == list(summary["cra"])
    for text, value in summary["cra"].items():
        assert by_radius[text][1:3] == [percent(value), percent(value)]
        assert by_radius[text][4] == "pgd: 7 steps, 2 starts, seed 3"
    for row, said in zip(page.table("Class"), summary["classes"], strict=True):
        cra = [percent(value) for value in said["cra"].values()]
        whole = [said["name"], str(said["samples"]), percent(said["clean_accuracy"]), *cra]
        assert row == [*whole, number(said["median_radius"])]
    assert page.table("Layer") == [
        ["0+1", "Affine", "2.000", "2.000", "1.600", "1.250", percent(0.25), ""],
        ["2", "Sum", "–", "6.000", "3.000", "2.000", percent(0.0), ""],
    ]
    assert page.table("Over sampled") == [
        ["product", "6.000", "1.200", "2.000", "1.000", "2.000", "4.000", "upper", "0.10"],
        ["liplt", "5.000", "1.000", "1.667", "–", "–", "–", "upper", "0.20"],
    ]
    assert "Lipschitz constant (liplt, upper)5.000" in page.text
    assert "seen on images is 3.000" in page.text
    for shown in (
        percent(summary["clean_accuracy"]),
        number(summary["acr"]),
        number(summary["median_radius"]),
        "40 attacked, 0 flipped",
        "9.8.7",
    ):
        assert shown in page.text
    sentence = (
        f"For {percent(summary['cra']['36/255'])} of the 40 test images the predicted class is "
        "right and provably cannot change within an L2 distance of 36/255."
    )
    assert sentence in page.text
    assert not page.banners


def test_the_curve_falls_at_the_radii_of_the_right_samples(tmp_path):
    labels, radius = np.array([0, 1, 2, 0, 1, 2]), np.array([0.9, 0.2, 0.4, 0.6, 0.3, 0.7])
    run = make_run(tmp_path / "a", labels=labels, radius=radius, radii=("0.25",))
    page_of(run)
    table = pyarrow.parquet.read_table(run.path("certificates.parquet")).to_pydict()
    right = np.array(table["label"]) == np.array(table["prediction"])
    assert 0 < right.sum() < 6
    source = run.path("report.html").read_text(encoding="utf-8")
    line = re.search(r'd="([^"]*)"[^>]*style="fill: none; stroke: var\(--series-1\)', source)
    points = np.array(re.findall(r"[ML] (\S+) (\S+)", line[1]), dtype=float)
    falls = points[:-1][np.diff(points[:, 1]) != 0]  # where a vertical piece begins
    width = points[-1, 0] - points[0, 0]
    expected = np.sort(radius[right])
    places = (falls[:, 0] - points[0, 0]) / width * 1.04 * expected[-1]
    np.testing.assert_allclose(places, expected, rtol=1e-4)
    low, high = (float(re.search(rf' y="(\S+)"[^>]*>{n}<', source)[1]) for n in (0, 100))
    steps = np.diff(np.unique(points[:, 1]))
    np.testing.assert_allclose(steps, (low - high) / 6, rtol=1e-3)
    assert len(steps) == right.sum()


def test_text_from_files_is_escaped(tmp_path):
    recipe = dataclasses.replace(
        recipes.get("lmt-digits"),
        name=NASTY,
        summary=NASTY + "2",
        published=(Published(NASTY + "3", 0.5, NASTY + "4", NASTY + "5"),),
    )
    nasty_class = (NASTY + "{}").format
    runs = [
        complete(make_run(tmp_path / name, recipe=recipe, class_name=nasty_class, data="/" + NASTY))
        for name in ("a", "<i>b")
    ]
    add_bound(runs[0], name=NASTY + "6", bound=NASTY + "7")
    page = page_of(*runs)
    assert "script" not in {name for name, _ in page.tags}
    assert all(NASTY + ending in page.text for ending in ("0", "2", "3", "4", "5", "6", "7"))
    assert "<i>b" in page.text
    assert tag("p", "<", Html("<b></b>"), title='"') == '<p title="&quot;">&lt;<b></b></p>'


@pytest.mark.parametrize(
    ("kind", "words"),
    [("probabilistic", "failure probability of 1.0e-06"), ("estimate", "Nothing is proved.")],
)
def test_claims_that_are_no_proof_say_so(tmp_path, kind, words):
    runs = [make_run(tmp_path / kind, kind=kind), make_run(tmp_path / "upper")]
    page = page_of(runs[0])
    assert words in page.text
    assert "provably" not in page.text.split("Words")[0]
    assert bool(page.banners) == (kind == "estimate")
    if kind == "estimate":
        assert page.banners == ["ESTIMATE: these are not certificates"]
        assert "Certified at" not in page.text
        both = page_of(*runs)
        assert [row[-2] for row in both.table("Kind")] == ["ESTIMATE", "upper"]
        assert len(both.banners) == 2  # on top, and at the run


def test_an_attack_below_the_certified_accuracy_is_an_error(tmp_path):
    run = make_run(tmp_path / "a", n=40)
    certified = run.read_json("summary.json", "")["cra"]["0.5"]
    add_attack(run, {"0.5": certified})
    assert not page_of(run).banners
    add_attack(run, {"0.5": certified - 1 / 40})
    page = page_of(run)
    assert page.banners == ["ERROR: the attack contradicts the certificates"]
    assert f"(pgd) left {percent(certified - 1 / 40)} of 40 images right" in page.text
    add_attack(run, flipped=2)
    page = page_of(run)
    assert len(page.banners) == 1
    assert "2 of 40 predictions were changed" in page.text


def test_an_attack_on_a_part_is_compared_with_that_part(tmp_path):
    labels = np.zeros(20, dtype=int)
    radius = np.repeat([0.01, 0.9], 10)  # nothing in the first half is certified at 0.5
    run = make_run(tmp_path / "a", labels=labels, radius=radius)
    assert run.read_json("summary.json", "")["cra"]["0.5"] > 0.2
    add_attack(run, {"0.5": 0.0, "0.7": 0.0}, samples=10)
    page = page_of(run)
    assert not page.banners
    row = next(row for row in page.table("L2 radius") if row[0] == "0.5")
    assert row[4].startswith("first 10 images")
    assert f"{percent(0.0)} of these are certified" in row[4]
    assert [row[0] for row in page.table("L2 radius")] == ["36/255", "0.5", "0.7"]
    add_attack(run, {"0.7": 0.0}, samples=20)  # a radius that only the attack speaks of
    assert page_of(run).banners


def add_inequality(run, samples=8, found=None, about=None):
    """inequality.parquet, each radius half as large again as the one before."""
    table = pyarrow.parquet.read_table(run.path("certificates.parquet")).slice(0, samples)
    right = np.equal(table["label"], table["prediction"])
    radii = [np.where(right, table["radius"], 0) * 1.5**i for i in range(4)]
    if found is not None:
        radii[-1] = np.where(right, found, 0)
    columns = dict(zip(RADII, radii, strict=True)) | {"found_by": ["pgd"] * samples}
    about = {"attacks": "pgd, cw", "steps": "7", "restarts": "2", "seed": "3"} | (about or {})
    whole = pyarrow.table(columns).replace_schema_metadata(about)
    pyarrow.parquet.write_table(whole, run.path("inequality.parquet"))


def test_the_inequality_is_shown_if_it_was_measured(tmp_path):
    run = make_run(tmp_path / "a", labels=np.zeros(12, dtype=int))
    assert "How tight" not in page_of(run).text
    add_inequality(run)
    page = page_of(run)
    assert "How tight the certificates are" in page.text
    certified = read_inequality(run).certified
    for i, (row, name) in enumerate(zip(page.table("Ratio"), RADII, strict=True)):
        assert row[:2] == [name, number(float(np.median(certified)) * 1.5**i)]
        assert row[2] == ("1.500" if i else "–")
        assert row[3].startswith("No certificate") == name.startswith("sampled")
    assert number(1.5**3) in page.text
    assert "Of the first 8 images" in page.text
    assert ["--inequality", "--steps", "7", "--restarts", "2", "--samples", "8", "--seed", "3"] in [
        command[3:] for command in page.commands
    ]
    assert not page.banners
    add_inequality(run, found=np.full(8, 200.0))  # far enough for a log scale
    assert page_of(run).text != page.text


def test_what_a_local_bound_gains_is_shown(tmp_path):
    run = make_run(tmp_path / "a", n=40, radius=np.linspace(0.9, 0.45, 40))
    assert "Around each image" not in page_of(run).text
    said = add_locality(run).read_json("locality.json", "")
    page = page_of(run)
    assert "Around each image" in page.text
    rows = page.table("CRA at 0.5")
    assert len({row[1] for row in rows}) > 1
    medians = {Part.GLOBAL: "6.000", Part.CONSTANTS: "1.500"}
    assert rows == [[p.words, percent(said["cra"][p]), "", medians.get(p, "")] for p in Part]
    assert page.table("Units constant in the ball") == [
        *(["relu one", percent(0.25), ""], ["relu two", percent(0.125), ""])
    ]
    assert "auto 5, local-product@0.5 34, none 1." in page.text
    assert "Local bound" in page.text
    assert page.commands[1][4:6] == ["local-product", "--eps"]
    figures = sum(a.get("class") == "plot" for _, a in page.tags)
    add_locality(run, layers=[])
    page = page_of(run)
    assert "no elementwise activations" in page.text
    assert sum(a.get("class") == "plot" for _, a in page.tags) == figures == 2


def test_a_local_bound_is_never_shown_as_the_constant_of_the_network(tmp_path):
    run = make_run(tmp_path / "a")
    add_bound(run)
    table = run.read_json("bound.json", "")
    label = "local-product, median of 32 samples in balls of 0.5"
    local = BoundRow(label, "upper", 0.1, 1.0, 0.2, None, None, None, 0.5)
    table["bounds"].append(dataclasses.asdict(local))
    run.write_json("bound.json", table)
    page = page_of(run)
    assert "Lipschitz constant (liplt, upper)5.000" in page.text
    row = next(row for row in page.table("Over sampled") if row[0] == label)
    assert row[:4] == [label, "1.000", "0.200", "–"]
    assert "bound nothing globally" in page.text


def test_slopes_seen_elsewhere_do_not_refute_local_certificates(tmp_path):
    run = make_run(tmp_path / "a", radius=np.full(12, 0.5))
    add_inequality(run)
    table = pyarrow.parquet.read_table(run.path("inequality.parquet"))
    place = table.column_names.index("sampled_global")
    lower = pyarrow.compute.multiply(table["certified"], 0.9)
    table = table.set_column(place, "sampled_global", lower)
    pyarrow.parquet.write_table(table, run.path("inequality.parquet"))
    assert page_of(run).banners
    add_locality(run)
    assert not page_of(run).banners


def test_a_refuted_certificate_is_an_error_on_the_page(tmp_path):
    run = make_run(tmp_path / "a", radius=np.full(12, 0.5))
    add_inequality(run, found=np.full(8, 0.4))
    page = page_of(run)
    assert page.banners == ["ERROR: the attack contradicts the certificates"]
    assert "above the smallest perturbation found" in page.text


def test_the_sandwich_shows_the_strongest_attack_and_all_can_contradict(tmp_path):
    run = make_run(tmp_path / "a", n=40)
    certified = run.read_json("summary.json", "")["cra"]["0.5"]
    add_attack(run, {"0.5": certified + 0.2})
    attack = run.read_json("attack.json", "")
    effort = {"samples": 40, "steps": 9, "restarts": 1, "seed": 0}
    few = {"samples": 4, "steps": 9, "restarts": 1, "seed": 0, "attack": "cw", "value": 0.99}
    auto = effort | {"attack": "autoattack", "value": certified + 0.1}
    attack["others"] = {"cw": {"0.5": few}, "autoattack": {"0.5": auto}}
    run.write_json("attack.json", attack)
    page = page_of(run)
    row = next(row for row in page.table("L2 radius") if row[0] == "0.5")
    assert row[2] == percent(certified + 0.1)
    assert row[4].startswith("autoattack: 9 steps")
    assert not page.banners
    assert any(c[-2:] == ["--attack", "autoattack"] for c in page.commands)
    attack["others"]["cw"]["0.5"] |= {"samples": 40, "value": certified - 0.1}
    run.write_json("attack.json", attack)
    assert "At 0.5 the attack (cw) left" in page_of(run).text


def test_missing_measurements_leave_out_their_sections_or_name_their_command(tmp_path):
    run = make_run(tmp_path / "a")
    page = page_of(run)
    assert f"lipcert attack {run.folder} --eps 36/255 --eps 0.5" in page.text
    assert "Not attacked inside the certified balls" in page.text
    assert "Where the bound is loose" not in page.text
    assert "Training" not in page.text
    assert "No images here, as the data could not be loaded" in page.text
    add_metrics(run, validation=False)
    assert "no validation part was held out" in page_of(run).text


def test_images_are_those_of_the_samples(tmp_path):
    data = load("digits", Split.EVALUATION)
    run = make_run(tmp_path / "a", data="digits", labels=data.labels.numpy())
    table = pyarrow.parquet.read_table(run.path("certificates.parquet")).to_pydict()
    radius, right = np.array(table["radius"]), np.equal(table["label"], table["prediction"])
    order = np.argsort(radius)
    good = order[right[order]]
    middle = (len(good) - 6) // 2
    groups = (good[::-1], good[middle:], good, order[~right[order]][::-1])
    expected = [int(i) for members in groups for i in members[:6]]
    shown = page_of(run).values("src")
    assert len(shown) == 24
    for address, i in zip(shown, expected, strict=True):
        png = base64.b64decode(address.removeprefix("data:image/png;base64,"))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), data.images[i, 0])
    other = make_run(tmp_path / "b", data="digits", labels=1 - data.labels.numpy() % 2)
    page = page_of(other)
    assert "are not those that were certified" in page.text
    assert not page.values("src")


def test_several_runs_are_compared_at_the_radii_they_share(tmp_path):
    runs = [
        make_run(tmp_path / "a", radii=("0.1", "0.3")),
        make_run(tmp_path / "b", radii=("0.3", "0.7"), n=30),
        make_run(tmp_path / "c", recipe=recipes.get("gloro-digits"), radii=("0.3",)),
    ]
    page = page_of(*runs)
    names = [f"lmt-digits ({runs[0].folder})", f"lmt-digits ({runs[1].folder})", "gloro-digits"]
    assert page.tables[0][0] == [
        *("Run", "Data", "Images", "Clean", "CRA at 0.3", "ACR", "Kind", "Bound")
    ]
    for row, run, name in zip(page.tables[0][1:], runs, names, strict=True):
        said = run.read_json("summary.json", "")
        numbers = [percent(said["clean_accuracy"]), percent(said["cra"]["0.3"])]
        rest = [*numbers, number(said["acr"]), "upper", "auto"]
        assert row == [name, NOWHERE, str(said["samples"]), *rest]
    assert page.values("href")[:3] == ["#run-1", "#run-2", "#run-3"]
    assert sum(a.get("class") == "plot" for _, a in page.tags) == 1


def test_published_numbers_stand_beside_ours(tmp_path):
    recipe = recipes.get("gloro-mnist-c4f3_bcp")
    run = make_run(tmp_path / "a", recipe=recipe, radii=("0.1", "1.58"), radius=np.full(12, 2.0))
    ours = run.read_json("summary.json", "")["cra"]["1.58"]
    paper = recipe.published[0]
    assert page_of(run).table("Published") == [
        ["CRA at 1.58", percent(paper.value), percent(ours), paper.source, paper.certainty]
    ]


def test_the_commands_make_the_run_again(tmp_path):
    recipe = override(recipes.get("lmt-digits"), {"eps": "0.3", "epochs": 5, "data": "/my data"})
    run = add_attack(make_run(tmp_path / "a b", recipe=recipe), {"0.5": 1.0})
    train, certify, at, inside, report = page_of(run).commands
    assert train[2:5] == ["lmt-digits", "--out", str(run.folder)]
    changes = dict(word.split("=", 1) for word in train[5:] if word != "--set")
    again = override(recipes.get(train[2]), changes)
    assert again.eps == recipe.eps
    assert (again.epochs, again.data) == (5, "/my data")
    assert certify[2:4] == [str(run.folder), "--bound"]
    assert certify[5:] == ["--eps", "36/255", "--eps", "0.5", "--data", NOWHERE]
    assert at[3:5] == ["--eps", "0.5"]
    assert at[5:] == inside[3:]
    assert inside[3:7] == ["--steps", "7", "--restarts", "2"]
    assert report == ["lipcert", "report", str(run.folder)]
    own = make_run(tmp_path / "own", recipe=dataclasses.replace(recipe, name="my own"))
    assert page_of(own).commands[0][:4] == ["#", "my", "own", "is"]


@pytest.mark.parametrize("radius", [np.zeros(12), np.full(12, np.inf)])
def test_no_radius_and_no_limit_can_be_shown(tmp_path, radius):
    page = page_of(make_run(tmp_path / "a", radius=radius))
    assert ("∞" in page.text) == bool(np.isinf(radius).all())


def test_many_classes_start_folded(tmp_path):
    labels = np.arange(60) % 30
    page = page_of(make_run(tmp_path / "a", labels=labels))
    assert "details" in {name for name, _ in page.tags}
    assert len(page.table("Class")) == 30


def changed(name, **changes):
    """Breaks a JSON file by changing fields, or taking out those that become None."""

    def break_it(run):
        content = run.read_json(name, "") | changes
        run.write_json(name, {k: v for k, v in content.items() if v is not None})

    return break_it


def written(name, content):
    return lambda run: run.path(name).write_bytes(content)


def recorded(**columns):
    """Breaks certificates.parquet by changing or taking out columns."""

    def break_it(run):
        path = run.path("certificates.parquet")
        table = pyarrow.parquet.read_table(path)
        kept = {k: table[k] for k in table.column_names} | columns
        whole = pyarrow.table({k: v for k, v in kept.items() if v is not None})
        pyarrow.parquet.write_table(whole.replace_schema_metadata(table.schema.metadata), path)

    return break_it


def inequality_of_others(run):
    """Breaks inequality.parquet by making it of certificates that were larger."""
    add_inequality(run)
    path = run.path("certificates.parquet")
    table = pyarrow.parquet.read_table(path)
    radius = pyarrow.compute.multiply(table["radius"], 0.999)
    place = table.schema.get_field_index("radius")
    pyarrow.parquet.write_table(table.set_column(place, "radius", radius), path)


CERTIFY, ATTACK, LOCALLY = "lipcert certify ", "lipcert attack ", "--bound local-product"
EFFORT = {"samples": 12, "steps": 1, "restarts": 1, "seed": 0}


@pytest.mark.parametrize(
    ("break_it", "file", "command"),
    [
        (lambda run: run.path("summary.json").unlink(), "summary.json", CERTIFY),
        (lambda run: run.path("certificates.parquet").unlink(), "certificates.parquet", CERTIFY),
        (written("certificates.parquet", b"PAR1"), "certificates.parquet", CERTIFY),
        (written("summary.json", b"{"), "summary.json", CERTIFY),
        (written("summary.json", b"[]"), "summary.json", CERTIFY),
        (changed("summary.json", acr="high"), "summary.json", CERTIFY),
        (changed("summary.json", median_radius=None), "'median_radius'", CERTIFY),
        (changed("summary.json", kind="sure"), "kind", CERTIFY),
        (changed("summary.json", cra={}), "summary.json", CERTIFY),
        (changed("summary.json", cra={"far": 0.5}), "summary.json", CERTIFY),
        (changed("summary.json", cra={"0.5": 1.0}), "certificates.parquet", CERTIFY),
        (changed("summary.json", cra={"0.25": 0.5}), "certificates.parquet", CERTIFY),
        (changed("summary.json", clean_accuracy=0.01), "clean_accuracy", CERTIFY),
        (changed("summary.json", kind="estimate"), "certificates.parquet", CERTIFY),
        (changed("summary.json", samples=11), "certificates.parquet", CERTIFY),
        (recorded(radius=None), "certificates.parquet", CERTIFY),
        (recorded(radius=[-1.0] * 12), "certificates.parquet", CERTIFY),
        (recorded(label=["a"] * 12), "certificates.parquet", CERTIFY),
        (recorded(label=[None, *[1] * 11]), "certificates.parquet", CERTIFY),
        (written("bound.json", b"\xff"), "bound.json", CERTIFY),
        (changed("bound.json", layers=[{}]), "bound.json", CERTIFY),
        (changed("bound.json", sampled_lower_bound=True), "bound.json", CERTIFY),
        (changed("bound.json", bounds=[]), "no bound in 'bounds'", CERTIFY),
        (changed("bound.json", bounds=None), "bound.json", CERTIFY),
        (changed("attack.json", inside={}), "attack.json", ATTACK),
        (
            changed("attack.json", robust_accuracy={"0.5": EFFORT | {"value": 2.0}}),
            "attack.json",
            ATTACK,
        ),
        (
            changed("attack.json", robust_accuracy={"0.5": EFFORT | {"samples": 13, "value": 1.0}}),
            "attack.json",
            ATTACK,
        ),
        (written("inequality.parquet", b"PAR1"), "inequality.parquet", "--inequality"),
        (
            lambda run: add_inequality(run, found=np.full(8, -1.0)),
            "inequality.parquet",
            "--inequality",
        ),
        (inequality_of_others, "not of these certificates", "--inequality"),
        (
            changed("attack.json", others={"magic": {"0.5": EFFORT | {"value": 2.0}}}),
            "attack.json",
            ATTACK,
        ),
        (written("locality.json", b"{"), "locality.json", LOCALLY),
        (changed("locality.json", cra=None), "locality.json", LOCALLY),
        (changed("locality.json", cra={"all": 0.5}), "locality.json", LOCALLY),
        (changed("locality.json", eps="36/255"), "locality.json", LOCALLY),
        (changed("locality.json", bound="local-liplt"), "locality.json", LOCALLY),
        (changed("locality.json", samples=11), "locality.json", LOCALLY),
        (lambda run: run.path("locality.parquet").unlink(), "locality.parquet", LOCALLY),
        (written("locality.parquet", b"PAR1"), "locality.parquet", LOCALLY),
        (written("metrics.jsonl", b"{}\n"), "line 1", "lipcert train lmt-digits"),
        (changed("recipe.json", versions=None), "recipe.json", "lipcert train lmt-digits"),
    ],
)
def test_broken_files_are_named_with_the_command_that_makes_them(tmp_path, break_it, file, command):
    run = add_locality(complete(make_run(tmp_path / "a")))
    out = write_report([run], tmp_path / "report.html")
    before = out.read_bytes()
    break_it(run)
    with pytest.raises(LipcertError) as caught:
        write_report([run], out)
    assert file in str(caught.value)
    assert command in str(caught.value)
    assert str(run.folder) in str(caught.value)
    assert out.read_bytes() == before


def test_what_to_report_on_and_where_to_is_checked_first(tmp_path):
    with pytest.raises(LipcertError, match="no run"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(LipcertError, match="no folder"):
        write_report([make_run(tmp_path / "a")], tmp_path / "missing" / "report.html")


def test_shown_radii_are_never_above_the_certified_ones():
    for radius in np.random.default_rng(0).random(200):
        assert float(rounded_down(float(radius)).strip("<")) <= max(radius, 0.001)
    assert rounded_down(0.9999) == "0.999"
    assert rounded_down(0.0005) == "<0.001"


def test_numbers_are_short_and_keep_their_size():
    assert [number(v) for v in (0.0, 1.23456, 4e-7, 3e9, None, float("inf"))] == [
        *("0.000", "1.235", "4.00e-07", "3.00e+09", "–", "∞")
    ]
    assert percent(-1e-5) == percent(0.0)


def test_json_becomes_typed_values_and_extra_fields_are_left_out():
    row = {"name": "a", "op": "Sum", "gain": None, "prefix": 1, "sampled": 0.5, "share": 0.0}
    assert typed(LayerRow, row | {"new": 1}, "row") == LayerRow("a", "Sum", None, 1.0, 0.5, 0.0)
    with pytest.raises(LipcertError, match="prefix is 'x', not float"):
        typed(LayerRow, row | {"prefix": "x"}, "row")


def test_a_run_with_other_settings_says_so(tmp_path):
    recipe = recipes.get("lmt-mnist")
    shorter = dataclasses.replace(recipe, epochs=5, seed=3)
    for name, made, expected in (("a", recipe, 0), ("b", shorter, 2)):
        page = page_of(make_run(tmp_path / name, recipe=made))
        assert page.text.count(f"epochs 5 instead of {recipe.epochs}") == expected
        assert "seed 3 instead" not in page.text
        assert "This run: certified with the bound auto" in page.text
