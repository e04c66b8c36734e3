"""What a command works on, from what was typed: runs, networks of one's own, devices, names."""

import importlib
import sys
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from lipcert import run as runs
from lipcert.bound_names import BoundName
from lipcert.errors import LipcertError
from lipcert.external_attacks import AttackName
from lipcert.graph import Graph
from lipcert.linear_map import Shape
from lipcert.run import Run
from lipcert.tracing import trace

Name = TypeVar("Name", bound=StrEnum)


def check_device(device: str) -> None:
    """Raises LipcertError unless tensors can be made on the device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        if "device string" in reason:  # followed by every device that torch was ever built for
            reason = "torch knows no device of this name"
        raise LipcertError(
            f"--device {device}: not usable here ({reason}). Usual names: cpu, cuda, cuda:1, mps."
        ) from None


def open_trained(folder: Path, device: str) -> tuple[Run, nn.Module, Graph]:
    """A finished run with its network on the device, and the network's graph."""
    check_device(device)
    run = runs.open_run(folder)
    net, config = runs.load_model(run)
    net = net.to(device)
    graph = trace(net, tuple(config["in_shape"]))
    graph.check(net)
    return run, net, graph


def bound_name(name: str) -> BoundName:
    """The bound of this name."""
    return _member(BoundName, name, "bound")


def attack_name(name: str) -> AttackName:
    """The attack of this name."""
    return _member(AttackName, name, "attack")


def _member(names: type[Name], name: str, what: str) -> Name:
    try:
        return names(name)
    except ValueError:
        known = ", ".join(names)
        raise LipcertError(f"There is no {what} {name!r}. {what.title()}s: {known}.") from None


def parse_shape(text: str) -> Shape:
    """A shape typed as "3,32,32"."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise LipcertError(f"--input-shape {text!r}: write C,H,W, e.g. 3,32,32.") from None
    return shape


def make_network(target: str) -> nn.Module:
    """The network that "package.module:function" names or makes."""
    module_name, _, function = target.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        make = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise LipcertError(
            f"{target}: {error}. Give a run directory, or package.module:function where the "
            "function returns a network; the current folder is on the path."
        ) from None
    if isinstance(make, nn.Module):
        return make
    try:
        net = make()
    except Exception as error:
        raise LipcertError(
            f"{target}() failed: {type(error).__name__}: {error}. It must be a network, or a "
            "function without arguments that returns one."
        ) from error
    if not isinstance(net, nn.Module):
        raise LipcertError(f"{target}() returned {type(net).__name__}, not a torch.nn.Module.")
    return net
