"""What continuous integration runs: one line for all parts, and no part may fail unseen."""

from __future__ import annotations

import os
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
test-slurm:
	@echo '==== 1 failed, 4 passed in 60.00s ===='; exit 1
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
        run.shown.append(done.stdout)
        return done.returncode, done.stdout.splitlines()[-1]

    run.shown = []
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


def test_without_slurm_its_tests_are_skipped(run, tmp_path):
    """And a line says why."""
    (tmp_path / "tools").mkdir()
    tool = tmp_path / "tools" / "slurm.sh"
    tool.write_text("#!/bin/sh\necho 'needs root' >&2\nexit 1\n")
    tool.chmod(0o755)
    last = "===== 3 passed, 2 skipped, 2 deselected, 1 warning in 1.25s ====="
    assert run("tests", "test-slurm") == (0, last)
    assert "make test-slurm skipped: needs root" in run.shown[-1]
    tool.write_text("#!/bin/sh\necho 'export SLURM_CONF=x'\n")
    assert run("test-slurm") == (1, "===== 1 failed, 4 passed in 60.00s =====")


SLURM = Path(__file__).parents[1] / "tools" / "slurm.sh"


def slurm_script(*arguments, path=os.environ["PATH"], user=None):
    done = subprocess.run(
        [SLURM, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": path},
        user=user,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(Path("/run/fairchem-equiformer-slurm").exists(), reason="it is up")
def test_slurm_says_what_it_needs(tmp_path):
    """Each in one line."""
    for name in ("bash", "cat", "id"):
        (tmp_path / name).symlink_to(shutil.which(name))
    nobody = 65534 if os.geteuid() == 0 else None
    for wanted, result in {
        "needs root": slurm_script("up", user=nobody),
        "there is no apt-get": slurm_script("up", path=str(tmp_path)),
        "usage: tools/slurm.sh up|down": slurm_script("sideways"),
    }.items():
        if wanted == "there is no apt-get" and nobody is None:
            continue
        status, shown, message = result
        assert (status, shown) == (1, "")
        assert message.startswith("tools/slurm.sh: ")
        assert wanted in message
        assert message.count("\n") == 1


def test_every_part_is_a_target():
    assert "set -- test test-fairchem2 test-wheel test-slurm lint" in SCRIPT.read_text()
    makefile = (SCRIPT.parents[1] / "Makefile").read_text()
    for target in ("test", "test-fairchem2", "test-wheel", "test-slurm", "lint"):
        assert f"\n{target}:" in makefile
