"""The house has floors: a file imports from its own floor or from below, and in no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "lipcert"
FLOORS = [
    {"errors", "kinds", "files", "convolution", "simplify", "spectral"}
    | {"linear_map", "linear_kinds", "row_norms", "folding"},
    {"layers", "graph", "fuse", "rules", "recording", "tracing"},
    {"region", "bounds", "constants"},
    {"losses", "adversary", "normalized", "radii", "certificate", "certifying", "accuracy"},
]  # everything else: running, on top


def floor(module):
    return next((i for i, names in enumerate(FLOORS) if module.split(".")[1] in names), len(FLOORS))


def imports():
    """The modules of the package with the modules of it that each one imports, anywhere."""
    files = {
        ".".join(("lipcert", *path.relative_to(SOURCE).with_suffix("").parts)): path
        for path in SOURCE.rglob("*.py")
        if path != SOURCE / "__init__.py"  # imports names when they are first used
    }
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found = {}
    for name, path in files.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
        assert not any(n.level for n in froms), f"{name}: import by full name"
        used = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        used |= {f"{n.module}.{a.name}" for n in froms for a in n.names}
        used |= {u.rpartition(".")[0] for u in used - files.keys()}  # a name inside a module
        found[name] = used & files.keys()
    return found


def test_imports_go_down_and_in_no_circle():
    found = imports()
    assert len(found) > 30
    assert {n.split(".")[1] for n in found} >= set().union(*FLOORS)
    up = [f"{a} -> {b}" for a, used in found.items() for b in used if floor(b) > floor(a)]
    assert not up
    list(TopologicalSorter(found).static_order())  # raises CycleError
