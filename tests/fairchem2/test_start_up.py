"""What startup/ puts into every Python process does nothing where fairchem-core 2 is installed."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

STARTUP = Path(__file__).parents[2] / "startup" / "fairchem_equiformer_startup.py"


def test_fairchem_keeps_its_function(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = len(sys.meta_path)
    runpy.run_path(str(STARTUP))
    assert len(sys.meta_path) == before + 1
    name = "fairchem.core.common.utils"
    original = sys.modules[name]._import_local_file
    monkeypatch.delitem(sys.modules, name)
    spec = sys.meta_path[0].find_spec(name)
    monkeypatch.undo()
    assert spec.loader.exec_module.__name__ == "exec_module"
    assert original.__module__ == name
