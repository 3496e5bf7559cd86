"""Energies of the best few structures of each pair by DFT, or whatever stands in for it.

Each has a folder ``single_points/PAIR/PLACEMENT``. It holds ``result.json``, written here by a
calculator of ASE, or the input of VASP, written here, and the ``OSZICAR`` that VASP adds to it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from fairchem_equiformer.adsorbml.placements import Placement
from fairchem_equiformer.adsorbml.relaxation import Clock, read_relaxed
from fairchem_equiformer.calculator import make_calculator
from fairchem_equiformer.errors import InputError
from fairchem_equiformer.files import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from ase import Atoms

    from fairchem_equiformer.adsorbml.ranking import Pair

# AdsorbML's: one structure, and more electronic steps than in OC20's relaxations.
SINGLE_POINT_FLAGS = {"nsw": 0, "nelm": 300}
EDIFF = 1e-4  # eV, VASP's default, which OC20's settings leave


@dataclass(frozen=True)
class SinglePoint:
    """A single-point energy.

    Attributes:
        energy: in eV; None if the calculation did not converge.
        evaluations: of energy and forces: 1.
        scf_steps: electronic steps, where they are known.
        seconds: CPU-seconds, where they are known.
    """

    energy: float | None
    evaluations: int = 1
    scf_steps: int | None = None
    seconds: float | None = None


def compute(run: Path, pairs: Mapping[str, Pair], k: int, calculator: str) -> int:
    """Compute the best `k` of each pair that have no result yet; return how many.

    Args:
        run: folder with relaxations, and for the results.
        pairs: its ranking.
        k: how many of each pair.
        calculator: dotted name, see `make_calculator`.

    Raises:
        InputError: if the calculator is missing or fails.
    """
    made = make_calculator(calculator)

    def evaluate(atoms: Atoms, folder: Path) -> None:
        clock = Clock("CPU")
        atoms.calc = made
        energy = float(atoms.get_potential_energy())
        write_json(folder / "result.json", asdict(SinglePoint(energy, seconds=clock.seconds())))

    return _for_best(run, pairs, k, "result.json", evaluate)


def write_vasp(run: Path, pairs: Mapping[str, Pair], k: int) -> int:
    """Write VASP's input for the best `k` of each pair that have none yet; return how many.

    The settings are OC20's, as fairchem-data-oc has them, with `SINGLE_POINT_FLAGS`.

    Raises:
        InputError: if fairchem-data-oc or the pseudopotentials are missing.
    """
    try:
        from fairchem.data.oc.utils.vasp import write_vasp_input_files  # noqa: PLC0415
        from fairchem.data.oc.utils.vasp_flags import VASP_FLAGS  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            f"{error}; VASP's settings need it: pip install 'fairchem-equiformer[adsorbml]'"
        ) from error

    def write(atoms: Atoms, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        flags = VASP_FLAGS | SINGLE_POINT_FLAGS
        write_vasp_input_files(atoms, outdir=str(folder), vasp_flags=flags)

    # ASE writes KPOINTS last of what VASP reads.
    return _for_best(run, pairs, k, "KPOINTS", write)


def read_single_point(run: Path, pair: str, name: str) -> SinglePoint | None:
    """Read the result of a calculator or of VASP; None if there is none yet.

    Raises:
        InputError: if it cannot be read.
    """
    folder = _folder(run, pair, name)
    if (result := folder / "result.json").exists():
        return SinglePoint(**read_json(result, "single-points"))
    if (oszicar := folder / "OSZICAR").exists():
        return _read_oszicar(oszicar)
    return None


def _for_best(
    run: Path,
    pairs: Mapping[str, Pair],
    k: int,
    written: str,
    do: Callable[[Atoms, Path], None],
) -> int:
    """Call `do` on the relaxed structures whose folder does not have the file `written`."""
    todo = [
        (placement, folder)
        for placement, folder in _best(run, pairs, k)
        if not (folder / written).exists()
    ]
    for placement, folder in tqdm(todo, desc="single points", unit="system"):
        relaxed = read_relaxed(run, placement)
        if relaxed is None:
            raise InputError(f"{placement}: is ranked but no longer relaxed in {run}; relax again")
        try:
            do(relaxed.atoms, folder)
        except Exception as error:  # whatever calculators raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{placement}: {folder}: {reason}") from error
    return len(todo)


def _best(run: Path, pairs: Mapping[str, Pair], k: int) -> Iterator[tuple[Placement, Path]]:
    for pair in pairs.values():
        for one in pair.best(k):
            yield Placement(pair.name, one.name, _unread), _folder(run, pair.name, one.name)


def _unread() -> Atoms:
    raise NotImplementedError  # only the relaxed structure is read


def _folder(run: Path, pair: str, name: str) -> Path:
    return run / "single_points" / pair / name


def _read_oszicar(path: Path) -> SinglePoint:
    """Energy (sigma to 0) and electronic steps of a single point of VASP."""
    from pymatgen.io.vasp.outputs import Oszicar  # noqa: PLC0415  # slow, and rarely needed

    try:
        oszicar = Oszicar(path)
        steps = oszicar.electronic_steps[0]
        energy = float(oszicar.ionic_steps[0]["E0"]) if oszicar.ionic_steps else np.nan
        converged = len(steps) < SINGLE_POINT_FLAGS["nelm"] or abs(float(steps[-1]["dE"])) < EDIFF
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as VASP's OSZICAR ({error!r})") from error
    return SinglePoint(energy if converged and np.isfinite(energy) else None, scf_steps=len(steps))
