"""A step beside other work, as the benchmark measures it."""

from __future__ import annotations

import os
import sys

import pytest

from benchmarks import shared_cores
from benchmarks.shared_cores import CONDITIONS, seconds_of_a_step, variables_of
from fairchem_equiformer import threads

HERE = dict(os.environ)


def program(lines):
    return [sys.executable, "-c", lines]


STEPS = program("for s in (9, 9, 3, 1, 2): print(s, flush=True)\nwhile True: pass")


def test_the_first_steps_do_not_count():
    assert seconds_of_a_step(STEPS, HERE, None, 0.0) == 2


def test_the_other_process_has_begun_and_ends(tmp_path):
    """It writes a file when it begins, which the step reads; nobody is left behind."""
    file = tmp_path / "pid"
    other = program(
        f"import os; open({str(file)!r}, 'w').write(str(os.getpid()))\n"
        "print(0, flush=True)\nwhile True: pass"
    )
    step = program(f"open({str(file)!r})\nfor s in range(6): print(s, flush=True)")
    assert seconds_of_a_step(step, HERE, other, 0.0) == 3
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"ended with 1:(.|\n)*no such model"):
        seconds_of_a_step(program("raise SystemExit('no such model')"), HERE, None, 0.0)


def test_threads_wait_as_the_command_has_them_wait(monkeypatch):
    monkeypatch.delenv(threads.SPIN_COUNT, raising=False)
    monkeypatch.delenv(threads.WAIT_POLICY, raising=False)
    assert variables_of("ours", 3)[threads.SPIN_COUNT] == str(threads._TURNS)
    assert threads.SPIN_COUNT not in variables_of("stock", 3)
    assert variables_of("stock", 3)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv(threads.SPIN_COUNT, "7")
    assert variables_of("ours", 3)[threads.SPIN_COUNT] == "7"


def test_the_command_prints_ratios(monkeypatch, capsys):
    seconds = iter([0.1, 0.15, 0.2, 0.4, 1.2, 1.0])
    monkeypatch.setattr(shared_cores, "seconds_of_a_step", lambda *_: next(seconds))
    found = shared_cores.main([])
    assert found["ours"] == dict(zip(CONDITIONS, (0.1, 0.15, 0.2), strict=True))
    shown = capsys.readouterr().out
    assert "training step, eqv2_emt, 4 x 45 atoms, 2 threads" in shown
    assert "0.15 (1.50)" in shown
    assert "1 (2.50)" in shown
