"""Nothing gets more expensive unseen: counts of a small model, none of which depends on time."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import counts
from benchmarks.counts import NAMES, TABLE, growth
from fairchem_equiformer.ops.native import loader


@pytest.fixture(scope="module")
def counted():
    if loader.library() is None:
        pytest.skip("the table is that of the compiled kernels, which are not there")
    if not torch.__version__.startswith("2.4."):
        pytest.skip(f"the table is that of torch 2.4, this is {torch.__version__}")
    return counts.count()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", ["inference", "training"])
def test_no_count_grows(task, name, counted):
    if name not in counted[task]:
        pytest.skip("parallel regions are not counted: there is no C compiler")
    grown = growth(task, name, counted, json.loads(TABLE.read_text()))
    assert grown is None, grown


def test_what_grew_is_named():
    old = {"training": {"regions": 1000, "peak_bytes": 1000}}
    new = {"training": {"regions": 1010, "peak_bytes": 1010}}
    said = growth("training", "regions", new, old)
    assert "training of a small model: regions grew from 1,000 to 1,010 (+1.0%)" in said
    assert "python -m benchmarks.counts" in said
    assert growth("training", "peak_bytes", new, old) is None  # within its margin
    assert growth("training", "regions", old, new) is None
    assert "from 0 to 5." in growth(
        "a", "saved_bytes", {"a": {"saved_bytes": 5}}, {"a": {"saved_bytes": 0}}
    )


def test_the_command_writes_the_table_and_says_what_changed(tmp_path, monkeypatch, capsys):
    table = tmp_path / "counts.json"
    monkeypatch.setattr(counts, "TABLE", table)
    found = {"inference": dict.fromkeys(NAMES, 100)}
    monkeypatch.setattr(counts, "count", lambda: found)
    counts.main()
    assert json.loads(table.read_text()) == found
    monkeypatch.setattr(counts, "count", lambda: {"inference": found["inference"] | {"flop": 90}})
    capsys.readouterr()
    counts.main()
    assert "flop                     100 ->              90 (-10.0%)" in capsys.readouterr().out
    del found["inference"]["regions"]
    monkeypatch.setattr(counts, "count", lambda: found)
    with pytest.raises(SystemExit, match="no C compiler to count the regions"):
        counts.main()
    assert json.loads(table.read_text())["inference"]["regions"] == 100


def test_a_child_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(counts, "ROOT", counts.ROOT / "tests")  # no benchmarks there
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(RuntimeError, match="No module named"):
        counts.count()
