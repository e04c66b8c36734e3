"""benchmarks/authors_liplt.py, the authors' LipLT re-stated, against numbers of their code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from authors_liplt import AuthorsLipLT, Mode
from torch import nn

FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "crm_liplt.json").read_text())["nets"]  # provenance: inside
EXACT = json.loads((FOLDER / "crm_exact.json").read_text())["nets"]  # provenance: inside
NAMES = {Mode.GLOBAL: "global", Mode.PER_CLASS: "perclass", Mode.PAIRWISE: "pairwise"}
CRASH = "conv_c_asym"
every_net = pytest.mark.parametrize("name", [name for name in GOLDEN if name != CRASH])
every_mode = pytest.mark.parametrize("mode", Mode, ids=NAMES.get)


def load(name):
    with np.load(FOLDER / f"crm_{name}.npz") as arrays:  # provenance: inside
        return {key: torch.tensor(arrays[key]) for key in arrays.files if key != "provenance"}


def network(name):
    """The network with the stored weights, and the layers that have them."""
    arrays, modules = load(name), []
    kinds = {"conv": nn.Conv2d, "lin": nn.Linear, "flat": nn.Flatten}
    for kind, *numbers in GOLDEN[name]["spec"]:
        modules += [kinds[kind](*numbers)] + [nn.ReLU()] * (kind != "flat")
    layers = [m for m in modules if hasattr(m, "weight")]
    for i, layer in enumerate(layers):
        layer.weight.data = arrays[f"weight{i}"]
    return nn.Sequential(*modules[:-1]), layers


def estimate(name, mode):
    """The authors' estimate from the stored start vectors, and the layers with weights."""
    net, layers = network(name)
    last = len(layers) - (mode is not Mode.GLOBAL)
    arrays = load(name)
    starts = [arrays[f"{NAMES[mode]}.start{s}"] for s in range(last)]
    return AuthorsLipLT(net, GOLDEN[name]["input_shape"], mode, starts), layers


def listed(constants, mode):
    """The constants as the golden file lists them."""
    if mode is Mode.PAIRWISE:
        np.testing.assert_array_equal(constants, constants.T)
        assert not constants.diagonal().any()
        return constants[*torch.triu_indices(*constants.shape, 1)]
    return constants


@every_mode
@every_net
def test_values_of_their_code(name, mode):
    for iterations, expected in GOLDEN[name][NAMES[mode]].items():
        liplt, _ = estimate(name, mode)
        with torch.no_grad():
            constants = listed(liplt(int(iterations)), mode)
        np.testing.assert_allclose(constants, expected["liplt"], rtol=1e-10)
        np.testing.assert_allclose(torch.stack(liplt.m), expected["m"], rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "mode"),
    # Of mlp_3f_small one mode is stored, for the size of the file.
    [(n, m) for n in ("mlp_a", "mlp_c", "conv_a") for m in Mode]
    + [("mlp_3f_small", Mode.PAIRWISE)],
)
def test_gradients_of_their_code(name, mode):
    arrays = load(name)
    liplt, layers = estimate(name, mode)
    liplt(3).sum().backward()
    for i, layer in enumerate(layers):
        expected = arrays[f"{NAMES[mode]}.grad{i}"]
        error = (layer.weight.grad - expected).norm() / expected.norm()
        assert error < 1e-8


@every_mode
def test_a_stride_that_leaves_rows_over_fails_as_theirs(mode):
    net, _ = network(CRASH)
    kind, _, sizes = GOLDEN[CRASH]["error"].partition(".")
    assert kind.startswith("RuntimeError: Sizes of tensors must match")
    sizes = sizes.strip().partition(" for")[0]  # "Expected size 9 but got size 8"
    with pytest.raises(RuntimeError, match=sizes):
        AuthorsLipLT(net, GOLDEN[CRASH]["input_shape"], mode)(1)


@every_net
def test_every_norm_approaches_the_exact_one_from_below(name):
    net, _ = network(name)
    liplt = AuthorsLipLT(net, GOLDEN[name]["input_shape"], Mode.GLOBAL)
    errors = []
    with torch.no_grad():
        for _ in range(3):
            liplt(300)
            errors.append(1 - torch.stack(liplt.m) / torch.tensor(EXACT[name]["m"]))
    assert torch.stack(errors).min() > -1e-12
    assert errors[-1].max() < 1e-3


def test_vectors_are_kept_between_calls_and_gradients_only_until_detach():
    gradients, values = [], []
    for detach in (False, True):
        liplt, layers = estimate("mlp_a", Mode.PAIRWISE)
        liplt(2)
        if detach:
            liplt.detach()
        values.append(liplt(3))
        gradients.append(torch.autograd.grad(values[-1].sum(), layers[0].weight)[0])
    whole, layers = estimate("mlp_a", Mode.PAIRWISE)
    values.append(whole(5))
    (gradient,) = torch.autograd.grad(values[-1].sum(), layers[0].weight)
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients[0], gradient, rtol=1e-10, atol=1e-14)
    assert (gradients[1] - gradient).norm() > 1e-3 * gradient.norm()


def test_a_sweep_calls_every_layer_once(monkeypatch):
    calls = []
    for name in ("_apply", "_adjoint"):
        original = getattr(AuthorsLipLT, name)

        def counted(self, i, x, name=name, original=original):
            calls.append((name, i))
            return original(self, i, x)

        monkeypatch.setattr(AuthorsLipLT, name, counted)
    liplt, layers = estimate("conv_a", Mode.GLOBAL)
    liplt(2)
    forward = [("_apply", i) for i in range(len(layers))]
    back = [("_adjoint", i) for i in reversed(range(len(layers)))]
    assert calls == (forward + back) * 2 + forward


@pytest.mark.parametrize(
    "module",
    [
        lambda: nn.BatchNorm2d(2),
        lambda: nn.Conv2d(2, 2, 3, groups=2),
        lambda: nn.Conv2d(2, 2, 3, dilation=2),
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(2, 2, 3, padding="same"),
    ],
)
def test_what_their_code_would_misread_is_refused(module):
    with pytest.raises(ValueError, match="only"):
        AuthorsLipLT(nn.Sequential(nn.Conv2d(1, 2, 3), module()), (1, 9, 9))
