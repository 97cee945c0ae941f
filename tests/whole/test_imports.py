"""Who imports whom in the package: lazy imports, and imports for types alone, are read too."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fastadam

ROOT = Path(fastadam.__file__).parent
CORE = ["runtime", "cpus", "params", "state", "update", "cpu", "cuda", "backends"]
FACADES = ["adam", "functional", "saveable", "schedules"]
# What each room, a folder or a file of the package, may import beside itself.
MAY_IMPORT = {
    "version": [],
    "runtime": [],
    "cpus": [],
    "params": [],
    "state": ["params"],
    "update": ["params", "state"],
    "cpu": ["runtime", "cpus", "params", "state", "update"],
    "cuda": ["runtime", "params", "state", "update", "cpu"],
    "backends": ["runtime", "params", "state", "update", "cpu", "cuda"],
    "schedules": ["params"],
    "saveable": CORE,
    "adam": [*CORE, "saveable"],
    "functional": CORE,
    "adapter": ["adam", "saveable"],
    # One door to each ecosystem; none knows another.
    "checkpoint": [*CORE, *FACADES, "adapter", "version"],
    "compiling": [*CORE, "adam", "adapter"],
    "objects": [*CORE, "adam", "adapter"],
    "torch": [*CORE, "adam", "functional"],
    "demo": ["", *FACADES, "checkpoint"],
    "machine": ["", *CORE, *FACADES],
    "bench": ["", *CORE, *FACADES, "machine", "torch"],
    "cli": ["", *CORE, *FACADES, "checkpoint", "demo", "machine", "bench"],
    "__main__": ["cli"],
    # The public names.
    "": [*CORE, *FACADES, "adapter", "checkpoint", "compiling", "objects", "torch", "version"],
}


def name_of(path):
    """The dotted name of a file below the package; that of a folder for its ``__init__``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(name, path):
    """The modules of the package that a file imports, anywhere in it."""
    folder = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                if first == "fastadam":
                    yield rest
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                above = [part for part in folder if part][: len(folder) - (node.level - 1)]
                base = above[: len([p for p in folder if p]) - (node.level - 1)] + base
            elif base[:1] == ["fastadam"]:
                base = base[1:]
            else:
                continue
            for alias in node.names:
                module = ".".join([*base, alias.name])
                yield module if module in FILES else ".".join(base)


EDGES = {name: set(imported(name, path)) - {name} for name, path in FILES.items()}


def room(name):
    return name.partition(".")[0]


def test_all_is_read():
    """The imports that the rules below are about are found."""
    assert {"backends", "update.scalars"} <= EDGES["adam"]
    assert {"cpu.backend", "cuda.backend"} <= EDGES["backends"]  # in a function
    assert {"checkpoint", "schedules"} <= EDGES[""]  # in a function
    assert all(target in FILES for targets in EDGES.values() for target in targets)
    assert len(FILES) > 60


def test_no_circle():
    try:
        tuple(TopologicalSorter(EDGES).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("name", FILES)
def test_only_what_is_below(name):
    allowed = {*MAY_IMPORT[room(name)], room(name)}
    above = {target for target in EDGES[name] if room(target) not in allowed}
    assert not above


@pytest.mark.parametrize("name", FILES)
def test_no_import_by_a_string_of_our_own(name):
    """`import_module` is for optional packages of others, by a name that is written there."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            if called in ("import_module", "__import__"):
                first = node.args[0]
                if isinstance(first, ast.JoinedStr):
                    first = first.values[0]
                if isinstance(first, ast.Constant):
                    assert not first.value.startswith((".", "fastadam")), f"line {node.lineno}"
                else:  # a plain variable, of which no part is ours
                    assert isinstance(first, ast.Name), f"line {node.lineno}"
