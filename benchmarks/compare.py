"""This package against fairchem-core's own model: ``python -m benchmarks.compare``.

Time, memory and equality of results, on the same weights and structures, each measurement in a
fresh process, the implementations taking turns. Prints a table, appends one JSON line for each
row and implementation to ``<out>/results.jsonl`` and, with two sizes or more, draws
``<out>/scaling.png``. Examples::

    python -m benchmarks.compare                                # inference, 31M, 45 to 409
    python -m benchmarks.compare --tasks training --models 31M 83M --sizes 45 4x45
    python -m benchmarks.compare --tasks neighbors --sizes 409 1609 10009
    python -m benchmarks.compare --implementations ours --sizes 409 1609 10009
    python -m benchmarks.compare --tasks relaxation --sizes 45
    python -m benchmarks.compare --implementations stock ours escn gemnet_oc esen uma_s
    python -m benchmarks.compare --base main~5 --tasks inference training --sizes 45

Structures are those of :func:`benchmarks.slab.slab`; ``4x45`` is a batch of four. All dropout is
off. fairchem's other models (:mod:`benchmarks.context`) have one published size each, whatever
``--models`` says, and weights of their own: their results are not compared. GEMM share is the time
that an implementation's own matrix products would take at the rate of a large fp32 product in the
same process, over the time that it took. Regions are parallel ones (:mod:`benchmarks.regions`).

With ``--base REF`` another commit of this project and this tree take turns, by the same benchmarks.
The exit status is 1 where this tree takes more than 5% longer or 5% more memory at the peak, or any
more FLOPs, bytes kept or parallel regions. Time and peak are medians of rounds, and judged only
where the base's own rounds differ by less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from benchmarks import regions
from benchmarks.base import checked_out, judged
from benchmarks.context import CONTEXT, PYTHON2, refusal
from benchmarks.plot import draw_scaling
from benchmarks.spec import CLASSES, TASKS, Spec
from benchmarks.table import WIDTH, Record, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

ROOT = Path(__file__).parents[1]
CONFIGS = {
    "31M": ROOT / "configs/oc20/all_md/eqv2_31M.yml",
    "83M": ROOT / "configs/oc20/2M/eqv2_83M.yml",
    "153M": ROOT / "configs/oc20/all_md/eqv2_153M.yml",
}
V1_CONFIGS = {
    name: ROOT / f"configs/oc20/is2re/equiformer/{name}.yml"
    for name in ("nonlinear", "linear", "dot_product")
}
EDGE_VECTOR_RESOLUTION = 0.01  # Angstrom: far above rounding, far below the rattled atoms' spread


@dataclass(frozen=True)
class Row:
    """One line of comparison: a task on a model and a batch of ``copies`` slabs."""

    task: str
    model: str
    atoms: int
    copies: int


def edge_set(results: dict[str, Tensor]) -> set[tuple[int, ...]]:
    """Return edges as (source, target, rounded vector), whatever their order."""
    # The shift keeps lattice distances off the edges of the rounding.
    vector = torch.floor(results["vector"] / EDGE_VECTOR_RESOLUTION + 0.1234).long()
    columns = torch.column_stack([results["source"], results["target"], vector])
    return set(map(tuple, columns.tolist()))


def difference(results: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Return for each output the largest difference over the largest value.

    For a neighbour search: the share of edges that only one of the two found.
    """
    if "vector" in reference:
        edges, expected = edge_set(results), edge_set(reference)
        return {"edges": len(edges ^ expected) / max(len(expected), 1)}
    return {
        name: ((results[name] - value).abs().max() / value.abs().max()).item()
        for name, value in reference.items()
    }


@dataclass(frozen=True)
class Contender:
    """Who takes part.

    Attributes:
        implementation: What is measured.
        root: Folder of the package that is measured.
        module: What measures.
        python: In which environment.
    """

    implementation: str
    root: Path = ROOT
    module: str = "benchmarks.measure"
    python: str = sys.executable


def run_child(spec: Spec, timeout: float, contender: Contender) -> Record:
    """Run one measurement in a process of its own.

    Args:
        spec: What to measure.
        timeout: Seconds after which the process is given up.
        contender: Whom to measure.

    Raises:
        RuntimeError: The process failed other than by want of memory or time; the message ends
            with what it wrote to its standard error. Or it measured a package in another folder.
    """
    spec_file = Path(spec.record).with_suffix(".spec")
    spec_file.write_text(json.dumps(asdict(spec)))
    threads = {"OMP_NUM_THREADS": str(spec.threads)}
    variables = os.environ | threads | regions.counting(spec_file.parent)
    command = [contender.python, "-m", contender.module, str(spec_file)]
    try:
        child = subprocess.run(
            command,
            cwd=contender.root,
            env=variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"over {timeout:.0f} s"}
    if child.returncode == -signal.SIGKILL:
        return {"failure": "killed: the system had no memory left"}
    if child.returncode != 0:
        msg = f"{' '.join(command)} ended with {child.returncode}:\n{child.stderr[-4000:]}"
        raise RuntimeError(msg)
    record = json.loads(Path(spec.record).read_text())
    root = str(contender.root.resolve())
    if record.pop("package", root) != root:
        raise RuntimeError(f"{' '.join(command)} in {root} measured a package in another folder")
    return record


def measure_row(
    row: Row,
    config: Path,
    weights: Path,
    contenders: dict[str, Contender],
    options: argparse.Namespace,
) -> dict[str, Record]:
    """Return one record for each contender, over all rounds.

    Of the implementations that share weights, each record has ``difference``, from the first one's
    results, and the first one's has ``spread``, between two rounds of its own: the stock model
    draws a random roll of its edge frames at every call.
    """
    with tempfile.TemporaryDirectory() as folder:
        template = Spec(
            implementation="",
            task=row.task,
            config=str(config.resolve()),
            atoms=row.atoms,
            batch=row.copies,
            device=options.device,
            threads=options.threads,
            seconds=options.seconds,
            round=0,
            memory_limit=int(options.memory * 2**30),
            weights=str(weights),
            record="",
            results="",
        )
        names = list(contenders)
        rounds: dict[str, list[Record]] = {name: [] for name in names}
        for number, name in itertools.product(range(options.rounds), names):
            if any("failure" in record for record in rounds[name]):
                continue
            file = Path(folder) / f"{name}-{number}"
            spec = replace(
                template,
                implementation=contenders[name].implementation,
                round=number,
                record=f"{file}.json",
                results=f"{file}.pt",
            )
            label = f"{row.task}, {row.model}, {row.copies} x {row.atoms} atoms, {name}"
            print(f"{label}, round {number + 1} of {options.rounds}", file=sys.stderr)
            rounds[name].append(run_child(spec, options.timeout, contenders[name]))

        records = {name: summary(rounds[name]) for name in names}
        comparable = {name: records[name] for name in names if name not in CONTEXT}
        if comparable:
            compare_results(comparable, Path(folder), options.rounds)
    return records


def compare_results(records: dict[str, Record], folder: Path, rounds: int) -> None:
    """Set ``difference`` and ``spread`` of the records whose results lie in the folder."""
    first, *others = records
    if "failure" in records[first]:
        return
    reference = torch.load(folder / f"{first}-0.pt", weights_only=True)
    for name in others:
        if "failure" not in records[name]:
            results = torch.load(folder / f"{name}-0.pt", weights_only=True)
            records[name]["difference"] = difference(results, reference)
    if rounds > 1:
        again = torch.load(folder / f"{first}-1.pt", weights_only=True)
        records[first]["spread"] = difference(again, reference)


def summary(records: list[Record]) -> Record:
    """Return one record for all rounds of an implementation."""
    for record in records:
        if "failure" in record:
            return record
    merged = {
        "atoms": records[0]["atoms"],
        "parameters": records[0]["parameters"],
        "seconds": median(t for record in records for t in record["times"]),
        "cpu_seconds": median(t for record in records for t in record["cpu_times"]),
        "calls": sum(len(record["times"]) for record in records),
        "peak_bytes": max(record["peak_bytes"] for record in records),
        "flop": records[0]["flop"],
        "gemm_flop_per_second": max(record["gemm_flop_per_second"] for record in records),
    }
    merged["rounds"] = {
        "seconds": [median(record["times"]) for record in records],
        "peak_bytes": [record["peak_bytes"] for record in records],
    }
    merged["gemm_share"] = merged["flop"] / merged["gemm_flop_per_second"] / merged["seconds"]
    for name in ("saved_bytes", "regions", "torch", "fairchem-core"):
        if name in records[0]:
            merged[name] = records[0][name]
    if "forward_times" in records[0]:
        forward = median(t for record in records for t in record["forward_times"])
        merged["over_forward"] = merged["seconds"] / forward - 1
    return merged


def environment(options: argparse.Namespace) -> Record:
    """Return what a figure depends on, apart from the code: device, threads and versions."""
    return {
        "device": device_name(options.device),
        "threads": options.threads,
        "python": platform.python_version(),
        **{
            name: installed_version(name)
            for name in ("torch", "fairchem-core", "e3nn", "fairchem-equiformer")
        },
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def spec_of(options: argparse.Namespace, folder: str, **rest: Any) -> Spec:
    """Return what to measure on a CPU, by the options model, size, threads and seconds.

    Args:
        options: of a command.
        folder: for the files that the measuring process reads and writes.
        rest: the other fields.
    """
    copies, atoms = options.size
    return Spec(
        config=str(CONFIGS.get(options.model, Path(options.model)).resolve()),
        atoms=atoms,
        batch=copies,
        device="cpu",
        threads=options.threads,
        seconds=options.seconds,
        round=0,
        weights=f"{folder}/weights.pt",
        record=f"{folder}/record.json",
        results=f"{folder}/results.pt",
        **rest,
    )


def title_of(options: argparse.Namespace) -> str:
    """Return the same options in words."""
    copies, atoms = options.size
    batch = f"{copies} x {atoms}" if copies > 1 else f"{atoms}"
    return f"{Path(options.model).stem}, {batch} atoms, {options.threads} threads"


def device_name(device: str) -> str:
    """Return the name of the GPU or the CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed_version(package: str) -> str | None:
    """Return the version of a distribution, or None where it runs from a checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def size(text: str) -> tuple[int, int]:
    """Parse ``45`` or ``4x45`` as (copies, atoms)."""
    copies, _, atoms = text.rpartition("x")
    return int(copies or 1), int(atoms)


def available_gib() -> float:
    """Return the memory that new processes can take, in GiB."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return 8.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, models = parser.add_argument, ", ".join(CONFIGS | V1_CONFIGS)
    add("--tasks", nargs="+", choices=TASKS, default=["inference"])
    add("--models", nargs="+", default=["31M"], help=f"{models} or config files")
    add("--sizes", nargs="+", type=size, default=[(1, 45), (1, 153), (1, 409)], help="45, 4x45")
    choices = [*CLASSES, *CONTEXT]
    add("--implementations", nargs="+", choices=choices, help="stock ours")
    add("--base", metavar="REF", help="compare with this commit: ours, or another implementation")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--rounds", type=int, help="processes per implementation and row: 2, or 5 with --base")
    add("--seconds", type=float, default=5.0, help="least time to repeat the timed call for")
    add("--timeout", type=float, default=900.0, help="seconds after which a process is given up")
    add("--memory", type=float, default=0.8 * available_gib(), help="GiB a process may take (CPU)")
    add("--python2", type=Path, default=PYTHON2, help="Python with fairchem-core 2, for uma_s")
    add("--out", type=Path, default=ROOT / "benchmarks/runs", help="folder of the results")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (5 if options.base else 2)
    if options.implementations is None:
        options.implementations = ["ours"] if options.base else ["stock", "ours"]
    if options.base and options.implementations not in (["ours"], ["equiformer"]):
        parser.error("--base compares one implementation of this package: ours or equiformer")
    for name, task in itertools.product(options.implementations, options.tasks):
        if reason := refusal(name, task, options.python2):
            parser.error(reason)
    return options


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Measure, print and write all rows; return the lines written.

    Raises:
        SystemExit: with ``--base``, if something got worse.
    """
    options = parse(arguments)
    contenders = {name: contender(name, options.python2) for name in options.implementations}
    if not options.base:
        return measure_rows(contenders, options)
    (name,) = contenders
    with checked_out(options.base) as tree:
        lines = measure_rows({"base": Contender(name, tree)} | contenders, options)
    if worse := judge(lines):
        raise SystemExit("\n".join(["worse than the base:", *worse]))
    return lines


def contender(name: str, python2: Path) -> Contender:
    """Return who measures an implementation, and in which environment."""
    if name in CONTEXT and CONTEXT[name].fairchem == 2:
        return Contender(name, module="benchmarks.uma", python=str(python2))
    return Contender(name)


def judge(lines: list[Record]) -> list[str]:
    """Print what could not be judged of pairs of lines; return what got worse."""
    found = []
    for base, new in zip(lines[::2], lines[1::2], strict=True):
        worse, unsure = judged(base, new)
        row = f"{new['task']}, {new['model']}, {new['copies']} x {new['atoms']} atoms"
        found += [f"{row}: {said}" for said in worse]
        for said in unsure:
            print(f"not judged: {row}: {said}")
    return found


def measure_rows(contenders: dict[str, Contender], options: argparse.Namespace) -> list[Record]:
    """Measure, print and write all rows; return the lines written."""
    options.out.mkdir(parents=True, exist_ok=True)
    ledger = options.out / "results.jsonl"
    about = environment(options) | ({"base": options.base} if options.base else {})
    lines: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(options.models):
            config = (CONFIGS | V1_CONFIGS).get(model, Path(model))
            weights = Path(folder) / f"weights-{number}.pt"
            for task, (copies, atoms) in itertools.product(options.tasks, options.sizes):
                row = Row(task, Path(model).stem, atoms, copies)
                records = measure_row(row, config, weights, contenders, options)
                new = [
                    about | asdict(row) | {"implementation": name} | record
                    for name, record in records.items()
                ]
                with ledger.open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in new)
                lines += new
    Console(width=WIDTH).print(table(lines))
    if len(options.sizes) > 1 and not options.base:
        print(f"figures: {ledger}\npicture: {draw_scaling(ledger, options.out / 'scaling.png')}")
    return lines


if __name__ == "__main__":
    main()
