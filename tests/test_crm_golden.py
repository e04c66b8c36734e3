"""The CRM losses against outputs of the authors' code, in value and gradient."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lipcert.errors import LipcertError
from lipcert.losses import boosted_cross_entropy, crm, crm_max
from test_api import jaxtyping_off

# The provenance of these numbers is written in the file, under "provenance".
GOLDEN = np.load(Path(__file__).parent / "golden" / "crm_losses.npz")
CASES = sorted({name.rpartition("/")[0] for name in GOLDEN.files if "/" in name})


def close(value, expected):
    value = value.detach().numpy() if isinstance(value, torch.Tensor) else value
    np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-10)


def evaluated(case, **options):
    """Loss, classification loss, logits and table of constants of a case."""
    form, rows, weight, t, eps, entropy = case.split("/")
    loss = {"softmax": crm, "max": crm_max}[form]
    options["misclassified"] = rows == "all"
    options["classification"] = {"plain": cross_entropy, "boosted": boosted_cross_entropy}[entropy]
    logits = torch.tensor(GOLDEN["logits"], requires_grad=True)
    labels = torch.tensor(GOLDEN["labels"])
    K = torch.tensor(GOLDEN["L_pair"], requires_grad=True)
    row = K[loss.protects(logits, labels)]
    value = loss(logits, labels, row, float(eps), t=float(t), weight=float(weight), **options)
    return value, options["classification"](logits, labels), logits, K


def test_there_are_cases_of_every_sort():
    assert len(CASES) == 32
    assert sum(f"{case}/values" in GOLDEN.files for case in CASES) == 24
    right = GOLDEN["logits"].argmax(1) == GOLDEN["labels"]
    radii = GOLDEN["radii"].min(1)
    assert 0 < right.sum() < len(right)
    for eps in (0.2, 0.5):
        assert (radii < eps)[right].any()
        assert (radii >= eps)[right].any()


@pytest.mark.parametrize("case", CASES)
def test_the_published_loss_and_its_gradients(case):
    value, plain, logits, K = evaluated(case)
    value.backward()
    close(logits.grad, GOLDEN[f"{case}/grad_logits"])
    close(K.grad, GOLDEN[f"{case}/grad_K"])
    if f"{case}/values" in GOLDEN.files:
        classification, robustness, total = GOLDEN[f"{case}/values"]
        close(value, total)
        close(plain, classification)
        close((value - plain) / float(case.split("/")[2]), robustness)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("max")])
def test_the_continuous_max_form_has_the_published_gradients(case):
    value, _, logits, K = evaluated(case, continuous=True)
    value.backward()
    close(logits.grad, GOLDEN[f"{case}/grad_logits"])
    close(K.grad, GOLDEN[f"{case}/grad_K"])


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("softmax")])
def test_the_continuous_softmin_form_is_a_hinge(case):
    _, rows, weight, t, eps, _ = case.split("/")
    weight, t, eps = float(weight), float(t), float(eps)
    value, plain, _, _ = evaluated(case, continuous=True)
    right = GOLDEN["logits"].argmax(1) == GOLDEN["labels"]
    total = 0.0
    for scores, radii, kept in zip(GOLDEN["logits"], GOLDEN["radii"], right, strict=True):
        rivals = np.delete(radii, scores.argmax())
        smooth = -np.log(np.exp(-t * rivals).sum()) / t
        if kept or rows == "all":
            total += max(0.0, eps - smooth)
    close(value - plain, weight * total / len(right))


@pytest.mark.parametrize("loss", [crm, crm_max])
def test_bad_arguments_are_named(loss):
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(LipcertError, match="weight of the radii"):
        loss(z, y, torch.ones(4, 3), 0.5, weight=-1.0)
    with jaxtyping_off(), pytest.raises(LipcertError, match=r"K_row has shape \(4, 1\)"):
        loss(z, y, torch.ones(4, 1), 0.5)
