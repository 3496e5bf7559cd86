"""The report for bug reports says what is true of this process, and works without the rest."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
import torch

import fairchem_equiformer
from fairchem_equiformer import info
from fairchem_equiformer.ops.native import loader

CHANGES, KERNELS = "changes to fairchem", "kernels on the CPU"


def test_prints_a_line_for_each_fact(capsys):
    assert info.main([]) == 0
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    found = {name: value.strip() for name, value in printed.items()}
    assert found == {name.rstrip(): value for name, value in info.report().items()}
    assert found["fairchem-equiformer"] == fairchem_equiformer.__version__
    assert found["torch"] == torch.__version__
    assert found["e3nn"] == metadata.version("e3nn")
    assert found["threads"].startswith(f"{torch.get_num_threads()} of ")
    assert found["devices"].startswith("CPU (")


def test_names_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(info, "DISTRIBUTIONS", ("torch", "no-such-distribution"))
    assert info.report()["no-such-distribution"] == "not installed"


def test_the_rest_is_shown_where_torch_is_broken(monkeypatch):
    def broken():
        raise OSError("libtorch_cpu.so: cannot open shared object file")

    monkeypatch.setattr(info, "_of_torch", broken)
    lines = info.report()
    assert lines["torch"].endswith(
        "cannot be imported: libtorch_cpu.so: cannot open shared object file"
    )
    assert CHANGES in lines


def test_compiled_kernels():
    assert info.report()[KERNELS] == f"compiled ({loader._file()})"


def test_kernels_that_were_switched_off(monkeypatch):
    monkeypatch.setenv(loader.VARIABLE, "reference")
    assert info.report()[KERNELS] == "PyTorch's, as FAIRCHEM_EQUIFORMER_KERNELS=reference asks"


def test_kernels_that_are_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "__file__", str(tmp_path / "loader.py"))
    reason = info.report()[KERNELS]
    assert reason.startswith("PyTorch's, slower with the same numbers: ")
    assert str(tmp_path / "_kernels.so") in reason


@pytest.mark.parametrize(
    ("wanted", "startup", "expected"),
    [
        (True, True, "made (fairchem_equiformer/fairchem1/patches.py)"),
        (True, False, "in processes that import this package: its start-up hook is not installed"),
        (False, True, "switched off by FAIRCHEM_EQUIFORMER_PATCHES"),
    ],
)
def test_changes_to_fairchem(monkeypatch, wanted, startup, expected):
    monkeypatch.setattr(info, "patches_wanted", lambda: wanted)
    monkeypatch.setattr(info, "STARTUP", "sys" if startup else "no.such.module")
    assert info.report()[CHANGES] == expected


def test_a_mistyped_switch_is_shown(monkeypatch):
    monkeypatch.setenv("FAIRCHEM_EQUIFORMER_PATCHES", "of")
    shown = info.report()[CHANGES]
    assert shown.startswith("none can be made: FAIRCHEM_EQUIFORMER_PATCHES is 'of'")


def test_a_mistyped_choice_of_kernels_is_shown(monkeypatch):
    monkeypatch.setenv(loader.VARIABLE, "fast")
    assert info.report()[KERNELS] == (
        "none: FAIRCHEM_EQUIFORMER_KERNELS is 'fast', it must be auto, reference, native, triton"
    )


def test_no_changes_without_fairchem(monkeypatch):
    monkeypatch.setattr(info, "fairchem1_installed", lambda: False)
    assert info.report()[CHANGES] == "none, there is no fairchem-core 1.10"


def test_runs_as_a_module_without_site_packages():
    """Nothing but Python: no torch, and no other dependency."""
    root = str(info.__file__).removesuffix("fairchem_equiformer/info.py")
    program = f"import sys; sys.path.insert(0, {root!r}); from fairchem_equiformer import info; "
    command = [sys.executable, "-I", "-S", "-c", program + "sys.exit(info.main([]))"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "torch                not installed, which cannot be imported: No mod" in done.stdout
