"""Training: resumption bit for bit, nothing lost or half written, errors before work."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from torch import nn

from lipcert import recipes
from lipcert import run as runs
from lipcert.augment import RandomAffine
from lipcert.data import from_tensors
from lipcert.errors import LipcertError
from lipcert.losses.penalties import Parseval, SpectralNormPenalty
from lipcert.recipe import override
from lipcert.recipes.parts import attacked, nesterov
from lipcert.train import train
from lipcert.wide_resnet import WideResNet


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


PARTS = {
    "penalty": {"penalties": (partial(SpectralNormPenalty, strength=0.1),)},
    "parseval": {"after_step": Parseval(0.1)},
    "augmentation": {"augment": RandomAffine(30, 0.5)},
    "attack": {"perturb": attacked},
    "decay": {"optimiser": partial(nesterov, weight_decay=0.1)},
    "normalisation and dropout": {"model": partial(WideResNet, widen=1, blocks=1, dropout=0.3)},
}


def trained(folder, data, made, *stops):
    """Weights and loss of a run of this recipe, broken off after the given steps and resumed."""
    run = runs.create(folder, made)
    for stop in stops:
        with pytest.raises(Stop):
            train(run, data, on_step=interrupted_after(stop))
        torch.manual_seed(54321)
    train(run, data)
    line = json.loads(run.path("metrics.jsonl").read_text().splitlines()[-1])
    return weights(run), line["loss"]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_a_recipe_counts_and_survives_resumption(tmp_path, data, part):
    plain = dataclasses.replace(recipe(epochs=3, learning_rate=0.01), optimiser=nesterov)
    with_part = dataclasses.replace(plain, **PARTS[part])
    without, _ = trained(tmp_path / "without", data, plain)
    expected, loss = trained(tmp_path / "whole", data, with_part)
    resumed, same_loss = trained(tmp_path / "resumed", data, with_part, 4, 8)
    assert without.keys() != expected.keys() or any(
        not torch.equal(without[k], expected[k]) for k in without
    )
    assert loss == same_loss
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[k], resumed[k]) for k in expected)


def test_parts_run_in_order_with_the_right_gradients(tmp_path, data):
    """Augmentation, perturbation, loss, penalties, step, after_step: once each for every batch."""
    calls, pictures, labels = [], [], []

    class Penalty(nn.Module):
        def __init__(self, net):
            super().__init__()
            self._net = (net,)

        def forward(self):
            calls.append("penalty")
            return 0.0 * sum(p.sum() for p in self._net[0].parameters()) + 1000.0

    def augment(x):
        calls.append("augment")
        pictures.extend(x.flatten(1).tolist())
        return torch.full_like(x, 0.25)

    def perturb(net, x, y, eps):
        calls.append("perturb")
        assert (x == 0.25).all()
        labels.extend(y.tolist())
        assert x.shape[1:] == (1, 4, 4)
        assert len(x) == len(y)
        assert eps >= 0
        return x

    def after_step(net):
        calls.append("after_step")
        assert net.training
        assert not torch.is_grad_enabled()

    parts = {"penalties": (Penalty, Penalty), "augment": augment, "perturb": perturb}
    parts["after_step"] = after_step
    made = dataclasses.replace(recipe(epochs=1), **parts)
    _, loss = trained(tmp_path / "run", data, made)
    batches = 3  # of the 81 samples left for training
    assert calls == ["augment", "perturb", "penalty", "penalty", "after_step"] * batches
    known = dict(zip(map(tuple, data.pixels().flatten(1).tolist()), data.labels, strict=True))
    assert [known[tuple(p)] for p in pictures] == labels  # each picture keeps its label
    assert 2000 < loss < 2010


def test_a_penalty_and_the_steps_after_the_optimisers_do_their_work(tmp_path, data):
    base = recipe(epochs=5)
    make = partial(SpectralNormPenalty, strength=1.0)
    plain, _ = trained(tmp_path / "plain", data, base)
    small, _ = trained(tmp_path / "small", data, dataclasses.replace(base, penalties=(make,)))
    unit, _ = trained(tmp_path / "unit", data, dataclasses.replace(base, after_step=Parseval(0.3)))
    hidden = [k for k in plain if k.endswith("weight")][:-1]

    def norms(state):
        return torch.stack([torch.linalg.matrix_norm(state[k], 2) for k in hidden])

    assert (norms(small) < norms(plain)).all()
    assert ((norms(unit) - 1).abs() < 0.05).all()


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
