"""What is measured on the day there is a GPU: that nothing is lost and nothing measured twice."""

from __future__ import annotations

import json
from subprocess import CompletedProcess

import pytest
import torch

from benchmarks import gpu
from fairchem_equiformer.models import EquiformerV2


@pytest.fixture
def measured(monkeypatch):
    """Measurements in their order; in place of those, results that tell them apart."""
    found = []

    def measure(_session, row, name, mode, _model, _data):
        found.append((row.task, name, mode))
        energy = torch.tensor([2.0 if name == "stock" else 2.2])
        return {"seconds": 0.5, "peak_bytes": 1e6, "calls": 1, "results": {"energy": energy}}

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu, "stock", lambda keys: EquiformerV2(**keys))
    monkeypatch.setattr(gpu, "rates", lambda _: {"bytes_per_second": 1.0})
    return found


def session(folder, minutes=1.0):
    return gpu.Session(folder, dry=True, minutes=minutes)


ALL = 4 * 3 + 3 * 3  # of the dry run


def test_what_was_measured_is_not_measured_again(measured, tmp_path):
    gpu.work(session(tmp_path))
    assert len(measured) == len(set(measured)) == ALL
    assert not gpu.missing(session(tmp_path))
    gpu.work(session(tmp_path))
    assert len(measured) == ALL
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + ALL
    ours = "| training, tiny, 1 x 10 atoms | tf32 | ours | 500.00 | 1.00 | 1 | 1 | 1.00 | 1 | "
    assert ours + "1.0e-01 |" in lines


def test_a_failure_leaves_the_rest_and_is_tried_again(measured, tmp_path, monkeypatch):
    works = gpu.measure

    def measure(session, row, name, *rest):
        if name == "ours":
            raise RuntimeError("out of memory\nand more")
        return works(session, row, name, *rest)

    monkeypatch.setattr(gpu, "measure", measure)
    gpu.work(session(tmp_path))
    assert len(measured) == ALL - 6
    assert "| RuntimeError: out of memory |" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(gpu, "measure", works)
    again = session(tmp_path)
    assert len(gpu.missing(again)) == 6
    again.forget_failures()
    gpu.work(session(tmp_path))
    assert len(measured) == ALL
    assert not gpu.missing(session(tmp_path))


def test_a_process_that_ends_is_followed_by_another(measured, tmp_path, monkeypatch):
    works, processes = gpu.measure, []

    def measure(session, row, name, mode, *rest):
        if (name, mode) == ("ours in PyTorch", "tf32"):
            raise KeyboardInterrupt  # which is not caught
        return works(session, row, name, mode, *rest)

    def run(command, **_):
        processes.append(command)
        try:
            gpu.work(session(tmp_path))
        except KeyboardInterrupt:
            return CompletedProcess(command, 1)
        return CompletedProcess(command, 0)

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu.subprocess, "run", run)
    gpu.supervise(tmp_path, gpu.time.monotonic() + 60, dry=True)
    assert len(processes) == 3  # two rows have such a measurement
    assert len(measured) == ALL - 2
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sum(record.get("failure") == gpu.ENDED for record in records) == 2


def test_what_cannot_be_measured_at_all_is_given_up(tmp_path, monkeypatch):
    ended = CompletedProcess([], gpu.DEVICE_LOST)
    processes = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **_: processes.append(a) or ended)
    gpu.supervise(tmp_path, gpu.time.monotonic() + 60, dry=True)
    assert len(processes) == 2


def test_without_time_nothing_begins(measured, tmp_path):
    gpu.work(session(tmp_path, minutes=-1.0))
    assert not measured
    assert len(gpu.missing(session(tmp_path))) == ALL
    assert (tmp_path / "table.md").read_text().count("no time left") == ALL


@pytest.mark.usefixtures("measured")
def test_another_device_begins_anew(tmp_path, monkeypatch):
    gpu.work(session(tmp_path))
    monkeypatch.setattr(torch, "__version__", "9.0")
    assert len(gpu.missing(session(tmp_path))) == ALL


def test_every_target_is_measured():
    """Of the issue on GPUs: as fast in three modes, and the memory of a training step."""
    targets = {(row.task, row.model, row.copies): row.seconds for row in gpu.ROWS}
    assert targets == {
        ("inference", "31M", 8): (2.5, 5, 6),
        ("inference", "153M", 8): (2.5, 4, 6),
        ("training", "153M", 4): (2, 3, 4),
        ("inference", "31M", 1): (4, 5, 5),
    }
    assert [row.peak_bytes for row in gpu.ROWS if row.peak_bytes] == [(10, 10, 15)]
    assert {row.atoms for row in gpu.ROWS} == {80}
