"""Write the frames of generate.py as ASE databases, which fairchem-core 2.x trains on.

What is written::

    <out>/<split>.db    frames of the relaxations: energy, forces, fixed atoms, tags

The systems are those of generate.py for the same seed; it needs nothing of fairchem-core 1.10.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from generate import FULL, QUICK, plan, relax_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ase import Atoms
    from generate import Relaxation


def frames(relaxation: Relaxation) -> Iterable[Atoms]:
    """Each frame as atoms with their energy and forces."""
    for frame in relaxation.frames:
        atoms = relaxation.atoms.copy()
        atoms.positions = frame.positions
        atoms.calc = SinglePointCalculator(atoms, energy=frame.energy, forces=frame.forces)
        yield atoms


def write(out: Path, counts: Mapping[str, int], seed: int = 0, processes: int = 1) -> None:
    """Relax the systems and write one database for each split.

    Args:
        out: folder to write to.
        counts: number of systems of each split, as ``FULL``.
        seed: the data depend on nothing else.
        processes: how many systems are relaxed at a time.
    """
    out.mkdir(parents=True, exist_ok=True)
    relaxations = list(relax_all(plan(counts, seed), seed, processes))
    for split in counts:
        unfinished = out / f"{split}.partial.db"
        unfinished.unlink(missing_ok=True)
        with connect(unfinished) as database:
            for one in relaxations:
                if one.system.split == split:
                    for fid, atoms in enumerate(frames(one)):
                        database.write(atoms, data={"sid": one.system.sid, "fid": fid})
        unfinished.replace(out / f"{split}.db")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "data/ase", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few systems only, for tests")
    options = parser.parse_args()
    counts = QUICK if options.quick else FULL
    write(options.out, counts, options.seed, processes=os.cpu_count() or 1)
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
