"""Writes docs/ops.md: every op with a rule, what it becomes, and its constant; and the refusals.

python docs/make_ops.py
"""

import math
import operator
import re
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import lipcert.errors
import lipcert.tracing  # declares all rules
from lipcert.graph import Affine, Input, Lipschitz, Node, Slope
from lipcert.rules import registry

OUT = Path(__file__).parent / "ops.md"
HEAD = """# Ops with a rule

Generated from the rules by `docs/make_ops.py`. `.name` is a method of tensors. Constants are L2
Lipschitz constants over all inputs, with default settings where there are any. Settings that a rule
does not cover are refused, with the reason, when a network is traced. What the kinds of nodes mean
is in [design.md](design.md).
"""
AFFINE = """
`Affine`, its constant the spectral norm of the map that it is on the given shape:

"""
TABLE = """
| op | becomes | constant |
|---|---|---|
"""
REFUSED = """
## Refused

| op | why, and what to do |
|---|---|
"""
ROOT = "root of the most windows that share a cell"
PAIR = "root of L_f^2 + L_g^2; 1 for the maximum and minimum of one pair together"
NORM = "norm of the map on the given shape"
SUM = "Affine; Sum of two functions", "norm of the map; L_f + L_g"
PICK = "Affine; Concat of functions", "1; root of L_f^2 + L_g^2"
JOIN = "Affine; Concat of functions", "norm of the map; root of the sum of squares"
SAME = "nothing", "1"
# By the file of the rule: a heading, and whether its ops are affine where the next table is silent.
SECTIONS = {
    "piecewise": ("Piecewise linear functions", False),
    "smooth": ("Smooth functions", False),
    "vector": ("Functions of vectors", False),
    "one_lipschitz": ("Maxima and pairs", False),
    "pairs": ("Pairs and groups of channels", False),
    "thresholds": ("Learned thresholds", False),
    "orthogonal": ("Orthogonal layers and what goes with them", False),
    "aol": ("Almost-orthogonal layers", False),
    "potential": ("Convex-potential layers", False),
    "affine": ("Layers", True),
    "resampling": ("Averages and resampling", True),
    "structural": ("Shapes and branches", True),
    "arithmetic": ("Arithmetic", True),
}
# By the name of an op: what running its rule on a vector does not tell.
SAID = {
    "clamp": ("Slope", "1"),
    "clip": ("Slope", "1"),
    "clampmin": ("Slope", "1"),
    "clampmax": ("Slope", "1"),
    "prelu": ("Slope", "the largest slope in size, at least 1"),
    "leakyrelu": ("Slope", "the larger of 1 and the slope in size"),
    "rrelu": ("Slope", "the larger of 1 and the mean slope in size"),
    "elu": ("Slope", "the larger of 1 and alpha in size"),
    "logsoftmax": ("Lipschitz", "root of n, over n entries (never attained)"),
    "softmax": ("Lipschitz", "1/2 (attained by two entries only)"),
    "vectornorm": ("Lipschitz", "1; n^(1/p - 1/2) for the p-norm of n entries with p < 2"),
    "norm": ("Lipschitz", "1; n^(1/p - 1/2) for the p-norm of n entries with p < 2"),
    "std": ("Lipschitz", "1 / root of n - 1; of n if biased"),
    **dict.fromkeys(("householder", "householder2"), ("Lipschitz", "1")),
    "clippedrelu": ("Slope", "1"),
    "clippedmaxmin": ("Lipschitz, then Slope", "1"),
    **dict.fromkeys(
        ("bjorcklinear", "bjorckconv", "choleskylinear"), ("Affine", "norm of the map, at most 1")
    ),
    "socconv": ("Affine", "1; more if its iteration has not converged"),
    "lastlayernormalized": ("Affine", "norm of the map; of each logit 1"),
    "linearresidualconv": ("Affine", NORM),
    **dict.fromkeys(("batchcentering", "fitchannels"), ("Affine", "1")),
    **dict.fromkeys(("l2pool", "groupsort"), ("Lipschitz", "1")),
    **dict.fromkeys(("aollinear", "aolconv"), ("Affine", "norm of the map, at most 1")),
    **dict.fromkeys(("slllinear", "sllconv", "cpllinear", "cplconv"), ("Lipschitz", "1")),
    "maxpool": ("Lipschitz", ROOT),
    "adaptivemaxpool": ("Lipschitz", ROOT),
    **dict.fromkeys(("max", "min", "maximum", "minimum"), ("Lipschitz", PAIR)),
    **dict.fromkeys(("add", "sub"), SUM),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), JOIN),
    "where": PICK,
    **dict.fromkeys(("identity", "clone", "contiguous", "detach", "requiresgrad"), SAME),
    **dict.fromkeys(("dropout", "alphadropout"), SAME),
}
SYMBOLS = {
    **{operator.add: "x + y", operator.iadd: "x += y", operator.sub: "x - y"},
    **{operator.isub: "x -= y", operator.mul: "x * w", operator.imul: "x *= w"},
    **{operator.truediv: "x / w", operator.itruediv: "x /= w", operator.neg: "-x"},
    **{operator.matmul: "x @ w", operator.pow: "x ** y", operator.getitem: "x[...]"},
    **{operator.setitem: "x[...] = y", getattr: ".T"},
}
TITLES = {"iadd": "add", "isub": "sub", "imul": "mul", "truediv": "div", "itruediv": "div"}


def page() -> str:
    """The text of docs/ops.md."""
    sections: dict = {file: defaultdict(list) for file in SECTIONS}
    for key, rule in registry.rules().items():
        function = rule.func if isinstance(rule, partial) else rule
        if function.__module__.startswith("lipcert.rules."):  # no rules of a user's own
            sections[function.__module__.rsplit(".", 1)[-1]][_title(key)].append((key, rule))
    text = HEAD
    for file, (heading, affine) in SECTIONS.items():
        text += f"\n## {heading}\n"
        ops = sections[file]
        told = {t: SAID.get(t) or _measured(t, ops[t]) for t in ops if not affine or t in SAID}
        if told:
            text += TABLE
        for title, (kind, constant) in told.items():
            text += f"| {_names(ops[title])} | {kind} | {constant} |\n"
        if affine:
            text += AFFINE
            text += "".join(f"- {_names(ops[title])}\n" for title in ops if title not in told)
    why = defaultdict(list)
    for key, because in registry.refusals().items():
        why[because].append(_public(key))
    rows = [
        f"| {_forms(names)} | {why_not.replace('|', '&#124;')} |" for why_not, names in why.items()
    ]
    return text + REFUSED + "\n".join(rows) + "\n"


def _names(members: list) -> str:
    return _forms([_public(key) for key, _ in members])


def _title(key: registry.Key) -> str:
    """One name for the module, function and method forms of an op, in all dimensions."""
    if key in SYMBOLS:
        return TITLES.get(key.__name__, key.__name__)
    name = _public(key).rsplit(".", 1)[-1].rstrip("_")
    return re.sub(r"[123]d$", "", name).replace("_", "").lower()


def _public(key: registry.Key) -> str:
    """The name by which users call an op."""
    if isinstance(key, str):
        return f".{key}"
    if isinstance(key, type):
        home = "nn" if getattr(nn, key.__name__, None) is key else "lipcert.layers"
        return f"{home}.{key.__name__}"
    if key in SYMBOLS:
        return SYMBOLS[key]
    homes = {"F": F, "torch": torch, "torch.linalg": torch.linalg}
    for home, module in homes.items():
        names = [n for n, value in vars(module).items() if value is key and n[0] != "_"]
        if names:
            return f"{home}.{min(names, key=len)}"
    return registry.describe(key)


def _forms(names: list[str]) -> str:
    """Names in the order of their first; those of several dimensions as one."""
    stems: dict[str, list[str]] = defaultdict(list)
    for name in names:
        stems[re.sub(r"[123]d$", "", name)].append(name)
    shown = []
    for stem, group in stems.items():
        ends = sorted(name.removeprefix(stem) for name in group)
        shown.append(" ".join([f"`{stem}{ends[0]}`", *ends[1:]]))
    return ", ".join(shown)


def _measured(title: str, members: list) -> tuple[str, str]:
    """What the rule makes of a vector of four, with its defaults or along its only axis."""
    x = Node(Input(), (), (4,))
    for key, rule in members:
        for arguments in ((), (1,)):
            try:
                op = rule(key(), x) if isinstance(key, type) else rule(x, *arguments)
            except (TypeError, lipcert.errors.LipcertError):
                continue
            op = op[0] if isinstance(op, tuple) else op
            match op.op if isinstance(op, Node) else op:
                case Slope(secants=secants):
                    end = torch.full((1, 4), math.inf, dtype=torch.float64)
                    steepest = max(float(slope.abs().max()) for slope in secants(-end, end))
                    return "Slope", f"{steepest:.7g}"
                case Lipschitz(constant=constant):
                    return "Lipschitz", f"{float(constant()):.7g}"
                case Affine():
                    return "Affine", NORM
    raise RuntimeError(f"say in SAID what {title} becomes")


if __name__ == "__main__":
    OUT.write_text(page())
