"""The command line: the verbs, end to end on tiny data, and what bad input gets."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from lipcert import cli, commands, evaluate, recipes, smallest, tables
from lipcert import run as runs
from lipcert.attacking import refuted
from lipcert.bound_table import BoundRow, BoundTable, LayerRow
from lipcert.inequality import Inequality
from lipcert.recipe import override

VERBS = ["attack", "bound", "certify", "demo", "recipes", "report", "train"]
SMALL = ["--set", "epochs=2", "--set", "batch_size=256"]


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run trained for two epochs through the command line."""
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert call("train", "lmt-digits", *SMALL, "--out", folder) == 0
    return folder


def call(*words) -> int:
    """The exit code of a command run in this process."""
    before = sys.argv
    sys.argv = ["lipcert", *map(str, words)]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    finally:
        sys.argv = before
    return 0


def refused(capsys, *words) -> str:
    """The message of a command that must be refused with exit code 2 and no traceback."""
    assert call(*words) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_the_verbs_are_frozen(capsys):
    assert sorted(c.name or c.callback.__name__ for c in cli.app.registered_commands) == VERBS
    for verb in VERBS:
        assert call(verb, "--help") == 0
        assert verb in capsys.readouterr().out


def test_help_does_not_import_torch():
    code = "import sys; import lipcert.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_chain_of_verbs(run_folder, capsys, tmp_path):
    out = tmp_path / "rows.parquet"
    words = ("certify", run_folder, "--eps", "36/255", "--eps", "0.5", "--out", out, "--json")
    assert call(*words) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["kind"] == "upper"
    assert list(summary["cra"]) == ["36/255", "0.5"]
    assert 0 <= summary["cra"]["0.5"] <= summary["cra"]["36/255"] <= summary["clean_accuracy"] <= 1
    assert summary == json.loads((run_folder / "summary.json").read_text())

    table = pyarrow.parquet.read_table(out)
    assert table.num_rows == summary["samples"] == 360
    right = [
        a == b
        for a, b in zip(table["label"].to_pylist(), table["prediction"].to_pylist(), strict=True)
    ]
    robust = table["robust@36/255"].to_pylist()
    both = sum(a and b for a, b in zip(right, robust, strict=True))
    assert both / 360 == summary["cra"]["36/255"]
    assert set(table["kind"].to_pylist()) == {"upper"}

    assert call("attack", run_folder, "--samples", 50, "--steps", 10, "--restarts", 2) == 0
    assert "0 predictions changed" in capsys.readouterr().out
    assert call("attack", run_folder, "--eps", "36/255", "--steps", 10, "--restarts", 2) == 0
    capsys.readouterr()
    attack = json.loads((run_folder / "attack.json").read_text())
    assert attack["inside"]["flipped"] == 0
    assert attack["robust_accuracy"]["36/255"]["value"] >= summary["cra"]["36/255"]

    assert call("bound", run_folder, "--json") == 0
    table = json.loads(capsys.readouterr().out)
    assert [row["bound"] for row in table["bounds"]] == ["product", "liplt", "ellipsoid"]
    assert {row["kind"] for row in table["bounds"]} == {"upper"}
    assert min(row["lipschitz"] for row in table["bounds"]) >= table["sampled_lower_bound"] > 0
    assert sum(row["share"] for row in table["layers"]) == pytest.approx(1)
    kept = json.loads((run_folder / "bound.json").read_text())
    for row, old in zip(table["bounds"], kept["bounds"], strict=True):
        assert row | {"seconds": 0} == old | {"seconds": 0}

    page = tmp_path / "page.html"
    assert call("report", run_folder, "--out", page) == 0
    assert "36/255" in page.read_text()


def test_a_flip_inside_a_certified_ball_fails_the_command(run_folder, monkeypatch, capsys):
    assert call("certify", run_folder) == 0
    table = evaluate.read_certificates(runs.open_run(run_folder))
    wide = table.set_column(
        table.schema.get_field_index("radius"), "radius", pyarrow.array([5.0] * table.num_rows)
    )
    monkeypatch.setattr(evaluate, "read_certificates", lambda run: wide)
    assert call("attack", run_folder, "--samples", 20, "--steps", 20) == 1
    assert "must not" in capsys.readouterr().err


@pytest.fixture
def own_attacks_only(monkeypatch):
    monkeypatch.setattr(smallest, "installed", lambda package: False)


QUICK = ["--samples", 12, "--steps", 8, "--restarts", 1]


def test_the_inequality(run_folder, own_attacks_only, capsys):
    assert call("certify", run_folder) == 0
    capsys.readouterr()
    assert call("attack", run_folder, "--inequality", *QUICK, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    table = pyarrow.parquet.read_table(run_folder / "inequality.parquet")
    names = ["certified", "sampled_global", "sampled_local", "smallest_perturbation"]
    assert table.column_names == ["index", *names, "found_by"]
    assert table.num_rows == said["samples"] == 12
    radii = [table[name].to_pylist() for name in names]
    certificates = evaluate.read_certificates(runs.open_run(run_folder)).slice(0, 12).to_pydict()
    columns = (certificates[name] for name in ("label", "prediction", "radius"))
    expected = [r if a == b else 0 for a, b, r in zip(*columns, strict=True)]
    assert radii[0] == expected
    for lower, upper in itertools.pairwise(radii[:3]):
        assert all(a <= b for a, b in zip(lower, upper, strict=True))
    assert said["refuted"] == 0
    assert said["attacks"] == "pgd"
    assert list(said["medians"]) == names
    assert said["ratios"]["smallest_perturbation / certified"] > 1

    assert call("attack", run_folder, "--inequality", *QUICK) == 0
    shown = capsys.readouterr().out
    assert shown.count("no certificate") == 2
    assert call("certify", run_folder) == 0
    assert not (run_folder / "inequality.parquet").exists()  # it spoke of the earlier certificates


def test_a_certificate_above_a_perturbation_fails_the_command(
    run_folder, own_attacks_only, monkeypatch, capsys
):
    assert call("certify", run_folder) == 0
    table = evaluate.read_certificates(runs.open_run(run_folder))
    radius = [5.0, *table["radius"].to_pylist()[1:]]
    place = table.schema.get_field_index("radius")
    false = table.set_column(place, "radius", pyarrow.array(radius))
    assert table["label"][0] == table["prediction"][0]
    monkeypatch.setattr(evaluate, "read_certificates", lambda run: false)
    assert call("attack", run_folder, "--inequality", *QUICK) == 1
    message = capsys.readouterr().err
    assert "1 certified radii" in message
    assert "must not" in message
    (run_folder / "inequality.parquet").unlink()


def test_the_inequality_needs_the_certificates_of_these_samples(
    run_folder, monkeypatch, capsys, tmp_path
):
    assert call("certify", run_folder) == 0
    table = evaluate.read_certificates(runs.open_run(run_folder))
    monkeypatch.setattr(evaluate, "read_certificates", lambda run: table.slice(1))
    message = refused(capsys, "attack", run_folder, "--inequality", *QUICK)
    assert "lipcert certify" in message
    for words in (["--eps", "0.5"], ["--attack", "deepfool"]):
        assert "leave out" in refused(capsys, "attack", run_folder, "--inequality", *words)


def test_other_attacks_have_places_of_their_own(run_folder, capsys):
    pytest.importorskip("foolbox")
    pytest.importorskip("pyautoattack")
    eps = ["--eps", "0.5", *QUICK]
    assert call("attack", run_folder, *eps) == 0
    before = json.loads((run_folder / "attack.json").read_text())
    for name in ("deepfool", "cw", "autoattack"):
        assert call("attack", run_folder, *eps, "--attack", name) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("pgd", "deepfool", "cw", "autoattack"))
    after = json.loads((run_folder / "attack.json").read_text())
    others = after.pop("others")
    assert after == before
    assert list(others) == ["deepfool", "cw", "autoattack"]
    for name, found in others.items():
        assert found["0.5"]["attack"] == name
        assert 0 <= found["0.5"]["value"] <= 1
    assert others["autoattack"]["0.5"]["value"] <= before["robust_accuracy"]["0.5"]["value"] + 0.1


def test_attacks_that_cannot_be_run_are_refused(run_folder, capsys, monkeypatch):
    assert "deepfool" in refused(capsys, "attack", run_folder, "--attack", "magic")
    assert "--eps" in refused(capsys, "attack", run_folder, "--attack", "cw")
    monkeypatch.setitem(sys.modules, "foolbox", None)
    message = refused(capsys, "attack", run_folder, "--attack", "cw", "--eps", "0.5")
    assert "pip install -e '.[attacks]'" in message


def test_recipes_are_listed_and_shown(capsys):
    assert call("recipes", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in listed] == recipes.names()
    assert call("recipes", "lmt-mnist") == 0
    assert "1802.04034" in capsys.readouterr().out
    assert call("recipes") == 0
    assert "gloro-digits" in capsys.readouterr().out


def test_resuming(tmp_path, capsys, run_folder):
    assert call("train", "lmt-digits", *SMALL, "--out", run_folder, "--resume") == 0
    assert "finished already" in capsys.readouterr().out
    message = refused(
        capsys, "train", "lmt-digits", "--set", "epochs=9", "--out", run_folder, "--resume"
    )
    assert "epochs=9 (it has 2)" in message
    assert "gloro" in refused(capsys, "train", "gloro-digits", "--out", run_folder, "--resume")
    assert "--resume" in refused(capsys, "train", "lmt-digits", "--out", run_folder)
    assert "no run directory" in refused(
        capsys, "train", "lmt-digits", "--out", tmp_path / "none", "--resume"
    )


def test_a_network_of_ones_own(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mynet.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5))\n"
        "def attention():\n    return nn.MultiheadAttention(4, 2)\n"
        "def nothing():\n    return 3\n"
        "def needs(a):\n    return a\n"
        "here = make()\n"
    )
    assert call("bound", "mynet:make", "--input-shape", "3,2,2", "--json") == 0
    table = json.loads(capsys.readouterr().out)
    for row in table["bounds"]:
        assert row["lipschitz"] == pytest.approx(table["sampled_lower_bound"], rel=1e-3)
    assert "--input-shape" in refused(capsys, "bound", "mynet:make")
    assert "C,H,W" in refused(capsys, "bound", "mynet:make", "--input-shape", "3x2x2")
    assert "shape" in refused(capsys, "bound", "mynet:make", "--input-shape", "3,2,3")
    assert "nosuch" in refused(capsys, "bound", "mynet:nosuch", "--input-shape", "3,2,2")
    assert "Module" in refused(capsys, "bound", "mynet:nothing", "--input-shape", "3,2,2")
    assert call("bound", "mynet:here", "--input-shape", "3,2,2", "--json") == 0
    capsys.readouterr()
    assert "needs" in refused(capsys, "bound", "mynet:needs", "--input-shape", "3,2,2")
    assert "weights" in refused(
        capsys, "bound", "mynet:make", "--input-shape", "3,2,2", "--weights", "none.safetensors"
    )


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["train", "nosuch"], "lmt-digits"),
        (["train", "lmt-digits", "--set", "nosuch=1"], "epochs"),
        (["train", "lmt-digits", "--set", "epochs"], "field=value"),
        (["train", "lmt-digits", "--data", "/no/such/folder"], "--data"),
        (["train", "lmt-digits", "--device", "cuda:99"], "cuda:99"),
        (["certify", "/no/such/run"], "no run directory"),
        (["report", "/no/such/run"], "no run directory"),
        (["recipes", "nosuch"], "Recipes"),
    ],
)
def test_bad_input_is_refused_before_any_work(words, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in refused(capsys, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("eps", ["0", "-1", "x", "inf"])
def test_a_bad_radius_is_refused(eps, capsys, run_folder):
    assert "eps" in refused(capsys, "certify", run_folder, "--eps", eps)
    assert "eps" in refused(capsys, "attack", run_folder, "--eps", eps)


def test_what_does_not_go_with_a_run_is_refused(capsys, run_folder, tmp_path):
    assert "is a run" in refused(capsys, "bound", run_folder, "--weights", "w.safetensors")
    assert "no folder" in refused(capsys, "certify", run_folder, "--out", tmp_path / "no" / "x")
    assert "*.parquet" in refused(capsys, "certify", run_folder, "--out", tmp_path / "a.csv")


def test_an_unknown_bound_is_refused(capsys, run_folder):
    assert "product" in refused(capsys, "certify", run_folder, "--bound", "magic")
    assert "local-liplt" in refused(capsys, "bound", run_folder, "--bound", "magic")


DEEP = """
from torch import nn
def make():
    return nn.Sequential(
        nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4)
    )
def whole():
    return nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Conv1d(2, 1, 3))
"""


@pytest.fixture
def deep(tmp_path, monkeypatch):
    """A network for which LipLT is far below the product, and one without logits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("deep_net.py").write_text(DEEP)
    yield "deep_net"
    sys.modules.pop("deep_net", None)


def bounds_of(capsys, *words):
    assert call("bound", *words, "--json") == 0
    table = json.loads(capsys.readouterr().out)
    return table, {row["bound"]: row for row in table["bounds"]}


def test_the_ellipsoid_bound_by_name(deep, capsys):
    torch.manual_seed(0)
    net = ["--bound", "ellipsoid", "--bound", "liplt"]
    table, rows = bounds_of(capsys, f"{deep}:make", "--input-shape", 6, *net)
    assert table["sampled_lower_bound"] <= rows["ellipsoid"]["lipschitz"]
    assert rows["ellipsoid"]["lipschitz"] < 0.9 * rows["liplt"]["lipschitz"]
    assert rows["ellipsoid"]["kind"] == "upper"


def test_bounds_side_by_side(deep, capsys):
    torch.manual_seed(0)
    net = ["--bound", "liplt", "--bound", "auto", "--bound", "product"]
    table, rows = bounds_of(capsys, f"{deep}:make", "--input-shape", 6, *net)
    assert list(rows) == ["liplt", "auto", "product"]
    best = rows["auto"]["lipschitz"]
    assert best < rows["liplt"]["lipschitz"] < 0.8 * rows["product"]["lipschitz"]
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["lipschitz"] / best)
        assert row["smallest_pair"] <= row["median_pair"] <= row["largest_pair"]
        assert row["seconds"] > 0
    for end in ("smallest_pair", "median_pair", "largest_pair"):
        assert rows["auto"][end] <= min(rows["liplt"][end], rows["product"][end])
    assert best >= table["sampled_lower_bound"]
    assert table["layers"][-1]["prefix"] == rows["product"]["lipschitz"]
    torch.manual_seed(0)
    _, alone = bounds_of(capsys, f"{deep}:make", "--input-shape", 6, "--bound", "product")
    assert list(alone) == ["product"]
    assert alone["product"]["ratio"] == 1


def test_bounds_without_logits_have_no_pairs(deep, capsys):
    _, rows = bounds_of(capsys, f"{deep}:whole", "--input-shape", "1,8", "--bound", "auto")
    assert rows["auto"]["median_pair"] is None
    assert call("bound", f"{deep}:whole", "--input-shape", "1,8") == 0
    assert "│        - │" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_printed_table_loses_no_column(columns, monkeypatch, capsys):
    """Numbers stay whole in 80 columns however long they are; only layer names are folded."""
    monkeypatch.setenv("COLUMNS", str(columns))
    rows = (
        BoundRow("product", "upper", 12.34, 123456.7, 1.2345, 12345.6, 23456.7, 34567.8),
        BoundRow("liplt", "probabilistic", 112.34, 98765.4, 1.0, None, None, None),
    )
    name = "features.stage1.block0.conv1+bn1"
    layers = (LayerRow(name, "Lipschitz", 1.234, 123456.7, 0.00012345, 0.12),)
    tables.show_bounds(BoundTable(rows, 0.00012345, layers))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= max(columns, 80)
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in out.splitlines()]
    product, liplt, layer = (row for row in cells if len(row) > 1 and row[-1])
    assert product == ["product", "upper", "1.235e+05", "1.234", "1.000e+09", "2.346e+04", "12.34"]
    assert liplt == ["liplt", "probabilistic", "9.877e+04", "1.000", "8.000e+08", "-", "112.34"]
    assert layer[1:] == ["Lipschitz", "1.234", "1.235e+05", "0.0001234", "1.000e+09", "12 %"]
    names = [row[0] for row in cells if len(row) > 1][2:]
    assert "".join(names) == name


def test_tight_is_the_tightest(deep, capsys):
    torch.manual_seed(0)
    net = [part for name in ("tight", "auto", "eclipse") for part in ("--bound", name)]
    _, rows = bounds_of(capsys, f"{deep}:make", "--input-shape", 6, *net)
    best = rows["tight"]["largest_pair"]
    assert best < rows["auto"]["largest_pair"]
    assert best <= rows["eclipse"]["largest_pair"]


@pytest.mark.parametrize("bound", ["product", "liplt", "auto"])
def test_certificates_of_each_bound(bound, run_folder, capsys):
    assert call("certify", run_folder, "--bound", bound, "--json") == 0
    assert json.loads(capsys.readouterr().out)["bound"] == bound
    kept = json.loads((run_folder / "bound.json").read_text())
    shown = ["product", "liplt", "ellipsoid"]
    shown = {"product": shown[:1], "liplt": shown[:2], "auto": shown}[bound]
    assert [row["bound"] for row in kept["bounds"]] == shown
    rows = evaluate.read_certificates(runs.open_run(run_folder))
    assert rows.schema.metadata[b"bound"] == bound.encode()


@pytest.fixture(scope="module")
def relu_run(tmp_path_factory):
    """A run whose network has units that a ball keeps constant; its weights are random."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    run = runs.create(tmp_path_factory.mktemp("runs") / "relu", recipes.get("crm-digits"))
    net = run.recipe.model(in_shape=(1, 8, 8), classes=10)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("bias"):
                p.uniform_(-0.3, 0.1)
    runs.save_model(run, net, (1, 8, 8), tuple("0123456789"))
    return run


def test_certificates_of_local_bounds(relu_run, own_attacks_only, capsys, tmp_path):
    eps = ["--eps", "1/20", "--eps", "0.1"]
    assert call("certify", relu_run.folder, *eps) == 0
    auto = evaluate.read_certificates(relu_run).to_pydict()
    assert set(auto["proved_by"]) <= {"auto", ""}
    assert not relu_run.path("locality.json").exists()
    capsys.readouterr()

    local = ("certify", relu_run.folder, "--bound", "local-product", *eps)
    assert call(*local) == 0
    shown = capsys.readouterr().out
    assert "What local-product gains at 1/20" in shown
    summary = relu_run.read_json("summary.json", "")
    assert summary["bound"] == "local-product"
    assert summary["kind"] == "upper"
    found = evaluate.read_certificates(relu_run).to_pydict()
    gains = [a / b for a, b in zip(found["radius"], auto["radius"], strict=True) if b > 0]
    assert min(gains) >= 1
    assert max(gains) > 1.01
    for by, a, b in zip(found["proved_by"], found["radius"], auto["radius"], strict=True):
        better = a > b * (1 + 1e-9)
        assert by in ({"local-product@1/20", "local-product@0.1"} if better else {"auto", ""})
        assert (by == "") == (a == 0)

    said = relu_run.read_json("locality.json", "")
    assert said["cra"]["all"] == summary["cra"]["1/20"]
    assert said["proved_by"] == dict(Counter(found["proved_by"]).most_common())
    assert len(said["layers"]) == 3
    assert said["median_local"] < said["median_global"]
    rows = evaluate.read_local_rows(relu_run, "")
    assert float(rows.local_constant.quantile(0.5)) == said["median_local"]
    assert rows.proved["all"].tolist() == found["robust@1/20"]
    kept = relu_run.read_json("bound.json", "")["bounds"]
    label = "local-product, median of 32 samples in balls of 1/20"
    labels = ["product", "liplt", "ellipsoid", label]
    assert [row["bound"] for row in kept] == labels

    assert call("attack", relu_run.folder, "--samples", 40, "--steps", 10, "--restarts", 2) == 0
    assert "0 predictions changed" in capsys.readouterr().out
    assert call("attack", relu_run.folder, "--inequality", *QUICK) == 0
    page = tmp_path / "page.html"
    assert call("report", relu_run.folder, "--out", page) == 0
    assert "Around each image" in page.read_text()

    assert call("certify", relu_run.folder) == 0
    assert not relu_run.path("locality.json").exists()  # it spoke of the earlier certificates
    assert not relu_run.path("locality.parquet").exists()


def test_slopes_seen_elsewhere_do_not_refute_a_local_certificate():
    ones = np.ones(2)
    below, far = np.array([0.9, 1.0]), np.full(2, np.inf)
    seen, found = Inequality(ones, below, ones, far, ("", ""), {}), ("pgd", "pgd")
    attacked = Inequality(ones, ones, ones, below, found, {})
    for bound in ("auto", "product", "liplt"):
        assert refuted(seen, bound).tolist() == [True, False]
    for bound in ("local-product", "local-liplt", "local-ellipsoid"):
        assert refuted(seen, bound).tolist() == [False, False]
        assert refuted(attacked, bound).tolist() == [True, False]


def test_local_bounds_in_the_table(relu_run, deep, capsys):
    names = ("--bound", "local-product", "--bound", "product")
    _, rows = bounds_of(capsys, relu_run.folder, *names)
    label = "{}, median of 32 samples in balls of {}".format
    assert list(rows) == [label("local-product", relu_run.recipe.radii[0]), "product"]
    net = [f"{deep}:make", "--input-shape", 6, "--bound", "local-liplt"]
    assert list(bounds_of(capsys, *net, "--eps", "1/8")[1]) == [label("local-liplt", "1/8")]
    assert "--eps" in refused(capsys, "bound", *net)
    assert call("bound", relu_run.folder, *names) == 0
    assert "local-product," in capsys.readouterr().out


@pytest.mark.parametrize("eps", ["0", "-1", "x", "inf"])
def test_a_bad_radius_of_local_bounds_is_refused(eps, capsys, relu_run):
    for verb in ("bound", "certify"):
        words = (verb, relu_run.folder, "--bound", "local-product", f"--eps={eps}")
        assert "eps" in refused(capsys, *words)
    assert "eps" in refused(capsys, "bound", relu_run.folder, f"--eps={eps}")


def test_a_radius_without_a_local_bound_is_refused(capsys, relu_run):
    assert "local-product" in refused(capsys, "bound", relu_run.folder, "--eps", "0.1")


def test_nan_weights_are_refused(capsys, tmp_path):
    run = runs.create(tmp_path / "run", override(recipes.get("lmt-digits"), {}))
    net = run.recipe.model(in_shape=(1, 8, 8), classes=10)
    with torch.no_grad():
        next(net.parameters())[0, 0] = float("nan")
    runs.save_model(run, net, (1, 8, 8), tuple("0123456789"))
    message = refused(capsys, "certify", run.folder)
    assert "NaN" in message
    assert "1.weight" in message
    assert not run.path("summary.json").exists()


def test_an_interrupt_ends_with_130_and_the_run_goes_on(tmp_path):
    """A real process, a real signal."""
    out = tmp_path / "run"
    words = [sys.executable, "-c", "from lipcert.cli import main; main()"]
    settings = ["--set", "epochs=4000"]
    process = subprocess.Popen(
        [*words, "train", "lmt-digits", *settings, "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A test run started in the background hands on a SIGINT that is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"--resume" in message
    assert b"Traceback" not in message
    assert {p.name for p in out.iterdir()} <= set(runs.FILES)
    assert (out / "checkpoint.safetensors").exists()


def test_the_demo_removes_only_its_own_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "_train", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    keep = tmp_path / "mine.txt"
    keep.write_text("x")
    runs.create(tmp_path, recipes.get("gloro-digits"))
    assert "gloro-digits" in refused(capsys, "demo", "--out", tmp_path)
    runs.remove(tmp_path, "gloro-digits")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    assert call("demo", "--out", tmp_path) == 130


def test_certificates_are_of_the_weights_that_were_certified(run_folder, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(run_folder, folder)
    assert call("certify", folder) == 0
    assert call("attack", folder, "--eps", "0.1", *QUICK) == 0
    path = folder / "model.safetensors"
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    assert json.loads((folder / "summary.json").read_text())["weights_sha256"] == sha
    assert call("report", folder) == 0
    assert sha in (folder / "report.html").read_text(encoding="utf-8")
    other = {name: 1.01 * t for name, t in load_file(path).items()}
    save_file(other, path)
    for words in (["attack", folder, *QUICK], ["report", folder]):
        assert "has changed since" in refused(capsys, *words)
    # At a radius no certificates are needed, and what was found before is of other weights.
    assert call("attack", folder, "--eps", "0.2", *QUICK) == 0
    assert list(json.loads((folder / "attack.json").read_text())["robust_accuracy"]) == ["0.2"]
    assert call("certify", folder) == 0
    assert call("attack", folder, *QUICK) == 0
    assert call("report", folder) == 0
    save_file({name: t * torch.nan for name, t in other.items()}, path)
    for words in (["attack", folder, "--eps", "0.2", *QUICK], ["certify", folder]):
        assert "NaN" in refused(capsys, *words)


def test_new_certificates_end_attacks_on_other_weights(run_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run_folder, folder)
    assert call("attack", folder, "--eps", "0.1", *QUICK) == 0
    path = folder / "model.safetensors"
    save_file({name: 1.01 * t for name, t in load_file(path).items()}, path)
    assert call("certify", folder) == 0
    assert "robust_accuracy" not in json.loads((folder / "attack.json").read_text())


def test_the_last_line_of_a_training_names_the_last_epoch(tmp_path, capsys):
    assert call("train", "lmt-digits", *SMALL, "--out", tmp_path / "run") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "epoch" in line]
    assert "epoch 2/2" in lines[-1]


def test_a_misspelt_recipe_is_answered_with_its_like(capsys):
    message = refused(capsys, "recipes", "lmt-mnst")
    assert "Did you mean lmt-mnist" in message
    assert "cll-moons" not in message
