import math

import pytest
import torch
from torch import nn

from lipcert.adversary import lower_bound, pgd
from lipcert.errors import LipcertError
from lipcert.models import lmt_mnist, mlp


class Linear(nn.Module):
    """z = W x + b on flattened inputs, with the exact distances to the decision boundaries."""

    def __init__(self, W, b):
        super().__init__()
        self.W, self.b = nn.Parameter(W), nn.Parameter(b)

    def forward(self, x):
        return x.flatten(1) @ self.W.T + self.b

    def distances(self, x):
        """Smallest L2 change of each input that changes its prediction."""
        z = self(x).detach()
        p = z.argmax(dim=1)
        margins = z.gather(1, p[:, None]) - z
        gaps = (self.W[p][:, None] - self.W[None]).norm(dim=2).detach()
        return (margins / gaps).nan_to_num(nan=math.inf).amin(dim=1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- the attack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 6])
def test_linear_nets_fall_just_beyond_their_exact_distance_and_not_before(classes, dtype):
    net = Linear(torch.randn(classes, 12), torch.randn(classes)).to(dtype)
    x = torch.randn(20, 3, 4, dtype=dtype)
    labels, distances = net(x).argmax(dim=1), net.distances(x)

    beyond = pgd(net, x, labels, 1.02 * distances, restarts=classes, clip=None)
    assert beyond.found.all()
    assert torch.equal(net(beyond.adversarial).argmax(dim=1) != labels, beyond.found)
    assert (beyond.distance > 0.999 * distances).all()

    before = pgd(net, x, labels, 0.98 * distances, restarts=classes, clip=None)
    assert not before.found.any()
    assert (before.distance <= 0.98 * distances).all()


def test_later_restarts_aim_at_rivals_that_the_first_one_misses():
    # Class 1 is next in logits but 10 away; class 2 is third, and only 0.5 away.
    W = torch.zeros(3, 50)
    W[1, 0], W[2, 1] = 0.1, 4.0
    net = Linear(W, torch.tensor([0.0, -1.0, -2.0]))
    x, labels = torch.zeros(8, 50), torch.zeros(8, dtype=torch.long)
    attack = {"radius": 0.6, "clip": None}
    assert not pgd(net, x, labels, generator=seeded(), **attack).found.any()
    result = pgd(net, x, labels, restarts=3, generator=seeded(), **attack)
    assert result.found.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("corner", [True, False])
def test_points_stay_in_the_ball_and_in_the_box(corner, dtype):
    net = lmt_mnist((1, 8, 8), 4).to(dtype)
    x = torch.rand(60, 1, 8, 8, dtype=dtype)
    if corner:
        x = x.round()
    labels = net(x).argmax(dim=1)
    sizes = torch.tensor([0.0, 1e-9, 1e-6, 1e-3, 0.1, 1.0, 5.0, 7.9, 100.0, math.inf])
    radii = sizes.repeat(6).to(dtype)
    result = pgd(net, x, labels, radii, steps=15, restarts=2)

    moved = (result.adversarial.double() - x.double()).flatten(1)
    exact = torch.tensor([math.hypot(*row) for row in moved.tolist()])
    torch.testing.assert_close(result.distance, exact, rtol=1e-12, atol=0.0)
    assert result.adversarial.dtype == dtype
    assert (exact <= radii.double()).all()
    assert (result.distance <= radii.double()).all()
    assert (result.adversarial >= 0).all()
    assert (result.adversarial <= 1).all()
    assert (result.distance[radii == 0] == 0).all()
    assert (result.distance[radii >= 0.1] > 0).all()  # the attack does move
    assert torch.equal(net(result.adversarial).argmax(dim=1) != labels, result.found)
    assert result.found.any()


def test_other_boxes_are_respected():
    net = Linear(torch.randn(2, 5), torch.zeros(2))
    x = torch.full((4, 5), 0.3)
    result = pgd(net, x, net(x).argmax(dim=1), math.inf, clip=(0.1, 0.4))
    assert (result.adversarial >= 0.1).all()
    assert (result.adversarial <= 0.4).all()


def test_an_infinite_radius_searches_the_inside_of_the_box():
    class Band(nn.Module):
        def forward(self, x):
            return torch.stack([0 * x[:, 0], 0.05 - (x[:, 0] - 0.4).abs()], dim=1)

    result = pgd(Band(), torch.zeros(10, 2), torch.zeros(10, dtype=torch.long), math.inf)
    assert result.found.all()


def test_ball_and_box_together_are_searched_to_the_end():
    # Only the second pixel can rise: the first sits at the upper limit.
    net = Linear(torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.tensor([0.0, -3.5]))
    x, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert pgd(net, x, labels, 0.51).found.all()
    assert not pgd(net, x, labels, 0.49).found.any()


def test_what_is_misclassified_already_is_found_where_it_is():
    net = Linear(torch.randn(3, 4), torch.zeros(3))
    x = torch.rand(10, 4)
    labels = (net(x).argmax(dim=1) + 1) % 3
    result = pgd(net, x, labels, 0.0)
    assert result.found.all()
    assert torch.equal(result.adversarial, x)
    assert not result.distance.any()


def test_misses_keep_the_highest_margin_loss():
    net = Linear(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([0.0, -100.0]))
    x, labels = torch.zeros(1, 2), torch.tensor([0])
    result = pgd(net, x, labels, 1.0, clip=None)
    assert not result.found.any()
    torch.testing.assert_close(result.adversarial, torch.tensor([[0.6, 0.8]]), rtol=0, atol=1e-3)


def test_a_tie_is_decided_by_argmax():
    net = Linear(torch.zeros(2, 3), torch.zeros(2))
    x = torch.rand(2, 3)
    first = int(net(x)[0].argmax())
    assert not pgd(net, x, torch.full((2,), first), 0.5).found.any()
    assert pgd(net, x, torch.full((2,), 1 - first), 0.5).found.all()


class Flat(nn.Module):
    """Predicts 1 beyond x = 0.6; its gradient is zero everywhere, or does not exist at all."""

    def __init__(self, connected):
        super().__init__()
        self.connected = connected

    def forward(self, x):
        z = torch.stack([torch.full_like(x[:, 0], 0.5), (x[:, 0] > 0.6).to(x.dtype)], dim=1)
        return z + 0 * x[:, :1] if self.connected else z


@pytest.mark.parametrize("connected", [True, False])
def test_zero_gradients_fall_back_to_random_directions(connected):
    x, labels = torch.full((200, 2), 0.5), torch.zeros(200, dtype=torch.long)
    assert not pgd(Flat(connected), x, labels, 0.09, generator=seeded()).found.any()
    result = pgd(Flat(connected), x, labels, 0.2, generator=seeded())
    assert result.found.double().mean() > 0.6  # the start alone is beyond 0.6 in 1 of 5 cases
    assert result.adversarial.isfinite().all()


def test_the_same_generator_gives_the_same_attack():
    net = mlp((6,), 4, widths=(16,))
    x = torch.rand(12, 6)
    labels = net(x).argmax(dim=1)
    state = torch.get_rng_state()
    a, b, c = (pgd(net, x, labels, 0.3, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.adversarial, b.adversarial)
    assert torch.equal(a.found, b.found)
    assert not torch.equal(a.adversarial, c.adversarial)


def test_starts_are_uniform_in_the_ball():
    net = Linear(torch.zeros(2, 3), torch.tensor([1.0, 0.0]))
    x = torch.zeros(4000, 3, requires_grad=True)
    labels = torch.zeros(4000, dtype=torch.long)
    # No point of a constant net is better than the input, so the misses are the inputs.
    assert not pgd(net, x, labels, 1.0, steps=1, clip=None).distance.any()

    visited = []
    net.register_forward_hook(lambda module, inputs, output: visited.append(inputs[0].detach()))
    pgd(net, x, labels, 2.0, steps=1, clip=None, generator=seeded())
    start = visited[1]
    shares = torch.linspace(0.1, 0.9, 9)
    volumes = (start.norm(dim=1) / 2) ** 3
    torch.testing.assert_close(volumes.quantile(shares), shares, rtol=0, atol=0.03)
    assert start.mean(dim=0).abs().max() < 0.05


def test_the_net_is_left_as_it_was():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    net.train()
    net[2].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.rand(5, 6)
    with torch.no_grad():
        pgd(net, x, torch.zeros(5, dtype=torch.long), 0.2)
    lower_bound(net, x)
    assert [m.training for m in net] == [True, True, False, True]
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert x.grad is None


def test_flags_are_restored_after_an_error():
    net = mlp((6,), 4).train()
    with pytest.raises(RuntimeError):
        pgd(net, torch.rand(2, 5), torch.zeros(2, dtype=torch.long), 0.1)
    assert all(m.training for m in net.modules())


def test_an_empty_batch_gives_an_empty_result():
    result = pgd(mlp((6,), 4), torch.rand(0, 6), torch.zeros(0, dtype=torch.long), 0.1)
    assert result.found.shape == result.distance.shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": -0.1}, "radius"),
        ({"radius": math.nan}, "radius"),
        ({"radius": math.inf, "clip": None}, "infinite"),
        ({"radius": 0.1, "clip": (0.0, 0.5)}, "outside"),
        ({"radius": 0.1, "steps": 0}, "steps"),
        ({"radius": 0.1, "restarts": 0}, "restarts"),
    ],
)
def test_bad_requests_are_refused(options, message):
    x, labels = torch.full((2, 6), 0.7), torch.zeros(2, dtype=torch.long)
    with pytest.raises(LipcertError, match=message):
        pgd(mlp((6,), 4), x, labels, **options)


# ---------------------------------------------------------------- sampled slopes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_of_a_linear_map_rise_to_its_norm_and_never_above(dtype):
    W = torch.randn(5, 8, dtype=dtype)
    norm = torch.linalg.matrix_norm(W.double(), 2)
    x = torch.randn(30, 8, dtype=dtype)
    tolerance = 1 + 10 * torch.finfo(dtype).eps
    seen = [lower_bound(lambda x: x @ W.T, x, steps, seeded()) for steps in (0, 1, 5, 400)]
    for fewer, more in zip(seen, [*seen[1:], norm], strict=True):
        assert (fewer <= more * tolerance).all()
    assert (seen[0] < 0.9 * norm).any()
    torch.testing.assert_close(seen[-1], norm.expand(30), rtol=1e-6, atol=0.0)


def test_slopes_belong_to_each_point():
    x = torch.rand(4, 3, 2)
    x[:, 1, 1] += torch.arange(1, 5)
    slopes = lower_bound(lambda x: x**2, x, steps=300)
    torch.testing.assert_close(slopes, 2 * x[:, 1, 1])


def test_slopes_of_a_net_match_its_jacobians():
    net = lmt_mnist((1, 8, 8), 4).train()
    x = torch.rand(3, 1, 8, 8)
    for point, slope in zip(x, lower_bound(net, x, steps=500), strict=True):
        jacobian = torch.autograd.functional.jacobian(net, point[None]).reshape(4, -1)
        torch.testing.assert_close(slope, torch.linalg.matrix_norm(jacobian, 2))


def test_a_constant_function_has_slope_zero():
    assert not lower_bound(lambda x: 0 * x, torch.rand(3, 4)).any()


def test_the_lower_bound_of_a_function_with_one_number_a_sample():
    weight = torch.randn(5)
    slopes = lower_bound(lambda x: x @ weight, torch.rand(3, 5))
    torch.testing.assert_close(slopes, weight.norm().expand(3))
