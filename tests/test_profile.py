"""The profile by stage: which functions it finds, and what it counts of them."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from inspect import getattr_static
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from benchmarks import flop, profile, regions, stages
from benchmarks.boundaries import find
from benchmarks.flop import counted_flop
from benchmarks.measure import TASKS
from fairchem_equiformer import EquiformerV2
from fairchem_equiformer.ops import linear, so2_packed
from fairchem_equiformer.ops.choice import VARIABLE
from fairchem_equiformer.ops.native import loader
from tests.specs import spec_in
from tests.test_benchmarks import TINY

SIZES = {"max_neighbors": 5, "max_radius": 4.0, "edges_per_chunk": 100, "num_layers": 1}


@pytest.fixture
def spec(tmp_path):
    config = tmp_path / "tiny.yml"
    config.write_text(yaml.safe_dump({"model": TINY | SIZES}))
    weights = str(tmp_path / "weights.pt")
    return spec_in(tmp_path, "ours", "training", config=str(config), weights=weights)


@pytest.fixture
def step(spec):
    work = TASKS["training"](spec)
    return lambda: work.finish(work.forward())


def test_every_function_is_where_the_tables_say():
    assert EquiformerV2  # imports all of them
    for boundary in (*stages.STAGE_OF, *flop.KERNELS, stages.SO2Layers.MADE, stages.WAITING):
        assert find(boundary) is not None, boundary
    assert (
        stages.OF_ALL_ATOMS.keys() | stages.BY_BYTES
        <= stages.STAGE_OF.keys() | stages.STAGES.keys()
    )


def functions():
    wrapped = (*stages.STAGE_OF, *flop.KERNELS, stages.SO2Layers.MADE, stages.WAITING)
    return {boundary: getattr_static(find(boundary), boundary.name) for boundary in wrapped}


def test_a_step_by_stage(step):
    before = functions()
    with counted_flop() as counter, stages.staged(lambda: counter.flop, sizes=True) as ledger:
        step()
    names = stages.STAGES.keys() - {stages.SO2, stages.TOGETHER} | {
        "SO(2) layer 1",
        "SO(2) layer 2",
    }
    assert set(stages.ordered(ledger)) == names
    assert sum(ledger.spent.values()) == counter.flop
    chunks = ledger.calls["SO(2) layer 1"] / 2 / 2  # forward and backward, block and force head
    assert chunks > 2
    assert ledger.calls["SO(2) layer 2"] == 6 * chunks  # forward once more in the backward pass
    assert ledger.calls["message"] == 6 * chunks
    assert {name for name in names if ledger.bytes[name]} == stages.BY_BYTES
    assert functions() == before


@pytest.mark.parametrize("by", ["kernels", "torch"])
def test_flops_are_counted_whoever_makes_the_products(by, spec, monkeypatch):
    """As many as the weights have numbers, for each edge."""
    if by == "torch":
        for module in (so2_packed, linear):
            monkeypatch.setattr(module, "product_kernels", lambda *_, **__: None)
    elif loader.library() is None:
        pytest.skip("there are no compiled kernels")
    else:
        monkeypatch.setenv(VARIABLE, "native")
    config = {"model": TINY | SIZES | {"regress_forces": False}}
    Path(spec.config).write_text(yaml.safe_dump(config))
    work = TASKS["inference"](spec)
    edges = len(work.model.read(work.data).source)
    with counted_flop() as counter, stages.staged(lambda: counter.flop) as ledger:
        work.forward()

    def numbers(pattern):
        parameters = work.model.named_parameters()
        return sum(p.numel() for name, p in parameters if re.fullmatch(pattern, name))

    for layer in (1, 2):
        name = rf"blocks\.0\.ga\.so2_conv_{layer}\."
        zero = numbers(rf"{name}fc_m0\.weight")
        orders = numbers(rf"{name}so2_m_conv\.\d\.fc\.weight")
        # A over B, of which the complex product makes three.
        expected = 2 * edges * (zero + 3 * orders // 2)
        assert ledger.spent[f"SO(2) layer {layer}"] == expected > 0
    last = numbers(
        r"(blocks\.0\.ga\.so2_conv_1|edge_degree_embedding)\.rad_func\.net\.[36]\.weight"
    )
    assert ledger.spent["radial function"] == 2 * edges * last


def run_here(spec, _, contender):
    """Profile in this process."""
    assert contender.module == "benchmarks.stages"
    return json.loads(json.dumps(stages.profile(spec)))


def test_the_command(spec, monkeypatch, capsys):
    monkeypatch.setattr(profile, "run_child", run_here)
    monkeypatch.setattr(stages, "gemm_rate", lambda *_: 1e9)
    monkeypatch.setattr(stages, "copy_rate", lambda: 1e9)
    threads = str(torch.get_num_threads())
    record = profile.main(["--model", spec.config, "--seconds", "0", "--threads", threads])

    shown = capsys.readouterr().out
    assert "inference, tiny, 45 atoms" in shown
    assert "parallel regions: not counted, for want of a C compiler" in shown
    assert all(stage["seconds"] > 0 for stage in record["stages"].values())
    row = next(line for line in shown.splitlines() if "SO(2) layer 1" in line)
    stage = record["stages"]["SO(2) layer 1"]
    assert f"{stage['flop'] / 1e6:.4g}" in row  # milliseconds at 1 GFLOP/s
    assert record["stages"]["message"]["bytes"] > 0


def test_floors_of_a_table():
    stage = {"calls": 3, "flop": 0.0, "bytes": 4e6, "regions": 7}
    record = {
        "gemm_flop_per_second": 1e11,
        "copy_bytes_per_second": 1e9,
        "stages": {
            "message": stage | {"seconds": 0.010},
            "SO(2) layer 1": stage | {"seconds": 0.030, "flop": 2e9},
        },
    }
    console = Console(width=160, record=True)
    console.print(profile.table(record, "inference"))
    rows = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in console.export_text().splitlines()]
    cells = {row[0]: row[1:] for row in rows if len(row) > 2}
    assert cells["message"] == ["3", "10", "25.0%", "", "4", "4", "40%", "15.0%", "7"]
    assert cells["SO(2) layer 1"] == ["3", "30", "75.0%", "2", "4", "20", "67%", "25.0%", "7"]
    assert cells["all"] == ["", "40", "100.0%", "2", "8", "24", "60%", "40.0%", "14"]


REGIONS = """
import torch
from benchmarks import regions
torch.set_num_threads(2)
x, y = torch.ones(300, 300), torch.ones(3)
before = regions.counted()
y + y
assert regions.counted() == before
x + x
x @ x
print(regions.counted(with_mkl=False) - before, regions.counted() > before + 1)
torch.set_num_threads(1)
x + x
print(regions.counted(with_mkl=False) - before)
"""


def test_parallel_regions_are_those_of_more_than_one_thread(tmp_path):
    counting = regions.counting(tmp_path)
    if not counting:
        pytest.skip("there is no C compiler")
    variables = os.environ | counting | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", REGIONS]
    root = Path(regions.__file__).parents[1]
    assert subprocess.check_output(command, env=variables, cwd=root, text=True) == "1 True\n1\n"


def test_without_a_compiler_nothing_is_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert regions.counting(tmp_path) == {}
    monkeypatch.setenv("CC", "false")
    assert regions.counting(tmp_path) == {}
    if "regions.so" not in os.environ.get("LD_PRELOAD", ""):
        assert regions.counted() is None


def test_all_that_starts_a_region_is_counted():
    """Of the ways that our kernels use, by the names that they are linked against."""
    if loader.library() is None:
        pytest.skip("there are no compiled kernels")
    used = set(re.findall(rb"GOMP_parallel\w*", Path(loader.library()._name).read_bytes()))
    assert used
    source = regions.SOURCE.read_text()
    assert used <= {name.encode() for name in re.findall(r"GOMP_parallel\w*", source)}
    assert isinstance(loader.library(), ctypes.CDLL)
