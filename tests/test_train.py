"""Training: resumption bit for bit, nothing lost or half written, errors before work."""

import json

import pytest
import torch

from lipcert import recipes
from lipcert import run as runs
from lipcert.data import from_tensors
from lipcert.errors import LipcertError
from lipcert.recipe import override
from lipcert.train import train


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    images = torch.randint(0, 100, (90, 1, 4, 4), generator=generator)
    images[torch.arange(90), 0, 0, labels] += 155  # something to learn
    return from_tensors(images.to(torch.uint8), labels)


def recipe(**settings):
    return override(recipes.get("lmt-digits"), {"epochs": 4, "batch_size": 32} | settings)


class Stop(KeyboardInterrupt):
    """An interrupt that only these tests raise."""


def interrupted_after(steps):
    def on_step(done, total):
        if done == steps:
            raise Stop

    return on_step


def weights(run):
    return runs.load_model(run)[0].state_dict()


@pytest.mark.parametrize("steps", [1, 3, 4, 8, 11])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, data, steps):
    whole = runs.create(tmp_path / "whole", recipe())
    train(whole, data)
    broken = runs.create(tmp_path / "broken", recipe())
    with pytest.raises(Stop):
        train(broken, data, on_step=interrupted_after(steps))
    torch.manual_seed(12345)  # whatever the process did in between
    train(runs.open_run(tmp_path / "broken"), data)
    expected, resumed = weights(whole), weights(broken)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[k], resumed[k]) for k in expected)

    def curve(run):
        lines = run.path("metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]

    assert curve(whole) == curve(broken)
    assert [x["epoch"] for x in curve(whole)] == [1, 2, 3, 4]


def test_training_learns_and_the_seed_decides(tmp_path, data):
    runs_ = [
        runs.create(tmp_path / name, recipe(seed=seed, epochs=12))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    for run in runs_:
        train(run, data)
    a, b, c = (weights(run) for run in runs_)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)
    last = json.loads(runs_[0].path("metrics.jsonl").read_text().splitlines()[-1])
    assert last["train_accuracy"] > 0.9


def test_an_interrupt_leaves_no_half_written_file(tmp_path, data):
    run = runs.create(tmp_path / "run", recipe())
    with pytest.raises(Stop):
        train(run, data, on_step=interrupted_after(5))
    names = {p.name for p in run.folder.iterdir()}
    assert names == {"recipe.json", "metrics.jsonl", "checkpoint.safetensors"}


def test_without_validation_data_nothing_is_claimed(tmp_path, data):
    run = runs.create(tmp_path / "run", recipe(validation=0, epochs=1))
    train(run, data)
    line = json.loads(run.path("metrics.jsonl").read_text())
    assert line["validation_accuracy"] is None
    assert line["validation_cra_estimate"] is None


def test_a_diverging_run_stops_and_keeps_the_last_good_state(tmp_path, data):
    run = runs.create(tmp_path / "run", recipe(learning_rate=1e30, epochs=50))
    with pytest.raises(LipcertError, match="learning_rate"):
        train(run, data)
    assert not run.path("model.safetensors").exists()


def test_a_broken_checkpoint_is_named(tmp_path, data):
    run = runs.create(tmp_path / "run", recipe())
    with pytest.raises(Stop):
        train(run, data, on_step=interrupted_after(5))
    path = run.path("checkpoint.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LipcertError, match="checkpoint.safetensors"):
        train(run, data)


def test_a_run_is_not_overwritten(tmp_path):
    runs.create(tmp_path / "run", recipe())
    with pytest.raises(LipcertError, match="--resume"):
        runs.create(tmp_path / "run", recipe())


def test_an_unfinished_run_has_no_model(tmp_path):
    run = runs.create(tmp_path / "run", recipe())
    with pytest.raises(LipcertError, match="config.json"):
        runs.load_model(run)
    with pytest.raises(LipcertError, match="no run directory"):
        runs.open_run(tmp_path / "nowhere")


def test_weights_that_do_not_fit_are_refused(tmp_path, data):
    run = runs.create(tmp_path / "run", recipe(epochs=1))
    train(run, data)
    weights_file = run.path("model.safetensors")
    with pytest.raises(LipcertError, match="does not fit"):
        runs.load_weights(torch.nn.Linear(2, 2), weights_file)
    weights_file.write_bytes(b"rubbish")
    with pytest.raises(LipcertError, match="safetensors"):
        runs.load_model(run)
