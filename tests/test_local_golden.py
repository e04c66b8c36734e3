"""Local-Lip and BCP by `lc.Product`, against the numbers of their authors' code."""

import numpy as np
import pytest
import torch
from authors_local_lip import AuthorsLocalLip
from torch import nn

import lipcert as lc
from balls import affine_of, followed, slopes_of
from lipcert.layers import ClippedMaxMin
from local_lip_nets import ACTIVATIONS, NAMES, case, mnist_4c3f

every_net = pytest.mark.parametrize("name", NAMES)
maxmin = [name for name in NAMES if "maxmin" in name]
relus = [name for name in NAMES if name not in maxmin]


def close(value, expected, rtol=1e-9, atol=1e-9):
    value = value.detach() if isinstance(value, torch.Tensor) else value
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=atol)


def bound(given, *, progressive=False, norm=None, **more):
    graph = lc.trace(given.net, tuple(given.x.shape[1:]))
    region = lc.L2Ball(getattr(given, "eps", 1.0), progressive=progressive)
    return lc.Product(graph, norm=norm or lc.Exact(), region=region, **more)


def last_hidden(b):
    return b.graph.output.inputs[0]


def their_masks(given, tag="conv"):
    """Of each activation: which outputs vary, and which rows of the layer before it matter.

    Both outputs of a pair must be constant for the rows of the pair to drop out; the authors' code
    drops none of them.
    """
    found = []
    for place, varying in given.masks(tag).items():
        rows = varying
        if isinstance(given.net[place], ClippedMaxMin):
            either = torch.maximum(*varying.chunk(2, 1))
            rows = torch.cat([either, either], 1)
        found.append((varying, rows))
    return found


def matrix_of(layer, shape):
    """The matrix of a layer without its bias, from unit vectors."""
    with torch.no_grad():
        unit = torch.eye(int(np.prod(shape))).reshape(-1, *shape)
        return (layer(unit) - layer(torch.zeros(1, *shape))).flatten(1).mT


def masked_by_hand(given):
    """Norms of explicit masked matrices, `(layers, samples)`."""
    x, norms, varying = given.x, [], None
    masks = iter(their_masks(given))
    for module in given.net[:-1]:
        before, x = x, module(x)
        if isinstance(module, nn.Flatten):
            varying = varying.flatten(1)
        if isinstance(module, nn.Conv2d | nn.Linear):
            matrix, (after, rows) = matrix_of(module, before.shape[1:]), next(masks)
            columns = torch.ones_like(before) if varying is None else varying.double()
            parts = [
                matrix * r[:, None] * c
                for r, c in zip(rows.double().flatten(1), columns.flatten(1), strict=True)
            ]
            norms.append([torch.linalg.matrix_norm(part, 2).item() for part in parts])
            varying = after
    return torch.tensor(norms)


def local_norms(b, local):
    """The masked norms of the layers but the last, `(layers, samples)`."""
    products = []
    for n in affine_of(b.graph)[:-1]:
        products.append(local.reached(n).value.detach())
    whole = torch.stack(products)
    return torch.cat([whole[:1], whole[1:] / whole[:-1]])


# ---------------------------------------------------------------- six small networks


@every_net
def test_boxes_before_and_after_each_activation(name):
    given = case(name)
    b = bound(given)
    around = followed(b, given.x).around
    whole = torch.tensor(given.numbers["exact"]["global_norms"])
    exact = AuthorsLocalLip(given.net, given.eps, 1, 1)(given.x, whole).regions
    places = [i for i, module in enumerate(given.net) if isinstance(module, ACTIVATIONS)]
    # Their norms stop up to 6e-5 below the true ones in networks with convolutions.
    rough = 1e-6 if name.startswith("mlp") else 1e-3
    stored = given.boxes("conv")
    for place, n in zip(places, slopes_of(b.graph), strict=True):
        source = n.inputs[0]
        if isinstance(given.net[place], ClippedMaxMin):
            source = source.inputs[0]  # the sorting comes first, then the clipping
        before = place - 1 - isinstance(given.net[place - 1], nn.Flatten)
        for at, node in ((before, source), (place, n)):
            ends = around.box(node)
            for end, oracle, theirs in zip(
                ends, (exact[at + 1].lb, exact[at + 1].ub), stored[at], strict=True
            ):
                close(end, oracle.detach())
                close(end, theirs, rtol=rough, atol=rough)


@every_net
def test_constant_units_are_theirs(name):
    given = case(name)
    b = bound(given)
    around = followed(b, given.x).around
    for n, (varying, _) in zip(slopes_of(b.graph), their_masks(given), strict=True):
        assert torch.equal(around.weights(n) == 0, ~varying.bool())
        assert set(around.weights(n).unique().tolist()) <= {0.0, 1.0}


@every_net
def test_norms_of_masked_layers(name):
    given = case(name)
    b = bound(given)
    found = local_norms(b, followed(b, given.x))
    close(found, masked_by_hand(given))
    theirs = torch.tensor(given.numbers["exact"]["local_norms"])
    if name in relus:
        close(found, theirs)
        return
    # Rows of pairs that are constant as a whole drop out here, and nowhere else is a difference.
    assert (found <= theirs * (1 + 1e-12)).all()
    pairs = [rows.flatten(1).all(1) for _, rows in their_masks(given)]
    same = torch.stack(pairs)
    assert same.any() or name == "mlp_clmaxmin"
    close(found[same], theirs[same])
    assert (found < 0.99 * theirs).any() or (found < theirs - 1e-4).any()


@every_net
def test_whole_norms_and_radii(name):
    given = case(name)
    exact, b = given.numbers["exact"], bound(given)
    radius = b.prefix(last_hidden(b), given.x).value * given.eps
    expected = torch.tensor(exact["radius"])
    if name in relus:
        close(radius, expected)
    else:
        assert (radius <= expected * (1 + 1e-12)).all()
        close(radius, given.eps * masked_by_hand(given).prod(0))
    everywhere = lc.Product(b.graph, norm=lc.Exact())
    gains = [layer.gain.value.detach() for layer in everywhere.layers() if layer.gain]
    close(torch.stack(gains).prod() / gains[-1] * given.eps, exact["global_radius"][0])
    bcp = bound(given, masked=())
    close(bcp.prefix(last_hidden(bcp), given.x).value * given.eps, exact["global_radius"])


@every_net
def test_worst_cases_of_the_last_layer_and_losses(name):
    given = case(name)
    exact, b, y = given.numbers["exact"], bound(given), given.y
    K, logits = b(given.x), given.net(given.x)
    drops = K.drop(y).scatter(1, y[:, None], 0)
    theirs = torch.tensor(exact["translations"])  # [sample][i][j]: the most that i - j can gain
    theirs = theirs[torch.arange(3), :, y]
    radius = b.prefix(last_hidden(b), given.x).value * given.eps
    same = (radius - torch.tensor(exact["radius"])).abs() < 1e-9
    assert same.all() or name in maxmin
    assert (drops <= theirs + 1e-9).all()
    close(drops[same], theirs[same])
    row = K.within(y, given.eps)
    worst = logits + (given.eps * row).scatter(1, y[:, None], 0)
    close(worst[same], torch.tensor(exact["worst_logits"])[same])
    losses = {
        "bcp": lc.losses.bcp(logits, y, row, given.eps),
        "gloro": lc.losses.local_lip(logits, y, row, given.eps),
    }
    # With t_max, t_min the box of the last layer decides: MaxMin of the dense net is equal too.
    for form, loss in losses.items():
        expected = exact[f"{form}_loss"]
        assert loss <= expected + 1e-9
        if name != "conv_clmaxmin":
            close(loss, expected)


@pytest.mark.parametrize("name", [name for name in NAMES if "standrelu" in name])
def test_bcp(name):
    """Their code stopped its norms early, by about 1e-6 (dense) and 1e-4."""
    given = case(name)
    numbers, b, y = given.numbers["conv"]["bcp"], bound(given, masked=()), given.y
    rough = 1e-6 if name.startswith("mlp") else 3e-4
    K = b(given.x)
    close(b.prefix(last_hidden(b), given.x).value * given.eps, numbers["radius"], rtol=rough)
    drops = torch.stack([K.drop(torch.full((3,), j)) for j in range(4)], 2)
    close(drops, numbers["translations"], rtol=rough, atol=rough)
    ball = torch.stack([K.row(torch.full((3,), j)) for j in range(4)], 2) * given.eps
    # Without the box: here constant units leave the last layer, in their code they do not.
    theirs = torch.tensor(numbers["lmt_translations"])
    assert (ball <= theirs * (1 + rough)).all()
    weight = given.net[-1].weight
    whole = (weight[:, None] - weight).norm(dim=2)
    units = (weight[:, None] - weight) * followed(b, given.x).around.weights(last_hidden(b))[
        :, None, None
    ]
    close(ball * whole, theirs * units.norm(dim=3).detach(), rtol=rough, atol=rough)
    loss = lc.losses.bcp(given.net(given.x), y, K.within(y, given.eps), given.eps)
    close(loss, numbers["loss"], rtol=rough)


@every_net
def test_bcp_with_exact_norms_equals_a_restatement(name):
    given = case(name)
    whole = torch.tensor(given.numbers["exact"]["global_norms"])
    done = AuthorsLocalLip(given.net, given.eps, 1, 1000)(
        given.x, whole, whole[:, None].expand(-1, 3)
    )
    K = bound(given, masked=())(given.x)
    drops = torch.stack([K.drop(torch.full((3,), j)) for j in range(4)], 2)
    # What they add inside a root moves translations by up to 2e-9.
    close(drops, done.translations.detach(), rtol=0, atol=5e-9)


@every_net
def test_progressive_boxes_are_never_looser(name):
    given = case(name)
    loose, b = bound(given), bound(given, progressive=True)
    radius = b.prefix(last_hidden(b), given.x).value * given.eps
    assert (radius <= torch.tensor(given.numbers["exact"]["progressive_radius"]) + 1e-9).all()
    far, near = followed(loose, given.x).around, followed(b, given.x).around
    tighter = False
    for n in b.graph:
        twin = loose.graph.node(n.name)
        (low, up), (outer_low, outer_up) = near.box(n), far.box(twin)
        assert (low >= outer_low - 1e-12).all()
        assert (up <= outer_up + 1e-12).all()
        tighter |= bool((low > outer_low + 1e-6).any())
    # Nothing is masked before the second box of dense nets without saturation.
    assert tighter or name.startswith("mlp")
    row, outer = b(given.x).drop(given.y), loose(given.x).drop(given.y)
    assert (row <= outer + 1e-9).all()


@pytest.mark.parametrize("form", ["bcp", "gloro"])
@every_net
def test_gradients_of_losses(name, form):
    """At converged vectors the gradient of a norm is that of the unrolled iteration."""
    given = case(name)
    tag = f"conv.grad_{form}"
    if tag not in given.arrays or name in maxmin:
        assert name in {"conv_standrelu", "conv_clmaxmin", "mlp_clmaxmin"}
        return
    b, y = bound(given), given.y
    row = b(given.x).within(y, given.eps)
    loss = lc.losses.bcp if form == "bcp" else lc.losses.local_lip
    loss(given.net(given.x), y, row, given.eps).backward()
    for p, expected in zip(given.net.parameters(), given.gradients("conv", form), strict=True):
        assert (p.grad - expected).norm() < 2e-3 * expected.norm()


# ---------------------------------------------------------------- 4C3F on MNIST


def test_whole_norms_of_4c3f_on_mnist():
    given = mnist_4c3f()
    b = lc.Product(lc.trace(given.net, (1, 28, 28)), norm=lc.LOBPCG(60))
    with torch.no_grad():
        gains = [layer.gain.value for layer in b.layers() if layer.node in affine_of(b.graph)]
    stored = given.numbers["runs"][0]["global_sigma_lanczos"]
    close(gains[:6], stored, rtol=1e-4)
    close(gains[4:6], stored[4:], rtol=1e-6)


# How far 60 steps leave the least separated masked norms below those by Lanczos.
@pytest.mark.parametrize(("place", "below"), [(0, 5e-4), (1, 1e-4), (2, 1e-5)])
def test_masked_norms_of_4c3f_on_mnist(place, below):
    given = mnist_4c3f()
    run = given.numbers["runs"][place]
    b = bound(given, norm=lc.LOBPCG(60))
    with torch.no_grad():
        local = followed(b, given.x, run["eps"])
        norms = local_norms(b, local)
        lanczos = torch.tensor(run["local_sigma_lanczos"])
        # 100 steps of Lanczos are from below as well, by up to 4e-8.
        assert (norms <= lanczos * (1 + 1e-7)).all()
        assert (norms >= lanczos * (1 - below)).all()
        close(run["eps"] * norms.prod(0), run["r_local_times_eps_original"], rtol=1e-3)
        for n, share in zip(slopes_of(b.graph), run["masked_fraction"].values(), strict=True):
            # Their norms are up to 6e-4 too small, and so are their boxes.
            constant = (local.around.weights(n) == 0).double().mean()
            close(constant, share, rtol=0, atol=5e-4)


def test_losses_of_4c3f_on_mnist():
    given = mnist_4c3f()
    with torch.no_grad():
        b, logits = bound(given, norm=lc.LOBPCG(20)), given.net(given.x)
        for run in given.numbers["runs"][1:2]:
            row = b(given.x, eps=run["eps"]).within(given.y, run["eps"])
            bcp = lc.losses.bcp(logits, given.y, row, run["eps"])
            close(bcp, run["bcp_loss"], rtol=2e-3)
            gloro = lc.losses.local_lip(logits, given.y, row, run["eps"])
            close(gloro, run["gloro_loss"], rtol=2e-3)
