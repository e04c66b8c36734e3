"""Two moons: where the points lie, and runs on inputs that are points and no pictures."""

import json
import math
import re

import pytest
import torch
from torch import nn

from lipcert import attacking, recipes
from lipcert.attacking import Effort, attack_run
from lipcert.data import Dataset, Split, load
from lipcert.external_attacks import AttackName
from lipcert.moons import two_moons
from lipcert.run import Run
from test_cli import call


def arcs(n):
    """Points of the two half circles without noise, `(n, 2)` each."""
    t = torch.linspace(0, math.pi, n)
    return (
        torch.stack([t.cos(), t.sin()], 1),
        torch.stack([1 - t.cos(), 0.5 - t.sin()], 1),
    )


def test_the_half_circles_are_half_a_unit_apart():
    outer, inner = arcs(3001)
    assert torch.cdist(outer, inner).min().item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_classes_keep_their_distance(seed):
    points, labels = two_moons(3000, seed)
    points = points.double()
    gap = torch.cdist(points[labels == 0], points[labels == 1]).min()
    assert 0.3 - 1e-6 <= gap < 0.4


def test_noise_fills_a_disc_around_the_place_on_the_arc():
    n = 20_000
    points, labels = two_moons(n, 3)
    centres = torch.cat(arcs(n // 2))
    noise = points.double() - centres
    radii = noise.norm(dim=1)
    assert radii.max() <= 0.1 + 1e-6
    # Uniform in the disc: the share of points within r is (r / 0.1)^2, whatever the direction.
    for r in (0.03, 0.05, 0.08):
        assert (radii <= r).double().mean().item() == pytest.approx((r / 0.1) ** 2, abs=0.015)
    assert noise.mean(0).abs().max() < 0.002
    covariance = noise.T @ noise / n
    assert torch.allclose(covariance, 0.0025 * torch.eye(2), atol=1e-4)
    assert labels.tolist() == [0] * (n // 2) + [1] * (n // 2)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_few_and_odd_numbers_of_points(n):
    points, labels = two_moons(n, 0)
    assert points.shape == (n, 2)
    assert points.dtype == torch.float32
    assert labels.bincount(minlength=2).tolist() == [n - n // 2, n // 2]


def test_a_seed_gives_the_same_points_and_another_seed_others():
    torch.manual_seed(1)
    first = two_moons(50, 7)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)  # the global generator was left alone
    again, other = two_moons(50, 7), two_moons(50, 8)
    assert torch.equal(first[0], again[0])
    assert not (first[0] == other[0]).any()


def test_moons_as_data():
    parts = {split: load("moons", split) for split in Split}
    train, test = parts[Split.TRAIN], parts[Split.EVALUATION]
    assert (len(train), len(test)) == (2_000, 20_000)
    assert (train.split, test.split) == ("train", "test")
    for data in parts.values():
        assert data.limits is None
        assert data.source == "moons"
        assert data.classes == ("outer", "inner")
        assert data.images.shape[1:] == (2,)
        assert torch.equal(data.pixels(), data.images)
    again = load("moons", Split.TRAIN)
    assert torch.equal(again.images, train.images)
    assert not torch.isin(train.images, test.images).all(1).any()
    sizes = [
        (data.images[:1000] - arcs(len(data) // 2)[0][:1000]).norm(dim=1) for data in (train, test)
    ]
    assert torch.isclose(*sizes, rtol=0, atol=1e-6).float().mean() < 0.05  # each its own noise
    # A part keeps the range, and the classes keep their distance from each other's other split.
    assert train.subset(slice(5)).limits is None
    for label in (0, 1):
        near = torch.cdist(train.images[train.labels == label], test.images[test.labels != label])
        assert near.min() >= 0.3 - 1e-3


class Wall(nn.Module):
    """Class 1 to the right of x_0 = 1.1, outside the box of pixels."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.tensor(1.1))

    def forward(self, x):
        return torch.stack([self.place - x[:, 0], x[:, 0] - self.place], 1)


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize(("limits", "robust"), [(None, 0.0), ((0.0, 1.0), 1.0)])
def test_an_attack_stays_within_the_limits_of_the_data_and_no_others(tmp_path, limits, robust):
    x = torch.tensor([[0.95, 0.5], [0.9, 0.2]])
    data = Dataset(x, torch.tensor([0, 0]), ("a", "b"), "moons", "test", limits)
    run = Run(tmp_path, recipes.get("cll-moons"))
    effort = Effort(steps=10, restarts=1, samples=None, seed=0, batch_size=2)
    found = attack_run(run, Wall(), data, attack=AttackName.PGD, radii=("0.3",), effort=effort)
    assert found["robust_accuracy"]["0.3"]["value"] == robust


@pytest.fixture
def single_precision():
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def moons_run(tmp_path_factory):
    """A run of cll-moons through the command line: trained, certified, attacked, reported."""
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("runs") / "moons"
    assert call("train", "cll-moons", "--set", "epochs=2", "--out", folder) == 0
    assert call("certify", folder, "--eps", "0.15", "--batch-size", 5000) == 0
    return folder


@pytest.mark.usefixtures("single_precision")
def test_a_run_is_attacked_without_clamping(moons_run, monkeypatch, capsys):
    boxes = []
    real = attacking.pgd

    def spy(net, x, targets, radius, steps, restarts, clip, **rest):
        boxes.append(clip)
        result = real(net, x, targets, radius, steps, restarts, clip, **rest)
        assert ((result.adversarial < 0) | (result.adversarial > 1)).any()
        return result

    monkeypatch.setattr(attacking, "pgd", spy)
    few = ("--samples", 200, "--steps", 5, "--restarts", 1)
    assert call("attack", moons_run, "--eps", "0.15", *few) == 0
    assert call("attack", moons_run, *few) == 0
    assert boxes
    assert set(boxes) == {None}
    capsys.readouterr()
    attack = json.loads((moons_run / "attack.json").read_text())
    assert attack["inside"]["flipped"] == 0
    assert attack["inside"]["attacked"] > 0
    summary = json.loads((moons_run / "summary.json").read_text())
    assert summary["kind"] == "upper"
    rows = load("moons", Split.EVALUATION)
    assert summary["samples"] == len(rows)


@pytest.mark.usefixtures("single_precision")
def test_a_report_of_points_shows_their_coordinates_and_no_pictures_of_them(moons_run, capsys):
    assert call("report", moons_run) == 0
    capsys.readouterr()
    page = (moons_run / "report.html").read_text()
    assert "<img" not in page
    shown = [
        tuple(map(float, pair))
        for pair in re.findall(r"<code>(-?[\d.e-]+), (-?[\d.e-]+)</code>", page)
    ]
    assert len(shown) >= 10
    data = load("moons", Split.EVALUATION).images
    distances = torch.cdist(torch.tensor(shown), data).amin(1)
    assert distances.max() < 0.01  # three digits of coordinates up to 2
    assert "outer → " in page


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize("words", [("--inequality",), ("--attack", "cw", "--eps", "0.1")])
def test_attacks_on_pixels_refuse_points(words, moons_run, capsys):
    assert call("attack", moons_run, *words, "--samples", 20) == 2
    assert "are no pixels" in capsys.readouterr().err.replace("\n", " ")
