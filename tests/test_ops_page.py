"""docs/ops.md is the page that the rules give today."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lipcert.rules import registry

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def make_ops():
    spec = importlib.util.spec_from_file_location("make_ops", DOCS / "make_ops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(make_ops):
    torch.set_default_dtype(torch.float32)
    assert make_ops.page() == (DOCS / "ops.md").read_text(), "run: python docs/make_ops.py"


def test_every_rule_and_refusal_is_on_the_page(make_ops):
    text = (DOCS / "ops.md").read_text()
    for key, rule in registry.rules().items():
        if getattr(rule, "func", rule).__module__.startswith("lipcert.rules."):
            name = make_ops._public(key)
            stem = name[:-2] if name[-2:] in ("1d", "2d", "3d") else name
            assert f"`{stem}" in text, name
    assert all(because.replace("|", "&#124;") in text for because in registry.refusals().values())


def test_rules_of_ones_own_are_left_out(make_ops, monkeypatch):
    before = make_ops.page()
    monkeypatch.setitem(registry._RULES, torch.special.expit, lambda x: x)
    assert make_ops.page() == before


@pytest.mark.parametrize("table", [registry.rules, registry.refusals])
def test_the_tables_cannot_be_written_to(table):
    assert table()
    with pytest.raises(TypeError):
        table()["relu"] = None
