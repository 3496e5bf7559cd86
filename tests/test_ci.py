"""What continuous integration runs: one line for all parts, and no part may fail unseen."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "run"
MAKEFILE = """
tests:
	@echo '==== 3 passed, 1 skipped, 2 deselected, 1 warning in 1.25s ===='
others:
	@echo '==== 20 passed, 1 warning in 390.50s (0:06:30) ===='
failing:
	@echo '==== 2 failed, 5 passed, 1 error in 2.00s ===='; exit 1
lint:
	@echo 'all is well'
broken:
	@echo 'cannot install'; exit 2
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(SCRIPT, tmp_path / ".ci")
    (tmp_path / "Makefile").write_text(MAKEFILE)

    def run(*parts):
        command = [tmp_path / ".ci" / "run", *parts]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()[-1]

    return run


def test_sums_the_summaries(run):
    last = "===== 23 passed, 1 skipped, 2 deselected, 2 warnings in 391.75s ====="
    assert run("tests", "others", "lint") == (0, last)


def test_a_failing_part_fails_the_whole(run):
    last = "===== 2 failed, 8 passed, 1 skipped, 2 deselected, 1 warning, 1 error in 3.25s ====="
    assert run("failing", "tests", "lint") == (1, last)


@pytest.mark.parametrize("parts", [("broken", "tests"), ("tests", "broken")])
def test_a_part_without_summary_counts_as_an_error(run, parts):
    last = "===== 3 passed, 1 skipped, 2 deselected, 1 warning, 1 error in 1.25s ====="
    assert run(*parts) == (1, last)


def test_every_part_is_a_target():
    assert "set -- test test-fairchem2 test-wheel lint" in SCRIPT.read_text()
    makefile = (SCRIPT.parents[1] / "Makefile").read_text()
    for target in ("test", "test-fairchem2", "test-wheel", "lint"):
        assert f"\n{target}:" in makefile
