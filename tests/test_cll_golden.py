"""The losses of CLL against outputs of the authors' code, in value and gradient."""

import json
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

from lipcert.losses import Offset, calibration, cll, cll_per_logit, gloro
from lipcert.schedules import Cosine, Piecewise, Polynomial

FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "cll_losses.json").read_text())  # provenance: inside
ARRAYS = np.load(FOLDER / "cll_losses.npz")


def named(cases):
    return [pytest.param(case, id=case["name"]) for case in cases]


def arrays(case):
    found = {name: torch.tensor(ARRAYS[key]) for name, key in case["arrays"].items()}
    weight, logits = found["W"].requires_grad_(), found["logits"].requires_grad_()
    return weight, logits, found["labels"].long(), found


def close(value, expected, tolerance=1e-10):
    torch.testing.assert_close(
        value, torch.as_tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


def width(case):
    """Sigma of a case; two of the authors' distributions are known to us only through it."""
    if case["sigma"] is not None:
        return case["sigma"]
    if case["dist"] == "normal":  # which the code squares
        return (case["D"] / 2 / NormalDist().inv_cdf(1 - case["p"] / 2)) ** 2
    return {"logistic": None, "raised_cosine": case["D"]}[case["dist"]]


def options(case):
    """How our arguments say the authors'; their radius and the offset may differ."""
    sides = Offset.ONE_SIDED if case["one_sided"] else Offset.TWO_SIDED
    sigma, slack, delta = width(case), case["p"], case["delta"]
    eps = case["D"] / 2
    if delta not in (None, eps):
        sigma, eps = calibration(eps, slack).sigma, delta
    return {
        "eps": eps,
        **({} if sigma else {"slack": slack}),
        "sigma": sigma,
        "margin_offset": Offset.NONE if delta is None else sides,
        "scale": case["K_scale"],
        "detach": case["detach"],
    }


@pytest.mark.parametrize("case", named(GOLDEN["losses"]))
def test_losses_and_gradients(case):
    weight, logits, labels, expected = arrays(case)
    hidden = torch.tensor(case["K_hidden"], requires_grad=True)
    if case["class"] == "GloroLoss":
        rows = weight[logits.argmax(1)][:, None] - weight
        loss = gloro(logits, labels, hidden * rows.norm(dim=2), case["eps"])
    elif case["class"] == "CLL":
        rows = weight[labels][:, None] - weight
        loss = cll(logits, labels, hidden * rows.norm(dim=2), **options(case))
    else:
        loss = cll_per_logit(logits, labels, hidden * weight.norm(dim=1), **options(case))
    loss.backward()
    # At p = 1e-12 the authors form 1 - p / 2 and lose digits that sigma needs.
    tolerance = 1e-5 if case.get("p") == 1e-12 else 1e-10
    close(loss, case["loss"], tolerance)
    close(logits.grad, expected["grad_logits"], tolerance)
    if "grad_W" in expected:
        close(weight.grad, expected["grad_W"])
    if "grad_K_hidden" in case:
        close(hidden.grad, case["grad_K_hidden"])
    elif "detach" in case:
        assert weight.grad is None
        assert hidden.grad is None


@pytest.mark.parametrize("case", named(GOLDEN["backbones"]))
def test_losses_over_1_lipschitz_backbones(case):
    weight, logits, labels, expected = arrays(case)
    K_row = case["L"] * (weight[labels][:, None] - weight).norm(dim=2)
    sides = Offset.ONE_SIDED if case["onesided"] else Offset.TWO_SIDED
    calibrated = cll(logits, labels, K_row, case["eps"], case["p"], sides, detach=case["detach_K"])
    loss = calibrated + case["lambda_"] * K_row.max().square()  # pairs of the batch only
    loss.backward()
    assert K_row.max() > case["L"]  # their floor is not reached
    close(loss, case["loss"])
    close(logits.grad, expected["grad_logits"])
    close(weight.grad, expected["grad_W"])


@pytest.mark.parametrize("row", GOLDEN["calibration"], ids=lambda r: f"{r['eps']}-{r['slack']}")
def test_calibration(row):
    found = calibration(row["eps"], row["slack"])
    assert found.sigma == pytest.approx(row["sigma"], rel=1e-12)
    assert found.constant == pytest.approx(row["constant"], rel=1e-12)
    close_to_code = 1e-2 if row["slack"] < 1e-9 else 1e-11
    assert found.sigma == pytest.approx(row["sigma_by_their_code"], rel=close_to_code)


# The Lipschitz constants of calibrated logits that the authors print, for (eps, slack).
PRINTED = [(0.15, 0.75, 3.4), (0.15, 0.25, 13.0), (0.15, 0.01, 35.3), (0.15, 1e-4, 66.0)]
PRINTED += [(0.5, 0.01, 10.6), (1.0, 0.025, 4.4), (0.15, 0.3, 11.6), (1.0, 1e-3, 7.6)]


@pytest.mark.parametrize(("eps", "slack", "constant"), [*PRINTED, (1.0, 3e-3, 6.5)])
def test_calibration_gives_the_constants_of_the_published_tables(eps, slack, constant):
    assert round(calibration(eps, slack).constant, 1) == constant


SCHEDULES = {
    "moons_p Polynomial(1e-3->1e-15,power50,T=20020)": (Polynomial(1e-3, 1e-15, 50), 20020),
    "tiny_Kscale Polynomial(.01->1,power10,T=312390)": (Polynomial(0.01, 1.0, 10), 312390),
    "gloro_eps Polynomial(0->.15,power5,T=312390)": (Polynomial(0.0, 0.15, 5), 312390),
    "Cosine(0->1,T=1000)": (Cosine(0.0, 1.0), 1000),
    "Polynomial(1->0,power2,max_iter=500,offset=100,T=1000)": (
        Polynomial(1.0, 0.0, 2, begin=0.1, until=0.6),
        1000,
    ),
    "triangular_lr(lr=1e-3,T=39200)": (
        Piecewise(((0.0, 0.0), (0.4, 1e-3), (0.8, 5e-5), (1.0, 0.0))),
        39200,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    schedule, steps = SCHEDULES[name]
    rounding = 1e-16 * max(value for _, value in GOLDEN["schedules"][name])
    for step, value in GOLDEN["schedules"][name]:
        assert schedule(step / steps) == pytest.approx(value, rel=1e-11, abs=rounding)


def test_only_the_logarithmic_schedule_is_not_ours():
    assert set(GOLDEN["schedules"]) - set(SCHEDULES) == {"Logarithmic(0->1,T=1000)"}
