"""The benchmark at its smallest: equal results and less memory; times are nobody's test."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import compare, context, host, instruments, measure
from benchmarks.context import CONTEXT, PYTHON2, refusal
from benchmarks.flop import CountFlop
from benchmarks.instruments import saved_for_backward
from benchmarks.measure import batch_of
from benchmarks.plot import COLORS, draw_scaling
from benchmarks.slab import slab
from benchmarks.spec import CLASSES, Spec
from benchmarks.table import cells, read_ledger, table
from tests.specs import spec_in
from tests.tolerances import TOLERANCES

if TYPE_CHECKING:
    from benchmarks.table import Record

TINY = {
    "name": "fairchem_equiformer.EquiformerV2",
    "otf_graph": True,
    "use_pbc": True,
    "max_neighbors": 20,
    "max_radius": 12.0,
    "max_num_elements": 90,
    "num_layers": 2,
    "sphere_channels": 32,
    "attn_hidden_channels": 16,
    "num_heads": 2,
    "attn_alpha_channels": 8,
    "attn_value_channels": 8,
    "ffn_hidden_channels": 32,
    "lmax_list": [4],
    "mmax_list": [2],
    "grid_resolution": 14,
    "edge_channels": 16,
    "use_grid_mlp": True,
}


HERE = [name for name in CONTEXT if CONTEXT[name].fairchem == 1]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    config = tmp_path / "tiny.yml"
    config.write_text(yaml.safe_dump({"model": TINY}))
    return config


def test_ours_equals_stock_in_less_memory(tiny: Path, tmp_path: Path) -> None:
    command = ["--tasks", "training", "--models", str(tiny), "--sizes", "2x45"]
    quick = ["--rounds", "1", "--seconds", "0", "--threads", "1", "--out", str(tmp_path)]
    stock, ours = compare.main([*command, *quick])

    assert (stock["implementation"], ours["implementation"]) == ("stock", "ours")
    assert (ours["copies"], ours["atoms"]) == (2, 45)
    assert set(ours["difference"]) == {"energy", "forces", "gradient"}
    assert ours["difference"]["energy"] < TOLERANCES["outputs"][torch.float32]
    assert ours["difference"]["forces"] < TOLERANCES["outputs"][torch.float32]
    assert ours["difference"]["gradient"] < TOLERANCES["gradients"][torch.float32]
    assert stock["peak_bytes"] > 2 * ours["peak_bytes"]
    assert stock["saved_bytes"] > 2 * ours["saved_bytes"]
    assert 0 < ours["flop"] < stock["flop"]

    assert ours["torch"] == torch.__version__.partition("+")[0]
    assert read_ledger(tmp_path / "results.jsonl") == [stock, ours]


def test_what_does_not_fit_is_a_row_of_the_table(tiny: Path, tmp_path: Path) -> None:
    command = ["--tasks", "neighbors", "--models", str(tiny), "--sizes", "1609"]
    limited = ["--memory", "3", "--implementations", "stock", "--out", str(tmp_path)]
    [record] = compare.main([*command, *limited])
    assert record["failure"] == "out of memory"
    assert "seconds" not in record


def test_a_child_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = CompletedProcess([], returncode=1, stdout="", stderr="KeyError: 'lmax_list'")
    monkeypatch.setattr(compare.regions, "counting", lambda _: {})  # compiles
    monkeypatch.setattr(compare.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"benchmarks.measure .* ended with 1:\nKeyError: 'lmax"):
        compare.main(["--sizes", "45", "--out", str(tmp_path)])


def test_a_child_that_takes_too_long_is_a_row_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command, timeout, **_):
        raise TimeoutExpired(command, timeout)

    monkeypatch.setattr(compare.regions, "counting", lambda _: {})  # compiles
    monkeypatch.setattr(compare.subprocess, "run", run)
    records = compare.main(["--sizes", "45", "--timeout", "60", "--out", str(tmp_path)])
    assert [record["failure"] for record in records] == ["over 60 s", "over 60 s"]


@pytest.mark.parametrize("atoms", [45, 153, 409, 1609])
def test_slabs_have_the_size_asked_for(atoms: int) -> None:
    assert len(slab(atoms)) == atoms


def test_batches_are_what_trainers_pass() -> None:
    data = batch_of(45, copies=3)
    assert data.natoms.tolist() == [45, 45, 45]
    assert data.cell.shape == (3, 3, 3)
    assert torch.equal(data.pos[:45], data.pos[45:90])
    assert data.fixed[:45].sum() == 18


def test_saved_bytes_count_each_storage_once_and_no_parameter() -> None:
    model = torch.nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8)
    with saved_for_backward(model) as kept:
        y = model(x)
        (y * y + y.view(2, 16).repeat(2, 1).view(8, 8)[:4]).sum()
    assert sum(kept.values()) == x.nbytes + y.nbytes


def test_edges_are_compared_whatever_their_order() -> None:
    edges = {
        "source": torch.tensor([0, 1, 2]),
        "target": torch.tensor([1, 0, 0]),
        "vector": torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0], [2.0, 0.0, 0.0]]),
    }
    order = torch.tensor([2, 0, 1])
    shuffled = {name: value[order] for name, value in edges.items()}
    assert compare.difference(shuffled, edges) == {"edges": 0.0}
    shuffled["vector"] = shuffled["vector"] + torch.tensor([0.1, 0.0, 0.0])
    assert compare.difference(shuffled, edges) == {"edges": 2.0}


def test_flops_are_those_that_torch_counts() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    x = torch.randn(3, 5, 8)
    with CountFlop() as counted, FlopCounterMode(display=False) as expected:
        (model(x) @ torch.randn(3, 4, 2)).sum().backward()
    assert counted.flop == expected.get_total_flops()


def test_flops_of_products_added_in_place() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8, 4)
    with CountFlop() as counted:
        torch.zeros(3, 4).addmm_(x, weight)
    assert counted.flop == 2 * 3 * 8 * 4


def test_ratios_are_of_the_first_implementation() -> None:
    common = {"flop": 3e9, "gemm_share": 0.2}
    stock = common | {"seconds": 6.0, "cpu_seconds": 12.0, "peak_bytes": 10**9}
    ours = common | {"seconds": 2.0, "cpu_seconds": 2.0, "peak_bytes": 10**8}
    ours |= {"difference": {"energy": 1e-7, "forces": 2e-6}, "regions": 70}
    assert cells(ours, stock) == ["2", "3.0", "100", "10.0", "", "", "3", "20%", "70", "2.0e-06"]
    assert cells(stock, stock)[-2:] == ["", ""]  # nobody counted
    assert cells(ours, {"failure": "out of memory"})[:4] == ["2", "", "100", ""]
    assert cells({"failure": "over 60 s"}, stock) == ["over 60 s"]
    assert cells(ours | {"cpu_seconds": 1.5}, stock)[:2] == ["~2", "3.0"]


def test_a_repeated_measurement_replaces_the_older_one(ledger: Path) -> None:
    records = read_ledger(ledger)
    newer = records[0] | {"seconds": 0.5}
    with ledger.open("a") as file:
        file.write(json.dumps(newer) + "\n")
    assert read_ledger(ledger) == [newer, *records[1:]]


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    file = tmp_path / "results.jsonl"
    common = {"task": "inference", "model": "31M", "copies": 1, "device": "cpu", "threads": 2}
    records = [
        {"implementation": "ours", "atoms": 45, "seconds": 1.0, "peak_bytes": 10**8},
        {"implementation": "ours", "atoms": 409, "seconds": 9.0, "peak_bytes": 10**8},
        {"implementation": "esen", "atoms": 45, "seconds": 2.0, "peak_bytes": 10**8},
        {"implementation": "esen", "atoms": 409, "seconds": 18.0, "peak_bytes": 10**9},
        {"implementation": "stock", "atoms": 409, "failure": "out of memory"},
    ]
    file.write_text("".join(json.dumps(common | record) + "\n" for record in records))
    return file


def test_scaling_picture(ledger: Path, tmp_path: Path) -> None:
    picture = draw_scaling(ledger, tmp_path / "scaling.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_implementation_has_a_colour() -> None:
    assert {*CLASSES, *CONTEXT} <= COLORS.keys()


def reduced(name: str) -> context.Context:
    """Return one of fairchem's other models, small enough for a test."""
    smaller = {
        "escn": {"num_layers": 1, "sphere_channels": 8, "hidden_channels": 8, "lmax_list": [2]},
        "gemnet_oc": {"num_blocks": 1, "emb_size_edge": 32, "emb_size_atom": 16},
        "esen": {"num_layers": 1, "sphere_channels": 8, "hidden_channels": 8, "lmax": 2},
    }[name]
    config = CONTEXT[name].config
    if "backbone" in config:
        smaller = {"backbone": config["backbone"] | smaller}
    return replace(CONTEXT[name], config=config | smaller)


def installed(name: str) -> str:
    """Return the name of a model of context, or skip the test and say why."""
    if reason := refusal(name, "inference"):
        pytest.skip(reason)
    return name


@pytest.mark.parametrize("task", ["inference", "training", "relaxation"])
@pytest.mark.parametrize("name", HERE)
def test_context_models_do_each_task_or_are_refused_it(
    name: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if task in CONTEXT[installed(name)].cannot:
        assert refusal(name, task)
        return
    monkeypatch.setitem(CONTEXT, name, reduced(name))
    work = measure.TASKS[task](spec_in(tmp_path, name, task))
    outputs = work.forward()
    work.finish(outputs)
    results = work.results(outputs)
    assert results["forces"].shape == (45, 3)
    assert all(value.isfinite().all() for value in results.values())
    assert results["forces"].any()


@pytest.mark.parametrize("name", HERE)
def test_context_models_have_their_published_size(name: str, tmp_path: Path) -> None:
    model = measure.build(spec_in(tmp_path, installed(name), "inference"))
    parameters = sum(p.numel() for p in model.parameters())
    assert f"{parameters / 1e6:.0f}M" == CONTEXT[name].size


def test_context_models_get_ratios_but_no_difference(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_here(spec: Spec, *_: Any) -> Record:
        return json.loads(json.dumps(measure.measure(spec)))

    monkeypatch.setitem(CONTEXT, "escn", reduced("escn"))
    monkeypatch.setattr(compare, "run_child", run_here)
    monkeypatch.setattr(instruments, "gemm_rate", lambda *_: 1e10)
    tiny.write_text(yaml.safe_dump({"model": TINY | {"num_layers": 1, "lmax_list": [2]}}))
    command = ["--models", str(tiny), "--sizes", "45", "--out", str(tmp_path)]
    quick = ["--rounds", "1", "--seconds", "0", "--threads", str(torch.get_num_threads())]
    stock, escn = compare.main([*command, *quick, "--implementations", "stock", "escn"])

    assert "difference" not in escn
    assert 0 < escn["parameters"] < stock["parameters"]
    figures = cells(escn, stock)
    assert figures[1] == f"{stock['seconds'] / escn['seconds']:.1f}"
    assert figures[-1] == ""

    console = Console(width=200, record=True)
    console.print(table([stock, escn]))
    *_, row = (line for line in console.export_text().splitlines() if "escn" in line)
    assert "52M" in row
    assert "tiny" not in row


def test_what_context_models_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.parse(["--tasks", "inference", "neighbors", "--implementations", "ours", "escn"])
    assert "escn cannot be measured at neighbors: it has no" in capsys.readouterr().err

    monkeypatch.setattr(context, "find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        compare.parse(["--implementations", "stock", "gemnet_oc"])
    assert "gemnet_oc needs the package torch-sparse" in capsys.readouterr().err
    compare.parse(["--implementations", "stock", "ours", "escn", "esen"])


def test_uma_needs_an_environment_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    command = ["--implementations", "ours", "uma_s", "--python2", str(python)]
    with pytest.raises(SystemExit):
        compare.parse(command)
    assert f"needs fairchem-core 2, and there is no {python}: run make" in capsys.readouterr().err

    python.touch()
    options = compare.parse(command)
    found = compare.contender("uma_s", options.python2)
    assert (found.python, found.module) == (str(python), "benchmarks.uma")
    assert compare.contender("ours", options.python2).python == sys.executable
    with pytest.raises(SystemExit):
        compare.parse([*command, "--tasks", "training"])
    assert "uma_s cannot be measured at training: only its" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.skipif(not PYTHON2.exists(), reason="there is no environment of fairchem-core 2")
def test_uma_in_the_same_table(tmp_path: Path, tiny: Path) -> None:
    command = ["--models", str(tiny), "--sizes", "9", "--out", str(tmp_path)]
    quick = ["--rounds", "1", "--seconds", "0", "--threads", "1", "--implementations"]
    ours, uma = compare.main([*command, *quick, "ours", "uma_s"])
    assert uma["atoms"] == ours["atoms"]
    assert uma["fairchem-core"].startswith("2.")
    assert ours["fairchem-core"].startswith("1.")
    assert "difference" not in uma
    assert min(uma["seconds"], uma["flop"], uma["peak_bytes"]) > 0


def test_the_host_has_little_to_do_around_a_graph(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # for the tests that follow
    times = host.main(["--model", "tiny", "--atoms", "10", "--repeat", "3"])
    assert len(times) == 6
    assert all(microseconds > 0 for microseconds in times.values())
    assert "around a graph from positions on" in capsys.readouterr().out
