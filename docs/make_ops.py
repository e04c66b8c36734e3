"""Writes docs/ops.md: every op with a rule, what it becomes, and its constant; and the refusals.

python docs/make_ops.py
"""

import inspect
import math
from collections import defaultdict
from pathlib import Path

import torch

from lipcert.graph import Affine, Input, Lipschitz, Node, Slope
from lipcert.rules import registry

OUT = Path(__file__).parent / "ops.md"
HEAD = """# Ops with a rule

Generated from the rules by `docs/make_ops.py`. The constant is the L2 Lipschitz constant everywhere,
with default settings; "map" means that it is the spectral norm of the op as the linear map that it is
on the given shape, "counts" that it depends on how windows overlap. Settings that a rule does not
cover are refused with the reason when a network is traced.

| op | forms | becomes | constant |
|---|---|---|---|
"""


def main() -> None:
    groups = defaultdict(list)
    for key, rule in registry.rules().items():
        groups[_title(key)].append((key, rule))
    lines = [_row(title, members) for title, members in sorted(groups.items())]
    refusals = defaultdict(list)
    for key, because in registry.refusals().items():
        refusals[because].append(registry.describe(key))
    tail = "\n\n# Ops that are refused\n\n| ops | why |\n|---|---|\n"
    rows = [f"| {', '.join(sorted(set(names)))} | {why} |" for why, names in refusals.items()]
    OUT.write_text(HEAD + "\n".join(lines) + tail + "\n".join(rows) + "\n")


def _title(key) -> str:
    name = registry.describe(key).rsplit(".", 1)[-1]
    return name.rstrip("_").replace("_", "").lower()


def _row(title: str, members: list) -> str:
    forms = sorted({registry.describe(key) for key, _ in members})
    kinds = [_kind(rule, key) for key, rule in members]
    kind, constant = next((k for k in kinds if k[0]), ("", ""))
    return f"| {title} | {', '.join(forms)} | {kind} | {constant} |"


def _kind(rule, key) -> tuple[str, str]:
    """What the op becomes on a vector, where default arguments are enough to say so."""
    x = Node(Input(), (), (4,))
    try:
        if isinstance(key, type):
            parameters = [p for p in inspect.signature(key).parameters.values()]
            if any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters):
                return "", ""
            op = rule(key(), x)
        else:
            op = rule(x)
    except Exception:
        return "", ""
    op = op.op if isinstance(op, Node) else op
    match op:
        case Slope(secants=secants):
            everywhere = torch.full((1, 4), math.inf, dtype=torch.float64)
            low, high = secants(-everywhere, everywhere)
            steepest = torch.maximum(low.abs().max(), high.abs().max())
            return "Slope", f"{float(steepest):.10g}"
        case Lipschitz(constant=constant):
            return "Lipschitz", f"{float(constant()):.10g}"
        case Affine():
            return "Affine", "map"
    return "", ""


if __name__ == "__main__":
    main()
