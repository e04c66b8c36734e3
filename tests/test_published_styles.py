"""Networks in the styles people publish, untouched: traced and bounded, or refused by name."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipcert as lc
from lipcert.adversary import lower_bound
from nets import NETS, Net


class BasicBlock(nn.Module):
    """As in the usual image model collections: one ReLU module used twice, a downsample branch."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ImageResNet(nn.Module):
    """A 7 x 7 stem, max-pooling with padding, stages of blocks, adaptive pooling."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))
        self.layer2 = nn.Sequential(BasicBlock(4, 6, stride=2), BasicBlock(6, 6))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class DenseLayer(nn.Module):
    """A bottleneck that takes the list of all features so far."""

    def __init__(self, inputs, growth):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(4 * growth)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features):
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return F.dropout(self.conv2(F.relu(self.norm2(x))), 0.2, self.training)


class ImageDenseNet(nn.Module):
    """Two dense blocks with a transition that halves channels and sides."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.first = nn.ModuleList([DenseLayer(4, 2), DenseLayer(6, 2)])
        self.transition = nn.Sequential(
            nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.AvgPool2d(2)
        )
        self.second = nn.ModuleList([DenseLayer(4, 2)])
        self.norm = nn.BatchNorm2d(6)
        self.classifier = nn.Linear(6, 4)

    def _block(self, layers, x):
        features = [x]
        for layer in layers:
            features.append(layer(features))
        return torch.cat(features, 1)

    def forward(self, x):
        x = self.transition(self._block(self.first, self.stem(x)))
        x = F.relu(self.norm(self._block(self.second, x)), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


class ImageUNet(nn.Module):
    """Down by max-pooling, up by bilinear interpolation, skips by concatenation."""

    def __init__(self):
        super().__init__()

        def twice(inputs, outputs):
            layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            return nn.Sequential(*layers, nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU())

        self.top, self.middle, self.bottom = twice(1, 2), twice(2, 3), twice(3, 4)
        self.up2, self.up1 = twice(4 + 3, 3), twice(3 + 2, 2)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.out = nn.Conv2d(2, 1, 1)

    def forward(self, x):
        one = self.top(x)
        two = self.middle(self.pool(one))
        three = self.bottom(self.pool(two))
        y = self.up2(torch.cat([self.up(three), two], dim=1))
        y = self.up1(torch.cat([F.interpolate(y, scale_factor=2, mode="nearest"), one], dim=1))
        return self.out(y).flatten(1)[:, :6]


def sequence_net():
    return nn.Sequential(
        nn.Conv1d(2, 6, 9, stride=2, padding=4),
        nn.BatchNorm1d(6),
        nn.LeakyReLU(0.2),
        nn.MaxPool1d(3, 2, 1),
        nn.Conv1d(6, 8, 5, padding="same", groups=2),
        nn.BatchNorm1d(8),
        nn.ELU(),
        nn.AdaptiveAvgPool1d(4),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32, 5),
    )


STYLES = {
    "resnet": Net(ImageResNet, (3, 32, 32)),
    "densenet": Net(ImageDenseNet, (3, 8, 8)),
    "unet": Net(ImageUNet, (1, 8, 8)),
    "1-d": Net(sequence_net, (2, 40)),
    "small unet": NETS["unet"],
}
styles = pytest.mark.parametrize("name", STYLES)


@styles
def test_no_slope_exceeds_the_bound(name):
    style = STYLES[name]
    net = style.build()
    bound = lc.Product(lc.trace(net, style.shape), norm=lc.Auto())
    x = torch.randn(24, *style.shape)
    constant, K = bound.lipschitz(), bound().dense()[0].detach()
    assert constant.kind == lc.Kind.UPPER
    generator = torch.Generator().manual_seed(5)
    seen = lower_bound(net, x, steps=15, generator=generator).max()
    assert 0 < seen <= float(constant)
    for i, j in ((0, 1), (1, 0), (2, 0), (1, 2)):

        def margin(x, i=i, j=j):
            logits = net(x)
            return logits[:, i : i + 1] - logits[:, j : j + 1]

        assert 0 < lower_bound(margin, x[:8], steps=3, generator=generator).max() <= K[i, j]


@styles
def test_the_normal_form_is_the_network(name):
    style = STYLES[name]
    net = style.build()
    graph = lc.trace(net, style.shape)
    x = torch.randn(3, *style.shape)
    torch.testing.assert_close(graph.values(x)[graph.output], net(x))


def test_max_pooling_with_padding_counts_its_overlaps():
    style = STYLES["resnet"]
    graph = lc.trace(style.build(), style.shape)
    (pool,) = (row for row in lc.Product(graph).layers() if row.node.name == "maxpool")
    assert float(pool.gain) == 2  # the middle of 2 x 2 windows of 3 x 3


# ---------------------------------------------------------------- what has no constant


class TransformerBlock(nn.Module):
    """Pre-norm attention by a module and once more by hand, with a GELU network between."""

    def __init__(self, d=4):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = nn.MultiheadAttention(d, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.head = nn.Linear(d, 3)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y)[0]
        x = x + self.mlp(self.norm2(x))
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = q @ k.transpose(1, 2) / 2
        x = x + scores.softmax(-1) @ v
        return self.head(x.mean(1))


def test_every_op_of_a_transformer_block_without_a_constant_is_named():
    with pytest.raises(lc.LipcertError) as caught:
        lc.trace(TransformerBlock(), (5, 4))
    first, *lines = str(caught.value).splitlines()
    assert "5 ops without a usable rule" in first
    places = [
        r"norm1 \(torch\.nn\.modules\.normalization\.LayerNorm\): it divides",
        r"attention \(torch\.nn\.modules\.activation\.MultiheadAttention\): dot-product attention",
        r"norm2 \(torch\.nn\.modules\.normalization\.LayerNorm\): it divides",
        r"operator\.matmul at .*scores = q @ k.*product of two functions of the input",
        r"operator\.matmul at .*scores\.softmax\(-1\) @ v.*product of two functions of the input",
    ]
    for place in places:
        assert sum(bool(re.search(place, line)) for line in lines) == 1, (place, lines)
    assert not any("mlp" in line or "GELU" in line for line in lines)


def test_the_block_is_bounded_once_what_has_no_constant_is_gone():
    block = TransformerBlock()
    block.norm1 = block.norm2 = nn.Identity()

    def forward(x):
        return block.head((x + block.mlp(x)).mean(1))

    block.forward = forward
    x = torch.randn(8, 5, 4)
    constant = float(lc.lipschitz(block, (5, 4)))
    assert lower_bound(block, x).max() <= constant
