"""The cache of transformed weights: kept while nothing changes, never when something did."""

import copy
import pickle

import jaxtyping
import pytest
import torch
from torch import nn

from lipcert.layers.cache import Cache


class Counting:
    """Makes twice the weight and counts how often."""

    def __init__(self, weight):
        self.weight, self.made, self.cache = weight, 0, Cache()

    def __call__(self, *settings):
        return self.cache((self.weight,), self.make, *settings)

    def make(self):
        self.made += 1
        return 2 * self.weight


@pytest.fixture
def twice():
    return Counting(nn.Parameter(torch.randn(3)))


@torch.no_grad()
def test_a_value_is_made_once(twice):
    first = twice()
    assert twice() is first
    assert twice.made == 1


def test_what_is_differentiated_is_made_anew(twice):
    with torch.no_grad():
        twice()
    value = twice()
    value.sum().backward()
    assert twice.weight.grad.tolist() == [2, 2, 2]
    assert twice.made == 2
    twice.weight.requires_grad_(False)
    with torch.no_grad():
        assert twice() is not value
    assert twice.made == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(3),
        lambda w: nn.init.ones_(w),
        lambda w: w.copy_(torch.ones(3)),
        lambda w: torch.optim.SGD([w], 0.1).step(),
        lambda w: setattr(w, "data", torch.ones(3)),
        lambda w: w.data.mul_(3),
        lambda w: setattr(w, "data", w.data.float()),
    ],
    ids=[
        "in place",
        "initialised",
        "copied",
        "optimiser",
        "other data",
        "through data",
        "other precision",
    ],
)
def test_a_change_of_the_tensor_is_noticed(twice, change):
    twice.weight.grad = torch.ones(3)
    with torch.no_grad():
        twice()
        change(twice.weight)
        assert torch.equal(twice(), 2 * twice.weight)
        assert twice().dtype == twice.weight.dtype
    assert twice.made == 2


@torch.no_grad()
def test_another_tensor_and_other_settings_are_noticed(twice):
    twice()
    twice.weight = nn.Parameter(torch.randn(3))
    assert torch.equal(twice(), 2 * twice.weight)
    twice(5)
    twice(5)
    assert twice.made == 3
    twice(6)
    assert twice.made == 4


@torch.no_grad()
def test_a_view_of_the_same_memory_is_another_tensor():
    weight, cache = torch.randn(2, 2), Cache()
    cache((weight,), weight.clone)
    assert torch.equal(cache((weight.T,), weight.T.clone), weight.T)


@torch.no_grad()
def test_every_tensor_counts():
    first, second = torch.ones(2), torch.ones(2)
    cache = Cache()
    cache((first, second), lambda: first + second)
    second.mul_(2)
    assert cache((first, second), lambda: first + second).tolist() == [3, 3]
    assert cache((first,), lambda: first).tolist() == [1, 1]


@torch.no_grad()
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
def test_a_copy_starts_empty(twice, copied):
    twice()
    other = copied(twice.cache)
    assert isinstance(other, Cache)
    assert other((twice.weight,), lambda: 5) == 5


def test_inference_mode_keeps_a_value_that_can_be_used_outside(twice):
    twice.weight.requires_grad_(False)
    with torch.inference_mode():
        value = twice()
        assert twice() is value
    assert twice() is value
    x = torch.ones(3, requires_grad=True)
    (x * twice()).sum().backward()
    assert torch.equal(x.grad, 2 * twice.weight)


def test_tensors_without_versions_are_never_trusted():
    with torch.inference_mode():
        twice = Counting(torch.ones(3))
        twice()
        twice.weight.mul_(2)
        assert twice().tolist() == [4, 4, 4]


@torch.no_grad()
def test_compiled_code_makes_its_own(twice, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks cannot be compiled
    compiled = torch.compile(lambda x: x * twice(), backend="eager", fullgraph=True)
    x = torch.randn(3)
    for _ in range(2):
        assert torch.equal(compiled(x), x * 2 * twice.weight)
        twice.weight.mul_(3)
