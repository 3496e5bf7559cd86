"""Generate a small slab + adsorbate dataset with OC20's layout, labelled by ASE's EMT potential.

Every system is an fcc slab (one metal, or two mixed at random) with one adsorbate at a random site
and in a random orientation. It is relaxed with EMT, which stands in for DFT. What is written::

    <out>/s2ef/<split>/data.0000.lmdb    frames of the relaxations: energy, forces
    <out>/is2re/<split>/data.0000.lmdb   initial structures: energy_relaxed, pos_relaxed
    <out>/manifest.json                  what was asked for: asked for again, it is there already

The splits are ``train``, ``val_id`` and OC20's four test sets: ``test_id`` (catalysts and
adsorbates of the training set), ``test_ood_ads`` (adsorbates it does not have), ``test_ood_cat``
(alloys it does not have) and ``test_ood_both``. A system, with all of its frames, is in one split
only. Unlike OC20's, the test sets keep their labels, so that the demo can score itself.

Energies are adsorption energies in eV, forces are in eV/Angstrom. EMT knows H, C, N and O only
crudely: the numbers exercise a model, they say nothing about chemistry.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb
import numpy as np
import numpy.typing as npt
import torch
from ase import Atoms
from ase.build import fcc100, fcc111, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.data import atomic_numbers, reference_states
from ase.optimize import BFGS
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch_geometric.data import Data

DATA_VERSION = 1  # raise it when the same seed gives other data: the manifest then differs

METALS = ("Cu", "Pd", "Ag", "Au")
# Held out as pairs: every metal is still in the training set, as in OC20's ood_cat.
HELD_OUT_ALLOYS = (("Cu", "Ag"), ("Pd", "Au"))
FACETS = {"fcc111": fcc111, "fcc100": fcc100}
ADSORBATES = ("H", "C", "N", "O", "CO", "OH")
HELD_OUT_ADSORBATES = ("NO", "NH")
TEST_SPLITS = ("id", "ood_ads", "ood_cat", "ood_both")

FULL = {"train": 150, "val_id": 10} | {f"test_{split}": 10 for split in TEST_SPLITS}
QUICK = {"train": 4, "val_id": 2} | {f"test_{split}": 2 for split in TEST_SPLITS}

LAYERS, FIXED_LAYERS = 4, 2
GUEST_FRACTION = 0.25
VACUUM = 8.0  # Angstrom on each side: farther than EMT's cutoff and the model's
CONTACT = 2.2  # Angstrom from adsorbate to slab at first: where EMT's H, C, N and O all bind
RATTLE = 0.1  # Angstrom, standard deviation of each free coordinate of the slab at first
FMAX, MAX_STEPS, MAX_ATTEMPTS = 0.05, 150, 10  # eV/Angstrom, BFGS steps, draws of a system

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class System:
    """What is drawn once for a system; the rest follows from the seed and ``sid``."""

    sid: int
    split: str
    metals: tuple[str, ...]  # one or two
    facet: str
    adsorbate: str

    def __str__(self) -> str:
        return f"system {self.sid} ({self.adsorbate} on {''.join(self.metals)} {self.facet})"


@dataclass(frozen=True)
class Frame:
    """A labelled structure: energy in eV, forces in eV/Angstrom on all atoms, fixed ones too."""

    fid: int  # step of the relaxation
    positions: npt.NDArray[np.float32]  # [N, 3] Angstrom
    energy: float
    forces: npt.NDArray[np.float64]  # [N, 3]


@dataclass(frozen=True)
class Relaxation:
    """A relaxed system: the frames kept, first to last; the last one is relaxed."""

    system: System
    atoms: Atoms
    frames: tuple[Frame, ...]


def plan(counts: Mapping[str, int], seed: int) -> list[System]:
    """Draw the systems of every split.

    Catalyst, facet and adsorbate come from a shuffled list of all combinations, so that none is
    repeated before all were used.
    """
    rng = np.random.default_rng(seed)
    alloys = [pair for pair in combinations(METALS, 2) if pair not in HELD_OUT_ALLOYS]
    known = [(metal,) for metal in METALS] + alloys
    systems: list[System] = []
    for split, count in counts.items():
        catalysts = HELD_OUT_ALLOYS if split.endswith(("ood_cat", "ood_both")) else known
        adsorbates = HELD_OUT_ADSORBATES if split.endswith(("ood_ads", "ood_both")) else ADSORBATES
        choices = list(product(catalysts, FACETS, adsorbates))
        order: list[int] = []
        while len(order) < count:
            order += rng.permutation(len(choices)).tolist()
        for choice in order[:count]:
            metals, facet, adsorbate = choices[choice]
            systems.append(System(len(systems), split, metals, facet, adsorbate))
    return systems


def gas_references() -> dict[str, float]:
    """Energy in eV of H, C, N and O relative to EMT's H2, N2, H2O and CO, as OC20 has them."""
    energy = {}
    for name in ("H2", "N2", "H2O", "CO"):
        gas = molecule(name)
        relax(gas, name)
        energy[name] = gas.get_potential_energy()
    hydrogen = energy["H2"] / 2
    oxygen = energy["H2O"] - energy["H2"]
    return {"H": hydrogen, "N": energy["N2"] / 2, "O": oxygen, "C": energy["CO"] - oxygen}


def build_slab(system: System, rng: np.random.Generator) -> Atoms:
    """Build the clean slab, 2 x 2 and four layers, periodic in all directions.

    Tags are OC20's: 0 for atoms below the surface, 1 for the surface layer.
    """
    # The cell is rounded to what the dataset stores: labels belong to exactly the stored numbers.
    constant = np.mean([reference_states[atomic_numbers[metal]]["a"] for metal in system.metals])
    slab = FACETS[system.facet](system.metals[0], (2, 2, LAYERS), a=float(constant), vacuum=VACUUM)
    slab.set_cell(slab.cell.array.astype(np.float32), scale_atoms=True)
    slab.pbc = True
    if len(system.metals) == 2:
        guests = rng.permutation(len(slab))[: round(GUEST_FRACTION * len(slab))]
        slab.symbols[guests] = system.metals[1]
    layer = slab.get_tags()  # ASE counts from 1 at the top
    slab.set_constraint(FixAtoms(mask=layer > LAYERS - FIXED_LAYERS))
    slab.set_tags(np.where(layer == 1, 1, 0))
    return slab


def add_adsorbate(slab: Atoms, name: str, rng: np.random.Generator) -> Atoms:
    """Return the slab, rattled, with the adsorbate (tag 2) turned and over a random point.

    The adsorbate has its shape in the gas, as in OC20.
    """
    adsorbate = Atoms(name, positions=[[0, 0, 0]]) if len(name) == 1 else molecule(name)
    relax(adsorbate, name)
    adsorbate.rotate(rng.uniform(0, 360), rng.normal(size=3))
    adsorbate.translate([*(rng.random(2) @ slab.cell.array[:2, :2]), slab.positions[:, 2].max()])
    adsorbate.set_tags(2)
    atoms = slab.copy()
    atoms.rattle(RATTLE, rng=rng)  # free atoms only
    atoms += adsorbate
    while nearest_contact(atoms) < CONTACT:
        atoms.positions[len(slab) :, 2] += 0.05
    return atoms


def nearest_contact(atoms: Atoms) -> float:
    """Smallest distance in Angstrom between an atom of the adsorbate and one of the slab."""
    adsorbate = atoms.get_tags() == 2
    return float(atoms.get_all_distances(mic=True)[adsorbate][:, ~adsorbate].min())


def relax(atoms: Atoms, name: str) -> list[Array]:
    """Relax `atoms` in place with EMT and return the positions [N, 3] of each step.

    Raises:
        NotRelaxedError: the largest force is above ``FMAX`` after ``MAX_STEPS`` steps.
    """
    atoms.calc = EMT()
    optimizer = BFGS(atoms, logfile=None)
    steps: list[Array] = []
    optimizer.attach(lambda: steps.append(atoms.get_positions()))
    if not optimizer.run(fmax=FMAX, steps=MAX_STEPS):
        raise NotRelaxedError(f"{name}: not relaxed to {FMAX} eV/A in {MAX_STEPS} steps")
    return steps


class NotRelaxedError(RuntimeError):
    """A relaxation ran out of steps."""


def kept_steps(last: int) -> list[int]:
    """Steps 0, 1, 2, 4, 7, 11, 17, ... and the last: dense where the structure still moves."""
    steps = [0]
    while (step := 1 + int(1.5 * steps[-1])) < last:
        steps.append(step)
    return [*steps, last] if last else steps


def label(atoms: Atoms, steps: Sequence[Array], reference: float) -> tuple[Frame, ...]:
    """Compute EMT energy (minus `reference`) and forces of the steps worth keeping."""
    frame = atoms.copy()
    frame.calc = EMT()
    frames = []
    for fid in kept_steps(len(steps) - 1):
        # The labels are those of the rounded positions that the dataset stores.
        stored = steps[fid].astype(np.float32)
        frame.positions = stored
        energy = float(frame.get_potential_energy(apply_constraint=False) - reference)
        frames.append(Frame(fid, stored, energy, frame.get_forces(apply_constraint=False)))
    return tuple(frames)


def relax_system(system: System, seed: int, gas: Mapping[str, float]) -> Relaxation:
    """Build and relax a system; a draw that does not converge is drawn anew.

    The energies are E(slab + adsorbate) - E(relaxed slab) - sum of `gas` over the adsorbate, in eV.

    Raises:
        NotRelaxedError: no draw converged.
    """
    for attempt in range(MAX_ATTEMPTS):
        rng = np.random.default_rng([seed, system.sid, attempt])
        try:
            slab = build_slab(system, rng)
            relax(slab, f"clean slab of {system}")
            atoms = add_adsorbate(slab, system.adsorbate, rng)
            steps = relax(atoms, str(system))
        except NotRelaxedError:
            continue
        reference = slab.get_potential_energy() + sum(
            gas[symbol] for symbol in atoms[atoms.get_tags() == 2].symbols
        )
        frames = label(atoms, steps, reference)
        atoms.calc = None  # a calculator cannot travel between processes
        return Relaxation(system, atoms, frames)
    raise NotRelaxedError(f"{system}: no relaxation converged in {MAX_ATTEMPTS} attempts")


def structure_fields(
    relaxation: Relaxation, positions: npt.NDArray[np.float32]
) -> dict[str, object]:
    """The fields that every OC20 structure has, with the types of fairchem's AtomsToGraphs."""
    atoms = relaxation.atoms
    fixed = torch.zeros(len(atoms), dtype=torch.int)
    for constraint in atoms.constraints:
        fixed[constraint.index] = 1
    return {
        "sid": relaxation.system.sid,
        "natoms": len(atoms),
        "atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.uint8),  # [N]
        "tags": torch.tensor(atoms.get_tags(), dtype=torch.long),  # [N] 0, 1 or 2
        "fixed": fixed,  # [N] 1 where the atom may not move
        "cell": torch.tensor(atoms.cell.array, dtype=torch.float32)[None],  # [1, 3, 3]
        "pos": torch.tensor(positions),  # [N, 3]
    }


def s2ef_data(relaxation: Relaxation) -> Iterator[Data]:
    """One structure to energy and forces example per frame."""
    from torch_geometric.data import Data  # noqa: PLC0415  # ase_databases.py goes without

    for frame in relaxation.frames:
        yield Data(
            **structure_fields(relaxation, frame.positions),
            fid=frame.fid,
            energy=frame.energy,
            forces=torch.tensor(frame.forces, dtype=torch.float32),  # [N, 3]
        )


def is2re_data(relaxation: Relaxation) -> Iterator[Data]:
    """One initial structure to relaxed energy and structure example per system."""
    from torch_geometric.data import Data  # noqa: PLC0415

    relaxed = relaxation.frames[-1]
    yield Data(
        **structure_fields(relaxation, relaxation.frames[0].positions),
        energy_relaxed=relaxed.energy,
        pos_relaxed=torch.tensor(relaxed.positions),  # [N, 3]
    )


def write_lmdb(folder: Path, examples: Sequence[Data]) -> None:
    """Write the examples as ``data.0000.lmdb`` and the atom counts as ``metadata.npz``.

    Both are written under temporary names first: a file that exists is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data.0000.lmdb"
    unfinished = folder / "data.0000.lmdb.partial"
    unfinished.unlink(missing_ok=True)
    values = [pickle.dumps(example, protocol=pickle.HIGHEST_PROTOCOL) for example in examples]
    # An entry takes whole pages of 4 KiB; the file only grows to what is used.
    map_size = 2 * sum(len(value) + 8192 for value in values) + 2**20
    with (
        lmdb.open(str(unfinished), map_size=map_size, subdir=False, lock=False) as environment,
        environment.begin(write=True) as transaction,
    ):
        for index, value in enumerate(values):
            transaction.put(str(index).encode(), value)
        transaction.put(b"length", pickle.dumps(len(values)))
    metadata = folder / "metadata.npz.partial"
    with metadata.open("wb") as file:
        np.savez(file, natoms=np.array([example.natoms for example in examples], dtype=np.int64))
    metadata.replace(folder / "metadata.npz")
    unfinished.replace(path)


def generate(out: Path, counts: Mapping[str, int], seed: int = 0, processes: int = 1) -> bool:
    """Write the dataset below `out`, unless the one there is the one asked for.

    Args:
        out: folder to write to.
        counts: number of systems of each split, as ``FULL``.
        seed: the data depend on nothing else.
        processes: how many systems are relaxed at a time.

    Returns:
        Whether anything was written.

    Raises:
        NotRelaxedError: a system could not be relaxed.
    """
    wanted = {"version": DATA_VERSION, "seed": seed, "systems": dict(counts)}
    manifest = out / "manifest.json"
    if manifest.exists() and json.loads(manifest.read_text()) == wanted:
        return False
    manifest.unlink(missing_ok=True)

    relaxations: dict[str, list[Relaxation]] = {split: [] for split in counts}
    for relaxation in relax_all(plan(counts, seed), seed, processes):
        relaxations[relaxation.system.split].append(relaxation)
    for split, done in relaxations.items():
        write_lmdb(out / "s2ef" / split, [data for one in done for data in s2ef_data(one)])
        write_lmdb(out / "is2re" / split, [data for one in done for data in is2re_data(one)])

    unfinished = manifest.with_suffix(".partial")
    unfinished.write_text(json.dumps(wanted, indent=2) + "\n")
    unfinished.replace(manifest)
    return True


def relax_all(systems: Sequence[System], seed: int, processes: int) -> Iterator[Relaxation]:
    """Relax the systems in order, behind a progress bar."""
    task = partial(relax_system, seed=seed, gas=gas_references())
    bar = partial(tqdm, total=len(systems), desc="EMT relaxations", unit="system")
    if processes == 1:
        yield from bar(map(task, systems))
        return
    # "spawn" leaves behind the threads that torch may have started in this process
    with get_context("spawn").Pool(processes) as pool:
        yield from bar(pool.imap(task, systems))


def main() -> None:
    """Run the generator from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "data", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few systems only, for tests")
    args = parser.parse_args()
    counts = QUICK if args.quick else FULL
    written = generate(args.out, counts, args.seed, processes=os.cpu_count() or 1)
    print(f"{'Wrote' if written else 'Already complete:'} {args.out}")


if __name__ == "__main__":
    main()
