"""A training step on cores that something else uses, too: ``python -m benchmarks.shared_cores``.

Times steps alone, beside a busy loop and beside another training of the same kind, and prints the
ratios to the time alone. Each training is a process of its own; those of this package wait as its
command has them wait (docs/environment.md), the others as libgomp does. Without an optimizer.
Examples::

    python -m benchmarks.shared_cores
    python -m benchmarks.shared_cores --model 31M --size 45 --implementations ours
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from benchmarks.compare import CONFIGS, ROOT, device_name, size, spec_of, title_of
from benchmarks.table import WIDTH
from fairchem_equiformer import threads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.spec import Spec

DEMO = ROOT / "examples/emt/eqv2_emt.yml"
BUSY_LOOP = [sys.executable, "-c", "print(0.0, flush=True)\nwhile True: pass"]
CONDITIONS = ("alone", "beside a busy loop", "beside another training")
WARM_UP = 2  # steps that are not counted


@contextmanager
def running(command: Sequence[str], variables: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Give a process that is killed at the end."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def next_step(process: subprocess.Popen[str]) -> float:
    """Wait for the end of a step, and return its seconds.

    Raises:
        RuntimeError: The process ended; the message ends with its standard error.
    """
    line = process.stdout.readline()
    if not line:
        said = process.communicate()[1][-4000:]
        raise RuntimeError(f"{' '.join(process.args)} ended with {process.returncode}:\n{said}")
    return float(line)


def seconds_of_a_step(
    command: Sequence[str],
    variables: dict[str, str],
    beside: Sequence[str] | None,
    least_seconds: float,
) -> float:
    """Return the median over some time, at least three steps; beside another process, if any."""
    if beside is not None:
        with running(beside, variables) as other:
            next_step(other)  # it has begun
            return seconds_of_a_step(command, variables, None, least_seconds)
    with running(command, variables) as process:
        for _ in range(WARM_UP):
            next_step(process)
        found, start = [], time.monotonic()
        while len(found) < 3 or time.monotonic() - start < least_seconds:
            found.append(next_step(process))
        return median(found)


def variables_of(implementation: str, num_threads: int) -> dict[str, str]:
    """Return the environment of a process of this implementation."""
    waiting = {} if implementation == "stock" else threads.settings()
    return os.environ | {"OMP_NUM_THREADS": str(num_threads)} | waiting


def measure(spec: Spec, folder: Path) -> dict[str, float]:
    """Return the seconds of a step by condition."""
    file = folder / f"{spec.implementation}.spec"
    file.write_text(json.dumps(asdict(spec)))
    step = [sys.executable, "-m", "benchmarks.steps", str(file)]
    variables = variables_of(spec.implementation, spec.threads)
    found = {}
    for condition, beside in zip(CONDITIONS, (None, BUSY_LOOP, step), strict=True):
        print(f"{spec.implementation}, {condition}", file=sys.stderr)
        found[condition] = seconds_of_a_step(step, variables, beside, spec.seconds)
    return found


def table(found: dict[str, dict[str, float]], title: str) -> Table:
    """Return a line for each implementation."""
    result = Table(title=title)
    result.add_column("by")
    for condition in CONDITIONS:
        result.add_column(f"{condition} / s", justify="right")
    for implementation, seconds in found.items():
        alone = seconds["alone"]
        others = [f"{seconds[name]:.4g} ({seconds[name] / alone:.2f})" for name in CONDITIONS[1:]]
        result.add_row(implementation, f"{alone:.4g}", *others)
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shared_cores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=str(DEMO), help=f"{', '.join(CONFIGS)} or a config file: the demo's")
    add("--size", type=size, default=(4, 45), help="atoms: 45, or 4x45 for a batch of four")
    add("--implementations", nargs="+", choices=["ours", "stock"], default=["ours", "stock"])
    add("--threads", type=int, default=2, help="CPU threads of each training")
    add("--seconds", type=float, default=10.0, help="least time to repeat the step for")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure and print; return seconds by implementation and condition."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        spec = spec_of(options, folder, implementation="", task="training", memory_limit=0)
        found = {
            name: measure(replace(spec, implementation=name), Path(folder))
            for name in options.implementations
        }
    Console(width=WIDTH).print(table(found, f"training step, {title_of(options)}"))
    print(f"{device_name('cpu')}, {os.cpu_count()} cores")
    return found


if __name__ == "__main__":
    main()
