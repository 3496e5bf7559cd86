"""The demo's slabs relaxed in three frameworks: ``python -m benchmarks.relaxations``.

By torch-sim with its in-flight autobatcher, by fairchem-core 1.10's LBFGS in batches, and by ASE's
LBFGS one after the other, all with this package's model. Run it in the environment of fairchem-core
1.10 after ``make demo``; torch-sim is in another, which --torch-sim names (0.5 or later, on Python
3.12, since earlier ones cannot fix atoms). Prints a table: calls of the model, structures in these
calls, seconds, and how many slabs ended relaxed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from fairchem.core.datasets import LmdbDataset

from benchmarks.relax_by import WAYS, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "emt"
# Without test_ood_ads, the adsorbates that the demo's model has not seen: see docs/ase.md.
SPLITS = ("val_id", "test_id", "test_ood_cat", "train")


def read_slabs(data: Path, count: int) -> list[Atoms]:
    """Initial structures of the demo's systems, those not trained on first."""
    entries = [
        entry for split in SPLITS for entry in LmdbDataset({"src": str(data / "is2re" / split)})
    ]
    return [
        Atoms(
            entry.atomic_numbers.numpy(),
            entry.pos.numpy(),
            cell=entry.cell[0].numpy(),
            pbc=True,
            tags=entry.tags.numpy(),
            constraint=FixAtoms(mask=entry.fixed.numpy() == 1),
        )
        for entry in entries[:count]
    ]


def newest_checkpoint() -> Path:
    """What `make demo` trained."""
    found = DEMO.glob("runs/**/checkpoints/*/best_checkpoint.pt")
    return max(found, key=lambda path: path.stat().st_mtime)


def run(way: str, settings: Settings, python: str) -> dict[str, Any]:
    """Relax in a process of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(asdict(settings)))
        file.flush()
        command = [python, "-W", "ignore", "-m", "benchmarks.relax_by", way, file.name]
        variables = os.environ | {"OMP_NUM_THREADS": str(settings.threads)}
        done = subprocess.run(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, check=True
        )
    return json.loads(done.stdout.splitlines()[-1])


def row(way: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    energies = np.array(found["energies"])
    return (
        f"| {way} | {found['calls']} | {found['evaluations']} | {found['seconds']:.1f} |"
        f" {sum(found['converged'])} of {len(energies)} | {energies.mean():.3f} |"
    )


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the command; return the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="default: what `make demo` trained last")
    parser.add_argument("--data", type=Path, default=DEMO / "data", help="default: %(default)s")
    parser.add_argument("--torch-sim", metavar="PYTHON", help="python that has torch-sim")
    parser.add_argument("--systems", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--fmax", type=float, default=0.05, help="eV/A; default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        slabs = Path(folder) / "slabs.traj"
        ase.io.write(slabs, read_slabs(options.data, options.systems))
        checkpoint = options.checkpoint or newest_checkpoint()
        settings = Settings(
            slabs=str(slabs),
            checkpoint=str(checkpoint.resolve()),
            fmax=options.fmax,
            steps=options.steps,
            batch=options.batch,
            threads=options.threads,
        )
        print("| by | calls | structures | seconds | relaxed | mean energy / eV |")
        print("|---|---:|---:|---:|---:|---:|")
        for way in WAYS:
            python = options.torch_sim if way.startswith("torch-sim") else sys.executable
            if python is None:
                continue
            results.append({"way": way, **run(way, settings, python)})
            print(row(way, results[-1]), flush=True)
    return results


if __name__ == "__main__":
    main()
