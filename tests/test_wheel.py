"""The wheel of `make wheel`, in an environment that has nothing else, under a torch of today."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import fairchem_equiformer
from tests.tolerances import assert_close

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "predict_in_wheel.py"
TORCH = "torch==2.13.*"  # the tests themselves run under 2.4


def run(*command: object, **options: object) -> str:
    """What a command printed; without variables that would show it the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment with the wheel."""
    (wheel,) = (ROOT / "dist").glob("*.whl")  # `make wheel` makes it
    assert f"-{fairchem_equiformer.__version__}-py3-none-" in wheel.name
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "--disable-pip-version-check", "install", "-qq", wheel, TORCH)
    return python


def test_predicts_with_its_kernels_what_the_repository_predicts(python, tmp_path):
    command = ("-I", PROGRAM, tmp_path / "weights.pt")
    ours, theirs = (json.loads(run(p, *command, cwd=tmp_path)) for p in (sys.executable, python))
    assert ours["torch"] != theirs["torch"]
    assert theirs["kernels"].startswith(f"compiled ({python.parents[1]}")
    assert theirs["told"] == []
    for key in ("energy", "forces"):
        assert_close(torch.tensor(theirs[key]), torch.tensor(ours[key]), "outputs", name=key)


def test_reports(python, tmp_path):
    shown = run(python, "-I", "-m", "fairchem_equiformer.info", cwd=tmp_path)
    assert f"kernels on the CPU   compiled ({python.parents[1]}" in shown
    assert "fairchem-core        not installed" in shown
