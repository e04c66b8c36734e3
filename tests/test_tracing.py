"""Tracing: what ordinary code may do, what is refused and where, and that weights stay live."""

import copy
import gc
import importlib.util
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

import lipcert as lc
from lipcert.graph import Affine, Concat, Input, Lipschitz, Slope, Sum, unwrap
from lipcert.layers import MaxMin, Normalize
from lipcert.rules import registry
from lipcert.rules.slopes import smooth
from lipcert.rules.spot_check import slope_fault
from nets import NETS, Net
from rule_cases import Fn

EACH_NET = pytest.mark.parametrize("name", NETS)


def kinds(graph):
    return [type(n.op) for n in graph]


def assert_same_function(graph, net):
    x = torch.randn(4, *graph.input_shape, dtype=next(net.parameters(), torch.zeros(())).dtype)
    training = net.training
    expected = net.eval()(x.clone())
    net.train(training)
    torch.testing.assert_close(graph.values(x)[graph.output], expected)


def refusal(net, shape):
    with pytest.raises(lc.LipcertError) as caught:
        lc.trace(net, shape)
    return str(caught.value)


# ---------------------------------------------------------------- whole networks


@EACH_NET
def test_the_graph_computes_the_network(name):
    net = NETS[name].build()
    graph = lc.trace(net, NETS[name].shape)
    assert graph.nodes[0].name == "input"
    assert graph.output.shape == (3,)
    assert len({n.name for n in graph}) == len(graph.nodes)
    for n in graph:
        assert graph.node(n.name) is n
        assert all(graph.nodes.index(i) < graph.nodes.index(n) for i in n.inputs)
        if isinstance(n.op, Affine):  # everything affine was fused
            assert not isinstance(n.inputs[0].op, Affine)
    assert_same_function(graph, net)
    values = graph.values(torch.randn(2, *graph.input_shape))
    assert all(values[n].shape == (2, *n.shape) for n in graph)


@EACH_NET
def test_the_graph_computes_the_network_in_float32(name):
    net = NETS[name].build().float()
    graph = lc.trace(net, NETS[name].shape)
    assert_same_function(graph, net)
    reference = lc.Product(lc.trace(NETS[name].build(), NETS[name].shape))
    K = lc.Product(graph)().dense()
    torch.testing.assert_close(K, reference().dense(), rtol=1e-4, atol=1e-6)


@EACH_NET
def test_the_graph_follows_the_weights(name):
    net = NETS[name].build()
    graph = lc.trace(net, NETS[name].shape)
    bound = lc.Product(graph)
    bound()
    other = NETS[name].build(seed=1)
    net.load_state_dict(other.state_dict())
    assert_same_function(graph, net)
    fresh = lc.Product(lc.trace(other, NETS[name].shape))().dense()
    torch.testing.assert_close(bound().dense(), fresh)


@EACH_NET
def test_tracing_leaves_the_network_alone(name):
    net = NETS[name].build()
    for i, module in enumerate(net.modules()):
        module.training = i % 3 == 0
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    attributes = [set(vars(m)) for m in net.modules()]
    graph = lc.trace(net, NETS[name].shape)
    assert [m.training for m in net.modules()] == modes
    assert [set(vars(m)) for m in net.modules()] == attributes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    graph.check(net)


def test_the_graph_describes_the_eval_mode():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.RReLU())
    graph = lc.trace(net.train(), (4,))
    assert net.training
    net(torch.randn(64, 4))  # moves the running statistics
    assert_same_function(graph, net)
    assert kinds(graph) == [Input, Affine, Slope]


def test_a_failed_trace_restores_the_mode():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).train()
    net[1].eval()
    refusal(net, (4,))
    assert [m.training for m in net.modules()] == [True, True, False]


# ---------------------------------------------------------------- structure


def test_affine_pieces_become_one_node():
    assert kinds(lc.trace(NETS["deep linear"].build(), (2, 4, 4))) == [Input, Affine]
    # conv | relu | conv + norm + sum | relu ...
    graph = lc.trace(NETS["resnet"].build(), (2, 4, 4))
    count = {kind: kinds(graph).count(kind) for kind in (Affine, Slope, Sum)}
    assert count == {Affine: 7, Slope: 4, Sum: 2}


def test_x_plus_conv_of_x_is_one_map():
    net = Fn(lambda s, x: F.relu(x + s.conv(x)))
    net.conv = nn.Conv2d(2, 2, 3, padding=1)
    graph = lc.trace(net, (2, 4, 4))
    assert kinds(graph) == [Input, Affine, Slope]
    alone = lc.spectral_norm(net.conv, (2, 4, 4), lc.Exact())
    fused = lc.Product(graph, lc.Exact()).lipschitz()
    assert float(fused) < float(alone) + 1 - 1e-3


def test_max_and_min_of_one_pair_are_one_sort():
    graph = lc.trace(NETS["maxmin by hand"].build(), (5,))
    assert kinds(graph) == [Input, Affine, Lipschitz, Affine]
    gains = [layer.gain for layer in lc.Product(graph).layers()]
    assert float(gains[2]) == 1
    for gain, layer in ((gains[1], graph.model.first), (gains[3], graph.model.last)):
        torch.testing.assert_close(gain.value, torch.linalg.matrix_norm(layer.weight, 2))


def test_concatenation_of_activations_stays():
    assert Concat in kinds(lc.trace(NETS["densenet"].build(), (2, 4, 4)))


def test_nodes_are_named_after_modules_and_functions():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    assert [n.name for n in lc.trace(net, (4,))] == ["input", "0", "1", "2"]
    graph = lc.trace(NETS["maxmin by hand"].build(), (5,))
    assert graph.output.name.endswith("last")
    with pytest.raises(lc.LipcertError, match="no node 'lost'.*'input', .*last"):
        graph.node("lost")


def test_a_module_used_twice_gives_two_nodes():
    net = Fn(lambda s, x: s.layer(s.layer(x).relu()))
    net.layer = nn.Linear(4, 4)
    graph = lc.trace(net, (4,))
    assert [n.name for n in graph] == ["input", "layer", "relu", "layer#2"]
    assert_same_function(graph, net)


@pytest.mark.parametrize("module", [nn.Conv2d(2, 3, 3), MaxMin(), nn.ReLU(), nn.MaxPool2d(2)])
def test_a_single_layer_is_a_network(module):
    graph = lc.trace(module, (2, 4, 4))
    assert_same_function(graph, module)
    assert len(graph.nodes) == 2


def test_the_identity_is_a_network():
    graph = lc.trace(nn.Identity(), (2, 3))
    assert kinds(graph) == [Input]
    assert float(lc.Product(graph).lipschitz()) == 1


# ---------------------------------------------------------------- ordinary code


def test_control_flow_over_shapes_and_settings():
    def forward(s, x):
        if x.shape[-1] % 2 == 0 and x.dim() == 2 and x.ndim == len(x.shape):
            x = F.pad(x, (0, x.size(1) // 2))
        while x.numel() < 3 * 16 * len(x):
            x = torch.cat([x, x.neg()], dim=-1)
        assert x.dtype == torch.float64
        assert x.device.type == "cpu"
        for piece in x.split(8, dim=1)[:2]:
            x = x + F.pad(piece, (0, x.size()[1] - 8)).relu()
        return x[:, : int(s.flag) + 2]

    net = Fn(forward)
    net.flag = True
    assert_same_function(lc.trace(net, (4,)), net)


def test_iteration_over_pieces():
    net = Fn(lambda s, x: sum(p.tanh() for p in x.unbind(1)))
    assert_same_function(lc.trace(net, (3, 2)), net)
    net = Fn(lambda s, x: torch.cat([*(part * 2 for part in torch.chunk(x, 3, 1))], 1))
    graph = lc.trace(net, (3, 2))
    assert kinds(graph) == [Input, Affine]


def test_arithmetic_on_parameters_is_live():
    net = Fn(
        lambda s, x: F.linear(x, s.v / s.v.norm(dim=1, keepdim=True) * s.g.exp()[:, None], s.g),
        v=torch.randn(3, 4),
        g=torch.zeros(3),
    )
    graph = lc.trace(net, (4,))
    rows = lc.Product(graph).per_output().value
    torch.testing.assert_close(rows, torch.ones(3))
    with torch.no_grad():
        net.g[1] = 1.0
    assert_same_function(graph, net)
    torch.testing.assert_close(lc.Product(graph).per_output().value[1], torch.ones(()).exp())


def test_parametrized_layers_are_seen_through_and_live():
    net = nn.Sequential(orthogonal(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 2))
    bound = lc.Product(lc.trace(net, (6,)))
    assert float(bound.prefix("1")) == pytest.approx(1)
    net[0].weight = -torch.eye(6)
    assert_same_function(bound.graph, net)
    net = nn.Sequential(spectral_norm(nn.Conv2d(1, 2, 3), n_power_iterations=30))
    graph = lc.trace(net.eval(), (1, 5, 5))
    assert_same_function(graph, net)
    with torch.no_grad():
        net[0].parametrizations.weight.original.mul_(2)
    assert_same_function(graph, net)


def test_parametrized_weights_used_directly():
    net = Fn(lambda s, x: F.linear(x, s.layer.weight) + s.layer(x))
    net.layer = orthogonal(nn.Linear(4, 4, bias=False))
    graph = lc.trace(net, (4,))
    assert_same_function(graph, net)
    assert float(lc.Product(graph).lipschitz()) == pytest.approx(2)


def test_tensors_that_are_neither_parameters_nor_buffers():
    net = Fn(lambda s, x: x * s.mask + torch.tensor([1.0, 2.0, 3.0]))
    net.mask = torch.tensor([1.0, 0.0, 2.0])
    graph = lc.trace(net, (3,))
    assert_same_function(graph, net)
    net.mask = torch.tensor([0.0, 5.0, 0.0])
    assert float(lc.Product(graph).lipschitz()) == 5


def test_a_subclass_is_not_its_parent():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Silent(nn.ReLU):
        pass

    net = nn.Sequential(Doubled(3, 3), Silent())
    assert_same_function(lc.trace(net, (3,)), net)


def test_arguments_with_defaults_have_their_defaults():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, scale=None, mask=None):
            x = self.layer(x) if scale is None else scale * x
            return 7 * x if mask is None else x

    net = Net()
    assert_same_function(lc.trace(net, (3,)), net)


def test_dtypes_follow_the_weights():
    for net in (nn.Linear(3, 2), nn.BatchNorm1d(3, affine=False), nn.Tanh()):
        net = nn.Sequential(net).float().eval()
        x = torch.randn(2, 3, dtype=torch.float32)
        graph = lc.trace(net, (3,))
        assert graph.values(x)[graph.output].dtype == torch.float32


@pytest.mark.parametrize(
    "layers",
    [
        (nn.AvgPool2d(2), nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(12, 3)),
        (nn.Conv2d(2, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)),
    ],
)
@pytest.mark.parametrize("norm", [lc.Auto(), lc.Gram(), lc.Lanczos(), lc.PowerIteration(50)])
def test_pooling_by_averages_keeps_float32(layers, norm):
    net = nn.Sequential(*layers).float()
    graph = lc.trace(net, (2, 4, 4))
    assert_same_function(graph, net)
    bound = lc.Product(graph, norm)
    exact = lc.Product(lc.trace(net.double(), (2, 4, 4)), lc.Exact())().dense()
    net.float()
    torch.testing.assert_close(bound().dense(), exact, rtol=0.02, atol=1e-6)


# ---------------------------------------------------------------- in-place ops


def _block(s, x):
    y = F.relu(s.a(x), inplace=True)
    y += x
    y *= 2
    return s.act(y).clamp_(max=3)


def _of_a_view(s, x):
    y = s.a(x)
    y[:, 0].relu_()
    return y


def _under_another_name(s, x):
    y = z = s.a(x)
    y += x.relu()
    return z


def _of_a_part(s, x):
    y = s.a(x)
    y[:, :2] = 0.0
    return y


def _of_a_constant(s, x):
    w = s.b.weight.clone()
    w[0] = 0
    return F.linear(x, w)


def with_layers(forward):
    net = Fn(forward)
    net.a, net.b, net.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)
    return net


@pytest.mark.parametrize(
    "forward",
    [
        _block,
        lambda s, x: s.act(s.a(x)) + x,
        lambda s, x: s.a(x).relu_().view(-1, 2, 2).mul_(2),
        lambda s, x: s.act(s.a(x).view(-1, 2, 2)).flatten(1),
        lambda s, x: s.b(F.elu_(s.a(F.dropout(x, 0.5, s.training, inplace=True)))),
    ],
)
def test_harmless_in_place_ops_are_accepted(forward):
    net = with_layers(forward)
    assert_same_function(lc.trace(net, (4,)), net)


@pytest.mark.parametrize(
    ("forward", "line"),
    [
        (lambda s, x: (lambda y: s.act(y) + y)(s.a(x)), "act"),
        (lambda s, x: (lambda y: F.relu(y, inplace=True) - y)(s.a(x)), "relu"),
        (lambda s, x: (lambda y, z: (y.tanh_(), z)[1])(*[s.a(x)] * 2), "tanh_"),
        (lambda s, x: (lambda y: (y.view(-1, 2, 2).abs_(), y)[1])(s.a(x)), "abs_"),
        (lambda s, x: s.act(x) + x, "act"),
        (_under_another_name, "y += x.relu()"),
        (_of_a_view, "y[:, 0].relu_()"),
        (_of_a_part, "y[:, :2] = 0.0"),
        (_of_a_constant, "w[0] = 0"),
    ],
)
def test_overwriting_what_is_read_again_is_refused(forward, line):
    message = refusal(with_layers(forward), (4,))
    assert "overwrites its input, which is read again later" in message
    assert line in message


# ---------------------------------------------------------------- refusals


def test_all_offenders_are_listed_with_their_places():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.LayerNorm(4), nn.Linear(4, 4), nn.Hardshrink()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return torch.special.expit(torch.exp(x))

    message = refusal(Net(), (4,))
    assert "4 ops without a usable rule" in message
    lines = message.splitlines()[1:]
    assert lines[0].startswith("  - blocks.0 (torch.nn.modules.normalization.LayerNorm): it divid")
    assert lines[1].startswith("  - blocks.2 (torch.nn.modules.activation.Hardshrink): it jumps")
    assert lines[2].startswith(f"  - torch.exp at {__file__}:")
    assert "return torch.special.expit(torch.exp(x)): its slope has no" in lines[2]
    assert lines[3].startswith("  - torch.special.expit at")
    assert lines[3].endswith("write one with @lipcert.rule if you know its Lipschitz constant")


def test_a_refused_root_is_named():
    assert "the network itself (torch.nn.modules.activation.Hardshrink)" in refusal(
        nn.Hardshrink(), (3,)
    )


@pytest.mark.parametrize("folder", ["lipcert", "torch"])
def test_places_are_found_in_any_folder(tmp_path, folder):
    path = tmp_path / folder / "network.py"
    path.parent.mkdir()
    path.write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        if x.sum() > 0:\n"
        "            return x\n"
        "        return torch.exp(x)\n"
    )
    spec = importlib.util.spec_from_file_location("network", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"in {path}:6: if x.sum() > 0:" in refusal(module.Net(), (3,))
    module.Net.forward = eval("lambda self, x: torch.exp(x)", vars(module))
    assert "torch.exp" in refusal(module.Net(), (3,))


def _branch(s, x):
    return x if x.sum() > 0 else -x


def _loop(s, x):
    while x.abs().max() > 1:
        x = x / 2
    return x


@pytest.mark.parametrize(
    ("forward", "line"),
    [
        (_branch, "return x if x.sum() > 0 else -x"),
        (_loop, "while x.abs().max() > 1:"),
        (lambda s, x: x * float(x.sum()), "float(x.sum())"),
        (lambda s, x: x[:, : int(x.sum())], "int(x.sum())"),
        (lambda s, x: x if x.sum().item() > 0 else -x, "x.sum().item() > 0"),
        (lambda s, x: x.repeat(1, *range(x[0, 0].long())), "range("),
    ],
)
def test_control_flow_over_data_is_refused_with_its_line(forward, line):
    message = refusal(Fn(forward), (4,))
    assert "depends on the data" in message
    assert __file__ in message
    assert line in message


def test_wrong_shapes_are_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    message = refusal(net, (2, 5))
    assert "does not run on an input of shape (2, 5)" in message
    assert "Check input_shape" in message
    for shape in ((), (0, 6), (-1,)):
        assert "the shape of one sample without the batch" in refusal(net, shape)

    class Picky(nn.Module):
        def forward(self, x):
            assert x.shape[1] == 3
            return x

    assert f"in {__file__}" in refusal(Picky(), (2,))


def test_several_inputs_or_outputs_are_refused():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    assert "must take one tensor" in refusal(Two(), (3,))
    assert "missing a required argument: 'y'" in refusal(Two(), (3,))
    assert "not tuple" in refusal(Fn(lambda s, x: (x, -x)), (3,))
    assert "not dict" in refusal(Fn(lambda s, x: {"logits": x}), (3,))
    assert "not a constant" in refusal(Fn(lambda s, x: s.w * 2, w=torch.ones(2, 3)), (3,))
    assert "not NoneType" in refusal(Fn(lambda s, x: None), (3,))


def test_hooks_of_a_ruled_layer_are_refused():
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        net = nn.Sequential(nn.Linear(3, 3))
        getattr(net[0], register)(lambda module, *args: None)
        assert "0 (torch.nn.modules.linear.Linear): it has forward hooks" in refusal(net, (3,))


def test_hooks_of_other_modules_are_traced():
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.ReLU())
    net[0].register_forward_hook(lambda module, args, output: 3 * output)
    net.register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    net.register_forward_hook(lambda module, args, output: output.tanh())
    assert_same_function(lc.trace(net, (3,)), net)


# ---------------------------------------------------------------- rules of one's own


class Softer(nn.Module):
    def forward(self, x):
        return x / (1 + x.abs())


@pytest.fixture
def own_rules(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


def test_a_rule_of_ones_own(own_rules):
    net = nn.Sequential(nn.Linear(3, 3), Softer())
    assert "division by a function of the input" in refusal(net, (3,))

    @lc.rule(Softer)
    def softer(module, x):
        assert isinstance(module, Softer)
        assert x.shape == (3,)
        return smooth(module, lambda t: (1 + t.abs()) ** -2, (0.0,), limits=(-1.0, 1.0))

    graph = lc.trace(net, (3,))
    assert kinds(graph) == [Input, Affine, Slope]
    assert_same_function(graph, net)
    assert kinds(lc.trace(Softer(), (3,))) == [Input, Slope]
    with pytest.raises(lc.LipcertError, match="There is a rule for test_tracing.Softer already"):
        lc.rule(Softer)(softer)


def test_rules_of_functions_and_methods(own_rules):
    assert "torch.logcumsumexp at" in refusal(Fn(lambda s, x: torch.logcumsumexp(x, 1)), (3,))

    def gradient_rows_are_weights(x, dim):
        assert dim == 1
        return Lipschitz(
            lambda t: torch.logcumsumexp(t, 1),
            x.shape,
            lambda: 3**0.5,
            lambda low, high: (torch.logcumsumexp(low, 1), torch.logcumsumexp(high, 1)),
            lc.Kind.ESTIMATE,
        )

    lc.rule(torch.logcumsumexp, "logcumsumexp")(gradient_rows_are_weights)
    for forward in (lambda s, x: torch.logcumsumexp(x, 1), lambda s, x: x.logcumsumexp(dim=1)):
        graph = lc.trace(Fn(forward), (3,))
        assert_same_function(graph, graph.model)
        assert lc.Product(graph).lipschitz().kind is lc.Kind.ESTIMATE


def test_a_rule_with_the_wrong_shape_is_refused(own_rules):
    lc.rule(torch.cumprod)(
        lambda x, dim: Lipschitz(torch.cumprod, (4,), lambda: 2.0, lambda low, high: (low, high))
    )
    message = refusal(Fn(lambda s, x: torch.cumprod(x, 1)), (3,))
    assert "its rule gives the shape (4,), not (3,)" in message


# ---------------------------------------------------------------- identity of the network


class Own(nn.Module):
    """An elementwise function of one's own."""

    def __init__(self, fn, weight=1.0):
        super().__init__()
        self.fn, self.weight = fn, nn.Parameter(torch.as_tensor(weight))

    def forward(self, x):
        return self.weight * self.fn(x)


LIES = {
    "too steep": (torch.tanh, 1.1, lambda t: 1 - t.tanh().square()),
    "of the other sign": (torch.tanh, -1.0, lambda t: 1 - t.tanh().square()),
    "with a jump": (torch.sign, 1.0, torch.zeros_like),
    "not a number": (lambda t: t.where(t > -9, torch.nan), 1.0, torch.ones_like),
    "in one channel": (torch.sin, torch.tensor([1.0, 1.0, 1.5])[:, None], torch.ones_like),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lie", LIES)
def test_a_rule_whose_slopes_do_not_hold_is_refused(own_rules, lie, dtype):
    fn, weight, derivative = LIES[lie]
    lc.rule(Own)(lambda module, x: smooth(module, derivative, (0.0,)))
    net = nn.Sequential(nn.Linear(4, 4), Own(fn, weight)).to(dtype)
    message = refusal(net, (3, 4))
    assert "1 op without" in message
    assert "- 1 (test_tracing.Own): its rule states slopes" in message


@pytest.mark.parametrize("lies_on_short", [True, False])
def test_the_slopes_of_short_intervals_and_of_the_whole_line_are_checked(own_rules, lies_on_short):
    def secants(lower, upper):
        lies = (upper - lower < 1) == lies_on_short
        return torch.where(lies, 0.0, -1.0), torch.where(lies, 0.5, 1.0)

    lc.rule(Own)(lambda m, x: Slope(m, secants, lambda low, up: (low, up)))
    message = refusal(Own(torch.sin), (3,))
    assert "states slopes in [0, 0.5] between" in message
    assert ("between -inf and inf" in message) != lies_on_short


class Channels(Own):
    """One slope a channel, by a function that insists on their number."""

    def forward(self, x):
        return F.prelu(x, self.weight.to(x))


def test_slopes_of_many_channels_are_checked(own_rules):
    def rule(most):
        return lambda m, x: Slope(
            m,
            lambda low, up: (torch.zeros_like(low), torch.full_like(up, most)),
            lambda low, up: (low, up),
        )

    net = Channels(None, torch.linspace(0, 2, 700))
    lc.rule(Channels)(rule(2.0))
    lc.trace(net, (700, 2, 2))
    registry._RULES[Channels] = rule(1.9)
    assert "its rule states slopes in [0, 1.9]" in refusal(net, (700, 2, 2))


def test_checking_the_slopes_of_a_node_takes_no_time():
    graph = lc.trace(nn.Sequential(nn.GELU()), (64, 32, 32))
    op = graph.output.op
    assert slope_fault(op, (64, 32, 32), torch.zeros(1)) is None
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        slope_fault(op, (64, 32, 32), torch.zeros(1))
        times.append(time.perf_counter() - begin)
    assert min(times) < 2e-3  # less than half of that is usual


def test_wrappers_are_looked_through():
    net = NETS["mlp"].build()
    compiled = nn.Module()
    compiled._orig_mod = net
    for wrapped in (nn.DataParallel(net), compiled, nn.DataParallel(compiled)):
        assert unwrap(wrapped) is net
    graph = lc.trace(nn.DataParallel(net), (6,))
    assert graph.model is net
    graph.check(nn.DataParallel(net))
    assert [n.name for n in graph][1:] == ["0", "1", "2", "3", "4"]


def test_changes_after_tracing_are_noticed():
    def traced():
        net = nn.Sequential(nn.Linear(3, 3), nn.LeakyReLU(0.1), nn.Linear(3, 3))
        return net, lc.trace(net, (3,))

    net, graph = traced()
    net[1] = nn.ReLU()
    with pytest.raises(lc.LipcertError, match=r"changed after it was traced, at: 1\..*again"):
        graph.check(net)
    net, graph = traced()
    net.append(nn.ReLU())
    with pytest.raises(lc.LipcertError, match="changed after it was traced, at: 3"):
        graph.check(net)
    net, graph = traced()
    net[1].negative_slope = 3.0
    with pytest.raises(lc.LipcertError, match="changed after it was traced, at: 1"):
        graph.check(net)
    net, graph = traced()
    with pytest.raises(lc.LipcertError, match="traced from another network"):
        graph.check(copy.deepcopy(net))
    net, graph = traced()
    net[2].bias.data[1] = torch.nan
    with pytest.raises(lc.LipcertError, match=r"NaN or infinite weights in: 2\.bias"):
        graph.check(net)
    net, graph = traced()
    with torch.no_grad():
        net[0].weight.mul_(2)
    graph.check(net.train())


def test_other_numbers_in_a_normalisation_are_no_change_of_the_network():
    net = nn.Sequential(Normalize([0.5], [0.25]), nn.Flatten(), nn.Linear(4, 2))
    graph = lc.trace(net, (1, 2, 2))
    net.load_state_dict(net.state_dict() | {"0.mean": torch.tensor([0.1]), "0.std": torch.ones(1)})
    graph.check(net)
    assert_same_function(graph, net)
    wider = Normalize([0.5, 0.5], [0.25, 0.25])
    assert repr(wider) != repr(net[0])  # how many channels there are is structure


def test_graphs_and_bounds_of_copies_are_apart():
    net = NETS["mlp"].build()
    twin = copy.deepcopy(net)
    graphs = lc.trace(net, (6,)), lc.trace(twin, (6,))
    with torch.no_grad():
        twin[0].weight.zero_()
    assert_same_function(graphs[0], net)
    assert_same_function(graphs[1], twin)
    del net, twin
    gc.collect()
    assert graphs[0].values(torch.randn(1, 6))


def test_a_net_may_be_traced_for_several_shapes():
    net = Net(lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU()), (1, 4, 4)).build()
    for size in (3, 5):
        graph = lc.trace(net, (1, size, size))
        assert graph.output.shape == (2, size, size)
        assert_same_function(graph, net)
