"""One training step of LMT, against independent code that agrees with the authors' own."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

import lipcert as lc

FOLDER = Path(__file__).parent / "golden"
NET = np.load(FOLDER / "lmt_mnistnet.npz")  # provenance: inside
STEP = np.load(FOLDER / "lmt_mnistnet_step.npz")  # provenance: inside
LAYERS = {0: "conv1", 2: "conv2", 5: "fc1", 7: "fc2"}


def network():
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(288, 100), nn.ReLU(), nn.Linear(100, 10)),
    )
    with torch.no_grad():
        for place, name in LAYERS.items():
            net[place].weight.copy_(torch.tensor(NET[f"{name}_W_f32"]))
            net[place].bias.copy_(torch.tensor(NET[f"{name}_b_f32"]))
    return net


def test_loss_and_gradients_of_a_step():
    net = network()
    bound = lc.Product(lc.trace(net, (1, 12, 12)), norm=lc.PowerIteration(0))
    for vector, name in zip(list(bound.state_dict()), ("conv1", "conv2", "fc1"), strict=False):
        u = torch.tensor(STEP[f"{name}_u_f32"], dtype=torch.float64).squeeze(0)
        shape = getattr(bound, vector).shape
        setattr(bound, vector, (u / u.norm()).reshape(shape))
    x = torch.tensor(NET["X_f32"], dtype=torch.float64)
    labels = torch.tensor(STEP["labels"]).long()
    logits = net(x)
    loss = lc.losses.lmt(logits, labels, bound().row(labels), eps=0.05)
    np.testing.assert_allclose(loss.item(), STEP["loss"], rtol=1e-10)
    loss.backward()
    for place, name in LAYERS.items():
        gradient = net[place].weight.grad.numpy()
        expected = STEP["fc1_grad_first_rows" if name == "fc1" else f"{name}_grad"]
        np.testing.assert_allclose(gradient[: len(expected)], expected, rtol=1e-9, atol=1e-12)
