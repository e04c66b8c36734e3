import pytest
import torch
from torch import nn

from lipcert.errors import LipcertError
from lipcert.layers import MaxMin, Normalize
from lipcert.models import (
    c4f3_bcp,
    c6f2_bcp,
    c6f2_crm,
    c8f2_bcp,
    c8f2_crm,
    crm_depth,
    initialise_orthogonally,
    lmt_mnist,
    mlp,
)

MNIST, CIFAR, TINY = (1, 28, 28), (3, 32, 32), (3, 64, 64)


def parameters(net):
    return sum(p.numel() for p in net.parameters())


# ---------------------------------------------------------------- layers


def test_maxmin_pairs_a_channel_with_the_one_half_way_on():
    x = torch.tensor([[1.0, 5.0, 2.0, -3.0]])
    assert MaxMin()(x).tolist() == [[2.0, 5.0, 1.0, -3.0]]


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 5), (3, 6, 4, 4)])
def test_maxmin_keeps_norms_and_shortens_distances(shape):
    x, y = torch.randn(shape), torch.randn(shape)
    f = MaxMin()
    assert f(x).shape == x.shape
    torch.testing.assert_close(f(x).norm(), x.norm())
    assert (f(x) - f(y)).norm() < (x - y).norm()
    jacobian = torch.autograd.functional.jacobian(f, x).reshape(x.numel(), -1)
    assert torch.equal(jacobian @ jacobian.T, torch.eye(x.numel()))


def test_maxmin_names_the_shape_that_it_cannot_pair():
    with pytest.raises(LipcertError, match=r"\(2, 5, 4\).*odd"):
        MaxMin()(torch.zeros(2, 5, 4))


@pytest.mark.parametrize("rest", [(), (4, 4)])
def test_normalize_works_channel_by_channel(rest):
    layer = Normalize(mean=[0.5, 0.0], std=[0.25, 2.0])
    x = torch.rand(3, 2, *rest)
    out = layer(x)
    torch.testing.assert_close(out[:, 0], (x[:, 0] - 0.5) / 0.25)
    torch.testing.assert_close(out[:, 1], x[:, 1] / 2)


def test_normalize_is_part_of_the_saved_model():
    layer = Normalize([0.0], [1.0])
    layer.load_state_dict(Normalize([0.5], [0.25]).state_dict())
    assert layer(torch.ones(1, 1, 2, 2)).unique().item() == 2.0
    assert str(layer) == "Normalize(1)"
    assert not list(layer.parameters())


@pytest.mark.parametrize(
    ("mean", "std"), [([0.5], [1.0, 1.0]), ([0.5], [0.0]), ([0.5], [-1.0]), ([0.5], [float("nan")])]
)
def test_normalize_refuses_numbers_that_do_not_fit(mean, std):
    with pytest.raises(LipcertError, match="one positive std"):
        Normalize(mean, std)


def test_normalize_does_not_broadcast_over_missing_channels():
    with pytest.raises(LipcertError, match=r"3 channels.*\(2, 1, 4, 4\)"):
        Normalize([0.5] * 3, [1.0] * 3)(torch.zeros(2, 1, 4, 4))


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("make", "shape", "count"),
    [
        (lmt_mnist, MNIST, 166_406),
        (c4f3_bcp, MNIST, 1_974_762),
        (c4f3_bcp, CIFAR, 2_466_858),
        (c6f2_bcp, CIFAR, 2_250_378),
        (c6f2_crm, CIFAR, 733_866),
        (mlp, (1, 8, 8), 26_122),
    ],
)
@pytest.mark.parametrize("activation", [nn.ReLU, MaxMin])
def test_parameter_counts_and_output_shapes(make, shape, count, activation):
    net = make(shape, 10, activation=activation)
    assert parameters(net) == count
    assert f"{count:,}".replace(",", " ") in " ".join(make.__doc__.split())
    assert net(torch.rand(2, *shape)).shape == (2, 10)
    assert sum(isinstance(m, activation) for m in net) == len(list(net.parameters())) // 2 - 1
    assert isinstance(net[-1], nn.Linear)


@pytest.mark.parametrize(
    ("make", "sides"),
    [
        (c8f2_bcp, [64, 64, 31, 31, 31, 14, 14, 6]),
        (c8f2_crm, [64, 62, 30, 30, 30, 14, 14, 6]),
    ],
)
def test_the_two_nets_for_tiny_imagenet(make, sides):
    net = make(TINY, 200)
    assert parameters(net) == 4_342_984
    assert "4 342 984" in " ".join(make.__doc__.split())
    x, found = torch.rand(1, *TINY, dtype=torch.float32), []
    for layer in net.float():
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            found.append(x.shape[-1])
    assert found == sides
    assert x.shape == (1, 200)


CRM_COUNTS = {  # (convolutions, dense layers): parameters, and the width of the flattened maps
    (6, 2): (733_866, 1024),
    (7, 2): (770_794, 1024),
    (8, 2): (374_826, 256),
    (9, 2): (411_754, 256),
    (9, 3): (394_090, 256),
    (9, 4): (401_706, 256),
    (10, 4): (419_722, 64),
    (11, 4): (456_650, 64),
}


@pytest.mark.parametrize(("convolutions", "dense"), CRM_COUNTS)
def test_the_nets_of_growing_depth(convolutions, dense):
    net = crm_depth(CIFAR, 10, convolutions, dense)
    count, width = CRM_COUNTS[convolutions, dense]
    assert parameters(net) == count
    assert sum(isinstance(m, nn.Conv2d) for m in net) == convolutions
    linear = [m for m in net if isinstance(m, nn.Linear)]
    assert len(linear) == dense
    assert linear[0].in_features == width
    assert net(torch.rand(2, *CIFAR)).shape == (2, 10)


def test_the_activation_may_change_the_width():
    class Both(nn.Module):
        def forward(self, x):
            return torch.cat([x.relu(), (-x).relu()], dim=1)

    net = lmt_mnist((1, 8, 8), 3, activation=Both)
    assert net[2].in_channels == 32
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 3)


def test_mlp_without_widths_is_linear():
    net = mlp((2, 3), 4, widths=())
    assert [type(m) for m in net] == [nn.Flatten, nn.Linear]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: c4f3_bcp((1, 2, 28), 10), "convolution 4 .* 1x14"),
        (lambda: c6f2_bcp((3, 1, 1), 10), "convolution 3 .* 1x1"),
        (lambda: c6f2_bcp((3, 0, 8), 10), "positive"),
        (lambda: c8f2_crm((3, 16, 16), 10), "convolution 8 .* 2x2"),
        (lambda: crm_depth(CIFAR, 10, 9, 5), "9 convolutions and 5 .* 9 and 4"),
        (lambda: mlp((), 10), "positive"),
        (lambda: mlp((4,), 10, widths=(8, 0)), "width"),
        (lambda: mlp((4,), 1), "at least 2 classes"),
        (lambda: mlp((4,), 10, widths=(8, 7), activation=MaxMin), r"out_features=7.*\(1, 7\)"),
        (lambda: mlp((4,), 10, activation=nn.ReLU()), "at every call"),
    ],
)
def test_misfits_are_refused_at_construction(make, message):
    with pytest.raises(LipcertError, match=message):
        make()


def test_orthogonal_initialisation():
    net = mlp((12,), 3, widths=(8,))
    initialise_orthogonally(net)
    for layer in (net[1], net[3]):
        values = torch.linalg.svdvals(layer.weight)
        torch.testing.assert_close(values, torch.ones_like(values))
        assert not layer.bias.any()
    convolution = nn.Conv2d(4, 6, 3, bias=False)
    initialise_orthogonally(convolution)
    torch.testing.assert_close(torch.linalg.svdvals(convolution.weight.flatten(1)), torch.ones(6))
