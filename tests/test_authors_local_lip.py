"""benchmarks/authors_local_lip.py, Local-Lip and BCP re-stated, against numbers of their code."""

import numpy as np
import pytest
import torch
from authors_local_lip import (
    AuthorsBCP,
    AuthorsLocalLip,
    ball_box,
    bcp_loss,
    gloro_logits,
    gloro_loss,
    partly_local,
    sparsity,
    step,
    worst_logits,
)
from torch import nn

from lipcert.layers import ClippedReLU
from local_lip_nets import NAMES, case, mnist_4c3f

# Where clipping leaves a direction of 1/600 of the radius, its rescaling magnifies the 1e-12 that
# they add somewhere; translations there differ by up to 2e-9.
SMALL = 5e-9
LOSSES = {"bcp": bcp_loss, "gloro": gloro_loss}
every_net = pytest.mark.parametrize("name", NAMES)
every_tag = pytest.mark.parametrize("tag", ["few", "conv"])


def close(value, expected, rtol=1e-12, atol=1e-14):
    value = value.detach() if isinstance(value, torch.Tensor) else value
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=atol)


def method(given, tag, kind=AuthorsLocalLip):
    """Theirs from the stored start vectors; BCP reads no vectors of samples."""
    numbers = given.numbers[tag]
    steps = numbers["sniter"], numbers["opt_iter"]
    return kind(given.net, given.eps, *steps, given.u_global(), given.u_local())


def lengths_differ(one, other):
    """The relative distance of two lists of tensors."""
    one, other = (torch.cat([t.flatten() for t in ts]) for ts in (one, other))
    return (one - other).norm() / other.norm()


@every_tag
@every_net
def test_norms_radii_and_losses_of_their_code(name, tag):
    given = case(name)
    numbers = given.numbers[tag]
    done = method(given, tag)(given.x)
    close(done.local_norms, numbers["local_norms"])
    close(done.radius, numbers["radius"])
    for i, radius in numbers["global_radii"].items():
        close(done.regions[int(i) + 1].radius, [radius] * 3)
    close(done.logits, given.numbers["logits"], atol=1e-12)
    close(done.translations, numbers["translations"], rtol=0, atol=SMALL)
    close(worst_logits(done, given.y), numbers["worst_logits"], rtol=0, atol=SMALL)
    close(gloro_logits(done, given.y), numbers["gloro_logits"], rtol=0, atol=SMALL)
    for form, loss in LOSSES.items():
        close(loss(done, given.y), numbers[f"{form}_loss"], rtol=0, atol=1e-10)


@every_tag
@every_net
def test_boxes_and_masks_of_their_code(name, tag):
    given = case(name)
    regions = method(given, tag)(given.x).regions
    for i, mask in given.masks(tag).items():
        assert ((regions[i + 1].varying == 1) == mask).all()
    if f"{tag}.lb" in given.arrays:
        for i, (lb, ub) in given.boxes(tag).items():
            close(regions[i + 1].lb, lb)
            close(regions[i + 1].ub, ub)
    else:
        assert name.startswith("conv")
        assert tag == "few"


def test_the_masks_are_worth_testing():
    for name in NAMES:
        varying = torch.cat([mask.flatten() for mask in case(name).masks("conv").values()])
        assert 0.3 < varying.double().mean() < 0.95


@pytest.mark.parametrize("form", LOSSES)
@every_tag
@every_net
def test_gradients_of_their_code(name, tag, form):
    given = case(name)
    if f"{tag}.grad_{form}" not in given.arrays:
        assert (name, tag) in {("conv_standrelu", "conv"), ("conv_clmaxmin", "conv")}
        return
    LOSSES[form](method(given, tag)(given.x), given.y).backward()
    for p, expected in zip(given.net.parameters(), given.gradients(tag, form), strict=True):
        assert lengths_differ([p.grad], [expected]) < 1e-6


@pytest.mark.parametrize("name", [n for n in NAMES if "few.u_local_after" in case(n).arrays])
def test_vectors_after_their_steps_are_kept(name):
    given = case(name)
    theirs = method(given, "few")
    theirs(given.x)
    for side in ("u_global", "u_local"):
        after = getattr(given, side)(f"few.{side}_after")
        for kept, expected in zip(getattr(theirs, side), after, strict=True):
            close(kept, expected)
            assert not kept.requires_grad


@every_tag
@pytest.mark.parametrize("name", [name for name in NAMES if "standrelu" not in name])
def test_sparsity_and_partly_local_radius(name, tag):
    given = case(name)
    tiny = given.numbers[tag]["tiny"]
    done = method(given, tag)(given.x)
    close(sparsity(given.net, done), tiny["sparsity"])
    local = torch.tensor([i in tiny["local_layers"] for i in given.inner])
    close(partly_local(done, local), tiny["radius"])
    close(partly_local(done, torch.ones_like(local)), done.radius.detach())


@every_tag
@pytest.mark.parametrize("name", ["mlp_standrelu", "conv_standrelu"])
def test_original_bcp(name, tag):
    given = case(name)
    numbers = given.numbers[tag]["bcp"]
    with torch.no_grad():
        done = method(given, tag, AuthorsBCP)(given.x)
    close(done.radius, numbers["radius"])
    close(done.translations, numbers["translations"], rtol=0, atol=SMALL)
    close(bcp_loss(done, given.y), numbers["loss"], rtol=0, atol=1e-10)
    weight = given.net[-1].weight
    ball = ball_box(weight[:, None] - weight, done.regions[-1], done.radius, 0)
    close(ball, numbers["lmt_translations"], atol=1e-10)


@every_net
def test_exact_norms_in_place_of_iterated_ones(name):
    given = case(name)
    exact = given.numbers["exact"]
    norms = (torch.tensor(exact[key]) for key in ("global_norms", "local_norms"))
    done = AuthorsLocalLip(given.net, given.eps, 1, 1000)(given.x, *norms)
    close(done.radius, exact["radius"])
    close(done.regions[-1].radius, exact["global_radius"])
    close(done.translations, exact["translations"], rtol=1e-7, atol=1e-8)
    close(worst_logits(done, given.y), exact["worst_logits"], rtol=1e-7, atol=1e-8)
    for form, loss in LOSSES.items():
        close(loss(done, given.y), exact[f"{form}_loss"], rtol=1e-7)


@every_net
def test_theirs_is_an_estimate_from_below(name):
    given = case(name)
    exact = given.numbers["exact"]
    for tag, least in (("few", 0.5), ("conv", 1 - 1e-4)):
        ratio = method(given, tag)(given.x).local_norms / torch.tensor(exact["local_norms"])
        assert ratio.max() < 1 + 1e-12
        assert ratio.min() > least


@every_net
def test_every_step_of_the_last_layer_bounds_the_next(name):
    given = case(name)
    exact = given.numbers["exact"]
    norms = [torch.tensor(exact[key]) for key in ("global_norms", "local_norms")]
    done = [AuthorsLocalLip(given.net, given.eps, 1, k)(given.x, *norms) for k in range(6)]
    values = torch.stack([d.translations for d in done])
    assert (values.diff(dim=0) < 1e-9).all()
    assert (values - torch.tensor(exact["translations"]) > -1e-8).all()
    assert (values[0] > values[1] + 1e-3).any()


def test_a_translation_that_is_no_number_stays_so():
    given = case("mlp_relux")
    norms = torch.ones(2), torch.full((2, 3), torch.nan)
    done = AuthorsLocalLip(given.net, given.eps, 1, 3)(given.x, *norms)
    assert done.translations.isnan().any()
    assert gloro_loss(done, given.y).isnan()


def test_a_stride_that_leaves_a_row_over():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    x = torch.randn(2, 1, 8, 8)
    done = AuthorsLocalLip(net, 1e-9, 500, 1)(x)
    with torch.no_grad():
        unit = torch.eye(64).reshape(64, 1, 8, 8)
        matrix = net[0](unit).flatten(1) - net[0](torch.zeros(1, 1, 8, 8)).flatten(1)
        norms = [torch.linalg.matrix_norm(matrix * m, 2) for m in net[:2](x).flatten(1) > 0]
    close(done.local_norms[0], norms, rtol=1e-3)
    close(done.global_norms[0], torch.linalg.matrix_norm(matrix.detach(), 2), rtol=1e-3)


class Descent:
    """Of an optimiser what `step` calls; importing torch's own takes seconds."""

    def __init__(self, parameters):
        self.parameters = parameters

    def zero_grad(self, set_to_none):
        for p in self.parameters:
            p.grad = None

    def step(self):
        with torch.no_grad():
            for p in self.parameters:
                p -= 0.3 * p.grad


def test_training_steps_lower_the_loss_and_keep_thresholds_from_being_negative():
    given = case("conv_relux")
    theirs = AuthorsLocalLip(given.net, 0.02, 2, 1)
    parameters = list(given.net.parameters())
    given.net[6].threshold.data[0] = -0.5
    losses = torch.stack([step(theirs, Descent(parameters), given.x, given.y) for _ in range(30)])
    assert losses[-1] < losses[0] - 0.3
    thresholds = [m.threshold for m in given.net if isinstance(m, ClippedReLU)]
    assert min(t.min() for t in thresholds) == 0


@pytest.mark.parametrize(
    "module",
    [
        lambda: nn.MaxPool2d(2),
        lambda: nn.Conv2d(2, 2, 3, groups=2),
        lambda: nn.Conv2d(2, 2, 3, dilation=2),
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(2, 2, 3, padding="same"),
    ],
)
def test_what_their_code_would_misread_is_refused(module):
    with pytest.raises(ValueError, match="only"):
        AuthorsLocalLip(nn.Sequential(nn.Conv2d(1, 2, 3), module()), 1.0, 1, 1)


def test_the_mnist_network_is_the_one_their_code_had():
    mnist = mnist_4c3f()
    assert sum(p.numel() for p in mnist.net.parameters()) == 1_974_762 + 48_064
    close(mnist.net(mnist.x), mnist.numbers["logits"])


def test_boxes_and_masks_on_mnist():
    mnist = mnist_4c3f()
    run = mnist.numbers["runs"][0]
    # Their global norms, of which only the products are stored.
    products = torch.tensor([run["eps"], *run["global_radius_original_after_each_weight_layer"]])
    norms = products[1:] / products[:-1]
    with torch.no_grad():
        done = AuthorsLocalLip(mnist.net, run["eps"], 1, 1000)(
            mnist.x, norms, torch.tensor(run["local_sigma_original"])
        )
    close(done.radius, run["r_local_times_eps_original"])
    for i, share in run["masked_fraction"].items():
        close((done.regions[int(i) + 2].varying == 0).double().mean(), share)
    for form, loss in LOSSES.items():
        close(loss(done, mnist.y), run[f"{form}_loss"], rtol=0, atol=1e-8)
