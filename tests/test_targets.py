"""What is typed on the command line: devices."""

import pytest

from lipcert.errors import LipcertError
from lipcert.targets import check_device


def test_the_cpu_is_usable():
    check_device("cpu")


@pytest.mark.parametrize(
    ("device", "reason"), [("gpu", "no device of this name"), ("cpu:x", ""), ("cuda:99", "")]
)
def test_other_devices_are_refused_in_one_short_line(device, reason):
    with pytest.raises(LipcertError, match=f"--device {device}: not usable here") as caught:
        check_device(device)
    message = str(caught.value)
    assert reason in message
    assert message.endswith("Usual names: cpu, cuda, cuda:1, mps.")
    assert len(message) < 180
    assert "\n" not in message
