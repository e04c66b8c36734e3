"""The losses of BCP and Local-Lip: reference numbers, and laws."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from lipcert.errors import LipcertError
from lipcert.losses import bcp, ce, gloro, label, lmt, local_lip

GOLDEN = json.loads((Path(__file__).parent / "golden" / "local_lip_losses.json").read_text())
RUNS = [(case, run) for case, row in GOLDEN["cases"].items() for run in row["runs"]]


@pytest.fixture
def batch():
    """Logits with right and wrong samples, labels, and a row of constants for each sample."""
    logits = 3 * torch.randn(12, 5)
    labels = torch.randint(5, (12,))
    labels[:6] = logits[:6].argmax(dim=1)
    return logits, labels, torch.rand(12, 5) + 0.1


@pytest.mark.parametrize(("case", "run"), RUNS)
def test_the_losses_are_those_of_the_authors(case, run):
    row = GOLDEN["cases"][case]
    logits, labels = torch.tensor(row["logits"]), torch.tensor(row["labels"])
    expected = row["runs"][run]
    K_row = torch.tensor(expected["translation"]) / row["eps"]
    assert bcp(logits, labels, K_row, row["eps"]).item() == pytest.approx(
        expected["bcp"], rel=1e-10
    )
    assert local_lip(logits, labels, K_row, row["eps"]).item() == pytest.approx(
        expected["gloro"], rel=1e-10
    )


@pytest.mark.parametrize("kappa", [1.0, 0.3, 0.0, -0.0025])
def test_kappa_mixes_plain_and_worst_cross_entropy(batch, kappa):
    logits, labels, K = batch
    plain, worst = ce(logits, labels, K, 0.5), lmt(logits, labels, K, 0.5, stabilise=False)
    expected = kappa * plain + (1 - kappa) * worst
    torch.testing.assert_close(bcp(logits, labels, K, 0.5, kappa=kappa), expected)


def test_on_right_predictions_local_lip_is_gloro_and_elsewhere_it_is_not(batch):
    logits, labels, K = batch
    right = logits.argmax(1) == labels
    for kept, same in ((right, True), (~right, False)):
        part = logits[kept], labels[kept], K[kept], 0.5
        assert torch.isclose(local_lip(*part), gloro(*part)).item() == same


def test_local_lip_appends_the_strongest_worst_logit_of_the_wrong_classes():
    logits, labels = torch.tensor([[3.0, 1.0, 0.5]]), torch.tensor([0])
    K = torch.tensor([[100.0, 1.0, 4.0]])
    expected = cross_entropy(torch.tensor([[3.0, 1.0, 0.5, 2.5]]), labels)
    assert local_lip(logits, labels, K, 0.5).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("loss", [bcp, local_lip])
def test_laws(loss, batch):
    logits, labels, K = batch
    assert loss.protects is label
    constants = K.requires_grad_()
    values = [loss(logits, labels, constants, eps) for eps in (0.0, 0.1, 1.0)]
    assert values[0] < values[1] < values[2]
    shifted = loss(logits + torch.randn(12, 1), labels, constants, 1.0)
    torch.testing.assert_close(shifted, values[2])
    values[2].backward()
    own = constants.grad.gather(1, labels[:, None])
    assert not own.any()
    assert (constants.grad >= 0).all()
    assert constants.grad.any(dim=1).all()
    broken = K.detach().scatter(1, labels[:, None], torch.nan)
    torch.testing.assert_close(loss(logits, labels, broken, 1.0), values[2])
    assert loss(logits.half(), labels, K.half(), 1.0).dtype == torch.float32
    with pytest.raises(LipcertError, match="eps"):
        loss(logits, labels, K, -0.1)


def test_bcp_bounds_the_cross_entropy_of_all_that_an_attacker_can_reach(batch):
    logits, labels, K = batch
    # Any logits whose margins against the label fell by no more than K eps.
    own = logits.gather(1, labels[:, None])
    for _ in range(50):
        moved = logits + 0.3 * K * (2 * torch.rand(12, 5) - 1)
        moved = moved.scatter(1, labels[:, None], own)
        assert cross_entropy(moved, labels) <= bcp(logits, labels, K, 0.3) + 1e-12
