"""How threads wait for each other is set before torch is imported, and left to who set it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fairchem_equiformer import info, threads

COUNT = f"import os; print(os.environ.get('{threads.SPIN_COUNT}'))"


def count(program, **variables):
    """What the count of turns is after a program, in a process where nobody had set it."""
    unset = {threads.SPIN_COUNT, threads.WAIT_POLICY}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-W", "ignore", "-c", f"{program}; {COUNT}"]
    done = subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.split()[-1]


@pytest.mark.parametrize("program", ["import fairchem_equiformer", "import fairchem.core"])
def test_threads_go_to_sleep(program):
    assert count(program) == str(threads._TURNS)


def test_torch_that_is_there_already_has_read_its_settings():
    assert count("import torch, fairchem_equiformer") == "None"


def test_what_somebody_set_stays():
    assert count("import fairchem_equiformer", GOMP_SPINCOUNT="7") == "7"
    assert count("import fairchem_equiformer", OMP_WAIT_POLICY="active") == "None"


def test_the_report_says_so(monkeypatch):
    monkeypatch.delenv(threads.WAIT_POLICY, raising=False)
    monkeypatch.setenv(threads.SPIN_COUNT, "7")
    assert info.report()["waiting threads"] == "GOMP_SPINCOUNT=7"
    monkeypatch.delenv(threads.SPIN_COUNT)
    shown = info.report()["waiting threads"]
    assert shown == "neither GOMP_SPINCOUNT nor OMP_WAIT_POLICY is set"
