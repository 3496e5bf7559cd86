"""What startup/ puts into every Python process does nothing where fairchem-core 2 is installed."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

STARTUP = Path(__file__).parents[2] / "startup" / "fairchem_equiformer_startup.py"


@pytest.mark.parametrize("name", ["fairchem.core.common.utils", "fairchem.core._cli"])
def test_fairchems_modules_are_run_as_they_are(name, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = len(sys.meta_path)
    runpy.run_path(str(STARTUP))
    finders = sys.meta_path[: len(sys.meta_path) - before]
    assert name in [finder.target for finder in finders]
    monkeypatch.delitem(sys.modules, name, raising=False)  # or it would not be looked for
    loader = find_spec(name).loader
    assert loader.exec_module == type(loader).exec_module.__get__(loader)
