"""The wide residual network: what it computes, its normal form, and training that survives."""

import contextlib
import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipcert as lc
from lipcert import losses, recipes
from lipcert.bounds import Product
from lipcert.errors import LipcertError
from lipcert.graph import Affine, Slope, Sum
from lipcert.layers import RecordingBatchNorm2d, last_batch_variances
from lipcert.recipes.parts import nesterov, product_by_power_iteration
from lipcert.recipes.svhn import BatchProduct
from lipcert.wide_resnet import WideResNet

SHAPE = (3, 8, 8)
SVHN = (3, 32, 32)


def small(average=False, **settings):
    """Ten layers, with running statistics that are not those of the start."""
    torch.manual_seed(0)
    settings = {"in_shape": SHAPE, "widen": 2, "blocks": 1, "dropout": 0.2} | settings
    net = WideResNet(classes=10, average=average, **settings)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return net


def test_the_published_size():
    net = WideResNet()
    assert sum(p.numel() for p in net.parameters()) == 2_748_890
    layers = [m for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and "short" not in n]
    assert len(layers) + 1 == 14  # and two shortcuts make the 16 of the name
    assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {0.4}
    assert {m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {2e-5}
    assert all(m.bias is None for m in layers)


def test_the_streams_are_those_of_the_paper():
    """The function written out once more for one block a group."""
    net, x = small(widen=1).eval(), torch.rand(2, *SHAPE)
    first, second, third = net.blocks
    h = b = net.norm(net.stem(x))
    h = h + first.conv2(F.relu(first.norm1(first.conv1(b))))  # the shape stays: the raw stream
    b = F.relu(first.norm2(h))
    for block in (second, third):
        h = block.conv2(F.relu(block.norm1(block.conv1(b)))) + block.shortcut(b)
        b = F.relu(block.norm2(h))
    torch.testing.assert_close(net(x), net.head(b.mean((2, 3))))
    assert (net.norm(net.stem(x)) < 0).any()  # so a ReLU after the stem would show


def test_the_averaging_variant_averages_before_its_shortcut_convolutions():
    plain, average = small(), small(average=True)
    x = torch.rand(2, 32, 6, 6)
    shortcut = average.blocks[1].shortcut
    torch.testing.assert_close(shortcut(x), shortcut[1](F.avg_pool2d(x, 2)))
    assert plain.blocks[1].shortcut.stride == (2, 2)
    assert average.blocks[0].shortcut.stride == (1, 1)  # nothing to halve: as in the other variant
    sizes = [sum(p.numel() for p in net.parameters()) for net in (plain, average)]
    assert sizes[0] == sizes[1]


def test_the_parseval_variant_divides_convolutions_and_weighs_its_sums():
    plain, net = small().eval(), small(parseval=True).eval()
    for block, ours in zip(plain.blocks, net.blocks, strict=True):
        ours.join.shares.data = torch.tensor([0.3, 0.7])
        block.conv1.weight.data = ours.conv1.weight / 3
        block.conv2.weight.data = 0.3 * ours.conv2.weight / 3
        block.shortcut.weight.data = 0.7 * ours.shortcut.weight  # 1 x 1
        block.norm1, block.norm2 = ours.norm1, ours.norm2
    plain.stem.weight.data = net.stem.weight / 3
    plain.norm, plain.head = net.norm, net.head
    x = torch.rand(3, *SHAPE)
    torch.testing.assert_close(net(x), plain(x))
    graph = lc.trace(net, SHAPE)
    torch.testing.assert_close(graph.values(x)[graph.output], net(x))
    with torch.no_grad():  # any deterministic norm will do
        constants = [
            float(lc.Product(lc.trace(n, SHAPE), norm=lc.Gram(2)).lipschitz()) for n in (net, plain)
        ]
    assert constants[0] == pytest.approx(constants[1], rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 30, 32), (3, 32, 33)])
def test_images_that_do_not_halve_twice_are_refused(shape):
    with pytest.raises(LipcertError, match="multiples of 4"):
        WideResNet(shape)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_graph_computes_what_the_network_computes(average, blocks):
    net = small(average, blocks=blocks)
    graph = lc.trace(net, SHAPE)
    net.eval()
    x = torch.rand(3, *SHAPE)
    torch.testing.assert_close(graph.values(x)[graph.output], net(x))
    kinds = [type(n.op) for n in graph]
    assert kinds.count(Sum) == 3 * blocks
    assert kinds.count(Slope) == 6 * blocks


def test_every_normalisation_after_a_convolution_is_one_map_with_it():
    graph = lc.trace(small(), SHAPE)
    for n in graph:
        if isinstance(n.op, Affine):
            assert not any(isinstance(i.op, Affine) for i in n.inputs), n


@pytest.mark.parametrize("average", [False, True])
def test_no_slope_exceeds_the_bound(average):
    net = small(average, widen=1).eval()
    graph = lc.trace(net, SHAPE)
    K = Product(graph)(None).dense()[0]
    x = torch.rand(4, *SHAPE)
    y = x + 1e-3 * torch.randn_like(x)
    change = (net(y) - net(x)).detach()
    falls = (change.unsqueeze(1) - change.unsqueeze(2)).amax(0).detach()  # of f_i - f_j
    length = (y - x).flatten(1).norm(dim=1).min()
    off = ~torch.eye(10, dtype=torch.bool)
    assert (falls[off] <= K[off].detach() * length).all()
    estimate = Product(graph, norm=lc.PowerIteration(30))(None).dense()[0]
    assert (estimate[off] <= K[off] * (1 + 1e-9)).all()


# ---------------------------------------------------------------- training


class Training:
    """LMT on one network, step by step."""

    def __init__(self, net, eps=0.05, shape=SHAPE, bound=product_by_power_iteration):
        self.net, self.eps = net.train(), eps
        self.bound = bound(lc.trace(net, shape))
        self.optimiser = nesterov(net.parameters(), 0.01)

    def step(self, x, y):
        logits = self.net(x)
        row = self.bound(x).row(losses.lmt.protects(logits, y))
        loss = losses.lmt(logits, y, row, self.eps)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return loss.item()

    def gradients(self):
        return [p.grad for p in self.net.parameters()]

    def check(self):
        """Everything finite, and every singular vector alive."""
        tensors = [*self.net.state_dict().values(), *self.gradients()]
        assert all(t.isfinite().all() for t in tensors)
        vectors = list(self.bound.buffers())
        assert len(vectors) > 5
        for v in vectors:
            torch.testing.assert_close(v.norm(), torch.ones(()))


def pictures(n, shape=SHAPE):
    """One colour for each class, with noise."""
    generator = torch.Generator().manual_seed(3)
    colours = torch.rand(10, 3, 1, 1, generator=generator)
    y = torch.arange(n) % 10
    return (colours[y] + 0.1 * torch.randn(n, *shape, generator=generator)).clamp(0, 1), y


@pytest.mark.parametrize("average", [False, True])
def test_training_lowers_the_loss(average):
    training = Training(small(average, in_shape=SVHN, widen=1, dropout=0.0), shape=SVHN)
    x, y = pictures(20, SVHN)
    curve = [training.step(x, y) for _ in range(10)]
    training.check()
    assert curve[-1] < 0.9 * curve[0]


def test_a_batch_with_every_sample_misclassified_keeps_training_alive():
    training = Training(small(dropout=0.0))
    x, y = pictures(20)
    training.step(x, y)
    before = [v.clone() for v in training.bound.buffers()]
    with torch.no_grad():
        wrong = training.net(x).argmin(1)
    training.step(x, wrong)  # no sample gets an offset, so the loss does not depend on the bound
    training.check()
    after = list(training.bound.buffers())
    still = sum(torch.equal(b, a) for b, a in zip(before, after, strict=True))
    assert still <= 1  # the pool's, which is perfect after one step
    curve = [training.step(x, y) for _ in range(15)]
    training.check()
    assert curve[-1] < curve[0]


def test_a_batch_without_any_gradient_keeps_training_alive():
    training = Training(small(), eps=0.0)
    x, _ = pictures(20)
    y = torch.zeros(20, dtype=torch.long)
    with torch.no_grad():
        training.net.head.bias[0] = 1e4  # so sure that cross-entropy is exactly flat
    training.step(x, y)
    assert all((g == 0).all() for g in training.gradients())
    training.check()
    training.eps = 0.05
    with torch.no_grad():
        training.net.head.bias[0] = 0
    x, y = pictures(40)
    curve = [training.step(x, y) for _ in range(12)]
    training.check()
    assert curve[-1] < curve[0]


def test_two_equal_class_rows_keep_training_alive():
    training = Training(small())
    with torch.no_grad():
        for tensor in (training.net.head.weight, training.net.head.bias):
            tensor[1] = tensor[0]
    x, y = pictures(40)
    K = training.bound(x).dense()[0]
    assert K[0, 1] == 0
    curve = [training.step(x, y) for _ in range(12)]
    training.check()
    assert curve[-1] < curve[0]
    assert training.bound(x).dense()[0][0, 1] > 0  # the labels tell the two apart


def test_a_network_of_zeros_keeps_training_alive():
    training = Training(small())
    with torch.no_grad():
        for p in training.net.parameters():
            p.zero_()
    x, y = pictures(20)
    training.step(x, y)
    training.check()


def test_the_recipes_train_this_network():
    for name, average in (("lmt-svhn-wrn16_4", False), ("lmt-svhn-wrn16_4-avg", True)):
        net = recipes.get(name).model(in_shape=(3, 32, 32), classes=10)
        assert isinstance(net, WideResNet)
        assert len(net.blocks) == 6
        assert net.head.in_features == 256
        strided = net.blocks[2].shortcut
        assert isinstance(strided, nn.Sequential) == average


# ---------------------------------------------------------------- constants of the mini-batch


def recording():
    """A convolution, its normalisation and a dense layer; everything differs from its start."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False), RecordingBatchNorm2d(3), nn.ReLU(), nn.Flatten(),
        nn.Linear(12, 4),
    )  # fmt: skip
    nn.init.uniform_(net[1].weight, 0.5, 2)
    net[1].running_var.uniform_(3, 5)
    return net


def by_hand(net, x, weight):
    """The constants of all pairs by the variance of the batch, written out with matrices."""
    convolved = F.conv2d(x, weight)
    variance = (convolved - convolved.mean((0, 2, 3), keepdim=True)).square().mean((0, 2, 3))
    basis = torch.eye(32).reshape(32, 2, 4, 4)
    gain = net[1].weight / (variance + net[1].eps).sqrt()
    matrix = (F.conv2d(basis, weight) * gain[:, None, None]).flatten(1)
    rows = net[4].weight
    return torch.linalg.matrix_norm(matrix, 2) * (rows[:, None] - rows).norm(dim=2)


def test_the_training_constant_divides_by_the_deviation_of_the_batch():
    net, x = recording().train(), 3 * torch.rand(5, 2, 4, 4)
    bound = BatchProduct(lc.trace(net, (2, 4, 4)))
    net(x)
    constants = bound(x)
    assert constants.kind == lc.Kind.ESTIMATE
    K, expected = constants.dense()[0], by_hand(net, x, net[0].weight)
    torch.testing.assert_close(K, expected)
    eval_mode = Product(bound.graph)().dense()[0]
    assert K[0, 1] > 1.5 * eval_mode[0, 1]  # the two are told apart


def test_the_training_constant_has_the_gradient_through_the_statistics():
    net, x = recording().train(), 3 * torch.rand(5, 2, 4, 4)
    bound = BatchProduct(lc.trace(net, (2, 4, 4)))
    weights = torch.rand(4, 4)
    net(x)
    (weights * bound(x).dense()[0]).sum().backward()
    kernel = net[0].weight.detach().clone().requires_grad_()
    gain = net[1].weight
    expected = torch.autograd.grad((weights * by_hand(net, x, kernel)).sum(), (kernel, gain))
    torch.testing.assert_close(net[0].weight.grad, expected[0])
    torch.testing.assert_close(gain.grad, expected[1])
    # The constant does not depend on the size of the kernel, so neither does its gradient point
    # along the kernel; without the gradient of the variance it would.
    assert abs((expected[0] * kernel).sum()) < 1e-4 * expected[0].norm() * kernel.norm()


def test_certificates_use_running_statistics_and_change_no_state():
    net, x = recording().train(), 3 * torch.rand(5, 2, 4, 4)
    bound, plain = (make(lc.trace(net, (2, 4, 4))) for make in (BatchProduct, Product))
    net(x)
    bound(x)
    before = {n: t.clone() for n, t in net.state_dict().items()} | {"": net[1].batch_var.clone()}
    certificate = lc.certify(net, x, bound=bound)  # of a net in training mode
    expected = lc.certify(net, x, bound=plain)
    assert certificate.kind == expected.kind == lc.Kind.UPPER
    assert torch.equal(certificate.radius, expected.radius)
    net.eval()
    net(torch.rand(9, 2, 4, 4))
    assert torch.equal(bound().dense(), plain().dense())
    after = net.state_dict() | {"": net[1].batch_var}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_running_statistics_are_back_after_an_error_and_the_net_can_be_copied():
    net = recording().train()
    net(torch.rand(5, 2, 4, 4))
    running = net[1].running_var
    with last_batch_variances(net):
        assert net[1].running_var is net[1].batch_var
    assert net[1].running_var is running
    with contextlib.suppress(ZeroDivisionError), last_batch_variances(net):
        raise ZeroDivisionError
    assert net[1].running_var is running
    assert torch.equal(copy.deepcopy(net)[1].batch_var, net[1].batch_var)


def test_without_a_batch_or_a_recording_layer_there_is_no_training_constant():
    net = recording().train()
    with pytest.raises(LipcertError, match="no batch variance in this Sequential"):
        BatchProduct(lc.trace(net, (2, 4, 4)))()
    with pytest.raises(LipcertError, match="no batch variance in this WideResNet"):
        BatchProduct(lc.trace(small().train(), SHAPE))()


def test_a_recording_network_is_the_same_function_with_the_same_state():
    plain, net = small(), small(norm=RecordingBatchNorm2d)
    net.load_state_dict(plain.state_dict())
    x = torch.rand(3, *SHAPE)
    for mode in (True, False):
        torch.manual_seed(1)
        expected = plain.train(mode)(x)
        torch.manual_seed(1)
        assert torch.equal(net.train(mode)(x), expected)
    assert net.state_dict().keys() == plain.state_dict().keys()


def test_the_recipe_trains_with_the_constants_of_the_batch():
    recipe, plain = (recipes.get(f"lmt-svhn-wrn16_4{end}") for end in ("-batch", ""))
    fields = [f.name for f in dataclasses.fields(plain)]
    differing = {f for f in fields if getattr(recipe, f) != getattr(plain, f)}
    assert differing == {"name", "summary", "model", "bound"}
    net = recipe.model(in_shape=SVHN, classes=10)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {type(m) for m in norms} == {RecordingBatchNorm2d}
    training = Training(small(norm=RecordingBatchNorm2d, dropout=0.0), bound=recipe.bound)
    assert type(training.bound) is BatchProduct
    x, y = pictures(20)
    curve = [training.step(x, y) for _ in range(15)]
    training.check()
    assert curve[-1] < curve[0]
