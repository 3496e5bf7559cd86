"""The layers of the package import downwards only: models, nn, ops, so3."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fairchem_equiformer"
LAYERS = ("so3", "ops", "nn", "models")  # lowest first
# These must be usable without fairchem, and torch_scatter is what only fairchem needs.
FOREIGN = {"fairchem", "torch_scatter", "torch_geometric"}

FILES = [
    pytest.param(layer, path, id=str(path.relative_to(PACKAGE)))
    for layer in LAYERS
    for path in sorted((PACKAGE / layer).rglob("*.py"))
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


def test_every_layer_has_files():
    assert {parameter.values[0] for parameter in FILES} == set(LAYERS)


@pytest.mark.parametrize(("layer", "path"), FILES)
def test_imports_point_down(layer, path):
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    forbidden = {
        name
        for name in imported_modules(path)
        if name.startswith(f"{PACKAGE.name}.") and name.split(".")[1] not in allowed
    }
    assert not forbidden


@pytest.mark.parametrize(
    ("layer", "path"), [parameter for parameter in FILES if parameter.values[0] != "models"]
)
def test_no_foreign_package_below_models(layer, path):  # noqa: ARG001
    roots = {name.split(".")[0] for name in imported_modules(path)}
    assert not roots & FOREIGN
