"""The examples that draw CLL: they run, draw what they say, and do no training twice."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Runs an example as a user does, in an empty folder."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "slack_sweep", raising=False)

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    yield run
    sys.modules.pop("slack_sweep", None)


def colours(path):
    """The colours of a picture, as rows of red, green and blue."""
    return torch.tensor(imread(path))[..., :3].reshape(-1, 3)


def test_two_moons(example, tmp_path, capsys):
    example("two_moons.py", "--epochs", 1, "--out", tmp_path / "moons.png")
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said[:4]] == [
        "GloRo",
        *(f"CLL, slack {slack}" for slack in ("0.75", "0.25", "0.0001")),
    ]
    assert len({line.partition(":")[2] for line in said[:4]}) == 4  # four different nets
    assert said[4] == str(tmp_path / "moons.png")
    found = colours(said[4])
    assert len(found) == 1500 * 330
    for region in ([0xF2, 0xA9, 0x6F], [0x7E, 0xA9, 0xD8]):  # not certified, of either class
        gap = (found * 255 - torch.tensor(region)).abs().amax(1)
        assert (gap < 1).sum() > 1000
    assert list(tmp_path.iterdir()) == [tmp_path / "moons.png"]


SWEEP = ("--epochs", 1, "--slack", 0.5, 0.1, "--eps", 0.15, "--out", "sweep")


def test_a_sweep_of_slacks_goes_on_where_it_was(example, tmp_path, capsys, monkeypatch):
    example("slack_sweep.py", *SWEEP)
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "sweep/slack_sweep.png"
    picture = tmp_path / "sweep" / "slack_sweep.png"
    assert len(colours(picture).unique(dim=0)) > 10
    results = {
        slack: tmp_path / "sweep" / f"eps-0.15-slack-{slack}-epochs-1" / "result.json"
        for slack in ("0.5", "0.1")
    }
    found = {slack: json.loads(path.read_text()) for slack, path in results.items()}
    assert found["0.5"] != found["0.1"]
    for numbers in found.values():
        assert 0 <= numbers["certified"] <= numbers["clean"] <= 1
        assert numbers["constant"] > 0

    def again(*arguments, **more):
        raise AssertionError("trained again")

    picture.unlink()
    monkeypatch.setattr("lipcert.train.train", again)
    example("slack_sweep.py", *SWEEP)
    assert capsys.readouterr().out == said
    assert picture.exists()
    with pytest.raises(AssertionError, match="trained again"):  # other epochs are another training
        example("slack_sweep.py", *SWEEP, "--epochs", 2)


def test_a_training_of_a_sweep_that_was_interrupted_goes_on(example, tmp_path, capsys):
    one = ("--epochs", 1, "--slack", 0.5, "--eps", 0.15)
    example("slack_sweep.py", *one, "--out", "whole")
    said = capsys.readouterr().out.splitlines()
    folder = tmp_path / "whole" / "eps-0.15-slack-0.5-epochs-1"
    (folder / "result.json").unlink()  # stopped after the training
    example("slack_sweep.py", *one, "--out", "whole")
    assert capsys.readouterr().out.splitlines() == said
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("name", ["gloro-moons", "lmt-digits", "cpl-cifar100"])
def test_a_recipe_without_slack_is_refused(example, tmp_path, capsys, name):
    with pytest.raises(SystemExit) as stop:
        example("slack_sweep.py", "--recipe", name)
    assert stop.value.code == 2
    assert f"{name} does not train with the loss cll" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
