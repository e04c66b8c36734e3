"""The Python blocks of the README run, one after the other, as a reader would run them."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("page", "least"), [("README.md", 4), ("docs/extend.md", 1)])
def test_the_code_on_a_page_runs(page, least, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert len(blocks) >= least
    namespace: dict = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    printed = capsys.readouterr().out
    assert "upper" in printed


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
