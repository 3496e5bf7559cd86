"""What importing the package costs, and that old and new names mean the same."""

from __future__ import annotations

import subprocess
import sys

import pytest
from fairchem.core.common.registry import registry

import fairchem_equiformer
from fairchem_equiformer import models
from fairchem_equiformer.fairchem1.names import _UNTIL_0_1


def run(program: str) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_no_framework():
    loaded = run("import sys, fairchem_equiformer; print(*sys.modules)").split()
    assert not {"torch", "fairchem.core", "ase", "torch_geometric"} & set(loaded)


def test_models_and_checkpoints_need_no_framework():
    loaded = run("import sys, fairchem_equiformer.checkpoints; print(*sys.modules)").split()
    roots = {name.split(".")[0] for name in loaded}
    assert "torch" in roots
    assert not {"torch_geometric", "torch_scatter", "ase"} & roots
    assert "fairchem.core" not in loaded


@pytest.mark.parametrize("name", fairchem_equiformer.__all__)
def test_public_names(name):
    assert getattr(fairchem_equiformer, name).__name__ == name
    assert name in dir(fairchem_equiformer)


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'EquiformerV4'"):
        _ = fairchem_equiformer.EquiformerV4


def test_without_fairchem_the_models_are_the_plain_ones(monkeypatch):
    monkeypatch.setattr(fairchem_equiformer, "fairchem1_installed", lambda: False)
    assert fairchem_equiformer.EquiformerV2 is models.EquiformerV2


@pytest.mark.parametrize(("old", "new"), _UNTIL_0_1.items())
def test_names_from_before_the_move(old, new):
    assert registry.get_dataset_class(old) is registry.get_dataset_class(new)
