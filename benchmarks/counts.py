"""What a small model costs, in counts that depend on no clock: ``python -m benchmarks.counts``.

Counts a forward pass and a training step (:mod:`benchmarks.small`) in a process of its own and
writes them to ``tests/counts.json``, against which ``tests/test_counts.py`` holds every change:

- ``flop`` of matrix products, by PyTorch or by our kernels, and the calls, ``products``;
- ``saved_bytes``: what autograd keeps for the backward pass;
- ``peak_bytes``: the most that tensors take at once, above the model and the structure;
- ``regions``: parallel regions of two threads, but those of MKL, which depend on the processor.
  They are counted where there is a C compiler.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import regions

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests/counts.json"
COMMAND = "python -m benchmarks.counts"
NAMES = ("flop", "products", "saved_bytes", "peak_bytes", "regions")
# How much more than in the table is none: tensors that live a little longer by chance of an order.
MARGIN = {"peak_bytes": 0.02}

Counts = dict[str, dict[str, int]]


def count() -> Counts:
    """Count anew: for each task its counts by name.

    Raises:
        RuntimeError: The process failed; the message ends with what it wrote to its standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Our own products, also where those of MKL are faster.
        chosen = {"OMP_NUM_THREADS": "2", "FAIRCHEM_EQUIFORMER_KERNELS": "native"}
        variables = os.environ | chosen | regions.counting(Path(folder))
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.small"]
        child = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False
        )
    if child.returncode != 0:
        raise RuntimeError(
            f"benchmarks.small ended with {child.returncode}:\n{child.stderr[-4000:]}"
        )
    return json.loads(child.stdout)


def percent(before: int, now: int) -> str:
    """Return by how much a count changed, in brackets; nothing where there was none."""
    return f" ({now / before - 1:+.1%})" if before else ""


def growth(task: str, name: str, new: Counts, old: Counts) -> str | None:
    """Return how a count grew beyond its margin, and what to do; None if it did not."""
    before, now = old[task][name], new[task][name]
    if now <= before * (1 + MARGIN.get(name, 0.0)):
        return None
    return (
        f"{task} of a small model: {name} grew from {before:,} to {now:,}{percent(before, now)}. "
        f"If that is wanted, write the new table with `{COMMAND}` and say why in the commit; "
        f"`python -m benchmarks.profile --task {task}` shows which stage it is"
    )


def main() -> None:
    """Write the table, and print what changed."""
    old: Counts = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    new = count()
    for task, counts in new.items():
        for name in NAMES:
            before, now = old.get(task, {}).get(name), counts.get(name)
            if now is None:
                raise SystemExit(f"{COMMAND}: no C compiler to count the {name} with")
            print(f"{task:10} {name:12} {before or 0:>15} -> {now:>15}{percent(before or 0, now)}")
    TABLE.write_text(json.dumps(new, indent=2) + "\n")


if __name__ == "__main__":
    main()
