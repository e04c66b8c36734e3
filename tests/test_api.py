"""The public names: all there, listed for type checkers too, and imported when first used."""

import ast
import contextlib
import copy
import importlib
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import config
from torch import nn

import lipcert as lc


@contextlib.contextmanager
def jaxtyping_off():
    """As users run the library: annotations are not checked."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("name", lc.__all__)
def test_every_public_name_resolves(name):
    value = getattr(lc, name)
    assert getattr(lc, name) is value
    assert name in dir(lc)
    if name in lc._HOME:
        assert getattr(importlib.import_module(lc._HOME[name]), name) is value


def test_type_checkers_see_the_same_names():
    block = next(n for n in ast.parse(Path(lc.__file__).read_text()).body if isinstance(n, ast.If))
    listed = {alias.name for statement in block.body for alias in statement.names}
    assert sorted([*listed, "__version__"]) == lc.__all__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="'lipcert' has no attribute 'nothing'"):
        lc.nothing  # noqa: B018


def test_submodules_do_not_hide_public_names():
    """Importing a submodule sets it as an attribute of the package."""
    for module in pkgutil.walk_packages(lc.__path__, "lipcert."):
        importlib.import_module(module.name)
    for name, home in lc._HOME.items():
        assert getattr(lc, name) is getattr(importlib.import_module(home), name)
    assert len(lc.trace(nn.Linear(2, 2), (2,)).nodes) == 2


def test_importing_the_package_imports_nothing_slow():
    code = "import lipcert, sys; print(*({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda net, graph, x: lc.Product(net), "lc.trace"),
        (lambda net, graph, x: lc.Product(graph, norm=lc.Exact), "lc.Auto()"),
        (lambda net, graph, x: lc.certify(net, x, bound=3.0), "lc.Product"),
        (lambda net, graph, x: lc.certify(net, x.byte(), bound=lc.Product(graph)), "255"),
        (lambda net, graph, x: lc.trace("net", (3,)), "Module"),
        (
            lambda net, graph, x: lc.certify(net, x, bound=lc.Product(graph)).robust_at("1/2"),
            "positive finite number",
        ),
        (lambda net, graph, x: lc.L2Ball(True), "positive finite number"),
        (lambda net, graph, x: lc.L2Ball(0.1, clip=3), "(0.0, 1.0)"),
        (lambda net, graph, x: lc.L2Ball(0.1, clip=("a", 1)), "(0.0, 1.0)"),
        (lambda net, graph, x: lc.Product(graph, region=lc.L2Ball(0.1))(x, eps="a"), "radius"),
        (lambda net, graph, x: lc.Multipliers(graph, rate="a"), "positive rate"),
        (lambda net, graph, x: copy.deepcopy(lc.Product(graph)), "trace it again"),
        (lambda net, graph, x: pickle.dumps(lc.Product(graph)), "state_dict"),
    ],
)
def test_the_usual_slips_get_advice(call, advice):
    net = nn.Linear(3, 2)
    with jaxtyping_off(), pytest.raises(lc.LipcertError) as caught:
        call(net, lc.trace(net, (3,)), torch.rand(4, 3))
    assert advice in str(caught.value)


@pytest.mark.parametrize("bound", [lc.Product, lc.LipLT, lc.Ellipsoid, lc.Multipliers])
def test_images_have_no_single_logits(bound):
    graph = lc.trace(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), (1, 4, 4))
    with pytest.raises(lc.LipcertError, match=r"lc\.lipschitz"):
        bound(graph).per_output()
