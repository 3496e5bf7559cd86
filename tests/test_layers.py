"""Imports point down only: applications, adapters, checkpoints, models, nn, graph, ops, so3."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fairchem_equiformer"

# What each folder or file at the top of the package may import of it, beside itself.
TOOLS = {"errors", "files"}
OPS = {"so3"} | TOOLS
GRAPH = {"ops"} | OPS
NN = {"graph"} | GRAPH
MODELS = {"nn"} | NN
CHECKPOINTS = {"models"} | MODELS
ADAPTER = {"checkpoints"} | CHECKPOINTS
FAIRCHEM_1 = {"fairchem1"} | ADAPTER
FAIRCHEM_2 = {"fairchem2"} | ADAPTER
APPLICATION = FAIRCHEM_1 | FAIRCHEM_2 | {"calculator", "torch_sim"}
MAY_IMPORT = {
    "errors": set(),
    "threads": set(),
    "files": {"errors"},
    "so3": set(),
    "ops": OPS,
    "graph": GRAPH,
    "nn": NN,
    "models": MODELS,
    "checkpoints": CHECKPOINTS,
    "calculator": ADAPTER,
    "torch_sim": ADAPTER,
    "fairchem1": ADAPTER,
    "fairchem2": ADAPTER,
    "__init__": APPLICATION
    | {"threads"},  # nothing until it is asked for, see test_lazy_imports.py
    "__main__": APPLICATION,
    "convert": APPLICATION,
    "info": {"ops", "threads"},
    "leaderboard": APPLICATION,
    "adsorbml": APPLICATION,
    # Names of fairchem1 in configs and checkpoints from before 0.2.
    "data": {"fairchem1"},
    "trainer": {"fairchem1"},
}
# Below the adapters, the same code serves every framework.
FRAMEWORKS = {"fairchem", "torch_geometric", "torch_scatter", "torch_sim"}
WITHOUT_FRAMEWORK = {
    *("errors", "files", "so3", "ops", "graph", "nn", "models", "checkpoints", "calculator"),
    *("__init__", "convert", "info", "threads"),
}

FILES = [
    pytest.param(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path, id=name)
    for path in sorted(PACKAGE.rglob("*.py"))
    for name in [str(path.relative_to(PACKAGE))]
]


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in it."""
    package = (PACKAGE.name, *path.parent.relative_to(PACKAGE).parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def places(path: Path) -> set[str]:
    """Folders and files at the top of the package that a file imports from."""
    below = {
        name.split(".")[1] for name in imported_modules(path) if name.startswith(PACKAGE.name + ".")
    }
    top = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    return below & top


def test_every_place_has_its_row():
    assert {parameter.values[0] for parameter in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize(("place", "path"), FILES)
def test_imports_point_down(place, path):
    assert places(path) <= MAY_IMPORT[place] | {place}


@pytest.mark.parametrize(
    ("place", "path"), [item for item in FILES if item.values[0] in WITHOUT_FRAMEWORK]
)
def test_no_framework_below_the_adapters(place, path):  # noqa: ARG001
    roots = {name.split(".")[0] for name in imported_modules(path)}
    assert not roots & FRAMEWORKS
