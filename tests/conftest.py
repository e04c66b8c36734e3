"""Every test runs in float64, on one thread, from a fixed seed, with shapes checked at run time."""

from jaxtyping import install_import_hook

install_import_hook("lipcert", "checks.checked")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def reproducible():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
